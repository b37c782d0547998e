"""Some examples of a batch computed again, each alone: what the check before a build cannot see, stops it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .digests import digest
from .errors import LossError, TaskError, UserCodeError
from .gradients import HALF, mixed
from .projection import hash64, key
from .rows import RowBatch, RowMaker
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

    def check(self, ids: NDArray[np.int64], items: Sequence[Any], names: Sequence[str], batch: RowBatch) -> None:
        """Check the chosen ones among the examples of a batch.

        Raises:
            LossError: an example has another loss or gradient in its batch than alone.
            TaskError: an example is another one when it is read again.
        """
        places = [place for place, i in enumerate(ids.tolist()) if i in self._random]
        smallest = self._smallest(items) if self._uneven else None
        if smallest is not None:
            self._uneven -= 1
            places = sorted({*places, smallest})
        for place in places:
            with preserved_random_state():
                (again,) = self._task.examples([ids[place]])
            if digest(again) != digest(items[place]):
                raise TaskError(
                    f"{names[place]} differs between two reads, so its id means nothing: the data set is augmented at "
                    "random, or the loss or collate changes what it hands out. Give Task the same data without that."
                )
        check_alone(self._maker, items, names, batch, places, "train")

    def _smallest(self, items: Sequence[Any]) -> int | None:
        """The place of the smallest example, if they are of several shapes, or collate makes several of some."""
        found = smallest_of_uneven(items)
        if found is None and self._collated:  # positions and texts: their size is that of what they stand for
            self._collated -= 1
            engine = self._maker.engine
            with suppress(UserCodeError), preserved_random_state():
                found = smallest_of_uneven([engine.batch([item]) for item in items])
        return found


def smallest_of_uneven(items: Sequence[Any]) -> int | None:
    """The place of the smallest item, if they are of several shapes."""
    found = [shapes(item) for item in items]
    if all(shape == found[0] for shape in found):
        return None
    return min(range(len(found)), key=lambda place: extent(found[place]))


def check_alone(
    maker: RowMaker, items: Sequence[Any], names: Sequence[str], batch: RowBatch, places: Sequence[int], role: str
) -> None:
    """Compare the losses and norms of some examples of a batch with those of each alone.

    Args:
        maker: made the batch.
        items: of the batch.
        names: of the items.
        batch: what was made of them.
        places: which of them are checked.
        role: ``"train"`` or ``"query"``.

    Raises:
        LossError: they differ by more than rounding.
    """
    if len(items) == 1 or maker.engine.alone:
        return
    tolerance = _HALF_TOLERANCE if maker.engine.precision in HALF else _TOLERANCE
    for place in places:
        alone = maker.rows([items[place]], [names[place]], role)
        for what, one, all_ in (
            ("loss", alone.losses, batch.losses),
            ("norm of the gradient", np.sqrt(alone.self_influence), np.sqrt(batch.self_influence)),
        ):
            apart, largest = np.abs(one[0] - all_[place]), np.maximum(np.abs(one[0]), np.abs(all_[place]))
            wrong = apart > np.maximum(tolerance * largest, _OF_LARGEST * np.abs(all_).max(0))
            for checkpoint in np.flatnonzero(wrong).tolist():
                rough = apart[checkpoint] > _ROUGH * np.abs(all_[:, checkpoint]).max()
                if _is_more_than_rounding(maker, checkpoint, list(items), place, role, bool(rough)):
                    alone_, together = one[0, checkpoint], all_[place, checkpoint]
                    figures = f"{alone_:.6g} alone, {together:.6g} in a batch of {len(items)}, checkpoint {checkpoint}"
                    raise LossError(mixed(names[place], figures, role, what))


def _is_more_than_rounding(
    maker: RowMaker, checkpoint: int, items: list[Any], place: int, role: str, rough: bool
) -> bool:
    """Whether it stays when both are computed in float64; ``rough`` where the model does not run so."""
    engine = maker.engine
    try:
        with engine.doubled(checkpoint):
            alone = engine.norms(checkpoint, [items[place]], role)
            together = engine.norms(checkpoint, items, role)
    except RuntimeError:
        return rough
    return any(
        float((one[0] - all_[place]).abs()) > _TOLERANCE * max(float(one[0].abs()), float(all_[place].abs()))
        for one, all_ in zip(alone, together, strict=True)
    )
