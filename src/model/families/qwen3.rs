//! Qwen3: llama with a norm on each head's queries and keys.

use super::{Block, Loader};
use crate::error::Result;

pub(super) fn block(loader: &Loader<'_>, layer: usize) -> Result<Block> {
    let mut self_attn = loader.attention(layer)?;
    self_attn.q_norm = Some(loader.head_norm(layer, "q_norm")?);
    self_attn.k_norm = Some(loader.head_norm(layer, "k_norm")?);
    loader.pre_norm_block(layer, self_attn)
}
