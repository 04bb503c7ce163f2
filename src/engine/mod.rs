//! Requests in, events out.

pub mod event;
pub mod fold;
pub mod request;
