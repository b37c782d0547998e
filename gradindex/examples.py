"""Examples that travel together, and the rows that are made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import GradIndexError, OutOfMemoryError, is_out_of_memory, training_names, user_code

# Which loss an example goes through.
Role = Literal["train", "query"]

# Activations (b, d_in) and output gradients (b, d_out) of gradients that are one outer product each.
Sides = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Examples:
    """Some examples, from where they are read until rows are made of them.

    ``examples[a:b]`` and ``examples.at(places)`` are some of them; iterating gives each alone, as ``Examples`` of one.

    Args:
        ids: (n,) int64, of training examples; of others their places among all that are meant.
        items: what the data set hands out for each, not yet collated.
        names: what errors call each, such as ``"Training example 7"``.
        role: which loss they go through.
    """

    ids: NDArray[np.int64]
    items: list[Any]
    names: list[str]
    role: Role = "train"

    @classmethod
    def training(cls, ids: Sequence[int] | NDArray[np.int64], items: list[Any]) -> Examples:
        """Training examples by their ids."""
        return cls(np.asarray(ids, dtype=np.int64), items, training_names(ids))

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """Those of several, one after another; all of one role."""
        if len(parts) == 1:
            return parts[0]
        items = [item for part in parts for item in part.items]
        names = [name for part in parts for name in part.names]
        return cls(np.concatenate([part.ids for part in parts]), items, names, parts[0].role)

    @cached_property
    def shapes(self) -> list[tuple[Any, ...]]:
        """See :func:`~.tree.shapes`, of each item."""
        from .tree import shapes  # which needs torch: a store is looked at without it

        return [shapes(item) for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, which: slice) -> Examples:
        return Examples(self.ids[which], self.items[which], self.names[which], self.role)

    def at(self, places: Sequence[int]) -> Examples:
        """Those at some places, in that order."""
        return Examples(
            self.ids[list(places)], [self.items[i] for i in places], [self.names[i] for i in places], self.role
        )

    def __iter__(self) -> Iterator[Examples]:
        return (self[place : place + 1] for place in range(len(self)))


class Coded(NamedTuple):
    """Wide rows of b examples as they are stored, of an even number ``wide`` of numbers a checkpoint.

    Args:
        codes: (b, C wide / 2) uint8, two codes of 4 bits in each.
        scales: (b, C) float32, what codes less 8 are multiplied by.
        norms: (b, C) float32, of the checkpoints' blocks before they were coded.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    norms: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RowBatch:
    """What is stored of b examples at C checkpoints.

    Args:
        rows: (b, dim) float32, a block for each checkpoint, side by side.
        self_influence: (b, C) float64, eta_c ||grad l(w_c; z)||^2.
        losses: (b, C) float64.
        factors: by (checkpoint, layer), where asked for: activations (b, d_in) and output gradients
            (b, d_out) of layers whose gradient is one outer product, times sqrt(eta_c).
        wide: (b, C wide) float32, or as they are stored, where the store has wide rows.
    """

    rows: NDArray[np.float32]
    self_influence: NDArray[np.float64]
    losses: NDArray[np.float64]
    factors: Mapping[tuple[int, int], Sides]
    wide: NDArray[np.float32] | Coded | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def joined(cls, parts: Sequence[RowBatch]) -> RowBatch:
        """Batches one after another."""
        if len(parts) == 1:
            return parts[0]
        sides = {key: [part.factors[key] for part in parts] for key in parts[0].factors}
        return cls(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.self_influence for part in parts]),
            np.concatenate([part.losses for part in parts]),
            {key: (np.concatenate([x for x, _ in pairs]), np.concatenate([d for _, d in pairs]))
             for key, pairs in sides.items()},
            None if parts[0].wide is None else np.concatenate([part.wide for part in parts]),
        )  # fmt: skip


def read_example(data: Any, position: int, role: str) -> Any:
    """An example of a data set.

    Args:
        data: the data set.
        position: of the example.
        role: what to call it, such as ``"training"``.

    Raises:
        UserCodeError: the data set raised.
        OutOfMemoryError: memory ran out.
    """
    try:
        return data[position]
    except GradIndexError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise OutOfMemoryError(
                f"Reading {role} example {position} ran out of memory. Use fewer workers, or a data set that reads "
                "its examples one by one."
            ) from error
        hint = f"The data set has a length of {len(data)}, so it must have that example." * isinstance(
            error, IndexError
        )
        with user_code(f"Reading {role} example {position}", hint):
            raise
