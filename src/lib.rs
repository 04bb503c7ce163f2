//! Inwit: an inference server that watches its own activations while it generates, and acts on what it sees.

pub mod engine;
pub mod error;
pub mod hooks;
pub mod model;
