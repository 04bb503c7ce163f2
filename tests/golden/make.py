"""Makes everything under tests/golden: tiny models, reference activations, token tests.

Run `python3 tests/golden/make.py` with the packages of requirements.txt; name families to make only those.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerFast

from recipe import activations, checkpoints, gguf_files, sentencepiece_like, token_tests

HERE = Path(__file__).resolve().parent


def versions():
    """Safetensors metadata; one entry, since several would be written in no fixed order."""
    packages = ("torch", "transformers", "tokenizers", "gguf", "safetensors", "numpy")
    return {"versions": json.dumps({name: version(name) for name in packages})}


def make_family(family):
    folder = HERE / family.name
    hf = folder / "hf"
    checkpoints.write_folder(family, hf, {})
    weights = checkpoints.draw_weights(family, activations.weight_shapes(hf))
    if family.name == "gemma3":
        # So that one added and one taken away again is exact, and both formats hold the same model.
        weights = {n: (w + np.float32(1)) - np.float32(1) if "norm" in n else w for n, w in weights.items()}
    checkpoints.write_folder(family, hf, weights)

    read_back = gguf_files.write_gguf(folder / "model.gguf", family, weights)
    for name, weight in load_file(hf / "model.safetensors").items():
        assert np.array_equal(read_back[name], weight), name

    vocabulary = family.vocabulary
    special_ids = set(vocabulary.tokenizer.get_added_tokens_decoder())
    seed = {"llama": 11, "llama3": 12, "qwen2": 13, "qwen3": 14, "gemma3": 15}[family.name]
    prompts = activations.prompts(family.config, special_ids, seed)
    model = activations.build_model(hf, weights)
    print(family.name, activations.write_reference(folder / "reference.safetensors", model, prompts, versions()))

    tokenizer = PreTrainedTokenizerFast.from_pretrained(hf)
    token_tests.write_tokens(
        folder / "tokens.json", tokenizer, vocabulary.id(vocabulary.bos) if vocabulary.bos else None, vocabulary.add_bos
    )
    if vocabulary.ggml_model == "llama":
        sentencepiece_like.check(folder / "model.gguf", json.loads((folder / "tokens.json").read_text()))
    if family.name == "llama":
        make_quantised(family, weights, prompts)


def make_quantised(family, weights, prompts):
    """The same weights in block formats; the reference is computed from what a reader gets back from the blocks."""
    mixed = {
        "token_embd": Type.Q8_0, "attn_q": Type.Q4_0, "attn_k": Type.Q5_0, "attn_v": Type.Q5_1, "attn_output": Type.Q4_1,
        "ffn_gate": Type.Q4_1, "ffn_up": Type.Q4_0, "ffn_down": Type.Q5_1,
    }
    choices = {"q8_0": lambda _name, _weight: Type.Q8_0, "mixed": lambda name, _weight: mixed[name.split(".")[-2]]}
    folder = HERE / family.name
    for label, types in choices.items():
        dequantised = gguf_files.write_gguf(folder / f"model-{label}.gguf", family, weights, types)
        model = activations.build_model(folder / "hf", dequantised)
        line = activations.write_reference(folder / f"reference_{label}.safetensors", model, prompts, versions(), which={1, 2})
        print(family.name, label, line)


def main(wanted):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    torch.use_deterministic_algorithms(True)
    for family in checkpoints.families():
        if not wanted or family.name in wanted:
            make_family(family)
    if (not wanted or "smollm2" in wanted):
        from recipe import smollm2

        smollm2.make(HERE / "smollm2", versions())


if __name__ == "__main__":
    main(sys.argv[1:])
