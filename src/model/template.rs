//! Chats to prompts, by the model's own template.
//! Knows which parts of a prompt a person wrote: there, text that spells a control token stays
//! text. Knows nothing of requests or of who may send what.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::model::tokenizer::{SpecialText, Tokenizer};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    pub content: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenderedPrompt {
    pub tokens: Vec<u32>,
    /// Token positions from the last user turn's content to the end of the prompt.
    pub content: Range<usize>,
    /// Bytes of the rendered text.
    pub text_len: usize,
}

#[derive(Clone)]
pub struct ChatTemplate {
    source: Arc<str>,
}

impl ChatTemplate {
    pub fn new(source: &str, _tokenizer: &Tokenizer) -> Result<Self> {
        Ok(Self {
            source: source.into(),
        })
    }

    pub fn render(&self, _messages: &[Message], tokenizer: &Tokenizer) -> Result<RenderedPrompt> {
        let _ = tokenizer.encode("", SpecialText::AsText)?;
        Err(Error::unsupported("input.chat", "not yet"))
    }

    /// SHA-256 (hex) of the template's source.
    pub fn hash(&self) -> String {
        hex::encode(Sha256::digest(self.source.as_bytes()))
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChatTemplate({})", self.hash())
    }
}
