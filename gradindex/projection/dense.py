"""Dense random maps: the textbook's Johnson-Lindenstrauss projection, made piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..factors import Gradients, Layer
from .hashing import gaussians, rademachers

# Of the matrix, at a time.
_ENTRIES = 1 << 20


class Dense:
    """R g with independent entries of variance 1 / dim, all layers summed. E[R^T R] = I.

    The matrix is hashed again for each batch, a million entries at a time, and never held whole,
    which makes it far slower than a sketch of the same accuracy: a yardstick, not a default.

    Args:
        kind: ``"gaussian"`` or ``"rademacher"``.
        dim: length of the projection.
        streams: each layer with its 64-bit key.
    """

    def __init__(self, kind: Literal["gaussian", "rademacher"], dim: int, streams: Sequence[tuple[Layer, int]]) -> None:
        self.dim = dim
        self._draw = gaussians if kind == "gaussian" else rademachers
        self._streams = streams
        self._at_once = max(1, _ENTRIES // dim)

    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """See ``BlockMap``."""
        _, stream = self._streams[number]
        elements = gradients.gradient.flatten(1)
        for start in range(0, elements.shape[1], self._at_once):
            some = elements[:, start : start + self._at_once]
            entries = self._draw(stream, some.shape[1] * self.dim, start * self.dim).reshape(-1, self.dim)
            block += some @ torch.from_numpy(entries / np.sqrt(self.dim)).to(block)
