"""Batches that a loader has collated, as examples for the engine: (inputs..., labels), as Captum takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..errors import ArgumentError, training_names
from ..examples import Examples, Role
from ..tree import map_tensors, tensors

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class AssertedError(ArgumentError, AssertionError):
    """Raised where Captum asserts, so that code that expects its ``AssertionError`` finds one."""


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """An example that stands in a collated batch.

    Args:
        batch: the batch, ``(*inputs, labels)``.
        place: of the example in it.
        count: examples in the batch.
    """

    batch: Sequence[Any]
    place: int
    count: int


def rows_of(batch: Any) -> list[Row]:
    """The examples of a batch, in order.

    Raises:
        ArgumentError: it is no tuple or list, or holds no tensor whose first axis counts examples.
    """
    if not isinstance(batch, (tuple, list)):
        raise ArgumentError(
            f"A batch is a {type(batch).__name__}, but must be a tuple (*inputs, labels). For a model that takes a "
            "mapping, give (mapping, labels)."
        )
    count = count_of(batch)
    if count == 0:
        raise ArgumentError(
            "A batch has no example: none of its tensors has a first axis of 1 or more. Give (*inputs, labels) with "
            "tensors of shape (batch, ...)."
        )
    return [Row(batch, place, count) for place in range(count)]


def count_of(batch: Any) -> int:
    """How many examples a batch has: the first axis of its last tensor that has one, which is that of the labels."""
    return next((len(tensor) for tensor in reversed(tensors(batch)) if tensor.ndim), 0)


def joined(rows: Sequence[Row]) -> tuple[Any, ...]:
    """The batch of some examples: the one they came in if they are all of it, else cuts of it, joined."""
    cuts, start = [], 0
    while start < len(rows):
        stop = start + 1
        while (
            stop < len(rows)
            and rows[stop].batch is rows[start].batch
            and rows[stop].place == rows[start].place + stop - start
        ):
            stop += 1
        cuts.append(_cut(rows[start], stop - start))
        start = stop
    if len(cuts) == 1:
        return tuple(cuts[0])
    columns = iter([torch.cat(parts) if parts[0].ndim else parts[0] for parts in zip(*map(tensors, cuts), strict=True)])
    return tuple(map_tensors(cuts[0], lambda _: next(columns)))


def _cut(first: Row, length: int) -> Sequence[Any]:
    if length == first.count:
        return first.batch
    span = slice(first.place, first.place + length)

    def cut(tensor: Tensor) -> Tensor:
        return tensor[span] if tensor.ndim and len(tensor) == first.count else tensor

    found: Sequence[Any] = map_tensors(first.batch, cut)
    return found


def merged(batches: Iterable[Any], least: int) -> Iterator[list[Row]]:
    """The examples of batches, in order, of small neighbours together: at least so many, if they can be joined."""
    group: list[Row] = []
    for batch in batches:
        rows = rows_of(batch)
        if group and _form(rows[0]) != _form(group[-1]):
            yield group
            group = []
        group += rows
        if len(group) >= least:
            yield group
            group = []
    if group:
        yield group


def examples_of(rows: list[Row], first: int, role: Role = "train", name: str = "") -> Examples:
    """Rows as examples whose ids begin with ``first``.

    Args:
        rows: in order.
        first: the first id.
        role: which loss they go through.
        name: what errors call one, before its id; by default they are training examples.
    """
    ids = np.arange(first, first + len(rows))
    return Examples(ids, rows, [f"{name} {i}" for i in ids] if name else training_names(ids), role)


def alike(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Neighbours that can be joined: their batches differ in nothing but the number of examples."""
    group: list[Row] = []
    for row in rows:
        if group and row.batch is not group[-1].batch and _form(row) != _form(group[-1]):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _form(row: Row) -> tuple[Any, ...]:
    return tuple((tensor.dtype, tensor.shape[1:]) for tensor in tensors(row.batch))


def loader_of(data: Any, batch_size: int | None) -> Any:
    """What yields a data set's batches in order: a loader as it is, a data set in batches.

    Args:
        data: a :class:`Dataset`, or what yields batches anew whenever it is iterated.
        batch_size: of a data set's batches; of no meaning for what yields batches.

    Raises:
        ArgumentError: a loader shuffles, or a data set comes without a batch size.
    """
    if is_loader(data):
        return in_order(data)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool):
        raise AssertedError(
            f"batch_size is {batch_size!r}, but must be an integer where train_dataset is a data set. Give batch_size=."
        )
    # With a generator of its own, for a loader draws a number each time that it is iterated.
    return DataLoader(data, batch_size, shuffle=False, generator=torch.Generator())


def is_loader(data: Any) -> bool:
    """Whether something yields batches, and is not a batch or a data set."""
    if isinstance(data, DataLoader):
        return True
    apart = (tuple, list, Mapping, Tensor, Dataset)
    return isinstance(data, Iterable) and not isinstance(data, apart) and not hasattr(data, "__getitem__")


def in_order(loader: Any) -> Any:
    """The loader, if it yields examples in the same order each time.

    Raises:
        ArgumentError: it shuffles.
    """
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    if isinstance(loader, DataLoader) and any(isinstance(sampler, _SHUFFLING) for sampler in samplers):
        raise ArgumentError(
            "The loader shuffles, so that an index would mean another example each time. Make it with shuffle=False."
        )
    return loader
