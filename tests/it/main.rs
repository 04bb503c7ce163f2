//! The integration tests: one binary.
#![allow(clippy::unwrap_used)]

mod accounting;
mod answers;
mod bad_files;
mod cache;
mod connections;
mod default_model;
mod evaluating;
mod failures;
mod fitting;
mod golden;
mod hold_back;
mod interrupt;
mod interventions;
mod isolation;
mod laboratory;
mod measuring;
mod serving;
mod stages;
mod support;
mod wire;
mod wire_bad_requests;
mod wire_generation;
mod wire_held_back;
mod wire_limits;
mod wire_support;
