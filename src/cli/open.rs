//! From checked settings to a running engine with its library: files, memory, canaries.
//! Knows the order in which things must be there; `server.rs` adds the listeners.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device as Place;
use clap::Args;
use inwit_probes::Site;

use super::progress::Progress;
use crate::config::{self, Config, Device, Flags, Overrides, PolicyChoice, Weights};
use crate::engine::event::Event;
use crate::engine::handle::{Engine, EngineOptions, EngineThread, Model};
use crate::engine::prepare::{CaptureDraft, Defaults, Draft, MonitorDraft, PromptDraft, prepare};
use crate::engine::request::PositionSelection;
use crate::error::{Error, Result};
use crate::files::read_text;
use crate::lab::bench::Bench;
use crate::lab::states::RowStates;
use crate::model::kernels::{KvType, WeightFormat};
use crate::model::{KvCache, ModelConfig, Placement, Source, StoredType};
use crate::policy::{DecisionSink, MAX_DOCUMENT_BYTES, Mode, Policy};
use crate::registry::{
    Canaries, EMPTY_POLICY, LoadedProbe, Registry, Snapshot, Standing, library_for,
};

/// The model and how it runs: what every offline command takes. `serve` takes all settings.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct ModelArgs {
    /// TOML file with settings; also INWIT_CONFIG
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A GGUF file, a Hugging Face folder, or a known name [default: smollm2-135m-instruct]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Folder with probes, vectors, refusal heads and policies, or `shipped` [default: shipped]
    #[arg(long, value_name = "FOLDER")]
    library: Option<String>,
    /// How to hold the weights: `auto`, `f32`, `bf16`, `q8_0`, `q4_1` or `as-is` [default: auto]
    #[arg(long, value_name = "FORMAT")]
    weights: Option<String>,
    /// How to hold keys and values: `auto`, `f32`, `bf16` or `bf16-i8` [default: auto]
    #[arg(long, value_name = "TYPE")]
    kv: Option<String>,
    /// Where to compute: `cpu` or `cuda:N` [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Threads that compute, or `auto` for one per core [default: auto]
    #[arg(long, value_name = "NUMBER")]
    threads: Option<String>,
    /// Rows that are computed at once [default: 16]
    #[arg(long, value_name = "NUMBER")]
    max_running: Option<String>,
    /// Memory for keys and values, such as 2GiB, or `auto` [default: auto]
    #[arg(long, value_name = "SIZE")]
    kv_memory: Option<String>,
    /// Longest prompt and answer together, or `auto` [default: auto]
    #[arg(long, value_name = "TOKENS")]
    context_limit: Option<String>,
}

impl ModelArgs {
    /// The settings, with the mode and policy that a command takes beside the model's.
    pub(super) fn load(&self, mode: Option<&str>, policy: Option<&str>) -> Result<Config> {
        Config::load(&Flags {
            config: self.config.clone(),
            model: self.model.clone(),
            library: self.library.clone(),
            weights: self.weights.clone(),
            kv: self.kv.clone(),
            device: self.device.clone(),
            threads: self.threads.clone(),
            max_running: self.max_running.clone(),
            kv_memory: self.kv_memory.clone(),
            context_limit: self.context_limit.clone(),
            // Whoever runs the command is the operator.
            overrides: Some("allow".into()),
            mode: mode.map(str::to_owned),
            policy: policy.map(str::to_owned),
            ..Flags::default()
        })
    }

    /// Refuses those of the flags named that were given: the command would not read them.
    pub(super) fn refuse(&self, unread: &[(&str, &str)]) -> Result<()> {
        let given = |name: &str| match name {
            "--library" => self.library.is_some(),
            "--device" => self.device.is_some(),
            "--max-running" => self.max_running.is_some(),
            "--kv-memory" => self.kv_memory.is_some(),
            "--context-limit" => self.context_limit.is_some(),
            _ => false,
        };
        match unread.iter().find(|(name, _)| given(name)) {
            Some((name, why)) => Err(Error::Config(format!("{name}: {why}"))),
            None => Ok(()),
        }
    }

    /// The same for another model, where one is named.
    pub(super) fn with_model(&self, model: Option<&str>) -> Self {
        match model {
            None => self.clone(),
            Some(model) => Self {
                model: Some(model.to_owned()),
                ..self.clone()
            },
        }
    }

    /// The same with an engine on it, ready for offline work.
    pub(super) async fn bench(&self, mode: Option<&str>, policy: Option<&str>) -> Result<Bench> {
        let config = self.load(mode, policy)?;
        let in_flight = config.max_running + config.max_waiting / 2;
        let opened = open(&config, Arc::new(crate::journal::Discard)).await?;
        Ok(Bench {
            snapshot: opened.registry.snapshot(),
            engine: opened.engine,
            defaults: opened.defaults,
            in_flight,
            states: Vec::new(),
        })
    }
}

impl ModelArgs {
    /// The model's own output head, `[vocab, d_model]`, for fitting another beside it.
    pub(super) async fn output_head(&self) -> Result<candle_core::Tensor> {
        let model = self.load(Some("off"), Some("off"))?.model;
        let read = move || {
            let source = Source::open(&super::pull::fetch(&model)?)?;
            let name = match source.config.tied_embeddings {
                true => "model.embed_tokens.weight",
                false => "lm_head.weight",
            };
            let shape = [source.config.vocab_size, source.config.d_model];
            let values = source.tensor(name, &shape)?;
            Ok(candle_core::Tensor::from_vec(
                values,
                (shape[0], shape[1]),
                &Place::Cpu,
            )?)
        };
        tokio::task::spawn_blocking(read)
            .await
            .map_err(|_| Error::internal("the output head could not be read: a panic"))?
    }
}

/// A running engine and the library that goes with its model.
pub struct Opened {
    pub engine: Engine,
    pub thread: EngineThread,
    pub registry: Arc<Registry>,
    pub defaults: Defaults,
    /// Whether any artefact fits the model; without one the empty policy serves.
    pub watched: bool,
}

/// Opens the model's files, checks that weights and KV fit in memory, starts the engine, loads the
/// library and runs the canaries of probes that were fitted on other weights.
///
/// # Errors
/// `Config` with the flag that helps, or `File` with what is wrong in which file.
pub async fn open(config: &Config, sink: Arc<dyn DecisionSink>) -> Result<Opened> {
    let settings = config.clone();
    let (engine, thread) = tokio::task::spawn_blocking(move || start_engine(&settings, sink))
        .await
        .map_err(|_| Error::internal("the model could not be loaded: a panic"))??;
    let (registry, watched) = load_library(config, &engine)?;
    let defaults = Defaults {
        mode: mode(config.mode),
        policy: None,
        max_tokens: config.max_tokens_default,
        overrides: config.overrides == Overrides::Allow,
    };
    run_canaries(&engine, &registry, &defaults).await?;
    let snapshot = registry.snapshot();
    if defaults.mode == Mode::Enforce {
        snapshot.may_enforce(snapshot.policy(None)?)?;
    }
    Ok(Opened {
        engine,
        thread,
        registry: Arc::new(registry),
        defaults,
        watched,
    })
}

fn start_engine(config: &Config, sink: Arc<dyn DecisionSink>) -> Result<(Engine, EngineThread)> {
    let (model, options) = load_model(config)?;
    Engine::start(model, options, sink)
}

/// The model in memory, and how an engine would run it.
pub(super) fn load_model(config: &Config) -> Result<(Model, EngineOptions)> {
    let source = Source::open(&super::pull::fetch(&config.model)?)?;
    let wanted = weights_on(config.device, config.weights)?;
    let weights = weight_format(wanted, source.matrices());
    let kv_type = kv_on(config.device, config.kv)?;
    let needs = Needs::of(
        &source.config,
        config,
        kv_type,
        source.weight_bytes(weights),
    );
    let kv_bytes = needs.kv_bytes(available_memory()?, config.kv_memory)?;
    let placement = Placement {
        device: device(config.device)?,
        weights,
        portable: false,
    };
    let options = EngineOptions {
        max_running: config.max_running,
        max_waiting: config.max_waiting,
        step_token_budget: config.step_token_budget,
        prefill_share: config.prefill_share,
        kv_bytes,
        kv_type,
        threads: config.threads.unwrap_or(0),
        context_limit: config.context_limit,
        ..EngineOptions::default()
    };
    Ok((Model::load(&source, &placement)?, options))
}

pub(super) fn kv_type(wanted: config::KvType) -> KvType {
    match wanted {
        config::KvType::F32 => KvType::F32,
        // Within the bounds of docs/performance.md, for half the memory.
        config::KvType::Auto | config::KvType::Bf16 => KvType::Bf16,
        config::KvType::Bf16I8 => KvType::Bf16I8,
    }
}

/// What is wished for there: devices other than the CPU hold keys and values as one type.
fn kv_on(device: Device, wanted: config::KvType) -> Result<KvType> {
    match (device, kv_type(wanted)) {
        (device @ Device::Cuda(_), KvType::Bf16I8) => Err(Error::Config(format!(
            "kv: {wanted} is for the CPU, not for {device}; set auto, bf16 or f32"
        ))),
        (_, kv_type) => Ok(kv_type),
    }
}

/// What is wished for there: devices other than the CPU hold weights in f32 alone.
fn weights_on(device: Device, wanted: Weights) -> Result<Weights> {
    match (device, wanted) {
        (Device::Cpu, wanted) => Ok(wanted),
        (_, Weights::Auto | Weights::F32) => Ok(Weights::F32),
        (device, wanted) => Err(Error::Config(format!(
            "weights: {wanted} is for the CPU, and {device} holds weights as f32; set auto or f32"
        ))),
    }
}

/// `auto` keeps the weights of the file exactly: bf16 where every matrix is, the blocks of 4 or 8
/// bits that a kernel takes, f32 otherwise.
pub(super) fn weight_format(
    wanted: Weights,
    matrices: impl Iterator<Item = StoredType>,
) -> WeightFormat {
    let matrices: Vec<StoredType> = matrices.collect();
    match wanted {
        Weights::F32 => WeightFormat::F32,
        Weights::Bf16 => WeightFormat::Bf16,
        Weights::Q8_0 => WeightFormat::Q8_0,
        Weights::Q4_1 => WeightFormat::Q4_1,
        Weights::AsIs => WeightFormat::AsIs,
        Weights::Auto if matrices.iter().all(|m| *m == StoredType::Bf16) => WeightFormat::Bf16,
        Weights::Auto if matrices.iter().any(|m| m.has_kernel()) => WeightFormat::AsIs,
        Weights::Auto => WeightFormat::F32,
    }
}

fn device(device: Device) -> Result<Place> {
    match device {
        Device::Cpu => Ok(Place::Cpu),
        Device::Cuda(ordinal) => Place::new_cuda(ordinal)
            .map_err(|error| Error::Config(format!("--device cuda:{ordinal}: {error}"))),
    }
}

/// The server's words for what the policy crate calls the same.
fn mode(mode: config::Mode) -> Mode {
    match mode {
        config::Mode::Off => Mode::Off,
        config::Mode::Shadow => Mode::Shadow,
        config::Mode::Enforce => Mode::Enforce,
    }
}

/// What must fit in memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Needs {
    weights: u64,
    /// Keys and values of one sequence at the longest context.
    sequence: u64,
    sequences: u64,
}

impl Needs {
    fn of(model: &ModelConfig, config: &Config, kv_type: KvType, weight_bytes: u64) -> Self {
        let context = config.context_limit.map_or(model.context_length, |limit| {
            limit.min(model.context_length)
        });
        let blocks = context.div_ceil(crate::model::kernels::KV_BLOCK) as u64;
        Self {
            weights: weight_bytes,
            sequence: blocks.saturating_mul(KvCache::block_bytes(model, kv_type)),
            sequences: config.max_running as u64,
        }
    }

    /// How much to take for keys and values: as asked, or for every sequence that may run, at most
    /// half of what the weights leave.
    fn kv_bytes(&self, available: u64, asked: Option<u64>) -> Result<u64> {
        let left = available.saturating_sub(self.weights);
        let kv = asked.unwrap_or_else(|| {
            let every = self.sequence.saturating_mul(self.sequences);
            every.min((left / 2).max(self.sequence))
        });
        if kv <= left && left > 0 {
            return Ok(kv);
        }
        let remedy = match asked {
            Some(_) if self.weights < available => "lower --kv-memory",
            _ if self.weights >= available => "try --weights bf16, or a smaller --model",
            _ => "lower --context-limit, or try --kv bf16-i8 or --weights bf16",
        };
        Err(Error::Config(format!(
            "the weights take {} and keys and values {}, but only {} of memory is free; {remedy}",
            size(self.weights),
            size(kv),
            size(available),
        )))
    }
}

/// What this process may still take: the machine's, or its control group's if that is less.
fn available_memory() -> Result<u64> {
    let mut system = sysinfo::System::new()
        .map_err(|error| Error::internal(format!("the free memory is not known: {error}")))?;
    system.refresh_memory();
    let machine = system.available_memory();
    Ok(match system.cgroup_limits() {
        Some(limits) if limits.total_memory > 0 => machine.min(limits.free_memory),
        _ => machine,
    })
}

pub(super) fn size(bytes: u64) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    if gib >= 1.0 {
        format!("{gib:.1} GiB")
    } else {
        format!("{} MiB", bytes.div_ceil(1 << 20))
    }
}

fn load_library(config: &Config, engine: &Engine) -> Result<(Registry, bool)> {
    let ids = engine.info().ids();
    let default = match &config.policy {
        PolicyChoice::Named(name) => Some(name.as_str()),
        PolicyChoice::Off => Some(EMPTY_POLICY),
        PolicyChoice::Auto | PolicyChoice::File(_) => None,
    };
    let loaded = match &config.library {
        None => Registry::load_shipped(&ids, default)?,
        Some(root) => library_for(&ids, root)?
            .map(|folder| Registry::load(&folder, &ids, default))
            .transpose()?,
    };
    let watched = loaded.is_some();
    let registry = loaded.unwrap_or_else(Registry::empty);
    let snapshot = registry.snapshot();
    match &config.policy {
        PolicyChoice::File(path) => {
            registry.replace(with_policy_file(&snapshot, path, ids.n_layers)?);
        }
        _ => {
            snapshot
                .policy(default)
                .map_err(|error| Error::Config(format!("--policy: {error}")))?;
        }
    }
    Ok((registry, watched))
}

fn with_policy_file(snapshot: &Snapshot, path: &Path, n_layers: usize) -> Result<Snapshot> {
    let document = read_text(path, MAX_DOCUMENT_BYTES as u64, "a policy")?;
    let name = path
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let policy = Policy::parse_and_compile(&name, 1, &document, &snapshot.catalog(n_layers))
        .map_err(|error| Error::file(path.display(), error))?;
    snapshot.with_default_policy(policy).map_err(|taken| {
        let message = format!("{taken}; rename the file, or give it another `name = \"…\"`");
        Error::file(path.display(), message)
    })
}

/// Tries every unverified probe on the serving weights: its canaries' states are captured at its
/// sites and scored by the plain definition.
async fn run_canaries(engine: &Engine, registry: &Registry, defaults: &Defaults) -> Result<()> {
    let snapshot = registry.snapshot();
    let mut results = Vec::new();
    for probe in &snapshot.probes {
        let Standing::Unverified {
            canaries: Canaries::NotRun,
        } = &probe.standing
        else {
            continue;
        };
        let mut logits = Vec::new();
        for canary in &probe.probe.manifest().canaries {
            let tokens = canary
                .tokens
                .iter()
                .take(canary.position + 1)
                .copied()
                .collect();
            logits.push(canary_logit(engine, &snapshot, defaults, probe, tokens).await);
        }
        let logits: Result<Vec<f32>> = logits.into_iter().collect();
        results.push((
            probe.name.clone(),
            logits.map_err(|error| error.to_string()),
        ));
    }
    if !results.is_empty() {
        let results = results
            .iter()
            .map(|(name, logits)| (&**name, logits.clone()));
        registry.replace(snapshot.with_canary_results(results));
    }
    Ok(())
}

async fn canary_logit(
    engine: &Engine,
    snapshot: &Arc<Snapshot>,
    defaults: &Defaults,
    probe: &LoadedProbe,
    tokens: Vec<u32>,
) -> Result<f32> {
    let sites: Vec<Site> = probe.probe.heads().iter().map(|head| head.site).collect();
    let draft = Draft {
        score_only: true,
        monitor: MonitorDraft {
            mode: Some(Mode::Off),
            ..MonitorDraft::default()
        },
        capture: Some(CaptureDraft {
            sites: sites.iter().map(Site::to_string).collect(),
            positions: PositionSelection::LastPromptToken,
        }),
        skip_prefix_cache: true,
        ..Draft::of(PromptDraft::Tokens(tokens))
    };
    let mut events = engine.submit(prepare(draft, engine, snapshot, defaults)?)?;
    let mut captured = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Event::Captured(states) => captured.push(states),
            Event::Failed(error) => return Err(error),
            _ => {}
        }
    }
    let d_model = engine.info().config.d_model;
    let states = RowStates::join(&captured, &sites, d_model)?;
    if states.positions.len() != 1 {
        return Err(Error::internal("a canary's state was not captured"));
    }
    let state = |site: Site| {
        let index = sites.iter().position(|own| *own == site);
        states.values[index.expect("a head at a site not captured")].as_slice()
    };
    let output = probe.probe.score_row(state).map_err(Error::internal)?;
    Ok(output.logit)
}

/// A progress bar's tick for a lab function.
pub(super) fn ticking(progress: &mut Progress) -> impl FnMut(usize, usize) + Send {
    move |done, total| progress.tick(done, total)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn needs() -> Needs {
        Needs {
            weights: 2 * GIB,
            sequence: GIB / 4,
            sequences: 16,
        }
    }

    #[test]
    fn keys_and_values_take_what_can_run_and_at_most_half_the_rest() {
        assert_eq!(needs().kv_bytes(64 * GIB, None), Ok(4 * GIB));
        assert_eq!(needs().kv_bytes(4 * GIB, None), Ok(GIB));
    }

    #[test]
    fn a_device_holds_weights_as_f32_and_no_other_wish_is_passed_over() {
        let cuda = Device::Cuda(1);
        assert_eq!(weights_on(cuda, Weights::Auto), Ok(Weights::F32));
        assert_eq!(weights_on(cuda, Weights::F32), Ok(Weights::F32));
        assert_eq!(weights_on(Device::Cpu, Weights::Q4_1), Ok(Weights::Q4_1));
        let error = weights_on(cuda, Weights::Q8_0).expect_err("refused");
        let error = error.to_string();
        assert!(
            error.contains("weights: q8_0") && error.contains("cuda:1"),
            "{error}"
        );
    }

    #[test]
    fn keys_and_values_of_two_types_are_for_the_cpu() {
        let mixed = config::KvType::Bf16I8;
        assert_eq!(kv_on(Device::Cpu, mixed), Ok(KvType::Bf16I8));
        assert_eq!(
            kv_on(Device::Cuda(0), config::KvType::Auto),
            Ok(KvType::Bf16)
        );
        let error = kv_on(Device::Cuda(0), mixed)
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("kv: bf16-i8") && error.contains("cuda:0"),
            "{error}"
        );
    }

    #[test]
    fn one_sequence_must_fit() {
        assert_eq!(needs().kv_bytes(2 * GIB + GIB / 4, None), Ok(GIB / 4));
        let error = needs()
            .kv_bytes(2 * GIB + GIB / 8, None)
            .expect_err("refused")
            .to_string();
        assert!(error.contains("--context-limit"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_flag_that_helps() {
        let error = needs()
            .kv_bytes(8 * GIB, Some(7 * GIB))
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("--kv-memory") && error.contains("7.0 GiB"),
            "{error}"
        );
        let error = needs()
            .kv_bytes(GIB, None)
            .expect_err("refused")
            .to_string();
        assert!(error.contains("--weights bf16"), "{error}");
        let error = needs()
            .kv_bytes(GIB, Some(1))
            .expect_err("refused")
            .to_string();
        assert!(error.contains("--weights bf16"), "{error}");
    }

    #[test]
    fn weights_are_held_in_half_only_where_that_loses_nothing() {
        use StoredType::{Bf16, F32, Q6K, Q8_0};
        let auto = |stored: &[StoredType]| weight_format(Weights::Auto, stored.iter().copied());
        assert_eq!(auto(&[Bf16, Bf16]), WeightFormat::Bf16);
        assert_eq!(auto(&[Bf16, F32, Bf16]), WeightFormat::F32);
        assert_eq!(auto(&[Q6K, F32]), WeightFormat::F32);
        assert_eq!(auto(&[Q8_0, Q6K]), WeightFormat::AsIs);
        let asked = weight_format(Weights::Bf16, [F32].into_iter());
        assert_eq!(asked, WeightFormat::Bf16);
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(size(3 * GIB / 2), "1.5 GiB");
        assert_eq!(size(1), "1 MiB");
    }
}
