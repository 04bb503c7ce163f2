//! The decoder that all families share: what differs is which parts a block has.
//! Every hook site of design is here, once, so no family can lack one.

use std::collections::BTreeSet;

use candle_core::Tensor;

use super::attention::Attention;
use super::batch::Batch;
use super::config::ModelConfig;
use super::host;
use super::kernels::{WeightFormat, add, dot, new_rows};
use super::kv::KvCache;
use super::layers::{Linear, Mlp, Placement, RmsNorm, RopeRows};
use crate::error::{Error, Result};
use crate::hooks::{HookRun, Site};

pub struct Decoder {
    pub(super) config: ModelConfig,
    pub(super) placement: Placement,
    /// `[vocab, d_model]`
    pub(super) embed_tokens: Linear,
    pub(super) layers: Vec<Block>,
    pub(super) norm: RmsNorm,
    /// `[vocab, d_model]`; none where the embedding is the head.
    pub(super) lm_head: Option<Linear>,
}

pub(super) struct Block {
    pub(super) input_layernorm: RmsNorm,
    pub(super) self_attn: Attention,
    /// Applied to what attention adds (gemma3).
    pub(super) post_attention_norm: Option<RmsNorm>,
    pub(super) pre_mlp_norm: RmsNorm,
    pub(super) mlp: Mlp,
    /// Applied to what the MLP adds (gemma3).
    pub(super) post_mlp_norm: Option<RmsNorm>,
    /// Rotates with the local frequencies where the family has two sets.
    pub(super) local: bool,
}

/// A low-rank difference to the language-model head for one row: `T h + gain * A (B h)`.
pub struct RefusalRow<'a> {
    /// Index among the rows whose logits are asked for.
    pub row: usize,
    /// `[vocab, rank]`
    pub a: &'a [f32],
    /// `[rank, d_model]`
    pub b: &'a [f32],
    pub gain: f32,
}

impl Decoder {
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Runs all rows through all layers: `[rows, d_model]` after the final norm.
    pub fn forward(
        &self,
        batch: &Batch,
        kv: &mut KvCache,
        hooks: &mut HookRun<'_>,
    ) -> Result<Tensor> {
        let global = RopeRows::new(&self.config.rope.inv_freq, &batch.positions);
        let local = self.config.local_rope.as_ref();
        let local = local.map(|rope| RopeRows::new(&rope.inv_freq, &batch.positions));
        // resid: [rows, d_model]
        let mut resid = hooks.visit(Site::Embed, self.embed(&batch.tokens)?)?;
        for (layer, (block, kv)) in self.layers.iter().zip(&mut kv.layers).enumerate() {
            let i = u16::try_from(layer).map_err(Error::internal)?;
            let rope = match &local {
                Some(local) if block.local => local,
                _ => &global,
            };
            resid = hooks.visit(Site::ResidPre(i), resid)?;
            let mut attn_out = block.input_layernorm.forward(&resid)?;
            attn_out = hooks.beside(|| block.self_attn.forward(&attn_out, batch, rope, kv))?;
            if let Some(norm) = &block.post_attention_norm {
                attn_out = norm.forward(&attn_out)?;
            }
            attn_out = hooks.visit(Site::AttnOut(i), attn_out)?;
            resid = hooks.visit(Site::ResidMid(i), self.add(resid, &attn_out)?)?;
            let mut mlp_out = block.pre_mlp_norm.forward(&resid)?;
            mlp_out = hooks.beside(|| block.mlp.forward(&mlp_out))?;
            if let Some(norm) = &block.post_mlp_norm {
                mlp_out = norm.forward(&mlp_out)?;
            }
            mlp_out = hooks.visit(Site::MlpOut(i), mlp_out)?;
            resid = hooks.visit(Site::ResidPost(i), self.add(resid, &mlp_out)?)?;
        }
        hooks.visit(Site::FinalNorm, self.norm.forward(&resid)?)
    }

    /// `a + b`, of one shape. On a CPU with our own loop: candle's wakes threads of its own.
    fn add(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        if !self.placement.uses_kernels() {
            return Ok((a + b)?);
        }
        let sum = host::read(b, |b| {
            host::read(&a, |a| {
                let width = self.config.d_model;
                new_rows(a.len() / width, width, |first, sum| {
                    let range = first * width..first * width + sum.len();
                    add(&a[range.clone()], &b[range], sum);
                })
            })
        })??;
        host::tensor_like(sum, &a)
    }

    /// `tokens` -> `[tokens, d_model]`, scaled where the family scales.
    fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let d_model = self.config.d_model;
        let mut rows = vec![0f32; tokens.len() * d_model];
        for (token, row) in tokens.iter().zip(rows.chunks_exact_mut(d_model)) {
            self.embed_tokens.row(*token as usize, row)?;
            if let Some(scale) = self.config.embed_scale {
                row.iter_mut().for_each(|value| *value *= scale);
            }
        }
        Ok(host::matrix(rows, d_model)?.to_device(&self.placement.device)?)
    }

    /// Logits of some rows of `hidden` (`[rows, d_model]`, after the final norm):
    /// `[picked.len(), vocab]` on the host, row-major.
    pub fn logits(
        &self,
        hidden: &Tensor,
        picked: &[usize],
        refusals: &[RefusalRow<'_>],
    ) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        self.logits_into(hidden, picked, refusals, &mut logits)?;
        Ok(logits)
    }

    /// The same in place of what `logits` holds: its memory, megabytes for many rows, serves again.
    pub fn logits_into(
        &self,
        hidden: &Tensor,
        picked: &[usize],
        refusals: &[RefusalRow<'_>],
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let (d_model, vocab) = (self.config.d_model, self.config.vocab_size);
        logits.resize(picked.len() * vocab, 0.0);
        if picked.is_empty() {
            return Ok(());
        }
        let picked: Vec<f32> = host::read(hidden, |hidden| {
            let rows = picked.iter();
            rows.flat_map(|row| &hidden[row * d_model..(row + 1) * d_model])
                .copied()
                .collect()
        })?;
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        match head {
            Linear::Packed(weight) => weight.product_into(&picked, logits),
            Linear::Dense(_) => {
                let rows = host::matrix(picked.clone(), d_model)?;
                let made = head.forward(&rows.to_device(&self.placement.device)?)?;
                host::read(&made, |made| logits.copy_from_slice(made))?;
            }
        }
        for refusal in refusals {
            let hidden = &picked[refusal.row * d_model..(refusal.row + 1) * d_model];
            let logits = &mut logits[refusal.row * vocab..(refusal.row + 1) * vocab];
            add_refusal(refusal, hidden, logits);
        }
        Ok(())
    }

    /// Bytes of all weights as they are kept.
    pub fn weight_bytes(&self) -> usize {
        self.matrices().map(Linear::bytes).sum()
    }

    /// How the matrices are held, e.g. `q4_1+q8_0`. Equal names of one file mean equal bits: what a
    /// file holds in 4 bits and what was rounded to them when it was loaded differ.
    pub fn weights_held_as(&self) -> String {
        let names: BTreeSet<&str> = self.matrices().map(Linear::held_as).collect();
        let names = Vec::from_iter(names).join("+");
        match self.placement.weights {
            WeightFormat::Q4_1 if self.placement.uses_kernels() => format!("rounded-{names}"),
            _ => names,
        }
    }

    fn matrices(&self) -> impl Iterator<Item = &Linear> {
        fn of_block(block: &Block) -> [&Linear; 4] {
            let attention = &block.self_attn;
            [
                &attention.qkv_proj,
                &attention.o_proj,
                &block.mlp.gate_up_proj,
                &block.mlp.down_proj,
            ]
        }
        let blocks = self.layers.iter().flat_map(of_block);
        blocks.chain([&self.embed_tokens]).chain(&self.lm_head)
    }
}

fn add_refusal(refusal: &RefusalRow<'_>, hidden: &[f32], logits: &mut [f32]) {
    let low: Vec<f32> = refusal
        .b
        .chunks_exact(hidden.len())
        .map(|row| refusal.gain * dot(row, hidden))
        .collect();
    for (logit, row) in logits.iter_mut().zip(refusal.a.chunks_exact(low.len())) {
        *logit += dot(row, &low);
    }
}
