//! A whole server in one value: listeners, engine, library. `serve`, the demo and the tests use it.
//! Knows the order of start and end; the services are in `rpc`.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::open::{Opened, open};
use crate::config::Config;
use crate::engine::handle::{Engine, EngineThread};
use crate::error::{Error, Result};
use crate::journal::Memory;
use crate::metrics;
use crate::registry::Registry;
use crate::rpc::server::{Deadlines, Door, Limits};
use crate::rpc::{Served, http, serve};

/// Decisions that a server keeps in memory.
const KEPT_DECISIONS: usize = 10_000;

/// A server that takes requests. Dropping it cuts everything off; `stop` ends it in order.
pub struct Running {
    /// Where gRPC listens; the real port where 0 was asked for.
    pub address: SocketAddr,
    /// Where `/metrics` and `/health` are.
    pub http_address: Option<SocketAddr>,
    pub engine: Engine,
    pub registry: Arc<Registry>,
    /// The newest decisions.
    pub decisions: Arc<Memory>,
    /// Whether any probe fits the model.
    pub watched: bool,
    shutdown: CancellationToken,
    closed: CancellationToken,
    grpc: JoinHandle<Result<()>>,
    http: Option<JoinHandle<Result<()>>>,
    thread: EngineThread,
}

/// Binds the listeners, loads model and library, and serves.
///
/// # Errors
/// `Config` for an address that cannot be had and for what does not fit in memory, `File` for files.
pub async fn start(config: &Config) -> Result<Running> {
    // First, since a taken port is known at once and a model takes seconds to load.
    let listener = bind("--listen", config.listen).await?;
    let http_listener = match config.http_listen {
        Some(address) => Some(bind("--http-listen", address).await?),
        None => None,
    };
    let address = bound(&listener)?;
    let http_address = http_listener.as_ref().map(bound).transpose()?;
    // Before anything is counted.
    metrics::install()?;
    let decisions = Arc::new(Memory::new(KEPT_DECISIONS));
    let Opened {
        engine,
        thread,
        registry,
        defaults,
        watched,
    } = open(config, decisions.clone()).await?;

    let deadlines = Deadlines {
        default: config.default_deadline,
        max: config.max_deadline,
    };
    let limits = Limits {
        grpc_connections: config.max_connections,
        ..Limits::default()
    };
    let served = Served::new(
        engine.clone(),
        registry.clone(),
        defaults,
        deadlines,
        config.max_waiting,
    );
    let (shutdown, closed) = (CancellationToken::new(), CancellationToken::new());
    let http = http_listener.map(|listener| {
        // It answers for as long as gRPC drains, so that probes see why.
        tokio::spawn(http::serve(
            Door::for_http(listener, limits),
            served.clone(),
            closed.clone().cancelled_owned(),
        ))
    });
    let until = shutdown.clone().cancelled_owned();
    let door = Door::for_grpc(listener, limits);
    let grpc = tokio::spawn(serve(door, served, config.drain_grace, until));
    Ok(Running {
        address,
        http_address,
        engine,
        registry,
        decisions,
        watched,
        shutdown,
        closed,
        grpc,
        http,
        thread,
    })
}

impl Running {
    /// Waits until `stop` is done, then drains: health says NOT_SERVING, new requests are refused
    /// with UNAVAILABLE, running ones have the grace to end.
    ///
    /// # Errors
    /// When a listener failed.
    pub async fn until(mut self, stop: impl Future<Output = ()>) -> Result<()> {
        let ended = tokio::select! {
            ended = &mut self.grpc => Some(ended),
            () = stop => None,
        };
        let ended = match ended {
            Some(ended) => ended,
            None => {
                self.shutdown.cancel();
                (&mut self.grpc).await
            }
        };
        self.closed.cancel();
        if let Some(http) = self.http {
            // A scraper that never hangs up must not hold the exit.
            http.abort();
        }
        drop(self.engine);
        // Every handle is gone once the services are; the thread ends by itself.
        drop(self.thread);
        ended.map_err(|_| Error::internal("the gRPC listener ended in a panic"))?
    }

    /// Drains and ends.
    pub async fn stop(self) -> Result<()> {
        self.until(std::future::ready(())).await
    }
}

async fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let remedy = match error.kind() {
            std::io::ErrorKind::AddrInUse => "another process listens there; choose another port",
            std::io::ErrorKind::PermissionDenied => "choose a port above 1023",
            _ => "choose an address of this machine",
        };
        Error::Config(format!("{flag} {address}: {error}; {remedy}"))
    })
}

fn bound(listener: &TcpListener) -> Result<SocketAddr> {
    listener
        .local_addr()
        .map_err(|error| Error::internal(format!("no local address: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_an_error_of_one_line_that_helps() {
        let taken = bind("--listen", "127.0.0.1:0".parse().expect("an address")).await;
        let address = bound(taken.as_ref().expect("binds")).expect("an address");
        let error = bind("--listen", address)
            .await
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("--listen") && error.contains("choose another port"),
            "{error}"
        );
        assert!(!error.contains('\n'));
    }
}
