"""Which map makes rows: its kind, its size, and the blocks of a row that it fills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..choices import PROJECTION_KINDS, ProjectionKind
from ..errors import ArgumentError, check_choice
from ..factors import Gradients, Layer
from .dense import Dense
from .hashing import key
from .sides import TwoSided, random_sides, rooms, sizes
from .sketch import TensorSketch

DEFAULT_DIM = 1024

# By (checkpoint, layer): what was fitted to the output gradients (d_out, a) and to the activations (d_in, b).
Bases = Mapping[tuple[int, int], tuple[NDArray[np.float32], NDArray[np.float32]]]


@dataclass(frozen=True)
class Projection:
    """Which map makes rows, one for each (checkpoint, layer).

    - ``"tensorsketch"``: count sketch of delta x^T, all layers in one sketch; unbiased.
    - ``"fitted"``: B^T G A with bases fitted to a sample of training examples, as many of each side as keep most of
      the gradients; biased towards 0.
    - ``"kronecker"``: the same with random Gaussian sides; unbiased, but a large error.
    - ``"gaussian"``, ``"rademacher"``: a dense random matrix, made piece by piece; unbiased and slow.
    - ``"none"``: whole gradients; exact.

    Args:
        kind: see above.
        dim: numbers per checkpoint, at most; ``"none"`` ignores it.
        seed: chooses the random map, or the sample of ``"fitted"``.
        row_dim: instead of ``dim``, numbers in a whole row, at most: an equal share for each checkpoint.
        row_bytes: instead of ``dim``, bytes of a whole row in the store, at most.
    """

    kind: ProjectionKind = "tensorsketch"
    dim: int = DEFAULT_DIM
    seed: int = 0
    row_dim: int | None = None
    row_bytes: int | None = None

    def __post_init__(self) -> None:
        check_choice("projection", self.kind, PROJECTION_KINDS)
        if self.dim < 1:
            raise ArgumentError(f"dim is {self.dim}, but must be at least 1.")
        if (self.dim != DEFAULT_DIM) + (self.row_dim is not None) + (self.row_bytes is not None) > 1:
            raise ArgumentError("Give one of dim, row_dim and row_bytes: they say the same in other units.")

    def resolved(self, n_checkpoints: int, number_bytes: int = 4, block_bytes: int = 0) -> Projection:
        """The same with its size as ``dim``.

        Args:
            n_checkpoints: blocks in a row.
            number_bytes: what a number takes in the store.
            block_bytes: what a block takes besides, such as for a scale.

        Raises:
            ArgumentError: the row is too small to have a number for each checkpoint.
        """
        if self.row_dim is None and self.row_bytes is None:
            return self
        if self.row_dim is not None:
            unit, size, number_bytes, block_bytes = "row_dim", self.row_dim, 1, 0
        else:
            unit, size = "row_bytes", self.row_bytes or 0
        least = n_checkpoints * (number_bytes + block_bytes)
        if size < least:
            raise ArgumentError(
                f"{unit} is {size}, but must be at least {least}, for one number at each of {n_checkpoints} "
                "checkpoints."
            )
        return Projection(self.kind, (size // n_checkpoints - block_bytes) // number_bytes, self.seed)

    @property
    def fitted(self) -> bool:
        """Whether the map must be fitted to data before it can be used."""
        return self.kind == "fitted"

    def block_dim(self, layers: Sequence[Layer]) -> int:
        """How many numbers one checkpoint takes in a row."""
        if self.kind == "none":
            return sum(layer.size for layer in layers)
        if self.kind == "fitted":
            return sum(rooms(layers, self.dim))
        if self.kind == "kronecker":
            return sum(a * b for a, b in sizes(layers, self.dim))
        return self.dim

    def for_checkpoint(
        self, checkpoint: int, layers: Sequence[Layer], like: Tensor, bases: Bases | None = None
    ) -> BlockMap:
        """The map of one checkpoint; ``like`` gives dtype and device, ``bases`` what was fitted."""
        if self.kind == "none":
            return Whole(layers)
        streams = [(layer, key(self.seed, checkpoint, layer.name)) for layer in layers]
        if self.kind == "tensorsketch":
            return TensorSketch(self.dim, streams, like)
        if self.kind == "kronecker":
            return TwoSided(
                [random_sides(*pair, size) for pair, size in zip(streams, sizes(layers, self.dim), strict=True)], like
            )
        if self.kind == "fitted":
            if bases is None:
                raise ArgumentError("A fitted projection has no bases yet. Fit it, or open the store that keeps them.")
            sides = [bases[checkpoint, number] for number in range(len(layers))]
            return TwoSided(sides, like, rooms(layers, self.dim))
        return Dense(self.kind, self.dim, streams)


class BlockMap(Protocol):
    """Adds a layer's share to the blocks of a batch."""

    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """Add layer ``number``'s projected gradients to ``block`` (batch, block_dim), in place."""


class Whole:
    """No projection: the layers' gradients side by side."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        ends = torch.tensor([layer.size for layer in layers]).cumsum(0).tolist()
        self._spans = list(zip([0, *ends[:-1]], ends, strict=True))

    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """See :class:`BlockMap`."""
        start, end = self._spans[number]
        block[:, start:end] += gradients.gradient.flatten(1)
