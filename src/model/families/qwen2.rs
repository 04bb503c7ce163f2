//! Qwen2: llama with biases on queries, keys and values.

use super::{Block, Loader};
use crate::error::Result;

pub(super) fn block(loader: &Loader<'_>, layer: usize) -> Result<Block> {
    let mut self_attn = loader.attention(layer)?;
    self_attn.qkv_bias = Some(loader.qkv_bias(layer)?);
    loader.pre_norm_block(layer, self_attn)
}
