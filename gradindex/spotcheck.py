"""Some examples of a batch computed again, each alone: what the check before a build cannot see, stops it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .digests import digest
from .errors import LossError, TaskError, UserCodeError
from .examples import Examples
from .gradients import HALF, mixed
from .projection import hash64, key
from .rows import Blocks, RowMaker
from .task import Task
from .tree import extent, preserved_random_state, shapes

# Examples of a shard, drawn at random; and batches of examples of several shapes whose smallest one is taken.
_RANDOM, _UNEVEN = 3, 3
# Batches of a shard whose examples are collated one by one to see their shapes, where they have none themselves.
_COLLATED = 3
# How far losses and norms may be apart: relative to either, or to the largest of the batch; in half precision.
_TOLERANCE, _OF_LARGEST, _HALF_TOLERANCE = 2e-3, 1e-4, 5e-2
# The same, of the largest of the batch, where rounding cannot be told by float64.
_ROUGH = 5e-2


class SpotCheck:
    """Checks a few examples of a shard while it is made.

    Three at random, and the smallest of up to three batches that hold examples of several shapes, which padding
    would change most. Each is read again and goes through the model alone.

    Args:
        maker: makes the rows.
        task: where the examples are read again.
        ids: (m,) of the shard.
    """

    def __init__(self, maker: RowMaker, task: Task, ids: NDArray[np.int64]) -> None:
        self._maker, self._task = maker, task
        chosen = hash64(key(0, "spot check", int(ids[0])), len(ids)).argsort()[:_RANDOM]
        self._random = set(ids[chosen].tolist())
        self._uneven, self._collated = _UNEVEN, _COLLATED
        self._places: dict[int, list[int]] = {}

    def check(self, number: int, examples: Examples, blocks: Blocks, checkpoints: Sequence[int]) -> None:
        """Check the chosen ones among the examples of a batch, which may come again at other checkpoints.

        Args:
            number: of the batch in the shard.
            examples: of the batch.
            blocks: what was made of them at ``checkpoints``.
            checkpoints: their numbers; where one is held at a time, the one that is held.

        Raises:
            LossError: an example has another loss or gradient in its batch than alone.
            TaskError: an example is another one when it is read again.
        """
        if number not in self._places:
            self._places[number] = self._chosen(examples)
        check_alone(self._maker, examples, blocks, self._places[number], checkpoints)

    def _chosen(self, examples: Examples) -> list[int]:
        """Places in a batch, of examples that are the same when they are read again."""
        places = [place for place, i in enumerate(examples.ids.tolist()) if i in self._random]
        smallest = self._smallest(examples) if self._uneven else None
        if smallest is not None:
            self._uneven -= 1
            places = sorted({*places, smallest})
        for place in places:
            with preserved_random_state():
                (again,) = self._task.examples([examples.ids[place]])
            if digest(again) != digest(examples.items[place]):
                raise TaskError(
                    f"{examples.names[place]} differs between two reads, so its id means nothing: the data set is "
                    "augmented at random, or the loss or collate changes what it hands out. Give Task the same data "
                    "without that."
                )
        return places

    def _smallest(self, examples: Examples) -> int | None:
        """The place of the smallest example, if they are of several shapes, or collate makes several of some."""
        smallest = _smallest_of(examples.shapes)
        if smallest is None and self._collated:  # positions and texts: their size is that of what they stand for
            self._collated -= 1
            with suppress(UserCodeError), preserved_random_state():
                smallest = smallest_of_uneven(self._maker.engine.singles(examples))
        return smallest


def smallest_of_uneven(items: Sequence[Any]) -> int | None:
    """The place of the smallest item, if they are of several shapes."""
    return _smallest_of([shapes(item) for item in items])


def _smallest_of(item_shapes: Sequence[tuple[Any, ...]]) -> int | None:
    if all(shape == item_shapes[0] for shape in item_shapes):
        return None
    return min(range(len(item_shapes)), key=lambda place: extent(item_shapes[place]))


def check_alone(
    maker: RowMaker, examples: Examples, blocks: Blocks, places: Sequence[int], checkpoints: Sequence[int]
) -> None:
    """Compare the losses and norms of some examples of a batch with those of each alone.

    Args:
        maker: made the blocks.
        examples: of the batch.
        blocks: what was made of them at ``checkpoints``.
        places: which of them are checked.
        checkpoints: numbers.

    Raises:
        LossError: they differ by more than rounding.
    """
    if len(examples) == 1 or maker.engine.alone:
        return
    tolerance = _HALF_TOLERANCE if maker.engine.precision in HALF else _TOLERANCE
    for place in places:
        alone = maker.blocks(examples[place : place + 1], checkpoints)
        for what, one, all_ in (
            ("loss", alone.losses.numpy(), blocks.losses.numpy()),
            ("norm of the gradient", alone.squares.sqrt().numpy(), blocks.squares.sqrt().numpy()),
        ):
            apart, largest = np.abs(one[0] - all_[place]), np.maximum(np.abs(one[0]), np.abs(all_[place]))
            wrong = apart > np.maximum(tolerance * largest, _OF_LARGEST * np.abs(all_).max(0))
            for column in np.flatnonzero(wrong).tolist():
                checkpoint = checkpoints[column]
                rough = apart[column] > _ROUGH * np.abs(all_[:, column]).max()
                if _is_more_than_rounding(maker, checkpoint, examples, place, bool(rough)):
                    figures = (
                        f"{one[0, column]:.6g} alone, {all_[place, column]:.6g} in a batch of {len(examples)}, "
                        f"checkpoint {checkpoint}"
                    )
                    raise LossError(mixed(examples.names[place], figures, examples.role, what))


def _is_more_than_rounding(maker: RowMaker, checkpoint: int, examples: Examples, place: int, rough: bool) -> bool:
    """Whether it stays when both are computed in float64; ``rough`` where the model does not run so."""
    engine = maker.engine
    try:
        with engine.doubled(checkpoint):
            alone = maker.losses_and_norms(checkpoint, examples[place : place + 1])
            together = maker.losses_and_norms(checkpoint, examples)
    except RuntimeError:
        return rough
    return any(
        float((one[0] - all_[place]).abs()) > _TOLERANCE * max(float(one[0].abs()), float(all_[place].abs()))
        for one, all_ in zip(alone, together, strict=True)
    )
