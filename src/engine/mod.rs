//! Requests in, events out.

mod blocks;
pub mod event;
pub mod fold;
pub mod handle;
pub mod prepare;
mod readout;
mod record;
pub mod release;
pub mod request;
pub mod sampler;
mod scheduler;
mod sequence;
mod step;

pub use event::Event;
pub use handle::{
    CaptureLease, Engine, EngineOptions, EngineThread, Events, Load, Model, ModelInfo,
};
pub use prepare::{
    CaptureDraft, ConditionDraft, Defaults, Draft, InterventionDraft, InterventionKindDraft,
    MonitorDraft, PromptDraft, VectorDraft, prepare,
};
pub use request::{PositionSelection, Request};
pub use scheduler::{Pace, Pending};
pub(crate) use sequence::fetch_policy;
