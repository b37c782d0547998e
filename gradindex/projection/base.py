"""What every kind of projection offers, and the registry of kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..choices import PROJECTION_KINDS
from ..factors import Gradients, Layer
from ..registry import Registry

# Of a layer, what its gradient is multiplied by on the left (d_out, a) and on the right (d_in, b).
Sides = tuple[NDArray[np.float32], NDArray[np.float32]]

# By (checkpoint, layer): the sides that were fitted to the output gradients and to the activations.
Bases = Mapping[tuple[int, int], Sides]

# A layer's number, and what a batch adds to the sums of its left and its right side.
Share = tuple[int, list[Tensor]]


@dataclass(frozen=True)
class MapSpec:
    """What the map of one checkpoint is made from.

    Args:
        dim: numbers of the checkpoint in a row, at most.
        layers: of the checkpoint.
        streams: of each layer, the 64-bit key of its random numbers.
        like: gives dtype and device.
        sides: of each layer, what was fitted; ``None`` for a kind that is not fitted.
    """

    dim: int
    layers: Sequence[Layer]
    streams: Sequence[int]
    like: Tensor
    sides: Sequence[Sides] | None = None


class Fit(Protocol):
    """Fits the sides of one checkpoint's layers in ``PASSES`` passes over a sample; starts from layers, dim and key."""

    PASSES: ClassVar[int]

    def __init__(self, layers: Sequence[Layer], dim: int, stream: int, like: Tensor) -> None: ...

    def share(self, number: int, gradients: Gradients) -> Share:
        """What a batch's gradients of layer ``number`` add to this pass; nothing is added yet."""

    def add(self, shares: Iterable[Share]) -> None:
        """Add what :meth:`share` returned."""

    def end_pass(self) -> None:
        """Start the next pass from what this one found."""

    def sides(self) -> list[Sides]:
        """The sides of each layer, as the last pass left them."""


class BlockMap(ABC):
    """A kind of projection; an object of it is the map of one checkpoint.

        @PROJECTIONS.register("sums")
        class Sums(BlockMap):
            @classmethod
            def block_dim(cls, layers, dim):
                return len(layers)

            def add(self, block, number, gradients):
                block[:, number] += gradients.gradient.sum((1, 2))

    Attributes:
        fit: how its sides are fitted to a sample of training examples; ``None`` for a map that needs no data.
        stand_in: of a fitted kind, the name of one of the same size that needs no data: it is timed before a fit.
        whole: whether it keeps whole gradients, so that wide rows would add nothing.
        orthonormal: whether a block's numbers are the coordinates of orthonormal directions (:meth:`directions`), so
            that wide rows hold what these leave out.
    """

    fit: ClassVar[type[Fit] | None] = None
    stand_in: ClassVar[str | None] = None
    whole: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False

    def __init__(self, spec: MapSpec) -> None:
        self.spec = spec

    @classmethod
    def block_dim(cls, layers: Sequence[Layer], dim: int) -> int:
        """How many numbers one checkpoint takes in a row, where ``dim`` are asked for."""
        return dim

    @abstractmethod
    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """Add layer ``number``'s projected gradients to ``block`` (batch, block_dim), in place."""

    def directions(self) -> list[tuple[slice, Tensor, Tensor]]:
        """Of an orthonormal map: of each layer its numbers in the block, row by row B^T G A, with B and A."""
        return []


PROJECTIONS: Registry[type[BlockMap]] = Registry("projection", PROJECTION_KINDS)
