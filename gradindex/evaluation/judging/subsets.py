"""Which training examples models are retrained on: random shares, and all but some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArgumentError, as_whole

Subsets = NDArray[np.bool_]

# How often a subset that is there already is drawn anew.
_TRIES = 100


def random_subsets(n: int, count: int = 100, share: float = 0.5, seed: int = 0) -> Subsets:
    """Random subsets of one size, all different.

    The first ones are the same however many there are, so that more can be retrained later.

    Args:
        n: how many examples there are.
        count: how many subsets.
        share: of the examples that each holds, rounded; 0.5 for halves, 0.99 to leave out a hundredth.
        seed: of the draw.

    Returns:
        (count, n) bool.

    Raises:
        ArgumentError: there are not as many different subsets, or a number is out of range.
    """
    if as_whole("count", count) < 2:
        raise ArgumentError(f"There are {count} subsets, but a correlation over them needs at least 2. Ask for more.")
    if not 0 < share < 1:
        raise ArgumentError(f"share is {share}, but must be between 0 and 1, such as 0.5 for halves.")
    if as_whole("seed", seed) < 0:
        raise ArgumentError(f"seed is {seed}, but must be at least 0.")
    size = round(share * n)
    if not 0 < size < n:
        raise ArgumentError(
            f"A share of {share} of {n} training examples is {size} of them, but a subset needs at least 1 and must "
            "leave 1 out. Choose another share."
        )
    found = np.zeros((count, n), dtype=bool)
    known: set[bytes] = set()
    for number, subset in enumerate(found):
        for again in range(_TRIES):
            draws = np.random.default_rng([seed, number, again]).random(n)
            subset[:] = False
            subset[np.argsort(draws, kind="stable")[:size]] = True
            if (key := np.packbits(subset).tobytes()) not in known:
                known.add(key)
                break
        else:
            raise ArgumentError(
                f"{n} training examples have too few different subsets of {size} for {count} retrainings. Ask for "
                "fewer, or choose another share."
            )
    return found


def all_but(ids: NDArray[np.int64], groups: Sequence[Any]) -> Subsets:
    """All examples but those of a group, for each group: to leave some out.

    Args:
        ids: (n,) int64, the training examples.
        groups: of each, the ids that are left out.

    Returns:
        (len(groups), n) bool.

    Raises:
        ArgumentError: a group is empty or holds all, or has an id that is not among ``ids``.
    """
    found = np.stack([~_marked(ids, group, number) for number, group in enumerate(groups)])
    for number, subset in enumerate(found):
        if not subset.any() or subset.all():
            what = "no training example" if subset.all() else "all training examples"
            raise ArgumentError(f"Group {number} leaves out {what}. Leave out some, and not all.")
    return found


def of_lists(ids: NDArray[np.int64], lists: Sequence[Any]) -> Subsets:
    """Subsets given as the ids that each holds, as an array (len(lists), n) bool.

    Raises:
        ArgumentError: a list has an id that is not among ``ids``, or one twice.
    """
    return np.stack([_marked(ids, held, number) for number, held in enumerate(lists)])


def _marked(ids: NDArray[np.int64], chosen: Any, number: int) -> NDArray[np.bool_]:
    wanted = np.asarray(chosen)
    if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
        raise ArgumentError(
            f"Subset {number} has shape {wanted.shape} and type {wanted.dtype}, but must be a list of training ids."
        )
    places = np.searchsorted(ids, wanted)
    known = places < len(ids)
    known[known] = ids[places[known]] == wanted[known]
    if not known.all():
        raise ArgumentError(f"Subset {number} holds {wanted[~known][0]}, which is no id of a training example here.")
    marked = np.zeros(len(ids), dtype=bool)
    marked[places] = True
    if marked.sum() < len(wanted):
        values, counts = np.unique(wanted, return_counts=True)
        raise ArgumentError(f"Subset {number} holds {values[counts > 1][0]} twice. Give each id once.")
    return marked
