//! What callers meet on the wire: every bad input of docs/errors.md that needs a server, and that a
//! healthy request answers as before after each of them.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use inwit::engine::{Defaults, Engine, EngineOptions, EngineThread, Model};
use inwit::journal::Discard;
use inwit::model::kernels::WeightFormat;
use inwit::model::{Placement, Source};
use inwit::policy::Mode;
use inwit::registry::Registry;
use inwit::rpc::proto::activation_service_client::ActivationServiceClient;
use inwit::rpc::proto::generate_stream_response::Event;
use inwit::rpc::proto::generation_input::Prompt;
use inwit::rpc::proto::generation_service_client::GenerationServiceClient;
use inwit::rpc::proto::probe_service_client::ProbeServiceClient;
use inwit::rpc::proto::{self, intervention};
use inwit::rpc::server::{Deadlines, Door, Limits};
use inwit::rpc::{Served, http, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

use super::golden::golden;

const GRACE: Duration = Duration::from_millis(300);

struct Server {
    engine: Engine,
    channel: Channel,
    address: std::net::SocketAddr,
    http: std::net::SocketAddr,
    shutdown: CancellationToken,
    serving: JoinHandle<inwit::error::Result<()>>,
    _thread: EngineThread,
}

impl Server {
    async fn start() -> Self {
        Self::with(EngineOptions::default()).await
    }

    async fn with(options: EngineOptions) -> Self {
        let source = Source::open(&golden("llama/hf")).unwrap();
        let model = Model::load(&source, &Placement::cpu(WeightFormat::F32)).unwrap();
        let options = EngineOptions {
            threads: 1,
            kv_bytes: 64 << 20,
            ..options
        };
        let max_waiting = options.max_waiting;
        let (engine, thread) = Engine::start(model, options, Arc::new(Discard)).unwrap();
        let defaults = Defaults {
            mode: Mode::Shadow,
            policy: None,
            max_tokens: 16,
            overrides: true,
        };
        let deadlines = Deadlines {
            default: Duration::from_secs(60),
            max: Duration::from_secs(60),
        };
        let served = Served::new(
            engine.clone(),
            Arc::new(Registry::empty()),
            defaults,
            deadlines,
            max_waiting,
        );
        let shutdown = CancellationToken::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let http_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http_address = http_listener.local_addr().unwrap();
        tokio::spawn(http::serve(
            Door::for_http(http_listener, Limits::default()),
            served.clone(),
            std::future::pending(),
        ));
        let until = shutdown.clone().cancelled_owned();
        let door = Door::for_grpc(listener, Limits::default());
        let serving = tokio::spawn(serve(door, served, GRACE, until));
        let channel = Channel::from_shared(format!("http://{address}"))
            .unwrap()
            .connect()
            .await
            .unwrap();
        Self {
            engine,
            channel,
            address,
            http: http_address,
            shutdown,
            serving,
            _thread: thread,
        }
    }

    fn generation(&self) -> GenerationServiceClient<Channel> {
        GenerationServiceClient::new(self.channel.clone())
    }

    async fn generate(
        &self,
        input: proto::GenerationInput,
    ) -> Result<proto::GenerateResponse, Status> {
        let request = proto::GenerateRequest { input: Some(input) };
        let reply = self.generation().generate(request).await?;
        Ok(reply.into_inner())
    }

    async fn healthy(&self) -> String {
        self.generate(tokens(4)).await.unwrap().text
    }

    /// Every place and every row of this server's requests is free again.
    async fn at_rest(&self) {
        loop {
            let load = self.engine.load();
            if load.running == 0 && load.waiting == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.http).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    }
}

fn tokens(max_tokens: u32) -> proto::GenerationInput {
    proto::GenerationInput {
        prompt: Some(Prompt::Tokens(proto::TokenPrompt {
            token_ids: vec![5, 6, 7, 8],
        })),
        sampling: Some(proto::SamplingOptions {
            max_tokens: Some(max_tokens),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn sampled(change: impl FnOnce(&mut proto::SamplingOptions)) -> proto::GenerationInput {
    let mut input = tokens(4);
    change(input.sampling.as_mut().unwrap());
    input
}

fn prompted(prompt: Prompt) -> proto::GenerationInput {
    proto::GenerationInput {
        prompt: Some(prompt),
        ..tokens(4)
    }
}

fn chat(turns: &[(&str, &str)]) -> proto::GenerationInput {
    let message = |&(role, content): &(&str, &str)| proto::ChatMessage {
        role: role.into(),
        content: content.into(),
    };
    let messages = turns.iter().map(message).collect();
    prompted(Prompt::Chat(proto::ChatPrompt { messages }))
}

fn prompt_of(token_ids: Vec<u32>) -> proto::GenerationInput {
    prompted(Prompt::Tokens(proto::TokenPrompt { token_ids }))
}

fn steered(change: impl FnOnce(&mut proto::Intervention)) -> proto::GenerationInput {
    let mut one = proto::Intervention {
        vector: Some(intervention::Vector::Name("nothing".into())),
        kind: proto::InterventionKind::Add.into(),
        strength: Some(1.0),
        site: "hook_embed".into(),
        ..Default::default()
    };
    change(&mut one);
    proto::GenerationInput {
        interventions: vec![one],
        ..tokens(4)
    }
}

fn by_value(values: &[f32]) -> Option<intervention::Vector> {
    Some(intervention::Vector::Value(proto::Tensor {
        dtype: proto::DataType::Fp32.into(),
        shape: vec![values.len() as i64],
        data: values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<_>>()
            .into(),
        crc32c: None,
    }))
}

/// (input, code, the field that the details name)
fn bad_inputs(vocab: u32, context: u32) -> Vec<(proto::GenerationInput, Code, &'static str)> {
    use Code::{InvalidArgument as Invalid, NotFound, Unimplemented};
    let width = |n: usize| vec![1.0; n];
    let mut cases = vec![
        (proto::GenerationInput::default(), Invalid, "input.prompt"),
        (
            prompted(Prompt::RawText(String::new())),
            Invalid,
            "input.raw_text",
        ),
        (prompt_of(vec![]), Invalid, "input.tokens.token_ids"),
        (
            prompt_of(vec![1, vocab]),
            Invalid,
            "input.tokens.token_ids[1]",
        ),
        (
            prompt_of(vec![u32::MAX]),
            Invalid,
            "input.tokens.token_ids[0]",
        ),
        (prompt_of(vec![1; context as usize]), Invalid, "input"),
        (prompt_of(vec![1; context as usize + 1]), Invalid, "input"),
        (tokens(0), Invalid, "input.sampling.max_tokens"),
        (tokens(context), Invalid, "input.sampling.max_tokens"),
        (tokens(u32::MAX), Invalid, "input.sampling.max_tokens"),
        (
            sampled(|s| s.top_k = Some(0)),
            Invalid,
            "input.sampling.top_k",
        ),
        (
            sampled(|s| s.top_k = Some(vocab + 1)),
            Invalid,
            "input.sampling.top_k",
        ),
        (
            sampled(|s| s.n = Some(1)),
            Unimplemented,
            "input.sampling.n",
        ),
        (
            sampled(|s| s.n = Some(1_000_000)),
            Unimplemented,
            "input.sampling.n",
        ),
        (
            sampled(|s| s.logit_bias = [(1, 1.0)].into()),
            Unimplemented,
            "input.sampling.logit_bias",
        ),
        (
            sampled(|s| s.logprobs = Some(vocab)),
            Invalid,
            "input.sampling.logprobs",
        ),
        (
            sampled(|s| s.stop = vec!["x".into(); 10_000]),
            Invalid,
            "input.sampling.stop",
        ),
        (
            sampled(|s| s.stop = vec![String::new()]),
            Invalid,
            "input.sampling.stop[0]",
        ),
        (
            sampled(|s| s.stop = vec!["x".repeat(100_000)]),
            Invalid,
            "input.sampling.stop[0]",
        ),
        (
            sampled(|s| s.stop_token_ids = vec![vocab]),
            Invalid,
            "input.sampling.stop_token_ids[0]",
        ),
        (steered(|_| ()), NotFound, "input.interventions[0].name"),
        (
            steered(|i| i.vector = None),
            Invalid,
            "input.interventions[0].vector",
        ),
        (
            steered(|i| i.vector = by_value(&width(3))),
            Invalid,
            "input.interventions[0].value",
        ),
        (
            steered(|i| i.vector = by_value(&[f32::NAN])),
            Invalid,
            "input.interventions[0].value.data",
        ),
    ];
    for value in [f32::NAN, f32::INFINITY, -1.0, 1e30] {
        let input = sampled(|s| s.temperature = Some(value));
        cases.push((input, Invalid, "input.sampling.temperature"));
    }
    for value in [f32::NAN, 0.0, 1.5] {
        let input = sampled(|s| s.top_p = Some(value));
        cases.push((input, Invalid, "input.sampling.top_p"));
    }
    for (change, code, field) in named() {
        let mut input = tokens(4);
        change(&mut input);
        cases.push((input, code, field));
    }
    cases
}

type Change = fn(&mut proto::GenerationInput);

fn named() -> [(Change, Code, &'static str); 6] {
    use Code::{InvalidArgument as Invalid, NotFound};
    fn monitor(input: &mut proto::GenerationInput) -> &mut proto::MonitorOptions {
        input.monitor.get_or_insert_default()
    }
    [
        (|i| i.model = "other".into(), NotFound, "input.model"),
        (
            |i| i.refusal_head = "x".into(),
            NotFound,
            "input.refusal_head",
        ),
        (
            |i| i.request_id = "a\r\nb".into(),
            Invalid,
            "input.request_id",
        ),
        (|i| monitor(i).mode = 77, Invalid, "input.monitor.mode"),
        (
            |i| monitor(i).policy = "../x".into(),
            NotFound,
            "input.monitor.policy",
        ),
        (
            |i| monitor(i).hold_back = Some(u32::MAX),
            Invalid,
            "input.monitor.hold_back",
        ),
    ]
}

/// The field that a status names in its details.
fn field_of(status: &Status) -> String {
    let details = status.get_error_details();
    let violated = details
        .bad_request()
        .map(|request| request.field_violations[0].field.clone());
    violated.unwrap_or_else(|| {
        let info = details.error_info().unwrap();
        info.metadata.get("field").cloned().unwrap_or_default()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_are_refused_by_field_and_change_nothing() {
    let server = Server::start().await;
    let info = server.engine.info();
    let vocab = u32::try_from(info.config.vocab_size).unwrap();
    let context = u32::try_from(info.context_length).unwrap();
    let before = server.healthy().await;
    for (input, code, field) in bad_inputs(vocab, context) {
        let status = server.generate(input.clone()).await.unwrap_err();
        assert_eq!(
            (status.code(), field_of(&status).as_str()),
            (code, field),
            "{status:?}"
        );
        assert!(status.metadata().contains_key("x-request-id"));

        // The stream refuses alike, before its first event.
        let request = proto::GenerateStreamRequest { input: Some(input) };
        let stream = server.generation().generate_stream(request).await;
        assert_eq!(
            stream.err().map(|status| status.code()),
            Some(code),
            "{field}"
        );
    }
    for role in ["", "tool", "User"] {
        let status = server
            .generate(chat(&[("user", "a"), (role, "b")]))
            .await
            .unwrap_err();
        assert!(
            [Code::InvalidArgument, Code::FailedPrecondition].contains(&status.code()),
            "{status:?}"
        );
    }
    server.at_rest().await;
    assert_eq!(server.healthy().await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_has_one_start_one_end_and_the_unary_text() {
    let server = Server::start().await;
    let whole = server.generate(tokens(8)).await.unwrap();
    let request = proto::GenerateStreamRequest {
        input: Some(tokens(8)),
    };
    let stream = server.generation().generate_stream(request).await.unwrap();
    assert!(stream.metadata().contains_key("x-request-id"));
    let events: Vec<_> = stream
        .into_inner()
        .map(|event| event.unwrap())
        .collect()
        .await;
    let numbers: Vec<_> = events.iter().map(|event| event.event_number).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let mut text = String::new();
    for (place, event) in events.iter().enumerate() {
        match event.event.as_ref().unwrap() {
            Event::Started(_) => assert_eq!(place, 0),
            Event::Completed(_) => assert_eq!(place, events.len() - 1),
            Event::Delta(delta) => text.push_str(&delta.text),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(events[0].event, Some(Event::Started(_))));
    assert!(matches!(
        events.last().unwrap().event,
        Some(Event::Completed(_))
    ));
    assert_eq!(text, whole.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_too_long_or_too_deep_is_refused_by_the_transport() {
    let server = Server::start().await;
    let before = server.healthy().await;
    let long = prompted(Prompt::RawText("x".repeat(2 << 20)));
    assert_eq!(
        server.generate(long).await.unwrap_err().code(),
        Code::OutOfRange
    );

    let bomb = proto::GenerateRequest {
        input: Some(prompted(Prompt::RawText("x".repeat(32 << 20)))),
    };
    let gzip = tonic::codec::CompressionEncoding::Gzip;
    let status = server
        .generation()
        .send_compressed(gzip)
        .generate(bomb)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert_eq!(server.healthy().await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_in_flight_is_taken_and_comes_free_when_its_caller_leaves() {
    let server = Server::start().await;
    let input = proto::GenerationInput {
        request_id: "twice".into(),
        ..tokens(100)
    };
    let request = proto::GenerateStreamRequest {
        input: Some(input.clone()),
    };
    let mut first = server
        .generation()
        .generate_stream(request)
        .await
        .unwrap()
        .into_inner();
    first.next().await.unwrap().unwrap();
    if let Err(status) = server.generate(input.clone()).await {
        assert_eq!(status.code(), Code::AlreadyExists, "{status:?}");
    }
    drop(first);
    // It is free at the next step.
    while let Err(status) = server.generate(input.clone()).await {
        assert_eq!(status.code(), Code::AlreadyExists, "{status:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_that_has_passed_is_told_as_such() {
    let server = Server::start().await;
    let mut request = Request::new(proto::GenerateRequest {
        input: Some(tokens(100)),
    });
    request
        .metadata_mut()
        .insert("grpc-timeout", "1n".parse().unwrap());
    let status = server.generation().generate(request).await.unwrap_err();
    // At a nanosecond the transport may be faster than we are.
    assert!(
        [Code::DeadlineExceeded, Code::Cancelled].contains(&status.code()),
        "{status:?}"
    );
    let mut request = Request::new(proto::GenerateRequest {
        input: Some(tokens(4)),
    });
    request
        .metadata_mut()
        .insert("grpc-timeout", "soon".parse().unwrap());
    let status = server.generation().generate(request).await.unwrap_err();
    assert_eq!(
        (status.code(), field_of(&status).as_str()),
        (Code::InvalidArgument, "grpc-timeout")
    );
    server.at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sites_are_listed_and_their_states_captured_within_the_budget() {
    let server = Server::start().await;
    let mut client = ActivationServiceClient::new(server.channel.clone());
    let reply = client
        .list_sites(proto::ListSitesRequest::default())
        .await
        .unwrap()
        .into_inner();
    let config = &server.engine.info().config;
    assert_eq!(reply.sites.len(), 2 + 5 * config.n_layers);
    assert!(reply.model.unwrap().policy_empty);

    let request = proto::CaptureActivationsRequest {
        input: Some(proto::GenerationInput {
            sampling: None,
            ..tokens(1)
        }),
        sites: vec!["blocks.0.hook_resid_post".into()],
        positions: proto::PositionSelection::AllPrompt.into(),
        ..Default::default()
    };
    let stream = client
        .capture_activations(request.clone())
        .await
        .unwrap()
        .into_inner();
    let events: Vec<_> = stream.map(|event| event.unwrap()).collect().await;
    let rows: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.event {
            Some(proto::capture_activations_response::Event::Chunk(chunk)) => Some(chunk),
            _ => None,
        })
        .flat_map(|chunk| {
            let tensor = chunk.tensor.as_ref().unwrap();
            assert_eq!(
                tensor.data.len(),
                chunk.token_ids.len() * config.d_model * 2
            );
            chunk.token_ids.clone()
        })
        .collect();
    assert_eq!(rows, [5, 6, 7, 8]);

    let too_much = proto::CaptureActivationsRequest {
        max_bytes: 1,
        ..request.clone()
    };
    let status = client.capture_activations(too_much).await.err().unwrap();
    assert_eq!(
        (status.code(), field_of(&status).as_str()),
        (Code::InvalidArgument, "max_bytes")
    );
    let unknown = proto::CaptureActivationsRequest {
        sites: vec!["layers.0".into()],
        ..request
    };
    let status = client.capture_activations(unknown).await.err().unwrap();
    assert_eq!(
        (status.code(), field_of(&status).as_str()),
        (Code::InvalidArgument, "sites[0]")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_can_be_read_and_not_written() {
    let server = Server::start().await;
    let mut client = ProbeServiceClient::new(server.channel.clone());
    let all = client
        .list_probes(proto::ListProbesRequest::default())
        .await
        .unwrap();
    assert!(all.into_inner().probes.is_empty());
    let name = "../../etc/passwd".to_owned();
    let status = client
        .get_probe(proto::GetProbeRequest { name })
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let status = client
        .delete_probe(proto::DeleteProbeRequest::default())
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    assert_eq!(
        status.get_error_details().error_info().unwrap().reason,
        "UNSUPPORTED"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_says_so_and_ends_even_with_a_peer_that_never_speaks() {
    let server = Server::start().await;
    let mut health = HealthClient::new(server.channel.clone());
    let check = tonic_health::pb::HealthCheckRequest {
        service: String::new(),
    };
    let mut watch = health.watch(check).await.unwrap().into_inner();
    let serving = watch.next().await.unwrap().unwrap().status;
    assert_eq!(serving, tonic_health::ServingStatus::Serving as i32);
    assert!(server.get("/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(server.healthy().await.len() < 1000);
    assert!(
        server
            .get("/metrics")
            .await
            .contains("inwit_requests_total")
    );

    let _silent = TcpStream::connect(server.address).await.unwrap();
    server.shutdown.cancel();
    let draining = watch.next().await.unwrap().unwrap().status;
    assert_eq!(draining, tonic_health::ServingStatus::NotServing as i32);
    assert!(server.get("/readyz").await.starts_with("HTTP/1.1 503"));
    server.serving.await.unwrap().unwrap();
}
