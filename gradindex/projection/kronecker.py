"""Random two-sided maps."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import numpy as np

from ..factors import Layer
from .base import PROJECTIONS, MapSpec, Sides
from .hashing import gaussians, key
from .sides import TwoSided


@PROJECTIONS.register("kronecker")
class Kronecker(TwoSided):
    """B^T G A with random Gaussian sides; unbiased.

    The low-memory variant of Pruthi et al. 2020 (arXiv:2002.08484), appendix on random
    projections. Its error falls only as dim^(-1/4), so it is here for comparison.
    """

    def __init__(self, spec: MapSpec) -> None:
        shapes = sizes(spec.layers, spec.dim)
        each = zip(spec.layers, spec.streams, shapes, strict=True)
        super().__init__([random_sides(layer, stream, shape) for layer, stream, shape in each], spec.like)

    @classmethod
    def block_dim(cls, layers: Sequence[Layer], dim: int) -> int:
        """See :class:`BlockMap`."""
        return sum(a * b for a, b in sizes(layers, dim))


def sizes(layers: Sequence[Layer], dim: int) -> list[tuple[int, int]]:
    """(a, b) of each layer: about square, each layer an equal share of ``dim``, no side larger than the layer's own."""
    share = max(1, dim // len(layers))
    pairs = []
    for layer in layers:
        a = min(layer.d_out, max(1, isqrt(share)))
        b = min(layer.d_in, max(1, share // a))
        pairs.append((min(layer.d_out, max(1, share // b)), b))
    return pairs


def random_sides(layer: Layer, stream: int, size: tuple[int, int]) -> Sides:
    """Gaussian sides with E[B B^T] = I and E[A A^T] = I; a side that keeps its size is the identity."""
    sides = []
    for name, n, k in (("output_gradients", layer.d_out, size[0]), ("activations", layer.d_in, size[1])):
        random = gaussians(key(stream, name), n * k).reshape(n, k) / np.sqrt(k)
        sides.append(np.eye(n, dtype=np.float32) if n == k else random.astype(np.float32))
    return sides[0], sides[1]
