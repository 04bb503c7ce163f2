//! One file per family: which checkpoint names make which parts. A new family is one file and
//! one match arm.

mod gemma3;
mod llama;
mod qwen2;
mod qwen3;

use super::attention::Attention;
use super::config::{Family, ModelConfig};
use super::decoder::{Block, Decoder};
use super::kernels::{PackedMatrix, Rounding, WeightFormat};
use super::kv::attention_shape;
use super::layers::{Linear, Mlp, Placement, RmsNorm};
use super::source::Source;
use crate::error::Result;

impl Decoder {
    /// Reads every weight of `source` once; a tensor without a place in the family is an error.
    pub fn load(source: &Source, placement: &Placement) -> Result<Self> {
        let loader = Loader {
            source,
            config: &source.config,
            placement,
        };
        let block = match source.config.family {
            Family::Llama => llama::block,
            Family::Qwen2 => qwen2::block,
            Family::Qwen3 => qwen3::block,
            Family::Gemma3 => gemma3::block,
        };
        let d_model = source.config.d_model;
        let decoder = Self {
            config: source.config.clone(),
            placement: placement.clone(),
            embed_tokens: loader.vocabulary("model.embed_tokens")?,
            layers: (0..source.config.n_layers)
                .map(|layer| block(&loader, layer))
                .collect::<Result<_>>()?,
            norm: loader.norm("model.norm", d_model)?,
            lm_head: match source.config.tied_embeddings {
                true => None,
                false => Some(loader.vocabulary("lm_head")?),
            },
        };
        source.check_all_used()?;
        Ok(decoder)
    }
}

/// Turns checkpoint tensors into parts.
struct Loader<'a> {
    source: &'a Source,
    config: &'a ModelConfig,
    placement: &'a Placement,
}

impl Loader<'_> {
    /// The weights of several products of the same input, stacked: `(name, outputs)` each.
    fn linear(&self, parts: &[(&str, usize)], inputs: usize) -> Result<Linear> {
        if let Some(blocks) = self.blocks(parts, inputs)? {
            return Ok(blocks);
        }
        let mut stacked = Vec::new();
        for (name, outputs) in parts {
            let weight = self
                .source
                .tensor(&format!("{name}.weight"), &[*outputs, inputs])?;
            stacked.extend(weight);
        }
        let outputs = parts.iter().map(|(_, outputs)| outputs).sum();
        Linear::new(stacked, outputs, inputs, self.placement)
    }

    /// Embedding or head: `[vocab, d_model]`.
    fn vocabulary(&self, name: &str) -> Result<Linear> {
        let placement = Placement {
            weights: self.placement.weights.of_vocabulary(),
            ..self.placement.clone()
        };
        let loader = Loader {
            source: self.source,
            config: self.config,
            placement: &placement,
        };
        loader.linear(&[(name, self.config.vocab_size)], self.config.d_model)
    }

    /// The same as the file holds them, where that is wished and all are held alike.
    fn blocks(&self, parts: &[(&str, usize)], inputs: usize) -> Result<Option<Linear>> {
        if self.placement.weights != WeightFormat::AsIs || !self.placement.uses_kernels() {
            return Ok(None);
        }
        let mut stacked = Vec::new();
        let mut of_all = None;
        for (name, outputs) in parts {
            let name = format!("{name}.weight");
            match self.source.blocks(&name, [*outputs, inputs])? {
                Some((kind, blocks)) if *of_all.get_or_insert(kind) == kind => {
                    stacked.extend(blocks);
                }
                _ => return Ok(None),
            }
        }
        let outputs = parts.iter().map(|(_, outputs)| outputs).sum();
        let pack = |kind| PackedMatrix::pack_blocks(&stacked, outputs, inputs, kind);
        Ok(of_all.map(|kind| Linear::Packed(pack(kind))))
    }

    fn norm(&self, name: &str, width: usize) -> Result<RmsNorm> {
        let weight = self.source.tensor(&format!("{name}.weight"), &[width])?;
        RmsNorm::new(weight, self.config.rms_norm_eps, self.placement)
    }

    /// `layer.self_attn` without biases and without norms of queries and keys.
    fn attention(&self, layer: usize) -> Result<Attention> {
        let at = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let (d_model, q, kv) = self.widths();
        let qkv = [
            (&*at("q_proj"), q),
            (&at("k_proj"), kv),
            (&at("v_proj"), kv),
        ];
        let o_proj = self.linear(&[(&at("o_proj"), d_model)], q)?;
        Ok(Attention {
            qkv_proj: self
                .linear(&qkv, d_model)?
                .with_inputs_rounded(Rounding::Twice),
            qkv_bias: None,
            q_norm: None,
            k_norm: None,
            o_proj: o_proj.with_inputs_rounded(Rounding::Twice),
            shape: attention_shape(self.config, layer),
        })
    }

    /// The biases of q, k and v, in one vector.
    fn qkv_bias(&self, layer: usize) -> Result<Vec<f32>> {
        let (_, q, kv) = self.widths();
        let mut bias = Vec::with_capacity(q + 2 * kv);
        for (part, width) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
            let name = format!("model.layers.{layer}.self_attn.{part}.bias");
            bias.extend(self.source.tensor(&name, &[width])?);
        }
        Ok(bias)
    }

    fn head_norm(&self, layer: usize, part: &str) -> Result<RmsNorm> {
        let name = format!("model.layers.{layer}.self_attn.{part}");
        self.norm(&name, self.config.head_dim)
    }

    fn mlp(&self, layer: usize) -> Result<Mlp> {
        let at = |part: &str| format!("model.layers.{layer}.mlp.{part}");
        let (d_model, d_mlp) = (self.config.d_model, self.config.d_mlp);
        let down_proj = self.linear(&[(&at("down_proj"), d_model)], d_mlp)?;
        Ok(Mlp {
            gate_up_proj: self.linear(
                &[(&at("gate_proj"), d_mlp), (&at("up_proj"), d_mlp)],
                d_model,
            )?,
            // Gated activations have heavy tails: a few would take the bits of all.
            down_proj: down_proj.with_inputs_rounded(Rounding::Twice),
            activation: self.config.activation,
            d_mlp,
        })
    }

    /// Two norms, one before attention and one before the MLP: llama and qwen.
    fn pre_norm_block(&self, layer: usize, self_attn: Attention) -> Result<Block> {
        let d_model = self.config.d_model;
        let at = |part: &str| format!("model.layers.{layer}.{part}");
        Ok(Block {
            input_layernorm: self.norm(&at("input_layernorm"), d_model)?,
            self_attn,
            post_attention_norm: None,
            pre_mlp_norm: self.norm(&at("post_attention_layernorm"), d_model)?,
            mlp: self.mlp(layer)?,
            post_mlp_norm: None,
            local: false,
        })
    }

    /// `(d_model, heads * head_dim, kv_heads * head_dim)`
    fn widths(&self) -> (usize, usize, usize) {
        let config = self.config;
        (
            config.d_model,
            config.n_heads * config.head_dim,
            config.n_kv_heads * config.head_dim,
        )
    }
}
