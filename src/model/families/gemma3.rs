//! Gemma 3: norms around attention and MLP, norms on queries and keys, and sliding layers with
//! their own rotary base.

use super::{Block, Loader};
use crate::error::Result;

pub(super) fn block(loader: &Loader<'_>, layer: usize) -> Result<Block> {
    let d_model = loader.config.d_model;
    let norm = |part: &str| loader.norm(&format!("model.layers.{layer}.{part}"), d_model);
    let mut self_attn = loader.attention(layer)?;
    self_attn.q_norm = Some(loader.head_norm(layer, "q_norm")?);
    self_attn.k_norm = Some(loader.head_norm(layer, "k_norm")?);
    Ok(Block {
        input_layernorm: norm("input_layernorm")?,
        self_attn,
        post_attention_norm: Some(norm("post_attention_layernorm")?),
        pre_mlp_norm: norm("pre_feedforward_layernorm")?,
        mlp: loader.mlp(layer)?,
        post_mlp_norm: Some(norm("post_feedforward_layernorm")?),
        local: loader.config.sliding_layers[layer],
    })
}
