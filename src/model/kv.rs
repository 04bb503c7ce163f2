//! Keys and values of every layer, in blocks of 16 positions.
//! Knows block numbers, not whose they are: `engine/blocks.rs` lends them out.

use candle_core::{DType, Device, Tensor};

use super::config::ModelConfig;
use super::kernels::{AttentionShape, KV_BLOCK, KvLayer, KvType};
use super::layers::Placement;
use crate::error::{Error, Result};

pub struct KvCache {
    pub(super) layers: Vec<KvStore>,
    kv_type: KvType,
    blocks: usize,
}

pub(super) enum KvStore {
    Packed(KvLayer),
    /// `[blocks * 16, kv_heads * head_dim]` each.
    Dense {
        keys: Tensor,
        values: Tensor,
    },
}

impl KvCache {
    pub fn new(
        config: &ModelConfig,
        kv_type: KvType,
        blocks: usize,
        placement: &Placement,
    ) -> Result<Self> {
        let layers = (0..config.n_layers)
            .map(|layer| {
                let shape = attention_shape(config, layer);
                if placement.uses_kernels() {
                    return Ok(KvStore::Packed(KvLayer::new(kv_type, &shape, blocks)));
                }
                let size = (blocks * KV_BLOCK, shape.kv_heads * shape.head_dim);
                let dtype = dtype(kv_type)?;
                let zeros = || Tensor::zeros(size, dtype, &placement.device);
                Ok(KvStore::Dense {
                    keys: zeros()?,
                    values: zeros()?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            layers,
            kv_type,
            blocks,
        })
    }

    /// Bytes that one block takes over all layers.
    pub fn block_bytes(config: &ModelConfig, kv_type: KvType) -> u64 {
        let per_layer = config.n_kv_heads * KV_BLOCK * kv_type.bytes(config.head_dim);
        per_layer as u64 * config.n_layers as u64
    }

    pub fn kv_type(&self) -> KvType {
        self.kv_type
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }
}

pub(super) fn attention_shape(config: &ModelConfig, layer: usize) -> AttentionShape {
    AttentionShape {
        heads: config.n_heads,
        kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        scale: config.attention_scale,
        window: config
            .sliding_window
            .filter(|_| config.sliding_layers[layer]),
    }
}

fn dtype(kv_type: KvType) -> Result<DType> {
    match kv_type {
        KvType::F32 => Ok(DType::F32),
        KvType::Bf16 => Ok(DType::BF16),
        KvType::Bf16I8 => Err(Error::Config(format!(
            "kv: {kv_type} needs the CPU's kernels; set auto, bf16 or f32"
        ))),
    }
}

/// Where each row of a batch is stored: row numbers into a dense cache.
pub(super) fn slots(blocks: &[u32], start: usize, rows: usize) -> Vec<u32> {
    (start..start + rows)
        .map(|position| {
            blocks[position / KV_BLOCK] * KV_BLOCK as u32 + (position % KV_BLOCK) as u32
        })
        .collect()
}

/// Writes `rows` (`[rows, width]`) to the rows `slots` of a dense cache, in place.
pub(super) fn store_dense(cache: &Tensor, slots: &[u32], rows: &Tensor) -> Result<()> {
    let width = cache.dim(1)?;
    let index = Tensor::from_slice(slots, (slots.len(), 1), rows.device())?;
    let index = index.broadcast_as((slots.len(), width))?.contiguous()?;
    cache
        .scatter_set(&index, &rows.to_dtype(cache.dtype())?.contiguous()?, 0)
        .map_err(Error::from)
}

/// The rows of one sequence up to `len`, `[len, width]` in f32.
pub(super) fn load_dense(
    cache: &Tensor,
    blocks: &[u32],
    len: usize,
    device: &Device,
) -> Result<Tensor> {
    let slots = Tensor::new(slots(blocks, 0, len), device)?;
    Ok(cache.index_select(&slots, 0)?.to_dtype(DType::F32)?)
}
