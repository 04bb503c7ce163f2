//! What the engine is asked to do: checked, tokenised, every name resolved.
//! Knows nothing of wire formats; `prepare.rs` makes one from what a caller wrote.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use inwit_probes::Site;
use sha2::{Digest, Sha256};

use super::sampler::Sampling;
pub use crate::hooks::InterventionKind;
use crate::policy::{Mode, Policy};
pub use crate::registry::PromptForm;
use crate::registry::{Head, Snapshot};

/// A request as the engine takes it. Holding one is the proof that its fields are in range.
#[derive(Clone)]
pub struct Request {
    pub id: String,
    pub prompt: Prompt,
    pub work: Work,
    pub sampling: Sampling,
    pub monitor: Monitor,
    /// Applied in this order, row by row.
    pub interventions: Vec<Intervention>,
    pub capture: Option<CaptureWish>,
    /// A refusal head asked for by the caller, for every generated token.
    pub refusal_head: Option<Arc<Head>>,
    pub use_prefix_cache: bool,
    pub deadline: Option<Instant>,
}

#[derive(Clone, Debug)]
pub struct Prompt {
    pub tokens: Vec<u32>,
    /// The content tokens of the last user turn and the template's tail: `content.end == tokens.len()`.
    pub content: Range<usize>,
    pub form: PromptForm,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    Generate,
    /// Prefill only; `answer` are the tokens of a finished answer, scored as generated ones.
    Score {
        answer: Vec<u32>,
    },
}

/// What the monitor does for this request. The snapshot is pinned here, at admission.
#[derive(Clone)]
pub struct Monitor {
    pub mode: Mode,
    pub snapshot: Arc<Snapshot>,
    pub policy: Arc<Policy>,
    pub return_scores: bool,
    /// Raises, never lowers, what the policy holds back, in tokens.
    pub hold_back: u32,
}

/// A change to the hidden states of this request's rows.
#[derive(Clone, Debug)]
pub struct Intervention {
    pub name: String,
    pub site: Site,
    pub kind: InterventionKind,
    /// `[d_model]`; of unit length for `ProjectOut` and the clamps.
    pub vector: Arc<[f32]>,
    pub positions: PositionSelection,
    pub condition: Option<Condition>,
}

/// Holds where the probe's logit for this row, read at earlier sites of the same pass, is above.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// Index into the snapshot's probes.
    pub probe: usize,
    pub above: f32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionSelection {
    LastPromptToken,
    AllPrompt,
    Generated,
    All,
    /// The last prompt token and every generated one: what a rewind can still change.
    FromLastPromptToken,
}

impl PositionSelection {
    /// Whether the token at `position` is selected in a request of `prompt_len` prompt tokens.
    pub fn contains(self, position: usize, prompt_len: usize) -> bool {
        match self {
            Self::LastPromptToken => position + 1 == prompt_len,
            Self::AllPrompt => position < prompt_len,
            Self::Generated => position >= prompt_len,
            Self::All => true,
            Self::FromLastPromptToken => position + 1 >= prompt_len,
        }
    }
}

#[derive(Clone, Debug)]
pub struct CaptureWish {
    pub sites: Vec<Site>,
    pub positions: PositionSelection,
}

impl Intervention {
    /// Names everything that the intervention does to a row: site, kind, numbers and condition.
    pub(super) fn content_hash(&self, snapshot: &Snapshot) -> [u8; 32] {
        let mut hasher = Sha256::new();
        hasher.update(self.site.to_string());
        let (kind, number) = match self.kind {
            InterventionKind::Add { strength } => (0u8, strength),
            InterventionKind::ProjectOut => (1, 0.0),
            InterventionKind::ClampAbove { bound } => (2, bound),
            InterventionKind::ClampBelow { bound } => (3, bound),
        };
        hasher.update([kind]);
        hasher.update(number.to_le_bytes());
        for value in self.vector.iter() {
            hasher.update(value.to_le_bytes());
        }
        if let Some(condition) = &self.condition {
            hasher.update(condition.above.to_le_bytes());
            if let Some(probe) = snapshot.probes.get(condition.probe) {
                hasher.update(&probe.content_hash);
            }
        }
        hasher.finalize().into()
    }
}
