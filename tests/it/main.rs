//! The integration tests: one binary.
#![allow(clippy::unwrap_used)]

mod golden;
mod wire_bad_requests;
mod wire_support;
mod wire_generation;
mod wire_held_back;
