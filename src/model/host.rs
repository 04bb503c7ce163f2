//! Tensors seen from the host: on a CPU the very memory, elsewhere a copy.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};

use crate::error::{Error, Result};

/// Hands the tensor's numbers, row-major, to `f`.
pub fn read<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => {
            let start = layout.start_offset();
            Ok(f(&values[start..start + tensor.elem_count()]))
        }
        Storage::Cpu(_) => Err(Error::internal("hidden states are f32")),
        _ => {
            drop(storage);
            let copy = tensor
                .to_dtype(DType::F32)?
                .flatten_all()?
                .to_vec1::<f32>()?;
            Ok(f(&copy))
        }
    }
}

/// A tensor of `values` with the shape and the device of `like`.
pub fn tensor_like(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, like.shape(), like.device())?)
}

/// `[rows, width]` on the host.
pub fn matrix(values: Vec<f32>, width: usize) -> Result<Tensor> {
    let rows = values.len() / width;
    Ok(Tensor::from_vec(values, (rows, width), &Device::Cpu)?)
}
