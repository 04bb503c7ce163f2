//! Requests in, events out.

pub mod event;
pub mod fold;
pub mod release;
pub mod request;
pub mod sampler;
