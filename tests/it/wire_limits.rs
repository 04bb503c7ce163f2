//! What the transport must bear: messages too long, too dense or no messages at all, peers that speak
//! another protocol, too much, or nothing any more. After each the server answers as before.
//! Knows bytes and frames; what a request asks is tested elsewhere.

use std::io::Write;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use flate2::Compression;
use flate2::write::GzEncoder;
use inwit::rpc::proto::generate_stream_response::Event;
use inwit::rpc::proto::{
    GenerateRequest, GenerateStreamRequest, GenerateStreamResponse, GenerationInput,
};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

use crate::wire_support::{
    GENERATE, GENERATE_STREAM, PATIENCE, Raw, Server, Setup, a_moment, eventually, frame, framed,
    http2, open_stream, post, raw, raw_call, refusal, stream, unary,
};

async fn start() -> Server {
    Server::start(Setup::default(), |_| {}).await
}

/// Still there, with nothing left over.
async fn check_healthy(server: &Server) {
    let mut client = server.generation().await;
    let reply = unary(&mut client, raw("Still there?", 4)).await.unwrap();
    assert_eq!(reply.token_ids.len(), 4);
    server.idle().await;
}

fn check_status(reply: &Raw, code: Code, case: &str) {
    assert_eq!(reply.grpc_status, Some(code as i32), "{case}: {reply:?}");
    assert!(reply.body.is_empty(), "{case}: {reply:?}");
}

fn a_request() -> Bytes {
    framed(&GenerateRequest {
        input: Some(raw("Hello", 4)),
    })
}

fn zipped(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Groups in groups: deeper than any message of ours.
fn nested(depth: usize) -> Vec<u8> {
    let (open, close) = (0x0b, 0x0c);
    let mut bytes = vec![open; depth];
    bytes.extend(vec![close; depth]);
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_are_too_long_or_no_messages_are_refused() {
    let server = start().await;
    let message = |prompt: String| {
        GenerateRequest {
            input: Some(raw(&prompt, 4)),
        }
        .encode_to_vec()
    };
    let long = message("x".repeat(1 << 20));
    let bomb = zipped(&vec![0; 64 << 20]);
    assert!(bomb.len() < 1 << 20);
    let mut not_utf8 = message("abcdefgh".into());
    let at = not_utf8.windows(8).position(|w| w == b"abcdefgh").unwrap();
    // A lone surrogate, as UTF-16 thinkers write it.
    not_utf8[at..at + 3].copy_from_slice(&[0xed, 0xa0, 0x80]);
    let mut cut = message("abcdefgh".into());
    cut.truncate(cut.len() - 3);

    let gzip = [("grpc-encoding", "gzip")];
    type Headers<'a> = &'a [(&'a str, &'a str)];
    let cases: Vec<(&str, Headers<'_>, Bytes, Code)> = vec![
        ("1 MiB and more", &[], frame(false, &long), Code::OutOfRange),
        (
            "4 GiB declared",
            &[],
            Bytes::from_static(&[0, 255, 255, 255, 255]),
            Code::OutOfRange,
        ),
        (
            "a gzip bomb",
            &gzip,
            frame(true, &bomb),
            Code::ResourceExhausted,
        ),
        (
            "zipped, unannounced",
            &[],
            frame(true, &zipped(&message("Hi".into()))),
            Code::Internal,
        ),
        (
            "zipped garbage",
            &gzip,
            frame(true, b"no gzip at all"),
            Code::Internal,
        ),
        (
            "an unknown encoding",
            &[("grpc-encoding", "br")],
            frame(true, b"?"),
            Code::Unimplemented,
        ),
        (
            "an unknown flag",
            &[],
            Bytes::from_static(&[7, 0, 0, 0, 1, 0]),
            Code::Internal,
        ),
        (
            "garbage",
            &[],
            frame(false, &[0xff; 64]),
            Code::InvalidArgument,
        ),
        (
            "too deep",
            &[],
            frame(false, &nested(100_000)),
            Code::InvalidArgument,
        ),
        (
            "no UTF-8",
            &[],
            frame(false, &not_utf8),
            Code::InvalidArgument,
        ),
        (
            "a message cut short",
            &[],
            frame(false, &cut),
            Code::InvalidArgument,
        ),
    ];
    for (case, headers, body, code) in cases {
        let reply = raw_call(server.address, GENERATE, headers, body).await;
        check_status(&reply, code, case);
        check_healthy(&server).await;
    }
    // No message at all, or not all of it.
    for body in [Bytes::new(), a_request().slice(..7)] {
        let reply = raw_call(server.address, GENERATE, &[], body).await;
        assert!(
            reply.grpc_status.is_some_and(|status| status != 0),
            "{reply:?}"
        );
    }
    // What is zipped and small is read, and unknown fields are as protobuf has them.
    let reply = raw_call(
        server.address,
        GENERATE,
        &gzip,
        frame(true, &zipped(&message("Hello".into()))),
    )
    .await;
    assert_eq!(reply.grpc_status, Some(0), "{reply:?}");
    let mut unknown = message("Hello".into());
    // Field 1000, length-delimited.
    prost::encoding::encode_key(
        1000,
        prost::encoding::WireType::LengthDelimited,
        &mut unknown,
    );
    prost::encoding::encode_varint(900_000, &mut unknown);
    unknown.extend(vec![1; 900_000]);
    let reply = raw_call(server.address, GENERATE, &[], frame(false, &unknown)).await;
    assert_eq!(reply.grpc_status, Some(0), "{reply:?}");
    check_healthy(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_served_is_unimplemented() {
    let server = start().await;
    for path in [
        "/inwit.v1.GenerationService/Degenerate",
        "/inwit.v1.PolicyService/ListPolicies",
        "/inwit.v1.AdminService/Anything",
        "/nobody.v9.Nothing/AtAll",
        "/",
        "/../../etc/passwd",
    ] {
        let reply = raw_call(server.address, path, &[], a_request()).await;
        check_status(&reply, Code::Unimplemented, path);
    }
    check_healthy(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_speak_something_else_do_no_harm() {
    let server = start().await;
    let speeches: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"POST /inwit.v1.GenerationService/Generate HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\nabc",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        &[0; 4096],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"PRI * HT",
    ];
    let mut silent = Vec::new();
    for speech in speeches {
        let mut socket = TcpStream::connect(server.address).await.unwrap();
        socket.write_all(speech).await.unwrap();
        // Whether it answers or hangs up is its own business; that it goes on is ours.
        let mut answer = [0; 1024];
        let _ = tokio::time::timeout(Duration::from_millis(20), socket.read(&mut answer)).await;
        silent.push(socket);
        check_healthy(&server).await;
    }
    for _ in 0..200 {
        silent.push(TcpStream::connect(server.address).await.unwrap());
    }
    check_healthy(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_never_ends_holds_nobody_up() {
    let server = start().await;
    let mut send = http2(server.address).await.ready().await.unwrap();
    let mut open = Vec::new();
    // Each declares 1 MiB and stops after one byte.
    for _ in 0..90 {
        let (response, mut sending) = send.send_request(post(GENERATE, &[]), false).unwrap();
        let start = Bytes::from_static(&[0, 0, 0x0f, 0xff, 0xff, 1]);
        sending.send_data(start, false).unwrap();
        open.push((response, sending));
        send = send.ready().await.unwrap();
    }
    a_moment().await;
    assert_eq!(server.engine.load().running, 0);
    check_healthy(&server).await;
    drop(open);
    check_healthy(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_streams_begun_and_reset_leave_nothing_behind() {
    let server = start().await;
    let body = framed(&GenerateStreamRequest {
        input: Some(raw("Reset", 400)),
    });
    let mut began = 0;
    // A server may hang up on such a peer; then another comes.
    for _ in 0..6 {
        let Ok(mut send) = http2(server.address).await.ready().await else {
            continue;
        };
        for _ in 0..500 {
            let Ok((response, mut sending)) = send.send_request(post(GENERATE_STREAM, &[]), false)
            else {
                break;
            };
            let _ = sending.send_data(body.clone(), true);
            sending.send_reset(h2::Reason::CANCEL);
            drop(response);
            began += 1;
            match send.ready().await {
                Ok(ready) => send = ready,
                Err(_) => break,
            }
        }
    }
    assert!(began > 100, "only {began} streams were begun");
    check_healthy(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_headers_are_refused() {
    let server = start().await;
    let long = "x".repeat(60 << 10);
    let reply = raw_call(server.address, GENERATE, &[("x-long", &long)], a_request()).await;
    assert!(
        reply.http_status == Some(431) || reply.broken.is_some(),
        "{reply:?}"
    );
    check_healthy(&server).await;
    let many = vec![("x-again", "0123456789abcdef0123456789abcdef"); 1000];
    let reply = raw_call(server.address, GENERATE, &many, a_request()).await;
    assert!(
        reply.http_status == Some(431) || reply.broken.is_some(),
        "{reply:?}"
    );
    // What fits and makes no sense is let through.
    let headers = [("x-odd-bin", "!!no base64!!"), ("x-evil", "\t\u{7e}")];
    let reply = raw_call(server.address, GENERATE, &headers, a_request()).await;
    assert_eq!(reply.grpc_status, Some(0), "{reply:?}");
    check_healthy(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_frames_and_pings_without_end_are_only_noise() {
    let server = start().await;
    let mut send = http2(server.address).await.ready().await.unwrap();
    let (_response, mut sending) = send.send_request(post(GENERATE, &[]), false).unwrap();
    for _ in 0..2000 {
        if sending.send_data(Bytes::new(), false).is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
    check_healthy(&server).await;

    let mut socket = TcpStream::connect(server.address).await.unwrap();
    let mut noise = BytesMut::from(&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..]);
    noise.extend_from_slice(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
    for _ in 0..5000 {
        // An empty SETTINGS, and a PING.
        noise.extend_from_slice(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
        noise.extend_from_slice(&[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    }
    // The peer never reads what it is answered, so the server may hang up on it.
    let write = tokio::time::timeout(Duration::from_secs(1), socket.write_all(&noise));
    let _ = write.await;
    check_healthy(&server).await;
}

/// Requests end as cancelled, wherever they were.
async fn check_cancelled(server: &Server, id: &str) {
    let decision = server.decision(id).await;
    assert_eq!(decision.finish_reason, "cancelled", "{id}");
    server.idle().await;
}

fn named(id: &str, input: GenerationInput) -> GenerationInput {
    GenerationInput {
        request_id: id.into(),
        skip_prefix_cache: true,
        ..input
    }
}

fn long_prompt(max_tokens: u32) -> GenerationInput {
    crate::wire_support::tokens((0..400).map(|i| 3 + i % 500).collect(), max_tokens)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_leaves_frees_its_request_wherever_it_is() {
    let mut setup = Setup::default();
    // A prompt of 400 tokens takes 400 passes, so that none is over before the engine is stopped.
    setup.options.step_token_budget = 1;
    setup.options.max_running = 2;
    let server = Server::start(setup, |_| {}).await;
    let mut client = server.generation().await;

    // In the queue: the engine stands still.
    let plug = server.plug(1).await;
    let queued = open_stream(&mut client, named("queued", raw("Hi", 400)))
        .await
        .unwrap();
    drop(queued);
    a_moment().await;
    drop(plug);
    check_cancelled(&server, "queued").await;

    // In the prefill: some of the passes over the prompt are done when the engine stops.
    let input = named("prefill", long_prompt(100));
    let mut in_prefill = open_stream(&mut client, input).await.unwrap();
    let plug = server.plug(3).await;
    let first = in_prefill.message().await.unwrap().unwrap();
    assert!(matches!(first.event, Some(Event::Started(_))));
    drop(in_prefill);
    a_moment().await;
    drop(plug);
    let decision = server.decision("prefill").await;
    assert_eq!(decision.finish_reason, "cancelled");
    server.idle().await;

    // While decoding.
    let mut decoding = open_stream(&mut client, named("decode", raw("Hi", 500)))
        .await
        .unwrap();
    let plug = server.plug(20).await;
    for _ in 0..4 {
        decoding.message().await.unwrap().unwrap();
    }
    drop(decoding);
    a_moment().await;
    drop(plug);
    check_cancelled(&server, "decode").await;

    // A unary call whose caller goes, and a whole connection that breaks.
    let plug = server.plug(1).await;
    let call = tokio::spawn({
        let mut client = server.generation().await;
        async move { unary(&mut client, named("unary", raw("Hi", 500))).await }
    });
    eventually("the call does not arrive", || {
        server.engine.load().waiting == 1
    })
    .await;
    call.abort();
    let _ = call.await;
    a_moment().await;
    drop(plug);
    check_cancelled(&server, "unary").await;
    check_healthy(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_at_every_point_of_an_answer_leaves_nothing_behind() {
    let server = start().await;
    let mut client = server.generation().await;
    for after in 0..12 {
        let mut messages = open_stream(&mut client, raw("Leaving", 10)).await.unwrap();
        for _ in 0..after {
            if messages.message().await.unwrap().is_none() {
                break;
            }
        }
    }
    check_healthy(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_reads_nothing_slows_nobody_and_loses_nothing() {
    let server = start().await;
    let mut send = http2(server.address).await.ready().await.unwrap();
    // With one place left in the queue for who asks next.
    let slow = 7;
    let mut readers = Vec::new();
    for number in 0..slow {
        let mut input = raw("A slow reader", 400);
        input.sampling.as_mut().unwrap().logprobs = Some(20);
        input.request_id = format!("slow-{number}");
        let body = framed(&GenerateStreamRequest { input: Some(input) });
        let (response, mut sending) = send
            .send_request(post(GENERATE_STREAM, &[]), false)
            .unwrap();
        sending.send_data(body, true).unwrap();
        readers.push(response.await.unwrap().into_body());
        send = send.ready().await.unwrap();
    }
    // The engine ends them all though no window was ever opened.
    check_healthy(&server).await;
    for number in 0..slow {
        let decision = server.decision(&format!("slow-{number}")).await;
        assert_ne!(decision.finish_reason, "cancelled");
    }
    // All at once: they share the connection's window.
    let reads = readers.into_iter().map(|mut reader| async move {
        let mut reply = Raw::default();
        while let Some(data) = reader.data().await {
            let data = data.unwrap();
            reader.flow_control().release_capacity(data.len()).unwrap();
            reply.body.extend_from_slice(&data);
        }
        let messages: Vec<GenerateStreamResponse> = reply.messages();
        let end = messages.last().unwrap().event.clone();
        assert!(matches!(end, Some(Event::Completed(_))));
    });
    let reads = futures::future::join_all(reads);
    tokio::time::timeout(PATIENCE, reads)
        .await
        .expect("the answers do not end");
}

/// A call under a deadline, by the server's clock alone: a client would have one of its own.
async fn timed(server: &Server, id: &str, timeout: &str) -> Raw {
    let input = named(id, raw("Late", 500));
    let body = framed(&GenerateStreamRequest { input: Some(input) });
    raw_call(
        server.address,
        GENERATE_STREAM,
        &[("grpc-timeout", timeout)],
        body,
    )
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_ends_a_request_in_the_queue_and_while_it_runs() {
    let server = start().await;
    // Before the stream has begun the transport keeps the same deadline, and calls it CANCELLED
    // where it is the first to notice.
    let late = |reply: &Raw| {
        reply.grpc_status == Some(Code::DeadlineExceeded as i32)
            || reply.grpc_status == Some(Code::Cancelled as i32)
    };
    let reply = timed(&server, "at-once", "1n").await;
    assert!(late(&reply), "{reply:?}");

    // The engine stands still until the time is up.
    let plug = server.plug(1).await;
    let reply = timed(&server, "queued", "300m").await;
    assert_eq!(
        reply.grpc_status,
        Some(Code::DeadlineExceeded as i32),
        "{reply:?}"
    );
    assert!(reply.body.is_empty());
    drop(plug);
    server.idle().await;
    assert_eq!(server.decision("queued").await.tokens.completion, 0);

    let running = tokio::spawn({
        let address = server.address;
        async move {
            let input = named("running", raw("Late", 500));
            let body = framed(&GenerateStreamRequest { input: Some(input) });
            let timeout = [("grpc-timeout", "500m")];
            raw_call(address, GENERATE_STREAM, &timeout, body).await
        }
    });
    eventually("the call does not arrive", || {
        server.engine.load().running > 0
    })
    .await;
    let plug = server.plug(2).await;
    let reply = running.await.unwrap();
    drop(plug);
    // A machine may be so fast that the answer was there before the engine stopped.
    if reply.grpc_status != Some(0) {
        assert_eq!(
            reply.grpc_status,
            Some(Code::DeadlineExceeded as i32),
            "{reply:?}"
        );
        let messages: Vec<GenerateStreamResponse> = reply.messages();
        assert!(
            !messages
                .iter()
                .any(|m| matches!(m.event, Some(Event::Completed(_))))
        );
    }
    server.idle().await;
    check_healthy(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_says_when_to_come_again() {
    let mut setup = Setup::default();
    setup.options.max_waiting = 2;
    let server = Server::start(setup, |_| {}).await;
    let mut client = server.generation().await;
    let plug = server.plug(1).await;
    let mut waiting = Vec::new();
    for _ in 0..2 {
        waiting.push(open_stream(&mut client, raw("Waiting", 4)).await.unwrap());
    }
    let status = unary(&mut client, raw("One too many", 4))
        .await
        .expect_err("refused");
    let told = refusal(&status);
    assert_eq!(
        (told.code, told.reason.as_str()),
        (Code::ResourceExhausted, "OVERLOADED")
    );
    assert!(status.metadata().contains_key("grpc-retry-pushback-ms"));
    // Before anything is read of the request, which would be wrong in itself.
    let mut wrong = raw("One too many", 4);
    wrong.model = "gpt-17".into();
    let status = unary(&mut client, wrong).await.expect_err("refused");
    assert_eq!(status.code(), Code::ResourceExhausted);
    drop(plug);
    for mut messages in waiting {
        while messages.message().await.unwrap().is_some() {}
    }
    check_healthy(&server).await;
    // More calls than one connection may have at once wait for their turn.
    let calls: Vec<_> = (0..8)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { stream(&mut client, raw("Turn", 2)).await })
        })
        .collect();
    for call in calls {
        let answer = call.await.unwrap();
        let overloaded = |status: &tonic::Status| status.code() == Code::ResourceExhausted;
        assert!(answer.completed.is_some() || answer.status.as_ref().is_some_and(overloaded));
    }
    check_healthy(&server).await;
}
