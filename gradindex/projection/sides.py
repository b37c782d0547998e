"""Two-sided maps B^T G A: each layer's gradient projected on both sides, layers side by side in a block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..factors import Gradients, Layer
from .hashing import gaussians, key

_OVERSAMPLING = 8

Sides = tuple[NDArray[np.float32], NDArray[np.float32]]

# A layer's number, and what a batch adds to the sums of its left and its right side.
Share = tuple[int, list[Tensor]]


def sizes(layers: Sequence[Layer], dim: int) -> list[tuple[int, int]]:
    """(a, b) of each layer: about square, each layer an equal share of ``dim``, no side larger than the layer's own."""
    share = max(1, dim // len(layers))
    found = []
    for layer in layers:
        a = min(layer.rows, max(1, isqrt(share)))
        b = min(layer.columns, max(1, share // a))
        found.append((min(layer.rows, max(1, share // b)), b))
    return found


def random_sides(layer: Layer, stream: int, size: tuple[int, int]) -> Sides:
    """Gaussian sides with E[B B^T] = I and E[A A^T] = I; a side that keeps its size is the identity.

    The low-memory variant of Pruthi et al. 2020 (arXiv:2002.08484), appendix on random
    projections. Its error falls only as dim^(-1/4), so it is here for comparison.
    """
    sides = []
    for name, n, k in (("output_gradients", layer.rows, size[0]), ("activations", layer.columns, size[1])):
        random = gaussians(key(stream, name), n * k).reshape(n, k) / np.sqrt(k)
        sides.append(np.eye(n, dtype=np.float32) if n == k else random.astype(np.float32))
    return sides[0], sides[1]


class TwoSided:
    """B^T G A of each layer, G never formed where its factors are known.

    Args:
        sides: of each layer, B (rows, a) and A (columns, b).
        like: gives dtype and device.
    """

    def __init__(self, sides: Sequence[Sides], like: Tensor) -> None:
        self._sides = [(torch.from_numpy(left).to(like), torch.from_numpy(right).to(like)) for left, right in sides]
        ends = list(accumulate(left.shape[1] * right.shape[1] for left, right in sides))
        self._spans = list(zip([0, *ends[:-1]], ends, strict=True))

    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """See ``BlockMap``."""
        start, end = self._spans[number]
        block[:, start:end] += gradients.two_sided(*self._sides[number]).flatten(1)


class SubspaceFit:
    """Fits the sides of one checkpoint's layers to a sample, in :attr:`PASSES` passes over it.

    B and A hold the leading eigenvectors of sum_z G_z G_z^T / ||G_z||^2 and of
    sum_z G_z^T G_z / ||G_z||^2: the heavy gradients of a few examples would else decide alone.
    Found by randomised subspace iteration, so that neither matrix is ever formed: a pass adds
    what :meth:`share` makes of each batch, and ends with :meth:`end_pass`.

    Source: Halko, Martinsson and Tropp 2011 (arXiv:0909.4061), algorithms 4.4 and 5.3.

    Args:
        layers: of the checkpoint.
        dim: numbers per checkpoint.
        stream: a 64-bit key for the random start.
        like: gives dtype and device.
    """

    PASSES = 2

    def __init__(self, layers: Sequence[Layer], dim: int, stream: int, like: Tensor) -> None:
        self._sizes = sizes(layers, dim)
        self._starts: list[list[Tensor]] = []
        for number, (layer, size) in enumerate(zip(layers, self._sizes, strict=True)):
            starts = []
            for side, n, k in (("left", layer.rows, size[0]), ("right", layer.columns, size[1])):
                wanted = min(n, k + _OVERSAMPLING)
                start = gaussians(key(stream, number, side), n * wanted).reshape(n, wanted)
                starts.append(_orthonormal(torch.from_numpy(start).to(like)))
            self._starts.append(starts)
        self._sums = [[torch.zeros_like(start) for start in starts] for starts in self._starts]

    def share(self, number: int, gradients: Gradients) -> Share:
        """What a batch's gradients of layer ``number`` add to this pass; nothing is added yet."""
        norms = gradients.squared_norms()
        weights = (1 / norms).where(norms > torch.finfo(torch.float32).tiny, 0.0)  # zero gradients point nowhere
        starts = self._starts[number]
        return number, [gradients.sided(start, side, weights.to(start)) for side, start in enumerate(starts)]

    def add(self, shares: Iterable[Share]) -> None:
        """Add what :meth:`share` returned."""
        for number, sides in shares:
            for total, side in zip(self._sums[number], sides, strict=True):
                total += side

    def end_pass(self) -> None:
        """Start the next pass from what this one found."""
        self._starts = [[_orthonormal(total) for total in totals] for totals in self._sums]
        self._sums = [[torch.zeros_like(total) for total in totals] for totals in self._sums]

    def sides(self) -> list[Sides]:
        """The sides of each layer, as the last pass left them."""
        return [
            (left[:, :a].cpu().float().numpy(), right[:, :b].cpu().float().numpy())
            for (left, right), (a, b) in zip(self._starts, self._sizes, strict=True)
        ]


def _orthonormal(matrix: Tensor) -> Tensor:
    """Left singular vectors, the leading ones first."""
    left: Tensor = torch.linalg.svd(matrix.double(), full_matrices=False)[0]
    return left.to(matrix)
