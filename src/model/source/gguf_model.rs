//! What a GGUF file's keys and tensor names mean.
//! Knows llama.cpp's conventions and turns them into Hugging Face's; knows nothing of bytes.

use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::Path;

use super::gguf::{Header, Value};
use super::gguf_tokenizer;
use super::{
    Adjustment, EMBEDDING, HEAD, Parts, StoredTensor, StoredType, TensorEntry, WeightFile,
};
use crate::error::{Error, Result};
use crate::model::config::{MAX_HEAD_DIM, RopeScaling};
use crate::model::{Activation, ChatTemplate, Family, ModelConfig, Rope};

pub(super) fn open(path: &Path) -> Result<Parts> {
    let file = WeightFile::open(path)?;
    let fail = |message: String| Error::file(path.display(), message);
    let file_bytes = file.bytes;
    let header = file.rewound(|file| Header::read(BufReader::new(file), file_bytes))?;
    let metadata = Metadata(&header.metadata);
    let mut entries: BTreeMap<&str, &TensorEntry> = header
        .tensors
        .iter()
        .map(|t| (t.name.as_str(), t))
        .collect();

    let rope_divisors = match entries.remove(ROPE_FREQUENCIES) {
        Some(entry) => {
            let pairs = entry
                .shape
                .iter()
                .try_fold(1usize, |n, d| n.checked_mul(*d));
            if pairs.is_none_or(|pairs| pairs > MAX_HEAD_DIM / 2) {
                let message = format!("`{ROPE_FREQUENCIES}` holds more than a head's rotary pairs");
                return Err(fail(message));
            }
            let bytes = file.read(entry)?;
            let divisors = entry.stored_type.to_f32(bytes.as_slice());
            Some(divisors.map_err(fail)?)
        }
        None => None,
    };
    let config = config(&metadata, &entries, rope_divisors.as_deref()).map_err(fail)?;
    let tokenizer = gguf_tokenizer::build(&metadata).map_err(fail)?;
    let template = match metadata.text("tokenizer.chat_template").map_err(fail)? {
        Some(source) => {
            let template = ChatTemplate::new(source, &tokenizer);
            Some(template.map_err(|error| fail(format!("its chat template: {error}")))?)
        }
        None => None,
    };
    let tensors = entries
        .into_values()
        .map(|entry| stored(entry, &config))
        .collect();
    let name = match metadata.text("general.name").map_err(fail)? {
        Some(name) if !name.trim().is_empty() => name.trim().to_owned(),
        _ => path
            .file_stem()
            .map_or_else(String::new, |s| s.to_string_lossy().into_owned()),
    };
    Ok(Parts {
        config,
        tokenizer,
        template,
        name,
        files: vec![file],
        tensors,
    })
}

/// Llama 3's frequency scaling, one divisor per rotary pair.
const ROPE_FREQUENCIES: &str = "rope_freqs.weight";

fn stored(entry: &TensorEntry, config: &ModelConfig) -> (String, StoredTensor) {
    let name = checkpoint_name(&entry.name, config.family);
    // Converters of the llama architecture interleave rotary pairs; the others keep halves.
    let adjustment = match name.as_deref() {
        Some(name) if config.family == Family::Llama && name.ends_with("q_proj.weight") => {
            Adjustment::SplitRotaryPairs {
                heads: config.n_heads,
            }
        }
        Some(name) if config.family == Family::Llama && name.ends_with("k_proj.weight") => {
            Adjustment::SplitRotaryPairs {
                heads: config.n_kv_heads,
            }
        }
        _ => Adjustment::None,
    };
    let stored = StoredTensor {
        file: 0,
        entry: entry.clone(),
        adjustment,
    };
    // A name that is not known keeps its spelling: nobody will ask for it, and that is an error.
    (name.unwrap_or_else(|| entry.name.clone()), stored)
}

/// llama.cpp's tensor name in Hugging Face's spelling.
fn checkpoint_name(name: &str, family: Family) -> Option<String> {
    match name {
        "token_embd.weight" => return Some(EMBEDDING.into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some(HEAD.into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    if layer.parse::<usize>().ok()?.to_string() != layer || !matches!(kind, "weight" | "bias") {
        return None;
    }
    let part = match (part, family) {
        ("attn_norm", _) => "input_layernorm",
        ("attn_q", _) => "self_attn.q_proj",
        ("attn_k", _) => "self_attn.k_proj",
        ("attn_v", _) => "self_attn.v_proj",
        ("attn_output", _) => "self_attn.o_proj",
        ("attn_q_norm", _) => "self_attn.q_norm",
        ("attn_k_norm", _) => "self_attn.k_norm",
        ("ffn_gate", _) => "mlp.gate_proj",
        ("ffn_up", _) => "mlp.up_proj",
        ("ffn_down", _) => "mlp.down_proj",
        ("ffn_norm", Family::Gemma3) => "pre_feedforward_layernorm",
        ("post_attention_norm", Family::Gemma3) => "post_attention_layernorm",
        ("post_ffw_norm", Family::Gemma3) => "post_feedforward_layernorm",
        ("ffn_norm", _) => "post_attention_layernorm",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

/// Typed access to metadata; errors name the key.
pub(super) struct Metadata<'a>(pub(super) &'a BTreeMap<String, Value>);

impl<'a> Metadata<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key)
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<usize>, String> {
        self.get(key).map(|value| integer(key, value)).transpose()
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f32>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value as f32)),
            Some(Value::Unsigned(value)) => Ok(Some(*value as f32)),
            Some(other) => Err(format!("`{key}` must be a number, not {}", kind(other))),
        }
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(format!("`{key}` must be a boolean, not {}", kind(other))),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(value)) => Ok(Some(value)),
            Some(other) => Err(format!("`{key}` must be a string, not {}", kind(other))),
        }
    }

    pub(super) fn array(&self, key: &str) -> Result<Option<&'a [Value]>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(format!("`{key}` must be an array, not {}", kind(other))),
        }
    }

    pub(super) fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>, String> {
        let Some(values) = self.array(key)? else {
            return Ok(None);
        };
        let text = |value: &'a Value| match value {
            Value::Text(text) => Ok(text.as_str()),
            other => Err(format!("`{key}` must hold strings, not {}", kind(other))),
        };
        values.iter().map(text).collect::<Result<_, _>>().map(Some)
    }
}

pub(super) fn integer(key: &str, value: &Value) -> Result<usize, String> {
    let number = match value {
        Value::Unsigned(value) => usize::try_from(*value).ok(),
        Value::Signed(value) => usize::try_from(*value).ok(),
        other => return Err(format!("`{key}` must be an integer, not {}", kind(other))),
    };
    number.ok_or_else(|| format!("`{key}` is negative or too large"))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Unsigned(_) | Value::Signed(_) => "an integer",
        Value::Float(_) => "a float",
        Value::Bool(_) => "a boolean",
        Value::Text(_) => "a string",
        Value::Array(_) => "an array",
    }
}

/// The hyper-parameters of one architecture, which share its name as a prefix.
struct Hyper<'a> {
    metadata: &'a Metadata<'a>,
    architecture: &'a str,
}

impl Hyper<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn integer(&self, name: &str) -> Result<Option<usize>, String> {
        let key = self.key(name);
        // Some converters write one value per layer; only equal ones are supported.
        if let Some(Value::Array(values)) = self.metadata.get(&key) {
            let first = values.first().ok_or_else(|| format!("`{key}` is empty"))?;
            if values.iter().any(|value| value != first) {
                return Err(format!(
                    "`{key}` differs between layers, which is not supported"
                ));
            }
            return integer(&key, first).map(Some);
        }
        self.metadata.integer(&key)
    }

    fn float(&self, name: &str) -> Result<Option<f32>, String> {
        self.metadata.float(&self.key(name))
    }

    fn needed(&self, name: &str) -> Result<usize, String> {
        self.integer(name)?
            .ok_or_else(|| format!("key `{}` is missing", self.key(name)))
    }

    /// Keys that would change the computation in ways not known here are an error.
    fn check_known(&self) -> Result<(), String> {
        let prefix = self.key("");
        let unknown = self
            .metadata
            .0
            .keys()
            .filter_map(|key| key.strip_prefix(&prefix))
            .find(|name| !KNOWN_KEYS.contains(name));
        if let Some(name) = unknown {
            return Err(format!(
                "key `{}` is not known, so its effect on the model is not either",
                self.key(name)
            ));
        }
        for name in ["expert_count", "expert_used_count"] {
            if self.integer(name)?.unwrap_or(0) != 0 {
                return Err(format!(
                    "`{}`: mixtures of experts are not supported",
                    self.key(name)
                ));
            }
        }
        if self.metadata.boolean(&self.key("attention.causal"))? == Some(false) {
            return Err("attention that is not causal is not supported".into());
        }
        Ok(())
    }
}

const KNOWN_KEYS: [&str; 23] = [
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
];

fn family(architecture: &str) -> Result<Family, String> {
    Ok(match architecture {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        "gemma3" => Family::Gemma3,
        other => {
            return Err(format!(
                "architecture `{other}` is not supported; supported are llama (with mistral and SmolLM), qwen2, qwen3 and gemma3"
            ));
        }
    })
}

fn config(
    metadata: &Metadata<'_>,
    tensors: &BTreeMap<&str, &TensorEntry>,
    rope_divisors: Option<&[f32]>,
) -> Result<ModelConfig, String> {
    let architecture = metadata
        .text("general.architecture")?
        .ok_or("key `general.architecture` is missing")?;
    let family = family(architecture)?;
    let hyper = Hyper {
        metadata,
        architecture,
    };
    hyper.check_known()?;

    let d_model = hyper.needed("embedding_length")?;
    let n_layers = hyper.needed("block_count")?;
    let n_heads = hyper.needed("attention.head_count")?;
    if n_heads == 0 {
        return Err(format!("`{}` is 0", hyper.key("attention.head_count")));
    }
    let head_dim = match hyper.integer("attention.key_length")? {
        Some(length) => length,
        None => d_model / n_heads,
    };
    for name in ["attention.value_length", "rope.dimension_count"] {
        if hyper
            .integer(name)?
            .is_some_and(|length| length != head_dim)
        {
            return Err(format!(
                "`{}` differs from the head size {head_dim}, which is not supported",
                hyper.key(name)
            ));
        }
    }
    let embedding = tensors
        .get("token_embd.weight")
        .ok_or("tensor `token_embd.weight` is missing")?;
    let vocab_size = embedding.shape[0];
    if hyper
        .integer("vocab_size")?
        .is_some_and(|size| size != vocab_size)
    {
        return Err(format!(
            "`{}` differs from the {vocab_size} rows of `token_embd.weight`",
            hyper.key("vocab_size")
        ));
    }
    // Checked before anything is sized by it.
    if n_layers > tensors.len() {
        return Err(format!(
            "{n_layers} layers, but only {} tensors",
            tensors.len()
        ));
    }
    let gemma = family == Family::Gemma3;
    let (sliding_window, sliding_layers) = sliding(&hyper, family, n_layers)?;
    // llama.cpp's rule for the one size (27B) whose scale is not that of its head size.
    let query_dim = if gemma && n_layers == 62 {
        d_model / n_heads
    } else {
        head_dim
    };
    Ok(ModelConfig {
        family,
        d_model,
        n_layers,
        n_heads,
        n_kv_heads: hyper.integer("attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        d_mlp: hyper.needed("feed_forward_length")?,
        vocab_size,
        context_length: hyper.needed("context_length")?,
        rms_norm_eps: hyper
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| {
                format!(
                    "key `{}` is missing",
                    hyper.key("attention.layer_norm_rms_epsilon")
                )
            })?,
        rope: rope(&hyper, family, head_dim, rope_divisors)?,
        local_rope: match gemma {
            true => {
                let theta = hyper
                    .float("rope.freq_base_swa")?
                    .unwrap_or(GEMMA_LOCAL_THETA);
                Some(Rope::new(theta, head_dim, RopeScaling::None))
            }
            false => None,
        },
        sliding_window,
        sliding_layers,
        tied_embeddings: !tensors.contains_key("output.weight"),
        embed_scale: gemma.then(|| gemma_embed_scale(d_model, embedding.stored_type)),
        attention_scale: (query_dim as f32).sqrt().recip(),
        qkv_bias: family == Family::Qwen2,
        qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
        activation: match gemma {
            true => Activation::GeluTanh,
            false => Activation::Silu,
        },
    })
}

/// GGUF files of gemma3 do not always say these; they are the family's constants.
const GEMMA_LOCAL_THETA: f32 = 10_000.0;
const GEMMA_SLIDING_PERIOD: usize = 6;

/// The square root of `d_model` as the checkpoint's type holds it.
///
/// A quantised file no longer says what its checkpoint was; all published gemma3 are bfloat16.
pub(super) fn gemma_embed_scale(d_model: usize, stored: StoredType) -> f32 {
    let scale = (d_model as f64).sqrt();
    match stored {
        StoredType::F32 => scale as f32,
        StoredType::F16 => half::f16::from_f64(scale).to_f32(),
        _ => half::bf16::from_f64(scale).to_f32(),
    }
}

/// The period's last layer is global, the others slide.
pub(super) fn sliding_by_period(n_layers: usize, period: usize) -> Vec<bool> {
    (0..n_layers)
        .map(|layer| !(layer + 1).is_multiple_of(period))
        .collect()
}

fn sliding(
    hyper: &Hyper<'_>,
    family: Family,
    n_layers: usize,
) -> Result<(Option<usize>, Vec<bool>), String> {
    let window = hyper
        .integer("attention.sliding_window")?
        .filter(|&window| window > 0);
    if window.is_none() {
        return match family {
            Family::Gemma3 => Err(format!(
                "key `{}` is missing",
                hyper.key("attention.sliding_window")
            )),
            _ => Ok((None, vec![false; n_layers])),
        };
    }
    let key = hyper.key("attention.sliding_window_pattern");
    let layers = match (hyper.metadata.get(&key), family) {
        (Some(Value::Array(values)), _) => values
            .iter()
            .map(|value| match value {
                Value::Bool(sliding) => Ok(*sliding),
                other => integer(&key, other).map(|number| number != 0),
            })
            .collect::<Result<_, _>>()?,
        (Some(value), _) => match integer(&key, value)? {
            0 => return Err(format!("`{key}` is 0")),
            period => sliding_by_period(n_layers, period),
        },
        (None, Family::Gemma3) => sliding_by_period(n_layers, GEMMA_SLIDING_PERIOD),
        (None, _) => vec![true; n_layers],
    };
    Ok((window, layers))
}

fn rope(
    hyper: &Hyper<'_>,
    family: Family,
    head_dim: usize,
    divisors: Option<&[f32]>,
) -> Result<Rope, String> {
    let theta = match (hyper.float("rope.freq_base")?, family) {
        (Some(theta), _) => theta,
        (None, Family::Gemma3) => 1_000_000.0,
        (None, _) => 10_000.0,
    };
    let scaling_key = hyper.key("rope.scaling.type");
    let factor = hyper.float("rope.scaling.factor")?;
    let scaling = match (hyper.metadata.text(&scaling_key)?, factor) {
        (None | Some("none"), None) => RopeScaling::None,
        (None | Some("none"), Some(factor)) if factor == 1.0 || factor == 0.0 => RopeScaling::None,
        (Some("linear"), Some(factor)) if factor.is_finite() && factor > 0.0 => {
            RopeScaling::Linear { factor }
        }
        (kind, factor) => {
            return Err(format!(
                "rotary scaling of type {kind:?} with factor {factor:?} is not supported; \
                 supported are none, linear and llama3's `{ROPE_FREQUENCIES}`"
            ));
        }
    };
    let mut rope = Rope::new(theta, head_dim, scaling);
    if let Some(divisors) = divisors {
        if divisors.len() != rope.inv_freq.len() {
            return Err(format!(
                "`{ROPE_FREQUENCIES}` holds {} values, {} are needed",
                divisors.len(),
                rope.inv_freq.len()
            ));
        }
        for (frequency, divisor) in rope.inv_freq.iter_mut().zip(divisors) {
            *frequency /= divisor;
        }
    }
    Ok(rope)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> BTreeMap<String, Value> {
        let integers = [
            ("block_count", 1),
            ("context_length", 64),
            ("embedding_length", 32),
            ("feed_forward_length", 64),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
        ];
        let mut metadata: BTreeMap<String, Value> = integers
            .into_iter()
            .map(|(key, value)| (format!("llama.{key}"), Value::Unsigned(value)))
            .collect();
        metadata.insert("general.architecture".into(), Value::Text("llama".into()));
        metadata.insert(
            "llama.attention.layer_norm_rms_epsilon".into(),
            Value::Float(1e-5),
        );
        metadata
    }

    fn parse(
        metadata: &BTreeMap<String, Value>,
        divisors: Option<&[f32]>,
    ) -> Result<ModelConfig, String> {
        let embedding = TensorEntry {
            name: "token_embd.weight".into(),
            stored_type: StoredType::F32,
            shape: vec![100, 32],
            offset: 0,
            bytes: 0,
        };
        let tensors = BTreeMap::from([("token_embd.weight", &embedding)]);
        let config = config(&Metadata(metadata), &tensors, divisors)?;
        config.check().map(|()| config)
    }

    fn check_refused(key: &str, value: Value, expected: &str) {
        let mut metadata = llama();
        metadata.insert(key.into(), value);
        let error = parse(&metadata, None).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn keys_become_a_configuration() {
        let config = parse(&llama(), None).expect("a configuration");
        assert_eq!(
            (config.head_dim, config.n_kv_heads, config.vocab_size),
            (8, 2, 100)
        );
        assert!(config.tied_embeddings && !config.qkv_bias);
        assert_eq!(config.rope.theta, 10_000.0);
    }

    #[test]
    fn absurd_and_unknown_keys_are_refused_by_name() {
        check_refused(
            "general.architecture",
            Value::Text("mamba".into()),
            "`mamba`",
        );
        check_refused(
            "llama.attention.head_count",
            Value::Unsigned(0),
            "head_count",
        );
        check_refused(
            "llama.block_count",
            Value::Unsigned(1_000_000_000),
            "layers",
        );
        check_refused("llama.block_count", Value::Signed(-1), "llama.block_count");
        check_refused(
            "llama.rope.freq_base",
            Value::Float(f64::NAN),
            "rotary base",
        );
        check_refused("llama.expert_count", Value::Unsigned(8), "experts");
        check_refused("llama.logit_scale", Value::Float(2.0), "llama.logit_scale");
        check_refused(
            "llama.rope.scaling.type",
            Value::Text("yarn".into()),
            "yarn",
        );
        check_refused(
            "llama.rope.dimension_count",
            Value::Unsigned(4),
            "rope.dimension_count",
        );
        check_refused("llama.vocab_size", Value::Unsigned(99), "llama.vocab_size");
        let differing = Value::Array(vec![Value::Unsigned(1), Value::Unsigned(2)]);
        check_refused(
            "llama.attention.head_count_kv",
            differing,
            "differs between layers",
        );
    }

    #[test]
    fn stored_divisors_slow_the_rotary_frequencies() {
        let plain = parse(&llama(), None).expect("plain").rope;
        let slowed = parse(&llama(), Some(&[1.0, 1.0, 2.0, 4.0]))
            .expect("slowed")
            .rope;
        assert_eq!(plain.inv_freq[..2], slowed.inv_freq[..2]);
        assert_eq!(plain.inv_freq[3], 4.0 * slowed.inv_freq[3]);
        assert!(parse(&llama(), Some(&[1.0])).is_err());
        assert!(parse(&llama(), Some(&[0.0; 4])).is_err());
    }

    #[test]
    fn tensor_names_are_translated_and_strange_ones_are_not() {
        let name = |name: &str, family| checkpoint_name(name, family);
        let layer = |part: &str| Some(format!("model.layers.3.{part}"));
        assert_eq!(
            name("blk.3.attn_q.bias", Family::Qwen2),
            layer("self_attn.q_proj.bias")
        );
        assert_eq!(
            name("blk.3.ffn_norm.weight", Family::Llama),
            layer("post_attention_layernorm.weight")
        );
        assert_eq!(
            name("blk.3.ffn_norm.weight", Family::Gemma3),
            layer("pre_feedforward_layernorm.weight")
        );
        for strange in [
            "blk.03.attn_q.weight",
            "blk.x.attn_q.weight",
            "blk.3.attn_q.scale",
            "v.blk.3",
        ] {
            assert_eq!(name(strange, Family::Llama), None, "{strange}");
        }
    }

    #[test]
    fn the_embedding_scale_is_rounded_as_the_checkpoint_is() {
        let exact = 640f32.sqrt();
        assert_eq!(gemma_embed_scale(640, StoredType::F32), exact);
        assert_eq!(gemma_embed_scale(640, StoredType::Q4K), 25.25);
    }
}
