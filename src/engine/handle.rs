//! The engine as others hold it: submit a request, read its events, ask how busy it is.
//! Knows channels and counters; the thread behind them is `step.rs`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc as commands;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::event::Event;
use super::request::{Request, Work};
use super::step::StepLoop;
use crate::error::{Error, Result};
use crate::model::kernels::{self, ComputePool, KV_BLOCK, KvType};
use crate::model::{
    ChatTemplate, Decoder, Identity, KvCache, ModelConfig, Placement, Source, Tokenizer,
};
use crate::policy::DecisionSink;
use crate::registry::ModelIds;

/// A model ready to run.
pub struct Model {
    pub decoder: Decoder,
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub identity: Identity,
    pub name: String,
}

impl Model {
    /// Reads all weights of `source`.
    pub fn load(source: &Source, placement: &Placement) -> Result<Self> {
        Ok(Self {
            decoder: Decoder::load(source, placement)?,
            tokenizer: source.tokenizer.clone(),
            template: source.template.clone(),
            identity: source.identity.clone(),
            name: source.name.clone(),
        })
    }
}

#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Sequences that run at once.
    pub max_running: usize,
    /// Requests that may wait for a place.
    pub max_waiting: usize,
    /// Rows per step: what prompts share once the decoders have theirs.
    pub step_token_budget: usize,
    /// How much of a step's time may go to prompts while others decode, in percent.
    pub prefill_share: u8,
    /// Memory for keys and values, in bytes.
    pub kv_bytes: u64,
    pub kv_type: KvType,
    /// Threads for the arithmetic; 0 takes one per core.
    pub threads: usize,
    /// Memory for captured states that nobody has read yet, in bytes, over all requests.
    pub capture_bytes: u64,
    /// Positions per sequence; none takes the model's own limit.
    pub context_limit: Option<usize>,
    /// Keys the prompt hashes of decision records.
    pub journal_key: [u8; 32],
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_running: 32,
            max_waiting: 256,
            step_token_budget: 256,
            prefill_share: 55,
            kv_bytes: 1 << 30,
            kv_type: KvType::F32,
            threads: 0,
            capture_bytes: 1 << 30,
            context_limit: None,
            journal_key: random_key(),
        }
    }
}

fn random_key() -> [u8; 32] {
    let mut key = [0; 32];
    key[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    key[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    key
}

/// What the loaded model is, for everyone to read.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    pub name: String,
    pub config: ModelConfig,
    pub identity: Identity,
    /// Positions per sequence in this engine.
    pub context_length: usize,
    pub weight_format: String,
    pub kv_type: String,
    /// Kernels and formats: decisions of the same identity have the same bits.
    pub kernel_identity: String,
    pub weight_bytes: usize,
    pub kv_blocks: usize,
}

impl ModelInfo {
    pub fn ids(&self) -> ModelIds {
        ModelIds {
            architecture_id: self.identity.architecture_id.clone(),
            weights_id: self.identity.weights_id.clone(),
            d_model: self.config.d_model,
            n_layers: self.config.n_layers,
            vocab: self.config.vocab_size,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    pub running: usize,
    pub waiting: usize,
    /// Prompt tokens that wait.
    pub queued_tokens: usize,
    pub kv_blocks_used: usize,
    pub kv_blocks_total: usize,
    pub steps: u64,
}

/// The engine. Clones share it; when the last is dropped, its thread ends.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

struct Inner {
    commands: commands::Sender<Command>,
    shared: Arc<Shared>,
    info: ModelInfo,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    max_waiting: usize,
    capture_bytes: u64,
}

/// What the handle and the thread both see.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) running: AtomicUsize,
    pub(super) waiting: AtomicUsize,
    pub(super) queued_tokens: AtomicUsize,
    pub(super) kv_blocks_used: AtomicUsize,
    pub(super) steps: AtomicU64,
    /// Promised to captures whose events are still held.
    capture_bytes: AtomicU64,
    draining: AtomicBool,
    ended: AtomicBool,
    in_flight: Mutex<HashMap<String, Arc<AtomicBool>>>,
}

pub(super) enum Command {
    Submit(Box<Admission>),
    /// Something outside changed (an abort, a drain): look again.
    Wake,
}

/// A request on its way in.
pub(super) struct Admission {
    pub(super) request: Request,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) place: Place,
    pub(super) arrived: Instant,
}

/// A request's place in the books; leaving or dropping it strikes it out.
pub(super) struct Place {
    id: String,
    shared: Arc<Shared>,
    pub(super) aborted: Arc<AtomicBool>,
}

impl Place {
    /// Frees the id. Done before the end is told, so that who hears of it may use the id again.
    pub(super) fn leave(&self) {
        let in_flight = self.shared.in_flight.lock();
        let mut in_flight = in_flight.unwrap_or_else(PoisonError::into_inner);
        // The id may be another's by now.
        let mine = in_flight
            .get(&self.id)
            .is_some_and(|aborted| Arc::ptr_eq(aborted, &self.aborted));
        if mine {
            in_flight.remove(&self.id);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The engine's thread. Joining it waits for the last handle to go.
pub struct EngineThread(JoinHandle<()>);

impl EngineThread {
    pub fn join(self) {
        // A panic was already logged, and every request told.
        let _ = self.0.join();
    }
}

/// The events of one request. Dropping it cancels the request at the next step.
pub struct Events {
    receiver: mpsc::Receiver<Event>,
    captures: Arc<CaptureLease>,
}

/// Memory that a request's captures may take. Whoever keeps them longer than its `Events` keeps
/// this too.
pub struct CaptureLease {
    bytes: u64,
    shared: Arc<Shared>,
}

impl Drop for CaptureLease {
    fn drop(&mut self) {
        let bytes = &self.shared.capture_bytes;
        bytes.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

impl Events {
    pub fn capture_lease(&self) -> Arc<CaptureLease> {
        Arc::clone(&self.captures)
    }

    pub async fn next(&mut self) -> Option<Event> {
        self.receiver.recv().await
    }

    pub fn blocking_next(&mut self) -> Option<Event> {
        self.receiver.blocking_recv()
    }

    pub fn poll_next(
        &mut self,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Event>> {
        self.receiver.poll_recv(context)
    }
}

impl Engine {
    /// Starts the thread that owns model, KV cache and scheduler.
    ///
    /// # Errors
    /// `Error::Config` when not one block of KV fits in `kv_bytes`.
    pub fn start(
        model: Model,
        options: EngineOptions,
        sink: Arc<dyn DecisionSink>,
    ) -> Result<(Self, EngineThread)> {
        let config = model.decoder.config().clone();
        let placement = model.decoder.placement().clone();
        let per_block = KvCache::block_bytes(&config, options.kv_type);
        let context = options
            .context_limit
            .map_or(config.context_length, |limit| {
                limit.min(config.context_length)
            });
        // More than every sequence can fill is waste.
        let most = (options.max_running * context.div_ceil(KV_BLOCK)) as u64;
        let blocks = (options.kv_bytes / per_block).min(most) as usize;
        if blocks == 0 {
            return Err(Error::Config(format!(
                "--kv-memory holds no block of {KV_BLOCK} positions; give at least {per_block} bytes"
            )));
        }
        let kv = KvCache::new(&config, options.kv_type, blocks, &placement)?;
        let pool = ComputePool::new(options.threads)
            .map_err(|error| Error::Config(format!("--threads: {error}")))?;
        let kernel_identity = if placement.uses_kernels() {
            kernels::identity()
        } else {
            "tensor"
        };
        let weight_format = model.decoder.weights_held_as();
        let info = ModelInfo {
            name: model.name,
            identity: model.identity,
            context_length: context.min(blocks * KV_BLOCK),
            weight_format: weight_format.clone(),
            kv_type: options.kv_type.to_string(),
            kernel_identity: format!(
                "{kernel_identity}/weights-{weight_format}/kv-{}",
                options.kv_type
            ),
            weight_bytes: model.decoder.weight_bytes(),
            kv_blocks: blocks,
            config,
        };
        let shared = Arc::new(Shared::default());
        let (sender, receiver) = commands::channel();
        let (max_waiting, capture_bytes) = (options.max_waiting, options.capture_bytes);
        let thread = {
            let (info, shared) = (info.clone(), Arc::clone(&shared));
            let tokenizer = model.tokenizer.clone();
            let decoder = model.decoder;
            std::thread::Builder::new()
                .name("inwit-engine".into())
                .spawn(move || {
                    let _ended = Ended(Arc::clone(&shared));
                    let mut steps = StepLoop::new(
                        decoder, kv, tokenizer, info, options, sink, shared, receiver, pool,
                    );
                    steps.run();
                })
                .map_err(|error| Error::Config(format!("cannot start a thread: {error}")))?
        };
        let engine = Self(Arc::new(Inner {
            commands: sender,
            shared,
            info,
            tokenizer: model.tokenizer,
            template: model.template,
            max_waiting,
            capture_bytes,
        }));
        Ok((engine, EngineThread(thread)))
    }

    pub fn info(&self) -> &ModelInfo {
        &self.0.info
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.0.tokenizer
    }

    pub fn template(&self) -> Option<&ChatTemplate> {
        self.0.template.as_ref()
    }

    /// Puts a request into the queue. Its events follow from the next step on.
    ///
    /// # Errors
    /// `Unavailable` while draining or after the engine's end, `Overloaded` when the queue is
    /// full, `AlreadyExists` when the id is in flight.
    pub fn submit(&self, request: Request) -> Result<Events> {
        let shared = &self.0.shared;
        if shared.draining.load(Ordering::Acquire) {
            return Err(Error::Unavailable("the server is draining".into()));
        }
        if !self.is_alive() {
            return Err(Error::Unavailable("the engine has stopped".into()));
        }
        let place = self.take_place(&request.id)?;
        let captures = self.lease(&request)?;
        let waiting = shared.waiting.fetch_add(1, Ordering::AcqRel);
        if waiting >= self.0.max_waiting {
            shared.waiting.fetch_sub(1, Ordering::AcqRel);
            crate::metrics::queue_rejected("queue_full");
            return Err(Error::Overloaded {
                message: format!("{waiting} requests wait already"),
                retry_after: Duration::from_millis(500),
            });
        }
        let queued = request.prompt.tokens.len();
        shared.queued_tokens.fetch_add(queued, Ordering::AcqRel);
        let (sender, receiver) = mpsc::channel(most_events(&request, self.0.info.context_length));
        let admission = Admission {
            request,
            events: sender,
            place,
            arrived: Instant::now(),
        };
        self.0
            .commands
            .send(Command::Submit(Box::new(admission)))
            .map_err(|_| Error::Unavailable("the engine has stopped".into()))?;
        Ok(Events {
            receiver,
            captures: Arc::new(captures),
        })
    }

    /// Promises memory for all that the request may capture: the engine waits for no reader.
    fn lease(&self, request: &Request) -> Result<CaptureLease> {
        let (most, d_model) = (self.0.capture_bytes, self.0.info.config.d_model);
        let bytes = most_captured(request).saturating_mul(4 * d_model as u64);
        if bytes > most {
            return Err(Error::invalid(
                "sites",
                format!(
                    "the states take up to {bytes} bytes, and this server holds {most} at once; \
                     ask for fewer sites, positions or tokens"
                ),
            ));
        }
        let shared = &self.0.shared;
        let before = shared.capture_bytes.fetch_add(bytes, Ordering::AcqRel);
        let lease = CaptureLease {
            bytes,
            shared: Arc::clone(shared),
        };
        if before + bytes > most {
            crate::metrics::queue_rejected("captures");
            return Err(Error::Overloaded {
                message: "captured states that nobody has read yet fill the memory for them".into(),
                retry_after: Duration::from_millis(500),
            });
        }
        Ok(lease)
    }

    fn take_place(&self, id: &str) -> Result<Place> {
        let shared = &self.0.shared;
        let in_flight = shared.in_flight.lock();
        let mut in_flight = in_flight.unwrap_or_else(PoisonError::into_inner);
        if in_flight.contains_key(id) {
            return Err(Error::AlreadyExists(id.to_owned()));
        }
        let aborted = Arc::new(AtomicBool::new(false));
        in_flight.insert(id.to_owned(), Arc::clone(&aborted));
        Ok(Place {
            id: id.to_owned(),
            shared: Arc::clone(shared),
            aborted,
        })
    }

    /// Ends a request at its next step, as if its client had left. False when it is not in flight.
    pub fn abort(&self, request_id: &str) -> bool {
        let in_flight = self.0.shared.in_flight.lock();
        let in_flight = in_flight.unwrap_or_else(PoisonError::into_inner);
        let Some(aborted) = in_flight.get(request_id) else {
            return false;
        };
        aborted.store(true, Ordering::Release);
        // A stopped engine has nothing to wake.
        let _ = self.0.commands.send(Command::Wake);
        true
    }

    pub fn load(&self) -> Load {
        let shared = &self.0.shared;
        Load {
            running: shared.running.load(Ordering::Acquire),
            waiting: shared.waiting.load(Ordering::Acquire),
            queued_tokens: shared.queued_tokens.load(Ordering::Acquire),
            kv_blocks_used: shared.kv_blocks_used.load(Ordering::Acquire),
            kv_blocks_total: self.0.info.kv_blocks,
            steps: shared.steps.load(Ordering::Acquire),
        }
    }

    /// Refuses new requests from here on; the running ones finish.
    pub fn drain(&self) {
        self.0.shared.draining.store(true, Ordering::Release);
    }

    /// Whether the engine's thread runs.
    pub fn is_alive(&self) -> bool {
        !self.0.shared.ended.load(Ordering::Acquire)
    }
}

/// Says so when the thread ends, however it ends.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
    }
}

/// Rows, over all sites, that a request may capture.
fn most_captured(request: &Request) -> u64 {
    let Some(wish) = &request.capture else {
        return 0;
    };
    let prompt = request.prompt.tokens.len();
    let answer = match &request.work {
        Work::Generate => request.sampling.max_tokens.unwrap_or(0) as usize,
        Work::Score { answer } => answer.len(),
    };
    let selected = |position: &usize| wish.positions.contains(*position, prompt);
    let rows = (0..prompt + answer).filter(selected).count();
    rows as u64 * wish.sites.len() as u64
}

/// A bound that the request's events cannot reach: the engine never waits for a reader.
fn most_events(request: &Request, context: usize) -> usize {
    let answer = match &request.work {
        Work::Generate => request
            .sampling
            .max_tokens
            .map_or(context, |tokens| tokens as usize),
        Work::Score { answer } => answer.len(),
    };
    let sites = request.capture.as_ref().map_or(0, |wish| wish.sites.len());
    let rules = request.monitor.policy.rules.len();
    // A rewind starts the answer anew; each rule can cause one.
    let per_token = 2 + sites;
    (answer + request.prompt.tokens.len() + 1) * per_token * (1 + rules) + 64
}
