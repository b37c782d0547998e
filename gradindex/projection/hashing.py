"""Counter-based hashing: the same random maps on every machine, torch and NumPy version."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key(seed: int, *path: object) -> int:
    """A 64-bit key for a place such as ``(checkpoint, layer, "activations")``."""
    text = "\x1f".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def hash64(stream: int, n: int, start: int = 0) -> NDArray[np.uint64]:
    """``n`` values of a stream from ``start`` on: SplitMix64 (Steele et al. 2014) at counters start + 1, ..."""
    with np.errstate(over="ignore"):
        x = np.uint64(stream) + np.arange(start + 1, start + n + 1, dtype=np.uint64) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        return x ^ (x >> np.uint64(31))


def buckets_and_signs(stream: int, n: int, dim: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A random bucket in [0, dim) and a random sign for each of ``n`` coordinates.

    The bucket comes from the upper 32 bits, the sign from the lowest bit.
    """
    values = hash64(stream, n)
    buckets = ((values >> np.uint64(32)) * np.uint64(dim)) >> np.uint64(32)
    signs = 1.0 - 2.0 * (values & np.uint64(1)).astype(np.float32)
    return buckets.astype(np.int64), signs.astype(np.float32)


def rademachers(stream: int, n: int, start: int = 0) -> NDArray[np.float64]:
    """``n`` random signs, from the lowest bits."""
    return 1.0 - 2.0 * (hash64(stream, n, start) & np.uint64(1)).astype(np.float64)


def gaussians(stream: int, n: int, start: int = 0) -> NDArray[np.float64]:
    """``n`` standard normal numbers, by Box and Muller (1958) from the two halves of each value."""
    values = hash64(stream, n, start)
    upper = ((values >> np.uint64(32)).astype(np.float64) + 0.5) / 2.0**32
    lower = (values & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2.0**32
    return np.asarray(np.sqrt(-2.0 * np.log(upper)) * np.cos(2.0 * np.pi * lower))
