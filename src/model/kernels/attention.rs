//! Attention of packed rows over KV blocks.
//!
//! A block holds 16 positions. Keys lie transposed (`[kv_head][head_dim][16]`) so that one query
//! meets 16 keys at once; values lie as they come (`[kv_head][16][head_dim]`).
//! Every (row, head) is its own chain over absolute positions: neither chunking nor batching of
//! the rows can change a bit.

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;
use multiversion::multiversion;

use super::SharedOut;
use super::elementwise::{ROUND, exp_inline};
use super::pool::{current_threads, parallel_shares};

/// Positions per KV block.
pub const KV_BLOCK: usize = 16;

/// How many queries share one pass over the keys: of a prompt, and where there are few.
const MANY: usize = 12;
const SOME: usize = 8;
const FEW: usize = 4;

/// The type that K and V are rounded to before any attention reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    F32,
    Bf16,
    /// Keys as bf16; values in 8 bits with one scale for each position and kv head: 127 steps from
    /// 0 to the largest of its numbers. Keys would lose more, as softmax is taken of what they give.
    Bf16I8,
}

impl std::fmt::Display for KvType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Bf16I8 => "bf16-i8",
        })
    }
}

impl KvType {
    /// Bytes of one position's key and value of one kv head.
    pub fn bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => (4 + 4) * head_dim,
            Self::Bf16 => (2 + 2) * head_dim,
            Self::Bf16I8 => (2 + 1) * head_dim + size_of::<f32>(),
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
    F32(Store<f32, f32>),
    Bf16(Store<bf16, bf16>),
    Bf16I8(Store<bf16, i8>),
}

/// `K` and `V`: what one number of a key and of a value is held as.
pub struct Store<K, V> {
    keys: Vec<K>,
    values: Vec<V>,
    /// `[block][kv_head][16]`: what the numbers of a value are to be multiplied by; empty where they
    /// are what they are.
    scales: Vec<f32>,
}

pub trait Stored: Copy + Default + Send + Sync {
    const HELD: Held;
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
}

/// What a type is to code that cannot ask it.
#[derive(PartialEq)]
pub enum Held {
    F32,
    Bf16,
    /// `i8`: steps of a scale.
    Steps,
}

impl Stored for f32 {
    const HELD: Held = Held::F32;
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
    const HELD: Held = Held::Bf16;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl Stored for i8 {
    const HELD: Held = Held::Steps;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        // To the nearest, ties to even.
        ((value + ROUND) - ROUND) as i8
    }
}

impl KvLayer {
    /// Room for `blocks` blocks, zeroed.
    pub fn new(kv_type: KvType, shape: &AttentionShape, blocks: usize) -> Self {
        match kv_type {
            KvType::F32 => Self::F32(Store::new(shape, blocks)),
            KvType::Bf16 => Self::Bf16(Store::new(shape, blocks)),
            KvType::Bf16I8 => Self::Bf16I8(Store::new(shape, blocks)),
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
            Self::Bf16I8(store) => store.write(shape, block, slot, key, value),
        }
    }
}

impl<K: Stored, V: Stored> Store<K, V> {
    fn new(shape: &AttentionShape, blocks: usize) -> Self {
        let len = shape.block_len() * blocks;
        let scales = match V::HELD {
            Held::Steps => shape.kv_heads * KV_BLOCK * blocks,
            Held::F32 | Held::Bf16 => 0,
        };
        Self {
            keys: vec![K::default(); len],
            values: vec![V::default(); len],
            scales: vec![0.0; scales],
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
                keys[d * KV_BLOCK + slot] = K::narrow(*key);
            }
            let value = &value[head * dim..(head + 1) * dim];
            let start = base + (head * KV_BLOCK + slot) * dim;
            let values = &mut self.values[start..start + dim];
            let mut step = 1.0;
            if V::HELD == Held::Steps {
                step = step_of(value);
                let place = (block as usize * shape.kv_heads + head) * KV_BLOCK + slot;
                self.scales[place] = step;
            }
            for (stored, value) in values.iter_mut().zip(value) {
                *stored = V::narrow(*value / step);
            }
        }
    }
}

/// Below this the numbers of a value are taken as zeros: steps so small would make weights that a
/// processor multiplies slowly.
const LEAST_VALUE: f32 = 1e-30;

/// The 127th part of the largest number, so that rounding to it fits in 8 bits; not a number where
/// one of them is not finite, so that whoever reads them learns of it.
fn step_of(value: &[f32]) -> f32 {
    let most = value.iter().fold(0f32, |most, value| most.max(value.abs()));
    if !value.iter().all(|value| value.is_finite()) {
        return f32::NAN;
    }
    if most < LEAST_VALUE {
        0.0
    } else {
        most / 127.0
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
        KvLayer::Bf16I8(store) => attend_store(q, shape, store, spans, &mut out),
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

impl Task<'_> {
    /// About how long it takes, in queries times positions.
    fn work(&self, shape: &AttentionShape) -> usize {
        let end = self.span.start + self.first + self.rows;
        let seen = shape
            .window
            .map_or(end, |window| end.min(window + self.rows));
        self.rows * shape.heads / shape.kv_heads * seen
    }
}

/// Multiply-adds below which one thread does it all.
const PARALLEL_WORK: usize = 1 << 16;

thread_local! {
    /// Scores and sums of one tile, kept for the next: a long prompt has many.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn attend_store<K: Stored, V: Stored>(
    q: &Queries<'_>,
    shape: &AttentionShape,
    store: &Store<K, V>,
    spans: &[SpanRows<'_>],
    out: &mut [f32],
) {
    let group = shape.heads / shape.kv_heads;
    let rows = (MANY / group).max(1);
    let (mut long, mut short) = (Vec::new(), Vec::new());
    for span in spans {
        // Head by head, so that what one task has fetched serves the next.
        for kv_head in 0..shape.kv_heads {
            for first in (0..span.rows).step_by(rows) {
                let tasks = if span.rows > 1 { &mut long } else { &mut short };
                tasks.push(Task {
                    span,
                    first,
                    rows: rows.min(span.rows - first),
                    kv_head,
                });
            }
        }
    }
    let (tasks, ends) = shares(&long, &short, current_threads(), |task| task.work(shape));
    let work: usize = tasks.iter().map(|task| task.work(shape)).sum();
    let out = SharedOut(out.as_mut_ptr());
    let run = |(task, next): (&Task<'_>, Option<&Task<'_>>), scratch: &mut Vec<f32>| {
        let queries: Vec<(usize, usize)> = (0..task.rows * group)
            .map(|i| (task.first + i / group, task.kv_head * group + i % group))
            .collect();
        let emit = |row: usize, head: usize, values: &[f32]| {
            let out = &out;
            let start = (row * shape.heads + head) * shape.head_dim;
            // SAFETY: each (row, head) of the batch belongs to exactly one task and is visited
            // once, so the slices are disjoint and inside `out`.
            #[allow(unsafe_code)]
            let target =
                unsafe { std::slice::from_raw_parts_mut(out.0.add(start), shape.head_dim) };
            target.copy_from_slice(values);
        };
        for queries in queries.chunks(MANY) {
            let attend = match queries.len() {
                0..=FEW => attend_queries::<K, V, FEW>,
                _ if queries.len() <= SOME => attend_queries::<K, V, SOME>,
                _ => attend_queries::<K, V, MANY>,
            };
            attend(q, shape, store, (task, next), queries, scratch, &emit);
        }
    };
    let run = |task: usize| {
        let next = (!ends.contains(&(task + 1))).then(|| tasks[task + 1]);
        SCRATCH.with_borrow_mut(|scratch| run((tasks[task], next), scratch));
    };
    if work * shape.head_dim < PARALLEL_WORK {
        (0..tasks.len()).for_each(run);
    } else {
        let first = |thread: usize, _| thread.checked_sub(1).map_or(0, |before| ends[before]);
        parallel_shares(tasks.len(), first, run);
    }
}

/// An order of all tasks, and where in it the share of each thread ends: the long ones first, so
/// that the short ones can even out who is done early, each thread's side by side, and all shares
/// about as much work.
fn shares<'t, T>(
    long: &'t [T],
    short: &'t [T],
    threads: usize,
    work: impl Fn(&T) -> usize,
) -> (Vec<&'t T>, Vec<usize>) {
    let total = |tasks: &[T]| tasks.iter().map(&work).sum::<usize>();
    let (all_long, all) = (total(long), total(long) + total(short));
    let (mut order, mut ends) = (Vec::with_capacity(long.len() + short.len()), Vec::new());
    let (mut long, mut short) = (long.iter().peekable(), short.iter().peekable());
    let (mut done_long, mut done) = (0, 0);
    for thread in 1..=threads {
        // A task goes to whom more than half of it belongs to.
        let fits = |done: usize, all: usize, task: &T| {
            thread == threads || (2 * done + work(task)) * threads < 2 * all * thread
        };
        while let Some(task) = long.next_if(|task| fits(done_long, all_long, task)) {
            done_long += work(task);
            done += work(task);
            order.push(task);
        }
        while let Some(task) = short.next_if(|task| fits(done, all, task)) {
            done += work(task);
            order.push(task);
        }
        ends.push(order.len());
    }
    (order, ends)
}

fn attend_queries<K: Stored, V: Stored, const N: usize>(
    q: &Queries<'_>,
    shape: &AttentionShape,
    store: &Store<K, V>,
    (task, next): (&Task<'_>, Option<&Task<'_>>),
    queries: &[(usize, usize)],
    scratch: &mut Vec<f32>,
    emit: &dyn Fn(usize, usize, &[f32]),
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
    // An odd number of lines from one query to the next: they are read side by side, and would
    // otherwise push each other out of the same places of the first cache.
    let stride = ((width / KV_BLOCK) | 1) * KV_BLOCK;
    let room = N * (stride + 2 * dim);
    scratch.resize(scratch.len().max(room), 0.0);
    let (scores, rest) = scratch[..room].split_at_mut(N * stride);
    let (sums, tile) = rest.split_at_mut(N * dim);
    sums.fill(0.0);
    // What each query sees, and what all of them see.
    let seen = |row: usize| first_seen(span.start + row, shape.window)..span.start + row + 1;
    let mut common = 0..usize::MAX;
    for (row, _) in queries {
        let seen = seen(*row);
        common = common.start.max(seen.start)..common.end.min(seen.end);
    }
    let common = common.start..common.end.max(common.start);
    // [head_dim, N]. Absent queries repeat the first: same cost, one code path.
    for i in 0..N {
        let (row, head) = queries[if i < queries.len() { i } else { 0 }];
        let query = &q.numbers[(span.first_row + row) * q.width + head * dim..][..dim];
        for (tile, number) in tile.chunks_exact_mut(N).zip(query) {
            tile[i] = *number;
        }
    }
    let view = BlockView::of_task(task, shape);
    let coming = Coming {
        store,
        view: &view,
        blocks: first_block..width / KV_BLOCK,
        next: next.map(|task| {
            let first = first_seen(task.span.start + task.first, shape.window) / KV_BLOCK;
            let end = task.span.start + task.first + task.rows;
            (
                BlockView::of_task(task, shape),
                first..end.div_ceil(KV_BLOCK),
            )
        }),
    };
    let peaks = score_blocks::<K, V, N>(&coming, tile, shape.scale, &common, scores);
    let mut totals = [0f32; N];
    for (i, (row, _)) in queries.iter().enumerate() {
        let seen = seen(*row);
        let scores = &mut scores[i * stride..][..seen.end];
        totals[i] = soften(scores, seen.start, &peaks.of_query[i], &peaks.positions);
        if V::HELD == Held::Steps {
            // Multiplied once for all numbers of a value. A block's other positions are not read.
            let blocks = scores.chunks_mut(KV_BLOCK).enumerate();
            for (block, scores) in blocks.skip(seen.start / KV_BLOCK) {
                let scales = view.scales(&store.scales, block);
                for (score, scale) in scores.iter_mut().zip(scales) {
                    *score *= scale;
                }
            }
        }
    }
    let weights: [&[f32]; N] = std::array::from_fn(|i| {
        let i = if i < queries.len() { i } else { 0 };
        &scores[i * stride..][..width]
    });
    for (i, (row, _)) in queries.iter().enumerate() {
        let before = seen(*row).start..common.start.min(seen(*row).end);
        let sums = &mut sums[i * dim..(i + 1) * dim];
        weigh_values(&coming, &[weights[i]], before, sums);
    }
    weigh_values(&coming, &weights, common.clone(), sums);
    for (i, (row, head)) in queries.iter().enumerate() {
        let sums = &mut sums[i * dim..(i + 1) * dim];
        let after = common.end.max(seen(*row).start)..seen(*row).end;
        weigh_values(&coming, &[weights[i]], after, sums);
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
    kv_head: usize,
    kv_heads: usize,
    blocks: &'a [u32],
}

impl<'a> BlockView<'a> {
    fn of_task(task: &Task<'a>, shape: &AttentionShape) -> Self {
        Self {
            block_len: shape.block_len(),
            head_offset: task.kv_head * shape.head_dim * KV_BLOCK,
            dim: shape.head_dim,
            kv_head: task.kv_head,
            kv_heads: shape.kv_heads,
            blocks: task.span.blocks,
        }
    }

    /// Of the values of a block, by slot.
    #[inline(always)]
    fn scales<'s>(&self, scales: &'s [f32], block: usize) -> &'s [f32] {
        let start = (self.blocks[block] as usize * self.kv_heads + self.kv_head) * KV_BLOCK;
        &scales[start..start + KV_BLOCK]
    }

    #[inline(always)]
    fn of<'s, T>(&self, data: &'s [T], block: usize) -> &'s [T] {
        let start = self.blocks[block] as usize * self.block_len + self.head_offset;
        &data[start..start + self.dim * KV_BLOCK]
    }
}

/// What is read, in order: the keys of a task's blocks, their values, and then the keys of the task
/// after it. Blocks lie anywhere, so that the processor sees none of them coming.
struct Coming<'a, K, V> {
    store: &'a Store<K, V>,
    view: &'a BlockView<'a>,
    blocks: Range<usize>,
    next: Option<(BlockView<'a>, Range<usize>)>,
}

/// How many blocks ahead of its use one is fetched into this core's second cache.
const BLOCKS_AHEAD: usize = 8;

/// A block that is read soon.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ahead {
    from: *const u8,
    /// Bytes of one of its numbers.
    number: usize,
}

impl Ahead {
    fn of<T>(block: &[T]) -> Self {
        Self {
            from: block.as_ptr().cast(),
            number: size_of::<T>(),
        }
    }
}

impl<K: Stored, V: Stored> Coming<'_, K, V> {
    /// What is to be fetched while the keys of `block` are read.
    fn ahead_of_keys(&self, block: usize) -> Ahead {
        self.at(block - self.blocks.start + BLOCKS_AHEAD)
    }

    /// The same for its values.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn ahead_of_values(&self, block: usize) -> Ahead {
        self.at(self.blocks.len() + block - self.blocks.start + BLOCKS_AHEAD)
    }

    #[inline(always)]
    fn at(&self, index: usize) -> Ahead {
        let (blocks, view) = (&self.blocks, self.view);
        if let Some(block) = blocks.clone().nth(index) {
            return Ahead::of(view.of(&self.store.keys, block));
        }
        let index = index - blocks.len();
        if let Some(block) = blocks.clone().nth(index) {
            return Ahead::of(view.of(&self.store.values, block));
        }
        let index = index - blocks.len();
        let next = self.next.as_ref();
        let next = next.and_then(|(view, blocks)| Some((view, blocks.clone().nth(index)?)));
        match next {
            Some((view, block)) => Ahead::of(view.of(&self.store.keys, block)),
            // Nothing comes: one block over and over.
            None => Ahead::of(&self.store.keys),
        }
    }
}

/// The highest scores of each query, lane by lane, at some positions that all of them see.
struct Peaks<const N: usize> {
    of_query: [[f32; KV_BLOCK]; N],
    positions: Range<usize>,
}

/// The scores of `N` queries, `[head_dim, N]`, against all blocks, and where they peak at the
/// positions of `common`: `scores` is `[N, stride]`.
fn score_blocks<K: Stored, V: Stored, const N: usize>(
    coming: &Coming<'_, K, V>,
    tile: &[f32],
    scale: f32,
    common: &Range<usize>,
    scores: &mut [f32],
) -> Peaks<N> {
    let mut peaks = Peaks {
        of_query: [[f32::NEG_INFINITY; KV_BLOCK]; N],
        positions: common.start..common.start,
    };
    // Two blocks at a time: more chains than one multiply-add takes cycles.
    let end = coming.blocks.end;
    for block in coming.blocks.clone().step_by(2) {
        let blocks = [block, (block + 1).min(end - 1)];
        let [first, last] = blocks.map(|block| block * KV_BLOCK);
        let seen_by_all = common.start <= first && last + KV_BLOCK <= common.end;
        if seen_by_all {
            let start = match peaks.positions.is_empty() {
                true => first,
                false => peaks.positions.start,
            };
            peaks.positions = start..last + KV_BLOCK;
        }
        let keys = |block: usize| coming.view.of(&coming.store.keys, block);
        let pair = Pair {
            keys: blocks.map(keys),
            next: blocks.map(|block| keys((block + 2).min(end - 1))),
            far: blocks.map(|block| coming.ahead_of_keys(block)),
            positions: [first, last],
        };
        let peaks = seen_by_all.then_some(&mut peaks.of_query);
        score_pair(&pair, tile, scale, scores, peaks);
    }
    peaks
}

/// Two blocks of keys.
struct Pair<'a, T> {
    keys: [&'a [T]; 2],
    /// Those that are fetched meanwhile from near, and from afar.
    next: [&'a [T]; 2],
    far: [Ahead; 2],
    /// The first position of each.
    positions: [usize; 2],
}

/// `scale q.k` of `N` queries, `[head_dim, N]`, and the keys of two blocks, at their positions of
/// `scores`, `[N, stride]`; where they are higher than `peaks`, there too.
#[inline]
fn score_pair<T: Stored, const N: usize>(
    pair: &Pair<'_, T>,
    tile: &[f32],
    scale: f32,
    scores: &mut [f32],
    peaks: Option<&mut [[f32; KV_BLOCK]; N]>,
) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the features were just detected.
        #[allow(unsafe_code)]
        return unsafe { avx512::score_pair(pair, tile, scale, scores, peaks) };
    }
    score_pair_plain(pair, tile, scale, scores, peaks);
}

/// The definition; the variant for AVX-512 gives the same bits.
#[multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
fn score_pair_plain<T: Stored, const N: usize>(
    pair: &Pair<'_, T>,
    tile: &[f32],
    scale: f32,
    scores: &mut [f32],
    peaks: Option<&mut [[f32; KV_BLOCK]; N]>,
) {
    let mut sums = [[[0f32; KV_BLOCK]; N]; 2];
    for (d, tile) in tile.chunks_exact(N).enumerate() {
        for (sums, keys) in sums.iter_mut().zip(pair.keys) {
            let keys = &keys[d * KV_BLOCK..(d + 1) * KV_BLOCK];
            let mut wide = [0f32; KV_BLOCK];
            for j in 0..KV_BLOCK {
                wide[j] = keys[j].widen();
            }
            for i in 0..N {
                let q = tile[i];
                for j in 0..KV_BLOCK {
                    sums[i][j] = q.mul_add(wide[j], sums[i][j]);
                }
            }
        }
    }
    let stride = scores.len() / N;
    let mut highest = [[f32::NEG_INFINITY; KV_BLOCK]; N];
    for (sums, position) in sums.iter().zip(pair.positions) {
        for (i, sums) in sums.iter().enumerate() {
            let scores = &mut scores[i * stride + position..][..KV_BLOCK];
            for j in 0..KV_BLOCK {
                scores[j] = sums[j] * scale;
                highest[i][j] = higher(highest[i][j], scores[j]);
            }
        }
    }
    if let Some(peaks) = peaks {
        for (peaks, highest) in peaks
            .as_flattened_mut()
            .iter_mut()
            .zip(highest.as_flattened())
        {
            *peaks = higher(*peaks, *highest);
        }
    }
}

/// The higher of two; the first, where one is not a number.
#[inline(always)]
fn higher(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Turns `scores[low..]` into `e^(score - max)` and returns their sum. At the positions of `known`
/// the scores are no higher than `peaks`, and as high somewhere. A score that is not a number makes
/// the sum none.
#[multiversion(targets(
    "x86_64+avx512f+avx512vl+avx512dq+fma",
    "x86_64+avx2+fma",
    "aarch64+neon"
))]
fn soften(scores: &mut [f32], low: usize, peaks: &[f32; KV_BLOCK], known: &Range<usize>) -> f32 {
    let mut peaks = *peaks;
    let [start, end] = [known.start, known.end].map(|at| at.clamp(low, scores.len()));
    for rest in [&scores[low..start], &scores[end..]] {
        let mut chunks = rest.chunks_exact(KV_BLOCK);
        for chunk in &mut chunks {
            for j in 0..KV_BLOCK {
                peaks[j] = higher(peaks[j], chunk[j]);
            }
        }
        for (j, score) in chunks.remainder().iter().enumerate() {
            peaks[j] = higher(peaks[j], *score);
        }
    }
    let mut half = KV_BLOCK / 2;
    while half > 0 {
        for j in 0..half {
            peaks[j] = higher(peaks[j], peaks[j + half]);
        }
        half /= 2;
    }
    let max = peaks[0];
    let mut lanes = [0f32; KV_BLOCK];
    let mut chunks = scores[low..].chunks_exact_mut(KV_BLOCK);
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
/// queries at once: `out` is `[N, head_dim]`, `weights` are by position.
fn weigh_values<K: Stored, V: Stored, const N: usize>(
    coming: &Coming<'_, K, V>,
    weights: &[&[f32]; N],
    positions: Range<usize>,
    out: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() && coming.view.dim.is_multiple_of(WIDTH) {
        // SAFETY: the features were just detected.
        #[allow(unsafe_code)]
        return unsafe { avx512::weigh_values(coming, weights, positions, out) };
    }
    weigh_values_plain(&coming.store.values, coming.view, weights, positions, out);
}

/// The definition; the variant for AVX-512 gives the same bits.
#[multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
fn weigh_values_plain<T: Stored, const N: usize>(
    stored: &[T],
    view: &BlockView<'_>,
    weights: &[&[f32]; N],
    positions: Range<usize>,
    out: &mut [f32],
) {
    let dim = view.dim;
    for first in (0..dim).step_by(WIDTH) {
        let width = WIDTH.min(dim - first);
        for position in positions.clone() {
            let values = view.of(stored, position / KV_BLOCK);
            let row = &values[position % KV_BLOCK * dim + first..][..width];
            for i in 0..N {
                let weight = weights[i][position];
                let sums = &mut out[i * dim + first..][..width];
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum = weight.mul_add(value.widen(), *sum);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("fma")
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx512 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use super::super::{LINE, fetch_far_line, fetch_line};
    use super::{Coming, Held, KV_BLOCK, Pair, Stored, WIDTH};

    /// Numbers of a key between two looks ahead: of one byte each, those of sixteen fill a line.
    const LOOK: usize = LINE / KV_BLOCK;

    /// Sixteen stored numbers as f32.
    #[inline]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn load<T: Stored>(from: *const T) -> __m512 {
        // SAFETY: the caller has sixteen numbers of `T` there, and `HELD` says what they are.
        unsafe {
            match T::HELD {
                Held::F32 => _mm512_loadu_ps(from.cast()),
                Held::Steps => {
                    let steps = _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()));
                    _mm512_cvtepi32_ps(steps)
                }
                Held::Bf16 => {
                    let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
                }
            }
        }
    }

    /// Thirty-two stored numbers as f32: those of bf16 with even places first, which takes no more
    /// than a shift and a mask.
    #[inline]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn load_pair<T: Stored>(from: *const T) -> [__m512; 2] {
        // SAFETY: the caller has thirty-two numbers of `T` there.
        unsafe {
            if T::HELD != Held::Bf16 {
                return [load(from), load(from.add(16))];
            }
            let both = _mm512_loadu_si512(from.cast());
            let odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)),
                _mm512_castsi512_ps(odd),
            ]
        }
    }

    /// Thirty-two numbers as `load_pair` places those of `T`.
    #[inline]
    #[target_feature(enable = "avx512f,fma")]
    fn as_loaded<T: Stored>([low, high]: [__m512; 2]) -> [__m512; 2] {
        if T::HELD != Held::Bf16 {
            return [low, high];
        }
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        [
            _mm512_permutex2var_ps(low, even, high),
            _mm512_permutex2var_ps(low, odd, high),
        ]
    }

    /// And back.
    #[inline]
    #[target_feature(enable = "avx512f,fma")]
    fn in_order<T: Stored>([even, odd]: [__m512; 2]) -> [__m512; 2] {
        if T::HELD != Held::Bf16 {
            return [even, odd];
        }
        let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        [
            _mm512_permutex2var_ps(even, first, odd),
            _mm512_permutex2var_ps(even, second, odd),
        ]
    }

    #[target_feature(enable = "avx512f,fma")]
    pub(super) unsafe fn score_pair<T: Stored, const N: usize>(
        pair: &Pair<'_, T>,
        tile: &[f32],
        scale: f32,
        scores: &mut [f32],
        peaks: Option<&mut [[f32; KV_BLOCK]; N]>,
    ) {
        let stride = scores.len() / N;
        let room = tile.len() / N * KV_BLOCK;
        assert!(pair.keys.iter().all(|keys| keys.len() >= room));
        assert!(pair.positions.iter().all(|at| at + KV_BLOCK <= stride));
        let [keys, next] = [pair.keys, pair.next].map(|keys| keys.map(<[T]>::as_ptr));
        let mut sums = [[_mm512_setzero_ps(); N]; 2];
        for (block, queries) in tile.chunks(LOOK * N).enumerate() {
            let start = block * LOOK;
            // A block's numbers are too few for the processor to see the next one's coming.
            for next in next {
                let next = next.wrapping_add(start * KV_BLOCK).cast::<u8>();
                for line in 0..size_of::<T>() {
                    fetch_line(next.wrapping_add(line * LINE));
                }
            }
            for far in pair.far {
                let mut at = far.from.wrapping_add(start * KV_BLOCK * far.number);
                for _ in 0..far.number {
                    fetch_far_line(at);
                    at = at.wrapping_add(LINE);
                }
            }
            for (d, queries) in queries.chunks_exact(N).enumerate() {
                // SAFETY: sixteen keys per number of a query are inside each block.
                unsafe {
                    let at = (start + d) * KV_BLOCK;
                    let keys = [load(keys[0].add(at)), load(keys[1].add(at))];
                    for (i, query) in queries.iter().enumerate() {
                        let query = _mm512_set1_ps(*query);
                        sums[0][i] = _mm512_fmadd_ps(query, keys[0], sums[0][i]);
                        sums[1][i] = _mm512_fmadd_ps(query, keys[1], sums[1][i]);
                    }
                }
            }
        }
        let scale = _mm512_set1_ps(scale);
        for (sums, position) in sums.iter_mut().zip(pair.positions) {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_mul_ps(*sum, scale);
                // SAFETY: sixteen numbers from `position` on are inside each stride.
                unsafe { _mm512_storeu_ps(scores.as_mut_ptr().add(i * stride + position), *sum) };
            }
        }
        for (i, peaks) in peaks.into_iter().flatten().enumerate() {
            // Of two of which one is not a number, the second is taken.
            // SAFETY: there is room for sixteen.
            unsafe {
                let highest = _mm512_max_ps(sums[0][i], _mm512_loadu_ps(peaks.as_ptr()));
                let highest = _mm512_max_ps(sums[1][i], highest);
                _mm512_storeu_ps(peaks.as_mut_ptr(), highest);
            }
        }
    }

    #[target_feature(enable = "avx512f,fma")]
    pub(super) unsafe fn weigh_values<K: Stored, V: Stored, const N: usize>(
        coming: &Coming<'_, K, V>,
        weights: &[&[f32]; N],
        positions: Range<usize>,
        out: &mut [f32],
    ) {
        let (stored, view) = (coming.store.values.as_slice(), coming.view);
        let dim = view.dim;
        assert!(dim.is_multiple_of(WIDTH) && out.len() >= N * dim);
        assert!(weights.iter().all(|weights| weights.len() >= positions.end));
        let weights = weights.map(<[f32]>::as_ptr);
        let last = positions.end.saturating_sub(1);
        for first in (0..dim).step_by(WIDTH) {
            // `first` and 32 more are inside each of the `N` sums of `dim`.
            let at = |i: usize, half: usize| i * dim + first + half * 16;
            let mut sums = [[_mm512_setzero_ps(); 2]; N];
            for (i, sums) in sums.iter_mut().enumerate() {
                // SAFETY: thirty-two numbers are there.
                *sums = as_loaded::<V>(unsafe {
                    [
                        _mm512_loadu_ps(out.as_ptr().add(at(i, 0))),
                        _mm512_loadu_ps(out.as_ptr().add(at(i, 1))),
                    ]
                });
            }
            let mut position = positions.start;
            while position < positions.end {
                let values = view.of(stored, position / KV_BLOCK);
                let end = positions.end.min((position / KV_BLOCK + 1) * KV_BLOCK);
                let next = view.of(stored, end.min(last) / KV_BLOCK);
                let far = coming.ahead_of_values(position / KV_BLOCK);
                // Of each of its rows the part that this turn is about: a line, or two.
                let (row, wide) = (dim * far.number, WIDTH * far.number > LINE);
                let mut far = far.from.wrapping_add(first * far.number);
                for position in position..end {
                    fetch_far_line(far);
                    if wide {
                        fetch_far_line(far.wrapping_add(LINE));
                    }
                    far = far.wrapping_add(row);
                    fetch_line(
                        next.as_ptr()
                            .wrapping_add(position % KV_BLOCK * dim + first),
                    );
                    // SAFETY: a block holds sixteen positions of `dim` values, and every weight
                    // up to `positions.end` is there.
                    unsafe {
                        let row = values.as_ptr().add(position % KV_BLOCK * dim + first);
                        let row = load_pair(row);
                        for i in 0..N {
                            let weight = _mm512_set1_ps(*weights[i].add(position));
                            sums[i][0] = _mm512_fmadd_ps(weight, row[0], sums[i][0]);
                            sums[i][1] = _mm512_fmadd_ps(weight, row[1], sums[i][1]);
                        }
                    }
                }
                position = end;
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (half, sum) in in_order::<V>(sums).into_iter().enumerate() {
                    // SAFETY: room for sixteen numbers is there.
                    unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(at(i, half)), sum) };
                }
            }
        }
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

    /// What every head reads of one position that holds `value` with values in 8 bits.
    fn read_in_8_bits(shape: &AttentionShape, value: &[f32]) -> Vec<f32> {
        let mut layer = KvLayer::new(KvType::Bf16I8, shape, 1);
        layer.write(shape, 0, 0, &vec![0.5; value.len()], value);
        let q = vec![0.5; shape.heads * shape.head_dim];
        let span = SpanRows {
            first_row: 0,
            rows: 1,
            start: 0,
            blocks: &[0],
        };
        attend(&q, q.len(), shape, &layer, &[span])
    }

    #[test]
    fn a_value_that_is_not_finite_is_not_lost_in_8_bits() {
        let shape = shape(None);
        for strange in [f32::NAN, f32::INFINITY] {
            let mut value = vec![0.25; shape.kv_width()];
            value[3] = strange;
            let out = read_in_8_bits(&shape, &value);
            assert!(!out[3].is_finite());
            // The other kv head is as it was.
            assert!((out[3 * shape.head_dim] - 0.25).abs() < 1e-6);
        }
    }

    #[test]
    fn values_too_small_for_a_step_are_zeros() {
        let shape = shape(None);
        for small in [0.0, 1e-40] {
            let out = read_in_8_bits(&shape, &vec![small; shape.kv_width()]);
            assert!(out.iter().all(|out| *out == 0.0), "{small}");
        }
    }

    #[test]
    fn threads_get_even_shares_in_which_long_tasks_come_first() {
        // Eight streams that decode among three pieces of a prompt.
        let (long, short) = ([100, 120, 100], [10, 10, 10, 10, 10, 10, 10, 40]);
        for threads in 1..6 {
            let (order, ends) = shares(&long, &short, threads, |work| *work);
            assert_eq!((ends.len(), ends.last()), (threads, Some(&order.len())));
            let mut all: Vec<usize> = order.iter().map(|work| **work).collect();
            let mut start = 0;
            for end in ends {
                let share = &all[start..end];
                let even = 430 / threads;
                let total = share.iter().sum::<usize>();
                assert!(total.abs_diff(even) <= 60, "{threads}: {share:?}");
                assert!(share.is_sorted_by_key(|work| *work < 100), "{share:?}");
                start = end;
            }
            all.sort_unstable();
            let mut expected = [long.as_slice(), &short].concat();
            expected.sort_unstable();
            assert_eq!(all, expected);
        }
    }

    #[test]
    fn what_is_fetched_ahead_is_what_is_read_later() {
        let shape = shape(None);
        let positions = 10 * KV_BLOCK;
        let (layer, blocks, ..) = filled(&shape, positions, KvType::Bf16);
        let KvLayer::Bf16(store) = &layer else {
            unreachable!("asked for above")
        };
        let span = SpanRows {
            first_row: 0,
            rows: 1,
            start: positions - 1,
            blocks: &blocks,
        };
        let [view, next] = [0, 1].map(|kv_head| {
            let task = Task {
                span: &span,
                first: 0,
                rows: 1,
                kv_head,
            };
            BlockView::of_task(&task, &shape)
        });
        let keys = |view: &BlockView<'_>, block| Ahead::of(view.of(&store.keys, block));
        let values = |block| Ahead::of(view.of(&store.values, block));
        let expected = [keys(&view, 8), values(0), values(8), keys(&next, 7)];
        let coming = Coming {
            store,
            view: &view,
            blocks: 0..10,
            next: Some((next, 0..10)),
        };
        let ahead = [0, 2, 10, 19].map(|index| coming.at(index + BLOCKS_AHEAD));
        assert_eq!(ahead, expected);
        assert_eq!(coming.ahead_of_keys(2), values(0));
        // After the last task nothing comes.
        let last = Coming {
            next: None,
            ..coming
        };
        assert_eq!(last.at(27), Ahead::of(&store.keys));
    }

    /// The second kv head's keys and values, by the machine's kernels and by their definition.
    fn compare_with_plain<K: Stored, V: Stored>(
        store: &Store<K, V>,
        shape: &AttentionShape,
        blocks: &[u32],
        positions: usize,
    ) {
        let dim = shape.head_dim;
        let span = SpanRows {
            first_row: 0,
            rows: 1,
            start: positions - 1,
            blocks,
        };
        let task = Task {
            span: &span,
            first: 0,
            rows: 1,
            kv_head: 1,
        };
        let view = BlockView::of_task(&task, shape);
        let coming = Coming {
            store,
            view: &view,
            blocks: 0..blocks.len(),
            next: Some((BlockView::of_task(&task, shape), 0..blocks.len())),
        };
        let tile = seeded(dim * MANY, 5);
        let last = blocks.len() - 1;
        let keys = [0, last].map(|block| view.of(&store.keys, block));
        let pair = Pair {
            keys,
            next: keys,
            far: [0, last].map(|block| coming.ahead_of_keys(block)),
            positions: [KV_BLOCK, 0],
        };
        let scored = [true, false].map(|plain| {
            let mut scores = [[0f32; 2 * KV_BLOCK]; MANY];
            let mut peaks = [[0.25f32; KV_BLOCK]; MANY];
            let score = if plain { score_pair_plain } else { score_pair };
            score(
                &pair,
                &tile,
                0.2,
                scores.as_flattened_mut(),
                Some(&mut peaks),
            );
            (scores, peaks)
        });
        assert_eq!(scored[0], scored[1]);
        let [(scores, peaks), _] = scored;
        for (scores, peaks) in scores.iter().zip(peaks) {
            for (j, peak) in peaks.iter().enumerate() {
                let scores = [scores[j], scores[KV_BLOCK + j]];
                assert_eq!(*peak, scores.into_iter().fold(0.25, f32::max));
            }
        }
        let weights: [Vec<f32>; MANY] = std::array::from_fn(|i| seeded(positions, 50 + i as u32));
        let weights = weights.each_ref().map(Vec::as_slice);
        let positions = positions / 3..positions;
        let mut sums = [(); 2].map(|()| seeded(MANY * dim, 9));
        weigh_values(&coming, &weights, positions.clone(), &mut sums[0]);
        weigh_values_plain(&store.values, &view, &weights, positions, &mut sums[1]);
        assert_eq!(sums[0], sums[1]);
    }

    proptest! {
        #[test]
        fn attention_is_the_softmax_of_its_scores_over_what_a_row_sees(
            start in 0usize..70, rows in 1usize..20, window in prop_oneof![Just(None), (1usize..40).prop_map(Some)],
            kv_type in prop_oneof![Just(KvType::F32), Just(KvType::Bf16I8)]
        ) {
            let shape = shape(window);
            let (layer, blocks, keys, mut values) = filled(&shape, start + rows, kv_type);
            let keys: Vec<f32> = match kv_type {
                KvType::F32 => keys,
                _ => keys.iter().map(|key| bf16::from_f32(*key).to_f32()).collect(),
            };
            if kv_type == KvType::Bf16I8 {
                for value in values.chunks_exact_mut(shape.head_dim) {
                    let step = value.iter().fold(0f32, |most, v| most.max(v.abs())) / 127.0;
                    for value in value {
                        *value = (*value / step).round_ties_even() * step;
                    }
                }
            }
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
        fn the_plain_definition_gives_the_bits_of_this_machine(
            positions in 1usize..70, dim in prop_oneof![Just(32), Just(64), Just(40)]
        ) {
            let shape = AttentionShape { head_dim: dim, ..shape(None) };
            for kv_type in [KvType::F32, KvType::Bf16, KvType::Bf16I8] {
                let (layer, blocks, ..) = filled(&shape, positions, kv_type);
                match &layer {
                    KvLayer::F32(store) => compare_with_plain(store, &shape, &blocks, positions),
                    KvLayer::Bf16(store) => compare_with_plain(store, &shape, &blocks, positions),
                    KvLayer::Bf16I8(store) => compare_with_plain(store, &shape, &blocks, positions),
                }
            }
        }

        #[test]
        fn neither_chunks_nor_neighbours_change_a_bit(
            split in 1usize..60, head_dim in prop_oneof![Just(40), Just(64)],
            kv_type in prop_oneof![Just(KvType::F32), Just(KvType::Bf16), Just(KvType::Bf16I8)]
        ) {
            let shape = AttentionShape { head_dim, ..shape(Some(33)) };
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
