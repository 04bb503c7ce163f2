//! Peers that take connections and give nothing for them: silence, half a request, headers without
//! end, more connections than there is room for. The server hangs up and answers the others.
//! Knows sockets and frames; what a request asks is tested elsewhere.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream as BlockingStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use inwit::rpc::server::Limits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::golden::golden;
use crate::wire_support::{PATIENCE, Server, Setup, raw, unary};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

async fn start(limits: Limits) -> Server {
    let setup = Setup {
        limits,
        ..Setup::default()
    };
    Server::start(setup, |_| {}).await
}

fn short() -> Limits {
    Limits {
        patience: Duration::from_millis(300),
        ..Limits::default()
    }
}

async fn check_answers(server: &Server) {
    let answer = async {
        let mut client = server.generation().await;
        unary(&mut client, raw("Still there?", 4)).await.unwrap()
    };
    let reply = tokio::time::timeout(PATIENCE, answer).await;
    assert_eq!(reply.expect("no answer").token_ids.len(), 4);
    server.idle().await;
}

/// Reads until the other side hangs up, which it must.
async fn check_hung_up(mut socket: TcpStream, case: &str) {
    let mut bytes = [0; 1024];
    let closed = async { while !matches!(socket.read(&mut bytes).await, Ok(0) | Err(_)) {} };
    let closed = tokio::time::timeout(PATIENCE, closed).await;
    assert!(closed.is_ok(), "{case}: still connected");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_say_what_it_wants_is_hung_up_on() {
    let server = start(short()).await;
    let half_a_request: &[u8] = b"GET /health HTTP/1.1\r\nhost: ";
    let mut peers = Vec::new();
    for (case, address, speech) in [
        ("silence", server.address, &b""[..]),
        ("half a preface", server.address, &PREFACE[..12]),
        ("silence over HTTP", server.http_address, b""),
        ("half a request", server.http_address, half_a_request),
    ] {
        let mut peer = TcpStream::connect(address).await.unwrap();
        peer.write_all(speech).await.unwrap();
        peers.push((case, peer));
    }
    // Meanwhile and afterwards the others are served.
    check_answers(&server).await;
    let mut client = server.generation().await;
    for (case, peer) in peers {
        check_hung_up(peer, case).await;
    }
    // One that spoke is not hung up on, however long it has been quiet.
    let reply = unary(&mut client, raw("And I?", 4)).await.unwrap();
    assert_eq!(reply.token_ids.len(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_connections_than_there_is_room_for_wait_and_the_server_answers_afterwards() {
    let limits = Limits {
        grpc_connections: 3,
        http_connections: 2,
        ..short()
    };
    let server = start(limits).await;
    let mut silent = Vec::new();
    for _ in 0..12 {
        silent.push(TcpStream::connect(server.address).await.unwrap());
        silent.push(TcpStream::connect(server.http_address).await.unwrap());
    }
    check_answers(&server).await;
    let mut socket = TcpStream::connect(server.http_address).await.unwrap();
    let request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    socket.write_all(request).await.unwrap();
    let mut reply = String::new();
    // To its end, though keeping the connection was not ruled out.
    let read = tokio::time::timeout(PATIENCE, socket.read_to_string(&mut reply)).await;
    read.expect("no answer").unwrap();
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    assert!(reply.contains("connection: close"), "{reply}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_never_end_close_the_connection() {
    let server = start(Limits::default()).await;
    let mut flood = PREFACE.to_vec();
    flood.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    // HEADERS of stream 1 without END_HEADERS, then CONTINUATION upon CONTINUATION.
    flood.extend([0, 0, 0, 1, 0, 0, 0, 0, 1]);
    for _ in 0..4000 {
        // One literal header of one letter, never indexed.
        flood.extend([0, 0, 5, 9, 0, 0, 0, 0, 1]);
        flood.extend([0x10, 1, b'a', 1, b'b']);
    }
    let (mut reading, mut writing) = TcpStream::connect(server.address)
        .await
        .unwrap()
        .into_split();
    // The server may hang up in the middle of it.
    let write = tokio::spawn(async move { writing.write_all(&flood).await.map(|()| writing) });
    let mut bytes = [0; 1024];
    let closed = async { while !matches!(reading.read(&mut bytes).await, Ok(0) | Err(_)) {} };
    let closed = tokio::time::timeout(PATIENCE, closed).await;
    assert!(closed.is_ok(), "the flood goes on");
    drop(write.await);
    check_answers(&server).await;
}

/// A server of its own, with few files that it may open.
struct Poor {
    child: Child,
    grpc: String,
    http: String,
}

impl Poor {
    fn start() -> Self {
        let model = golden("llama/model.gguf");
        let serve = "ulimit -n 96; exec \"$0\" serve --model \"$1\" --listen 127.0.0.1:0 \
                     --http-listen 127.0.0.1:0 --threads 1";
        let child = Command::new("sh")
            .args(["-c", serve, env!("CARGO_BIN_EXE_inwit")])
            .arg(model)
            .env("INWIT_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut server = Self {
            child,
            grpc: String::new(),
            http: String::new(),
        };
        let mut lines = BufReader::new(server.child.stderr.take().unwrap()).lines();
        let mut warned = false;
        while server.grpc.is_empty() {
            let line = lines.next().expect("the server ended").unwrap();
            warned |= line.contains("ulimit");
            let field = |name: &str| {
                let at = line.find(name)? + name.len();
                let value = line[at..].split_whitespace().next()?;
                Some(value.trim_matches('"').to_owned())
            };
            if let (Some(grpc), Some(http)) = (field(" grpc="), field(" http=")) {
                (server.grpc, server.http) = (grpc, http);
            }
        }
        assert!(warned, "nothing was said of the few files");
        // Else the server would stop at a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        server
    }
}

impl Drop for Poor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn health_is_told_while_idle_connections_want_every_file() {
    let server = Poor::start();
    let idle: Vec<_> = (0..140)
        .map(|_| BlockingStream::connect(&server.grpc).unwrap())
        .collect();
    let mut socket = BlockingStream::connect(&server.http).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";
    socket.write_all(request).unwrap();
    let mut reply = String::new();
    socket.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    drop(idle);
}
