//! The shape of a model, checked once, whichever file format it came from.
//! Knows no files: `source` fills these types and `check` says whether they make sense.

use std::f32::consts::PI;
use std::fmt;

/// The transformer families that Inwit can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama, Mistral, SmolLM.
    Llama,
    Qwen2,
    Qwen3,
    Gemma3,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3",
        })
    }
}

/// The gate's nonlinearity in the feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    Silu,
    /// GELU in its tanh approximation (`gelu_pytorch_tanh`).
    GeluTanh,
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Silu => "silu",
            Self::GeluTanh => "gelu_tanh",
        })
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub d_model: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub d_mlp: usize,
    /// Rows of the embedding; a tokenizer may have fewer tokens, never more.
    pub vocab_size: usize,
    /// Positions that the model was trained for.
    pub context_length: usize,
    pub rms_norm_eps: f32,
    /// Rotary frequencies of the global layers.
    pub rope: Rope,
    /// Rotary frequencies of the sliding layers, where they differ (gemma3).
    pub local_rope: Option<Rope>,
    /// On a sliding layer, position `i` attends to `j` with `i - j < sliding_window`.
    pub sliding_window: Option<usize>,
    /// One entry per layer.
    pub sliding_layers: Vec<bool>,
    /// The language-model head is the embedding.
    pub tied_embeddings: bool,
    /// gemma3: the square root of `d_model`, rounded to the checkpoint's type.
    pub embed_scale: Option<f32>,
    /// What the attention logits are multiplied by.
    pub attention_scale: f32,
    pub qkv_bias: bool,
    pub qk_norm: bool,
    pub activation: Activation,
}

/// Rotary embedding of one kind of layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f32,
    /// `head_dim / 2` inverse frequencies, scaling already applied.
    pub inv_freq: Vec<f32>,
}

/// How a checkpoint stretches its rotary frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum RopeScaling {
    None,
    /// Every frequency divided by `factor`.
    Linear {
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_context: f32,
    },
}

impl Rope {
    /// Inverse frequencies in f32, in the order of operations of Hugging Face transformers.
    pub(crate) fn new(theta: f32, head_dim: usize, scaling: RopeScaling) -> Self {
        // A larger head size is refused by `check`; nothing is sized by it before.
        let inv_freq = (0..head_dim.min(MAX_HEAD_DIM) / 2)
            .map(|i| 1.0 / theta.powf((2 * i) as f32 / head_dim as f32))
            .map(|inv| scale_frequency(inv, scaling))
            .collect();
        Self { theta, inv_freq }
    }
}

fn scale_frequency(inv_freq: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::None => inv_freq,
        RopeScaling::Linear { factor } => inv_freq / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => {
            let wavelength = 2.0 * PI / inv_freq;
            if wavelength > original_context / low_freq_factor {
                inv_freq / factor
            } else if wavelength < original_context / high_freq_factor {
                inv_freq
            } else {
                let smooth = (original_context / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
            }
        }
    }
}

/// Larger than any model Inwit can run, small enough that products of them cannot overflow.
const MAX_LAYERS: usize = 1024;
const MAX_HEADS: usize = 1024;
pub(super) const MAX_HEAD_DIM: usize = 1024;
const MAX_WIDTH: usize = 1 << 18;
const MAX_VOCABULARY: usize = 1 << 22;
const MAX_CONTEXT: usize = 1 << 26;

impl ModelConfig {
    /// Says what is wrong with the numbers, naming the field.
    pub(crate) fn check(&self) -> Result<(), String> {
        between("number of layers", self.n_layers, 1, MAX_LAYERS)?;
        between("number of attention heads", self.n_heads, 1, MAX_HEADS)?;
        between(
            "number of key-value heads",
            self.n_kv_heads,
            1,
            self.n_heads,
        )?;
        between("head size", self.head_dim, 2, MAX_HEAD_DIM)?;
        between("hidden size", self.d_model, 1, MAX_WIDTH)?;
        between("feed-forward size", self.d_mlp, 1, MAX_WIDTH)?;
        between("vocabulary size", self.vocab_size, 1, MAX_VOCABULARY)?;
        between("context length", self.context_length, 1, MAX_CONTEXT)?;
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return Err(format!(
                "{} attention heads cannot share {} key-value heads evenly",
                self.n_heads, self.n_kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!(
                "rotary embedding needs an even head size, not {}",
                self.head_dim
            ));
        }
        positive("RMS-norm epsilon", self.rms_norm_eps)?;
        positive("attention scale", self.attention_scale)?;
        self.check_rope("rotary base", &self.rope)?;
        if let Some(rope) = &self.local_rope {
            self.check_rope("local rotary base", rope)?;
        }
        if let Some(window) = self.sliding_window {
            between("sliding window", window, 1, MAX_CONTEXT)?;
        }
        if self.sliding_layers.len() != self.n_layers {
            return Err(format!(
                "{} layer types for {} layers",
                self.sliding_layers.len(),
                self.n_layers
            ));
        }
        if self.sliding_window.is_none() && self.sliding_layers.contains(&true) {
            return Err("sliding layers without a sliding window".into());
        }
        Ok(())
    }

    fn check_rope(&self, what: &str, rope: &Rope) -> Result<(), String> {
        positive(what, rope.theta)?;
        if rope.inv_freq.len() != self.head_dim / 2 {
            return Err(format!(
                "{} rotary frequencies for a head size of {}",
                rope.inv_freq.len(),
                self.head_dim
            ));
        }
        rope.inv_freq
            .iter()
            .try_for_each(|&f| positive("rotary frequency", f))
    }

    /// A text that is equal for equal architectures, whichever file format they came from.
    ///
    /// Frequencies enter as ratios to their unscaled values in three digits: the last bits of
    /// a frequency depend on who computed the power, the architecture does not.
    pub(crate) fn canonical(&self) -> String {
        use std::fmt::Write;
        let mut text = format!(
            "family={} d_model={} n_layers={} n_heads={} n_kv_heads={} head_dim={} d_mlp={} \
             vocab_size={} context_length={} rms_norm_eps={:.3e} tied={} attention_scale={:.4e} \
             qkv_bias={} qk_norm={} activation={}",
            self.family,
            self.d_model,
            self.n_layers,
            self.n_heads,
            self.n_kv_heads,
            self.head_dim,
            self.d_mlp,
            self.vocab_size,
            self.context_length,
            self.rms_norm_eps,
            self.tied_embeddings,
            self.attention_scale,
            self.qkv_bias,
            self.qk_norm,
            self.activation,
        );
        for (name, rope) in [
            ("rope", Some(&self.rope)),
            ("local_rope", self.local_rope.as_ref()),
        ] {
            if let Some(rope) = rope {
                let unscaled = Rope::new(rope.theta, self.head_dim, RopeScaling::None);
                let _ = write!(text, " {name}={:.6e}:", rope.theta);
                for (scaled, plain) in rope.inv_freq.iter().zip(&unscaled.inv_freq) {
                    let _ = write!(text, "{:.3},", scaled / plain);
                }
            }
        }
        let sliding: String = self
            .sliding_layers
            .iter()
            .map(|&s| if s { 's' } else { 'g' })
            .collect();
        // A window that no layer uses changes nothing.
        let window = self
            .sliding_window
            .filter(|_| self.sliding_layers.contains(&true));
        let _ = write!(text, " window={window:?} layers={sliding}");
        text
    }
}

fn between(what: &str, value: usize, least: usize, most: usize) -> Result<(), String> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(format!("{what} is {value}, must be {least} to {most}"))
    }
}

fn positive(what: &str, value: f32) -> Result<(), String> {
    if value.is_finite() && value > 0.0 {
        Ok(())
    } else {
        Err(format!("{what} is {value}, must be positive and finite"))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn tiny() -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            d_model: 8,
            n_layers: 2,
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: 4,
            d_mlp: 16,
            vocab_size: 32,
            context_length: 64,
            rms_norm_eps: 1e-5,
            rope: Rope::new(10000.0, 4, RopeScaling::None),
            local_rope: None,
            sliding_window: None,
            sliding_layers: vec![false; 2],
            tied_embeddings: true,
            embed_scale: None,
            attention_scale: 0.5,
            qkv_bias: false,
            qk_norm: false,
            activation: Activation::Silu,
        }
    }

    #[test]
    fn a_sensible_config_passes() {
        assert_eq!(tiny().check(), Ok(()));
    }

    #[test]
    fn absurd_numbers_are_named() {
        type Breakage = fn(&mut ModelConfig);
        let broken: [(&str, Breakage); 8] = [
            ("number of layers", |c| c.n_layers = 1_000_000_000),
            ("number of attention heads", |c| c.n_heads = 0),
            ("key-value heads", |c| c.n_kv_heads = 3),
            ("head size", |c| c.head_dim = 5),
            ("RMS-norm epsilon", |c| c.rms_norm_eps = f32::NAN),
            ("rotary base", |c| c.rope.theta = f32::NAN),
            ("layer types", |c| c.sliding_layers.clear()),
            ("sliding window", |c| c.sliding_layers[0] = true),
        ];
        for (what, breakage) in broken {
            let mut config = tiny();
            breakage(&mut config);
            let error = config.check().expect_err(what);
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn llama3_scaling_keeps_fast_frequencies_and_slows_slow_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let plain = Rope::new(500_000.0, 128, RopeScaling::None);
        let scaled = Rope::new(500_000.0, 128, scaling);
        assert_eq!(plain.inv_freq[0], scaled.inv_freq[0]);
        assert_eq!(plain.inv_freq[63] / 8.0, scaled.inv_freq[63]);
        let ramp = (0..64).filter(|&i| {
            let ratio = plain.inv_freq[i] / scaled.inv_freq[i];
            ratio > 1.001 && ratio < 7.999
        });
        assert!(ramp.count() > 3);
    }

    #[test]
    fn the_last_bit_of_a_frequency_does_not_change_the_architecture() {
        let mut nudged = tiny();
        nudged.rope.inv_freq[1] = nudged.rope.inv_freq[1].next_up();
        assert_eq!(tiny().canonical(), nudged.canonical());
        nudged.rope.inv_freq[1] /= 2.0;
        assert_ne!(tiny().canonical(), nudged.canonical());
    }
}
