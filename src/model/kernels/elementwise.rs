//! What happens between the products, one row at a time.

use multiversion::multiversion;

/// Sums run in this many lanes and are folded in one fixed order at the end.
const LANES: usize = 16;

#[inline(always)]
fn fold(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
pub(super) fn dot_inline(a: &[f32], b: &[f32]) -> f32 {
    let (mut first, mut second) = ([0f32; LANES], [0f32; LANES]);
    let (a_pairs, b_pairs) = (a.chunks_exact(2 * LANES), b.chunks_exact(2 * LANES));
    let (a_rest, b_rest) = (a_pairs.remainder(), b_pairs.remainder());
    for (a, b) in a_pairs.zip(b_pairs) {
        for i in 0..LANES {
            first[i] = a[i].mul_add(b[i], first[i]);
        }
        for i in 0..LANES {
            second[i] = a[LANES + i].mul_add(b[LANES + i], second[i]);
        }
    }
    for i in 0..LANES {
        first[i] += second[i];
    }
    a_rest
        .iter()
        .zip(b_rest)
        .fold(fold(first), |sum, (a, b)| a.mul_add(*b, sum))
}

/// `a . b` over the shorter of the two.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    dot_inline(a, b)
}

/// The highest number of `x`; not a number where one of `x` is none. Of nothing it is minus infinity.
#[multiversion(targets(
    "x86_64+avx512f+avx512vl+avx512bw+avx512dq+fma",
    "x86_64+avx2+fma",
    "aarch64+neon"
))]
pub fn highest(x: &[f32]) -> f32 {
    // Many running maxima, because one would make each comparison wait for the last.
    let (mut maxima, mut nan) = ([f32::NEG_INFINITY; 4 * LANES], [0u32; 4 * LANES]);
    let chunks = x.chunks_exact(4 * LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..4 * LANES {
            let value = chunk[i];
            maxima[i] = if value > maxima[i] { value } else { maxima[i] };
            nan[i] |= u32::from(value.is_nan());
        }
    }
    for (i, value) in rest.iter().enumerate() {
        maxima[i] = if *value > maxima[i] {
            *value
        } else {
            maxima[i]
        };
        nan[i] |= u32::from(value.is_nan());
    }
    // By halves, for the same reason.
    let mut half = maxima.len() / 2;
    while half > 0 {
        for i in 0..half {
            let (a, b) = (maxima[i], maxima[i + half]);
            maxima[i] = if b > a { b } else { a };
            nan[i] |= nan[i + half];
        }
        half /= 2;
    }
    if nan[0] == 1 { f32::NAN } else { maxima[0] }
}

/// The Euclidean length of `a`.
pub fn l2_norm(a: &[f32]) -> f32 {
    dot(a, a).sqrt()
}

/// `y += a x`
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(*x, *y);
    }
}

/// `y += x`
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn add_assign(y: &mut [f32], x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// `sum = a + b`
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn add(a: &[f32], b: &[f32], sum: &mut [f32]) {
    for ((sum, a), b) in sum.iter_mut().zip(a).zip(b) {
        *sum = a + b;
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight`, row by row. `x`, `out`: `[rows, weight.len()]`.
/// (Zhang and Sennrich 2019, with the checkpoint's `rms_norm_eps`.)
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mean_square = dot_inline(x, x) / width as f32;
        let scale = 1.0 / (mean_square + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

/// Rotates each head of `x` (`[heads, head_dim]`, one row) by its position; half-split pairs
/// (Su et al. 2021 in the layout of Hugging Face checkpoints). `cos`, `sin`: `[head_dim / 2]`.
#[multiversion(targets("x86_64+avx512f+avx512vl+fma", "x86_64+avx2+fma", "aarch64+neon"))]
pub fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for head in x.chunks_exact_mut(2 * half) {
        let (first, second) = head.split_at_mut(half);
        for i in 0..half {
            let (a, b) = (first[i], second[i]);
            first[i] = a * cos[i] - b * sin[i];
            second[i] = b * cos[i] + a * sin[i];
        }
    }
}

/// 1.5 * 2^23: added to this, a small number keeps its nearest whole in the low bits, ties to even.
pub(super) const ROUND: f32 = 12_582_912.0;

/// `e^x` to about 1 unit in the last place; 0 far below, infinity far above, NaN for NaN.
/// Range reduction by ln 2 and a degree-6 polynomial, without branches so that it vectorises.
#[inline(always)]
pub(super) fn exp_inline(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.3, 88.0);
    let n = (clamped * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_HIGH, clamped);
    let r = n.mul_add(-LN2_LOW, r);
    let mut p = 1.0 / 720.0;
    p = r.mul_add(p, 1.0 / 120.0);
    p = r.mul_add(p, 1.0 / 24.0);
    p = r.mul_add(p, 1.0 / 6.0);
    p = r.mul_add(p, 0.5);
    p = r.mul_add(p, 1.0);
    p = r.mul_add(p, 1.0);
    // A cast would be done number by number. Of NaN nothing sensible comes; it is restored below.
    let whole = (n + ROUND).to_bits();
    let scale = f32::from_bits(whole.wrapping_add(127) << 23);
    let value = p * scale;
    let value = if x < -87.3 { 0.0 } else { value };
    let value = if x > 88.0 { f32::INFINITY } else { value };
    if x.is_nan() { x } else { value }
}

/// `out = silu(gate) * up` for rows of `gate_up`: `[rows, 2 * width]`, gate first.
#[multiversion(targets(
    "x86_64+avx512f+avx512vl+avx512dq+fma",
    "x86_64+avx2+fma",
    "aarch64+neon"
))]
pub fn silu_mul(gate_up: &[f32], width: usize, out: &mut [f32]) {
    for (row, out) in gate_up
        .chunks_exact(2 * width)
        .zip(out.chunks_exact_mut(width))
    {
        let (gate, up) = row.split_at(width);
        for i in 0..width {
            out[i] = gate[i] / (1.0 + exp_inline(-gate[i])) * up[i];
        }
    }
}

/// `out = gelu(gate) * up` with the tanh form of GELU (Hendrycks and Gimpel 2016), as Gemma uses it.
#[multiversion(targets(
    "x86_64+avx512f+avx512vl+avx512dq+fma",
    "x86_64+avx2+fma",
    "aarch64+neon"
))]
pub fn gelu_tanh_mul(gate_up: &[f32], width: usize, out: &mut [f32]) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    for (row, out) in gate_up
        .chunks_exact(2 * width)
        .zip(out.chunks_exact_mut(width))
    {
        let (gate, up) = row.split_at(width);
        for i in 0..width {
            let x = gate[i];
            let inner = SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x);
            // (1 + tanh(u)) / 2 is the logistic function of 2u.
            out[i] = x / (1.0 + exp_inline(-2.0 * inner)) * up[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_exponential_is_within_two_units_in_the_last_place(x in -87.0f32..87.0) {
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_inline(x)) - exact).abs() / exact;
            prop_assert!(error < 2.5e-7, "exp({x}): relative error {error}");
        }

        #[test]
        fn a_dot_product_is_close_to_its_exact_value(a in prop::collection::vec(-2f32..2.0, 0..200)) {
            let exact: f64 = a.iter().map(|a| f64::from(*a) * f64::from(*a)).sum();
            prop_assert!((f64::from(dot(&a, &a)) - exact).abs() <= 1e-4 * (1.0 + exact));
        }
    }

    #[test]
    fn the_highest_is_found_wherever_it_is_and_a_nan_is_not_passed_over() {
        for len in [1usize, 63, 64, 65, 300] {
            for at in [0, len / 2, len - 1] {
                let mut x = vec![-3.0f32; len];
                x[at] = -1.5;
                assert_eq!(highest(&x), -1.5);
                x[at] = f32::NAN;
                assert!(highest(&x).is_nan());
            }
        }
        assert_eq!(highest(&[]), f32::NEG_INFINITY);
        assert_eq!(highest(&[1.0, f32::INFINITY]), f32::INFINITY);
    }

    #[test]
    fn the_exponential_keeps_its_ends() {
        assert_eq!(exp_inline(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_inline(f32::INFINITY), f32::INFINITY);
        assert!(exp_inline(f32::NAN).is_nan());
        assert_eq!(exp_inline(0.0), 1.0);
    }

    #[test]
    fn a_normalised_row_has_unit_mean_square() {
        let x: Vec<f32> = (0..64).map(|i| i as f32 - 20.0).collect();
        let mut out = vec![0.0; 64];
        rms_norm(&x, &[1.0; 64], 0.0, &mut out);
        let mean_square: f32 = out.iter().map(|v| v * v).sum::<f32>() / 64.0;
        assert!((mean_square - 1.0).abs() < 1e-5);
    }

    #[test]
    fn rotation_keeps_length_and_position_zero_changes_nothing() {
        let mut x = vec![0.3, -0.7, 0.1, 0.9];
        rope(&mut x, &[1.0, 1.0], &[0.0, 0.0]);
        assert_eq!(x, [0.3, -0.7, 0.1, 0.9]);
        let before = l2_norm(&x);
        rope(
            &mut x,
            &[0.5f32.cos(), 0.05f32.cos()],
            &[0.5f32.sin(), 0.05f32.sin()],
        );
        assert!((l2_norm(&x) - before).abs() < 1e-6);
    }
}
