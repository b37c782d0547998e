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
# No side is fitted wider: beyond it, fitting would cost more than the rows.
_WIDEST = 1024

Sides = tuple[NDArray[np.float32], NDArray[np.float32]]

# A layer's number, and what a batch adds to the sums of its left and its right side.
Share = tuple[int, list[Tensor]]


def sizes(layers: Sequence[Layer], dim: int) -> list[tuple[int, int]]:
    """(a, b) of each layer: about square, each layer an equal share of ``dim``, no side larger than the layer's own."""
    share = max(1, dim // len(layers))
    found = []
    for layer in layers:
        a = min(layer.d_out, max(1, isqrt(share)))
        b = min(layer.d_in, max(1, share // a))
        found.append((min(layer.d_out, max(1, share // b)), b))
    return found


def rooms(layers: Sequence[Layer], dim: int) -> list[int]:
    """Numbers that each layer's fitted map has in a block: an equal share of ``dim``, no more than its own."""
    share = max(1, dim // len(layers))
    return [min(layer.size, share) for layer in layers]


def best_size(left: NDArray[np.float64], right: NDArray[np.float64], room: int) -> tuple[int, int]:
    """(a, b) with a b <= ``room`` that keeps most: the product of the energies of the two sides.

    A square wastes what one side does not need. The output gradients of a classification layer have about as many
    directions as there are classes, its activations few: with 1,000 classes, 1 x 1,000 numbers find every true top-100
    that 32 x 32 miss nine times of ten (docs/search.md).

    Args:
        left: energies of the directions of the output gradients, largest first.
        right: of the activations.
        room: the most numbers.
    """
    lefts, rights = np.cumsum(left), np.cumsum(right)
    heights = np.arange(1, min(len(left), room) + 1)
    widths = np.minimum(len(right), room // heights)
    place = int(np.argmax(lefts[heights - 1] * rights[widths - 1]))
    return int(heights[place]), int(widths[place])


def random_sides(layer: Layer, stream: int, size: tuple[int, int]) -> Sides:
    """Gaussian sides with E[B B^T] = I and E[A A^T] = I; a side that keeps its size is the identity.

    The low-memory variant of Pruthi et al. 2020 (arXiv:2002.08484), appendix on random
    projections. Its error falls only as dim^(-1/4), so it is here for comparison.
    """
    sides = []
    for name, n, k in (("output_gradients", layer.d_out, size[0]), ("activations", layer.d_in, size[1])):
        random = gaussians(key(stream, name), n * k).reshape(n, k) / np.sqrt(k)
        sides.append(np.eye(n, dtype=np.float32) if n == k else random.astype(np.float32))
    return sides[0], sides[1]


class TwoSided:
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
        """See ``BlockMap``."""
        start, end = self._spans[number]
        block[:, start:end] += gradients.two_sided(*self._sides[number]).flatten(1)


class SubspaceFit:
    """Fits the sides of one checkpoint's layers to a sample, in :attr:`PASSES` passes over it.

    B and A hold the leading eigenvectors of sum_z G_z G_z^T / ||G_z||^2 and of
    sum_z G_z^T G_z / ||G_z||^2: the heavy gradients of a few examples would else decide alone.
    Found by randomised subspace iteration, so that neither matrix is ever formed: a pass adds
    what :meth:`share` makes of each batch, and ends with :meth:`end_pass`. How many of each side
    are kept follows from their eigenvalues, see :func:`best_size`.

    Source: Halko, Martinsson and Tropp 2011 (arXiv:0909.4061), algorithms 4.4 and 5.3.

    Args:
        layers: of the checkpoint.
        dim: numbers per checkpoint.
        stream: a 64-bit key for the random start.
        like: gives dtype and device.
    """

    PASSES = 2

    def __init__(self, layers: Sequence[Layer], dim: int, stream: int, like: Tensor) -> None:
        self._rooms = rooms(layers, dim)
        self._starts: list[list[Tensor]] = []
        self._energies: list[list[NDArray[np.float64]]] = []
        for number, (layer, room) in enumerate(zip(layers, self._rooms, strict=True)):
            starts = []
            for side, n in (("left", layer.d_out), ("right", layer.d_in)):
                wanted = min(n, min(room, _WIDEST) + _OVERSAMPLING)
                start = gaussians(key(stream, number, side), n * wanted).reshape(n, wanted)
                starts.append(_leading(torch.from_numpy(start).to(like))[0])
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
        found = [[_leading(total) for total in totals] for totals in self._sums]
        self._starts = [[directions for directions, _ in sides] for sides in found]
        self._energies = [[energies for _, energies in sides] for sides in found]
        self._sums = [[torch.zeros_like(total) for total in totals] for totals in self._sums]

    def sides(self) -> list[Sides]:
        """The sides of each layer, as the last pass left them."""
        kept = []
        for starts, energies, room in zip(self._starts, self._energies, self._rooms, strict=True):
            size = best_size(energies[0], energies[1], room)
            left, right = (start[:, :k].cpu().float().numpy() for start, k in zip(starts, size, strict=True))
            kept.append((left, right))
        return kept


def _leading(matrix: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
    """Left singular vectors and singular values, the largest first."""
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left.to(matrix), values.cpu().numpy()
