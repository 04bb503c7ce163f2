"""What Hugging Face transformers computes at every site: f32, eager attention, read through forward hooks."""

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

GREEDY_STEPS = 24


def build_model(config_folder, weights):
    """The Hugging Face model of a `config.json` with exactly these weights."""
    config = AutoConfig.from_pretrained(config_folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.items()}, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set()), missing
    model.tie_weights()
    return model.eval()


def weight_shapes(config_folder):
    """Name and shape of every weight that the family's checkpoints store; a tied head is not stored."""
    config = AutoConfig.from_pretrained(config_folder)
    model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items() if name not in tied}


@torch.no_grad()
def sites(model, tokens):
    """Every site of one prompt as `{site: [positions, d_model]}`, and its logits `[positions, vocab]`."""
    read, handles = {}, []

    def keep(site, value):
        value = value[0] if isinstance(value, tuple) else value
        read[site] = value[0].float().numpy().copy()

    def on_output(module, site):
        handles.append(module.register_forward_hook(lambda _module, _args, output: keep(site, output)))

    def on_input(module, site):
        def hook(_module, args, kwargs):
            keep(site, args[0] if args else kwargs["hidden_states"])
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    inner = model.model
    on_output(inner.embed_tokens, "hook_embed")
    for index, layer in enumerate(inner.layers):
        # Gemma 3 norms what attention and MLP return before it adds them; what is added is the site.
        has_post_norms = hasattr(layer, "post_feedforward_layernorm")
        at = f"blocks.{index}."
        on_input(layer, at + "hook_resid_pre")
        on_output(layer.post_attention_layernorm if has_post_norms else layer.self_attn, at + "hook_attn_out")
        on_input(layer.pre_feedforward_layernorm if has_post_norms else layer.post_attention_layernorm, at + "hook_resid_mid")
        on_output(layer.post_feedforward_layernorm if has_post_norms else layer.mlp, at + "hook_mlp_out")
        on_output(layer, at + "hook_resid_post")
    on_output(inner.norm, "ln_final.hook_normalized")
    try:
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float().numpy().copy()
    finally:
        for handle in handles:
            handle.remove()
    for index in range(len(inner.layers)):
        site = {name: read[f"blocks.{index}.hook_{name}"] for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")}
        assert _equal_sums(site["resid_mid"], site["resid_pre"] + site["attn_out"])
        assert _equal_sums(site["resid_post"], site["resid_mid"] + site["mlp_out"])
    return read, logits


def _equal_sums(left, right):
    return np.abs(left - right).max() <= 1e-6 * np.abs(right).max()


@torch.no_grad()
def greedy(model, tokens, steps=GREEDY_STEPS):
    """Greedy continuation without any stop token, each step a whole forward pass; with the margin of best over second."""
    so_far, margins = list(tokens), []
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([so_far]), use_cache=False).logits[0, -1].float()
        best = torch.topk(logits, 2)
        so_far.append(int(torch.argmax(logits)))
        margins.append(float(best.values[0] - best.values[1]))
    return np.array(so_far[len(tokens):], dtype=np.int64), np.array(margins, dtype=np.float32)


def prompts(config, special_ids, seed):
    """Token ids of four prompts: one token, few, past a chunk and a window, long."""
    generator = np.random.Generator(np.random.PCG64(seed))
    allowed = [index for index in range(config["vocab_size"]) if index not in special_ids]
    return [generator.choice(allowed, size=length).astype(np.int64) for length in (1, 5, 37, 71)]


def kept_positions(length):
    """All of a short prompt; of a longer one the start, both sides of a window of 8 and of chunk edges, and the end."""
    if length <= 8:
        return np.arange(length, dtype=np.int64)
    wanted = {0, 1, 7, 8, 9, 15, 16, 31, 32, 36, 63, 64, length - 2, length - 1}
    return np.array(sorted(p for p in wanted if p < length), dtype=np.int64)


def write_reference(path, model, prompt_tokens, versions, which=None):
    """Record the prompts (all, or those whose numbers are in `which`) and return a line about the logits."""
    tensors, spreads, margins = {}, [], []
    for number, tokens in enumerate(prompt_tokens):
        if which is not None and number not in which:
            continue
        positions = kept_positions(len(tokens))
        read, logits = sites(model, tokens.tolist())
        tensors[f"p{number}.tokens"] = tokens
        tensors[f"p{number}.positions"] = positions
        for site, values in read.items():
            tensors[f"p{number}.{site}"] = np.ascontiguousarray(values[positions])
        tensors[f"p{number}.logits"] = np.ascontiguousarray(logits[positions])
        tensors[f"p{number}.greedy"], tensors[f"p{number}.greedy_margin"] = greedy(model, tokens.tolist())
        spreads.append(logits.std())
        margins.append(tensors[f"p{number}.greedy_margin"])
    save_file(tensors, path, metadata=versions)
    margins = np.concatenate(margins)
    distinct = np.mean([len(set(tensors[k].tolist())) for k in tensors if k.endswith(".greedy")])
    return (
        f"logit std {np.mean(spreads):.2f}, greedy margin min {margins.min():.4f} median {np.median(margins):.2f}, "
        f"{distinct:.0f} different tokens per continuation"
    )
