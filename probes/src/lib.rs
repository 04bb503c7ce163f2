//! Probes: their mathematics, their calibration and their files.
//! Knows no tensor library, no network and no model; hidden states come in as slices.
//!
//! | module | what it holds |
//! |---|---|
//! | `site` | the places of a forward pass and their names |
//! | `probe` | heads, how they combine, and one row's output |
//! | `gather` | per-token logits to one number for the request so far |
//! | `calibration` | that number to a probability and to thresholds |
//! | `manifest` | what a probe file says about itself |
//! | `file`, `vector`, `refusal_head` | probes, steering vectors and refusal heads as files |
//! | `container` | reading such files without trusting them |
//! | `fit` | probes and calibrations from activations |
//! | `metrics` | how good scores are, with intervals |
//! | `library` | where the artefacts of a model lie |
//! | `error` | what can go wrong |

// A test that unwraps says what it expects by failing.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod calibration;
mod container;
pub mod error;
pub mod file;
pub mod fit;
pub mod gather;
pub mod library;
pub mod manifest;
pub mod metrics;
pub mod probe;
pub mod refusal_head;
pub mod site;
#[cfg(test)]
mod testing;
pub mod vector;

pub use calibration::{Calibration, CalibrationKind, OperatingPoint};
pub use container::MAX_FILE_BYTES;
pub use error::{Error, Result, ScoreFailure};
pub use gather::{AttentionHeads, Gather, GatherChoice, GatherState, TokenOutput};
pub use manifest::{
    Canary, CanaryFailure, Combine, DataRecord, HeadSpec, Kind, Manifest, Metric, ModelIdentity,
    NormKind, Positions, Record, SystemPromptRule, TrainedOn, Verification,
};
pub use probe::{Finisher, FoldedHead, Head, InputNorm, Probe, TwoLayer};
pub use refusal_head::{RefusalHead, RefusalHeadManifest};
pub use site::Site;
pub use vector::{NormStatistics, SteeringVector, VectorManifest};
