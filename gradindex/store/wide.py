"""Wide rows as they are stored: two numbers of 4 bits in a byte, with a scale and a norm for each block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..examples import Coded

# Codes are 1 to 15, of numbers from -7 to 7 steps. A block's step is this share of the root of its mean square: of
# normally distributed numbers 0.9% are cut off, and what rounding adds to the error of a sketch is 1% of it.
_STEP = 2.6 / 7
_MIDDLE, _MOST = 8, 7
# Bytes of codes that are laid out as numbers at once: what the processor's cache holds.
_CACHED_BYTES = 1 << 18


def wide_encoded(rows: NDArray[np.float32], n_checkpoints: int) -> Coded:
    """Wide rows (b, C wide) as they are stored, with an even number ``wide``.

    The second half of a block's numbers lies in the upper four bits of its bytes. A block's scale is such that its
    product with itself as it was is its squared norm: what is cut off and rounded then makes no product smaller on
    average (Gao and Long 2024, RaBitQ, arXiv:2405.12497, section 3.2).
    """
    blocks = rows.reshape(len(rows), n_checkpoints, -1)
    squares = np.einsum("bcn,bcn->bc", blocks, blocks, dtype=np.float64)
    steps = _STEP * np.sqrt(squares / blocks.shape[2])
    safe = np.where(steps > 0, steps, 1.0).astype(np.float32)[:, :, None]
    numbers = np.clip(np.rint(blocks / safe), -_MOST, _MOST)
    own = np.einsum("bcn,bcn->bc", numbers, blocks, dtype=np.float64)
    codes = (numbers + _MIDDLE).astype(np.uint8).reshape(len(rows), n_checkpoints, 2, -1)
    packed = (codes[:, :, 0] | (codes[:, :, 1] << 4)).reshape(len(rows), -1)
    scales = np.divide(squares, own, out=np.zeros_like(own), where=own > 0)
    return Coded(packed, scales.astype(np.float32), np.sqrt(squares).astype(np.float32))


def wide_products(coded: Coded, query: NDArray[np.float32]) -> NDArray[np.float64]:
    """(b, C) inner products of wide rows' blocks with those of a query's (C wide,), each row's computed alone."""
    count, n_checkpoints = coded.scales.shape
    codes, blocks = coded.codes.reshape(count, n_checkpoints, -1), query.reshape(n_checkpoints, 2, -1)
    at_once = max(1, _CACHED_BYTES // max(1, codes.shape[2]))
    products = np.zeros((count, n_checkpoints))
    for checkpoint, (low, high) in enumerate(blocks):
        middle = _MIDDLE * (low.sum(dtype=np.float64) + high.sum(dtype=np.float64))
        for start in range(0, count, at_once):
            some, part = slice(start, start + at_once), codes[start : start + at_once, checkpoint]
            sums = np.einsum("bn,n->b", (part & 15).astype(np.float32), low)
            sums += np.einsum("bn,n->b", (part >> 4).astype(np.float32), high)
            products[some, checkpoint] = coded.scales[some, checkpoint] * (sums - middle)
    return products
