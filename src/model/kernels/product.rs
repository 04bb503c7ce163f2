//! `y = x W^T` for weights repacked at load, here f32 and bf16 in panels of 64 outputs.
//! Each output is one chain of fused multiply-adds over the inner dimension, in its order.

use half::bf16;
use rayon::prelude::*;

use super::pool::{current_threads, new_rows_in_pieces, parallel_long, pieces_of};
use super::quantised::{QuantKind, QuantMatrix, Rounding};
use super::{SharedOut, emit, store};

/// Outputs per panel: four AVX-512 registers, eight AVX2 ones.
const PANEL: usize = 64;

/// Products smaller than this many multiply-adds stay on one thread: waking another costs more.
const PARALLEL_WORK: usize = 1 << 16;

/// Rows that one thread takes at a time where there are many: what they become on the way through a
/// layer stays in its second cache.
pub const ROWS_PER_THREAD: usize = 48;

/// How weights lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    F32,
    Bf16,
    /// Every matrix rounded to 8 bits, 32 weights to a scale.
    Q8_0,
    /// The matrices of the layers rounded to 4 bits, 32 weights to a scale and a minimum;
    /// embedding and head to 8.
    Q4_1,
    /// Each matrix as the file holds it where a kernel takes that, else f32, which loses nothing.
    AsIs,
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_1 => "q4_1",
            Self::AsIs => "as-is",
        })
    }
}

impl WeightFormat {
    /// What weights are rounded to when they are loaded; none where each is kept, or narrowed alone.
    pub fn rounded_to(self) -> Option<QuantKind> {
        match self {
            Self::Q8_0 => Some(QuantKind::Q8_0),
            Self::Q4_1 => Some(QuantKind::Q4_1),
            Self::F32 | Self::Bf16 | Self::AsIs => None,
        }
    }

    /// How embedding and head are held: four bits would cost them most.
    pub fn of_vocabulary(self) -> Self {
        match self {
            Self::Q4_1 => Self::Q8_0,
            format => format,
        }
    }
}

/// A weight matrix `[outputs, inputs]`, held once; f32 and bf16 as `[outputs / 64][inputs][64]`.
pub struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    panels: Panels,
}

enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    Quantised(QuantMatrix),
}

/// One stored weight, widened to f32 without loss.
trait Weight: Copy + Send + Sync + Default {
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl Weight for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    fn narrow(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl PackedMatrix {
    /// Packs `weight`, row-major `[outputs, inputs]`; its length must be the product. Numbers
    /// have no form of their own, so `AsIs` keeps them.
    pub fn pack(weight: &[f32], outputs: usize, inputs: usize, format: WeightFormat) -> Self {
        assert_eq!(
            weight.len(),
            outputs * inputs,
            "weight is [outputs, inputs]"
        );
        let panels = match (format.rounded_to(), format) {
            (Some(kind), _) => Panels::Quantised(QuantMatrix::round(weight, outputs, inputs, kind)),
            (None, WeightFormat::Bf16) => Panels::Bf16(pack(weight, outputs, inputs)),
            (None, _) => Panels::F32(pack(weight, outputs, inputs)),
        };
        Self {
            outputs,
            inputs,
            panels,
        }
    }

    /// Packs rows of blocks as GGUF stores them.
    pub fn pack_blocks(blocks: &[u8], outputs: usize, inputs: usize, kind: QuantKind) -> Self {
        Self {
            outputs,
            inputs,
            panels: Panels::Quantised(QuantMatrix::pack(blocks, outputs, inputs, kind)),
        }
    }

    /// The same, where its weights are of few bits, with its inputs rounded so.
    pub fn with_inputs_rounded(mut self, rounding: Rounding) -> Self {
        if let Panels::Quantised(matrix) = self.panels {
            self.panels = Panels::Quantised(matrix.with_inputs_rounded(rounding));
        }
        self
    }

    /// How its weights are held.
    pub fn held_as(&self) -> &'static str {
        match &self.panels {
            Panels::F32(_) => "f32",
            Panels::Bf16(_) => "bf16",
            Panels::Quantised(matrix) => matrix.kind().name(),
        }
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) => panels.len() * 4,
            Panels::Bf16(panels) => panels.len() * 2,
            Panels::Quantised(matrix) => matrix.bytes(),
        }
    }

    /// `x`: `[rows, inputs]` -> `[rows, outputs]`.
    /// Few rows share the outputs among the threads, many are shared themselves: then what a
    /// thread writes stays near it.
    pub fn product(&self, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.inputs;
        if rows < ROWS_PER_THREAD * current_threads() {
            let mut y = vec![0f32; rows * self.outputs];
            self.product_into(x, &mut y);
            return y;
        }
        new_rows_in_pieces(rows, self.outputs, ROWS_PER_THREAD, |first, y| {
            let count = y.len() / self.outputs;
            self.product_into(&x[first * self.inputs..(first + count) * self.inputs], y);
        })
    }

    /// The same into `y`, `[rows, outputs]`.
    pub fn product_into(&self, x: &[f32], y: &mut [f32]) {
        let rows = x.len() / self.inputs;
        assert_eq!(x.len(), rows * self.inputs, "x is [rows, inputs]");
        assert_eq!(y.len(), rows * self.outputs, "y is [rows, outputs]");
        match &self.panels {
            Panels::F32(panels) => self.fill(panels, x, y),
            Panels::Bf16(panels) => self.fill(panels, x, y),
            Panels::Quantised(matrix) => matrix.product(x, y),
        }
    }

    /// Row `row` of the unpacked matrix: an embedding table shares its memory with the head.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let base = (row / PANEL) * self.inputs * PANEL + row % PANEL;
        match &self.panels {
            Panels::F32(panels) => {
                for (k, value) in out.iter_mut().enumerate() {
                    *value = panels[base + k * PANEL];
                }
            }
            Panels::Bf16(panels) => {
                for (k, value) in out.iter_mut().enumerate() {
                    *value = panels[base + k * PANEL].widen();
                }
            }
            Panels::Quantised(matrix) => matrix.row(row, out),
        }
    }

    fn fill<W: Weight>(&self, panels: &[W], x: &[f32], y: &mut [f32]) {
        let (inputs, outputs) = (self.inputs, self.outputs);
        let out = SharedOut(y.as_mut_ptr());
        let fill_panel = |(index, panel): (usize, &[W])| {
            let width = PANEL.min(outputs - index * PANEL);
            let out = &out;
            panel_rows(panel, x, inputs, |row, values: &[f32; PANEL]| {
                // SAFETY: row < rows and the panel's columns are inside `outputs`; panels and rows
                // are visited once each, so no two slices overlap.
                #[allow(unsafe_code)]
                let target = unsafe {
                    std::slice::from_raw_parts_mut(out.0.add(row * outputs + index * PANEL), width)
                };
                store(target, values);
            });
        };
        let panel_len = inputs * PANEL;
        if x.len() * outputs < PARALLEL_WORK {
            panels.chunks(panel_len).enumerate().for_each(fill_panel);
        } else {
            let count = panels.len() / panel_len;
            let pieces = pieces_of(count, x.len() / inputs);
            parallel_long(pieces, |piece| {
                for index in piece * count / pieces..(piece + 1) * count / pieces {
                    fill_panel((index, &panels[index * panel_len..(index + 1) * panel_len]));
                }
            });
        }
    }
}

fn pack<W: Weight>(weight: &[f32], outputs: usize, inputs: usize) -> Vec<W> {
    let mut packed = vec![W::default(); outputs.div_ceil(PANEL) * PANEL * inputs];
    packed
        .par_chunks_mut(PANEL * inputs)
        .enumerate()
        .for_each(|(index, panel)| {
            for column in 0..PANEL.min(outputs - index * PANEL) {
                let row = &weight[(index * PANEL + column) * inputs..][..inputs];
                for (k, value) in row.iter().enumerate() {
                    panel[k * PANEL + column] = W::narrow(*value);
                }
            }
        });
    packed
}

/// All rows of `x` against one panel. The instruction set only changes how many rows share a load.
fn panel_rows<W: Weight>(
    panel: &[W],
    x: &[f32],
    inputs: usize,
    mut store: impl FnMut(usize, &[f32; PANEL]),
) {
    let rows = x.len() / inputs;
    let mut row = 0;
    while row < rows {
        let left = rows - row;
        let step = match left {
            0 | 1 => 1,
            2 | 3 => 2,
            4 | 5 => 4,
            _ => 6,
        };
        let x = &x[row * inputs..(row + step) * inputs];
        match step {
            1 => emit(row, &tile::<W, 1>(panel, x, inputs), &mut store),
            2 => emit(row, &tile::<W, 2>(panel, x, inputs), &mut store),
            4 => emit(row, &tile::<W, 4>(panel, x, inputs), &mut store),
            _ => emit(row, &tile::<W, 6>(panel, x, inputs), &mut store),
        }
        row += step;
    }
}

/// `R` rows against one panel of 64 outputs.
fn tile<W: Weight, const R: usize>(panel: &[W], x: &[f32], inputs: usize) -> [[f32; PANEL]; R] {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was just detected.
            #[allow(unsafe_code)]
            return unsafe { tile_avx512::<W, R>(panel, x, inputs) };
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
        {
            // SAFETY: the features were just detected.
            #[allow(unsafe_code)]
            return unsafe { tile_avx2::<W, R>(panel, x, inputs) };
        }
    }
    tile_plain::<W, R, PANEL>(panel, x, inputs)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
fn tile_avx512<W: Weight, const R: usize>(
    panel: &[W],
    x: &[f32],
    inputs: usize,
) -> [[f32; PANEL]; R] {
    tile_plain::<W, R, PANEL>(panel, x, inputs)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn tile_avx2<W: Weight, const R: usize>(
    panel: &[W],
    x: &[f32],
    inputs: usize,
) -> [[f32; PANEL]; R] {
    // Sixteen registers hold two columns of six rows, not eight.
    tile_plain::<W, R, 16>(panel, x, inputs)
}

/// The one definition of the product: every variant above is this loop, compiled differently.
/// `WIDTH` outputs are accumulated at a time; it changes no bit.
#[inline(always)]
fn tile_plain<W: Weight, const R: usize, const WIDTH: usize>(
    panel: &[W],
    x: &[f32],
    inputs: usize,
) -> [[f32; PANEL]; R] {
    let mut out = [[0f32; PANEL]; R];
    let x: [&[f32]; R] = std::array::from_fn(|row| &x[row * inputs..(row + 1) * inputs]);
    for first in (0..PANEL).step_by(WIDTH) {
        let mut sums = [[0f32; WIDTH]; R];
        for (k, weights) in panel.chunks_exact(PANEL).enumerate().take(inputs) {
            let weights: [f32; WIDTH] = std::array::from_fn(|j| weights[first + j].widen());
            for row in 0..R {
                let x = x[row][k];
                for j in 0..WIDTH {
                    sums[row][j] = x.mul_add(weights[j], sums[row][j]);
                }
            }
        }
        for row in 0..R {
            out[row][first..first + WIDTH].copy_from_slice(&sums[row]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seeded(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                (state as f32 / u32::MAX as f32) * 2.0 - 1.0
            })
            .collect()
    }

    fn chain(x: &[f32], w: &[f32]) -> f32 {
        x.iter().zip(w).fold(0.0, |sum, (x, w)| x.mul_add(*w, sum))
    }

    proptest! {
        #[test]
        fn every_product_is_one_chain_of_fused_multiply_adds(
            rows in 1usize..15, outputs in 1usize..200, inputs in 1usize..90, seed in 0u32..1000
        ) {
            let w = seeded(outputs * inputs, seed);
            let x = seeded(rows * inputs, seed + 1);
            let y = PackedMatrix::pack(&w, outputs, inputs, WeightFormat::F32).product(&x);
            for row in 0..rows {
                for column in 0..outputs {
                    let expected = chain(&x[row * inputs..][..inputs], &w[column * inputs..][..inputs]);
                    prop_assert_eq!(y[row * outputs + column].to_bits(), expected.to_bits());
                }
            }
        }

        #[test]
        fn a_row_does_not_depend_on_the_rows_beside_it(
            rows in 1usize..20, seed in 0u32..1000, format in prop_oneof![Just(WeightFormat::F32), Just(WeightFormat::Bf16)]
        ) {
            let (outputs, inputs) = (192, 96);
            let w = PackedMatrix::pack(&seeded(outputs * inputs, seed), outputs, inputs, format);
            let x = seeded(rows * inputs, seed + 1);
            let together = w.product(&x);
            for row in 0..rows {
                let alone = w.product(&x[row * inputs..][..inputs]);
                prop_assert_eq!(&together[row * outputs..][..outputs], &alone[..]);
            }
        }
    }

    #[test]
    fn a_row_of_the_matrix_comes_back_as_it_was_packed() {
        let w = seeded(70 * 9, 3);
        let packed = PackedMatrix::pack(&w, 70, 9, WeightFormat::F32);
        let mut row = [0f32; 9];
        packed.row(66, &mut row);
        assert_eq!(row, w[66 * 9..67 * 9]);
    }
}
