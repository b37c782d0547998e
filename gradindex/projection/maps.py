"""What users choose a map by: its kind, its size and its seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..choices import ProjectionKind
from ..errors import ArgumentError
from ..factors import Layer
from .base import PROJECTIONS, Bases, BlockMap, Fit, MapSpec
from .hashing import key

DEFAULT_DIM = 1024


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
        PROJECTIONS.check(self.kind)
        if self.dim < 1:
            raise ArgumentError(f"dim is {self.dim}, but must be at least 1.")
        if (self.dim != DEFAULT_DIM) + (self.row_dim is not None) + (self.row_bytes is not None) > 1:
            raise ArgumentError("Give one of dim, row_dim and row_bytes: they say the same in other units.")

    def resolved(self, n_checkpoints: int, number_bytes: float = 4, block_bytes: int = 0) -> Projection:
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
        least = math.ceil(n_checkpoints * (number_bytes + block_bytes))
        if size < least:
            raise ArgumentError(
                f"{unit} is {size}, but must be at least {least}, for one number at each of {n_checkpoints} "
                "checkpoints."
            )
        return Projection(self.kind, int((size // n_checkpoints - block_bytes) / number_bytes), self.seed)

    @property
    def fitted(self) -> bool:
        """Whether the map must be fitted to data before it can be used."""
        return self._map.fit is not None

    @property
    def passes(self) -> int:
        """How often fitting reads its sample; 0 for a map that is not fitted."""
        return 0 if self._map.fit is None else self._map.fit.PASSES

    @property
    def unfitted(self) -> Projection:
        """One of the same size that needs no data, for timing what is not fitted yet; others are their own."""
        stand_in = self._map.stand_in
        return self if stand_in is None else replace(self, kind=stand_in)  # type: ignore[arg-type]  # a registered one

    def block_dim(self, layers: Sequence[Layer]) -> int:
        """How many numbers one checkpoint takes in a row."""
        return self._map.block_dim(layers, self.dim)

    @property
    def whole(self) -> bool:
        """Whether rows are whole gradients, so that their inner products are exact."""
        return self._map.whole

    @property
    def orthonormal(self) -> bool:
        """Whether rows are coordinates of orthonormal directions, so that wide rows hold what these leave out."""
        return self._map.orthonormal

    def fit(self, checkpoint: int, layers: Sequence[Layer], like: Tensor) -> Fit:
        """Begin to fit the map of one checkpoint; arguments as for :meth:`for_checkpoint`.

        Raises:
            ArgumentError: the map is not a fitted one.
        """
        if self._map.fit is None:
            raise ArgumentError(f"projection is {self.kind!r}, which is not fitted to data.")
        return self._map.fit(layers, self.dim, key(self.seed, checkpoint), like)

    def for_checkpoint(
        self, checkpoint: int, layers: Sequence[Layer], like: Tensor, bases: Bases | None = None
    ) -> BlockMap:
        """The map of one checkpoint; ``like`` gives dtype and device, ``bases`` what was fitted.

        Raises:
            ArgumentError: a fitted map has no bases.
        """
        sides = None
        if self.fitted:
            if bases is None:
                raise ArgumentError("A fitted projection has no bases yet. Fit it, or open the store that keeps them.")
            sides = [bases[checkpoint, number] for number in range(len(layers))]
        streams = [key(self.seed, checkpoint, layer.name) for layer in layers]
        return self._map(MapSpec(self.dim, layers, streams, like, sides))

    @property
    def _map(self) -> type[BlockMap]:
        return PROJECTIONS[self.kind]
