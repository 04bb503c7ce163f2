"""GGUF files with the conventions of llama.cpp's converter: names, metadata, row order, norm offsets."""

import json

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from .k_blocks import quantise_k

ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Gemma3ForCausalLM": "gemma3",
}

# Hugging Face name -> GGUF name, below `model.layers.{i}.` and `blk.{i}.`.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(architecture, name):
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    if part == "post_attention_layernorm":
        # The name that Llama gave to the norm before its MLP is, in Gemma 3, the norm after its attention.
        return f"blk.{layer}.{'post_attention_norm' if architecture == 'gemma3' else 'ffn_norm'}.{kind}"
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def rows_for_interleaved_rotary(weight, heads):
    """Half-split rotary rows (0 with n/2, 1 with n/2+1, ...) to neighbouring rows (0 with 1, 2 with 3, ...), per head."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def rows_for_half_split_rotary(weight, heads):
    """The inverse of `rows_for_interleaved_rotary`."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _rotary_heads(config, name):
    if name.endswith("self_attn.q_proj.weight"):
        return config["num_attention_heads"]
    if name.endswith("self_attn.k_proj.weight"):
        return config["num_key_value_heads"]
    return None


def to_gguf_values(config, name, weight):
    architecture = ARCHITECTURES[config["architectures"][0]]
    heads = _rotary_heads(config, name)
    if architecture == "llama" and heads:
        return rows_for_interleaved_rotary(weight, heads)
    if architecture == "gemma3" and "norm" in name:
        return weight + np.float32(1.0)
    return weight


def to_hugging_face_values(config, name, weight):
    """The inverse of `to_gguf_values`; for Gemma's norms exact only up to the rounding of adding one."""
    architecture = ARCHITECTURES[config["architectures"][0]]
    heads = _rotary_heads(config, name)
    if architecture == "llama" and heads:
        return rows_for_half_split_rotary(weight, heads)
    if architecture == "gemma3" and "norm" in name:
        return weight - np.float32(1.0)
    return weight


def llama3_frequency_factors(config):
    """What `rope_freqs.weight` holds: each rotary frequency is divided by its factor."""
    scaling, head_dim = config["rope_scaling"], config["head_dim"]
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    original = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, between))
    assert len(set(factors.round(6))) >= 3, "all three bands must occur"
    return factors.astype(np.float32)


def write_gguf(path, family, weights, types=None, file_type=gguf.LlamaFileType.ALL_F32):
    """Write `weights` (Hugging Face names, f32) and return them as a reader will see them.

    `types(gguf_name)` chooses a quantisation type for each matrix; without it everything is f32.
    """
    config, architecture = family.config, ARCHITECTURES[family.architecture]
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, family, architecture, file_type)
    _write_tokenizer(writer, family)
    if config.get("rope_scaling"):
        writer.add_tensor("rope_freqs.weight", llama3_frequency_factors(config))
    for name, weight in weights.items():
        stored, kind = to_gguf_values(config, name, weight), gguf_name(architecture, name)
        qtype = types(kind) if types and stored.ndim == 2 else Type.F32
        if qtype == Type.F32:
            writer.add_tensor(kind, np.ascontiguousarray(stored))
        else:
            writer.add_tensor(kind, quantise(stored, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_weights(path, config, weights)


def quantise(weight, qtype):
    if qtype in (Type.Q4_K, Type.Q5_K, Type.Q6_K):
        return quantise_k(weight, qtype)
    return gguf.quants.quantize(np.ascontiguousarray(weight), qtype)


def read_weights(path, config, names):
    """The weights of a GGUF file under Hugging Face names, dequantised to f32, rows and norms as Hugging Face has them."""
    architecture = ARCHITECTURES[config["architectures"][0]]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    read = {}
    for name in names:
        tensor = tensors[gguf_name(architecture, name)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        read[name] = np.ascontiguousarray(to_hugging_face_values(config, name, values))
    return read


def _write_metadata(writer, family, architecture, file_type):
    config = family.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"Tiny {family.name}")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(file_type)
    if file_type != gguf.LlamaFileType.ALL_F32:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if architecture == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    if architecture in ("qwen3", "gemma3"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if architecture == "gemma3":
        writer.add_sliding_window(config["sliding_window"])


def _write_tokenizer(writer, family):
    vocabulary, vocab_size = family.vocabulary, family.config["vocab_size"]
    model = json.loads(vocabulary.tokenizer.to_str())["model"]
    texts = {index: token for token, index in vocabulary.tokenizer.get_vocab(with_added_tokens=True).items()}
    added = vocabulary.tokenizer.get_added_tokens_decoder()
    tokens, types = [], []
    for index in range(vocab_size):
        if index not in texts:
            token, kind = f"[PAD{index}]", gguf.TokenType.UNUSED
        elif index in added and added[index].special:
            token, kind = texts[index], gguf.TokenType.CONTROL
        elif index in added:
            # Converters write the spaces of user-defined pieces as spaces.
            token, kind = texts[index].replace("\u2581", " "), gguf.TokenType.USER_DEFINED
        elif vocabulary.ggml_model == "llama" and texts[index].startswith("<0x"):
            token, kind = texts[index], gguf.TokenType.BYTE
        else:
            token, kind = texts[index], gguf.TokenType.NORMAL
        tokens.append(token)
        types.append(kind)

    writer.add_tokenizer_model(vocabulary.ggml_model)
    writer.add_tokenizer_pre(vocabulary.ggml_pre)
    writer.add_token_list([token.encode("utf-8") for token in tokens])
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(types)
    if vocabulary.ggml_model == "gpt2":
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(vocabulary.id(vocabulary.bos or vocabulary.pad))
    writer.add_eos_token_id(vocabulary.id(vocabulary.eos))
    writer.add_pad_token_id(vocabulary.id(vocabulary.pad))
    if vocabulary.unk:
        writer.add_unk_token_id(vocabulary.id(vocabulary.unk))
    if vocabulary.ggml_model == "llama":
        writer.add_add_eos_token(False)
    if vocabulary.ggml_model == "llama" or vocabulary.ggml_pre == "smollm":
        writer.add_add_space_prefix(False)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_chat_template(vocabulary.chat_template)
