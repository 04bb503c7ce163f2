//! Weights to hidden states to logits.
//! Knows files, tensors, tokens and templates; knows nothing of requests, policies or the wire.

pub mod config;
pub mod kernels;
pub mod pull;
pub mod source;
pub mod template;
pub mod tokenizer;

pub use config::{Activation, Family, ModelConfig, Rope};
pub use source::{Identity, Source, StoredType};
pub use template::{ChatTemplate, Message, RenderedPrompt};
pub use tokenizer::{SpecialText, Tokenizer};
