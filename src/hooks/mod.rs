//! What to read and change in a forward pass, row by row.
//! Knows sites, vectors and probes; knows no requests, no policies and no model families.
//!
//! At every site the order is: steer, then score, then capture. What is read is what flows on.

mod plan;
mod run;
mod stack;

pub use inwit_probes::Site;
pub use plan::{HookPlan, INTERVENTION_LIMIT, InterventionKind, RowCondition};
pub use run::{Captured, HookRun, Scores};
pub use stack::ProbeStack;
