//! Attention of packed rows over KV blocks.
//!
//! A block holds 16 positions. Keys lie transposed (`[kv_head][head_dim][16]`) so that one query
//! meets 16 keys at once; values lie as they come (`[kv_head][16][head_dim]`).
//! Every (row, head) is its own chain over absolute positions: neither chunking nor batching of
//! the rows can change a bit.

use std::ops::Range;

use half::bf16;
use multiversion::multiversion;

use super::SharedOut;
use super::elementwise::exp_inline;
use super::pool::parallel;

/// Positions per KV block.
pub const KV_BLOCK: usize = 16;

/// How many queries share one pass over the keys.
const QUERIES: usize = 4;

/// The type that K and V are rounded to before any attention reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    F32,
    Bf16,
}

impl std::fmt::Display for KvType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl KvType {
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Multiplies `q.k`.
    pub scale: f32,
    /// How many positions a row sees, itself included; none sees all.
    pub window: Option<usize>,
}

impl AttentionShape {
    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Stored numbers per block, of K or of V.
    pub fn block_len(&self) -> usize {
        self.kv_width() * KV_BLOCK
    }
}

/// Keys and values of one layer, for all blocks.
pub enum KvLayer {
    F32(Store<f32>),
    Bf16(Store<bf16>),
}

pub struct Store<T> {
    keys: Vec<T>,
    values: Vec<T>,
}

pub trait Stored: Copy + Default + Send + Sync {
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl Stored for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl KvLayer {
    /// Room for `blocks` blocks, zeroed.
    pub fn new(kv_type: KvType, shape: &AttentionShape, blocks: usize) -> Self {
        let len = shape.block_len() * blocks;
        match kv_type {
            KvType::F32 => Self::F32(Store::new(len)),
            KvType::Bf16 => Self::Bf16(Store::new(len)),
        }
    }

    /// Stores `key` and `value` (`[kv_heads, head_dim]` each) at `slot` of `block`.
    pub fn write(
        &mut self,
        shape: &AttentionShape,
        block: u32,
        slot: usize,
        key: &[f32],
        value: &[f32],
    ) {
        match self {
            Self::F32(store) => store.write(shape, block, slot, key, value),
            Self::Bf16(store) => store.write(shape, block, slot, key, value),
        }
    }
}

impl<T: Stored> Store<T> {
    fn new(len: usize) -> Self {
        Self {
            keys: vec![T::default(); len],
            values: vec![T::default(); len],
        }
    }

    fn write(
        &mut self,
        shape: &AttentionShape,
        block: u32,
        slot: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let base = block as usize * shape.block_len();
        let dim = shape.head_dim;
        for head in 0..shape.kv_heads {
            let keys = &mut self.keys[base + head * dim * KV_BLOCK..][..dim * KV_BLOCK];
            for (d, key) in key[head * dim..(head + 1) * dim].iter().enumerate() {
                keys[d * KV_BLOCK + slot] = T::narrow(*key);
            }
            let start = base + (head * KV_BLOCK + slot) * dim;
            let values = &mut self.values[start..start + dim];
            for (stored, value) in values.iter_mut().zip(&value[head * dim..(head + 1) * dim]) {
                *stored = T::narrow(*value);
            }
        }
    }
}

/// The rows of one sequence in a packed batch.
pub struct SpanRows<'a> {
    /// First row in the batch.
    pub first_row: usize,
    pub rows: usize,
    /// Position of the first row in its sequence.
    pub start: usize,
    pub blocks: &'a [u32],
}

/// Rows of `width` numbers in `q`, each of which begins with `[heads, head_dim]` ->
/// `[rows, heads, head_dim]`. K and V of every row must already be stored.
pub fn attend(
    q: &[f32],
    width: usize,
    shape: &AttentionShape,
    layer: &KvLayer,
    spans: &[SpanRows<'_>],
) -> Vec<f32> {
    let q = &Queries { numbers: q, width };
    let mut out = vec![0f32; q.numbers.len() / width * shape.heads * shape.head_dim];
    match layer {
        KvLayer::F32(store) => attend_store(q, shape, store, spans, &mut out),
        KvLayer::Bf16(store) => attend_store(q, shape, store, spans, &mut out),
    }
    out
}

struct Queries<'a> {
    numbers: &'a [f32],
    /// Numbers from one row to the next.
    width: usize,
}

/// One unit of work: some rows of one span, one kv head.
struct Task<'a> {
    span: &'a SpanRows<'a>,
    /// Rows within the span.
    first: usize,
    rows: usize,
    kv_head: usize,
}

/// Multiply-adds below which one thread does it all.
const PARALLEL_WORK: usize = 1 << 16;

fn attend_store<T: Stored>(
    q: &Queries<'_>,
    shape: &AttentionShape,
    store: &Store<T>,
    spans: &[SpanRows<'_>],
    out: &mut [f32],
) {
    let mut tasks = Vec::new();
    let mut work = 0;
    for span in spans {
        work += span.rows * (span.start + span.rows) * shape.heads * shape.head_dim;
        for first in (0..span.rows).step_by(8) {
            for kv_head in 0..shape.kv_heads {
                tasks.push(Task {
                    span,
                    first,
                    rows: 8.min(span.rows - first),
                    kv_head,
                });
            }
        }
    }
    let out = SharedOut(out.as_mut_ptr());
    let run = |task: &Task<'_>, scratch: &mut Vec<f32>| {
        let group = shape.heads / shape.kv_heads;
        let queries: Vec<(usize, usize)> = (0..task.rows * group)
            .map(|i| (task.first + i / group, task.kv_head * group + i % group))
            .collect();
        for queries in queries.chunks(QUERIES) {
            let out = &out;
            attend_queries(
                q,
                shape,
                store,
                task,
                queries,
                scratch,
                |row, head, values| {
                    let start = (row * shape.heads + head) * shape.head_dim;
                    // SAFETY: each (row, head) of the batch belongs to exactly one task and is
                    // visited once, so the slices are disjoint and inside `out`.
                    #[allow(unsafe_code)]
                    let target =
                        unsafe { std::slice::from_raw_parts_mut(out.0.add(start), shape.head_dim) };
                    target.copy_from_slice(values);
                },
            );
        }
    };
    if work < PARALLEL_WORK {
        let mut scratch = Vec::new();
        tasks.iter().for_each(|task| run(task, &mut scratch));
    } else {
        parallel(tasks.len(), |task| run(&tasks[task], &mut Vec::new()));
    }
}

fn attend_queries<T: Stored>(
    q: &Queries<'_>,
    shape: &AttentionShape,
    store: &Store<T>,
    task: &Task<'_>,
    queries: &[(usize, usize)],
    scratch: &mut Vec<f32>,
    mut emit: impl FnMut(usize, usize, &[f32]),
) {
    let dim = shape.head_dim;
    let span = task.span;
    let end = span.start + queries.iter().map(|(row, _)| row + 1).max().unwrap_or(0);
    let width = end.div_ceil(KV_BLOCK) * KV_BLOCK;
    let lowest = queries
        .iter()
        .map(|(row, _)| first_seen(span.start + row, shape.window))
        .min()
        .unwrap_or(0);
    let first_block = lowest / KV_BLOCK;
    scratch.clear();
    scratch.resize(QUERIES * (width + dim), 0.0);
    let (scores, sums) = scratch.split_at_mut(QUERIES * width);
    // Absent queries repeat the first: same cost, one code path.
    let tile: [&[f32]; QUERIES] = std::array::from_fn(|i| {
        let (row, head) = queries[if i < queries.len() { i } else { 0 }];
        &q.numbers[(span.first_row + row) * q.width + head * dim..][..dim]
    });
    let view = BlockView {
        block_len: shape.block_len(),
        head_offset: task.kv_head * dim * KV_BLOCK,
        dim,
        blocks: span.blocks,
    };
    score_blocks(store, &view, &tile, shape.scale, first_block, width, scores);
    let mut totals = [0f32; QUERIES];
    // What each query sees, and what all of them see.
    let seen = |row: usize| first_seen(span.start + row, shape.window)..span.start + row + 1;
    let mut common = 0..usize::MAX;
    for (i, (row, _)) in queries.iter().enumerate() {
        let seen = seen(*row);
        common = common.start.max(seen.start)..common.end.min(seen.end);
        totals[i] = soften(&mut scores[i * width..][..seen.end], seen.start);
    }
    let common = common.start..common.end.max(common.start);
    let weights: [&[f32]; QUERIES] = std::array::from_fn(|i| {
        let i = if i < queries.len() { i } else { 0 };
        &scores[i * width..(i + 1) * width]
    });
    for (i, (row, _)) in queries.iter().enumerate() {
        let before = seen(*row).start..common.start.min(seen(*row).end);
        weigh_values(
            store,
            &view,
            &[weights[i]],
            before,
            &mut sums[i * dim..(i + 1) * dim],
        );
    }
    weigh_values(store, &view, &weights, common.clone(), sums);
    for (i, (row, head)) in queries.iter().enumerate() {
        let sums = &mut sums[i * dim..(i + 1) * dim];
        let after = common.end.max(seen(*row).start)..seen(*row).end;
        weigh_values(store, &view, &[weights[i]], after, sums);
        for sum in sums.iter_mut() {
            *sum /= totals[i];
        }
        emit(span.first_row + row, *head, sums);
    }
}

/// The first position that `position` sees.
fn first_seen(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// Where one kv head's numbers lie in the blocks of one sequence.
struct BlockView<'a> {
    block_len: usize,
    head_offset: usize,
    dim: usize,
    blocks: &'a [u32],
}

impl BlockView<'_> {
    #[inline(always)]
    fn of<'a, T>(&self, data: &'a [T], block: usize) -> &'a [T] {
        let start = self.blocks[block] as usize * self.block_len + self.head_offset;
        &data[start..start + self.dim * KV_BLOCK]
    }
}

#[multiversion(targets(
    "x86_64+avx512f+avx512vl+avx512bw+fma",
    "x86_64+avx2+fma",
    "aarch64+neon"
))]
fn score_blocks<T: Stored>(
    store: &Store<T>,
    view: &BlockView<'_>,
    tile: &[&[f32]; QUERIES],
    scale: f32,
    first_block: usize,
    width: usize,
    scores: &mut [f32],
) {
    // Two blocks at a time: more chains than one multiply-add takes cycles.
    let mut block = first_block;
    let end = width / KV_BLOCK;
    while block < end {
        let second = (block + 1).min(end - 1);
        let keys = [block, second].map(|block| view.of(&store.keys, block));
        let mut sums = [[[0f32; KV_BLOCK]; QUERIES]; 2];
        for d in 0..view.dim {
            for (sums, keys) in sums.iter_mut().zip(keys) {
                let keys = &keys[d * KV_BLOCK..(d + 1) * KV_BLOCK];
                let mut wide = [0f32; KV_BLOCK];
                for j in 0..KV_BLOCK {
                    wide[j] = keys[j].widen();
                }
                for i in 0..QUERIES {
                    let q = tile[i][d];
                    for j in 0..KV_BLOCK {
                        sums[i][j] = q.mul_add(wide[j], sums[i][j]);
                    }
                }
            }
        }
        for (block, sums) in [block, second].into_iter().zip(sums) {
            for i in 0..QUERIES {
                for j in 0..KV_BLOCK {
                    scores[i * width + block * KV_BLOCK + j] = sums[i][j] * scale;
                }
            }
        }
        block += 2;
    }
}

/// Turns `scores[low..]` into `e^(score - max)` and returns their sum.
#[multiversion(targets(
    "x86_64+avx512f+avx512vl+avx512dq+fma",
    "x86_64+avx2+fma",
    "aarch64+neon"
))]
fn soften(scores: &mut [f32], low: usize) -> f32 {
    let seen = &mut scores[low..];
    let max = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut lanes = [0f32; KV_BLOCK];
    let mut chunks = seen.chunks_exact_mut(KV_BLOCK);
    for chunk in &mut chunks {
        for j in 0..KV_BLOCK {
            chunk[j] = exp_inline(chunk[j] - max);
            lanes[j] += chunk[j];
        }
    }
    let mut total = 0f32;
    for score in chunks.into_remainder() {
        *score = exp_inline(*score - max);
        total += *score;
    }
    lanes.iter().fold(total, |total, lane| total + lane)
}

/// Numbers of a value that are summed in registers at a time.
const WIDTH: usize = 32;

/// Adds the values of `positions`, each times its weight, to `out`, position by position, for `N`
/// queries at once: `out` is `[N, head_dim]`.
#[multiversion(targets(
    "x86_64+avx512f+avx512vl+avx512bw+fma",
    "x86_64+avx2+fma",
    "aarch64+neon"
))]
fn weigh_values<T: Stored, const N: usize>(
    store: &Store<T>,
    view: &BlockView<'_>,
    weights: &[&[f32]; N],
    positions: Range<usize>,
    out: &mut [f32],
) {
    let dim = view.dim;
    let mut first = 0;
    while first < dim {
        let step = WIDTH.min(dim - first);
        let mut sums = [[0f32; WIDTH]; N];
        for i in 0..N {
            sums[i][..step].copy_from_slice(&out[i * dim + first..][..step]);
        }
        let mut position = positions.start;
        while position < positions.end {
            let values = view.of(&store.values, position / KV_BLOCK);
            let end = positions.end.min((position / KV_BLOCK + 1) * KV_BLOCK);
            for position in position..end {
                let row = &values[position % KV_BLOCK * dim + first..];
                let mut wide = [0f32; WIDTH];
                if step == WIDTH {
                    let row = &row[..WIDTH];
                    for d in 0..WIDTH {
                        wide[d] = row[d].widen();
                    }
                } else {
                    for d in 0..step {
                        wide[d] = row[d].widen();
                    }
                }
                for i in 0..N {
                    let weight = weights[i][position];
                    for d in 0..WIDTH {
                        sums[i][d] = weight.mul_add(wide[d], sums[i][d]);
                    }
                }
            }
            position = end;
        }
        for i in 0..N {
            out[i * dim + first..][..step].copy_from_slice(&sums[i][..step]);
        }
        first += step;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seeded(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(99);
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                (state as f32 / u32::MAX as f32) * 2.0 - 1.0
            })
            .collect()
    }

    fn shape(window: Option<usize>) -> AttentionShape {
        AttentionShape {
            heads: 6,
            kv_heads: 2,
            head_dim: 40,
            scale: 0.2,
            window,
        }
    }

    /// A layer with `len` positions of seeded K and V in shuffled blocks.
    fn filled(
        shape: &AttentionShape,
        len: usize,
        kv_type: KvType,
    ) -> (KvLayer, Vec<u32>, Vec<f32>, Vec<f32>) {
        let width = shape.kv_width();
        let (keys, values) = (seeded(len * width, 1), seeded(len * width, 2));
        let count = len.div_ceil(KV_BLOCK);
        let blocks: Vec<u32> = (0..count).rev().map(|b| b as u32).collect();
        let mut layer = KvLayer::new(kv_type, shape, count);
        for position in 0..len {
            layer.write(
                shape,
                blocks[position / KV_BLOCK],
                position % KV_BLOCK,
                &keys[position * width..][..width],
                &values[position * width..][..width],
            );
        }
        (layer, blocks, keys, values)
    }

    /// The definition, in f64.
    fn reference(
        shape: &AttentionShape,
        q: &[f32],
        keys: &[f32],
        values: &[f32],
        start: usize,
        row: usize,
        head: usize,
    ) -> Vec<f64> {
        let (dim, width) = (shape.head_dim, shape.kv_width());
        let kv = head / (shape.heads / shape.kv_heads) * dim;
        let position = start + row;
        let q = &q[(row * shape.heads + head) * dim..][..dim];
        let low = first_seen(position, shape.window);
        let scores: Vec<f64> = (low..=position)
            .map(|p| {
                let key = &keys[p * width + kv..][..dim];
                q.iter()
                    .zip(key)
                    .map(|(q, k)| f64::from(*q) * f64::from(*k))
                    .sum::<f64>()
                    * f64::from(shape.scale)
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        (0..dim)
            .map(|d| {
                weights
                    .iter()
                    .enumerate()
                    .map(|(i, w)| w * f64::from(values[(low + i) * width + kv + d]))
                    .sum::<f64>()
                    / total
            })
            .collect()
    }

    proptest! {
        #[test]
        fn attention_is_the_softmax_of_its_scores_over_what_a_row_sees(
            start in 0usize..70, rows in 1usize..20, window in prop_oneof![Just(None), (1usize..40).prop_map(Some)]
        ) {
            let shape = shape(window);
            let (layer, blocks, keys, values) = filled(&shape, start + rows, KvType::F32);
            let q = seeded(rows * shape.heads * shape.head_dim, 3);
            let span = SpanRows { first_row: 0, rows, start, blocks: &blocks };
            let out = attend(&q, shape.heads * shape.head_dim, &shape, &layer, &[span]);
            for row in 0..rows {
                for head in 0..shape.heads {
                    let expected = reference(&shape, &q, &keys, &values, start, row, head);
                    let got = &out[(row * shape.heads + head) * shape.head_dim..][..shape.head_dim];
                    for (got, expected) in got.iter().zip(expected) {
                        prop_assert!((f64::from(*got) - expected).abs() < 1e-5);
                    }
                }
            }
        }

        #[test]
        fn neither_chunks_nor_neighbours_change_a_bit(
            split in 1usize..60, kv_type in prop_oneof![Just(KvType::F32), Just(KvType::Bf16)]
        ) {
            let shape = shape(Some(33));
            let rows = 61;
            let (layer, blocks, ..) = filled(&shape, rows, kv_type);
            let width = shape.heads * shape.head_dim;
            let q = seeded(rows * width, 4);
            let whole = attend(&q, width, &shape, &layer, &[SpanRows { first_row: 0, rows, start: 0, blocks: &blocks }]);
            // The two parts swap places in the batch, too.
            let mut swapped = q[split * width..].to_vec();
            swapped.extend_from_slice(&q[..split * width]);
            let parts = attend(&swapped, width, &shape, &layer, &[
                SpanRows { first_row: 0, rows: rows - split, start: split, blocks: &blocks },
                SpanRows { first_row: rows - split, rows: split, start: 0, blocks: &blocks },
            ]);
            prop_assert_eq!(&parts[..(rows - split) * width], &whole[split * width..]);
            prop_assert_eq!(&parts[(rows - split) * width..], &whole[..split * width]);
        }
    }
}
