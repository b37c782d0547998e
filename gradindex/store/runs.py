"""Sets of ids as runs ``[[start, stop], ...]``, ascending and apart: short where ids are consecutive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Runs = Sequence[Sequence[int]]


def to_ids(runs: Runs) -> NDArray[np.int64]:
    """All ids, ascending."""
    parts = [np.arange(start, stop, dtype=np.int64) for start, stop in runs]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def to_runs(ids: NDArray[np.int64]) -> list[list[int]]:
    """Runs of ascending ids without repetition."""
    if not len(ids):
        return []
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    starts, stops = ids[np.r_[0, breaks]], ids[np.r_[breaks - 1, len(ids) - 1]] + 1
    found: list[list[int]] = np.stack([starts, stops], 1).tolist()
    return found


def count(runs: Runs) -> int:
    """The number of ids."""
    return sum(stop - start for start, stop in runs)


def contain(runs: Runs, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of ``ids``, in any shape, are in the runs."""
    if not runs:
        return np.zeros(ids.shape, dtype=bool)
    starts, stops = np.asarray(runs, dtype=np.int64).T
    place = np.searchsorted(starts, ids, side="right") - 1
    return np.asarray((place >= 0) & (ids < stops[place]))


def without(ids: Runs, removed: Runs) -> list[list[int]]:
    """The runs that are left of ``ids`` when ``removed`` are taken away."""
    if not removed:
        return [list(run) for run in ids]
    listed = to_ids(ids)
    return to_runs(listed[~contain(removed, listed)])
