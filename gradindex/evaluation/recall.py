"""Recall of an approximate answer against exact scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, DimensionMismatchError, check_k


def recall_at_k(truth: NDArray[Any], ids: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """Share of each query's true top-k that an answer holds.

    A found example counts when its true score is at least the k-th largest, so that of
    equal scores any may stand in for another.

    Args:
        truth: (n_query, n_train) exact scores, larger is better (negated for opponents).
        ids: (n_query, m) what was found, no id twice in a row.
        k: how many count as the top, from 1 to n_train.

    Returns:
        (n_query,) shares between 0 and 1; at most m / k.

    Raises:
        ArgumentError: ``k`` is out of range, or a row of ``ids`` holds an id twice.
        DimensionMismatchError: the two have another number of queries.
    """
    if len(truth) != len(ids):
        raise DimensionMismatchError(f"truth has {len(truth)} queries, but ids has {len(ids)}. Give both the same.")
    check_k(k, truth.shape[1])
    ordered = np.sort(ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ArgumentError("A query's ids hold an id twice, which would count twice. Remove duplicates.")
    kth = np.partition(truth, -k, axis=1)[:, -k]
    found = (np.take_along_axis(truth, ids, 1) >= kth[:, None]).sum(1)
    return np.asarray(np.minimum(found, k) / k, dtype=np.float64)
