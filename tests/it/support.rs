//! The engine on the tiny golden models: a library made by the test, requests written as drafts,
//! and outcomes that compare bit for bit.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use inwit::engine::event::{Completed, FinishReason, Score, Verdict};
use inwit::engine::fold::Folded;
use inwit::engine::sampler::SamplingDraft;
use inwit::engine::{
    Defaults, Draft, Engine, EngineOptions, Event, Events, InterventionDraft,
    InterventionKindDraft, Model, MonitorDraft, PositionSelection, PromptDraft, VectorDraft,
    prepare,
};
use inwit::error::{Error, Result};
use inwit::hooks::Site;
use inwit::journal::Memory;
use inwit::model::kernels::{KvType, WeightFormat};
use inwit::model::{KvCache, Placement, Source};
use inwit::policy::{Action, DecisionRecord, DecisionSink, Mode};
use inwit::registry::{LibraryFile, ModelIds, Snapshot};
use inwit_probes::{
    Calibration, CalibrationKind, Gather, Head, InputNorm, Kind, Manifest, ModelIdentity,
    NormStatistics, Positions, Probe, RefusalHead, RefusalHeadManifest, SteeringVector,
    VectorManifest,
};

use crate::golden::golden;

/// How an engine is set up where a test says nothing else.
#[derive(Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) model: &'static str,
    pub(crate) weights: WeightFormat,
    pub(crate) kv: KvType,
    pub(crate) budget: usize,
    pub(crate) share: u8,
    pub(crate) max_running: usize,
    pub(crate) max_waiting: usize,
    pub(crate) context: Option<usize>,
    /// Of memory for keys and values.
    pub(crate) kv_blocks: u64,
    pub(crate) capture_bytes: u64,
    pub(crate) threads: usize,
}

pub(crate) const LLAMA: Setup = Setup {
    model: "llama/hf",
    weights: WeightFormat::F32,
    kv: KvType::F32,
    budget: 64,
    share: 100,
    max_running: 32,
    max_waiting: 256,
    context: None,
    kv_blocks: 4096,
    capture_bytes: 1 << 30,
    threads: 1,
};

pub(crate) const GEMMA: Setup = Setup {
    model: "gemma3/hf",
    ..LLAMA
};

pub(crate) const FAMILIES: [Setup; 4] = [
    LLAMA,
    Setup {
        model: "qwen2/hf",
        ..LLAMA
    },
    Setup {
        model: "qwen3/hf",
        ..LLAMA
    },
    GEMMA,
];

/// A running engine with its journal.
pub(crate) struct Rig {
    pub(crate) engine: Engine,
    pub(crate) journal: Arc<Memory>,
}

impl Rig {
    pub(crate) fn start(setup: Setup) -> Self {
        let journal = Arc::new(Memory::new(1024));
        let engine = Self::engine(setup, journal.clone());
        Self { engine, journal }
    }

    /// Like `start`; whoever ends waits for a permit of the gate before its end is told.
    pub(crate) fn gated(setup: Setup) -> (Self, Arc<Gate>) {
        let journal = Arc::new(Memory::new(1024));
        let gate = Arc::new(Gate {
            journal: journal.clone(),
            permits: Mutex::new(0),
            changed: Condvar::new(),
        });
        let engine = Self::engine(setup, gate.clone());
        (Self { engine, journal }, gate)
    }

    pub(crate) fn engine(setup: Setup, sink: Arc<dyn DecisionSink>) -> Engine {
        let source = Source::open(&golden(setup.model)).unwrap();
        let model = Model::load(&source, &Placement::cpu(setup.weights)).unwrap();
        let options = EngineOptions {
            max_running: setup.max_running,
            max_waiting: setup.max_waiting,
            step_token_budget: setup.budget,
            prefill_share: setup.share,
            kv_bytes: setup.kv_blocks * KvCache::block_bytes(model.decoder.config(), setup.kv),
            kv_type: setup.kv,
            threads: setup.threads,
            capture_bytes: setup.capture_bytes,
            context_limit: setup.context,
            journal_key: [7; 32],
        };
        Engine::start(model, options, sink).unwrap().0
    }

    /// A library that fits this engine's model, with nothing in it.
    pub(crate) fn library(&self) -> Library {
        Library {
            ids: self.engine.info().ids(),
            files: Vec::new(),
        }
    }

    pub(crate) fn submit(&self, snapshot: &Arc<Snapshot>, draft: Draft) -> Result<Events> {
        let defaults = Defaults {
            mode: Mode::Off,
            policy: None,
            max_tokens: 8,
            overrides: true,
        };
        self.engine
            .submit(prepare(draft, &self.engine, snapshot, &defaults)?)
    }

    pub(crate) fn run(&self, snapshot: &Arc<Snapshot>, draft: Draft) -> Outcome {
        Outcome::of(self.submit(snapshot, draft).unwrap())
    }

    /// All at once: each is submitted before the first is read.
    pub(crate) fn run_all(
        &self,
        snapshot: &Arc<Snapshot>,
        drafts: impl IntoIterator<Item = Draft>,
    ) -> Vec<Outcome> {
        let events: Vec<Events> = drafts
            .into_iter()
            .map(|draft| self.submit(snapshot, draft).unwrap())
            .collect();
        events.into_iter().map(Outcome::of).collect()
    }

    /// Until nothing runs and nothing waits: an end is told before its step is over.
    pub(crate) fn settle(&self) {
        self.until("all ended", |load| {
            load.running == 0 && load.waiting == 0 && load.kv_blocks_used == 0
        });
    }

    pub(crate) fn until(&self, what: &str, holds: impl Fn(inwit::engine::Load) -> bool) {
        let start = Instant::now();
        while !holds(self.engine.load()) {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "never came: {what}; {:?}",
                self.engine.load()
            );
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    pub(crate) fn record_of(&self, id: &str) -> DecisionRecord {
        let records = self.journal.records();
        let mut of_id = records.into_iter().filter(|r| r.request_id == id);
        let record = of_id.next().expect("the request was recorded");
        assert!(of_id.next().is_none(), "{id} was recorded twice");
        record
    }
}

/// A journal that stops the engine at each end until it is let on: what happens meanwhile
/// happens at a known moment.
pub(crate) struct Gate {
    journal: Arc<Memory>,
    permits: Mutex<u32>,
    changed: Condvar,
}

impl Gate {
    pub(crate) fn let_on(&self, ends: u32) {
        *self.permits.lock().unwrap() += ends;
        self.changed.notify_all();
    }
}

impl DecisionSink for Gate {
    fn record(&self, record: DecisionRecord) {
        self.journal.record(record);
        let permits = self.permits.lock().unwrap();
        let mut permits = self
            .changed
            .wait_while(permits, |permits| *permits == 0)
            .unwrap();
        *permits -= 1;
    }
}

/// What a request came to.
pub(crate) struct Outcome {
    pub(crate) events: Vec<Event>,
    pub(crate) folded: Folded,
    pub(crate) error: Option<Error>,
}

impl Outcome {
    pub(crate) fn of(mut events: Events) -> Self {
        let mut all = Vec::new();
        let mut folded = Folded::default();
        let mut error = None;
        while let Some(event) = events.blocking_next() {
            assert!(
                folded.completed.is_none() && error.is_none(),
                "an event after the end: {event:?}"
            );
            all.push(event.clone());
            error = folded.take(event).err();
        }
        assert!(
            folded.completed.is_some() || error.is_some(),
            "the events ended without an end"
        );
        let later = all.iter().skip(1).any(|e| matches!(e, Event::Started(_)));
        assert!(!later, "started twice");
        if let Some(completed) = &folded.completed {
            let answer = folded.token_ids.len();
            assert_eq!(completed.usage.completion_tokens as usize, answer);
        }
        Self {
            events: all,
            folded,
            error,
        }
    }

    pub(crate) fn completed(&self) -> &Completed {
        let error = &self.error;
        self.folded
            .completed
            .as_ref()
            .unwrap_or_else(|| panic!("failed instead: {error:?}"))
    }

    pub(crate) fn tokens(&self) -> &[u32] {
        &self.folded.token_ids
    }

    pub(crate) fn reason(&self) -> FinishReason {
        self.completed().finish_reason
    }

    pub(crate) fn action(&self) -> Action {
        self.completed().action
    }

    pub(crate) fn cached(&self) -> u32 {
        let started = self.events.iter().find_map(|event| match event {
            Event::Started(started) => Some(started.cached_tokens),
            _ => None,
        });
        started.expect("it started")
    }

    pub(crate) fn verdicts(&self) -> &[Verdict] {
        &self.folded.verdicts
    }

    pub(crate) fn retracts(&self) -> usize {
        let is_retract = |event: &&Event| matches!(event, Event::Retract(_));
        self.events.iter().filter(is_retract).count()
    }

    /// Per-token scores in the order in which they came.
    pub(crate) fn token_scores(&self) -> Vec<Score> {
        let mut scores = Vec::new();
        for event in &self.events {
            if let Event::Delta(delta) = event {
                scores.extend(delta.scores.iter().cloned());
            }
        }
        scores
    }

    /// One probe's logits over the answer, first token first.
    pub(crate) fn logits_of(&self, probe: &str) -> Vec<f32> {
        let scores = self.token_scores().into_iter();
        scores
            .filter(|score| &*score.probe == probe)
            .map(|score| score.logit)
            .collect()
    }

    pub(crate) fn gathered(&self, detector: &str) -> &Score {
        let scores = self.completed().scores.iter();
        let mut of_detector = scores.filter(|score| score.detector.as_deref() == Some(detector));
        of_detector.next().expect("the detector has a value")
    }

    /// Everything that must not depend on the company kept, to the last bit: tokens, text,
    /// log-probabilities, scores per token and gathered, verdicts and the end.
    pub(crate) fn bits(&self) -> Vec<String> {
        let mut lines = vec![
            format!("text {:?}", self.folded.text),
            format!("tokens {:?}", self.folded.token_ids),
            format!("error {:?}", self.error),
        ];
        for logprobs in &self.folded.logprobs {
            let all = logprobs.alternatives.iter().chain([&logprobs.chosen]);
            let all: Vec<_> = all.map(|(id, value)| (*id, value.to_bits())).collect();
            lines.push(format!("logprobs {all:?}"));
        }
        lines.extend(self.token_scores().iter().map(score_bits));
        for verdict in self.verdicts() {
            let (action, rule, shadow) = (verdict.action, &verdict.rule, verdict.shadow);
            lines.push(format!("verdict {action} {rule} {shadow}"));
            lines.extend(verdict.evidence.iter().map(score_bits));
        }
        if let Some(completed) = &self.folded.completed {
            let (usage, reason) = (completed.usage, completed.finish_reason);
            lines.push(format!(
                "end {reason:?} {} {} {} {} {} {}",
                completed.action,
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.withheld_tokens,
                completed.partially_monitored,
                completed.out_of_domain
            ));
            lines.extend(completed.scores.iter().map(score_bits));
        }
        for event in &self.events {
            if let Event::Captured(captured) = event {
                let bits: Vec<u32> = captured.values.iter().map(|v| v.to_bits()).collect();
                let (site, from) = (captured.site, captured.first_position);
                lines.push(format!("captured {site} {from} {bits:?}"));
            }
        }
        lines
    }
}

fn score_bits(score: &Score) -> String {
    format!(
        "score {} {:?} @{} {:08x} {:?} {}",
        score.probe,
        score.detector,
        score.position,
        score.logit.to_bits(),
        score.probability.map(f32::to_bits),
        score.fired
    )
}

/// A library in the making.
#[derive(Clone)]
pub(crate) struct Library {
    ids: ModelIds,
    files: Vec<LibraryFile>,
}

impl Library {
    pub(crate) fn n_layers(&self) -> u16 {
        self.ids.n_layers as u16
    }

    fn identity(&self) -> ModelIdentity {
        ModelIdentity {
            name: "tiny".into(),
            architecture_id: self.ids.architecture_id.clone(),
            weights_id: self.ids.weights_id.clone(),
            weight_format: "f32".into(),
        }
    }

    fn add(mut self, inside: String, bytes: Vec<u8>) -> Self {
        let file = LibraryFile::new(inside.clone(), &inside, || Ok(bytes));
        self.files.extend(file.unwrap());
        self
    }

    /// A logistic probe with weights drawn from `seed`, calibrated for each gather with
    /// `P = sigmoid(logit)`.
    pub(crate) fn probe(
        self,
        name: &str,
        positions: Positions,
        gathers: &[Gather],
        sites: &[Site],
        seed: u64,
    ) -> Self {
        let heads = sites.iter().enumerate().map(|(index, site)| Head {
            site: *site,
            weight: numbers(seed + 1000 * index as u64, self.ids.d_model),
            bias: vec![0.125],
            out: 1,
            norm: match index % 2 {
                0 => InputNorm::None,
                _ => InputNorm::Unit,
            },
        });
        let heads = heads.collect();
        self.add_probe(name, Kind::Logistic, positions, gathers, heads)
    }

    /// A logistic probe with the given weights and bias on one site.
    pub(crate) fn biased_probe(
        self,
        name: &str,
        positions: Positions,
        gathers: &[Gather],
        site: Site,
        (weight, bias): (Vec<f32>, f32),
    ) -> Self {
        let head = Head {
            site,
            weight,
            bias: vec![bias],
            out: 1,
            norm: InputNorm::None,
        };
        self.add_probe(name, Kind::Logistic, positions, gathers, vec![head])
    }

    /// An attention-gathered probe over the prompt's content, with three attention heads.
    pub(crate) fn attention_probe(self, name: &str, site: Site, seed: u64) -> Self {
        let out = 2 * 3;
        let head = Head {
            site,
            weight: numbers(seed, out * self.ids.d_model),
            bias: vec![0.0; out],
            out,
            norm: InputNorm::None,
        };
        let content = Positions::PromptContent;
        self.add_probe(
            name,
            Kind::Attention,
            content,
            &[Gather::Attention],
            vec![head],
        )
    }

    fn add_probe(
        self,
        name: &str,
        kind: Kind,
        positions: Positions,
        gathers: &[Gather],
        heads: Vec<Head>,
    ) -> Self {
        let mut manifest = Manifest::new(name, kind, self.ids.d_model, positions, self.identity());
        manifest.gathers = gathers.to_vec();
        manifest.calibrations = gathers.iter().map(|gather| calibration(*gather)).collect();
        let probe = Probe::new(manifest, heads, None).unwrap();
        self.add(
            format!("probes/{name}.safetensors"),
            probe.to_bytes().unwrap(),
        )
    }

    pub(crate) fn vector(self, name: &str, site: Site, seed: u64) -> Self {
        let norms = NormStatistics {
            mean: 1.0,
            std: 0.1,
            rows: 10,
        };
        let width = self.ids.d_model;
        let manifest = VectorManifest::new(name, site, width, norms, self.identity());
        let values = match name {
            "overflow" => vec![3e38; width],
            _ => numbers(seed, width),
        };
        let vector = SteeringVector::new(manifest, values).unwrap();
        self.add(
            format!("vectors/{name}.safetensors"),
            vector.to_bytes().unwrap(),
        )
    }

    /// A refusal head of rank 2 that moves the logits a good deal.
    pub(crate) fn head(self, name: &str, seed: u64) -> Self {
        let a = numbers(seed, 2 * self.ids.vocab);
        let b = numbers(seed + 1, 2 * self.ids.d_model);
        self.head_of(name, 2, a, b)
    }

    /// `a` `[vocab, rank]`, `b` `[rank, d_model]`.
    pub(crate) fn head_of(self, name: &str, rank: usize, a: Vec<f32>, b: Vec<f32>) -> Self {
        let (width, vocab) = (self.ids.d_model, self.ids.vocab);
        let manifest = RefusalHeadManifest::new(name, rank, width, vocab, self.identity());
        let head = RefusalHead::new(manifest, a, b).unwrap();
        self.add(
            format!("heads/{name}.safetensors"),
            head.to_bytes().unwrap(),
        )
    }

    pub(crate) fn policy(self, name: &str, document: &str) -> Self {
        self.add(
            format!("policies/{name}.toml"),
            document.as_bytes().to_vec(),
        )
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        let snapshot = Snapshot::from_files(&self.files, &self.ids, Some("empty"));
        Arc::new(snapshot.unwrap())
    }

    /// Probes at all kinds of positions and sites, vectors, a head, and a policy for each action.
    /// Detectors with the prefix `sure-` fire whatever they read, `never-` never.
    pub(crate) fn complete(self) -> Self {
        let last = self.n_layers() - 1;
        let last_site = Site::ResidPost(last);
        self.probe(
            "prompt_end",
            Positions::LastPromptToken,
            &[Gather::Last],
            &[Site::ResidMid(1), Site::AttnOut(0)],
            11,
        )
        .probe(
            "content",
            Positions::PromptContent,
            &[Gather::Max, Gather::Mean],
            &[Site::MlpOut(0)],
            12,
        )
        .attention_probe("attends", Site::ResidPost(0), 13)
        .probe(
            "third",
            Positions::Generated(3),
            &[Gather::Last],
            &[last_site],
            14,
        )
        .probe(
            "writing",
            Positions::EveryGenerated,
            &[Gather::Ema { a: 0.25 }, Gather::Max, Gather::Last],
            &[Site::FinalNorm],
            15,
        )
        .probe(
            "early",
            Positions::EveryGenerated,
            &[Gather::Max],
            &[Site::Embed],
            16,
        )
        .vector("push", Site::ResidPost(0), 21)
        .vector("late", last_site, 22)
        .head("refusing", 31)
        .policy("watch", &document("never", "flag", 0))
        .policy("flags", &document("sure", "\"flag\"", 0))
        .policy("refuses", &document("sure", REFUSE, 0))
        .policy("refuses-late", &late_document(REFUSE))
        .policy("head", &document("sure", "\"refusal_head\"", 2))
        .policy("head-late", &late_document("\"refusal_head\""))
        .policy("steers", &document("sure", STEER, 0))
        .policy("steers-late", &late_document(STEER))
        .policy("aborts", &document("sure", "\"abort\"", 0))
    }
}

pub(crate) const REFUSAL: &str = "I will not, não.";
const REFUSE: &str = "{ refuse = \"I will not, não.\" }";
const STEER: &str = "{ steer = { vector = \"push\", strength = 3.0 } }";

/// All probes read; one rule on the last prompt token, which surely or never fires.
fn document(when: &str, action: &str, hold_back: u32) -> String {
    let action = if action.starts_with(['"', '{']) {
        action.to_owned()
    } else {
        format!("\"{action}\"")
    };
    let threshold = if when == "sure" { "-1e30" } else { "1e30" };
    format!(
        "{}[[detector]]\nname = \"{when}-end\"\nprobe = \"prompt_end\"\n\
         threshold_logit = {threshold}\n[[rule]]\nname = \"r\"\n\
         when = {{ detector = \"{when}-end\" }}\naction = {action}\nhold_back = {hold_back}\n",
        readers()
    )
}

/// One rule on generated token 3, which surely fires.
fn late_document(action: &str) -> String {
    format!(
        "{}[[detector]]\nname = \"sure-third\"\nprobe = \"third\"\nthreshold_logit = -1e30\n\
         [[rule]]\nname = \"r\"\nwhen = {{ detector = \"sure-third\" }}\naction = {action}\n\
         hold_back = 1\n",
        readers()
    )
}

/// A detector for each pair of probe and gather.
fn readers() -> String {
    let pairs = [
        ("content", "max"),
        ("content", "mean"),
        ("attends", "attention"),
        ("writing", "ema"),
        ("writing", "max"),
        ("early", "max"),
    ];
    let reader = |(probe, gather): &(&str, &str)| {
        format!(
            "[[detector]]\nname = \"{probe}-{gather}\"\nprobe = \"{probe}\"\n\
             gather = \"{gather}\"\nthreshold_logit = 1e30\n"
        )
    };
    pairs.iter().map(reader).collect()
}

fn calibration(gather: Gather) -> Calibration {
    Calibration {
        gather,
        kind: CalibrationKind::Platt { a: 1.0, b: 0.0 },
        prior: 0.5,
        thresholds: Vec::new(),
        n_benign: 100,
        n_harmful: 100,
    }
}

/// Numbers in (-1, 1) that depend on nothing but the seed (splitmix64).
pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let number = |index: u64| {
        let mut z = (seed << 32 | index)
            .wrapping_add(1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bits = (z ^ (z >> 31)) >> 40;
        bits as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count as u64).map(number).collect()
}

/// A prompt of ordinary tokens: the same seed gives the same tokens at every length.
pub(crate) fn prompt(seed: u64, length: usize) -> Vec<u32> {
    let token = |number: f32| 40 + ((number + 1.0) * 200.0) as u32;
    numbers(seed, length).into_iter().map(token).collect()
}

/// Greedy, with log-probabilities, unmonitored.
pub(crate) fn draft(tokens: Vec<u32>) -> Draft {
    Draft {
        sampling: SamplingDraft {
            max_tokens: Some(10),
            logprobs: Some(2),
            seed: Some(0),
            ..SamplingDraft::default()
        },
        monitor: MonitorDraft {
            mode: Some(Mode::Off),
            ..MonitorDraft::default()
        },
        ..Draft::of(PromptDraft::Tokens(tokens))
    }
}

/// The ways in which tests write drafts.
pub(crate) trait Written {
    fn monitored(self, mode: Mode, policy: &str) -> Self;
    fn steered(self, intervention: InterventionDraft) -> Self;
    fn uncached(self) -> Self;
    fn most(self, max_tokens: u32) -> Self;
    fn named(self, id: &str) -> Self;
}

impl Written for Draft {
    fn monitored(mut self, mode: Mode, policy: &str) -> Self {
        self.monitor = MonitorDraft {
            mode: Some(mode),
            policy: Some(policy.into()),
            return_scores: true,
            hold_back: None,
        };
        self
    }

    fn steered(mut self, intervention: InterventionDraft) -> Self {
        self.interventions.push(intervention);
        self
    }

    fn uncached(mut self) -> Self {
        self.skip_prefix_cache = true;
        self
    }

    fn most(mut self, max_tokens: u32) -> Self {
        self.sampling.max_tokens = Some(max_tokens);
        self
    }

    fn named(mut self, id: &str) -> Self {
        self.id = Some(id.into());
        self
    }
}

/// An intervention with the library's vector `push`.
pub(crate) fn push(
    kind: InterventionKindDraft,
    strength: Option<f32>,
    positions: PositionSelection,
) -> InterventionDraft {
    InterventionDraft {
        vector: VectorDraft::Named("push".into()),
        site: None,
        kind,
        strength,
        positions,
        condition: None,
    }
}

pub(crate) fn add(strength: f32, positions: PositionSelection) -> InterventionDraft {
    push(InterventionKindDraft::Add, Some(strength), positions)
}
