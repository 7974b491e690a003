"""The values that Python and Rust both make from a name, so that small checkpoints need not be stored.

The generator is SplitMix64, started at FNV-1a (64 bits) of the name; a draw is its upper 24 bits as a number in [0, 1). Rust's side is
`common/learning/src/diffusion/testing.rs`.
"""

import numpy as np
import torch

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def fnv1a(text):
    """FNV-1a, 64 bits."""
    state = 0xCBF29CE484222325
    for byte in text.encode():
        state = ((state ^ byte) * 0x100000001B3) & MASK
    return state


def signed(name, count):
    """`count` numbers in [-1, 1) for a name, in f64."""
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a(name)) + np.uint64(GOLDEN) * np.arange(1, count + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float64) / float(1 << 24) * 2.0 - 1.0


def values(name, shape, bound):
    """Uniform in [-bound, bound), as an f32 tensor."""
    count = int(np.prod(shape))
    return torch.from_numpy((signed(name, count) * bound).astype(np.float32).reshape(shape))


def weight(name, shape):
    """A weight: norms about 1, biases small, tables of half a unit, all else of variance 1 / fan-in."""
    if len(shape) == 1 and "norm" in name and name.endswith("weight"):
        count = int(np.prod(shape))
        return torch.from_numpy((1.0 + 0.2 * signed(name, count)).astype(np.float32))
    if len(shape) == 1:
        return values(name, shape, 0.1)
    if "embedding.weight" in name:
        return values(name, shape, 0.5)
    fan_in = int(np.prod(shape[1:]))
    return values(name, shape, float(np.sqrt(3.0 / fan_in)))


def fill(model, part):
    """Sets every parameter of `model` by its name after `part`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(f"{part}.{name}", tuple(parameter.shape)))
