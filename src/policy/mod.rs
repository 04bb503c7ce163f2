//! Decides: probe outputs in, actions out.
//! Pure: knows no tensors, channels, clocks or modes; the engine acts on what is decided here, or only records it.
//!
//! A policy document (`document`) is compiled against the loaded probes, vectors and heads
//! (`compile`); a `PolicyState` per sequence (`state`) takes what the probes say, pass by pass, and
//! decides after each; a `DecisionRecord` (`record`) holds what it takes to decide the same again.

mod compile;
mod document;
mod record;
mod state;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use inwit_probes::{Calibration, Gather, Positions, Site};
use serde::{Deserialize, Serialize};

pub use compile::{Catalog, MAX_HOLD_BACK, MAX_STRENGTH};
pub use document::{DEFAULT_THRESHOLD, MAX_DOCUMENT_BYTES};
pub use record::{
    ActionTaken, DecisionRecord, DecisionSink, DecisionStep, InterventionRecord, Outcome,
    PolicyIdentity, ProbeIdentity, PromptRecord, SamplingRecord, StepLog, TimingsRecord,
    TokenCounts, replay,
};
pub use state::{Decision, DetectorState, Failed, Fired, PolicyState, Reading};

use crate::error::Error;

/// What is done about a request, from the mildest to the most severe.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    #[default]
    Allow,
    Flag,
    Steer,
    RefusalHead,
    Refuse,
    Abort,
}

impl Action {
    pub const ALL: [Self; 6] = [
        Self::Allow,
        Self::Flag,
        Self::Steer,
        Self::RefusalHead,
        Self::Refuse,
        Self::Abort,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Flag => "flag",
            Self::Steer => "steer",
            Self::RefusalHead => "refusal_head",
            Self::Refuse => "refuse",
            Self::Abort => "abort",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Action {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        one_of("action", text, Self::ALL, Self::as_str)
    }
}

/// Whether the engine acts on what the policy decides. No input of a decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Nothing is scored.
    Off,
    /// Decide and record, never act.
    #[default]
    Shadow,
    Enforce,
}

impl Mode {
    pub const ALL: [Self; 3] = [Self::Off, Self::Shadow, Self::Enforce];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Shadow => "shadow",
            Self::Enforce => "enforce",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        one_of("mode", text, Self::ALL, Self::as_str)
    }
}

fn one_of<T: Copy, const N: usize>(
    field: &str,
    text: &str,
    all: [T; N],
    name: impl Fn(T) -> &'static str,
) -> Result<T, Error> {
    all.into_iter()
        .find(|candidate| name(*candidate) == text)
        .ok_or_else(|| {
            let shown: String = text.chars().take(80).collect();
            let expected = all.map(&name).join(", ");
            Error::invalid(
                field,
                format!("unknown {field} {shown:?}; expected one of {expected}"),
            )
        })
}

/// Detectors and rules, compiled: every name is an index into one snapshot.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub name: String,
    pub revision: u64,
    /// SHA-256 of the document, in hexadecimal.
    pub hash: String,
    /// The TOML it was compiled from.
    pub document: String,
    pub detectors: Vec<Detector>,
    pub rules: Vec<Rule>,
    pub out_of_domain: OutOfDomain,
}

/// What becomes of a request outside the domain that a probe was trained on.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum OutOfDomain {
    #[default]
    Serve,
    Refuse {
        text: String,
    },
}

/// A probe, a gather, a calibration and a threshold.
#[derive(Clone, Debug, PartialEq)]
pub struct Detector {
    pub name: Arc<str>,
    /// Index into the snapshot's probes.
    pub probe: usize,
    pub probe_name: Arc<str>,
    pub gather: Gather,
    pub positions: Positions,
    pub calibration: Calibration,
    /// The detector fires when the gathered logit is above, strictly.
    pub threshold_logit: f32,
}

impl Detector {
    /// Whether a gathered logit makes it fire.
    fn is_above(&self, logit: f32) -> bool {
        logit > self.threshold_logit
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub name: Arc<str>,
    pub when: When,
    pub action: RuleAction,
    /// Tokens decided but not released while this rule can still fire.
    pub hold_back: u32,
    pub on_failure: OnFailure,
}

/// Indices are of the policy's detectors, each at most once, at least one.
#[derive(Clone, Debug, PartialEq)]
pub enum When {
    /// Its gathered logit is above its threshold.
    Detector(usize),
    /// The product of the calibrated probabilities is above `threshold`: SafeSwitch's score
    /// (arXiv 2502.01042), which is no probability, as the stages depend on each other.
    Product {
        detectors: Vec<usize>,
        threshold: f32,
    },
    /// Each is above its own threshold.
    All(Vec<usize>),
}

impl When {
    pub fn detectors(&self) -> &[usize] {
        match self {
            Self::Detector(detector) => std::slice::from_ref(detector),
            Self::Product { detectors, .. } | Self::All(detectors) => detectors,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum RuleAction {
    Flag,
    Steer {
        /// A vector of the snapshot.
        vector: String,
        site: Site,
        kind: SteerKind,
        positions: SteerPositions,
    },
    RefusalHead {
        /// A head of the snapshot.
        head: String,
        strength: f32,
    },
    Refuse {
        text: String,
    },
    Abort,
}

impl RuleAction {
    pub fn action(&self) -> Action {
        match self {
            Self::Flag => Action::Flag,
            Self::Steer { .. } => Action::Steer,
            Self::RefusalHead { .. } => Action::RefusalHead,
            Self::Refuse { .. } => Action::Refuse,
            Self::Abort => Action::Abort,
        }
    }
}

/// What steering does to a hidden state `h`; `v` is the vector.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SteerKind {
    /// `h += strength * v`
    Add { strength: f32 },
    /// `h -= (h.v) v`
    ProjectOut,
    /// `h += (bound - h.v) v` where `h.v > bound`
    ClampAbove { bound: f32 },
    /// `h += (bound - h.v) v` where `h.v < bound`
    ClampBelow { bound: f32 },
}

/// Which rows a steer rule changes. A rewind keeps all prompt positions but the last, so no rule
/// reaches further back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SteerPositions {
    LastPromptToken,
    Generated,
    /// The last prompt token and every generated one.
    #[default]
    LastPromptTokenAndGenerated,
}

/// What an enforcing rule does when a probe that it needs has failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// The request ends: MONITOR_FAILED.
    #[default]
    Closed,
    /// The request goes on, marked as partially monitored.
    Open,
}

impl Policy {
    /// The policy of a model that no probe fits: it reads nothing and allows everything.
    pub fn empty() -> Self {
        Self {
            name: "empty".into(),
            revision: 0,
            hash: compile::hash_of(""),
            document: String::new(),
            detectors: Vec::new(),
            rules: Vec::new(),
            out_of_domain: OutOfDomain::Serve,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.detectors.is_empty() && self.rules.is_empty()
    }

    /// The text that stands in place of the answer to a request that these probes were not
    /// trained on, where this policy reads one of them, or reads none at all and leaves it to any.
    pub fn refuses_out_of_domain(&self, probes: &[&str]) -> Option<&str> {
        let reads = |probe: &&str| self.detectors.iter().any(|d| *d.probe_name == **probe);
        let concerned = match self.detectors.is_empty() {
            true => !probes.is_empty(),
            false => probes.iter().any(reads),
        };
        match &self.out_of_domain {
            OutOfDomain::Refuse { text } => concerned.then_some(text),
            OutOfDomain::Serve => None,
        }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use inwit_probes::{
        Calibration, CalibrationKind, Gather, Kind, Manifest, ModelIdentity, OperatingPoint,
        Positions,
    };

    use super::{Catalog, Policy};

    pub(crate) const HARM: usize = 0;
    pub(crate) const COMPLIES: usize = 1;
    pub(crate) const WRITING: usize = 2;
    pub(crate) const CONTENT: usize = 3;

    /// `P = sigmoid(logit)`.
    pub(crate) fn calibration(gather: Gather, thresholds: Vec<OperatingPoint>) -> Calibration {
        Calibration {
            gather,
            kind: CalibrationKind::Platt { a: 1.0, b: 0.0 },
            prior: 0.5,
            thresholds,
            n_benign: 100,
            n_harmful: 100,
        }
    }

    pub(crate) fn point(fpr: f64, answer_tokens: Option<u32>, logit: f32) -> OperatingPoint {
        OperatingPoint {
            fpr,
            answer_tokens,
            threshold_logit: logit,
            interval: [0.0, 0.1],
            n: 100,
        }
    }

    pub(crate) fn manifest(
        name: &str,
        positions: Positions,
        calibrations: Vec<Calibration>,
    ) -> Manifest {
        let identity = ModelIdentity {
            name: "tiny".into(),
            architecture_id: "a".into(),
            weights_id: "w".into(),
            weight_format: "f32".into(),
        };
        let attends = calibrations.iter().any(|c| c.gather == Gather::Attention);
        let kind = if attends {
            Kind::Attention
        } else {
            Kind::Logistic
        };
        let mut manifest = Manifest::new(name, kind, 4, positions, identity);
        manifest.gathers = calibrations.iter().map(|c| c.gather).collect();
        manifest.calibrations = calibrations;
        manifest
    }

    /// `HARM`, `COMPLIES`, `WRITING` and `CONTENT`, in this order.
    pub(crate) fn manifests() -> [Manifest; 4] {
        let last = || calibration(Gather::Last, vec![point(0.01, None, 2.0)]);
        let lengths = vec![
            point(0.001, Some(64), 3.0),
            point(0.001, Some(1024), 5.0),
            point(0.001, Some(256), 4.0),
        ];
        [
            manifest("prompt_harm", Positions::LastPromptToken, vec![last()]),
            manifest("compliance", Positions::Generated(3), vec![last()]),
            manifest(
                "response_harm",
                Positions::EveryGenerated,
                vec![
                    calibration(Gather::Max, lengths.clone()),
                    calibration(Gather::Ema { a: 0.1 }, lengths),
                ],
            ),
            manifest(
                "content_harm",
                Positions::PromptContent,
                vec![
                    calibration(Gather::Max, vec![]),
                    calibration(Gather::KOfN { k: 2, n: 4 }, vec![]),
                ],
            ),
        ]
    }

    pub(crate) fn catalog(manifests: &[Manifest]) -> Catalog<'_> {
        Catalog {
            probes: manifests.iter().collect(),
            vectors: [("refusal", inwit_probes::Site::ResidPost(3))].into(),
            heads: ["soft"].into(),
            n_layers: 6,
        }
    }

    /// A policy over four detectors `harm`, `complies`, `writing` and `content`, each with its
    /// default threshold (probability 0.5, logit 0), and these rules.
    pub(crate) fn policy(rules: &str) -> Policy {
        let document = format!(
            "[[detector]]\nname = \"harm\"\nprobe = \"prompt_harm\"\n\
             [[detector]]\nname = \"complies\"\nprobe = \"compliance\"\n\
             [[detector]]\nname = \"writing\"\nprobe = \"response_harm\"\n\
             [[detector]]\nname = \"content\"\nprobe = \"content_harm\"\n{rules}"
        );
        Policy::parse_and_compile("test", 1, &document, &catalog(&manifests()))
            .expect("the rules of a test compile")
    }

    #[test]
    fn actions_and_modes_round_trip_through_their_names() {
        use super::{Action, Mode};
        for action in Action::ALL {
            assert_eq!(action.to_string().parse(), Ok(action));
            let json = serde_json::to_string(&action).unwrap();
            assert_eq!(json, format!("\"{action}\""));
        }
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        let message = "block".parse::<Action>().unwrap_err().to_string();
        assert!(message.contains("refusal_head"), "{message}");
    }

    #[test]
    fn severity_rises_from_allow_to_abort() {
        assert!(super::Action::ALL.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
