"""Examples of very different lengths: those of about one length go through the model together, for padding is time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .examples import Examples

# How many batches are sorted together, and how much of examples and of what is made of them may be held for that.
_BATCHES, HELD_BYTES = 16, 128 << 20
# What a number of an example may take.
_NUMBER_BYTES = 8


def length_of(shape: tuple[Any, ...]) -> int:
    """How long an item is, from its :func:`~.tree.shapes`: its longest first axis, such as that of ``input_ids``."""
    if shape and not isinstance(shape[0], tuple):  # axes
        return int(shape[0])
    if not any(shape):  # a short list of numbers
        return len(shape)
    return max(map(length_of, shape))


@dataclass(frozen=True, eq=False)
class Window:
    """Some batches of examples, and the order in which they go through the model.

    Args:
        examples: as they were read.
        size: of a batch.
        order: their places, the longest first; ``None`` where they go as they were read.
    """

    examples: Examples
    size: int
    order: NDArray[np.int64] | None = None

    def batches(self) -> Iterator[Examples]:
        """The examples in batches, each of about one length."""
        examples = self.examples if self.order is None else self.examples.at(self.order.tolist())
        for start in range(0, len(examples), self.size):
            yield examples[start : start + self.size]

    @property
    def places(self) -> NDArray[np.int64] | None:
        """Where each example is among those of all batches; ``None`` where they are in their order."""
        return None if self.order is None else np.argsort(self.order)


def windows(batches: Iterable[Examples], size: int, most: int) -> Iterator[Window]:
    """Sort batches of examples by length, a few together where their lengths differ.

    Which batches stand together depends on the examples alone. Batches whose examples are all of one length go as they
    are, and nothing is held. Padding of the others is that of neighbours in length, not that of the longest of many.

    Args:
        batches: as they are read; each but the last of ``size`` examples.
        size: of the batches that are made of them, too.
        most: how many examples may be held.
    """
    held: list[Examples] = []
    count = numbers = 0
    for examples in batches:
        lengths = [length_of(shape) for shape in examples.shapes]
        if size == 1 or (not held and min(lengths) == max(lengths)):
            yield Window(examples, size)
            continue
        held.append(examples)
        count, numbers = count + len(examples), numbers + sum(map(_numbers_of, examples.shapes))
        if count + size > most or _NUMBER_BYTES * numbers > HELD_BYTES:
            yield _by_length(held, size)
            held, count, numbers = [], 0, 0
    if held:
        yield _by_length(held, size)


def window_rows(size: int, each: int) -> int:
    """How many examples a window may hold of whose rows each takes so many bytes: some batches, and at least one."""
    return max(size, min(_BATCHES * size, HELD_BYTES // max(1, each) // size * size))


def _numbers_of(shape: tuple[Any, ...]) -> int:
    """How many numbers or characters an item holds, from its shapes."""
    if shape and not isinstance(shape[0], tuple):
        return math.prod(shape)
    return sum(map(_numbers_of, shape))


def _by_length(held: Sequence[Examples], size: int) -> Window:
    examples = Examples.joined(held)
    lengths = np.array([length_of(shape) for shape in examples.shapes])
    return Window(examples, size, np.argsort(-lengths, kind="stable"))
