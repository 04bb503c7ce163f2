//! The integration tests: one binary.
#![allow(clippy::unwrap_used)]

mod golden;
mod wire;
mod wire_bad_requests;
mod wire_generation;
mod wire_held_back;
mod wire_limits;
mod wire_support;
