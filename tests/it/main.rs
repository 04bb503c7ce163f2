//! The integration tests: one binary.
#![allow(clippy::unwrap_used)]

mod golden;
mod wire;
