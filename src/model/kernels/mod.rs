//! The arithmetic of a forward pass on a CPU: products, attention, norms, activations.
//! Every function works row by row: what a row gets does not depend on how many rows there are,
//! on their order, or on how many threads share the work. That is what makes a decision replayable.
//!
//! Each result is one chain of fused multiply-adds in a fixed order, so the variants that are
//! compiled for AVX-512, AVX2 and plain x86-64 or NEON give the same bits.

mod attention;
mod elementwise;
mod pool;
mod product;
mod quantised;

pub use attention::{AttentionShape, KV_BLOCK, KvLayer, KvType, SpanRows, attend};
pub use elementwise::{
    add, add_assign, axpy, dot, gelu_tanh_mul, highest, l2_norm, rms_norm, rope, silu_mul,
};
pub use pool::{
    ComputePool, beside, current_threads, fill_rows, new_rows, new_rows_in_pieces, parallel,
};
pub use product::{PackedMatrix, ROWS_PER_THREAD, WeightFormat};
pub use quantised::{QUANT_BLOCK, QuantKind, Rounding};

/// Names the instruction set that the kernels chose on this machine, e.g. `fma-chain/avx512`.
/// Two decisions with the same identity, weights and machine kind have the same bits.
pub fn identity() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return "fma-chain/avx512";
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
        {
            return "fma-chain/avx2";
        }
    }
    if cfg!(target_arch = "aarch64") {
        return "fma-chain/neon";
    }
    "fma-chain/portable"
}

/// Bytes that come from memory together.
const LINE: usize = 64;

/// Asks for `items` ahead of their use, where the machine can be asked; not for what they own.
pub fn prefetch<T>(items: &[T]) {
    let start = items.as_ptr().cast::<u8>();
    for at in (0..size_of_val(items)).step_by(LINE) {
        fetch_line(start.wrapping_add(at));
    }
}

/// Asks for the 64 bytes around an address, which need not be one of ours.
#[inline(always)]
fn fetch_line<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which no address can make fail.
        #[allow(unsafe_code)]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(at.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The same, to this core's second cache.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch_far_line<T>(at: *const T) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a hint, which no address can make fail.
    #[allow(unsafe_code)]
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
}

/// A pointer to disjoint parts of one output, handed to the threads of one product.
/// Each caller proves that its parts do not overlap.
struct SharedOut<T>(*mut T);

// SAFETY: the pointer is only used to form slices that do not overlap between threads.
#[allow(unsafe_code)]
unsafe impl<T: Send> Sync for SharedOut<T> {}

/// Hands each of `values`, rows from `first` on, to `store`.
fn emit<const R: usize, const PANEL: usize>(
    first: usize,
    values: &[[f32; PANEL]; R],
    store: &mut impl FnMut(usize, &[f32; PANEL]),
) {
    for (offset, values) in values.iter().enumerate() {
        store(first + offset, values);
    }
}

/// The first of `values`, as many as `target` holds. A whole panel, which is what nearly all are,
/// is copied in registers.
#[inline(always)]
fn store<const PANEL: usize>(target: &mut [f32], values: &[f32; PANEL]) {
    match <&mut [f32; PANEL]>::try_from(&mut *target) {
        Ok(target) => *target = *values,
        Err(_) => target.copy_from_slice(&values[..target.len()]),
    }
}
