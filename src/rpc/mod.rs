//! The public contract over gRPC: the only code that knows tonic and the generated types.
//! Knows no model and makes no decision; it parses once, hands on, and spells out what comes back.
//!
//! | module | what it does |
//! |---|---|
//! | `server`, `http` | the listeners, health, drain |
//! | `door` | how many connections, and for how long in silence |
//! | `generation`, `activation`, `probe` | one service each |
//! | `call`, `running` | one call: its id, its deadline, its events |
//! | `convert`, `tensor` | what callers send, checked |
//! | `reply` | what callers get |
//! | `status` | errors to statuses |
//! | `observe`, `codec` | counting calls, reading bytes |

mod activation;
mod call;
pub mod client;
pub mod codec;
mod convert;
mod door;
mod generation;
pub mod http;
pub mod load_client;
mod observe;
mod probe;
mod reply;
mod running;
pub mod server;
mod status;
mod tensor;

pub use server::{Served, serve};
pub use status::{DOMAIN, REQUEST_ID};

/// The messages and services of `proto/inwit/v1`, clients included.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used,
    rustdoc::all
)]
pub mod proto {
    tonic::include_proto!("inwit.v1");
}

/// The descriptors of `proto/inwit/v1` and what it imports, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/inwit_descriptor.bin"));
