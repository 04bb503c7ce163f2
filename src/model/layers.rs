//! The parts of a transformer block, each as a paper writes it.
//! Knows weights and rows; knows no families, no requests and no hooks.

use std::cell::Cell;

use candle_core::{D, Device, Tensor};

use super::host;
use super::kernels::{self, PackedMatrix, QuantKind, ROWS_PER_THREAD, Rounding, WeightFormat};
use crate::error::{Error, Result};

/// `y = x W^T`. On a CPU the weight is packed for our kernel, elsewhere it is a tensor.
pub enum Linear {
    Packed(PackedMatrix),
    /// `[inputs, outputs]`
    Dense(Tensor),
}

impl Linear {
    /// `weight`: row-major `[outputs, inputs]`.
    pub fn new(
        weight: Vec<f32>,
        outputs: usize,
        inputs: usize,
        placement: &Placement,
    ) -> Result<Self> {
        match &placement.device {
            Device::Cpu if !placement.portable => {
                let format = placement.weights;
                let most = format.rounded_to().map_or(f32::INFINITY, QuantKind::most);
                if let Some(weight) = weight.iter().find(|weight| weight.abs() > most) {
                    return Err(Error::Config(format!(
                        "--weights {format}: the model has a weight of {weight}, more than a scale \
                         of 16 bits holds; take f32 or bf16"
                    )));
                }
                let packed = PackedMatrix::pack(&weight, outputs, inputs, format);
                Ok(Self::Packed(packed))
            }
            device => {
                let weight = Tensor::from_vec(weight, (outputs, inputs), &Device::Cpu)?;
                let weight = weight.t()?.contiguous()?.to_device(device)?;
                Ok(Self::Dense(weight))
            }
        }
    }

    /// `[rows, inputs]` -> `[rows, outputs]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Packed(weight) => {
                let y = host::read(x, |x| weight.product(x))?;
                host::matrix(y, weight.outputs())
            }
            Self::Dense(weight) => Ok(x.matmul(weight)?),
        }
    }

    /// Row `row` of the weight, `[inputs]`.
    pub fn row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Packed(weight) => weight.row(row, out),
            Self::Dense(weight) => {
                let row = weight.narrow(1, row, 1)?.flatten_all()?;
                out.copy_from_slice(&row.to_device(&Device::Cpu)?.to_vec1::<f32>()?);
            }
        }
        Ok(())
    }

    /// The same with its inputs rounded so, where it rounds them.
    pub fn with_inputs_rounded(self, rounding: Rounding) -> Self {
        match self {
            Self::Packed(weight) => Self::Packed(weight.with_inputs_rounded(rounding)),
            Self::Dense(_) => self,
        }
    }

    /// How its weights are held.
    pub fn held_as(&self) -> &'static str {
        match self {
            Self::Packed(weight) => weight.held_as(),
            Self::Dense(_) => "f32",
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Self::Packed(weight) => weight.bytes(),
            Self::Dense(weight) => weight.elem_count() * 4,
        }
    }
}

/// Where a model's numbers live and how its weights are kept.
#[derive(Clone, Debug)]
pub struct Placement {
    pub device: Device,
    pub weights: WeightFormat,
    /// Runs the tensor path that other devices take, on a CPU: it is how that path is tested.
    pub portable: bool,
}

impl Placement {
    pub fn cpu(weights: WeightFormat) -> Self {
        Self {
            device: Device::Cpu,
            weights,
            portable: false,
        }
    }

    /// Whether our CPU kernels do the work.
    pub fn uses_kernels(&self) -> bool {
        matches!(self.device, Device::Cpu) && !self.portable
    }
}

/// Root-mean-square norm (Zhang and Sennrich 2019).
pub struct RmsNorm {
    /// `[width]`, the multiplier itself: gemma's `1 +` is already in it.
    weight: Vec<f32>,
    on_device: Option<Tensor>,
    eps: f32,
}

impl RmsNorm {
    pub fn new(weight: Vec<f32>, eps: f32, placement: &Placement) -> Result<Self> {
        let on_device = if placement.uses_kernels() {
            None
        } else {
            Some(Tensor::new(weight.as_slice(), &placement.device)?)
        };
        Ok(Self {
            weight,
            on_device,
            eps,
        })
    }

    /// `[rows, width]`, or `[rows, n * width]` taken as `n` parts -> the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Some(weight) = &self.on_device else {
            let y = host::read(x, |x| {
                let width = self.weight.len();
                kernels::new_rows(x.len() / width, width, |first, y| {
                    let x = &x[first * width..first * width + y.len()];
                    kernels::rms_norm(x, &self.weight, self.eps, y);
                })
            })?;
            return host::tensor_like(y, x);
        };
        let parts = x.reshape(((), self.weight.len()))?;
        let mean_square = parts.sqr()?.mean_keepdim(D::Minus1)?;
        let scale = (mean_square + f64::from(self.eps))?.sqrt()?;
        let normal = parts.broadcast_div(&scale)?.broadcast_mul(weight)?;
        Ok(normal.reshape(x.shape())?)
    }

    /// Normalises parts of `width` numbers in place, on the host.
    pub fn forward_host(&self, x: &mut [f32]) {
        let mut out = vec![0f32; x.len()];
        kernels::rms_norm(x, &self.weight, self.eps, &mut out);
        x.copy_from_slice(&out);
    }
}

/// `down(act(gate(x)) * up(x))` (Shazeer 2020), gate and up in one product.
pub struct Mlp {
    /// `[2 * d_mlp, d_model]`, gate first.
    pub gate_up_proj: Linear,
    /// `[d_model, d_mlp]`
    pub down_proj: Linear,
    pub activation: Activation,
    pub d_mlp: usize,
}

pub use super::config::Activation;

impl Mlp {
    /// `[rows, d_model]` -> `[rows, d_model]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let (Linear::Packed(gate_up), Linear::Packed(down)) =
            (&self.gate_up_proj, &self.down_proj)
        {
            let y = host::read(x, |x| self.on_host(x, gate_up, down))?;
            return host::matrix(y, down.outputs());
        }
        let gate_up = self.gate_up_proj.forward(x)?;
        let gate = gate_up.narrow(1, 0, self.d_mlp)?;
        let up = gate_up.narrow(1, self.d_mlp, self.d_mlp)?;
        let gate = match self.activation {
            Activation::Silu => gate.silu()?,
            Activation::GeluTanh => gate.gelu()?,
        };
        self.down_proj.forward(&(gate * up)?)
    }

    fn on_host(&self, x: &[f32], gate_up: &PackedMatrix, down: &PackedMatrix) -> Vec<f32> {
        let (inputs, outputs) = (gate_up.inputs(), down.outputs());
        let rows = x.len() / inputs;
        if rows < ROWS_PER_THREAD * kernels::current_threads() {
            let mut y = vec![0f32; rows * outputs];
            self.rows_on_host(x, gate_up, down, &mut y);
            return y;
        }
        kernels::new_rows_in_pieces(rows, outputs, ROWS_PER_THREAD, |first, y| {
            let count = y.len() / outputs;
            let x = &x[first * inputs..(first + count) * inputs];
            self.rows_on_host(x, gate_up, down, y);
        })
    }

    fn rows_on_host(&self, x: &[f32], gate_up: &PackedMatrix, down: &PackedMatrix, y: &mut [f32]) {
        let rows = x.len() / gate_up.inputs();
        let (mut both, mut hidden) = HIDDEN.take();
        both.resize(rows * 2 * self.d_mlp, 0.0);
        hidden.resize(rows * self.d_mlp, 0.0);
        gate_up.product_into(x, &mut both);
        let width = self.d_mlp;
        kernels::fill_rows(&mut hidden, width, |first, hidden| {
            let both = &both[2 * first * width..2 * (first * width + hidden.len())];
            match self.activation {
                Activation::Silu => kernels::silu_mul(both, width, hidden),
                Activation::GeluTanh => kernels::gelu_tanh_mul(both, width, hidden),
            }
        });
        down.product_into(&hidden, y);
        HIDDEN.set((both, hidden));
    }
}

thread_local! {
    /// What the last rows were between the two products: the memory serves the next.
    static HIDDEN: Cell<(Vec<f32>, Vec<f32>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

/// Cosines and sines of one batch's positions, `[rows, head_dim / 2]` each.
pub struct RopeRows {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeRows {
    pub fn new(inv_freq: &[f32], positions: &[u32]) -> Self {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for inv_freq in inv_freq {
                let angle = *position as f32 * inv_freq;
                cos.push(angle.cos());
                sin.push(angle.sin());
            }
        }
        Self {
            half: inv_freq.len(),
            cos,
            sin,
        }
    }

    /// Rotates every head of row `row`: `[heads, head_dim]`.
    pub fn rotate(&self, row: usize, heads: &mut [f32]) {
        let range = row * self.half..(row + 1) * self.half;
        kernels::rope(heads, &self.cos[range.clone()], &self.sin[range]);
    }

    /// Rotates `[rows, heads, head_dim]` on any device.
    pub fn rotate_tensor(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, _, head_dim) = x.dims3()?;
        let shape = (rows, 1, self.half);
        let cos = Tensor::from_slice(&self.cos, shape, x.device())?;
        let sin = Tensor::from_slice(&self.sin, shape, x.device())?;
        let a = x.narrow(2, 0, head_dim / 2)?;
        let b = x.narrow(2, head_dim / 2, head_dim / 2)?;
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[first, second], 2)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_that_its_format_cannot_hold_is_an_error() {
        let made = |weight: f32, format| {
            let placement = Placement::cpu(format);
            Linear::new(vec![weight, 1.0], 1, 2, &placement).map(|linear| {
                let mut row = [0.0; 2];
                linear.row(0, &mut row).expect("a row");
                row.iter().all(|weight| weight.is_finite())
            })
        };
        for (weight, format) in [
            (7e4, WeightFormat::Q8_0),
            (6e4, WeightFormat::Q4_1),
            (1e9, WeightFormat::F32),
        ] {
            assert!(made(weight, format).expect("fits"), "{weight} as {format}");
        }
        for (weight, format) in [(9e6, WeightFormat::Q8_0), (-7e4, WeightFormat::Q4_1)] {
            let error = made(weight, format).expect_err("is too large");
            assert!(error.to_string().contains("--weights"), "{error}");
        }
    }
}
