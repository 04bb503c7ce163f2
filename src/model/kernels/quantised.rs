//! `y = x W^T` for weights of 4 or 8 bits, as the file holds them: blocks of 32 inputs that share a
//! scale, and with 4 bits a minimum. The input is rounded to 8 bits per block of 32 as well, so a
//! block's sum is an exact integer; each output is then one chain of fused multiply-adds over the
//! blocks, in their order.
//!
//! With `W = d q + m` and `x = s p`: `y = sum over blocks of s d (p . q) + m s sum(p)`
//! (the formats are llama.cpp's Q4_1 and Q8_0; the rounding of `x` is its Q8_1).

use std::cell::Cell;

use half::f16;
use rayon::prelude::*;

use super::elementwise::ROUND;
use super::pool::{current_threads, parallel, parallel_long, pieces_of};
use super::{SharedOut, emit, store};

/// Inputs that share a scale.
pub const QUANT_BLOCK: usize = 32;
/// Outputs per panel: two AVX-512 registers of sums.
const PANEL: usize = 32;
/// Rows that share a load of weights, at most: their sums and exact sums fill the registers.
const MOST_ROWS: usize = 6;
/// Outputs per register.
const LANES: usize = 16;
/// Inputs per lane of one integer product.
const DEPTH: usize = 4;
const GROUPS: usize = QUANT_BLOCK / DEPTH;
const SCALES: usize = PANEL * 2;
/// Below this many multiply-adds a product stays on one thread.
const PARALLEL_WORK: usize = 1 << 16;
/// Below this many numbers they are rounded on one thread.
const PARALLEL_ROUNDING: usize = 1 << 13;

/// How inputs become bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To 8 bits: within 1/254 of the block's largest number.
    Once,
    /// What that leaves over is rounded again and multiplied beside it, which gives 16 bits for
    /// twice the work: for inputs of which a few are far larger than the rest.
    Twice,
}

impl Rounding {
    /// Rounded rows per row.
    fn parts(self) -> usize {
        match self {
            Self::Once => 1,
            Self::Twice => 2,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantKind {
    /// `d q + m`, `q` from 0 to 15.
    Q4_1,
    /// `d q`, `q` from -128 to 127.
    Q8_0,
}

impl QuantKind {
    /// Bytes of a block of 32 as GGUF stores it.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q4_1 => 2 + 2 + QUANT_BLOCK / 2,
            Self::Q8_0 => 2 + QUANT_BLOCK,
        }
    }

    /// The largest number that a block can hold, its scale and minimum being of 16 bits.
    pub fn most(self) -> f32 {
        let largest = f16::MAX.to_f32();
        match self {
            Self::Q4_1 => largest,
            Self::Q8_0 => largest * 127.0,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_1 => "q4_1",
            Self::Q8_0 => "q8_0",
        }
    }

    fn quants(self) -> usize {
        match self {
            Self::Q4_1 => PANEL * QUANT_BLOCK / 2,
            Self::Q8_0 => PANEL * QUANT_BLOCK,
        }
    }

    /// Bytes of one block of a panel: quants, scales, and minima where there are any.
    fn record(self) -> usize {
        match self {
            Self::Q4_1 => self.quants() + 2 * SCALES,
            Self::Q8_0 => self.quants() + SCALES,
        }
    }
}

/// A weight matrix `[outputs, inputs]`, held once: `[outputs / 32][inputs / 32]` records.
///
/// A record holds, for each half of 16 outputs and each group of four inputs, 16 times four
/// weights side by side: one integer product takes four inputs of 16 outputs at a time. With 4
/// bits the second half lies in the high nibbles of the first. Q8_0 is stored with 128 added.
pub(super) struct QuantMatrix {
    outputs: usize,
    inputs: usize,
    kind: QuantKind,
    rounding: Rounding,
    records: Records,
}

/// Bytes that begin at an address divisible by 64, a cache line.
#[derive(Default)]
struct Records {
    lines: Vec<Line>,
    bytes: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl Records {
    const EMPTY: Self = Self {
        lines: Vec::new(),
        bytes: 0,
    };

    fn zeroed(bytes: usize) -> Self {
        Self {
            lines: vec![Line([0; 64]); bytes.div_ceil(64)],
            bytes,
        }
    }

    /// Makes room; what is there stays.
    fn at_least(&mut self, bytes: usize) {
        if self.bytes < bytes {
            self.lines.resize(bytes.div_ceil(64), Line([0; 64]));
            self.bytes = bytes;
        }
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: lines are plain bytes, one after another.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.bytes)
        }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.bytes)
        }
    }
}

/// One block of a row: `value = scale * quant + minimum`.
#[derive(Clone, Copy)]
struct Block {
    scale: f16,
    minimum: f16,
    /// From 0 to 15, or -128 to 127.
    quants: [i16; QUANT_BLOCK],
}

impl Block {
    const ZERO: Self = Self {
        scale: f16::ZERO,
        minimum: f16::ZERO,
        quants: [0; QUANT_BLOCK],
    };

    /// As GGUF stores it.
    fn read(kind: QuantKind, bytes: &[u8]) -> Self {
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut block = Self {
            scale: half(0),
            ..Self::ZERO
        };
        match kind {
            QuantKind::Q4_1 => {
                block.minimum = half(2);
                for (index, byte) in bytes[4..].iter().enumerate() {
                    block.quants[index] = i16::from(byte & 15);
                    block.quants[index + QUANT_BLOCK / 2] = i16::from(byte >> 4);
                }
            }
            QuantKind::Q8_0 => {
                for (quant, byte) in block.quants.iter_mut().zip(&bytes[2..]) {
                    *quant = i16::from(*byte as i8);
                }
            }
        }
        block
    }

    /// 32 numbers rounded.
    fn nearest(kind: QuantKind, values: &[f32]) -> Self {
        match kind {
            QuantKind::Q4_1 => Self::between_ends(values),
            QuantKind::Q8_0 => Self::around_zero(values),
        }
    }

    /// To 4 bits: in steps from the smallest to the largest.
    fn between_ends(values: &[f32]) -> Self {
        let ends = |(low, high): (f32, f32), value: &f32| (low.min(*value), high.max(*value));
        let (low, high) = values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), ends);
        let mut block = Self {
            scale: f16::from_f32((high - low) / 15.0),
            minimum: f16::from_f32(low),
            ..Self::ZERO
        };
        let (inverse, minimum) = (inverse(block.scale), block.minimum.to_f32());
        for (quant, value) in block.quants.iter_mut().zip(values) {
            let steps = (value - minimum) * inverse;
            *quant = steps.round_ties_even().clamp(0.0, 15.0) as i16;
        }
        block
    }

    /// To 8 bits: the scale that takes the largest to 127.
    fn around_zero(values: &[f32]) -> Self {
        let most = values
            .iter()
            .fold(0f32, |most, value| most.max(value.abs()));
        let mut block = Self {
            scale: f16::from_f32(most / 127.0),
            ..Self::ZERO
        };
        let inverse = inverse(block.scale);
        for (quant, value) in block.quants.iter_mut().zip(values) {
            *quant = (value * inverse).round_ties_even().clamp(-127.0, 127.0) as i16;
        }
        block
    }
}

fn inverse(scale: f16) -> f32 {
    match scale.to_f32() {
        0.0 => 0.0,
        scale => 1.0 / scale,
    }
}

impl QuantMatrix {
    /// Packs rows as GGUF stores them: `outputs` times `inputs / 32` blocks.
    pub(super) fn pack(blocks: &[u8], outputs: usize, inputs: usize, kind: QuantKind) -> Self {
        let per_row = inputs / QUANT_BLOCK;
        let row_bytes = per_row * kind.block_bytes();
        assert!(inputs.is_multiple_of(QUANT_BLOCK), "inputs are in blocks");
        assert_eq!(
            blocks.len(),
            outputs * row_bytes,
            "blocks are [outputs, inputs / 32]"
        );
        Self::fill(outputs, inputs, kind, |row, block| {
            let at = row * row_bytes + block * kind.block_bytes();
            Block::read(kind, &blocks[at..at + kind.block_bytes()])
        })
    }

    /// Rounds `weight`, row-major `[outputs, inputs]`.
    pub(super) fn round(weight: &[f32], outputs: usize, inputs: usize, kind: QuantKind) -> Self {
        assert_eq!(
            weight.len(),
            outputs * inputs,
            "weight is [outputs, inputs]"
        );
        Self::fill(outputs, inputs, kind, |row, block| {
            let row = &weight[row * inputs..(row + 1) * inputs];
            let end = inputs.min((block + 1) * QUANT_BLOCK);
            Block::nearest(kind, &row[block * QUANT_BLOCK..end])
        })
    }

    fn fill(
        outputs: usize,
        inputs: usize,
        kind: QuantKind,
        block: impl Fn(usize, usize) -> Block + Sync,
    ) -> Self {
        let blocks = inputs.div_ceil(QUANT_BLOCK);
        let mut records = Records::zeroed(outputs.div_ceil(PANEL) * blocks * kind.record());
        records
            .as_mut_slice()
            .par_chunks_mut(kind.record())
            .enumerate()
            .for_each(|(index, record)| {
                let (panel, at) = (index / blocks, index % blocks);
                for column in 0..PANEL {
                    let row = panel * PANEL + column;
                    let block = if row < outputs {
                        block(row, at)
                    } else {
                        Block::ZERO
                    };
                    put(kind, record, column, &block);
                }
            });
        Self {
            outputs,
            inputs,
            kind,
            rounding: Rounding::Once,
            records,
        }
    }

    pub(super) fn with_inputs_rounded(self, rounding: Rounding) -> Self {
        Self { rounding, ..self }
    }

    pub(super) fn kind(&self) -> QuantKind {
        self.kind
    }

    pub(super) fn bytes(&self) -> usize {
        self.records.bytes
    }

    /// Row `row` of the matrix, dequantised.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let blocks = self.inputs.div_ceil(QUANT_BLOCK);
        let panel = row / PANEL * blocks * self.kind.record();
        let records = self.records.as_slice()[panel..].chunks_exact(self.kind.record());
        for (out, record) in out.chunks_mut(QUANT_BLOCK).zip(records) {
            let (scale, minimum) = scales(self.kind, record, row % PANEL);
            for (k, value) in out.iter_mut().enumerate() {
                let quant = quant(self.kind, record, row % PANEL, k) as f32;
                *value = match self.kind {
                    QuantKind::Q4_1 => scale * quant + minimum,
                    QuantKind::Q8_0 => scale * quant,
                };
            }
        }
    }

    /// `x`: `[rows, inputs]` -> `y`: `[rows, outputs]`.
    pub(super) fn product(&self, x: &[f32], y: &mut [f32]) {
        let rows = x.len() / self.inputs;
        assert_eq!(x.len(), rows * self.inputs, "x is [rows, inputs]");
        assert_eq!(y.len(), rows * self.outputs, "y is [rows, outputs]");
        let mut rounded = ROUNDED.take();
        rounded.fill(x, self.inputs, self.kind, self.rounding);
        let (x, parts) = (&rounded, self.rounding.parts());
        let blocks = self.inputs.div_ceil(QUANT_BLOCK);
        let panel_bytes = blocks * self.kind.record();
        let panels = self.outputs.div_ceil(PANEL);
        let out = SharedOut(y.as_mut_ptr());
        let fill_panel = |index: usize| {
            let panel = &self.records.as_slice()[index * panel_bytes..(index + 1) * panel_bytes];
            let width = PANEL.min(self.outputs - index * PANEL);
            let out = &out;
            panel_rows(self.kind, panel, x, |part, values: &[f32; PANEL]| {
                let (row, part) = (part / parts, part % parts);
                // SAFETY: row < rows and the panel's columns are inside `outputs`; panels and rows
                // are visited by one thread each, so no two slices overlap.
                #[allow(unsafe_code)]
                let target = unsafe {
                    std::slice::from_raw_parts_mut(
                        out.0.add(row * self.outputs + index * PANEL),
                        width,
                    )
                };
                match part {
                    0 => store(target, values),
                    _ => target
                        .iter_mut()
                        .zip(values)
                        .for_each(|(y, value)| *y += value),
                }
            });
        };
        if rows * self.inputs * self.outputs < PARALLEL_WORK {
            (0..panels).for_each(fill_panel);
        } else {
            let pieces = pieces_of(panels, rows);
            parallel_long(pieces, |piece| {
                (piece * panels / pieces..(piece + 1) * panels / pieces).for_each(fill_panel);
            });
        }
        ROUNDED.set(rounded);
    }
}

thread_local! {
    /// The last product's rounded inputs: their memory serves the next.
    static ROUNDED: Cell<RoundedRows> = const { Cell::new(RoundedRows::EMPTY) };
}

fn put(kind: QuantKind, record: &mut [u8], column: usize, block: &Block) {
    let (half, lane) = (column / LANES, column % LANES);
    for (k, quant) in block.quants.iter().enumerate() {
        let (group, depth) = (k / DEPTH, k % DEPTH);
        match kind {
            QuantKind::Q4_1 => {
                let at = group * LANES * DEPTH + lane * DEPTH + depth;
                record[at] |= (*quant as u8) << (4 * half);
            }
            QuantKind::Q8_0 => {
                let at = (group * 2 + half) * LANES * DEPTH + lane * DEPTH + depth;
                record[at] = (*quant + 128) as u8;
            }
        }
    }
    let mut scale = |place: usize, value: f16| {
        let at = kind.quants() + place * SCALES + column * 2;
        record[at..at + 2].copy_from_slice(&value.to_le_bytes());
    };
    scale(0, block.scale);
    if kind == QuantKind::Q4_1 {
        scale(1, block.minimum);
    }
}

fn quant(kind: QuantKind, record: &[u8], column: usize, k: usize) -> i32 {
    let (half, lane) = (column / LANES, column % LANES);
    let (group, depth) = (k / DEPTH, k % DEPTH);
    match kind {
        QuantKind::Q4_1 => {
            let at = group * LANES * DEPTH + lane * DEPTH + depth;
            i32::from(record[at] >> (4 * half) & 15)
        }
        QuantKind::Q8_0 => {
            let at = (group * 2 + half) * LANES * DEPTH + lane * DEPTH + depth;
            i32::from(record[at]) - 128
        }
    }
}

fn scales(kind: QuantKind, record: &[u8], column: usize) -> (f32, f32) {
    let read = |place: usize| {
        let at = kind.quants() + place * SCALES + column * 2;
        f16::from_le_bytes([record[at], record[at + 1]]).to_f32()
    };
    match kind {
        QuantKind::Q4_1 => (read(0), read(1)),
        QuantKind::Q8_0 => (read(0), 0.0),
    }
}

/// Inputs rounded to 8 bits per block of 32.
/// Where a row is rounded twice, what the first rounding leaves over is the row after it.
#[derive(Default)]
struct RoundedRows {
    rows: usize,
    blocks: usize,
    /// `[rows, blocks * 32]`, each a signed byte.
    quants: Records,
    /// `[rows, blocks]`
    scales: Vec<f32>,
    /// `[rows, blocks]`: scale times the sum of the quants.
    sums: Vec<f32>,
    /// `[rows, blocks]`: minus 128 times the sum of the quants, where weights are stored with 128
    /// added.
    offsets: Vec<i32>,
}

/// One row of the input, rounded: once or twice.
struct RoundedRow<'a> {
    quants: &'a mut [u8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
    offsets: &'a mut [i32],
}

impl RoundedRows {
    const EMPTY: Self = Self {
        rows: 0,
        blocks: 0,
        quants: Records::EMPTY,
        scales: Vec::new(),
        sums: Vec::new(),
        offsets: Vec::new(),
    };

    #[cfg(test)]
    fn new(x: &[f32], inputs: usize, kind: QuantKind, rounding: Rounding) -> Self {
        let mut rounded = Self::EMPTY;
        rounded.fill(x, inputs, kind, rounding);
        rounded
    }

    /// Rounds `x`, `[rows, inputs]`.
    fn fill(&mut self, x: &[f32], inputs: usize, kind: QuantKind, rounding: Rounding) {
        let parts = rounding.parts();
        let rows = x.len() / inputs;
        (self.rows, self.blocks) = (rows * parts, inputs.div_ceil(QUANT_BLOCK));
        let numbers = self.rows * self.blocks;
        self.quants.at_least(numbers * QUANT_BLOCK);
        self.scales.resize(numbers, 0.0);
        self.sums.resize(numbers, 0.0);
        self.offsets.resize(numbers, 0);
        let offset = match kind {
            QuantKind::Q4_1 => 0,
            QuantKind::Q8_0 => -128,
        };
        let quants = SharedOut(self.quants.as_mut_slice().as_mut_ptr());
        let [scales, sums] = [&mut self.scales, &mut self.sums].map(|v| SharedOut(v.as_mut_ptr()));
        let offsets = SharedOut(self.offsets.as_mut_ptr());
        let numbers = parts * self.blocks;
        let round = |row: usize| {
            let (quants, scales, sums, offsets) = (&quants, &scales, &sums, &offsets);
            // SAFETY: a row's own numbers, inside what was just made room for, and each row is
            // visited once.
            #[allow(unsafe_code)]
            let into = unsafe {
                use std::slice::from_raw_parts_mut as slice;
                RoundedRow {
                    quants: slice(
                        quants.0.add(row * numbers * QUANT_BLOCK),
                        numbers * QUANT_BLOCK,
                    ),
                    scales: slice(scales.0.add(row * numbers), numbers),
                    sums: slice(sums.0.add(row * numbers), numbers),
                    offsets: slice(offsets.0.add(row * numbers), numbers),
                }
            };
            round_row(&x[row * inputs..(row + 1) * inputs], offset, rounding, into);
        };
        if x.len() < PARALLEL_ROUNDING {
            (0..rows).for_each(round);
        } else {
            let pieces = (current_threads() * 4).min(rows);
            parallel(pieces, |piece| {
                (piece * rows / pieces..(piece + 1) * rows / pieces).for_each(round);
            });
        }
    }
}

fn round_row(x: &[f32], offset: i32, rounding: Rounding, into: RoundedRow<'_>) {
    let blocks = x.len().div_ceil(QUANT_BLOCK);
    let (quants, _) = into.quants.as_chunks_mut::<QUANT_BLOCK>();
    for (block, x) in x.chunks(QUANT_BLOCK).enumerate() {
        let mut values = [0f32; QUANT_BLOCK];
        match x.first_chunk() {
            Some(whole) => values = *whole,
            None => values[..x.len()].copy_from_slice(x),
        }
        for part in 0..rounding.parts() {
            let at = part * blocks + block;
            let (scale, total) = round_block(&mut values, &mut quants[at]);
            into.scales[at] = scale;
            into.sums[at] = scale * total as f32;
            into.offsets[at] = offset.wrapping_mul(total);
        }
    }
}

/// The quants of one block, their scale and their sum; what the rounding leaves over stays in
/// `values`. A block that holds a number that is not finite makes everything not a number.
fn round_block(values: &mut [f32; QUANT_BLOCK], quants: &mut [u8; QUANT_BLOCK]) -> (f32, i32) {
    #[cfg(target_arch = "x86_64")]
    if has_vnni() {
        // SAFETY: the features were just detected.
        #[allow(unsafe_code)]
        return unsafe { vnni::round_block(values, quants) };
    }
    round_block_plain(values, quants)
}

/// The definition; the variant for AVX-512 gives the same bits.
// Loops, not closures: those would be compiled without the target's features.
#[multiversion::multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
fn round_block_plain(
    values: &mut [f32; QUANT_BLOCK],
    quants: &mut [u8; QUANT_BLOCK],
) -> (f32, i32) {
    // Without their signs, the bits of numbers are in the numbers' order.
    let mut most = 0u32;
    for value in values.iter() {
        most = most.max(value.to_bits() & 0x7fff_ffff);
    }
    let (scale, inverse) = scale_of(f32::from_bits(most));
    let mut total = 0i32;
    for (quant, value) in quants.iter_mut().zip(values) {
        let rounded = value.mul_add(inverse, ROUND).to_bits() as i32;
        let rounded = rounded.wrapping_sub(ROUND.to_bits() as i32);
        total = total.wrapping_add(rounded);
        *quant = rounded as u8;
        *value = (-scale).mul_add(rounded as f32, *value);
    }
    (scale, total)
}

/// The scale of a block whose largest magnitude is `most`, and what its numbers are multiplied
/// with: nothing for a block of zeros, or of numbers so small that the inverse overflows.
fn scale_of(most: f32) -> (f32, f32) {
    let inverse = 127.0 / most;
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let scale = if most.is_finite() {
        most / 127.0
    } else {
        f32::NAN
    };
    (scale, inverse)
}

/// All rows of `x` against one panel. How many rows share a load changes no bit.
fn panel_rows(
    kind: QuantKind,
    panel: &[u8],
    x: &RoundedRows,
    mut store: impl FnMut(usize, &[f32; PANEL]),
) {
    // The next panel lies behind this one. Where tiles share a panel, those at its first rows bring
    // the next in about even parts, or one tile would wait for it while nothing is multiplied, and
    // the others leave the memory idle. A part is a whole number of lines for each block.
    let parts = match x.rows.div_ceil(MOST_ROWS) {
        tiles @ 0..3 => tiles,
        3 | 4 => 3,
        5..10 => 5,
        _ => 10,
    };
    let mut row = 0;
    while row < x.rows {
        let fetches = row.is_multiple_of(MOST_ROWS) && row / MOST_ROWS < parts;
        macro_rules! tile {
            ($rows:expr) => {{
                let tile = match parts {
                    _ if !fetches => tile::<$rows, 0>,
                    1 => tile::<$rows, 1>,
                    2 => tile::<$rows, 2>,
                    3 => tile::<$rows, 3>,
                    5 => tile::<$rows, 5>,
                    _ => tile::<$rows, 10>,
                };
                emit(row, &tile(kind, panel, x, row), &mut store);
                $rows
            }};
        }
        row += match x.rows - row {
            1 => tile!(1),
            2 | 3 => tile!(2),
            4 | 5 => tile!(4),
            _ => tile!(MOST_ROWS),
        };
    }
}

/// `R` rows from `first` on against one panel, while a part of what comes is fetched: see `fetch`.
fn tile<const R: usize, const FETCH: usize>(
    kind: QuantKind,
    panel: &[u8],
    x: &RoundedRows,
    first: usize,
) -> [[f32; PANEL]; R] {
    #[cfg(target_arch = "x86_64")]
    if has_vnni() {
        // SAFETY: the features were just detected.
        #[allow(unsafe_code)]
        return unsafe {
            match kind {
                QuantKind::Q4_1 => vnni::tile_q4_1::<R, FETCH>(panel, x, first),
                QuantKind::Q8_0 => vnni::tile_q8_0::<R, FETCH>(panel, x, first),
            }
        };
    }
    std::array::from_fn(|row| row_plain(kind, panel, x, first + row))
}

/// Whether the machine multiplies bytes four at a time, 64 at once.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_vnni() -> bool {
    std::arch::is_x86_feature_detected!("avx512vnni")
        && std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512f")
}

/// How far ahead of itself a tile of few rows fetches, in bytes: into this core's first cache, and
/// into its second, which waits for more lines at once.
#[cfg(target_arch = "x86_64")]
const NEAR: usize = 4_096;
#[cfg(target_arch = "x86_64")]
const FAR: usize = 16_384;

/// What a tile from row `first` on fetches from memory at each `block`: what the processor does by
/// itself leaves it waiting. `FETCH` is in how many parts the next panel comes; 0 is for none of it,
/// and 1 for so few rows that weights are needed as fast as they come: then what is read soon.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch<const FETCH: usize>(kind: QuantKind, panel: &[u8], first: usize, block: usize) {
    use super::{LINE, fetch_far_line, fetch_line};
    let lines = kind.record() / LINE;
    let at = |line: usize| panel.as_ptr().wrapping_add(line * LINE);
    if FETCH == 1 {
        for line in block * lines..(block + 1) * lines {
            fetch_line(at(line + NEAR / LINE));
            fetch_far_line(at(line + FAR / LINE));
        }
    } else if FETCH > 1 {
        let part = lines.div_ceil(FETCH);
        let blocks = panel.len() / kind.record();
        let before = panel.len() / LINE + first / MOST_ROWS * blocks * part;
        for line in 0..part {
            fetch_line(at(before + block * part + line));
        }
    }
}

/// The definition; the variants for particular machines give the same bits.
#[multiversion::multiversion(targets("x86_64+avx2+fma", "aarch64+neon"))]
fn row_plain(kind: QuantKind, panel: &[u8], x: &RoundedRows, row: usize) -> [f32; PANEL] {
    let mut y = [0f32; PANEL];
    for (block, record) in panel.chunks_exact(kind.record()).enumerate() {
        let at = row * x.blocks + block;
        let quants = &x.quants.as_slice()[at * QUANT_BLOCK..(at + 1) * QUANT_BLOCK];
        let mut sums = [x.offsets[at]; PANEL];
        for group in 0..GROUPS {
            for (column, sum) in sums.iter_mut().enumerate() {
                let (half, lane) = (column / LANES, column % LANES);
                for depth in 0..DEPTH {
                    let p = i32::from(quants[group * DEPTH + depth] as i8);
                    let q = match kind {
                        QuantKind::Q4_1 => {
                            record[group * 64 + lane * DEPTH + depth] >> (4 * half) & 15
                        }
                        QuantKind::Q8_0 => record[(group * 2 + half) * 64 + lane * DEPTH + depth],
                    };
                    *sum += p * i32::from(q);
                }
            }
        }
        for (column, (y, sum)) in y.iter_mut().zip(sums).enumerate() {
            let (scale, minimum) = scales(kind, record, column);
            *y = (sum as f32 * x.scales[at]).mul_add(scale, *y);
            if kind == QuantKind::Q4_1 {
                *y = x.sums[at].mul_add(minimum, *y);
            }
        }
    }
    y
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod vnni {
    use std::arch::x86_64::*;

    use super::{
        GROUPS, PANEL, QUANT_BLOCK, QuantKind, ROUND, RoundedRows, SCALES, fetch, scale_of,
    };

    /// Where the rows' blocks are, once checked to be there.
    struct Rows<const R: usize> {
        quants: [*const u8; R],
        scales: [*const f32; R],
        sums: [*const f32; R],
        offsets: [*const i32; R],
    }

    impl<const R: usize> Rows<R> {
        fn of(x: &RoundedRows, first: usize, blocks: usize) -> Self {
            assert!(
                first + R <= x.rows && blocks == x.blocks,
                "rows are inside x"
            );
            let at = |row: usize| (first + row) * x.blocks;
            let quants = x.quants.as_slice();
            Self {
                quants: std::array::from_fn(|row| quants[at(row) * QUANT_BLOCK..].as_ptr()),
                scales: std::array::from_fn(|row| x.scales[at(row)..].as_ptr()),
                sums: std::array::from_fn(|row| x.sums[at(row)..].as_ptr()),
                offsets: std::array::from_fn(|row| x.offsets[at(row)..].as_ptr()),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
    unsafe fn halves(scales: *const u8) -> [__m512; 2] {
        unsafe {
            [
                _mm512_cvtph_ps(_mm256_loadu_si256(scales.cast())),
                _mm512_cvtph_ps(_mm256_loadu_si256(scales.add(32).cast())),
            ]
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
    unsafe fn store<const R: usize>(sums: [[__m512; 2]; R]) -> [[f32; PANEL]; R] {
        let mut out = [[0f32; PANEL]; R];
        for (out, sums) in out.iter_mut().zip(sums) {
            unsafe {
                _mm512_storeu_ps(out.as_mut_ptr(), sums[0]);
                _mm512_storeu_ps(out.as_mut_ptr().add(16), sums[1]);
            }
        }
        out
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
    pub(super) unsafe fn round_block(
        values: &mut [f32; QUANT_BLOCK],
        quants: &mut [u8; QUANT_BLOCK],
    ) -> (f32, i32) {
        let (low, high) = (values.as_mut_ptr(), values[16..].as_mut_ptr());
        // SAFETY: both halves hold sixteen numbers.
        let mut halves = unsafe { [_mm512_loadu_ps(low), _mm512_loadu_ps(high)] };
        let [a, b] = halves.map(|half| {
            let signless = _mm512_set1_epi32(0x7fff_ffff);
            _mm512_and_si512(_mm512_castps_si512(half), signless)
        });
        let most = _mm512_reduce_max_epu32(_mm512_max_epu32(a, b));
        let (scale, inverse) = scale_of(f32::from_bits(most));
        let rounded = halves.map(|half| {
            let sum = _mm512_fmadd_ps(half, _mm512_set1_ps(inverse), _mm512_set1_ps(ROUND));
            let round = _mm512_set1_epi32(ROUND.to_bits() as i32);
            _mm512_sub_epi32(_mm512_castps_si512(sum), round)
        });
        for (half, rounded) in halves.iter_mut().zip(rounded) {
            let minus = _mm512_set1_ps(-scale);
            *half = _mm512_fmadd_ps(minus, _mm512_cvtepi32_ps(rounded), *half);
        }
        // SAFETY: as above; the quants are two times sixteen bytes.
        unsafe {
            _mm512_storeu_ps(low, halves[0]);
            _mm512_storeu_ps(high, halves[1]);
            let quants = quants.as_mut_ptr();
            _mm_storeu_si128(quants.cast(), _mm512_cvtepi32_epi8(rounded[0]));
            _mm_storeu_si128(quants.add(16).cast(), _mm512_cvtepi32_epi8(rounded[1]));
        }
        let total = _mm512_reduce_add_epi32(_mm512_add_epi32(rounded[0], rounded[1]));
        (scale, total)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
    pub(super) unsafe fn tile_q4_1<const R: usize, const FETCH: usize>(
        panel: &[u8],
        x: &RoundedRows,
        first: usize,
    ) -> [[f32; PANEL]; R] {
        const KIND: QuantKind = QuantKind::Q4_1;
        let blocks = panel.len() / KIND.record();
        let rows = Rows::<R>::of(x, first, blocks);
        let low = _mm512_set1_epi8(15);
        let mut y = [[_mm512_setzero_ps(); 2]; R];
        for block in 0..blocks {
            // SAFETY: `block` is inside the panel and inside each row.
            unsafe {
                let record = panel.as_ptr().add(block * KIND.record());
                fetch::<FETCH>(KIND, panel, first, block);
                let mut sums = [[_mm512_setzero_si512(); 2]; R];
                for group in 0..GROUPS {
                    let both = _mm512_loadu_si512(record.add(group * 64).cast());
                    let a = _mm512_and_si512(both, low);
                    let b = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let at = rows.quants[row].add(block * QUANT_BLOCK + group * 4);
                        let p = _mm512_set1_epi32(at.cast::<i32>().read_unaligned());
                        sums[0] = _mm512_dpbusd_epi32(sums[0], a, p);
                        sums[1] = _mm512_dpbusd_epi32(sums[1], b, p);
                    }
                }
                let scales = halves(record.add(KIND.quants()));
                let minima = halves(record.add(KIND.quants() + SCALES));
                for (row, sums) in sums.iter().enumerate() {
                    let scale = _mm512_set1_ps(*rows.scales[row].add(block));
                    let sum = _mm512_set1_ps(*rows.sums[row].add(block));
                    for half in 0..2 {
                        let t = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[half]), scale);
                        y[row][half] = _mm512_fmadd_ps(t, scales[half], y[row][half]);
                        y[row][half] = _mm512_fmadd_ps(sum, minima[half], y[row][half]);
                    }
                }
            }
        }
        // SAFETY: the features are those of this function.
        unsafe { store(y) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
    pub(super) unsafe fn tile_q8_0<const R: usize, const FETCH: usize>(
        panel: &[u8],
        x: &RoundedRows,
        first: usize,
    ) -> [[f32; PANEL]; R] {
        const KIND: QuantKind = QuantKind::Q8_0;
        let blocks = panel.len() / KIND.record();
        let rows = Rows::<R>::of(x, first, blocks);
        let mut y = [[_mm512_setzero_ps(); 2]; R];
        for block in 0..blocks {
            // SAFETY: `block` is inside the panel and inside each row.
            unsafe {
                let record = panel.as_ptr().add(block * KIND.record());
                fetch::<FETCH>(KIND, panel, first, block);
                let mut sums = [[_mm512_setzero_si512(); 2]; R];
                for (row, sums) in sums.iter_mut().enumerate() {
                    *sums = [_mm512_set1_epi32(*rows.offsets[row].add(block)); 2];
                }
                for group in 0..GROUPS {
                    let a = _mm512_loadu_si512(record.add(group * 128).cast());
                    let b = _mm512_loadu_si512(record.add(group * 128 + 64).cast());
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let at = rows.quants[row].add(block * QUANT_BLOCK + group * 4);
                        let p = _mm512_set1_epi32(at.cast::<i32>().read_unaligned());
                        sums[0] = _mm512_dpbusd_epi32(sums[0], a, p);
                        sums[1] = _mm512_dpbusd_epi32(sums[1], b, p);
                    }
                }
                let scales = halves(record.add(KIND.quants()));
                for (row, sums) in sums.iter().enumerate() {
                    let scale = _mm512_set1_ps(*rows.scales[row].add(block));
                    for half in 0..2 {
                        let t = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[half]), scale);
                        y[row][half] = _mm512_fmadd_ps(t, scales[half], y[row][half]);
                    }
                }
            }
        }
        // SAFETY: the features are those of this function.
        unsafe { store(y) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KINDS: [QuantKind; 2] = [QuantKind::Q4_1, QuantKind::Q8_0];

    /// Any bytes are a matrix, but for their scales.
    fn blocks(kind: QuantKind, count: usize, seed: u32) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        };
        let mut bytes = Vec::new();
        for _ in 0..count {
            let scale = f16::from_f32((next() % 1000) as f32 / 1e5 + 1e-3);
            bytes.extend(scale.to_le_bytes());
            if kind == QuantKind::Q4_1 {
                let minimum = f16::from_f32((next() % 1000) as f32 / -1e4);
                bytes.extend(minimum.to_le_bytes());
            }
            while !bytes.len().is_multiple_of(kind.block_bytes()) {
                bytes.push((next() >> 8) as u8);
            }
        }
        bytes
    }

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let number = |i: usize| {
            ((i as u32).wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) % 20_011
        };
        (0..count)
            .map(|i| number(i) as f32 / 10_005.0 - 1.0)
            .collect()
    }

    fn product(matrix: &QuantMatrix, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / matrix.inputs * matrix.outputs];
        matrix.product(x, &mut y);
        y
    }

    /// By the formula at the top, from the blocks as they are stored.
    fn by_hand(kind: QuantKind, row: &[u8], x: &[f32]) -> f32 {
        let mut y = 0f32;
        for (block, x) in row
            .chunks_exact(kind.block_bytes())
            .zip(x.chunks(QUANT_BLOCK))
        {
            let block = Block::read(kind, block);
            let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            let p = x
                .iter()
                .map(|x| f64::from(*x) * f64::from(127.0 / most))
                .map(|x| x.round_ties_even() as i32);
            let p: Vec<i32> = p.collect();
            let dot: i32 = p
                .iter()
                .zip(block.quants)
                .map(|(p, q)| p * i32::from(q))
                .sum();
            let scale = most / 127.0;
            y = (dot as f32 * scale).mul_add(block.scale.to_f32(), y);
            if kind == QuantKind::Q4_1 {
                let sum = scale * p.iter().sum::<i32>() as f32;
                y = sum.mul_add(block.minimum.to_f32(), y);
            }
        }
        y
    }

    proptest! {
        #[test]
        fn every_output_is_one_chain_over_exact_sums_of_blocks(
            rows in 1usize..15, outputs in 1usize..100, blocks_per_row in 1usize..5, seed in 0u32..500
        ) {
            for kind in KINDS {
                let inputs = blocks_per_row * QUANT_BLOCK;
                let stored = blocks(kind, outputs * blocks_per_row, seed);
                let x = numbers(rows * inputs, seed);
                let y = product(&QuantMatrix::pack(&stored, outputs, inputs, kind), &x);
                let row_bytes = blocks_per_row * kind.block_bytes();
                for (y, x) in y.chunks_exact(outputs).zip(x.chunks_exact(inputs)) {
                    for (y, row) in y.iter().zip(stored.chunks_exact(row_bytes)) {
                        prop_assert_eq!(y.to_bits(), by_hand(kind, row, x).to_bits());
                    }
                }
            }
        }

        #[test]
        fn the_plain_definition_gives_the_bits_of_this_machine(rows in 1usize..50, seed in 0u32..500) {
            for kind in KINDS {
                let (outputs, per_row) = (PANEL, 3);
                let matrix = QuantMatrix::pack(
                    &blocks(kind, outputs * per_row, seed), outputs, per_row * QUANT_BLOCK, kind
                );
                let x = numbers(rows * per_row * QUANT_BLOCK, seed);
                let rounded = RoundedRows::new(&x, per_row * QUANT_BLOCK, kind, Rounding::Once);
                let y = product(&matrix, &x);
                for (row, y) in y.chunks_exact(outputs).enumerate() {
                    let plain = row_plain(kind, matrix.records.as_slice(), &rounded, row);
                    prop_assert_eq!(y, &plain[..]);
                }
            }
        }

        #[test]
        fn the_plain_rounding_gives_the_bits_of_this_machine(seed in 0u32..10_000, shift in -40i32..40) {
            let values = numbers(QUANT_BLOCK, seed);
            let block = std::array::from_fn(|i| values[i] * (shift as f32).exp2());
            let (mut fast, mut plain) = ((block, [0; QUANT_BLOCK]), (block, [0; QUANT_BLOCK]));
            let results = [
                round_block(&mut fast.0, &mut fast.1),
                round_block_plain(&mut plain.0, &mut plain.1),
            ];
            prop_assert_eq!(results[0], results[1]);
            prop_assert_eq!(fast, plain);
        }

        #[test]
        fn a_row_does_not_depend_on_the_rows_beside_it_or_on_threads(rows in 1usize..40, seed in 0u32..100) {
            let pool = super::super::ComputePool::new(3).expect("threads");
            for kind in KINDS {
                let (outputs, inputs) = (192, 96);
                let matrix = QuantMatrix::pack(&blocks(kind, outputs * 3, seed), outputs, inputs, kind);
                let x = numbers(rows * inputs, seed);
                let together = pool.install(|| product(&matrix, &x));
                for (row, x) in x.chunks_exact(inputs).enumerate() {
                    let alone = product(&matrix, x);
                    prop_assert_eq!(&together[row * outputs..][..outputs], &alone[..]);
                }
            }
        }
    }

    #[test]
    fn a_row_of_the_matrix_comes_back_as_it_was_stored() {
        for kind in KINDS {
            let stored = blocks(kind, 70 * 2, 5);
            let matrix = QuantMatrix::pack(&stored, 70, 64, kind);
            let mut row = [0f32; 64];
            matrix.row(66, &mut row);
            let bytes = &stored[66 * 2 * kind.block_bytes()..][..2 * kind.block_bytes()];
            for (values, block) in row
                .chunks(QUANT_BLOCK)
                .zip(bytes.chunks(kind.block_bytes()))
            {
                let block = Block::read(kind, block);
                for (value, quant) in values.iter().zip(block.quants) {
                    let expected = block.scale.to_f32() * f32::from(quant);
                    assert_eq!(*value, expected + block.minimum.to_f32());
                }
            }
        }
    }

    #[test]
    fn rounded_weights_and_inputs_are_near_the_exact_product() {
        let (outputs, inputs) = (40, 50);
        let (w, x) = (numbers(outputs * inputs, 1), numbers(inputs, 2));
        let scale = (inputs as f32).sqrt();
        for (kind, most) in [(QuantKind::Q8_0, 0.01), (QuantKind::Q4_1, 0.1)] {
            let y = product(&QuantMatrix::round(&w, outputs, inputs, kind), &x);
            for (y, w) in y.iter().zip(w.chunks_exact(inputs)) {
                let exact: f32 = w.iter().zip(&x).map(|(w, x)| w * x).sum();
                assert!(
                    (y - exact).abs() < most * scale,
                    "{kind:?}: {y} for {exact}"
                );
            }
        }
    }

    #[test]
    fn four_bits_keep_both_ends_of_a_block_and_are_half_a_step_off_at_most() {
        let (outputs, inputs) = (40, 64);
        // Blocks far from zero, which 8 bits around it would treat worse.
        let w: Vec<f32> = numbers(outputs * inputs, 3)
            .iter()
            .map(|w| w + 3.0)
            .collect();
        let matrix = QuantMatrix::round(&w, outputs, inputs, QuantKind::Q4_1);
        let mut row = vec![0.0; inputs];
        for (index, w) in w.chunks_exact(inputs).enumerate() {
            matrix.row(index, &mut row);
            for (rounded, w) in row.chunks(QUANT_BLOCK).zip(w.chunks(QUANT_BLOCK)) {
                let low = w.iter().copied().fold(f32::INFINITY, f32::min);
                let high = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                // Scale and minimum are of 16 bits.
                let half_a_step = (high - low) / 30.0 + high / 512.0;
                for (rounded, w) in rounded.iter().zip(w) {
                    assert!((rounded - w).abs() <= half_a_step, "{rounded} for {w}");
                }
            }
        }
    }

    #[test]
    fn inputs_rounded_twice_are_far_nearer_and_as_independent_of_their_neighbours() {
        let (outputs, inputs, rows) = (70, 96, 5);
        let mut x = numbers(rows * inputs, 2);
        // One number that takes the bits of its block.
        x.chunks_exact_mut(QUANT_BLOCK)
            .for_each(|block| block[3] = 40.0);
        for kind in KINDS {
            let stored = blocks(kind, outputs * inputs / QUANT_BLOCK, 7);
            let pack = || QuantMatrix::pack(&stored, outputs, inputs, kind);
            let twice = pack().with_inputs_rounded(Rounding::Twice);
            let mut row = vec![0.0; inputs];
            let mut errors = [0f64; 2];
            let (once_y, twice_y) = (product(&pack(), &x), product(&twice, &x));
            for output in 0..outputs {
                twice.row(output, &mut row);
                let exact: f64 = row
                    .iter()
                    .zip(&x)
                    .map(|(w, x)| f64::from(*w) * f64::from(*x))
                    .sum();
                for (error, y) in errors.iter_mut().zip([&once_y, &twice_y]) {
                    *error += (f64::from(y[output]) - exact).powi(2);
                }
            }
            assert!(errors[1] < 1e-3 * errors[0], "{kind:?}: {errors:?}");
            for (alone, together) in x.chunks_exact(inputs).zip(twice_y.chunks_exact(outputs)) {
                assert_eq!(product(&twice, alone), together);
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so_and_spoils_no_other_row() {
        let matrix = QuantMatrix::round(&numbers(40 * 64, 1), 40, 64, QuantKind::Q8_0);
        let mut x = numbers(3 * 64, 2);
        let clean = product(&matrix, &x);
        x[64 + 5] = f32::INFINITY;
        x[64 + 40] = f32::NAN;
        let y = product(&matrix, &x);
        assert!(y[40..80].iter().all(|y| y.is_nan()));
        assert_eq!(y[..40], clean[..40]);
        assert_eq!(y[80..], clean[80..]);
    }

    #[test]
    fn zeros_and_numbers_too_small_to_scale_give_zero() {
        for kind in KINDS {
            let matrix = QuantMatrix::round(&numbers(32 * 32, 1), 32, 32, kind);
            assert_eq!(product(&matrix, &[0.0; 32]), [0.0; 32]);
            assert_eq!(product(&matrix, &[1e-44; 32]), [0.0; 32]);
            let zeros = QuantMatrix::round(&[0.0; 32 * 32], 32, 32, kind);
            assert_eq!(product(&zeros, &numbers(32, 2)), [0.0; 32]);
        }
    }
}
