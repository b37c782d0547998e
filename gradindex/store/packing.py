"""Exact factors in less room: of each side the largest numbers as they are, the others in a few bits.

The output gradient of a layer with many outputs has a few large entries and many small ones; the small ones add up to
more than a score's rounding, so none can be dropped, but in few bits they do. A row that would be changed by more than
the tolerance is kept whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..choices import FactorType
from ..examples import Sides
from .forms import PACKED_BITS

# How many of the largest numbers may be kept.
_KEPT = (0, 16, 32, 48, 64)
# The most that a product of gradients may change by, as a share of the product of their norms: float32's rounding of
# sums as long, and what rounding both sides to float16 may do.
TOLERANCE: Mapping[FactorType, float] = {"float32": 1e-6, "float16": 1e-3}
# Fewer outputs are not worth it, and packed factors must spare as large a share of the room.
MANY_OUTPUTS, WORTH = 256, 1 / 5
# Rows by which it is chosen how to pack.
PACKING_SAMPLE = 256


class Packing(NamedTuple):
    """How one side of a layer's factors is stored.

    Args:
        kept: how many numbers are stored as they are, with their places.
        bits: of each of the others: 8, 12, 16 or 24.
    """

    kept: int
    bits: int

    def specs(self, size: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Arrays of a side of ``size`` numbers: the shape of one row, and the type."""
        arrays: dict[str, tuple[tuple[int, ...], str]] = {"scales": ((2,), "<f4")}
        if self.kept:
            arrays |= {"places": ((self.kept,), "<u2" if size <= 1 << 16 else "<u4"), "values": ((self.kept,), "<f4")}
        arrays["codes"] = ((size,), "|i1" if self.bits < 16 else "<i2")
        if self.bits in (12, 24):
            arrays["low"] = ((size if self.bits == 24 else -(-size // 2),), "|u1")
        return arrays

    def row_bytes(self, size: int) -> int:
        """What a row of a side of ``size`` numbers takes."""
        return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in self.specs(size).values())

    def packed(self, side: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The arrays of :meth:`specs` for ``side`` (m, d): a number is the lowest of its row plus its code's steps."""
        arrays: dict[str, NDArray[Any]] = {}
        low = high = None
        if self.kept:
            places = np.argpartition(np.abs(side), -self.kept, axis=1)[:, -self.kept :]
            places.sort(axis=1)
            kind = self.specs(side.shape[1])["places"][1]
            arrays = {"places": places.astype(kind), "values": np.take_along_axis(side, places, 1)}
            others = side.copy()
            np.put_along_axis(others, places, np.inf, 1)
            low = others.min(1)
            np.put_along_axis(others, places, -np.inf, 1)
            high = others.max(1)
            np.put_along_axis(others, places, low[:, None], 1)
            side = others
        else:
            low, high = side.min(1), side.max(1)
        step = ((high - low) / np.float32((1 << self.bits) - 1)).astype(np.float32)
        # In float32: most numbers are near the lowest, so that their codes are small and exact.
        scaled = side - low[:, None]
        scaled /= np.where(step > 0, step, 1)[:, None]
        np.rint(scaled, out=scaled)
        np.minimum(scaled, np.float32((1 << self.bits) - 1), out=scaled)
        codes = scaled.astype(np.int32)
        arrays["scales"] = np.stack([low, step], 1)
        return arrays | self._planes(codes)

    def _planes(self, codes: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        """Codes as stored: the upper 8 or 16 bits, signed, and what is below them."""
        if self.bits in (8, 16):
            return {"codes": (codes - (1 << (self.bits - 1))).astype(np.int8 if self.bits == 8 else np.int16)}
        if self.bits == 24:
            return {"codes": ((codes >> 8) - (1 << 15)).astype(np.int16), "low": (codes & 0xFF).astype(np.uint8)}
        nibbles = (codes & 0xF).astype(np.uint8)
        if nibbles.shape[1] % 2:
            nibbles = np.pad(nibbles, ((0, 0), (0, 1)))
        return {"codes": ((codes >> 4) - (1 << 7)).astype(np.int8), "low": nibbles[:, ::2] | (nibbles[:, 1::2] << 4)}

    def unpacked(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The numbers (m, d) that :meth:`packed` stored."""
        numbers = np.empty(arrays["codes"].shape, dtype=np.float32)
        self.write_steps(arrays, numbers)
        lowest, step = arrays["scales"].T[:, :, None]
        numbers *= step
        numbers += lowest
        if self.kept:
            np.put_along_axis(numbers, arrays["places"].astype(np.int64), arrays["values"], 1)
        return numbers

    def write_steps(self, arrays: Mapping[str, NDArray[Any]], into: NDArray[np.float32]) -> None:
        """Codes (m, d) as numbers from 0 on, into an array of that shape; those of kept numbers mean nothing."""
        into[...] = arrays["codes"]
        if self.bits in (8, 16):
            into += np.float32(1 << (self.bits - 1))
        elif self.bits == 24:
            into *= 256
            into += np.float32(1 << 23)
            into += arrays["low"]
        else:
            into *= 16
            into += np.float32(1 << 11)
            low, size = arrays["low"], into.shape[1]
            into[:, ::2] += low[:, : (size + 1) // 2] & 0xF
            into[:, 1::2] += low[:, : size // 2] >> 4

    def errors(self, side: NDArray[np.float32], arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """(m,) by how much rows change, as a share of their norm."""
        changed = self.unpacked(arrays)
        changed -= side
        norms = np.linalg.norm(side, axis=1).astype(np.float64)
        shares: NDArray[np.float64] = np.linalg.norm(changed, axis=1) / np.where(norms > 0, norms, 1)
        return shares


Pair = tuple[Packing, Packing]


def packing_of(factors: Mapping[tuple[int, int], Sides], kind: FactorType) -> dict[int, Pair]:
    """How to store factors, by a sample of them: for each layer that takes less room packed, both sides.

    Args:
        factors: by (checkpoint, layer) activations (n, d_in) and output gradients (n, d_out).
        kind: of the factors.
    """
    by_layer: dict[int, list[Sides]] = {}
    for (_, number), (x, delta) in factors.items():
        by_layer.setdefault(number, []).append((x.astype(np.float32), delta.astype(np.float32)))
    chosen = {number: _chosen(sample, kind) for number, sample in sorted(by_layer.items())}
    return {number: pair for number, pair in chosen.items() if pair is not None}


def _chosen(sample: Sequence[Sides], kind: FactorType) -> Pair | None:
    """What takes least room, rows that stay whole counted; ``None`` where whole factors take little more."""
    sizes = tuple(side.shape[1] for side in sample[0])
    if sizes[1] < MANY_OUTPUTS or not len(sample[0][0]):
        return None
    tried: list[dict[Packing, NDArray[np.float64]]] = []
    for side, size in enumerate(sizes):
        # Output gradients that need as many bits as dense ones are not sparse: a quarter less room is not worth it.
        all_bits = PACKED_BITS if side == 0 else PACKED_BITS[:-1]
        ways = [Packing(kept, bits) for bits in all_bits for kept in _KEPT if kept <= size // 8]
        tried.append({way: np.concatenate([way.errors(s[side], way.packed(s[side])) for s in sample]) for way in ways})
    whole = sum(sizes) * np.dtype(kind).itemsize
    least, best = (1 - WORTH) * whole, None
    for x, x_errors in tried[0].items():
        for delta, delta_errors in tried[1].items():
            room = x.row_bytes(sizes[0]) + delta.row_bytes(sizes[1])
            room += whole * (1 - float(np.mean(fine(x_errors, delta_errors, kind))))
            if room < least:
                least, best = room, (x, delta)
    return best


def why_whole(d_out: int) -> str:
    """Why the factors of a layer stay whole, for people."""
    if d_out < MANY_OUTPUTS:
        return f"it has {d_out} outputs, and only those with {MANY_OUTPUTS} or more are packed"
    return f"its output gradients have too many large entries to spare {WORTH:.0%} of the room at the same precision"


def fine(
    activations: NDArray[np.float64], output_gradients: NDArray[np.float64], kind: FactorType
) -> NDArray[np.bool_]:
    """(m,) whether no product with another gradient changes by more than the tolerance, by the errors of both sides."""
    errors = activations + output_gradients + activations * output_gradients
    return np.less_equal(errors, TOLERANCE[kind])  # of a NaN, False
