//! Self-attention of packed rows: projections, norms of queries and keys, rotation, the cache.

use candle_core::{D, DType, Device, Tensor};

use super::batch::Batch;
use super::host;
use super::kernels::{AttentionShape, KV_BLOCK, KvLayer, SpanRows, attend, fill_rows};
use super::kv::{KvStore, load_dense, slots, store_dense};
use super::layers::{Linear, RmsNorm, RopeRows};
use crate::error::{Error, Result};

pub struct Attention {
    /// q, k and v in one product: `[(heads + 2 kv_heads) * head_dim, d_model]`.
    pub qkv_proj: Linear,
    /// `[(heads + 2 kv_heads) * head_dim]`, where the family has one (qwen2).
    pub qkv_bias: Option<Vec<f32>>,
    /// `[head_dim]`, per head (qwen3, gemma3).
    pub q_norm: Option<RmsNorm>,
    pub k_norm: Option<RmsNorm>,
    /// `[d_model, heads * head_dim]`
    pub o_proj: Linear,
    pub shape: AttentionShape,
}

impl Attention {
    /// `x`: `[rows, d_model]`, normalised -> `[rows, d_model]`. Stores K and V before it reads any.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        batch: &Batch,
        rope: &RopeRows,
        kv: &mut KvStore,
    ) -> Result<Tensor> {
        let mixed = match (&self.qkv_proj, kv) {
            (Linear::Packed(qkv_proj), KvStore::Packed(layer)) => {
                let qkv = host::read(x, |x| qkv_proj.product(x))?;
                host::matrix(self.on_host(qkv, batch, rope, layer), self.q_width())?
            }
            (_, KvStore::Dense { keys, values }) => {
                let qkv = self.qkv_proj.forward(x)?;
                self.on_device(&qkv, batch, rope, keys, values)?
            }
            (Linear::Dense(_), KvStore::Packed(_)) => {
                return Err(Error::internal("weights and cache are on one device"));
            }
        };
        self.o_proj.forward(&mixed)
    }

    fn q_width(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    fn kv_width(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    fn on_host(
        &self,
        mut qkv: Vec<f32>,
        batch: &Batch,
        rope: &RopeRows,
        layer: &mut KvLayer,
    ) -> Vec<f32> {
        let (q_width, kv_width) = (self.q_width(), self.kv_width());
        let width = q_width + 2 * kv_width;
        fill_rows(&mut qkv, width, |first, rows| {
            for (row, qkv) in rows.chunks_exact_mut(width).enumerate() {
                self.turn(first + row, qkv, rope);
            }
        });
        for (qkv, (block, slot)) in qkv.chunks_exact(width).zip(batch.slots()) {
            let (k, v) = qkv[q_width..].split_at(kv_width);
            layer.write(&self.shape, block, slot, k, v);
        }
        let spans: Vec<SpanRows<'_>> = batch
            .spans
            .iter()
            .map(|span| SpanRows {
                first_row: span.first_row,
                rows: span.rows,
                start: span.start,
                blocks: &span.blocks,
            })
            .collect();
        attend(&qkv, width, &self.shape, layer, &spans)
    }

    /// Bias, norms and rotation of one row of q, k and v.
    fn turn(&self, row: usize, qkv: &mut [f32], rope: &RopeRows) {
        if let Some(bias) = &self.qkv_bias {
            super::kernels::add_assign(qkv, bias);
        }
        let (q, kv) = qkv.split_at_mut(self.q_width());
        let k = &mut kv[..self.kv_width()];
        if let Some(norm) = &self.q_norm {
            norm.forward_host(q);
        }
        if let Some(norm) = &self.k_norm {
            norm.forward_host(k);
        }
        rope.rotate(row, q);
        rope.rotate(row, k);
    }

    fn on_device(
        &self,
        qkv: &Tensor,
        batch: &Batch,
        rope: &RopeRows,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<Tensor> {
        let (rows, (q_width, kv_width)) = (batch.rows(), (self.q_width(), self.kv_width()));
        let (heads, kv_heads, dim) = (self.shape.heads, self.shape.kv_heads, self.shape.head_dim);
        let qkv = match &self.qkv_bias {
            Some(bias) => qkv.broadcast_add(&Tensor::new(bias.as_slice(), qkv.device())?)?,
            None => qkv.clone(),
        };
        let part = |from: usize, width: usize| qkv.narrow(1, from, width)?.contiguous();
        let (mut q, mut k) = (part(0, q_width)?, part(q_width, kv_width)?);
        let v = part(q_width + kv_width, kv_width)?;
        if let Some(norm) = &self.q_norm {
            q = norm.forward(&q)?;
        }
        if let Some(norm) = &self.k_norm {
            k = norm.forward(&k)?;
        }
        let q = rope.rotate_tensor(&q.reshape((rows, heads, dim))?)?;
        let k = rope.rotate_tensor(&k.reshape((rows, kv_heads, dim))?)?;
        let k = k.reshape((rows, kv_width))?;
        for span in &batch.spans {
            let slots = slots(&span.blocks, span.start, span.rows);
            store_dense(keys, &slots, &k.narrow(0, span.first_row, span.rows)?)?;
            store_dense(values, &slots, &v.narrow(0, span.first_row, span.rows)?)?;
        }
        let mixed = batch
            .spans
            .iter()
            .map(|span| {
                let len = span.start + span.rows;
                let k = load_dense(keys, &span.blocks, len, q.device())?;
                let v = load_dense(values, &span.blocks, len, q.device())?;
                let q = q.narrow(0, span.first_row, span.rows)?;
                self.attend_span(&q, &k, &v, span.start)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&mixed, 0)?)
    }

    /// `q`: `[rows, heads, head_dim]`, `k`, `v`: `[len, kv_heads * head_dim]`.
    fn attend_span(&self, q: &Tensor, k: &Tensor, v: &Tensor, start: usize) -> Result<Tensor> {
        let (rows, heads, dim) = q.dims3()?;
        let (len, kv_heads) = (k.dim(0)?, self.shape.kv_heads);
        let group = heads / kv_heads;
        // Queries of one group share their kv head: [kv_heads, group * rows, head_dim].
        let q = q
            .transpose(0, 1)?
            .contiguous()?
            .reshape((kv_heads, group * rows, dim))?;
        let split = |t: &Tensor| {
            t.reshape((len, kv_heads, dim))?
                .transpose(0, 1)?
                .contiguous()
        };
        let (k, v) = (split(k)?, split(v)?);
        let scores = (q.matmul(&k.t()?.contiguous()?)? * f64::from(self.shape.scale))?;
        let mask = self.mask(rows, len, start, q.device())?;
        let scores = scores
            .reshape((kv_heads, group, rows, len))?
            .broadcast_add(&mask)?;
        let scores = scores
            .broadcast_sub(&scores.max_keepdim(D::Minus1)?)?
            .exp()?;
        let weights = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
        let mixed = weights.reshape((kv_heads, group * rows, len))?.matmul(&v)?;
        Ok(mixed
            .reshape((heads, rows, dim))?
            .transpose(0, 1)?
            .contiguous()?
            .reshape((rows, heads * dim))?)
    }

    /// 0 where row sees position, minus infinity where not: `[rows, len]`.
    fn mask(&self, rows: usize, len: usize, start: usize, device: &Device) -> Result<Tensor> {
        let window = self.shape.window.unwrap_or(usize::MAX);
        let mask: Vec<f32> = (start..start + rows)
            .flat_map(|row| {
                (0..len).map(move |position| {
                    let seen = position <= row && row - position < window;
                    if seen { 0.0 } else { f32::NEG_INFINITY }
                })
            })
            .collect();
        let mask = Tensor::from_vec(mask, (rows, len), &Device::Cpu)?;
        Ok(mask.to_device(device)?.to_dtype(DType::F32)?)
    }
}

impl Batch {
    /// For each row, the block and the slot in it where its K and V go.
    fn slots(&self) -> impl Iterator<Item = (u32, usize)> {
        self.spans.iter().flat_map(|span| {
            (span.start..span.start + span.rows)
                .map(|position| (span.blocks[position / KV_BLOCK], position % KV_BLOCK))
        })
    }
}
