//! The number formats that weights are stored in, and how they become f32.
//! Knows bytes and blocks; knows no files and no names.

use std::borrow::Cow;
use std::fmt;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

use crate::model::kernels::QuantKind;

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoredType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

const ALL: [StoredType; 13] = [
    StoredType::F32,
    StoredType::F16,
    StoredType::Bf16,
    StoredType::Q4_0,
    StoredType::Q4_1,
    StoredType::Q5_0,
    StoredType::Q5_1,
    StoredType::Q8_0,
    StoredType::Q2K,
    StoredType::Q3K,
    StoredType::Q4K,
    StoredType::Q5K,
    StoredType::Q6K,
];

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        })
    }
}

impl StoredType {
    /// From a GGUF tensor table's type code.
    pub(crate) fn from_ggml(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2K,
            11 => Self::Q3K,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    pub(crate) fn supported() -> String {
        ALL.map(|t| t.to_string()).join(", ")
    }

    /// Elements that share one block (and so one scale).
    pub fn block_elements(self) -> usize {
        self.to_ggml().block_size()
    }

    pub fn block_bytes(self) -> usize {
        self.to_ggml().type_size()
    }

    /// candle's name for the same format.
    pub fn to_ggml(self) -> GgmlDType {
        match self {
            Self::F32 => GgmlDType::F32,
            Self::F16 => GgmlDType::F16,
            Self::Bf16 => GgmlDType::BF16,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q2K => GgmlDType::Q2K,
            Self::Q3K => GgmlDType::Q3K,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }

    /// Whether such weights are multiplied by as they are.
    pub fn has_kernel(self) -> bool {
        self.kernel().is_some()
    }

    /// The kernel that multiplies by such blocks as they are.
    pub(crate) fn kernel(self) -> Option<QuantKind> {
        match self {
            Self::Q4_0 | Self::Q4_1 => Some(QuantKind::Q4_1),
            Self::Q8_0 => Some(QuantKind::Q8_0),
            _ => None,
        }
    }

    /// The same numbers in that kernel's blocks; none where there is no such kernel, or one of
    /// them is not finite.
    pub(crate) fn to_blocks(self, bytes: &[u8]) -> Option<(QuantKind, Vec<u8>)> {
        let kind = self.kernel()?;
        let blocks = match self {
            Self::Q4_0 => {
                let converted = bytes.chunks_exact(self.block_bytes()).map(from_q4_0);
                converted.collect::<Option<Vec<_>>>()?.concat()
            }
            _ => bytes.to_vec(),
        };
        let finite = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).is_finite();
        let sound = |block: &[u8]| match kind {
            QuantKind::Q4_1 => finite(block) && finite(&block[2..]),
            QuantKind::Q8_0 => finite(block),
        };
        let all = blocks.chunks_exact(kind.block_bytes()).all(sound);
        all.then_some((kind, blocks))
    }

    /// `bytes` hold whole blocks and begin at an address divisible by 16 (see [`AlignedBytes`]).
    pub(crate) fn to_f32(self, bytes: &[u8]) -> Result<Vec<f32>, String> {
        let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        Ok(match self {
            Self::F32 => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            Self::F16 => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            Self::Bf16 => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            _ => {
                let elements = bytes.len() / self.block_bytes() * self.block_elements();
                let blocks = self.to_ggml().from_data(Cow::Borrowed(bytes));
                match blocks.dequantize(elements) {
                    Ok(CpuStorage::F32(values)) => values,
                    Ok(_) => return Err(format!("{self} did not dequantise to f32")),
                    Err(error) => return Err(error.to_string()),
                }
            }
        })
    }
}

/// `d (q - 8)` as `d q + m`; the product with 8 is exact, but it may not fit.
fn from_q4_0(block: &[u8]) -> Option<Vec<u8>> {
    let scale = f16::from_le_bytes([block[0], block[1]]);
    let minimum = f16::from_f32(-8.0 * scale.to_f32());
    let mut with_minimum = Vec::with_capacity(block.len() + 2);
    with_minimum.extend_from_slice(&block[..2]);
    with_minimum.extend_from_slice(&minimum.to_le_bytes());
    with_minimum.extend_from_slice(&block[2..]);
    (minimum.to_f32() == -8.0 * scale.to_f32()).then_some(with_minimum)
}

const ALIGNMENT: usize = 16;

/// A buffer whose bytes begin at an address divisible by 16, as candle's block types want.
pub(crate) struct AlignedBytes {
    buffer: Vec<u8>,
    begin: usize,
    length: usize,
}

impl AlignedBytes {
    /// Fails where there is no room: a file may claim any length.
    pub(crate) fn zeroed(length: usize) -> Result<Self, String> {
        let no_room = |_| format!("{length} bytes do not fit in memory");
        let padded = length.saturating_add(ALIGNMENT);
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(padded).map_err(no_room)?;
        buffer.resize(padded, 0);
        // Zero where it cannot be computed, which only an interpreter does.
        let begin = buffer.as_ptr().align_offset(ALIGNMENT);
        let begin = if begin < ALIGNMENT { begin } else { 0 };
        Ok(Self {
            buffer,
            begin,
            length,
        })
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.buffer[self.begin..self.begin + self.length]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.buffer[self.begin..self.begin + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_codes_agree_with_block_sizes() {
        for (code, elements, bytes) in [(0, 1, 4), (3, 32, 20), (8, 32, 34), (14, 256, 210)] {
            let stored = StoredType::from_ggml(code).expect("a supported code");
            assert_eq!(
                (stored.block_elements(), stored.block_bytes()),
                (elements, bytes)
            );
        }
        assert_eq!(StoredType::from_ggml(9), None);
    }

    #[test]
    fn a_kernel_s_blocks_hold_the_same_numbers() {
        for stored in [StoredType::Q4_0, StoredType::Q4_1, StoredType::Q8_0] {
            let mut bytes = AlignedBytes::zeroed(2 * stored.block_bytes()).expect("room");
            for (index, byte) in bytes.as_mut_slice().iter_mut().enumerate() {
                *byte = (index * 37 % 251) as u8;
            }
            for block in bytes.as_mut_slice().chunks_exact_mut(stored.block_bytes()) {
                block[..2].copy_from_slice(&f16::from_f32(0.37).to_le_bytes());
                if stored == StoredType::Q4_1 {
                    block[2..4].copy_from_slice(&f16::from_f32(-1.5).to_le_bytes());
                }
            }
            let (kind, blocks) = stored.to_blocks(bytes.as_slice()).expect("finite");
            let same = match kind {
                QuantKind::Q4_1 => StoredType::Q4_1,
                QuantKind::Q8_0 => StoredType::Q8_0,
            };
            let mut aligned = AlignedBytes::zeroed(blocks.len()).expect("room");
            aligned.as_mut_slice().copy_from_slice(&blocks);
            assert_eq!(
                same.to_f32(aligned.as_slice()),
                stored.to_f32(bytes.as_slice())
            );
        }
        assert!(
            StoredType::Q8_0.to_blocks(&[0xff; 34]).is_none(),
            "a scale that is no number"
        );
        assert!(StoredType::Q6K.to_blocks(&[0; 210]).is_none());
    }

    #[test]
    fn a_q4_1_block_is_scale_times_nibble_plus_minimum() {
        let mut bytes = AlignedBytes::zeroed(20).expect("room");
        let block = bytes.as_mut_slice();
        block[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        block[2..4].copy_from_slice(&f16::from_f32(-1.0).to_le_bytes());
        block[4] = 0x31;
        let values = StoredType::Q4_1.to_f32(bytes.as_slice()).expect("a block");
        assert_eq!(values.len(), 32);
        assert_eq!((values[0], values[1], values[16]), (-0.5, -1.0, 0.5));
    }

    #[test]
    fn half_types_widen_exactly() {
        let one = f16::from_f32(1.5).to_le_bytes();
        assert_eq!(StoredType::F16.to_f32(&one), Ok(vec![1.5]));
        let one = bf16::from_f32(-2.0).to_le_bytes();
        assert_eq!(StoredType::Bf16.to_f32(&one), Ok(vec![-2.0]));
    }
}
