//! The services beside generation, and the server's own life: sites and hidden states, probes, health,
//! reflection, metrics, and a drain that ends.
//! Knows the contract; compares hidden states with those of a pass in this process.

use std::collections::BTreeMap;
use std::time::Duration;

use half::{bf16, f16};
use inwit::hooks::{HookPlan, HookRun};
use inwit::model::kernels::{KvType, WeightFormat};
use inwit::model::{Batch, Decoder, KvCache, Placement, Source};
use inwit::rpc::proto::capture_activations_response::Event;
use inwit::rpc::proto::{
    ActivationChunk, CaptureActivationsRequest, DataType, GenerationInput, GetProbeRequest,
    ListProbesRequest, ListSitesRequest, PositionSelection, Tensor,
};
use inwit_probes::{Positions, Site};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::golden::golden;
use crate::wire_support::{
    GENERATE_STREAM, Library, PATIENCE, Server, Setup, framed, http2, open_stream, post, raw,
    refusal, tokens, unary,
};

const D_MODEL: usize = 64;

async fn start() -> Server {
    Server::start(Setup::default(), |_| {}).await
}

fn prompt_ids() -> Vec<u32> {
    (0..37).map(|i| 3 + i * 11 % 500).collect()
}

fn capture(dtype: DataType, positions: PositionSelection) -> CaptureActivationsRequest {
    CaptureActivationsRequest {
        input: Some(GenerationInput {
            sampling: None,
            ..tokens(prompt_ids(), 1)
        }),
        sites: vec!["blocks.1.hook_resid_post".into(), "hook_embed".into()],
        positions: positions.into(),
        dtype: dtype.into(),
        ..Default::default()
    }
}

async fn captured(
    server: &Server,
    request: CaptureActivationsRequest,
) -> Result<Vec<ActivationChunk>, Status> {
    let mut client = server.activation().await;
    let mut messages = client.capture_activations(request).await?.into_inner();
    let (mut chunks, mut count, mut ended) = (Vec::new(), 0, false);
    while let Some(message) = messages.message().await? {
        assert_eq!(message.event_number, count);
        count += 1;
        match message.event.unwrap() {
            Event::Started(_) => assert_eq!(count, 1),
            Event::Chunk(chunk) => chunks.push(chunk),
            Event::Completed(_) => ended = true,
            _ => {}
        }
    }
    assert!(ended);
    Ok(chunks)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let data = &tensor.data;
    assert_eq!(tensor.crc32c, Some(crc32c::crc32c(data)));
    assert!(data.len() <= 1 << 20);
    match DataType::try_from(tensor.dtype).unwrap() {
        DataType::Fp32 => data
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect(),
        DataType::Fp16 => data
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32())
            .collect(),
        DataType::Bf16 => data
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
            .collect(),
        other => panic!("{other:?}"),
    }
}

/// Rows by site, put together from chunks in order.
fn joined(chunks: &[ActivationChunk]) -> BTreeMap<String, (Vec<u32>, Vec<f32>)> {
    let mut sites: BTreeMap<String, (Vec<u32>, Vec<f32>)> = BTreeMap::new();
    let mut next: BTreeMap<String, i64> = BTreeMap::new();
    for chunk in chunks {
        let tensor = chunk.tensor.as_ref().unwrap();
        let rows = chunk.token_ids.len();
        assert_eq!(tensor.shape, [rows as i64, D_MODEL as i64]);
        let due = next
            .entry(chunk.site.clone())
            .or_insert(chunk.first_position);
        assert_eq!(
            *due, chunk.first_position,
            "a position is missing or twice there"
        );
        *due += rows as i64;
        let site = sites.entry(chunk.site.clone()).or_default();
        site.0.extend(&chunk.token_ids);
        site.1.extend(values(tensor));
    }
    sites
}

/// The same states by a pass in this process, row by row as the engine is bound to give them.
fn in_process() -> BTreeMap<String, Vec<f32>> {
    let source = Source::open(&golden("llama/model.gguf")).unwrap();
    let decoder = Decoder::load(&source, &Placement::cpu(WeightFormat::F32)).unwrap();
    let mut kv = KvCache::new(decoder.config(), KvType::F32, 8, decoder.placement()).unwrap();
    let ids = prompt_ids();
    let mut batch = Batch::default();
    batch.push(&ids, 0, (0..8).collect());
    let mut plan = HookPlan::new(decoder.config().n_layers);
    for site in [Site::Embed, Site::ResidPost(1)] {
        plan.capture(site, 0, 0..ids.len());
    }
    let mut run = HookRun::new(&plan, ids.len());
    decoder.forward(&batch, &mut kv, &mut run).unwrap();
    let captured = run.finish().expect("scores").captured;
    captured
        .into_iter()
        .map(|c| (c.site.to_string(), c.values))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn captured_states_are_those_of_a_pass_in_this_process() {
    let server = start().await;
    let expected = in_process();
    type Round = fn(f32) -> f32;
    let formats: [(DataType, Round); 4] = [
        (DataType::Fp32, |x| x),
        (DataType::Fp16, |x| f16::from_f32(x).to_f32()),
        (DataType::Bf16, |x| bf16::from_f32(x).to_f32()),
        (DataType::Unspecified, |x| bf16::from_f32(x).to_f32()),
    ];
    for (dtype, round) in formats {
        let request = capture(dtype, PositionSelection::AllPrompt);
        let sites = joined(&captured(&server, request).await.unwrap());
        assert_eq!(sites.len(), 2);
        for (site, (ids, got)) in &sites {
            assert_eq!(ids, &prompt_ids());
            let rounded: Vec<f32> = expected[site].iter().map(|x| round(*x)).collect();
            assert_eq!(got, &rounded, "{site} as {dtype:?}");
        }
    }
    // Unset, the last prompt token alone.
    let request = capture(DataType::Fp32, PositionSelection::Unspecified);
    let sites = joined(&captured(&server, request).await.unwrap());
    for (site, (ids, got)) in &sites {
        assert_eq!(ids, &prompt_ids()[36..]);
        assert_eq!(got, &expected[site][36 * D_MODEL..], "{site}");
    }
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_is_refused_before_it_begins_or_in_place_of_the_chunk() {
    let server = start().await;
    let all = || capture(DataType::Fp32, PositionSelection::AllPrompt);
    let sites = |names: &[&str]| CaptureActivationsRequest {
        sites: names.iter().map(|&name| name.to_owned()).collect(),
        ..all()
    };
    let needed = (2 * 37 * D_MODEL * 4) as u64;
    let site = "hook_embed";
    let cases = [
        (sites(&[]), Code::InvalidArgument, "sites"),
        (sites(&[site, site]), Code::InvalidArgument, "sites[1]"),
        (
            sites(&["blocks.2.hook_resid_post"]),
            Code::InvalidArgument,
            "sites[0]",
        ),
        (
            sites(&["../hook_embed\0"]),
            Code::InvalidArgument,
            "sites[0]",
        ),
        (
            CaptureActivationsRequest {
                max_bytes: needed - 1,
                ..all()
            },
            Code::InvalidArgument,
            "max_bytes",
        ),
        (
            CaptureActivationsRequest {
                max_bytes: (1 << 30) + 1,
                ..all()
            },
            Code::InvalidArgument,
            "max_bytes",
        ),
        (
            CaptureActivationsRequest { dtype: 4, ..all() },
            Code::Unimplemented,
            "dtype",
        ),
        (
            CaptureActivationsRequest { dtype: 44, ..all() },
            Code::InvalidArgument,
            "dtype",
        ),
        (
            CaptureActivationsRequest {
                positions: 44,
                ..all()
            },
            Code::InvalidArgument,
            "positions",
        ),
        (
            CaptureActivationsRequest {
                answer: Some(String::new()),
                ..all()
            },
            Code::InvalidArgument,
            "answer",
        ),
    ];
    for (request, code, field) in cases {
        let status = captured(&server, request).await.expect_err(field);
        let told = refusal(&status);
        assert_eq!(
            (told.code, told.field.as_str()),
            (code, field),
            "{status:?}"
        );
    }
    let enough = CaptureActivationsRequest {
        max_bytes: needed,
        ..all()
    };
    assert!(captured(&server, enough).await.is_ok());
    // What is generated is counted as it comes.
    let generated = CaptureActivationsRequest {
        input: Some(tokens(prompt_ids(), 20)),
        max_bytes: (2 * 5 * D_MODEL * 4) as u64,
        ..capture(DataType::Fp32, PositionSelection::Generated)
    };
    let status = captured(&server, generated.clone())
        .await
        .expect_err("too much");
    assert_eq!(refusal(&status).field, "max_bytes");
    let unbound = CaptureActivationsRequest {
        max_bytes: 0,
        ..generated
    };
    let sites = joined(&captured(&server, unbound).await.unwrap());
    assert!(sites.values().all(|(ids, _)| ids.len() == 20));
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sites_are_listed_in_the_order_of_a_pass() {
    let server = start().await;
    let mut client = server.activation().await;
    let request = ListSitesRequest::default();
    let listed = client.list_sites(request).await.unwrap().into_inner();
    let names: Vec<_> = listed.sites.iter().map(|site| site.name.clone()).collect();
    let expected: Vec<_> = Site::all(2).map(|site| site.to_string()).collect();
    assert_eq!(names, expected);
    let model = listed.model.unwrap();
    assert_eq!(
        (model.d_model, model.layers, model.vocabulary_size),
        (64, 2, 512)
    );
    assert!(model.policy_empty);
    let request = ListSitesRequest {
        model: "another".into(),
    };
    let status = client.list_sites(request).await.expect_err("refused");
    assert_eq!(status.code(), Code::NotFound);
}

fn stock(library: &mut Library) {
    for number in 0..7 {
        library.probe(&format!("probe-{number}"), Positions::LastPromptToken, 1.0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_are_listed_page_by_page_and_read_by_name() {
    let server = Server::start(Setup::default(), stock).await;
    let mut client = server.probes().await;
    let (mut names, mut page_token, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let request = ListProbesRequest {
            page_size: 3,
            page_token,
            ..Default::default()
        };
        let page = client.list_probes(request).await.unwrap().into_inner();
        pages += 1;
        names.extend(page.probes.into_iter().map(|probe| probe.name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    let expected: Vec<_> = (0..7).map(|number| format!("probe-{number}")).collect();
    assert_eq!((names, pages), (expected, 3));
    for (request, field) in [
        (
            ListProbesRequest {
                page_size: -1,
                ..Default::default()
            },
            "page_size",
        ),
        (
            ListProbesRequest {
                page_token: "3".into(),
                ..Default::default()
            },
            "page_token",
        ),
        (
            ListProbesRequest {
                page_token: "\0../é".into(),
                ..Default::default()
            },
            "page_token",
        ),
    ] {
        let status = client.list_probes(request).await.expect_err(field);
        assert_eq!(refusal(&status).field, field);
    }
    let request = GetProbeRequest {
        name: "probe-3".into(),
    };
    let probe = client
        .get_probe(request)
        .await
        .unwrap()
        .into_inner()
        .probe
        .unwrap();
    assert!(probe.native);
    assert_eq!(probe.sites, ["blocks.0.hook_resid_post"]);
    let manifest: serde_json::Value = serde_json::from_str(&probe.manifest_json).unwrap();
    assert_eq!(manifest["name"], "probe-3");
    for (name, code) in [
        ("", Code::InvalidArgument),
        ("nobody", Code::NotFound),
        ("../../etc/passwd", Code::NotFound),
        ("probe-3\0", Code::NotFound),
    ] {
        let request = GetProbeRequest { name: name.into() };
        let status = client.get_probe(request).await.expect_err(name);
        assert_eq!(status.code(), code, "{name:?}");
    }
}

async fn http_get(server: &Server, path: &str) -> String {
    let mut socket = TcpStream::connect(server.http_address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    socket.read_to_string(&mut reply).await.unwrap();
    reply
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_and_health_are_there_over_http() {
    let server = start().await;
    let mut client = server.generation().await;
    unary(&mut client, raw("Count me", 4)).await.unwrap();
    for path in ["/health", "/readyz", "/livez"] {
        assert!(
            http_get(&server, path).await.starts_with("HTTP/1.1 200"),
            "{path}"
        );
    }
    let metrics = http_get(&server, "/metrics").await;
    let counted = "inwit_requests_total{rpc=\"/inwit.v1.GenerationService/Generate\",code=\"OK\"}";
    assert!(metrics.contains(counted), "{metrics}");
    assert!(!metrics.contains("Count me"));
    assert!(
        http_get(&server, "/../etc/passwd")
            .await
            .starts_with("HTTP/1.1 404")
    );
    server.begin_drain();
    // Readiness goes, life does not.
    for _ in 0..500 {
        if http_get(&server, "/readyz")
            .await
            .starts_with("HTTP/1.1 503")
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(
        http_get(&server, "/health")
            .await
            .starts_with("HTTP/1.1 503")
    );
    assert!(
        http_get(&server, "/livez")
            .await
            .starts_with("HTTP/1.1 200")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_reflections_list_the_services() {
    use tonic_reflection::pb::{v1, v1alpha};
    let server = start().await;
    let expected = [
        "grpc.health.v1.Health",
        "inwit.v1.ActivationService",
        "inwit.v1.GenerationService",
        "inwit.v1.ProbeService",
    ];
    macro_rules! services {
        ($version:ident) => {{
            use $version::server_reflection_client::ServerReflectionClient;
            use $version::server_reflection_request::MessageRequest;
            use $version::server_reflection_response::MessageResponse;
            let request = $version::ServerReflectionRequest {
                host: String::new(),
                message_request: Some(MessageRequest::ListServices(String::new())),
            };
            let mut replies = ServerReflectionClient::new(server.channel().await)
                .server_reflection_info(futures::stream::iter([request]))
                .await
                .unwrap()
                .into_inner();
            let reply = replies.message().await.unwrap().unwrap();
            let Some(MessageResponse::ListServicesResponse(list)) = reply.message_response else {
                panic!("{reply:?}");
            };
            let mut names: Vec<_> = list.service.into_iter().map(|s| s.name).collect();
            names.sort();
            names
        }};
    }
    assert_eq!(services!(v1), expected);
    assert_eq!(services!(v1alpha), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_refuses_the_new_finishes_the_running_and_ends() {
    let mut server = start().await;
    let mut client = server.generation().await;
    let mut health = HealthClient::new(server.channel().await);
    let check = |service: &str| HealthCheckRequest {
        service: service.into(),
    };
    for service in ["", "readiness", "liveness", "inwit.v1.GenerationService"] {
        let status = health.check(check(service)).await.unwrap().into_inner();
        assert_eq!(status.status(), ServingStatus::Serving, "{service}");
    }
    let mut watch = health.watch(check("")).await.unwrap().into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);

    let plug = server.plug(1).await;
    let mut running = open_stream(&mut client, raw("Still running", 8))
        .await
        .unwrap();
    server.begin_drain();
    let next = watch.message().await.unwrap().unwrap();
    assert_eq!(next.status(), ServingStatus::NotServing);
    let status = unary(&mut client, raw("Too late", 4))
        .await
        .expect_err("refused");
    assert_eq!(
        (status.code(), &*refusal(&status).reason),
        (Code::Unavailable, "UNAVAILABLE")
    );
    drop(plug);
    let mut last = None;
    while let Some(message) = running.message().await.unwrap() {
        last = message.event;
    }
    use inwit::rpc::proto::generate_stream_response::Event;
    assert!(matches!(last, Some(Event::Completed(_))), "{last:?}");
    drop((watch, health, client));
    server.ended().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_even_where_a_peer_never_reads() {
    let setup = Setup {
        grace: Duration::from_millis(100),
        ..Setup::default()
    };
    let mut server = Server::start(setup, |_| {}).await;
    let mut send = http2(server.address).await.ready().await.unwrap();
    let mut input = raw("Never read", 400);
    input.sampling.as_mut().unwrap().logprobs = Some(20);
    let request = inwit::rpc::proto::GenerateStreamRequest { input: Some(input) };
    let (response, mut sending) = send
        .send_request(post(GENERATE_STREAM, &[]), false)
        .unwrap();
    sending.send_data(framed(&request), true).unwrap();
    let response = response.await.unwrap();
    // And one that never spoke.
    let silent = TcpStream::connect(server.address).await.unwrap();
    server.begin_drain();
    server.ended().await.unwrap();
    drop((response, silent));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_never_reads_holds_nothing_past_its_deadline() {
    let setup = Setup {
        // Longer than this test waits: a drain waits so long for whatever is held.
        grace: 4 * PATIENCE,
        ..Setup::default()
    };
    let mut server = Server::start(setup, |_| {}).await;
    let mut send = http2(server.address).await.ready().await.unwrap();
    let mut input = raw("Never read", 400);
    input.sampling.as_mut().unwrap().logprobs = Some(20);
    let request = inwit::rpc::proto::GenerateStreamRequest { input: Some(input) };
    let (response, mut sending) = send
        .send_request(post(GENERATE_STREAM, &[("grpc-timeout", "3S")]), false)
        .unwrap();
    sending.send_data(framed(&request), true).unwrap();
    let response = response.await.unwrap();
    server.begin_drain();
    server.ended().await.unwrap();
    drop(response);
}
