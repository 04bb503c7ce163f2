//! Inwit: an inference server that watches its own activations while it generates, and acts on what it sees.
//!
//! | module | what it does |
//! |---|---|
//! | `cli` | one file per command: arguments in, library calls out |
//! | `rpc` | the contract over gRPC; the only code that knows tonic |
//! | `lab` | offline work on an engine: answer, score, capture, fit |
//! | `engine` | requests in, events out: handle, step loop, scheduler, sequence, sampler, release |
//! | `journal` | where finished decisions go |
//! | `registry` | the loaded probes, vectors, heads and policies: one immutable snapshot, swapped whole |
//! | `policy` | pure: scores, state and rules to an action |
//! | `model` | weights to hidden states to logits; knows nothing of requests |
//! | `hooks` | what to read and change in a forward pass, row by row |
//! | `config` | flags, environment and file to a checked `Config` |
//! | `metrics` | every metric: its name, its help, one function per event |
//! | `files` | reads files that somebody else wrote, up to a cap |
//! | `error` | one variant per party who must act |
//!
//! Arrows, invariants and the life of a token are in `docs/architecture.md`.

pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
pub mod files;
pub mod hooks;
pub mod journal;
pub mod lab;
pub mod metrics;
pub mod model;
pub mod policy;
pub mod registry;
pub mod rpc;
