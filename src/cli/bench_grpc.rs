//! What gRPC takes of the throughput: the same answers through the engine's handle and over a socket.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::engine::prepare::Defaults;
use crate::error::{Error, Result};
use crate::lab::benchmark::{Benchmark, Grpc};
use crate::lab::statistics::Alternation;
use crate::lab::workload;
use crate::policy::Mode;
use crate::registry::Registry;
use crate::rpc::load_client::LoadClient;
use crate::rpc::server::{Deadlines, Door, Limits};
use crate::rpc::{Served, serve};

/// Of a prompt.
const WORDS: usize = 40;
/// Over these the streams are spread.
const CONNECTIONS: usize = 4;
/// Alternations for each round: their spread is what the interval is made of.
const ALTERNATIONS: usize = 3;
const DEADLINE: Duration = Duration::from_secs(600);
const GRACE: Duration = Duration::from_secs(1);

/// Alternates in process, gRPC, gRPC, in process on the same prompts, all of them in the prefix
/// cache, so that what is measured is writing.
pub(super) async fn grpc(benchmark: &Benchmark<'_>, streams: usize, seed: u64) -> Result<Grpc> {
    let prompts = workload::beginnings(seed, streams, WORDS);
    let (_, tokens) = benchmark.answer_all(&prompts).await?;
    let server = Server::start(benchmark, streams).await?;
    let mut alternations = Vec::new();
    for _ in 0..benchmark.sizes.rounds * ALTERNATIONS {
        let mut times = [0.0; 4];
        for (time, over_grpc) in times.iter_mut().zip([false, true, true, false]) {
            let (taken, came) = match over_grpc {
                false => benchmark.answer_all(&prompts).await?,
                true => {
                    server
                        .answer_all(&prompts, benchmark.sizes.answer_tokens)
                        .await?
                }
            };
            if came != tokens {
                return Err(Error::internal(format!(
                    "the same prompts were answered with {came} tokens and with {tokens}"
                )));
            }
            *time = taken;
        }
        let [first, second, third, last] = times;
        alternations.push(Alternation {
            base: [first, last],
            variant: [second, third],
        });
    }
    let found = Grpc::of(streams, tokens, &alternations, seed);
    found.ok_or_else(|| Error::internal("nothing was measured"))
}

/// The gRPC services over the benchmark's engine, and a client of theirs. Ends when dropped.
struct Server {
    client: LoadClient,
    stop: CancellationToken,
}

impl Server {
    async fn start(benchmark: &Benchmark<'_>, streams: usize) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener =
            listener.map_err(|error| Error::internal(format!("no port to listen on: {error}")))?;
        let address = listener.local_addr().map_err(Error::internal)?;
        let defaults = Defaults {
            mode: Mode::Off,
            policy: None,
            max_tokens: 1,
            overrides: false,
        };
        let deadlines = Deadlines {
            default: DEADLINE,
            max: DEADLINE,
        };
        let served = Served::new(
            benchmark.engine.clone(),
            Arc::new(Registry::empty()),
            defaults,
            deadlines,
            streams,
        );
        let stop = CancellationToken::new();
        let door = Door::for_grpc(listener, Limits::default());
        tokio::spawn(serve(door, served, GRACE, stop.clone().cancelled_owned()));
        let url = address.to_string();
        let client = LoadClient::connect(&url, CONNECTIONS.min(streams), Some(Mode::Off), None);
        let client = client
            .await
            .map_err(|error| Error::internal(error.to_string()))?;
        Ok(Self {
            client: client.without_template(true),
            stop,
        })
    }

    /// As `Benchmark::answer_all`, over the socket.
    async fn answer_all(&self, prompts: &[String], most: usize) -> Result<(f64, usize)> {
        let most = u32::try_from(most).unwrap_or(u32::MAX);
        let one = |prompt: &String| {
            let prompt = prompt.clone();
            async move {
                let failed = |code| Error::internal(format!("a call ended with {code}"));
                let mut answer = self
                    .client
                    .answer(&prompt, most, false)
                    .await
                    .map_err(failed)?;
                let mut tokens = 0;
                while let Some(came) = answer.next().await.map_err(failed)? {
                    tokens += came as usize;
                }
                Ok::<_, Error>(tokens)
            }
        };
        let origin = Instant::now();
        let answers = try_join_all(prompts.iter().map(one)).await?;
        Ok((origin.elapsed().as_secs_f64() * 1e6, answers.iter().sum()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
