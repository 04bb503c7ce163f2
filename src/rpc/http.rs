//! Metrics and health over plain HTTP, for those who do not speak gRPC.
//! Knows no request.

use std::future::{Future, IntoFuture};

use axum::Router;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::StatusCode;
use axum::http::header::{CONNECTION, CONTENT_TYPE};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;

use super::server::{Door, Served};
use crate::error::{Error, Result};
use crate::metrics;

const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Serves `/metrics`, `/livez` (the engine runs) and `/readyz`, `/health` (requests should come here)
/// until `shutdown`.
///
/// # Errors
/// When the listener fails.
pub async fn serve(door: Door, served: Served, shutdown: impl Future<Output = ()>) -> Result<()> {
    let handle = metrics::install()?;
    let server = axum::serve(door, routes(served, handle)).into_future();
    tokio::select! {
        ended = server => {
            ended.map_err(|error| Error::internal(format!("the HTTP listener failed: {error}")))
        }
        // Nobody is waited for: a scrape is short, and a peer that never reads would take for ever.
        () = shutdown => Ok(()),
    }
}

#[derive(Clone)]
struct Sources {
    served: Served,
    metrics: PrometheusHandle,
}

fn routes(served: Served, metrics: PrometheusHandle) -> Router {
    Router::new()
        .route("/metrics", get(scrape))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/health", get(ready))
        .with_state(Sources { served, metrics })
        .layer(map_response(close))
}

/// One request a connection, so that none is kept open for a request that never comes.
async fn close(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

async fn scrape(State(sources): State<Sources>) -> Response {
    let load = sources.served.engine.load();
    metrics::load_changed(load.running, load.waiting);
    metrics::kv_changed(load.kv_blocks_used, load.kv_blocks_total);
    ([(CONTENT_TYPE, PROMETHEUS_TEXT)], sources.metrics.render()).into_response()
}

async fn live(State(sources): State<Sources>) -> Response {
    match sources.served.engine.is_alive() {
        true => health(Ok(())),
        false => health(Err("the engine has stopped".into())),
    }
}

async fn ready(State(sources): State<Sources>) -> Response {
    health(sources.served.readiness())
}

fn health(health: Result<(), String>) -> Response {
    match health {
        Ok(()) => (StatusCode::OK, "ok\n").into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}
