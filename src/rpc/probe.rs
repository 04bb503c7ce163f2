//! `ProbeService`: the loaded probes, to be read.
//! Knows a snapshot; changes nothing.

use std::sync::Arc;

use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status, Streaming};

use super::call::Call;
use super::proto::probe_service_server::ProbeService;
use super::proto::{
    CreateProbeRequest, CreateProbeResponse, DeleteProbeRequest, DeleteProbeResponse,
    EvaluateThresholdRequest, EvaluateThresholdResponse, GetProbeRequest, GetProbeResponse,
    ListProbesRequest, ListProbesResponse, Probe, ProbeState, UpdateProbeRequest,
    UpdateProbeResponse,
};
use super::server::Served;
use crate::error::{Error, Result};
use crate::registry::{Canaries, LoadedProbe, Snapshot, Standing};

const DEFAULT_PAGE: usize = 50;
const MAX_PAGE: usize = 100;

#[derive(Clone)]
pub(super) struct Probes(pub(super) Served);

#[tonic::async_trait]
impl ProbeService for Probes {
    async fn get_probe(
        &self,
        request: Request<GetProbeRequest>,
    ) -> Result<Response<GetProbeResponse>, Status> {
        let (metadata, _, GetProbeRequest { name }) = request.into_parts();
        let call = Call::begin(&metadata, "", self.0.deadlines)?;
        call.answer(get(&self.0.registry.snapshot(), &name))
    }

    async fn list_probes(
        &self,
        request: Request<ListProbesRequest>,
    ) -> Result<Response<ListProbesResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let call = Call::begin(&metadata, "", self.0.deadlines)?;
        call.answer(list(&self.0.registry.snapshot(), &request))
    }

    async fn create_probe(
        &self,
        request: Request<Streaming<CreateProbeRequest>>,
    ) -> Result<Response<CreateProbeResponse>, Status> {
        self.refuse(&request, "CreateProbe")
    }

    async fn update_probe(
        &self,
        request: Request<UpdateProbeRequest>,
    ) -> Result<Response<UpdateProbeResponse>, Status> {
        self.refuse(&request, "UpdateProbe")
    }

    async fn delete_probe(
        &self,
        request: Request<DeleteProbeRequest>,
    ) -> Result<Response<DeleteProbeResponse>, Status> {
        self.refuse(&request, "DeleteProbe")
    }

    async fn evaluate_threshold(
        &self,
        request: Request<EvaluateThresholdRequest>,
    ) -> Result<Response<EvaluateThresholdResponse>, Status> {
        self.refuse(&request, "EvaluateThreshold")
    }
}

impl Probes {
    fn refuse<T, U>(&self, request: &Request<T>, method: &str) -> Result<Response<U>, Status> {
        let call = Call::begin(request.metadata(), "", self.0.deadlines)?;
        call.answer(Err(Error::unsupported(
            method,
            "probes are changed in the library's folder, before the server starts",
        )))
    }
}

fn get(snapshot: &Snapshot, name: &str) -> Result<GetProbeResponse> {
    if name.is_empty() {
        return Err(Error::invalid("name", "must not be empty"));
    }
    let loaded = by_name(snapshot)
        .find(|loaded| *loaded.name == *name)
        .ok_or_else(|| Error::NotFound {
            field: "name".into(),
            kind: "probe",
            name: name.into(),
            remedy: "ListProbes has those that are".into(),
        })?;
    let manifest_json = serde_json::to_string(loaded.probe.manifest())
        .map_err(|error| Error::internal(format!("a manifest is no JSON: {error}")))?;
    Ok(GetProbeResponse {
        probe: Some(Probe {
            manifest_json,
            ..summary(loaded)
        }),
    })
}

fn list(snapshot: &Snapshot, request: &ListProbesRequest) -> Result<ListProbesResponse> {
    if !request.filter.is_empty() {
        return Err(Error::unsupported(
            "filter",
            "filters are not supported; leave it unset",
        ));
    }
    let size = page_size(request.page_size)?;
    let offset = page_offset(snapshot, &request.page_token)?;
    let probes: Vec<_> = by_name(snapshot)
        .skip(offset)
        .take(size)
        .map(|loaded| summary(loaded))
        .collect();
    let next = offset.saturating_add(probes.len());
    let next_page_token = match next < snapshot.probes.len() {
        true => page_token(snapshot, next),
        false => String::new(),
    };
    Ok(ListProbesResponse {
        probes,
        next_page_token,
    })
}

fn by_name(snapshot: &Snapshot) -> impl Iterator<Item = &Arc<LoadedProbe>> {
    let mut probes: Vec<_> = snapshot.probes.iter().collect();
    probes.sort_by(|a, b| a.name.cmp(&b.name));
    probes.into_iter()
}

fn page_size(asked: i32) -> Result<usize> {
    match usize::try_from(asked) {
        Ok(0) => Ok(DEFAULT_PAGE),
        Ok(size) => Ok(size.min(MAX_PAGE)),
        Err(_) => Err(Error::invalid("page_size", "must not be negative")),
    }
}

/// Binds a place in the list to this query over this snapshot, so that no page can be of another.
fn page_token(snapshot: &Snapshot, offset: usize) -> String {
    let seal = Sha256::digest(format!("ListProbes {} {offset}", snapshot.hash));
    format!("{offset:x}.{}", hex::encode(&seal[..8]))
}

fn page_offset(snapshot: &Snapshot, token: &str) -> Result<usize> {
    if token.is_empty() {
        return Ok(0);
    }
    token
        .split_once('.')
        .and_then(|(offset, _)| usize::from_str_radix(offset, 16).ok())
        .filter(|&offset| page_token(snapshot, offset) == token)
        .ok_or_else(|| {
            Error::invalid(
                "page_token",
                "is not of this query, or the probes have changed; begin again without it",
            )
        })
}

fn summary(loaded: &LoadedProbe) -> Probe {
    let manifest = loaded.probe.manifest();
    let (state, state_message) = state(&loaded.standing);
    Probe {
        name: loaded.name.to_string(),
        revision: loaded.revision,
        etag: format!("{}-{}", loaded.revision, loaded.content_hash),
        model: manifest.model.name.clone(),
        architecture_id: manifest.model.architecture_id.clone(),
        model_weights_sha256: manifest.model.weights_id.clone(),
        content_sha256: loaded.content_hash.clone(),
        sites: manifest
            .heads
            .iter()
            .map(|head| head.site.to_string())
            .collect(),
        d_model: u32::try_from(manifest.d_model).unwrap_or(u32::MAX),
        gathers: manifest.gathers.iter().map(ToString::to_string).collect(),
        state: state.into(),
        native: matches!(loaded.standing, Standing::Native),
        state_message,
        ..Probe::default()
    }
}

fn state(standing: &Standing) -> (ProbeState, String) {
    match standing {
        Standing::Native => (ProbeState::Active, String::new()),
        Standing::Unverified { canaries } => match canaries {
            Canaries::Passed => (
                ProbeState::Active,
                "fitted on other weights; its canaries passed".into(),
            ),
            Canaries::NotRun => (
                ProbeState::Unverified,
                "fitted on other weights; its canaries did not run".into(),
            ),
            Canaries::Failed(why) => (ProbeState::Failed, format!("its canaries failed: {why}")),
        },
    }
}
