"""Maps from the factors of all layers of one checkpoint to that checkpoint's block of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..factors import Factors, Layer
from .hashing import buckets_and_signs, key

Kind = Literal["tensorsketch", "none"]
DEFAULT_DIM = 1024


@dataclass(frozen=True)
class Projection:
    """Which map makes rows.

    Args:
        kind: ``"tensorsketch"``, random and unbiased, or ``"none"``, whole gradients.
        dim: numbers per checkpoint (``"tensorsketch"`` only).
        seed: chooses the random map.
    """

    kind: Kind = "tensorsketch"
    dim: int = DEFAULT_DIM
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("tensorsketch", "none"):
            raise ArgumentError(f"projection is {self.kind!r}, but must be 'tensorsketch' or 'none'.")
        if self.dim < 1:
            raise ArgumentError(f"dim is {self.dim}, but must be at least 1.")

    def block_dim(self, layers: Sequence[Layer]) -> int:
        """How many numbers one checkpoint takes in a row."""
        return self.dim if self.kind == "tensorsketch" else sum(layer.size for layer in layers)

    def for_checkpoint(self, checkpoint: int, layers: Sequence[Layer], like: Tensor) -> BlockMap:
        """The map of one checkpoint; ``like`` gives dtype and device."""
        if self.kind == "none":
            return Whole(layers)
        return TensorSketch(self.dim, [(layer, key(self.seed, checkpoint, layer.name)) for layer in layers], like)


class BlockMap(Protocol):
    """Adds a layer's share to the blocks of a batch."""

    def add(self, block: Tensor, number: int, factors: Factors) -> None:
        """Add layer ``number``'s projected gradients to ``block`` (batch, block_dim), in place."""


class Whole:
    """No projection: the layers' gradients side by side."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        ends = torch.tensor([layer.size for layer in layers]).cumsum(0).tolist()
        self._spans = list(zip([0, *ends[:-1]], ends, strict=True))

    def add(self, block: Tensor, number: int, factors: Factors) -> None:
        """See :class:`BlockMap`."""
        start, end = self._spans[number]
        block[:, start:end] += factors.gradient.flatten(1)


class TensorSketch:
    """Count sketch of delta x^T with the hash h(i, j) = h1(i) + h2(j) mod dim, all layers summed.

    E[<S g, S g'>] = <g, g'>. For rank one the sketch of the outer product is the circular
    convolution of two small count sketches, taken by FFT; with positions the gradient is
    formed and sketched with the same hash, which gives the same numbers.

    Source: Pham and Pagh 2013, "Fast and scalable polynomial kernels via explicit feature
    maps", section 3; projected TracIn: Pruthi et al. 2020, section 3.4. One independent map
    per (checkpoint, layer): layers share one sketch, so shared maps would add cross terms.

    Args:
        dim: length of the sketch.
        streams: each layer with its 64-bit key.
        like: gives dtype and device.
    """

    def __init__(self, dim: int, streams: Sequence[tuple[Layer, int]], like: Tensor) -> None:
        self.dim = dim
        self._sides = []
        for layer, stream in streams:
            sides = []
            for side, size in (("activations", layer.columns), ("output_gradients", layer.rows)):
                buckets, signs = buckets_and_signs(key(stream, side), size, dim)
                sides.append((torch.from_numpy(buckets).to(like.device), torch.from_numpy(signs).to(like)))
            self._sides.append(sides)

    def add(self, block: Tensor, number: int, factors: Factors) -> None:
        """See :class:`BlockMap`."""
        (column_buckets, column_signs), (row_buckets, row_signs) = self._sides[number]
        if factors.rank_one:
            left = self._count_sketch(factors.activations[:, 0] * column_signs, column_buckets)
            right = self._count_sketch(factors.output_gradients[:, 0] * row_signs, row_buckets)
            block += torch.fft.irfft(torch.fft.rfft(left) * torch.fft.rfft(right), self.dim)
            return
        # Row by row of G, so that the signed copy stays as small as one output feature.
        for row in range(len(row_buckets)):
            signed = factors.gradient[:, row] * (column_signs * row_signs[row])
            buckets = (column_buckets + row_buckets[row]) % self.dim
            block += self._count_sketch(signed, buckets)

    def _count_sketch(self, signed: Tensor, buckets: Tensor) -> Tensor:
        """(batch, n) to (batch, dim): sums of the entries that share a bucket."""
        sketch = signed.new_zeros(self.dim, len(signed))
        sketch.index_add_(0, buckets, signed.T)  # transposed: whole contiguous rows are added
        return sketch.T
