//! The gRPC listener: services, limits, health, and a drain that ends.
//! Knows when the server is ready; knows nothing of what a request asks.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::codec::CompressionEncoding;
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::DESCRIPTORS;
use super::activation::Activation;
use super::call::Call;
pub use super::call::Deadlines;
pub use super::door::{Door, Limits};
use super::generation::Generation;
use super::observe::Observe;
use super::probe::Probes;
use super::proto::activation_service_server::ActivationServiceServer;
use super::proto::generation_service_server::GenerationServiceServer;
use super::proto::probe_service_server::ProbeServiceServer;
use super::reply::Terms;
use super::running::Running;
use crate::engine::event::Event;
use crate::engine::handle::Engine;
use crate::engine::prepare::{Defaults, Draft, POLICY_OFF, prepare};
use crate::engine::request::Request;
use crate::error::{Error, Result};
use crate::metrics;
use crate::policy::{Mode, Policy};
use crate::registry::Registry;

/// tonic reserves the declared length before the bytes arrive, so this is also what a stream can pin.
const MAX_REQUEST_BYTES: usize = 1 << 20;
const MAX_HEADER_BYTES: u32 = 16 << 10;
const MAX_STREAMS: u32 = 100;
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// For connections to close by themselves once no request runs; a peer that never reads would take for ever.
const GOODBYE: Duration = Duration::from_secs(1);
const HEALTH_PERIOD: Duration = Duration::from_millis(200);
const RETRY_AFTER: Duration = Duration::from_millis(500);
const UPKEEP_PERIOD: Duration = Duration::from_secs(5);

/// What every service needs. Cheap to clone.
#[derive(Clone)]
pub struct Served {
    pub engine: Engine,
    pub registry: Arc<Registry>,
    pub defaults: Arc<Defaults>,
    pub deadlines: Deadlines,
    /// Ends what still runs when a drain has taken too long.
    stop: CancellationToken,
    draining: CancellationToken,
    /// Requests whose end has not been told yet.
    in_flight: TaskTracker,
    /// Tokenising is work for a core: more at once would only slow the engine.
    tokenisers: Arc<Semaphore>,
    /// Requests that are tokenised or wait for it: no more than the engine's queue could take.
    preparing: Arc<Semaphore>,
    max_waiting: usize,
}

impl Served {
    /// `max_waiting` is the length of the engine's queue.
    pub fn new(
        engine: Engine,
        registry: Arc<Registry>,
        defaults: Defaults,
        deadlines: Deadlines,
        max_waiting: usize,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            engine,
            registry,
            defaults: Arc::new(defaults),
            deadlines,
            stop: CancellationToken::new(),
            draining: CancellationToken::new(),
            in_flight: TaskTracker::new(),
            tokenisers: Arc::new(Semaphore::new(cores)),
            preparing: Arc::new(Semaphore::new(cores + max_waiting)),
            max_waiting,
        }
    }

    /// Whether requests should be sent here; if not, why.
    pub fn readiness(&self) -> Result<(), String> {
        if !self.engine.is_alive() {
            return Err("the engine has stopped".into());
        }
        if self.draining.is_cancelled() {
            return Err("the server is shutting down".into());
        }
        if self.defaults.mode == Mode::Enforce {
            // Not to be served unmonitored.
            self.registry
                .snapshot()
                .may_enforce(&self.policy())
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// The policy that judges a request that names none.
    pub(super) fn policy(&self) -> Arc<Policy> {
        match self.defaults.policy.as_deref() {
            Some(POLICY_OFF) => Arc::new(Policy::empty()),
            name => match self.registry.snapshot().policy(name) {
                Ok(policy) => policy.clone(),
                // Such a server refuses every request that names no policy itself.
                Err(_) => Arc::new(Policy::empty()),
            },
        }
    }

    /// A place among those that are prepared; refused before any work where the request could
    /// not run.
    fn admit(&self) -> Result<OwnedSemaphorePermit> {
        if self.draining.is_cancelled() {
            return Err(Error::Unavailable("the server is draining".into()));
        }
        if !self.engine.is_alive() {
            return Err(Error::Unavailable("the engine has stopped".into()));
        }
        let place = Arc::clone(&self.preparing).try_acquire_owned().ok();
        let waiting = self.engine.load().waiting;
        place.filter(|_| waiting < self.max_waiting).ok_or_else(|| {
            metrics::queue_rejected("queue_full");
            Error::Overloaded {
                message: format!("{waiting} requests wait already"),
                retry_after: RETRY_AFTER,
            }
        })
    }

    /// Checks and tokenises, off the threads that serve connections.
    pub(super) async fn prepare(&self, call: &Call, draft: Draft) -> Result<Request> {
        let place = self.admit()?;
        let draft = Draft {
            id: Some(call.id.clone()),
            deadline: Some(call.deadline),
            ..draft
        };
        let served = self.clone();
        let prepared = async {
            let permit = served.tokenisers.clone().acquire_owned().await;
            tokio::task::spawn_blocking(move || {
                let snapshot = served.registry.snapshot();
                let request = prepare(draft, &served.engine, &snapshot, &served.defaults);
                drop((permit, place));
                request
            })
            .await
            .map_err(|_| Error::internal("a request could not be prepared: a panic"))?
        };
        tokio::time::timeout_at(call.deadline.into(), prepared)
            .await
            .map_err(|_| Error::DeadlineExceeded {
                queue_ms: u64::try_from(call.arrived.elapsed().as_millis()).unwrap_or(u64::MAX),
                tokens_done: 0,
            })?
    }

    pub(super) fn submit(&self, call: &Call, request: Request) -> Result<Running> {
        self.submit_within(call, request, |_| Ok(()))
    }

    /// The same for a request that ends at the first event which `admit` refuses.
    pub(super) fn submit_within(
        &self,
        call: &Call,
        request: Request,
        admit: impl FnMut(&Event) -> Result<()> + Send + 'static,
    ) -> Result<Running> {
        let events = self.engine.submit(request)?;
        let lease = events.capture_lease();
        let events = stream::unfold(events, |mut events| async move {
            let event = events.next().await?;
            Some((event, events))
        });
        let (call, stop) = (call.clone(), self.stop.clone());
        Ok(Running::new(events, admit, call, stop, self.in_flight.token()).under(lease))
    }

    pub(super) async fn start(&self, call: &Call, draft: Draft) -> Result<(Running, Terms)> {
        let request = self.prepare(call, draft).await?;
        let terms = Terms::new(call, &request.monitor);
        Ok((self.submit(call, request)?, terms))
    }

    /// Refuses new requests from now on.
    fn begin_drain(&self) {
        self.draining.cancel();
        self.engine.drain();
        self.in_flight.close();
    }
}

/// Serves gRPC until `shutdown`, then drains: health says NOT_SERVING and new requests are refused
/// while the running ones have `grace` to end; what is left then ends with UNAVAILABLE.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    door: Door,
    served: Served,
    grace: Duration,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let told = served.readiness();
    if let Err(reason) = &told {
        tracing::warn!(%reason, "not ready");
    }
    report(&reporter, &served).await;
    let watcher = tokio::spawn(watch(reporter, served.clone(), told));
    let _watcher = AbortOnDrop(watcher.abort_handle());

    let closing = CancellationToken::new();
    let server = Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .layer(Observe)
        .add_service(health_service)
        .add_service(reflection().build_v1().map_err(unreflectable)?)
        .add_service(reflection().build_v1alpha().map_err(unreflectable)?)
        .add_service(
            GenerationServiceServer::new(Generation(served.clone()))
                .max_decoding_message_size(MAX_REQUEST_BYTES)
                .accept_compressed(CompressionEncoding::Gzip),
        )
        .add_service(
            ActivationServiceServer::new(Activation(served.clone()))
                .max_decoding_message_size(MAX_REQUEST_BYTES)
                .accept_compressed(CompressionEncoding::Gzip),
        )
        .add_service(
            ProbeServiceServer::new(Probes(served.clone()))
                .max_decoding_message_size(MAX_REQUEST_BYTES)
                .accept_compressed(CompressionEncoding::Gzip),
        )
        .serve_with_incoming_shutdown(door.into_stream(), closing.clone().cancelled_owned());
    tokio::pin!(server);

    tokio::select! {
        ended = &mut server => return ended.map_err(stopped),
        () = shutdown => {}
    }
    served.begin_drain();
    // The listener stays open meanwhile, so that callers hear UNAVAILABLE and health checks NOT_SERVING.
    let drained = tokio::time::timeout(grace, served.in_flight.wait());
    tokio::select! {
        ended = &mut server => return ended.map_err(stopped),
        drained = drained => {
            if drained.is_err() {
                tracing::warn!(?grace, "requests still ran at the end of the grace; they were ended");
            }
        }
    }
    served.stop.cancel();
    closing.cancel();
    match tokio::time::timeout(GOODBYE, server).await {
        Ok(ended) => ended.map_err(stopped),
        // Whoever is still connected is not listening.
        Err(_) => Ok(()),
    }
}

fn stopped(error: tonic::transport::Error) -> Error {
    Error::internal(format!("the gRPC listener failed: {error}"))
}

/// Lists what is served, and nothing else that the descriptors hold.
fn reflection() -> tonic_reflection::server::Builder<'static> {
    let builder = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
    services()
        .into_iter()
        .fold(builder, |builder, name| builder.with_service_name(name))
}

fn unreflectable(error: tonic_reflection::server::Error) -> Error {
    Error::internal(format!("the descriptors cannot be reflected: {error}"))
}

fn services() -> [&'static str; 4] {
    [
        <GenerationServiceServer<Generation> as NamedService>::NAME,
        <ActivationServiceServer<Activation> as NamedService>::NAME,
        <ProbeServiceServer<Probes> as NamedService>::NAME,
        "grpc.health.v1.Health",
    ]
}

/// Keeps health true, and metrics from growing where nobody scrapes them. `told` is what was
/// reported already: whoever watches health hears of changes and of nothing else.
async fn watch(reporter: HealthReporter, served: Served, told: Result<(), String>) {
    let mut tick = tokio::time::interval(HEALTH_PERIOD);
    let mut ready = told;
    let mut judge = None;
    let mut upkeep = tokio::time::Instant::now();
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = served.draining.cancelled(), if !served.draining.is_cancelled() => {}
        }
        let now = served.readiness();
        if ready != now {
            if let Err(reason) = &now {
                tracing::warn!(%reason, "not ready");
            }
            report(&reporter, &served).await;
            ready = now;
        }
        let (policy, library) = (served.policy(), served.registry.snapshot().hash.clone());
        let now = (policy.name.clone(), library);
        if judge.as_ref() != Some(&now) {
            metrics::policy_loaded(&now.0, &now.1, policy.is_empty());
            judge = Some(now);
        }
        if upkeep.elapsed() >= UPKEEP_PERIOD {
            upkeep = tokio::time::Instant::now();
            if let Ok(handle) = metrics::install() {
                handle.run_upkeep();
            }
        }
    }
}

async fn report(reporter: &HealthReporter, served: &Served) {
    let status = |good| match good {
        true => ServingStatus::Serving,
        false => ServingStatus::NotServing,
    };
    let ready = status(served.readiness().is_ok());
    for name in services().into_iter().chain(["", "readiness"]) {
        reporter.set_service_status(name, ready).await;
    }
    let alive = status(served.engine.is_alive());
    reporter.set_service_status("liveness", alive).await;
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
