"""Dense random maps: the textbook's Johnson-Lindenstrauss projection, made piece by piece."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..factors import Gradients
from .base import PROJECTIONS, BlockMap, MapSpec
from .hashing import gaussians, rademachers

# Of the matrix, at a time.
_ENTRIES = 1 << 20


class Dense(BlockMap):
    """R g with independent entries of variance 1 / dim, all layers summed. E[R^T R] = I.

    The matrix is hashed again for each batch, a million entries at a time, and never held whole,
    which makes it far slower than a sketch of the same accuracy: a yardstick, not a default.
    """

    def __init__(self, spec: MapSpec) -> None:
        self.dim = spec.dim
        self._streams = spec.streams
        self._at_once = max(1, _ENTRIES // spec.dim)

    @staticmethod
    @abstractmethod
    def draw(stream: int, n: int, start: int) -> NDArray[np.float64]:
        """``n`` independent numbers of variance 1 of a stream, from ``start`` on."""

    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """See :class:`BlockMap`."""
        elements = gradients.gradient.flatten(1)
        for start in range(0, elements.shape[1], self._at_once):
            piece = elements[:, start : start + self._at_once]
            entries = self.draw(self._streams[number], piece.shape[1] * self.dim, start * self.dim)
            matrix = entries.reshape(-1, self.dim) / np.sqrt(self.dim)
            block += piece @ torch.from_numpy(matrix).to(block)


@PROJECTIONS.register("gaussian")
class Gaussian(Dense):
    """Entries from a normal distribution."""

    draw = staticmethod(gaussians)


@PROJECTIONS.register("rademacher")
class Rademacher(Dense):
    """Random signs."""

    draw = staticmethod(rademachers)
