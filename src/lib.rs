//! Inwit: an inference server that watches its own activations while it generates, and acts on what it sees.

pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
pub mod hooks;
pub mod journal;
pub mod lab;
pub mod metrics;
pub mod model;
pub mod policy;
pub mod registry;
pub mod rpc;
