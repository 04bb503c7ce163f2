//! What the tests over sockets share: a real server on a tiny model, a library whose rules fire where
//! a test wants them to, and callers, polite and impolite.
//! Knows the contract; takes nothing from the server but its address, its load and its decisions.

use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use inwit::engine::prepare::Defaults;
use inwit::engine::{Engine, EngineOptions, EngineThread, Load, Model};
use inwit::journal::Memory;
use inwit::model::kernels::{KvType, WeightFormat};
use inwit::model::{Placement, Source};
use inwit::policy::{DecisionRecord, DecisionSink, Mode};
use inwit::registry::{LibraryFile, ModelIds, Registry, Snapshot};
use inwit::rpc::proto::activation_service_client::ActivationServiceClient;
use inwit::rpc::proto::generate_stream_response::Event;
use inwit::rpc::proto::generation_input::Prompt;
use inwit::rpc::proto::generation_service_client::GenerationServiceClient;
use inwit::rpc::proto::probe_service_client::ProbeServiceClient;
use inwit::rpc::proto::{
    ChatMessage, ChatPrompt, Completed, GenerateRequest, GenerateResponse, GenerateStreamRequest,
    GenerateStreamResponse, GenerationInput, MonitorMode, MonitorOptions, SamplingOptions, Started,
    TokenLogprobs, TokenPrompt, Verdict,
};
use inwit::rpc::server::{Deadlines, Door, Limits};
use inwit::rpc::{Served, http as http_listener, serve};
use inwit_probes::{
    Calibration, CalibrationKind, Gather, Head, InputNorm, Kind, Manifest, ModelIdentity,
    NormStatistics, Positions, Probe, RefusalHead, RefusalHeadManifest, Site, SteeringVector,
    TwoLayer, VectorManifest,
};
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

use crate::golden::golden;

/// A guard against a test that hangs, never a measure of time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const GENERATE: &str = "/inwit.v1.GenerationService/Generate";
pub(crate) const GENERATE_STREAM: &str = "/inwit.v1.GenerationService/GenerateStream";
/// A request whose id begins so stops the engine at its end while the gate is shut.
const PLUG: &str = "plug";

/// A library for the tiny model: every artefact is native to it.
pub(crate) struct Library {
    pub(crate) ids: ModelIds,
    template_hash: String,
    files: Vec<LibraryFile>,
}

impl Library {
    fn new(ids: ModelIds, template_hash: String) -> Self {
        Self {
            ids,
            template_hash,
            files: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, inside: &str, bytes: Vec<u8>) {
        let file = LibraryFile::new(format!("library/{inside}"), inside, || Ok(bytes));
        self.files.push(file.unwrap().unwrap());
    }

    pub(crate) fn identity(&self) -> ModelIdentity {
        ModelIdentity {
            name: "tiny".into(),
            architecture_id: self.ids.architecture_id.clone(),
            weights_id: self.ids.weights_id.clone(),
            weight_format: "f32".into(),
        }
    }

    pub(crate) fn manifest(&self, name: &str, kind: Kind, positions: Positions) -> Manifest {
        let mut manifest = Manifest::new(name, kind, self.ids.d_model, positions, self.identity());
        manifest
            .trained_on
            .template_hash
            .clone_from(&self.template_hash);
        manifest.calibrations = vec![Calibration {
            gather: Gather::Last,
            kind: CalibrationKind::Platt { a: 1.0, b: 0.0 },
            prior: 0.5,
            thresholds: vec![],
            n_benign: 10,
            n_harmful: 10,
        }];
        manifest
    }

    /// A probe that says `logit` wherever it reads, give or take nothing that matters.
    pub(crate) fn probe(&mut self, name: &str, positions: Positions, logit: f32) -> &mut Self {
        self.probe_at(name, Site::ResidPost(0), positions, logit)
    }

    pub(crate) fn probe_at(
        &mut self,
        name: &str,
        site: Site,
        positions: Positions,
        logit: f32,
    ) -> &mut Self {
        let head = Head {
            site,
            weight: vec![1e-6; self.ids.d_model],
            bias: vec![logit],
            out: 1,
            norm: InputNorm::None,
        };
        let manifest = self.manifest(name, Kind::Logistic, positions);
        let probe = Probe::new(manifest, vec![head], None).unwrap();
        self.add(
            &format!("probes/{name}.safetensors"),
            probe.to_bytes().unwrap(),
        );
        self
    }

    /// A probe whose every output overflows: one of its two hidden units is always huge.
    pub(crate) fn broken_probe(&mut self, name: &str, positions: Positions) -> &mut Self {
        let d_model = self.ids.d_model;
        let mut weight = vec![1e30; d_model];
        weight.extend(vec![-1e30; d_model]);
        let head = Head {
            site: Site::ResidPost(1),
            weight,
            bias: vec![0.0; 2],
            out: 2,
            norm: InputNorm::None,
        };
        let prober = TwoLayer {
            w2: vec![3e38; 2],
            b2: vec![0.0],
            out: 1,
        };
        let manifest = self.manifest(name, Kind::TwoLayer, positions);
        let probe = Probe::new(manifest, vec![head], Some(prober)).unwrap();
        self.add(
            &format!("probes/{name}.safetensors"),
            probe.to_bytes().unwrap(),
        );
        self
    }

    pub(crate) fn vector(&mut self, name: &str, size: f32) -> &mut Self {
        let norms = NormStatistics {
            mean: 1.0,
            std: 0.1,
            rows: 10,
        };
        let d_model = self.ids.d_model;
        let manifest =
            VectorManifest::new(name, Site::ResidPost(0), d_model, norms, self.identity());
        let vector = SteeringVector::new(manifest, direction(d_model, size)).unwrap();
        self.add(
            &format!("vectors/{name}.safetensors"),
            vector.to_bytes().unwrap(),
        );
        self
    }

    pub(crate) fn head(&mut self, name: &str) -> &mut Self {
        let (d_model, vocab) = (self.ids.d_model, self.ids.vocab);
        let manifest = RefusalHeadManifest::new(name, 1, d_model, vocab, self.identity());
        let head = RefusalHead::new(manifest, direction(vocab, 30.0), direction(d_model, 1.0));
        self.add(
            &format!("heads/{name}.safetensors"),
            head.unwrap().to_bytes().unwrap(),
        );
        self
    }

    pub(crate) fn policy(&mut self, name: &str, document: &str) -> &mut Self {
        self.add(&format!("policies/{name}.toml"), document.into());
        self
    }

    /// One rule that follows one probe.
    pub(crate) fn rule(&mut self, policy: &str, probe: &str, rest: &str) -> &mut Self {
        let document = format!(
            "[[detector]]\nname = \"{probe}-detector\"\nprobe = \"{probe}\"\n\
             [[rule]]\nname = \"{policy}-rule\"\nwhen = {{ detector = \"{probe}-detector\" }}\n{rest}\n"
        );
        self.policy(policy, &document)
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot::from_files(&self.files, &self.ids, Some("empty")).unwrap()
    }
}

/// A vector that points nowhere in particular, the same on every run.
pub(crate) fn direction(length: usize, size: f32) -> Vec<f32> {
    (0..length)
        .map(|i| ((i as f32 + 1.0) * 1.7).sin() * size)
        .collect()
}

/// Keeps decisions, and can stop the engine where a request that is a plug ends.
pub(crate) struct Gate {
    memory: Memory,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    shut: bool,
    /// The engine stands at the gate.
    waiting: bool,
}

impl Gate {
    fn new() -> Self {
        Self {
            memory: Memory::new(100_000),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn open(&self) {
        self.state.lock().unwrap().shut = false;
        self.changed.notify_all();
    }
}

impl DecisionSink for Gate {
    fn record(&self, record: DecisionRecord) {
        let plug = record.request_id.starts_with(PLUG);
        self.memory.record(record);
        if !plug {
            return;
        }
        let mut state = self.state.lock().unwrap();
        state.waiting = state.shut;
        self.changed.notify_all();
        while state.shut {
            state = self.changed.wait(state).unwrap();
        }
        state.waiting = false;
    }
}

pub(crate) struct Setup {
    pub(crate) mode: Mode,
    pub(crate) policy: Option<&'static str>,
    pub(crate) overrides: bool,
    pub(crate) options: EngineOptions,
    pub(crate) deadlines: Deadlines,
    pub(crate) limits: Limits,
    pub(crate) grace: Duration,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            mode: Mode::Shadow,
            policy: None,
            overrides: true,
            options: EngineOptions {
                max_running: 8,
                max_waiting: 8,
                step_token_budget: 64,
                prefill_share: 100,
                kv_bytes: 16 << 20,
                kv_type: KvType::F32,
                threads: 1,
                capture_bytes: 1 << 30,
                context_limit: None,
                journal_key: [7; 32],
            },
            deadlines: Deadlines {
                default: Duration::from_secs(120),
                max: Duration::from_secs(600),
            },
            limits: Limits::default(),
            grace: Duration::from_secs(30),
        }
    }
}

/// A running server. Dropping it cuts everything off.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) http_address: SocketAddr,
    pub(crate) engine: Engine,
    pub(crate) registry: Arc<Registry>,
    pub(crate) defaults: Defaults,
    gate: Arc<Gate>,
    shutdown: CancellationToken,
    grpc: JoinHandle<inwit::error::Result<()>>,
    http: JoinHandle<inwit::error::Result<()>>,
    _thread: EngineThread,
}

fn source() -> &'static Source {
    static SOURCE: OnceLock<Source> = OnceLock::new();
    SOURCE.get_or_init(|| Source::open(&golden("llama/model.gguf")).unwrap())
}

impl Server {
    /// The tiny llama, and what `stock` puts into its library.
    pub(crate) async fn start(setup: Setup, stock: impl FnOnce(&mut Library)) -> Self {
        let model = Model::load(source(), &Placement::cpu(WeightFormat::F32)).unwrap();
        let gate = Arc::new(Gate::new());
        let max_waiting = setup.options.max_waiting;
        let (engine, thread) = Engine::start(model, setup.options, gate.clone()).unwrap();
        let template = engine.template().unwrap().hash();
        let mut library = Library::new(engine.info().ids(), template);
        stock(&mut library);
        let registry = Arc::new(Registry::new(library.snapshot()));
        let defaults = Defaults {
            mode: setup.mode,
            policy: setup.policy.map(str::to_owned),
            max_tokens: 64,
            overrides: setup.overrides,
        };
        let served = Served::new(
            engine.clone(),
            registry.clone(),
            defaults.clone(),
            setup.deadlines,
            max_waiting,
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, http_address) = (listener.local_addr().unwrap(), http.local_addr().unwrap());
        let shutdown = CancellationToken::new();
        let http = tokio::spawn(http_listener::serve(
            Door::for_http(http, setup.limits),
            served.clone(),
            std::future::pending(),
        ));
        let until = shutdown.clone().cancelled_owned();
        let door = Door::for_grpc(listener, setup.limits);
        let grpc = tokio::spawn(serve(door, served, setup.grace, until));
        Self {
            address,
            http_address,
            engine,
            registry,
            defaults,
            gate,
            shutdown,
            grpc,
            http,
            _thread: thread,
        }
    }

    pub(crate) async fn channel(&self) -> Channel {
        let uri = format!("http://{}", self.address);
        Channel::from_shared(uri).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn generation(&self) -> GenerationServiceClient<Channel> {
        GenerationServiceClient::new(self.channel().await)
    }

    pub(crate) async fn activation(&self) -> ActivationServiceClient<Channel> {
        ActivationServiceClient::new(self.channel().await)
    }

    pub(crate) async fn probes(&self) -> ProbeServiceClient<Channel> {
        ProbeServiceClient::new(self.channel().await)
    }

    /// What SIGTERM does.
    pub(crate) fn begin_drain(&self) {
        self.shutdown.cancel();
    }

    /// Waits for the listener to end.
    pub(crate) async fn ended(&mut self) -> inwit::error::Result<()> {
        let ended = tokio::time::timeout(PATIENCE, &mut self.grpc).await;
        ended.expect("the server does not end").unwrap()
    }

    /// The decision about a request, once there is one.
    pub(crate) async fn decision(&self, id: &str) -> DecisionRecord {
        let find = || {
            let records = self.gate.memory.records();
            records.into_iter().find(|record| record.request_id == id)
        };
        eventually(&format!("no decision about {id}"), || find().is_some()).await;
        find().unwrap()
    }

    /// Waits until nothing runs, waits or holds KV.
    pub(crate) async fn idle(&self) {
        let free = |load: Load| {
            load.running == 0
                && load.waiting == 0
                && load.queued_tokens == 0
                && load.kv_blocks_used == 0
        };
        let load = || self.engine.load();
        eventually("requests or KV blocks are left over", || free(load())).await;
    }

    /// Stops the engine after `steps` tokens of a request of its own, until the plug is dropped.
    pub(crate) async fn plug(&self, steps: u32) -> Plug {
        self.gate.state.lock().unwrap().shut = true;
        let mut client = self.generation().await;
        let input = GenerationInput {
            request_id: format!("{PLUG}-{}", uuid::Uuid::new_v4()),
            ..raw("A plug.", steps)
        };
        let task = tokio::spawn(async move { unary(&mut client, input).await });
        eventually("the plug does not stop the engine", || {
            self.gate.state.lock().unwrap().waiting
        })
        .await;
        Plug {
            gate: self.gate.clone(),
            _task: task,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.gate.open();
        self.grpc.abort();
        self.http.abort();
    }
}

/// While it lives, the engine stands still.
pub(crate) struct Plug {
    gate: Arc<Gate>,
    _task: JoinHandle<Result<GenerateResponse, Status>>,
}

impl Drop for Plug {
    fn drop(&mut self) {
        self.gate.open();
    }
}

/// Asks again and again until it holds.
pub(crate) async fn eventually(otherwise: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(
        tokio::time::timeout(PATIENCE, wait).await.is_ok(),
        "{otherwise}"
    );
}

/// Long enough for a peer to hear what was sent to it; nothing is asserted of it.
pub(crate) async fn a_moment() {
    tokio::time::sleep(Duration::from_millis(50)).await;
}

fn sampling(max_tokens: u32) -> Option<SamplingOptions> {
    Some(SamplingOptions {
        max_tokens: Some(max_tokens),
        seed: Some(1),
        ..Default::default()
    })
}

pub(crate) fn raw(text: &str, max_tokens: u32) -> GenerationInput {
    GenerationInput {
        prompt: Some(Prompt::RawText(text.into())),
        sampling: sampling(max_tokens),
        ..Default::default()
    }
}

pub(crate) fn tokens(ids: Vec<u32>, max_tokens: u32) -> GenerationInput {
    GenerationInput {
        prompt: Some(Prompt::Tokens(TokenPrompt { token_ids: ids })),
        sampling: sampling(max_tokens),
        ..Default::default()
    }
}

pub(crate) fn chat(turns: &[(&str, &str)], max_tokens: u32) -> GenerationInput {
    let message = |&(role, content): &(&str, &str)| ChatMessage {
        role: role.into(),
        content: content.into(),
    };
    GenerationInput {
        prompt: Some(Prompt::Chat(ChatPrompt {
            messages: turns.iter().map(message).collect(),
        })),
        sampling: sampling(max_tokens),
        ..Default::default()
    }
}

/// The same request under a policy.
pub(crate) fn under(policy: &str, mode: MonitorMode, input: GenerationInput) -> GenerationInput {
    GenerationInput {
        monitor: Some(MonitorOptions {
            mode: mode.into(),
            policy: policy.into(),
            ..Default::default()
        }),
        ..input
    }
}

pub(crate) fn enforced(policy: &str, input: GenerationInput) -> GenerationInput {
    under(policy, MonitorMode::Enforce, input)
}

pub(crate) async fn unary(
    client: &mut GenerationServiceClient<Channel>,
    input: GenerationInput,
) -> Result<GenerateResponse, Status> {
    let request = GenerateRequest { input: Some(input) };
    let reply = tokio::time::timeout(PATIENCE, client.generate(request)).await;
    Ok(reply.expect("no reply")?.into_inner())
}

pub(crate) async fn open_stream(
    client: &mut GenerationServiceClient<Channel>,
    input: GenerationInput,
) -> Result<Streaming<GenerateStreamResponse>, Status> {
    let request = GenerateStreamRequest { input: Some(input) };
    Ok(client.generate_stream(request).await?.into_inner())
}

/// The whole stream, folded.
pub(crate) async fn stream(
    client: &mut GenerationServiceClient<Channel>,
    input: GenerationInput,
) -> Answer {
    let mut answer = Answer::default();
    let mut messages = match open_stream(client, input).await {
        Ok(messages) => messages,
        Err(status) => {
            answer.status = Some(status);
            return answer;
        }
    };
    loop {
        let next = tokio::time::timeout(PATIENCE, messages.message()).await;
        match next.expect("the stream stands still") {
            Ok(Some(message)) => answer.take(message),
            Ok(None) => return answer.checked(),
            Err(status) => {
                answer.status = Some(status);
                return answer;
            }
        }
    }
}

/// What a client makes of a stream, by the words of the contract alone.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) token_ids: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) verdicts: Vec<Verdict>,
    pub(crate) started: Option<Started>,
    pub(crate) completed: Option<Completed>,
    pub(crate) status: Option<Status>,
    pub(crate) events: Vec<Event>,
}

impl Answer {
    pub(crate) fn take(&mut self, message: GenerateStreamResponse) {
        assert_eq!(message.event_number, self.events.len() as u64);
        assert!(self.completed.is_none(), "something follows `completed`");
        let event = message.event.expect("an event that this client knows");
        self.events.push(event.clone());
        let first = self.events.len() == 1;
        assert_eq!(matches!(event, Event::Started(_)), first, "{event:?}");
        match event {
            Event::Started(started) => self.started = Some(started),
            Event::Delta(delta) => {
                self.text.push_str(&delta.text);
                self.token_ids.extend(delta.token_ids);
                self.logprobs.extend(delta.logprobs);
            }
            Event::Verdict(verdict) => self.verdicts.push(verdict),
            Event::Retract(retract) => {
                self.text.truncate(retract.keep_text_bytes as usize);
                self.token_ids.truncate(retract.keep_token_count as usize);
                self.logprobs.truncate(retract.keep_token_count as usize);
                self.text.push_str(&retract.replacement_text);
                self.token_ids.extend(retract.replacement_token_ids);
            }
            Event::Completed(completed) => self.completed = Some(completed),
        }
    }

    fn checked(self) -> Self {
        assert!(self.completed.is_some(), "an OK end without `completed`");
        self
    }

    pub(crate) fn completed(&self) -> &Completed {
        let completed = self.completed.as_ref();
        completed.unwrap_or_else(|| panic!("no `completed`: {:?}", self.status))
    }

    /// Where the first event of a kind is.
    pub(crate) fn place(&self, kind: impl Fn(&Event) -> bool) -> Option<usize> {
        self.events.iter().position(kind)
    }
}

/// What a status tells.
#[derive(Debug, PartialEq)]
pub(crate) struct Refusal {
    pub(crate) code: Code,
    pub(crate) reason: String,
    pub(crate) field: String,
}

pub(crate) fn refusal(status: &Status) -> Refusal {
    let details = status.get_error_details();
    let info = details.error_info();
    let violation = details.bad_request().and_then(|bad| {
        bad.field_violations
            .first()
            .map(|first| first.field.clone())
    });
    let subject = details.precondition_failure().and_then(|failure| {
        failure
            .violations
            .first()
            .map(|first| first.subject.clone())
    });
    let field = violation
        .or_else(|| info.and_then(|info| info.metadata.get("field").cloned()))
        .or(subject);
    Refusal {
        code: status.code(),
        reason: info.map(|info| info.reason.clone()).unwrap_or_default(),
        field: field.unwrap_or_default(),
    }
}

/// What lay on the wire in answer to one call.
#[derive(Debug, Default)]
pub(crate) struct Raw {
    pub(crate) http_status: Option<u16>,
    pub(crate) grpc_status: Option<i32>,
    /// Every byte of the body.
    pub(crate) body: Vec<u8>,
    /// The stream or the connection was ended in another way.
    pub(crate) broken: Option<String>,
}

impl Raw {
    fn read(&mut self, headers: &http::HeaderMap) {
        let status = headers.get("grpc-status");
        let status = status.and_then(|status| status.to_str().ok()?.parse().ok());
        self.grpc_status = status.or(self.grpc_status);
    }

    /// The messages in the body, of which nothing may be left over.
    pub(crate) fn messages<M: Message + Default>(&self) -> Vec<M> {
        let mut rest = self.body.as_slice();
        let mut messages = Vec::new();
        while !rest.is_empty() {
            assert_eq!(rest.get_u8(), 0, "a compressed message");
            let length = rest.get_u32() as usize;
            let (message, after) = rest.split_at(length);
            messages.push(M::decode(message).unwrap());
            rest = after;
        }
        messages
    }
}

/// One message as gRPC frames it.
pub(crate) fn framed(message: &impl Message) -> Bytes {
    frame(false, &message.encode_to_vec())
}

pub(crate) fn frame(compressed: bool, message: &[u8]) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(u8::from(compressed));
    bytes.put_u32(message.len() as u32);
    bytes.put_slice(message);
    bytes.freeze()
}

pub(crate) fn post(path: &str, headers: &[(&str, &str)]) -> http::Request<()> {
    let mut request = http::Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

/// A bare HTTP/2 connection.
pub(crate) async fn http2(address: SocketAddr) -> h2::client::SendRequest<Bytes> {
    let socket = TcpStream::connect(address).await.unwrap();
    let (send, connection) = h2::client::handshake(socket).await.unwrap();
    tokio::spawn(connection);
    send
}

/// One call that says exactly these bytes.
pub(crate) async fn raw_call(
    address: SocketAddr,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> Raw {
    let call = async {
        let mut raw = Raw::default();
        if let Err(error) = exchange(address, post(path, headers), body, &mut raw).await {
            raw.broken = Some(error.to_string());
        }
        raw
    };
    let raw = tokio::time::timeout(PATIENCE, call).await;
    raw.expect("the server neither answers nor hangs up")
}

async fn exchange(
    address: SocketAddr,
    request: http::Request<()>,
    mut body: Bytes,
    raw: &mut Raw,
) -> Result<(), h2::Error> {
    let mut send = http2(address).await.ready().await?;
    let (response, mut sending) = send.send_request(request, false)?;
    let upload = async {
        if body.is_empty() {
            let _ = sending.send_data(Bytes::new(), true);
        }
        while !body.is_empty() {
            sending.reserve_capacity(body.len());
            let room = std::future::poll_fn(|context| sending.poll_capacity(context)).await;
            let Some(Ok(room)) = room else { return };
            let part = body.split_to(room.min(body.len()));
            if sending.send_data(part, body.is_empty()).is_err() {
                return;
            }
        }
    };
    // A server may answer before it has read everything.
    let (_, response) = tokio::join!(upload, response);
    let response = response?;
    raw.http_status = Some(response.status().as_u16());
    raw.read(response.headers());
    let mut incoming = response.into_body();
    while let Some(data) = incoming.data().await {
        let data = data?;
        let _ = incoming.flow_control().release_capacity(data.len());
        raw.body.extend_from_slice(&data);
    }
    if let Some(trailers) = incoming.trailers().await? {
        raw.read(&trailers);
    }
    Ok(())
}
