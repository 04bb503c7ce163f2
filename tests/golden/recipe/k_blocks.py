"""Quantises to Q4_K, Q5_K and Q6_K, which gguf-py can read but not write.

Plain rounding, not the best fit: any valid block serves, since references are computed from what the blocks say.
"""

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

BLOCK = 256


def quantise_k(weight, qtype):
    """The bytes of a matrix whose rows are multiples of 256 long, as `[rows, bytes per row]`."""
    blocks = weight.astype(np.float32).reshape(-1, BLOCK)
    packed, meant = {Type.Q4_K: _q4, Type.Q5_K: _q5, Type.Q6_K: _q6}[qtype](blocks)
    assert np.array_equal(dequantize(packed, qtype), meant), qtype
    assert np.abs(meant - blocks).max() < np.abs(blocks).max() / 6, qtype
    return np.ascontiguousarray(packed.reshape(weight.shape[0], -1))


def _q4(blocks):
    header, codes, meant = _scaled_with_minimum(blocks, 15)
    return np.concatenate([header, _nibbles(codes)], axis=1), meant


def _q5(blocks):
    header, codes, meant = _scaled_with_minimum(blocks, 31)
    # One byte per place in a sub-block, one bit per sub-block.
    fifth_bits = ((codes >> 4) << np.arange(8, dtype=np.uint8)[:, None]).sum(axis=1).astype(np.uint8)
    return np.concatenate([header, fifth_bits, _nibbles(codes & 15)], axis=1), meant


def _scaled_with_minimum(blocks, top):
    """Eight sub-blocks of 32: value = d * scale * code - dmin * minimum, scale and minimum of six bits each."""
    subs = blocks.reshape(-1, 8, 32)
    lowest = np.minimum(subs.min(axis=2), 0)
    steps = (subs.max(axis=2) - lowest) / top
    d, dmin = _half(steps.max(axis=1) / 63), _half(-lowest.min(axis=1) / 63)
    scales = np.clip(np.round(steps / d.astype(np.float32)), 1, 63).astype(np.uint8)
    minima = np.clip(np.round(-lowest / dmin.astype(np.float32)), 0, 63).astype(np.uint8)
    step = (d.astype(np.float32) * scales)[:, :, None]
    offset = (dmin.astype(np.float32) * minima)[:, :, None]
    codes = np.clip(np.round((subs + offset) / step), 0, top).astype(np.uint8)
    packed_scales = np.concatenate([
        scales[:, :4] | (scales[:, 4:] >> 4) << 6,
        minima[:, :4] | (minima[:, 4:] >> 4) << 6,
        scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4,
    ], axis=1)
    header = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed_scales], axis=1)
    return header, codes, (step * codes - offset).reshape(-1, BLOCK)


def _nibbles(codes):
    pairs = codes.reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def _q6(blocks):
    """Sixteen sub-blocks of 16: value = d * scale * (code - 32), scale signed and of eight bits."""
    subs = blocks.reshape(-1, 16, 16)
    steps = np.abs(subs).max(axis=2) / 31
    d = _half(steps.max(axis=1) / 127)
    scales = np.clip(np.round(steps / d.astype(np.float32)), 1, 127).astype(np.int8)
    step = (d.astype(np.float32) * scales)[:, :, None]
    signed = np.clip(np.round(subs / step), -32, 31)
    codes = (signed + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    lower = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2).reshape(-1, 128)
    upper = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    packed = np.concatenate([lower, upper, scales.view(np.uint8), d.view(np.uint8)], axis=1)
    return packed, (step * signed.astype(np.float32)).reshape(-1, BLOCK)


def _half(values):
    return np.maximum(values, 1e-6).astype(np.float16)[:, None]
