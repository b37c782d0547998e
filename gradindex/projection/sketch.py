"""TensorSketch: a random, unbiased map that never forms a gradient unless that is cheaper."""

from __future__ import annotations

from copy import copy
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from ..factors import Factors, Gradients, Lookups, Sum, part_bytes
from ..stacks import Stacks
from .base import PROJECTIONS, BlockMap, MapSpec
from .hashing import buckets_and_signs, key


@PROJECTIONS.register("tensorsketch")
class TensorSketch(BlockMap):
    """Count sketch of delta x^T with the hash h(i, j) = h1(i) + h2(j) mod dim, all layers summed.

    E[<S g, S g'>] = <g, g'>. The sketch of an outer product is the circular convolution of two
    small count sketches, taken by FFT; with many positions the gradient is formed and sketched
    with the same hash instead, which gives the same numbers.

    Source: Pham and Pagh 2013, "Fast and scalable polynomial kernels via explicit feature
    maps", section 3; projected TracIn: Pruthi et al. 2020, section 3.4. One independent map
    per (checkpoint, layer): layers share one sketch, so shared maps would add cross terms.
    """

    def __init__(self, spec: MapSpec) -> None:
        self.dim, like = spec.dim, spec.like
        self._sides = [
            (
                CountSketch(layer.d_in, spec.dim, key(stream, "activations"), like),
                CountSketch(layer.d_out, spec.dim, key(stream, "output_gradients"), like),
            )
            for layer, stream in zip(spec.layers, spec.streams, strict=True)
        ]

    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """See :class:`BlockMap`."""
        self._add(block, *self._sides[number], gradients)

    def spectra(self, number: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Of the columns of ``left`` (d_out, a) and ``right`` (d_in, b): (a, f) and (b, f), complex.

        The product of two of them is the Fourier transform of the sketch of the columns' outer product.
        """
        columns, rows = self._sides[number]
        return torch.fft.rfft(rows(left.T[None])[0]), torch.fft.rfft(columns(right.T[None])[0])

    def _add(self, block: Tensor, columns: CountSketch, rows: CountSketch, gradients: Gradients) -> None:
        if isinstance(gradients, Sum):
            for term in gradients.terms:
                self._add(block, columns, rows, term)
        elif isinstance(gradients, Stacks):
            for number, examples, factors in gradients.by_block:
                share = block.new_zeros(len(examples), self.dim)
                self._add(share, columns.part(gradients.columns(number)), rows, factors)
                block.index_add_(0, examples, share)
        elif isinstance(gradients, Lookups):
            # A column with a single one in it: the sketch of the other side, moved by its bucket.
            deltas, indices = rows(gradients.output_gradients), gradients.indices[:, :, None]
            places = (columns.buckets[indices] + torch.arange(self.dim, device=block.device)) % self.dim
            block.scatter_add_(1, places.flatten(1), (deltas * columns.signs[indices]).flatten(1))
        elif isinstance(gradients, Factors) and self._convolves(gradients, len(columns.buckets) * len(rows.buckets)):
            spectra = torch.fft.rfft(columns(gradients.activations)), torch.fft.rfft(rows(gradients.output_gradients))
            block += torch.fft.irfft(torch.einsum("bpf,bpf->bf", *spectra), self.dim)
        else:
            self._add_formed(block, columns, rows, gradients.gradient)

    def _convolves(self, gradients: Factors, size: int) -> bool:
        """Whether an FFT for each position costs less than forming the gradient and adding up its elements."""
        return gradients.rank_one or 2 * gradients.activations.shape[1] * self.dim < size

    def _add_formed(self, block: Tensor, columns: CountSketch, rows: CountSketch, gradient: Tensor) -> None:
        if len(columns.buckets) < len(rows.buckets):
            columns, rows, gradient = rows, columns, gradient.transpose(1, 2)
        # A few features of the shorter side at a time (one on the CPU), so that the signed copy stays small. Buckets
        # come first in memory: whole contiguous rows of examples are added.
        sketch = block.new_zeros(self.dim, len(block))
        each = max(1, gradient[:, :1].numel() * gradient.itemsize)
        at_once = max(1, part_bytes(gradient.device, 0) // each)
        for start in range(0, gradient.shape[1], at_once):
            some = slice(start, start + at_once)
            signed = gradient[:, some] * (rows.signs[some, None] * columns.signs)
            places = (rows.buckets[some, None] + columns.buckets) % self.dim
            sketch.index_add_(0, places.flatten(), signed.flatten(1).T)
        block += sketch.T


class CountSketch:
    """Adds each coordinate, with its random sign, to its random bucket (Charikar et al. 2002).

    Args:
        n: how many coordinates.
        dim: how many buckets.
        stream: the 64-bit key of the hash.
        like: gives dtype and device.
    """

    def __init__(self, n: int, dim: int, stream: int, like: Tensor) -> None:
        buckets, signs = buckets_and_signs(stream, n, dim)
        self.dim = dim
        self.buckets = torch.from_numpy(buckets).to(like.device)
        self.signs = torch.from_numpy(signs).to(like)
        self._parts: dict[int, CountSketch] = {}

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """The coordinates by bucket, and where each bucket begins."""
        order = self.buckets.argsort(stable=True)
        return order, torch.searchsorted(self.buckets[order], torch.arange(self.dim, device=order.device))

    def part(self, columns: slice) -> CountSketch:
        """The sketch of some coordinates alone, the others being zero; kept by where they begin."""
        part = self._parts.get(columns.start)
        if part is None:
            part = self._parts[columns.start] = copy(self)
            part.buckets, part.signs, part._parts = self.buckets[columns], self.signs[columns], {}
            part.__dict__.pop("_sorted", None)
        return part

    def __call__(self, values: Tensor) -> Tensor:
        """(batch, positions, n) to (batch, positions, dim)."""
        batch, positions, n = values.shape
        # embedding_bag sums the coordinates of each bucket, for all positions at once.
        first = torch.arange(batch, device=values.device)[:, None]
        order, starts = self._sorted
        sums = functional.embedding_bag(
            (first * n + order).flatten(),
            values.transpose(1, 2).reshape(batch * n, positions),
            (first * n + starts).flatten(),
            mode="sum",
            per_sample_weights=self.signs[order].repeat(batch),
        )
        return sums.reshape(batch, self.dim, positions).transpose(1, 2).contiguous()
