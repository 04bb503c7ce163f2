//! A Hugging Face folder: `config.json`, safetensors, tokenizer and template files.
//! Knows what the keys mean, old spellings and new; knows nothing of the container's bytes.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer as Pipeline};

use super::gguf_model::{gemma_embed_scale, sliding_by_period};
use super::{
    Adjustment, EMBEDDING, Parts, StoredTensor, StoredType, WeightFile, read_capped, safetensors,
};
use crate::error::{Error, Result};
use crate::model::config::RopeScaling;
use crate::model::tokenizer::{Alphabet, Parts as TokenizerParts, TERMINATORS, guarded};
use crate::model::{Activation, ChatTemplate, Family, ModelConfig, Rope, Tokenizer};

const MAX_JSON_BYTES: u64 = 16 << 20;
const MAX_TOKENIZER_BYTES: u64 = 128 << 20;
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
const MAX_SHARDS: usize = 1024;

pub(super) fn open(path: &Path) -> Result<Parts> {
    let config_path = path.join("config.json");
    let fields = Fields {
        object: json_object(&config_path)?,
    };
    let (files, tensors) = weights(path)?;
    let embedding = tensors
        .get(EMBEDDING)
        .map(|stored| stored.entry.stored_type);
    let config = config(&fields, embedding)
        .map_err(|message| Error::file(config_path.display(), message))?;
    let tensors = adjusted(tensors, config.family);
    let settings = optional_json(&path.join("tokenizer_config.json"))?;
    let tokenizer = tokenizer(path, &fields, &settings)?;
    let template = template(path, &settings, &tokenizer)?;
    Ok(Parts {
        config,
        tokenizer,
        template,
        name: name(path, &fields),
        files,
        tensors,
    })
}

fn name(path: &Path, fields: &Fields) -> String {
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    match fields.object.get("_name_or_path").and_then(Value::as_str) {
        // A path in there is somebody else's.
        Some(name) if !name.is_empty() && !name.starts_with(['/', '.']) => name.to_owned(),
        _ => absolute
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
    }
}

fn json_object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = read_capped(path, MAX_JSON_BYTES)?;
    serde_json::from_slice(&bytes).map_err(|error| Error::file(path.display(), error))
}

fn optional_json(path: &Path) -> Result<Map<String, Value>> {
    match path.exists() {
        true => json_object(path),
        false => Ok(Map::new()),
    }
}

// Weights

type Tensors = BTreeMap<String, StoredTensor>;

fn weights(folder: &Path) -> Result<(Vec<WeightFile>, Tensors)> {
    let names = shard_names(folder)?;
    let mut files = Vec::with_capacity(names.len());
    let mut tensors = Tensors::new();
    for (index, name) in names.iter().enumerate() {
        let path = folder.join(name);
        let file = WeightFile::open(&path)?;
        let bytes = file.bytes;
        let entries = file.rewound(|file| safetensors::read_header(file, bytes))?;
        for entry in entries {
            // Old checkpoints store the rotary frequencies, which the configuration gives.
            if entry.name.ends_with("rotary_emb.inv_freq") {
                continue;
            }
            let stored = StoredTensor {
                file: index,
                adjustment: Adjustment::None,
                entry,
            };
            if let Some(twice) = tensors.insert(stored.entry.name.clone(), stored) {
                let message = format!("tensor `{}` is in another file, too", twice.entry.name);
                return Err(Error::file(path.display(), message));
            }
        }
        files.push(file);
    }
    Ok((files, tensors))
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// Names of the weight files, sorted.
fn shard_names(folder: &Path) -> Result<Vec<String>> {
    let single = "model.safetensors";
    let index_path = folder.join("model.safetensors.index.json");
    if !index_path.exists() {
        if folder.join(single).exists() {
            return Ok(vec![single.into()]);
        }
        return Err(Error::file(
            folder.display(),
            format!(
                "holds neither `{single}` nor `model.safetensors.index.json`; weights in other formats are not read"
            ),
        ));
    }
    let fail = |message: String| Error::file(index_path.display(), message);
    let bytes = read_capped(&index_path, MAX_JSON_BYTES)?;
    let index: ShardIndex =
        serde_json::from_slice(&bytes).map_err(|error| fail(error.to_string()))?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    if names.is_empty() || names.len() > MAX_SHARDS {
        return Err(fail(format!(
            "names {} files, must be 1 to {MAX_SHARDS}",
            names.len()
        )));
    }
    for name in &names {
        if !is_plain_file_name(name) {
            return Err(fail(format!(
                "names the file {name:?}; only files in the same folder are read"
            )));
        }
        if !folder.join(name).exists() {
            return Err(fail(format!("names the file `{name}`, which is missing")));
        }
    }
    Ok(names)
}

fn is_plain_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    !name.contains(['\\', '\0'])
        && matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

fn adjusted(mut tensors: Tensors, family: Family) -> Tensors {
    for (name, stored) in &mut tensors {
        // gemma3's code adds one to what the checkpoint stores.
        if family == Family::Gemma3 && name.ends_with("norm.weight") {
            stored.adjustment = Adjustment::AddOne;
        }
    }
    tensors
}

// Configuration

/// `config.json` with typed access; errors name the field.
struct Fields {
    object: Map<String, Value>,
}

impl Fields {
    /// `null` counts as absent, as in transformers.
    fn get(&self, name: &str) -> Option<&Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    fn integer(&self, name: &str) -> Result<Option<usize>, String> {
        self.get(name)
            .map(|value| {
                let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
                number.ok_or_else(|| format!("`{name}` must be a whole number from 0, not {value}"))
            })
            .transpose()
    }

    fn needed(&self, name: &str) -> Result<usize, String> {
        self.integer(name)?
            .ok_or_else(|| format!("`{name}` is missing"))
    }

    fn float(&self, name: &str) -> Result<Option<f32>, String> {
        self.get(name).map(|value| float(name, value)).transpose()
    }

    fn boolean(&self, name: &str) -> Result<Option<bool>, String> {
        self.get(name)
            .map(|value| {
                value
                    .as_bool()
                    .ok_or_else(|| format!("`{name}` must be a boolean"))
            })
            .transpose()
    }

    fn text(&self, name: &str) -> Result<Option<&str>, String> {
        self.get(name)
            .map(|value| {
                value
                    .as_str()
                    .ok_or_else(|| format!("`{name}` must be a string"))
            })
            .transpose()
    }

    fn object(&self, name: &str) -> Result<Option<&Map<String, Value>>, String> {
        self.get(name)
            .map(|value| {
                value
                    .as_object()
                    .ok_or_else(|| format!("`{name}` must be an object"))
            })
            .transpose()
    }
}

fn float(name: &str, value: &Value) -> Result<f32, String> {
    let number = value.as_f64().map(|n| n as f32);
    number
        .filter(|n| n.is_finite())
        .ok_or_else(|| format!("`{name}` must be a finite number, not {value}"))
}

fn config(fields: &Fields, embedding: Option<StoredType>) -> Result<ModelConfig, String> {
    let family = family(fields)?;
    refuse_unsupported(fields, family)?;
    let gemma = family == Family::Gemma3;
    let d_model = fields.needed("hidden_size")?;
    let n_layers = fields.needed("num_hidden_layers")?;
    let n_heads = fields.needed("num_attention_heads")?;
    if n_heads == 0 || n_layers == 0 {
        return Err("`num_attention_heads` and `num_hidden_layers` must not be 0".into());
    }
    let head_dim = match (fields.integer("head_dim")?, family) {
        (Some(head_dim), _) => head_dim,
        // The values that transformers assumes.
        (None, Family::Qwen3) => 128,
        (None, Family::Gemma3) => 256,
        (None, _) => d_model / n_heads,
    };
    if n_layers > MAX_LAYERS_TO_LIST {
        return Err(format!(
            "`num_hidden_layers` is {n_layers}, more than any supported model has"
        ));
    }
    let (sliding_window, sliding_layers) = sliding(fields, family, n_layers)?;
    let query_dim = match gemma {
        true => fields.float("query_pre_attn_scalar")?.unwrap_or(256.0),
        false => head_dim as f32,
    };
    let (rope, local_rope) = ropes(fields, family, head_dim)?;
    Ok(ModelConfig {
        family,
        d_model,
        n_layers,
        n_heads,
        n_kv_heads: fields.integer("num_key_value_heads")?.unwrap_or(n_heads),
        head_dim,
        d_mlp: fields.needed("intermediate_size")?,
        vocab_size: fields.needed("vocab_size")?,
        context_length: fields.needed("max_position_embeddings")?,
        rms_norm_eps: fields.float("rms_norm_eps")?.unwrap_or(1e-6),
        rope,
        local_rope,
        sliding_window,
        sliding_layers,
        tied_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(gemma),
        embed_scale: gemma
            .then(|| gemma_embed_scale(d_model, embedding.unwrap_or(StoredType::Bf16))),
        attention_scale: query_dim.sqrt().recip(),
        qkv_bias: family == Family::Qwen2,
        qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
        activation: activation(fields, family)?,
    })
}

/// More than `ModelConfig::check` allows, few enough to list before it is asked.
const MAX_LAYERS_TO_LIST: usize = 1 << 16;

fn family(fields: &Fields) -> Result<Family, String> {
    let architectures = fields.get("architectures").and_then(Value::as_array);
    let architecture = architectures
        .and_then(|names| names.first())
        .and_then(Value::as_str);
    let model_type = fields.text("model_type")?;
    let families = [
        ("LlamaForCausalLM", "llama", Family::Llama),
        ("MistralForCausalLM", "mistral", Family::Llama),
        ("Qwen2ForCausalLM", "qwen2", Family::Qwen2),
        ("Qwen3ForCausalLM", "qwen3", Family::Qwen3),
        ("Gemma3ForCausalLM", "gemma3_text", Family::Gemma3),
    ];
    families
        .into_iter()
        .find(|(class, kind, _)| match architecture {
            Some(name) => name == *class && model_type.is_none_or(|t| t == *kind),
            None => model_type == Some(kind),
        })
        .map(|(.., family)| family)
        .ok_or_else(|| {
            format!(
                "architecture {} (model type {}) is not supported; supported are {}",
                architecture.unwrap_or("unnamed"),
                model_type.unwrap_or("unnamed"),
                families.map(|(class, ..)| class).join(", ")
            )
        })
}

/// Options that would change the computation and are not implemented.
fn refuse_unsupported(fields: &Fields, family: Family) -> Result<(), String> {
    for name in [
        "quantization_config",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ] {
        if let Some(value) = fields.get(name) {
            return Err(format!("`{name}` is set ({value}), which is not supported"));
        }
    }
    for name in ["mlp_bias", "attention_bias", "use_bidirectional_attention"] {
        // qwen2 has its biases whatever this says.
        let builtin = family == Family::Qwen2 && name == "attention_bias";
        if fields.boolean(name)? == Some(true) && !builtin {
            return Err(format!("`{name}` is true, which is not supported"));
        }
    }
    for name in ["partial_rotary_factor", "pretraining_tp"] {
        if fields.float(name)?.is_some_and(|factor| factor != 1.0) {
            return Err(format!("`{name}` other than 1 is not supported"));
        }
    }
    Ok(())
}

fn activation(fields: &Fields, family: Family) -> Result<Activation, String> {
    let gemma = family == Family::Gemma3;
    let name = match (fields.text("hidden_activation")?, gemma) {
        (Some(name), true) => Some(name),
        _ => fields.text("hidden_act")?,
    };
    match (name, gemma) {
        (None, false) | (Some("silu"), false) => Ok(Activation::Silu),
        (None, true) | (Some("gelu_pytorch_tanh"), true) => Ok(Activation::GeluTanh),
        (Some(other), _) => Err(format!(
            "activation `{other}` is not that of the {family} family"
        )),
    }
}

fn sliding(
    fields: &Fields,
    family: Family,
    n_layers: usize,
) -> Result<(Option<usize>, Vec<bool>), String> {
    let qwen = matches!(family, Family::Qwen2 | Family::Qwen3);
    let window = match qwen && fields.boolean("use_sliding_window")? != Some(true) {
        true => None,
        false => fields.integer("sliding_window")?,
    };
    let layers = match layer_types(fields)? {
        Some(layers) => layers,
        None if window.is_none() => vec![false; n_layers],
        None if family == Family::Gemma3 => {
            let spelled = fields.integer("sliding_window_pattern")?;
            let period = match spelled {
                Some(period) => period,
                None => fields.integer("_sliding_window_pattern")?.unwrap_or(6),
            };
            if period == 0 {
                return Err("`sliding_window_pattern` is 0".into());
            }
            sliding_by_period(n_layers, period)
        }
        None if qwen => {
            let full = fields.integer("max_window_layers")?.unwrap_or(28);
            (0..n_layers).map(|layer| layer >= full).collect()
        }
        None => vec![true; n_layers],
    };
    Ok((window, layers))
}

fn layer_types(fields: &Fields) -> Result<Option<Vec<bool>>, String> {
    let Some(value) = fields.get("layer_types") else {
        return Ok(None);
    };
    let types = value.as_array().ok_or("`layer_types` must be an array")?;
    types
        .iter()
        .map(|kind| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(format!("layer type {kind} is not supported")),
        })
        .collect::<Result<_, _>>()
        .map(Some)
}

/// Rotary frequencies of global and, for gemma3, of sliding layers.
///
/// transformers 5 writes `rope_parameters`, before it was `rope_theta` beside `rope_scaling`.
fn ropes(fields: &Fields, family: Family, head_dim: usize) -> Result<(Rope, Option<Rope>), String> {
    let gemma = family == Family::Gemma3;
    let new = fields.object("rope_parameters")?;
    if let (Some(parameters), true) = (new, gemma) {
        let of = |kind: &str| {
            let name = format!("rope_parameters.{kind}");
            let parameters = parameters
                .get(kind)
                .and_then(Value::as_object)
                .ok_or_else(|| format!("`{name}` is missing"))?;
            rope(&name, Some(parameters), None, head_dim)
        };
        return Ok((of("full_attention")?, Some(of("sliding_attention")?)));
    }
    let theta = match (fields.float("rope_theta")?, gemma) {
        (Some(theta), _) => theta,
        (None, true) => 1_000_000.0,
        (None, false) => 10_000.0,
    };
    let global = match new {
        Some(parameters) => rope("rope_parameters", Some(parameters), Some(theta), head_dim)?,
        None => rope(
            "rope_scaling",
            fields.object("rope_scaling")?,
            Some(theta),
            head_dim,
        )?,
    };
    let local = match gemma {
        true => {
            let theta = fields.float("rope_local_base_freq")?.unwrap_or(10_000.0);
            Some(Rope::new(theta, head_dim, RopeScaling::None))
        }
        false => None,
    };
    Ok((global, local))
}

fn rope(
    name: &str,
    parameters: Option<&Map<String, Value>>,
    theta: Option<f32>,
    head_dim: usize,
) -> Result<Rope, String> {
    let get = |key: &str| {
        parameters
            .and_then(|p| p.get(key))
            .filter(|value| !value.is_null())
    };
    let number = |key: &str| -> Result<Option<f32>, String> {
        get(key)
            .map(|value| float(&format!("{name}.{key}"), value))
            .transpose()
    };
    let positive = |key: &str| -> Result<f32, String> {
        match number(key)? {
            Some(value) if value > 0.0 => Ok(value),
            Some(value) => Err(format!("`{name}.{key}` is {value}, must be positive")),
            None => Err(format!("`{name}.{key}` is missing")),
        }
    };
    if number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(format!(
            "`{name}.partial_rotary_factor` other than 1 is not supported"
        ));
    }
    let theta = match (number("rope_theta")?, theta) {
        (Some(theta), _) | (None, Some(theta)) => theta,
        (None, None) => return Err(format!("`{name}.rope_theta` is missing")),
    };
    let kind = get("rope_type").or_else(|| get("type"));
    let scaling = match kind.map(|kind| kind.as_str()) {
        None if parameters.is_none_or(|p| !p.contains_key("factor")) => RopeScaling::None,
        Some(Some("default")) => RopeScaling::None,
        Some(Some("linear")) => RopeScaling::Linear {
            factor: positive("factor")?,
        },
        Some(Some("llama3")) => {
            let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
            if low >= high {
                return Err(format!(
                    "`{name}.low_freq_factor` must be below `high_freq_factor`"
                ));
            }
            RopeScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: positive("original_max_position_embeddings")?,
            }
        }
        _ => {
            let kind = kind.map_or_else(|| "unnamed".to_owned(), Value::to_string);
            return Err(format!(
                "`{name}`: rotary scaling of type {kind} is not supported; supported are default, linear and llama3"
            ));
        }
    };
    Ok(Rope::new(theta, head_dim, scaling))
}

// Tokenizer and template

fn tokenizer(folder: &Path, fields: &Fields, settings: &Map<String, Value>) -> Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    let fail = |message: String| Error::file(path.display(), message);
    let bytes = read_capped(&path, MAX_TOKENIZER_BYTES)?;
    let spelled: Value = serde_json::from_slice(&bytes).map_err(|error| fail(error.to_string()))?;
    let alphabet = alphabet(&spelled).map_err(fail)?;
    let mut pipeline = guarded(|| Pipeline::from_bytes(&bytes)).map_err(fail)?;
    add_tokens(&mut pipeline, settings)
        .map_err(|message| Error::file(folder.join("tokenizer_config.json").display(), message))?;

    let id = |name: &str| {
        let token = settings.get(name).and_then(token_content)?;
        pipeline.token_to_id(token)
    };
    let (bos, eos) = (id("bos_token"), id("eos_token"));
    // Without settings of its own, the tokenizer's are those of the configuration.
    let bos = match settings.is_empty() {
        true => token_ids(fields.get("bos_token_id"))
            .map_err(fail)?
            .first()
            .copied(),
        false => bos,
    };
    let generation_path = folder.join("generation_config.json");
    let generation = optional_json(&generation_path)?;
    let mut stop_ids: Vec<u32> = eos.into_iter().collect();
    for (value, file) in [
        (fields.get("eos_token_id"), folder.join("config.json")),
        (generation.get("eos_token_id"), generation_path),
    ] {
        let ids = token_ids(value).map_err(|message| Error::file(file.display(), message))?;
        stop_ids.extend(ids);
    }
    let added = pipeline.get_added_tokens_decoder();
    stop_ids.extend(TERMINATORS.iter().filter_map(|text| {
        let id = pipeline.token_to_id(text)?;
        added
            .get(&id)
            .is_some_and(|token| token.special)
            .then_some(id)
    }));
    let eos = eos.or(stop_ids.first().copied());
    let add_bos = match settings.get("add_bos_token").and_then(Value::as_bool) {
        Some(add_bos) => add_bos,
        None => {
            let with = guarded(|| pipeline.encode_fast("a", true)).map_err(fail)?;
            bos.is_some() && with.get_ids().first().copied() == bos
        }
    };
    Tokenizer::build(TokenizerParts {
        pipeline,
        alphabet,
        bos,
        eos,
        add_bos,
        stop_ids,
    })
    .map_err(fail)
}

/// What the decoder of a `tokenizer.json` says about how tokens spell bytes.
fn alphabet(spelled: &Value) -> Result<Alphabet, String> {
    let model = &spelled["model"];
    if model["type"].as_str().is_some_and(|kind| kind != "BPE") || !model["merges"].is_array() {
        return Err("only BPE tokenizers are supported".into());
    }
    if model["dropout"].as_f64().is_some_and(|rate| rate > 0.0) {
        return Err(
            "its merges are dropped at random (`dropout`), so texts have no fixed tokens".into(),
        );
    }
    let decoder = &spelled["decoder"];
    let steps: Vec<&Value> = match decoder["type"].as_str() {
        Some("Sequence") => decoder["decoders"]
            .as_array()
            .map(|d| d.iter().collect())
            .unwrap_or_default(),
        _ => vec![decoder],
    };
    let has = |kind: &str| steps.iter().any(|step| step["type"].as_str() == Some(kind));
    if has("ByteLevel") {
        Ok(Alphabet::ByteLevel)
    } else if has("Metaspace") || has("Replace") || has("ByteFallback") {
        Ok(Alphabet::SentencePiece)
    } else {
        Err(format!("decoder {} is not supported", decoder["type"]))
    }
}

/// `tokenizer_config.json` repeats the added tokens, or adds to them.
fn add_tokens(pipeline: &mut Pipeline, settings: &Map<String, Value>) -> Result<(), String> {
    let Some(added) = settings
        .get("added_tokens_decoder")
        .filter(|v| !v.is_null())
    else {
        return Ok(());
    };
    let added = added
        .as_object()
        .ok_or("`added_tokens_decoder` must be an object")?;
    let mut by_id = BTreeMap::new();
    for (id, token) in added {
        let id: u32 = id
            .parse()
            .map_err(|_| format!("`added_tokens_decoder`: {id:?} is not a token id"))?;
        let token: AddedToken = serde_json::from_value(token.clone())
            .map_err(|error| format!("`added_tokens_decoder.{id}`: {error}"))?;
        by_id.insert(id, token);
    }
    for (id, token) in by_id {
        let content = token.content.clone();
        guarded(|| pipeline.add_tokens([token]))?;
        if pipeline.token_to_id(&content) != Some(id) {
            return Err(format!(
                "`added_tokens_decoder.{id}` is another token in `tokenizer.json`"
            ));
        }
    }
    Ok(())
}

/// A token is spelled as text, or as an object with its `content`.
fn token_content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// One id or a list of them.
fn token_ids(value: Option<&Value>) -> Result<Vec<u32>, String> {
    let id = |value: &Value| {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| format!("{value} is not a token id"))
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

fn template(
    folder: &Path,
    settings: &Map<String, Value>,
    tokenizer: &Tokenizer,
) -> Result<Option<ChatTemplate>> {
    let file = folder.join("chat_template.jinja");
    let (path, source): (PathBuf, String) = if file.exists() {
        let bytes = read_capped(&file, MAX_TEMPLATE_BYTES)?;
        let text =
            String::from_utf8(bytes).map_err(|_| Error::file(file.display(), "not UTF-8"))?;
        (file, text)
    } else {
        let path = folder.join("tokenizer_config.json");
        match settings.get("chat_template") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(source)) => (path, source.clone()),
            Some(Value::Array(named)) => match named.iter().find(|t| t["name"] == "default") {
                Some(template) => {
                    let source = template["template"].as_str().unwrap_or_default();
                    (path, source.to_owned())
                }
                None => return Ok(None),
            },
            Some(_) => {
                return Err(Error::file(
                    path.display(),
                    "`chat_template` must be a string",
                ));
            }
        }
    };
    ChatTemplate::new(&source, tokenizer)
        .map(Some)
        .map_err(|error| Error::file(path.display(), format!("the chat template: {error}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        })
    }

    fn with(changes: Value) -> Value {
        let mut config = llama();
        let object = config.as_object_mut().expect("an object");
        object.extend(changes.as_object().expect("an object").clone());
        config
    }

    fn parse(config: Value) -> Result<ModelConfig, String> {
        let fields = Fields {
            object: config.as_object().expect("an object").clone(),
        };
        let config = super::config(&fields, None)?;
        config.check()?;
        Ok(config)
    }

    fn check_refused(changes: Value, expected: &str) {
        let error = parse(with(changes)).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn absurd_configurations_are_refused_by_name() {
        check_refused(json!({"num_attention_heads": 0}), "num_attention_heads");
        check_refused(json!({"hidden_size": -64}), "hidden_size");
        check_refused(
            json!({"num_hidden_layers": 1_000_000_000}),
            "num_hidden_layers",
        );
        check_refused(json!({"num_hidden_layers": 5000}), "number of layers");
        check_refused(json!({"rope_theta": -1}), "rotary base");
        check_refused(json!({"rope_theta": 1e300}), "rope_theta");
        check_refused(json!({"rope_theta": "NaN"}), "rope_theta");
        check_refused(json!({"head_dim": 1u64 << 60}), "head size");
        check_refused(json!({"num_key_value_heads": 3}), "evenly");
        check_refused(json!({"vocab_size": 0}), "vocabulary size");
        check_refused(json!({"hidden_size": null}), "hidden_size");
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        check_refused(
            json!({"architectures": ["MambaForCausalLM"]}),
            "MambaForCausalLM",
        );
        check_refused(json!({"model_type": "phi3"}), "phi3");
        check_refused(
            json!({"quantization_config": {"bits": 4}}),
            "quantization_config",
        );
        check_refused(json!({"attention_bias": true}), "attention_bias");
        check_refused(json!({"mlp_bias": true}), "mlp_bias");
        check_refused(json!({"hidden_act": "gelu"}), "gelu");
        check_refused(
            json!({"partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        );
        check_refused(
            json!({"rope_scaling": {"type": "yarn", "factor": 2.0}}),
            "yarn",
        );
        check_refused(
            json!({"rope_scaling": {"rope_type": "llama3"}}),
            "low_freq_factor",
        );
        check_refused(
            json!({"layer_types": ["full_attention", "linear_attention"]}),
            "linear_attention",
        );
        check_refused(
            json!({"layer_types": ["full_attention"]}),
            "1 layer types for 4 layers",
        );
    }

    #[test]
    fn both_spellings_of_rotary_scaling_are_read() {
        let scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        });
        let old = parse(with(json!({"rope_theta": 5e5, "rope_scaling": scaling}))).expect("old");
        let mut parameters = scaling;
        parameters["rope_theta"] = json!(5e5);
        let new = parse(with(json!({"rope_parameters": parameters}))).expect("new");
        assert_eq!(old.rope, new.rope);
        assert_ne!(
            old.rope,
            parse(with(json!({"rope_theta": 5e5}))).expect("plain").rope
        );
        let linear = json!({"rope_scaling": {"type": "linear", "factor": 4.0}});
        let linear = parse(with(linear)).expect("linear").rope;
        assert_eq!(linear.inv_freq[0], 0.25);
    }

    #[test]
    fn a_sliding_window_is_honoured_on_the_layers_that_have_it() {
        let mistral = json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16});
        let config = parse(with(mistral)).expect("mistral");
        assert_eq!(
            (config.sliding_window, config.sliding_layers),
            (Some(16), vec![true; 4])
        );

        let qwen = |used: bool| {
            let changes = json!({
                "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
                "sliding_window": 16, "use_sliding_window": used, "max_window_layers": 3,
            });
            parse(with(changes)).expect("qwen2")
        };
        assert_eq!(qwen(true).sliding_layers, [false, false, false, true]);
        assert_eq!(
            (qwen(false).sliding_window, qwen(false).sliding_layers),
            (None, vec![false; 4])
        );
    }

    #[test]
    fn gemma3_reads_its_two_rotary_bases_in_both_spellings() {
        let gemma = |ropes: Value| {
            let mut changes = json!({
                "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
                "hidden_act": null, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16,
                "query_pre_attn_scalar": 64, "sliding_window": 8, "sliding_window_pattern": 2,
            });
            let object = changes.as_object_mut().expect("an object");
            object.extend(ropes.as_object().expect("an object").clone());
            parse(with(changes)).expect("gemma3")
        };
        let old = gemma(json!({
            "rope_theta": 1e6, "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        }));
        let new = gemma(json!({"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }}));
        assert_eq!(old, new);
        assert_eq!(old.sliding_layers, [true, false, true, false]);
        assert_eq!(old.attention_scale, 0.125);
        assert_eq!(old.embed_scale, Some(8.0));
        assert!(old.tied_embeddings);
    }

    #[test]
    fn an_index_that_leaves_the_folder_is_refused() {
        for name in [
            "../other.safetensors",
            "/etc/passwd",
            "a/b.safetensors",
            "..",
            "",
        ] {
            let folder = tempfile::tempdir().expect("a folder");
            let index = json!({"weight_map": {"x": name}}).to_string();
            std::fs::write(folder.path().join("model.safetensors.index.json"), index)
                .expect("a file");
            let error = shard_names(folder.path()).expect_err(name).to_string();
            assert!(error.contains("only files in the same folder"), "{error}");
        }
    }

    #[test]
    fn a_missing_shard_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let index = json!({"weight_map": {"x": "model-00001-of-00001.safetensors"}}).to_string();
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).expect("a file");
        let error = shard_names(folder.path()).expect_err("missing").to_string();
        assert!(
            error.contains("`model-00001-of-00001.safetensors`, which is missing"),
            "{error}"
        );
        let empty = tempfile::tempdir().expect("a folder");
        assert!(shard_names(empty.path()).is_err());
    }

    #[test]
    fn stop_ids_may_be_one_or_many() {
        assert_eq!(token_ids(Some(&json!(7))), Ok(vec![7]));
        assert_eq!(token_ids(Some(&json!([1, 2]))), Ok(vec![1, 2]));
        assert_eq!(token_ids(Some(&json!(null))), Ok(vec![]));
        assert!(token_ids(Some(&json!(-1))).is_err());
    }
}
