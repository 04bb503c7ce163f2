//! Llama, Mistral, SmolLM: pre-norm blocks, nothing else.

use super::{Block, Loader};
use crate::error::Result;

pub(super) fn block(loader: &Loader<'_>, layer: usize) -> Result<Block> {
    loader.pre_norm_block(layer, loader.attention(layer)?)
}
