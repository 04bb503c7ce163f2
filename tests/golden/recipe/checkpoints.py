"""Tiny seeded checkpoints: configuration, weights, and the Hugging Face folder of each family."""

import json
import zlib
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import save_file

from . import vocabularies


@dataclass
class Family:
    """A tiny model: its Hugging Face configuration, its vocabulary, and what its weights are drawn from."""

    name: str
    config: dict
    vocabulary: vocabularies.Vocabulary
    # Standard deviations: of the embedding, and of every projection.
    embedding_std: float
    projection_std: float

    @property
    def architecture(self):
        return self.config["architectures"][0]


def families():
    return [_llama(), _llama3(), _qwen2(), _qwen3(), _gemma3()]


def _shared(architecture, model_type, vocabulary, **fields):
    config = {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary.id(vocabulary.bos) if vocabulary.bos else vocabulary.id(vocabulary.pad),
        "eos_token_id": vocabulary.id(vocabulary.eos),
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": model_type,
        "torch_dtype": "float32",
        "transformers_version": "4.57.6",
        "use_cache": True,
    }
    config.update(fields)
    return dict(sorted(config.items()))


def _llama():
    vocabulary = vocabularies.smollm(512)
    config = _shared(
        "LlamaForCausalLM", "llama", vocabulary, hidden_size=64, intermediate_size=96, max_position_embeddings=512,
        mlp_bias=False, num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, pretraining_tp=1,
        rms_norm_eps=1e-5, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True, vocab_size=512,
        pad_token_id=vocabulary.id(vocabulary.pad),
    )
    return Family("llama", config, vocabulary, 0.35, 0.16)


def kquants():
    """A llama wide enough for blocks of 256; written as GGUF only."""
    vocabulary = vocabularies.smollm(320)
    config = _shared(
        "LlamaForCausalLM", "llama", vocabulary, hidden_size=256, intermediate_size=256, max_position_embeddings=512,
        mlp_bias=False, num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=1, pretraining_tp=1,
        rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=True, vocab_size=320,
        pad_token_id=vocabulary.id(vocabulary.pad),
    )
    return Family("kquants", config, vocabulary, 0.18, 0.08)


def _llama3():
    vocabulary = vocabularies.llama3(500)
    scaling = {
        # The band between the two wavelengths must hold a rotary frequency, so the original context is tiny too.
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    config = _shared(
        "LlamaForCausalLM", "llama", vocabulary, hidden_size=32, intermediate_size=64, max_position_embeddings=512,
        mlp_bias=False, num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1, pretraining_tp=1, head_dim=16,
        rms_norm_eps=1e-5, rope_scaling=scaling, rope_theta=500000.0, tie_word_embeddings=True, vocab_size=505,
    )
    config["eos_token_id"] = [vocabulary.id("<|end_of_text|>"), vocabulary.id("<|eot_id|>")]
    return Family("llama3", config, vocabulary, 0.5, 0.24)


def _qwen2():
    vocabulary = vocabularies.qwen2(496)
    config = _shared(
        "Qwen2ForCausalLM", "qwen2", vocabulary, hidden_size=32, intermediate_size=96, max_position_embeddings=1024,
        max_window_layers=3, num_attention_heads=4, num_hidden_layers=3, num_key_value_heads=2, rms_norm_eps=1e-6,
        rope_theta=1000000.0, sliding_window=1024, tie_word_embeddings=False, use_sliding_window=False,
        # As in the real ones, the embedding has more rows than the tokenizer has tokens.
        vocab_size=512,
    )
    del config["attention_bias"]
    return Family("qwen2", config, vocabulary, 0.5, 0.24)


def _qwen3():
    vocabulary = vocabularies.qwen3(496)
    config = _shared(
        "Qwen3ForCausalLM", "qwen3", vocabulary, head_dim=16, hidden_size=32, intermediate_size=64,
        max_position_embeddings=1024, max_window_layers=2, num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True,
        use_sliding_window=False, vocab_size=512,
    )
    return Family("qwen3", config, vocabulary, 0.5, 0.24)


def _gemma3():
    vocabulary = vocabularies.gemma3(600)
    config = _shared(
        "Gemma3ForCausalLM", "gemma3_text", vocabulary, attn_logit_softcapping=None, final_logit_softcapping=None,
        cache_implementation="hybrid", head_dim=16, hidden_activation="gelu_pytorch_tanh", hidden_size=32,
        intermediate_size=64, max_position_embeddings=512, num_attention_heads=4, num_hidden_layers=7,
        num_key_value_heads=1, pad_token_id=vocabulary.id("<pad>"), query_pre_attn_scalar=16, rms_norm_eps=1e-6,
        rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000,
        # Every sixth layer is global: GGUF readers take that number for granted, so a tiny model cannot choose another.
        sliding_window=8, sliding_window_pattern=6, vocab_size=600,
    )
    del config["hidden_act"]
    config["eos_token_id"] = [vocabulary.id("<eos>"), vocabulary.id("<end_of_turn>")]
    return Family("gemma3", config, vocabulary, 0.12, 0.24)


def draw_weights(family, shapes):
    """f32 weights by Hugging Face name, each from a generator seeded by family and name alone."""
    return {name: _draw(family, name, shape) for name, shape in sorted(shapes.items())}


def _draw(family, name, shape):
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{family.name}/{name}".encode())))
    noise = generator.standard_normal(shape)
    if "norm" in name:
        # Gemma's code adds one to a norm's weight.
        centre = 0.0 if family.name == "gemma3" else 1.0
        if family.name == "gemma3" and name == "model.norm.weight":
            # As in real ones the last norm is large, since the embedding that it meets again in the head is small.
            centre = 3.0
        weights = centre + 0.25 * noise
        if family.name == "gemma3":
            # A value to which one can be added and taken away again, so that both formats hold the same model.
            weights = (weights.astype(np.float32) + np.float32(1)) - np.float32(1)
    elif "embed_tokens" in name or "lm_head" in name:
        weights = family.embedding_std * noise
    elif name.endswith("bias"):
        weights = 0.5 * noise
    else:
        # Keep the output's size whatever the width of the input.
        weights = family.projection_std * noise * np.sqrt(family.config["hidden_size"] / shape[-1])
    return weights.astype(np.float32)


def write_config(family, folder):
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", family.config)


def write_folder(family, folder, weights):
    vocabulary = family.vocabulary
    write_config(family, folder)
    _write_json(folder / "generation_config.json", _generation_config(family))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(family))
    tokenizer = json.loads(vocabulary.tokenizer.to_str())
    _write_json(folder / "tokenizer.json", tokenizer, indent=None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _generation_config(family):
    config = {
        "bos_token_id": family.config["bos_token_id"], "eos_token_id": family.config["eos_token_id"],
        "transformers_version": family.config["transformers_version"],
    }
    if family.name == "qwen2":
        # As Qwen's own: the end of a turn and the end of a text both end an answer.
        config["eos_token_id"] = [family.vocabulary.id("<|im_end|>"), family.vocabulary.id("<|endoftext|>")]
        config["pad_token_id"] = family.vocabulary.id("<|endoftext|>")
    return config


def _tokenizer_config(family):
    vocabulary = family.vocabulary
    added = vocabulary.tokenizer.get_added_tokens_decoder()
    config = {
        "add_bos_token": vocabulary.add_bos,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {
                "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized, "rstrip": token.rstrip,
                "single_word": token.single_word, "special": token.special,
            }
            for index, token in sorted(added.items())
        },
        "bos_token": vocabulary.bos,
        "chat_template": vocabulary.chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": vocabulary.eos,
        "model_max_length": family.config["max_position_embeddings"],
        "pad_token": vocabulary.pad,
        "tokenizer_class": vocabulary.tokenizer_class,
        "unk_token": vocabulary.unk,
    }
    if vocabulary.ggml_model == "llama":
        del config["add_prefix_space"]
        config["add_eos_token"] = False
    return config


def _write_json(path, document, indent=2):
    separators = (",", ":") if indent is None else None
    path.write_text(json.dumps(document, indent=indent, separators=separators, ensure_ascii=False) + "\n", encoding="utf-8")
