"""Two-sided maps whose sides are fitted to a sample of the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..factors import Gradients, Layer
from .base import PROJECTIONS, MapSpec, Share, Sides
from .hashing import gaussians, key
from .sides import TwoSided

_OVERSAMPLING = 8
# No side is fitted wider: beyond it, fitting would cost more than the rows.
_WIDEST = 1024


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

    PASSES: ClassVar[int] = 2

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
        leading = [[_leading(total) for total in totals] for totals in self._sums]
        self._starts = [[directions for directions, _ in sides] for sides in leading]
        self._energies = [[energies for _, energies in sides] for sides in leading]
        self._sums = [[torch.zeros_like(total) for total in totals] for totals in self._sums]

    def sides(self) -> list[Sides]:
        """The sides of each layer, as the last pass left them."""
        layer_sides = []
        for starts, energies, room in zip(self._starts, self._energies, self._rooms, strict=True):
            size = best_size(energies[0], energies[1], room)
            left, right = (start[:, :k].cpu().float().numpy() for start, k in zip(starts, size, strict=True))
            layer_sides.append((left, right))
        return layer_sides


def _leading(matrix: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
    """Left singular vectors and singular values, the largest first."""
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left.to(matrix), values.cpu().numpy()


@PROJECTIONS.register("fitted")
class Fitted(TwoSided):
    """B^T G A with sides that keep most of the gradients of a sample; biased towards 0."""

    fit = SubspaceFit
    stand_in = "kronecker"
    orthonormal = True

    def __init__(self, spec: MapSpec) -> None:
        assert spec.sides is not None
        super().__init__(spec.sides, spec.like, rooms(spec.layers, spec.dim))

    @classmethod
    def block_dim(cls, layers: Sequence[Layer], dim: int) -> int:
        """See :class:`BlockMap`."""
        return sum(rooms(layers, dim))
