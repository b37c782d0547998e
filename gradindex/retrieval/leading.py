"""Estimates of exact scores from the largest entries of packed factors: which candidates are worth an exact one.

The output gradients of a classifier have a few large entries, which packed factors keep with their places; they tell
almost the whole of delta . delta', and the length of x is known from the stored norms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..store import GradientStore
from .vectors import QueryFactors

# Candidates that are estimated at once: what they need then stays in the processor's cache.
_AT_ONCE = 1024


def leads(store: GradientStore) -> bool:
    """Whether a store has what the estimates take: packed factors of one layer, exact norms, and scores by products."""
    manifest, packing = store.manifest, store.manifest.packing.get(0)
    if packing is None or packing[1].kept == 0 or manifest.map.unit_norm:  # cosines have another order
        return False
    return len(manifest.map.layers) == 1 and manifest.self_influence == "exact"


def leading(
    store: GradientStore, factors: QueryFactors, lists: Sequence[NDArray[np.int64]]
) -> list[NDArray[np.float32]]:
    """Estimates of the exact scores of each query's own candidates, but for a factor that each query has of its own.

        sum_c (delta_c . delta'_c) ||x_c|| ||x'_c||, delta by its largest entries alone

    So x and x' count as parallel, which features after a ReLU nearly are; how good an estimate is, is for whoever uses
    it to measure.

    Args:
        store: one that :func:`leads`.
        factors: of the queries, each a question of its own.
        lists: for each query, training ids that have a row.

    Returns:
        For each query its candidates' estimates.
    """
    counts = [len(ids) for ids in lists]
    every, found = np.repeat(np.arange(len(lists)), counts), np.zeros(sum(counts), dtype=np.float32)
    asked = []
    for checkpoint in range(store.n_checkpoints):
        x, delta = (np.asarray(side, dtype=np.float32) for side in factors[checkpoint, 0])
        asked.append(delta * np.linalg.norm(x, axis=1, keepdims=True))
    width = asked[0].shape[1]
    if not len(found):
        return [found] * len(lists)
    at, rows = store.leading_entries(np.concatenate(lists))
    for start in range(0, len(at), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        mine = at[some]
        lengths, firsts = np.sqrt(rows.norms[mine]), (every[some] * width).astype(np.int32)[:, None]
        for checkpoint, (places, values) in enumerate(rows.entries):
            kept = values[mine]
            theirs = np.take(asked[checkpoint].ravel(), places[mine] + firsts)
            products = np.einsum("mk,mk->m", kept, theirs) * lengths[:, checkpoint]
            sizes = np.sqrt(np.einsum("mk,mk->m", kept, kept))
            found[some] += np.divide(products, sizes, out=np.zeros_like(products), where=sizes > 0)
    return np.split(found, np.cumsum(counts)[:-1])


def narrowed(
    store: GradientStore, factors: QueryFactors, sign: int, ids: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """Of proposals (n_query, m), -1 for none, the best ``count`` by their estimates, best first: (n_query, count).

    Args:
        store: one that :func:`leads`.
        factors: of the queries.
        sign: 1 for proponents, -1 for opponents.
        ids: training ids.
        count: how many are kept of each query.
    """
    best = np.full((len(ids), min(count, ids.shape[1])), -1, dtype=np.int64)
    lists = [np.sort(row[row >= 0]) for row in ids]
    for row, of_query, estimates in zip(best, lists, leading(store, factors, lists), strict=True):
        order = np.argsort(-sign * estimates, kind="stable")[: best.shape[1]]
        row[: len(order)] = of_query[order]
    return best
