//! The integration tests: one binary.
#![allow(clippy::unwrap_used)]

mod cache;
mod golden;
mod hold_back;
mod interventions;
mod isolation;
mod stages;
mod support;
