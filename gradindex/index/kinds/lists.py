"""What kinds with lists share: the rows that they learn from, and what a list is probed by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..exact import Blocks

# The share of a list's rows whose size stays below what the list is probed by.
_QUANTILE = 0.9


def every_nth(blocks: Callable[[], Blocks], least: int) -> NDArray[np.float32]:
    """Every 2^i-th row: ``least`` to 2 x ``least`` of them, or all where there are fewer."""
    parts: list[tuple[int, NDArray[np.float32]]] = []  # with the first one's number among those that are taken
    step, seen, count = 1, 0, 0
    for _, rows in blocks():
        part = rows[-seen % step :: step].copy()
        parts.append((-(-seen // step), part))
        seen, count = seen + len(rows), count + len(part)
        while count >= 2 * least:
            parts = [(-(-first // 2), part[first % 2 :: 2].copy()) for first, part in parts]
            step, count = 2 * step, sum(len(part) for _, part in parts)
    return np.concatenate([part for _, part in parts])


def most(lists: NDArray[np.integer[Any]], sizes: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """The size that most of each list's rows stay below: (count,), 0 for an empty list."""
    order = np.lexsort((sizes, lists))
    ends = np.searchsorted(lists[order], np.arange(count), side="right")
    starts = np.searchsorted(lists[order], np.arange(count), side="left")
    places = starts + np.floor(_QUANTILE * np.maximum(ends - starts - 1, 0)).astype(np.int64)
    return np.where(ends > starts, sizes[order][np.minimum(places, len(sizes) - 1)], 0).astype(np.float32)
