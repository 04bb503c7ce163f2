"""Makes everything under tests/golden: tiny models, reference activations, token tests.

Run `python3 tests/golden/make.py` with the packages of requirements.txt; name families to make only those.
"""

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerFast

from recipe import activations, checkpoints, gguf_files, sentencepiece_like, smollm2, token_tests

HERE = Path(__file__).resolve().parent
SEEDS = {"llama": 11, "llama3": 12, "qwen2": 13, "qwen3": 14, "gemma3": 15, "kquants": 16}
KINDS = ("token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
QUANTISED = {
    "q8_0": (FileType.MOSTLY_Q8_0, dict.fromkeys(KINDS, Type.Q8_0)),
    "mixed": (FileType.MOSTLY_Q4_1, {
        "token_embd": Type.Q8_0, "attn_q": Type.Q4_0, "attn_k": Type.Q5_0, "attn_v": Type.Q5_1, "attn_output": Type.Q4_1,
        "ffn_gate": Type.Q4_1, "ffn_up": Type.Q4_0, "ffn_down": Type.Q5_1,
    }),
}
# As in the files called Q4_K_M: more bits for the embedding, the values and the way down, in some layers.
K_TYPES = {
    **dict.fromkeys(KINDS, Type.Q4_K), "token_embd": Type.Q6_K, "blk.0.attn_v": Type.Q6_K, "blk.0.ffn_down": Type.Q6_K,
    "blk.1.attn_output": Type.Q5_K, "blk.1.ffn_up": Type.Q5_K,
}


def versions():
    """Safetensors metadata; one entry, since several would be written in no fixed order."""
    packages = ("torch", "transformers", "tokenizers", "gguf", "safetensors", "numpy")
    return {"versions": json.dumps({name: version(name) for name in packages})}


def make_family(family):
    """Both formats of one family, its activations and its token tests."""
    folder = HERE / family.name
    hf = folder / "hf"
    checkpoints.write_config(family, hf)
    weights = checkpoints.draw_weights(family, activations.weight_shapes(hf))
    checkpoints.write_folder(family, hf, weights)
    read_back = gguf_files.write_gguf(folder / "model.gguf", family, weights)
    for name, weight in load_file(hf / "model.safetensors").items():
        assert np.array_equal(read_back[name], weight), f"{family.name}: {name} differs between the formats"

    prompts = prompts_for(family)
    model = activations.build_model(hf, weights)
    print(family.name, activations.write_reference(folder / "reference.safetensors", model, prompts, versions()))

    vocabulary = family.vocabulary
    token_tests.write_tokens(
        folder / "tokens.json", PreTrainedTokenizerFast.from_pretrained(hf),
        vocabulary.id(vocabulary.bos) if vocabulary.bos else None, vocabulary.add_bos,
    )
    if vocabulary.ggml_model == "llama":
        sentencepiece_like.check(folder / "model.gguf", json.loads((folder / "tokens.json").read_text()))
    if family.name == "llama":
        for label, (file_type, types) in QUANTISED.items():
            make_quantised(family, weights, folder, hf, label, file_type, types)


def make_kquants():
    family = checkpoints.kquants()
    folder = HERE / family.name
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints.write_config(family, Path(scratch))
        weights = checkpoints.draw_weights(family, activations.weight_shapes(scratch))
        make_quantised(family, weights, folder, scratch, "q4_k_m", FileType.MOSTLY_Q4_K_M, K_TYPES)


def make_quantised(family, weights, folder, config_folder, label, file_type, types):
    """The weights in block formats; the reference is computed from what a reader gets back from the blocks."""
    dequantised = gguf_files.write_gguf(
        folder / f"model-{label}.gguf", family, weights, lambda name: _type_for(types, name), file_type
    )
    model = activations.build_model(config_folder, dequantised)
    line = activations.write_reference(
        folder / f"reference_{label}.safetensors", model, prompts_for(family), versions(), which={1, 2}
    )
    print(family.name, label, line)


def _type_for(types, name):
    """By `blk.{i}.{kind}` where a layer is told apart, else by kind."""
    stem = name.removesuffix(".weight")
    return types.get(stem) or types[stem.split(".")[-1]]


def prompts_for(family):
    special_ids = set(family.vocabulary.tokenizer.get_added_tokens_decoder())
    return activations.prompts(family.config, special_ids, seed=SEEDS[family.name])


def main(wanted):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    torch.use_deterministic_algorithms(True)
    for family in checkpoints.families():
        if not wanted or family.name in wanted:
            make_family(family)
    if not wanted or "kquants" in wanted:
        make_kquants()
    if not wanted or "smollm2" in wanted:
        smollm2.make(HERE / "smollm2", versions())


if __name__ == "__main__":
    main(sys.argv[1:])
