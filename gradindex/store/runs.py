"""Sets of ids as runs ``[[start, stop], ...]``, ascending and apart: short where ids are consecutive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set, ValuesView
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError

# (r, 2) int64, or the same as lists, as JSON has it.
Runs = NDArray[np.int64] | Sequence[Sequence[int]]


def as_ids(ids: Any) -> NDArray[np.int64]:
    """Ids of any shape as int64.

    Raises:
        ArgumentError: they are not whole numbers; a mask, for one, would mean the ids 0 and 1.
    """
    if hasattr(ids, "detach"):
        ids = ids.detach().cpu()  # a tensor, without torch, which this module does not need
    elif isinstance(ids, (Set, ValuesView, Iterator)):
        ids = list(ids)
    try:
        array = np.asarray(ids)
        if array.dtype.kind == "O" and all(isinstance(i, (int, np.integer)) for i in array.ravel()):
            array = array.astype(np.int64)
    except (ValueError, TypeError, OverflowError):
        raise ArgumentError("ids are not an array, but must be integers below 2^63, in a list or an array.") from None
    if array.size == 0:
        return np.zeros(array.shape, dtype=np.int64)
    if array.dtype.kind not in "iu" or (array.dtype == np.uint64 and int(array.max()) >= 1 << 63):
        raise ArgumentError(
            f"ids are of type {array.dtype}, but must be integers below 2^63. For a mask, use np.flatnonzero."
        )
    return array.astype(np.int64)


def as_runs(runs: Runs) -> NDArray[np.int64]:
    """Runs as an array (r, 2)."""
    return np.asarray(runs, dtype=np.int64).reshape(-1, 2)


def to_ids(runs: Runs) -> NDArray[np.int64]:
    """All ids, ascending."""
    listed = as_runs(runs)
    lengths = listed[:, 1] - listed[:, 0]
    before = np.cumsum(lengths) - lengths
    ids: NDArray[np.int64] = np.repeat(listed[:, 0] - before, lengths) + np.arange(lengths.sum(), dtype=np.int64)
    return ids


def to_runs(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Runs (r, 2) of ascending ids without repetition."""
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    edges = np.concatenate([[0], breaks, [len(ids)]]) if len(ids) else np.array([0])
    return np.stack([ids[edges[:-1]], ids[edges[1:] - 1] + 1], 1)


def count(runs: Runs) -> int:
    """The number of ids."""
    listed = as_runs(runs)
    return int((listed[:, 1] - listed[:, 0]).sum())


def contain(runs: Runs, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of ``ids``, in any shape, are in the runs."""
    listed = as_runs(runs)
    if not len(listed):
        return np.zeros(ids.shape, dtype=bool)
    place = np.searchsorted(listed[:, 0], ids, side="right") - 1
    return np.asarray((place >= 0) & (ids < listed[place, 1]))


def without(ids: Runs, removed: Runs) -> NDArray[np.int64]:
    """The runs (r, 2) that are left of ``ids`` when ``removed`` are taken away; neighbours are joined."""
    mine, gone = as_runs(ids), as_runs(removed)
    edges = np.unique(np.concatenate([mine.ravel(), gone.ravel()]))
    starts, stops = edges[:-1], edges[1:]  # within such a piece, an id is as good as the first
    kept = contain(mine, starts) & ~contain(gone, starts)
    starts, stops = starts[kept], stops[kept]
    if not len(starts):
        return np.empty((0, 2), dtype=np.int64)
    apart = starts[1:] != stops[:-1]
    return np.stack([starts[np.r_[True, apart]], stops[np.r_[apart, True]]], 1)


def same(one: Runs, other: Runs) -> bool:
    """Whether two sets are equal."""
    return np.array_equal(without(one, []), without(other, []))


def of_same_origin(one: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]]) -> NDArray[np.int64]:
    """Runs of the ids whose rows were computed in one place, by two lists of ``[digest, first id, last id]``."""
    places: dict[str, list[tuple[int, int]]] = {}
    for digest, first, last in one:
        places.setdefault(digest, []).append((first, last))
    same = [
        (max(first, begin), min(last, end) + 1)
        for digest, first, last in other
        for begin, end in places.get(digest, ())
    ]
    return as_runs(sorted((start, stop) for start, stop in same if start < stop))
