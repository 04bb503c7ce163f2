//! What the engine tells about a request, in order: one `Started`, then anything, then one end.
//! Knows nothing of wire formats.

use std::sync::Arc;
use std::time::Duration;

use inwit_probes::Site;

use super::sampler::TokenLogprobs;
use crate::error::Error;
use crate::policy::Action;

#[derive(Clone, Debug)]
pub enum Event {
    Started(Started),
    Delta(Delta),
    Verdict(Verdict),
    Retract(Retract),
    Captured(Captured),
    /// Every end that the model, the policy or a monitor made. Nothing follows.
    Completed(Box<Completed>),
    /// Transport, engine and deadline. Nothing follows.
    Failed(Error),
}

#[derive(Clone, Debug)]
pub struct Started {
    pub policy_revision: u64,
    pub cached_tokens: u32,
}

/// Tokens that leave, with the text they add.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    pub text: String,
    pub token_ids: Vec<u32>,
    /// Per token; only with `return_scores`.
    pub scores: Vec<Score>,
    pub logprobs: Vec<TokenLogprobs>,
}

#[derive(Clone, Debug)]
pub struct Verdict {
    pub action: Action,
    pub rule: String,
    /// Decided and recorded, not acted upon.
    pub shadow: bool,
    /// Only with `return_scores`.
    pub evidence: Vec<Score>,
}

/// Withdraws what was released after `keep_token_count` tokens and puts `replacement` in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Retract {
    pub keep_token_count: u32,
    pub keep_text_bytes: u32,
    pub replacement_text: String,
    pub replacement_token_ids: Vec<u32>,
}

/// Hidden states of consecutive positions at one site.
#[derive(Clone, Debug)]
pub struct Captured {
    pub site: Site,
    pub first_position: u32,
    /// Token ids of the rows.
    pub tokens: Vec<u32>,
    /// `[tokens.len(), d_model]`, row-major.
    pub values: Vec<f32>,
}

/// One score: a probe at one token, or a detector over the request so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    pub probe: Arc<str>,
    pub probe_revision: u64,
    pub sites: Vec<Site>,
    /// Set when the score is gathered.
    pub detector: Option<Arc<str>>,
    pub position: u32,
    pub logit: f32,
    /// P(positive | request so far); only when gathered and calibrated.
    pub probability: Option<f32>,
    /// On the gathered logit.
    pub threshold: Option<f32>,
    pub fired: bool,
    pub out_of_domain: bool,
}

#[derive(Clone, Debug)]
pub struct Completed {
    pub finish_reason: FinishReason,
    pub action: Action,
    pub usage: Usage,
    /// One gathered score per detector and per probe without one. Always filled when monitored;
    /// the edge drops them without `return_scores`.
    pub scores: Vec<Score>,
    pub out_of_domain: bool,
    /// A probe failed under a rule that does not enforce.
    pub partially_monitored: bool,
    pub timings: Timings,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    Stop,
    StopSequence,
    Length,
    RefusedByPolicy,
    MonitorFailed,
}

impl FinishReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::StopSequence => "stop_sequence",
            Self::Length => "length",
            Self::RefusedByPolicy => "refused_by_policy",
            Self::MonitorFailed => "monitor_failed",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    pub cached_tokens: u32,
    /// Decoded and never part of the answer; not in `completion_tokens`.
    pub withheld_tokens: u32,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    pub queued: Duration,
    pub to_first_token: Option<Duration>,
    pub total: Duration,
}
