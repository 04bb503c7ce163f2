//! Weights to hidden states to logits.
//! Knows files, tensors, tokens and templates; knows nothing of requests, policies or the wire.

pub mod attention;
pub mod batch;
mod bounded;
pub mod config;
pub mod decoder;
mod families;
pub mod host;
pub mod kernels;
pub mod kv;
pub mod layers;
pub mod pull;
pub mod source;
pub mod template;
pub mod tokenizer;

pub use batch::{Batch, Span};
pub use config::{Activation, Family, ModelConfig, Rope};
pub use decoder::{Decoder, RefusalRow};
pub use kv::KvCache;
pub use layers::Placement;
pub use source::{Identity, Source, StoredType};
pub use template::{ChatTemplate, Message, RenderedPrompt};
pub use tokenizer::{SpecialText, Tokenizer};
