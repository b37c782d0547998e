"""No projection."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from ..factors import Gradients, Layer
from .base import PROJECTIONS, BlockMap, MapSpec


@PROJECTIONS.register("none")
class Whole(BlockMap):
    """The layers' gradients side by side, whatever ``dim`` and seed are."""

    whole = True

    def __init__(self, spec: MapSpec) -> None:
        ends = list(accumulate(layer.size for layer in spec.layers))
        self._spans = list(zip([0, *ends[:-1]], ends, strict=True))

    @classmethod
    def block_dim(cls, layers: Sequence[Layer], dim: int) -> int:
        """See :class:`BlockMap`."""
        return sum(layer.size for layer in layers)

    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """See :class:`BlockMap`."""
        start, end = self._spans[number]
        block[:, start:end] += gradients.gradient.flatten(1)
