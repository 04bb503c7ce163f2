//! Requests in, events out.

pub mod release;
pub mod sampler;
