//! Tensors on the wire: element type, shape, little-endian bytes, checksum.
//! Knows no site and no model.

use bytes::{Bytes, BytesMut};
use half::{bf16, f16};

use super::proto::{DataType, Tensor};
use crate::error::{Error, Result};

const MAX_DIMENSIONS: usize = 8;
/// Of one tensor's data: with the rest of its message it fits every client's receive limit.
pub(super) const MAX_BYTES: usize = 1 << 20;

/// Element types that hidden states are sent in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    /// `None` stands for a number that was not set.
    pub(super) fn parse(field: &str, number: i32) -> Result<Option<Self>> {
        match DataType::try_from(number) {
            Ok(DataType::Unspecified) => Ok(None),
            Ok(DataType::Fp32) => Ok(Some(Self::F32)),
            Ok(DataType::Fp16) => Ok(Some(Self::F16)),
            Ok(DataType::Bf16) => Ok(Some(Self::Bf16)),
            Ok(DataType::Int8) => Err(Error::unsupported(
                field,
                "INT8 is not supported; send FP32, FP16 or BF16",
            )),
            Err(_) => Err(unknown_number(field, number)),
        }
    }

    pub(super) fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    fn data_type(self) -> DataType {
        match self {
            Self::F32 => DataType::Fp32,
            Self::F16 => DataType::Fp16,
            Self::Bf16 => DataType::Bf16,
        }
    }
}

/// An enum's number that the contract does not name.
pub(super) fn unknown_number(field: &str, number: i32) -> Error {
    Error::invalid(field, format!("{number} is not one of the enum's values"))
}

/// The values of a `[n]` tensor.
///
/// # Errors
/// `InvalidRequest` and `Unsupported` name the part of `field` that is wrong.
pub(super) fn vector(field: &str, tensor: &Tensor) -> Result<Vec<f32>> {
    let dtype = Dtype::parse(&format!("{field}.dtype"), tensor.dtype)?
        .ok_or_else(|| Error::invalid(format!("{field}.dtype"), "must be set"))?;
    check_size(field, tensor, dtype)?;
    check_sum(field, tensor)?;
    if tensor.shape.len() != 1 {
        return Err(Error::invalid(
            format!("{field}.shape"),
            format!("must have one dimension; got {}", tensor.shape.len()),
        ));
    }
    let values = decode(&tensor.data, dtype);
    if values.is_empty() || !values.iter().all(|value| value.is_finite()) {
        return Err(Error::invalid(
            format!("{field}.data"),
            "must hold finite numbers, at least one",
        ));
    }
    Ok(values)
}

/// `values` as a `[rows, width]` tensor with its checksum. `values.len()` must be `rows * width`.
pub(super) fn rows(values: &[f32], width: usize, dtype: Dtype) -> Tensor {
    let data = encode(values, dtype);
    let rows = values.len().checked_div(width).unwrap_or(0);
    Tensor {
        dtype: dtype.data_type().into(),
        // A dimension that fits in memory fits in an i64.
        shape: vec![rows as i64, width as i64],
        crc32c: Some(crc32c::crc32c(&data)),
        data,
    }
}

fn check_size(field: &str, tensor: &Tensor, dtype: Dtype) -> Result<()> {
    let shape_is_wrong = |message: String| Err(Error::invalid(format!("{field}.shape"), message));
    if tensor.shape.is_empty() || tensor.shape.len() > MAX_DIMENSIONS {
        return shape_is_wrong(format!(
            "must have 1 to {MAX_DIMENSIONS} dimensions; got {}",
            tensor.shape.len()
        ));
    }
    let bytes = tensor
        .shape
        .iter()
        .try_fold(dtype.size(), |product, &dimension| {
            product.checked_mul(usize::try_from(dimension).ok()?)
        });
    match bytes {
        None => shape_is_wrong("must not be negative or overflow".into()),
        Some(bytes) if bytes > MAX_BYTES => {
            shape_is_wrong(format!("must need at most {MAX_BYTES} bytes"))
        }
        Some(bytes) if bytes != tensor.data.len() => Err(Error::invalid(
            format!("{field}.data"),
            format!(
                "must be the {bytes} bytes that dtype and shape need; got {}",
                tensor.data.len()
            ),
        )),
        Some(_) => Ok(()),
    }
}

fn check_sum(field: &str, tensor: &Tensor) -> Result<()> {
    match tensor.crc32c {
        Some(sum) if sum != crc32c::crc32c(&tensor.data) => Err(Error::invalid(
            format!("{field}.crc32c"),
            "is not the CRC-32C of the data: the bytes were changed on their way",
        )),
        _ => Ok(()),
    }
}

fn decode(data: &[u8], dtype: Dtype) -> Vec<f32> {
    let halves = || data.as_chunks::<2>().0.iter().copied();
    match dtype {
        Dtype::F32 => data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect(),
        Dtype::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::Bf16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
    }
}

fn encode(values: &[f32], dtype: Dtype) -> Bytes {
    let mut data = BytesMut::with_capacity(values.len().saturating_mul(dtype.size()));
    for &value in values {
        match dtype {
            Dtype::F32 => data.extend_from_slice(&value.to_le_bytes()),
            Dtype::F16 => data.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
            Dtype::Bf16 => data.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
        }
    }
    data.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tensor(shape: &[i64], data: &[u8]) -> Tensor {
        Tensor {
            dtype: DataType::Fp32.into(),
            shape: shape.to_vec(),
            data: Bytes::copy_from_slice(data),
            crc32c: None,
        }
    }

    fn refused_field(tensor: &Tensor) -> String {
        match vector("v", tensor) {
            Err(Error::InvalidRequest { field, .. } | Error::Unsupported { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_tensor_whose_parts_do_not_agree_is_refused_by_the_part() {
        let two = [0; 8];
        let cases: [(&[i64], &[u8], &str); 12] = [
            (&[], &two, "v.shape"),
            (&[1; 9], &[0; 4], "v.shape"),
            (&[-1], &two, "v.shape"),
            (&[i64::MIN], &two, "v.shape"),
            (&[i64::MAX], &two, "v.shape"),
            (&[1 << 33, 1 << 33], &two, "v.shape"),
            (&[1 << 62, 4], &two, "v.shape"),
            (&[1 << 20], &two, "v.shape"),
            (&[1, 2], &two, "v.shape"),
            (&[3], &two, "v.data"),
            (&[2], &two[..7], "v.data"),
            (&[0], &[], "v.data"),
        ];
        for (shape, data, field) in cases {
            assert_eq!(refused_field(&tensor(shape, data)), field, "{shape:?}");
        }
    }

    #[test]
    fn an_element_type_that_we_lack_or_do_not_know_is_refused() {
        for dtype in [0, 4, 5, -1, i32::MAX] {
            let tensor = Tensor {
                dtype,
                ..tensor(&[2], &[0; 8])
            };
            assert_eq!(refused_field(&tensor), "v.dtype", "{dtype}");
        }
        assert!(matches!(
            Dtype::parse("d", 4),
            Err(Error::Unsupported { .. })
        ));
        assert!(matches!(
            Dtype::parse("d", 9),
            Err(Error::InvalidRequest { .. })
        ));
    }

    #[test]
    fn a_number_that_is_not_finite_is_refused() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(refused_field(&tensor(&[1], &value.to_le_bytes())), "v.data");
        }
    }

    #[test]
    fn a_checksum_is_checked_when_it_is_there() {
        let mut tensor = tensor(&[2], &[0; 8]);
        tensor.crc32c = Some(1);
        assert_eq!(refused_field(&tensor), "v.crc32c");
        tensor.crc32c = Some(crc32c::crc32c(&tensor.data));
        assert_eq!(vector("v", &tensor), Ok(vec![0.0; 2]));
    }

    #[test]
    fn sixteen_bits_round_to_nearest_even() {
        let sent = rows(&[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0], 2, Dtype::Bf16);
        assert_eq!(decode(&sent.data, Dtype::Bf16), [1.0, 1.0 + 4.0 / 256.0]);
        assert_eq!(sent.shape, [1, 2]);
    }

    proptest! {
        #[test]
        fn what_is_sent_as_f32_comes_back_bit_for_bit(values in prop::collection::vec(-1e30f32..1e30, 1..64)) {
            let sent = rows(&values, values.len(), Dtype::F32);
            let flat = Tensor { shape: vec![values.len() as i64], ..sent };
            prop_assert_eq!(vector("v", &flat), Ok(values));
        }

        #[test]
        fn no_shape_or_bytes_bring_it_down(shape in prop::collection::vec(any::<i64>(), 0..10), data in prop::collection::vec(any::<u8>(), 0..64), dtype in any::<i32>()) {
            let _ = vector("v", &Tensor { dtype, shape, data: data.into(), crc32c: None });
        }
    }
}
