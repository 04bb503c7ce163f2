"""Asks llama.cpp whether it agrees with the references: a third implementation, on the GGUF files.

Run `python3 tests/golden/cross_check.py` with `pip install xllamacpp==2026.10.11549 numpy safetensors` (in an environment of
its own). Prints, per file: greedy tokens that agree, the largest difference of a log-probability, and token tests that differ.
llama.cpp quantises activations where weights are quantised and reads GELU from a table of halves, so only f32 files without
GELU agree to rounding; it does not compose Unicode, so Qwen's combining marks differ.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import xllamacpp
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent


def main():
    for model in sorted(HERE.glob("*/model*.gguf")):
        # One process each: the library reports trouble by ending the process.
        subprocess.run([sys.executable, __file__, model], check=False, stderr=subprocess.DEVNULL)


def check(model):
    server = xllamacpp.Server(_exact_parameters(model))
    label = model.stem.removeprefix("model").replace("-", "_", 1)
    reference = load_file(model.parent / f"reference{label}.safetensors")
    print(model.parent.name + label, flush=True)
    for number in range(4):
        if f"p{number}.tokens" in reference:
            print(f"  p{number}: " + _compare_prompt(server.listening_address, reference, f"p{number}."), flush=True)
    tokens = model.parent / "tokens.json"
    if tokens.exists():
        print("  " + _compare_tokens(server.listening_address, json.loads(tokens.read_text())), flush=True)
    # The server's threads outlive main.
    os._exit(0)


def _exact_parameters(model):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 1024, 1, 0
    parameters.warmup, parameters.fit_params, parameters.verbosity = False, False, -1
    parameters.swa_full, parameters.no_extra_bufts = True, True
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return parameters


def _post(address, path, body):
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def _compare_prompt(address, reference, at):
    wanted = reference[at + "greedy"].tolist()
    greedy = {"prompt": reference[at + "tokens"].tolist(), "temperature": 0, "cache_prompt": False, "return_tokens": True}
    made = _post(address, "/completion", {**greedy, "n_predict": len(wanted)})["tokens"]
    same = next((i for i, (a, b) in enumerate(zip(made, wanted)) if a != b), min(len(made), len(wanted)))
    line = f"{same} of {len(wanted)} greedy tokens agree, " + ("it stopped there" if same == len(made) else "then differ")
    if same == len(wanted):
        line = f"all {same} greedy tokens agree"
    steps = _post(address, "/completion", {**greedy, "n_predict": 1, "n_probs": 20}).get("completion_probabilities")
    if not steps:
        return line + "; no log-probabilities, since the first token is part of a character"
    logits = reference[at + "logits"][-1].astype(np.float64)
    theirs = {entry["id"]: entry["logprob"] for entry in steps[0]["top_logprobs"]}
    ours = {index: logits[index] - np.logaddexp.reduce(logits) for index in theirs}
    return line + f"; log-probabilities differ by {max(abs(ours[i] - theirs[i]) for i in theirs):.1e} at most"


def _compare_tokens(address, document):
    different = {
        case["text"] for case in document["strings"] for key, special in (("as_text", False), ("as_special", True))
        if _post(address, "/tokenize", {"content": case["text"], "add_special": False, "parse_special": special})["tokens"]
        != case[key]
    }
    return f"{len(different)} of {len(document['strings'])} strings differ {sorted(different) or ''}"


if __name__ == "__main__":
    check(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
