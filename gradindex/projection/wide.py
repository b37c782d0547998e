"""Wide rows: a second, larger sketch beside each row, which settles the order among candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..factors import Gradients, Layer, part_bytes
from .base import BlockMap, MapSpec
from .hashing import hash64, key
from .sketch import TensorSketch

# What is laid out at once on the CPU.
_PART_BYTES = 32 << 20


class WideMap:
    """Makes the wide block of one checkpoint: a TensorSketch S of what the row's block leaves out.

        E[<P g, P g'> + <S (g - P^T P g), S (g' - P^T P g')>] = <g, g'>, with a variance of about
        (||r||^2 ||r'||^2 + <r, r'>^2) / dim, of r = g - P^T P g

    for an orthonormal P, which keeps much of the gradients in a few numbers: only the rest r has an error. Beside
    random rows, whose own error would add to it, S is of the whole gradient, r = g, and the wide block alone is the
    estimate. Its hash is independent of the rows', so that an error which made a row a candidate is not met again.

    Source of S: Pham and Pagh 2013, see :class:`TensorSketch`.

    Args:
        block_map: makes the row's block.
        dim: numbers of the wide block, an even number.
        checkpoint: its number among all of the store's.
        layers: of the checkpoint.
        seed: of the projection.
        like: gives dtype and device.
    """

    def __init__(
        self, block_map: BlockMap, dim: int, checkpoint: int, layers: Sequence[Layer], seed: int, like: Tensor
    ) -> None:
        streams = [key(seed, checkpoint, layer.name, "wide") for layer in layers]
        self.dim, self._sketch = dim, TensorSketch(MapSpec(dim, layers, streams, like))
        angles = hash64(key(seed, checkpoint, "turns"), dim // 2 + 1).astype(np.float64) * (2 * np.pi / 2**64)
        angles[[0, -1]] = np.where(angles[[0, -1]] < np.pi, 0.0, np.pi)  # these frequencies have but a sign
        self._turns = torch.polar(torch.ones(len(angles), dtype=torch.float64), torch.from_numpy(angles))
        self._turns = self._turns.to(like.device, like.dtype.to_complex())
        # Of each layer the numbers in a row's block, and the spectra (a, f), (b, f) of its directions.
        self._kept = [
            (span, *self._sketch.spectra(number, left, right))
            for number, (span, left, right) in enumerate(block_map.directions())
        ]

    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """Add layer ``number``'s sketched gradients to ``block`` (batch, dim), in place."""
        self._sketch.add(block, number, gradients)

    def finished(self, block: Tensor, rows: Tensor) -> Tensor:
        """The wide block (batch, dim) of what :meth:`add` summed up there; ``rows`` (batch, block_dim) are P g.

        The sketch of P^T P g is taken off, and the rest turned: every frequency by an angle of its own, which changes
        no inner product and spreads what lies in few numbers over all of them. They are close to normally distributed
        then, as codes of 4 bits want them, however sparse the gradients were.
        """
        spectrum = torch.fft.rfft(block)
        for span, left, right in self._kept:
            inner = rows[:, span].reshape(len(rows), len(left), len(right))
            if len(left) > len(right):  # the spectra of the shorter side stay in memory
                inner, left, right = inner.transpose(1, 2), right, left
            numbers = torch.view_as_real(right).flatten(1)
            at_once = max(1, part_bytes(block.device, _PART_BYTES) // (left.numel() * left.itemsize))
            for start in range(0, len(rows), at_once):
                some = inner[start : start + at_once]
                mixed = torch.view_as_complex((some @ numbers).reshape(len(some), len(left), -1, 2))
                spectrum[start : start + at_once] -= (mixed * left).sum(1)
        turned: Tensor = torch.fft.irfft(spectrum * self._turns, self.dim)
        return turned
