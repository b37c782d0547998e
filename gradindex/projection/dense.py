"""Dense random maps: the textbook's Johnson-Lindenstrauss projection, made piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..factors import Gradients, Layer
from .hashing import gaussians, rademachers


class Dense:
    """R g with independent entries of variance 1 / dim, all layers summed. E[R^T R] = I.

    The matrix is hashed again for each output feature and batch and never held whole, which
    makes it far slower than a sketch of the same accuracy: a yardstick, not a default.

    Args:
        kind: ``"gaussian"`` or ``"rademacher"``.
        dim: length of the projection.
        streams: each layer with its 64-bit key.
    """

    def __init__(self, kind: Literal["gaussian", "rademacher"], dim: int, streams: Sequence[tuple[Layer, int]]) -> None:
        self.dim = dim
        self._draw = gaussians if kind == "gaussian" else rademachers
        self._streams = streams

    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """See ``BlockMap``."""
        layer, stream = self._streams[number]
        piece = layer.columns * self.dim
        for row in range(layer.rows):
            entries = self._draw(stream, piece, row * piece).reshape(layer.columns, self.dim) / np.sqrt(self.dim)
            block += gradients.gradient[:, row] @ torch.from_numpy(entries).to(block)
