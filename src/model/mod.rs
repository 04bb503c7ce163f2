//! Weights to hidden states to logits. Knows nothing of requests.

pub mod kernels;
