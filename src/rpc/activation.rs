//! `ActivationService`: which sites there are, and hidden states from them.
//! Knows how rows are cut into messages, not how they are computed.

use futures::stream::BoxStream;
use inwit_probes::Site;
use tonic::{Request, Response, Status};

use super::call::Call;
use super::convert::{self, Shipping};
use super::proto::activation_service_server::ActivationService;
use super::proto::capture_activations_response::Event as Item;
use super::proto::{
    ActivationChunk, CaptureActivationsRequest, CaptureActivationsResponse, DataType,
    ListSitesRequest, ListSitesResponse, ModelInfo, Site as WireSite,
};
use super::reply::{self, Terms};
use super::server::Served;
use super::tensor;
use crate::engine::event::{Captured, Event};
use crate::engine::request::{PositionSelection, Request as Prepared, Work};
use crate::error::{Error, Result};

#[derive(Clone)]
pub(super) struct Activation(pub(super) Served);

#[tonic::async_trait]
impl ActivationService for Activation {
    async fn list_sites(
        &self,
        request: Request<ListSitesRequest>,
    ) -> Result<Response<ListSitesResponse>, Status> {
        let (metadata, _, ListSitesRequest { model }) = request.into_parts();
        let call = Call::begin(&metadata, "", self.0.deadlines)?;
        call.answer(self.list(&model))
    }

    type CaptureActivationsStream = BoxStream<'static, Result<CaptureActivationsResponse, Status>>;

    async fn capture_activations(
        &self,
        request: Request<CaptureActivationsRequest>,
    ) -> Result<Response<Self::CaptureActivationsStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let call = Call::begin(
            &metadata,
            convert::request_id(&request.input),
            self.0.deadlines,
        )?;
        let stream = async {
            let (draft, shipping) = convert::capture(request)?;
            let prepared = self.0.prepare(&call, draft).await?;
            let width = self.0.engine.info().config.d_model;
            let mut budget = Budget::new(&prepared, width, shipping)?;
            let terms = Terms::new(&call, &prepared.monitor);
            let admit = move |event: &Event| match event {
                Event::Captured(captured) => budget.spend(captured.tokens.len()),
                _ => Ok(()),
            };
            let running = self.0.submit_within(&call, prepared, admit)?;
            let items = move |event| items(&terms, Rows { shipping, width }, event);
            Ok(
                running.into_stream(items, |event_number, event| CaptureActivationsResponse {
                    event_number,
                    event: Some(event),
                }),
            )
        };
        call.answer(stream.await)
    }
}

impl Activation {
    fn list(&self, model: &str) -> Result<ListSitesResponse> {
        let info = self.0.engine.info();
        if !model.is_empty() && model != info.name {
            return Err(Error::NotFound {
                field: "model".into(),
                kind: "model",
                name: model.into(),
                remedy: format!("`{}` is loaded", info.name),
            });
        }
        let sites = Site::all(info.config.n_layers)
            .map(|site| WireSite {
                name: site.to_string(),
                layer: site.layer().map(saturated),
                d_model: saturated(info.config.d_model),
                dtype: DataType::Fp32.into(),
            })
            .collect();
        Ok(ListSitesResponse {
            sites,
            model: Some(self.model()),
        })
    }

    fn model(&self) -> ModelInfo {
        let info = self.0.engine.info();
        let policy = self.0.policy();
        ModelInfo {
            name: info.name.clone(),
            architecture: info.config.family.to_string(),
            architecture_id: info.identity.architecture_id.clone(),
            weights_id: info.identity.weights_id.clone(),
            context_length: saturated(info.context_length),
            d_model: saturated(info.config.d_model),
            layers: saturated(info.config.n_layers),
            vocabulary_size: saturated(info.config.vocab_size),
            weight_bytes: u64::try_from(info.weight_bytes).unwrap_or(u64::MAX),
            weight_format: info.weight_format.clone(),
            kv_type: info.kv_type.clone(),
            kernel_identity: info.kernel_identity.clone(),
            policy: policy.name.clone(),
            policy_revision: policy.revision,
            policy_empty: policy.is_empty(),
            mode: reply::mode(self.0.defaults.mode).into(),
        }
    }
}

fn saturated(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// What a capture may still send.
struct Budget {
    shipping: Shipping,
    width: usize,
    left: u64,
}

impl Budget {
    /// Fails when what is known before the first pass is already too much.
    fn new(request: &Prepared, width: usize, shipping: Shipping) -> Result<Self> {
        let budget = Self {
            shipping,
            width,
            left: shipping.max_bytes,
        };
        let sites = request.capture.as_ref().map_or(0, |wish| wish.sites.len());
        match budget.bytes(known_rows(request).saturating_mul(sites)) {
            Some(bytes) if bytes <= shipping.max_bytes => Ok(budget),
            bytes => Err(Error::invalid(
                "max_bytes",
                format!(
                    "is {}, but the known positions alone need {}; raise it, or ask for fewer sites or positions",
                    shipping.max_bytes,
                    bytes.map_or("more than can be counted".into(), |bytes| bytes.to_string())
                ),
            )),
        }
    }

    fn bytes(&self, rows: usize) -> Option<u64> {
        let bytes = rows
            .checked_mul(self.width)?
            .checked_mul(self.shipping.dtype.size())?;
        u64::try_from(bytes).ok()
    }

    fn spend(&mut self, rows: usize) -> Result<()> {
        let left = self
            .bytes(rows)
            .and_then(|bytes| self.left.checked_sub(bytes));
        self.left = left.ok_or_else(|| {
            Error::invalid(
                "max_bytes",
                format!(
                    "is {}, and the generated positions have used it up; raise it, or set input.sampling.max_tokens",
                    self.shipping.max_bytes
                ),
            )
        })?;
        Ok(())
    }
}

/// How rows are sent.
#[derive(Clone, Copy)]
struct Rows {
    shipping: Shipping,
    width: usize,
}

impl Rows {
    fn per_chunk(self) -> usize {
        let row = self.width.saturating_mul(self.shipping.dtype.size());
        (tensor::MAX_BYTES / row.max(1)).max(1)
    }

    /// At most `MAX_BYTES` each, in order.
    fn chunks(self, captured: Captured) -> Result<Vec<Item>> {
        let rows = captured.tokens.len();
        if rows.checked_mul(self.width) != Some(captured.values.len()) {
            return Err(Error::internal("a capture of the wrong shape"));
        }
        let site = captured.site.to_string();
        let per_chunk = self.per_chunk();
        let values = captured.values.chunks(per_chunk * self.width);
        let tokens = captured.tokens.chunks(per_chunk);
        let firsts = (i64::from(captured.first_position)..).step_by(per_chunk);
        let chunks = values.zip(tokens).zip(firsts);
        Ok(chunks
            .map(|((values, tokens), first_position)| {
                Item::Chunk(ActivationChunk {
                    site: site.clone(),
                    first_position,
                    tensor: Some(tensor::rows(values, self.width, self.shipping.dtype)),
                    token_ids: tokens.to_vec(),
                })
            })
            .collect())
    }
}

/// Positions to be captured that are known before the first pass.
fn known_rows(request: &Prepared) -> usize {
    let prompt = request.prompt.tokens.len();
    let answer = match &request.work {
        Work::Generate => 0,
        Work::Score { answer } => answer.len(),
    };
    match request.capture.as_ref().map(|wish| wish.positions) {
        None => 0,
        Some(PositionSelection::LastPromptToken) => 1,
        Some(PositionSelection::AllPrompt) => prompt,
        Some(PositionSelection::Generated) => answer,
        Some(PositionSelection::FromLastPromptToken) => answer.saturating_add(1),
        Some(PositionSelection::All) => prompt.saturating_add(answer),
    }
}

fn items(terms: &Terms, rows: Rows, event: Event) -> Result<Vec<Item>> {
    Ok(match event {
        Event::Captured(captured) => rows.chunks(captured)?,
        Event::Started(started) => vec![Item::Started(terms.started(started.cached_tokens))],
        Event::Delta(delta) => vec![Item::Delta(terms.delta(delta))],
        Event::Verdict(verdict) => vec![Item::Verdict(terms.verdict(verdict))],
        Event::Retract(retract) => vec![Item::Retract(reply::retract(retract))],
        Event::Completed(completed) => vec![Item::Completed(terms.completed(&completed))],
        Event::Failed(error) => return Err(error),
    })
}

#[cfg(test)]
mod tests {
    use super::super::tensor::Dtype;
    use super::*;

    fn shipping(max_bytes: u64) -> Shipping {
        Shipping {
            dtype: Dtype::Bf16,
            max_bytes,
        }
    }

    fn budget(width: usize, max_bytes: u64) -> Budget {
        Budget {
            shipping: shipping(max_bytes),
            width,
            left: max_bytes,
        }
    }

    fn rows_of(width: usize) -> Rows {
        Rows {
            shipping: shipping(1),
            width,
        }
    }

    fn captured(first_position: u32, rows: usize, width: usize) -> Captured {
        Captured {
            site: Site::ResidPost(1),
            first_position,
            tokens: (0..rows as u32).collect(),
            values: vec![0.5; rows * width],
        }
    }

    fn chunks(items: Vec<Item>) -> Vec<ActivationChunk> {
        items
            .into_iter()
            .map(|item| match item {
                Item::Chunk(chunk) => chunk,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn a_long_capture_is_cut_into_messages_that_every_client_can_receive() {
        let (rows, width) = (1000, 1024);
        let items = rows_of(width).chunks(captured(5, rows, width));
        let chunks = chunks(items.expect("fits"));
        assert_eq!(chunks.len(), 2);
        let mut next = 5;
        for chunk in &chunks {
            let tensor = chunk.tensor.as_ref().expect("a tensor");
            assert!(tensor.data.len() <= tensor::MAX_BYTES);
            assert_eq!(tensor.shape, [chunk.token_ids.len() as i64, width as i64]);
            assert_eq!(tensor.crc32c, Some(crc32c::crc32c(&tensor.data)));
            assert_eq!(chunk.first_position, next);
            assert_eq!(i64::from(chunk.token_ids[0]), next - 5);
            next += chunk.token_ids.len() as i64;
        }
        assert_eq!(next, 5 + rows as i64);
    }

    #[test]
    fn a_capture_ends_before_the_chunk_that_would_be_too_much() {
        let mut budget = budget(4, 3 * 8);
        assert!(budget.spend(2).is_ok());
        assert!(budget.spend(1).is_ok());
        let error = budget.spend(1).expect_err("used up");
        assert!(error.to_string().starts_with("max_bytes: "), "{error}");
    }

    #[test]
    fn a_row_wider_than_a_message_goes_alone_and_counts_do_not_overflow() {
        assert_eq!(rows_of(1 << 30).per_chunk(), 1);
        assert_eq!(budget(usize::MAX, 1).bytes(2), None);
        assert!(budget(usize::MAX, u64::MAX).spend(2).is_err());
    }

    #[test]
    fn a_capture_of_the_wrong_shape_is_a_bug_not_a_panic() {
        let mut wrong = captured(0, 2, 4);
        wrong.values.pop();
        assert!(matches!(rows_of(4).chunks(wrong), Err(Error::Internal(_))));
    }
}
