"""Two-sided maps B^T G A: each layer's gradient projected on both sides, layers side by side in a block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..factors import Gradients
from .base import BlockMap, Sides


class TwoSided(BlockMap):
    """B^T G A of each layer, G never formed where its factors are known.

    Args:
        sides: of each layer, B (d_out, a) and A (d_in, b).
        like: gives dtype and device.
        rooms: numbers that each layer has in a block, of which it fills the first a b; by default as many.
    """

    def __init__(self, sides: Sequence[Sides], like: Tensor, rooms: Sequence[int] | None = None) -> None:
        self._sides = [(torch.from_numpy(left).to(like), torch.from_numpy(right).to(like)) for left, right in sides]
        filled = [left.shape[1] * right.shape[1] for left, right in sides]
        starts = accumulate(filled[:-1] if rooms is None else rooms[:-1], initial=0)
        self._spans = [(start, start + count) for start, count in zip(starts, filled, strict=True)]

    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """See :class:`BlockMap`."""
        start, end = self._spans[number]
        block[:, start:end] += gradients.two_sided(*self._sides[number]).flatten(1)

    def directions(self) -> list[tuple[slice, Tensor, Tensor]]:
        """See :class:`BlockMap`."""
        each = zip(self._spans, self._sides, strict=True)
        return [(slice(*span), left, right) for span, (left, right) in each] if self.orthonormal else []
