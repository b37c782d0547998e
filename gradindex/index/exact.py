"""Exact inner-product search over a store's own rows, block by block (owns faiss)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, DimensionMismatchError, check_k
from . import gpu

# Of ids below it; all of its bits are none.
_SHORT_IDS, _NONE = 0xFFFFFFFF, np.uint64(0xFFFFFFFFFFFFFFFF)

Blocks = Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]


class SearchIndex:
    """Every row is compared with every query, by FAISS; nothing is copied or kept, so it is never out of date.

    Args:
        dim: numbers in a row.
        n_train: the number of rows.
        blocks: hands out all ids (m,) int64 and rows (m, dim) float32, piece by piece.
        gpus: numbers of CUDA devices, see :func:`devices`; the first compares.
    """

    def __init__(self, dim: int, n_train: int, blocks: Callable[[], Blocks], gpus: Sequence[int] = ()) -> None:
        self._dim, self.n_train, self._blocks, self._gpus = dim, n_train, blocks, gpus

    def search(self, query: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The rows with the largest inner products.

        Opponents are searched with the negated query, never as the smallest of what was found.

        Args:
            query: (n_query, dim) float32.
            k: how many, from 1 to the number of rows.

        Returns:
            Scores and ids, (n_query, k), by score descending, then id ascending.

        Raises:
            DimensionMismatchError: the query has another dimension than the rows.
            ArgumentError: ``k`` is out of range, or the query is not finite.
        """
        query = checked_query(query, self._dim)
        check_k(k, self.n_train)
        scores = np.empty((len(query), 0), dtype=np.float32)
        ids = np.empty((len(query), 0), dtype=np.int64)
        for block_ids, rows in self._blocks():
            if not len(block_ids):
                continue
            rows = np.ascontiguousarray(rows, dtype=np.float32)
            block_scores, places = self._best(query, rows, min(k, len(rows)))
            scores, ids = ranked(
                np.concatenate([scores, block_scores], 1), np.concatenate([ids, block_ids[places]], 1), k
            )
        return scores, ids

    def _best(
        self, query: NDArray[np.float32], rows: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """At least the k best rows; FAISS keeps any of equal ones, so all that are equal to the k-th are asked for."""
        width = k
        while True:
            width = min(width + 1, len(rows))
            scores, places = gpu.knn(query, rows, width, self._gpus)
            if width == len(rows) or (scores[:, -1] < scores[:, k - 1]).all():
                return scores, places
            width *= 2


def checked_query(query: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """Queries as FAISS takes them: (n_query, dim) contiguous float32.

    Raises:
        DimensionMismatchError: they have another shape.
        ArgumentError: they are not finite.
    """
    if query.ndim != 2 or query.shape[1] != dim:
        raise DimensionMismatchError(
            f"The query has shape {query.shape}, but the index needs (n_query, {dim}). "
            "Use the task that the store was built from."
        )
    if not np.isfinite(query).all():
        raise ArgumentError("The query has NaN or infinite numbers.")
    return np.ascontiguousarray(query, dtype=np.float32)


def ranked(
    scores: NDArray[np.float32], ids: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best of each row, by score descending, then id ascending; an id of -1 is none, and comes last.

    Args:
        scores: (n_query, m); of none, whatever they are.
        ids: (n_query, m) int64; copies of one have the same score, and count once.
        k: how many, at most m.

    Returns:
        Scores and ids (n_query, k); where there are fewer, minus infinity and -1 at the end.
    """
    scores = np.where(ids < 0, np.float32(-np.inf), scores)  # FAISS pads with a score like any other
    if ids.size and int(ids.max()) >= _SHORT_IDS:
        return _ranked_long(scores, ids, k)
    # As one integer each, which are sorted fifty times as fast: the scores' bits in their descending order, and the id.
    bits = (scores + np.float32(0)).view(np.uint32)  # of minus zero, zero
    descending = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    keys = descending.astype(np.uint64) << np.uint64(32) | (ids & 0xFFFFFFFF).astype(np.uint64)
    keys.sort(axis=1)
    again = keys[:, 1:] == keys[:, :-1]
    if again.any():
        keys[:, 1:][again] = _NONE
        keys.sort(axis=1)
    keys = keys[:, :k]
    descending = (keys >> np.uint64(32)).astype(np.uint32)
    best = np.where(descending >> 31, descending, ~descending & np.uint32(0x7FFFFFFF)).view(np.float32)
    names = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    none = names == 0xFFFFFFFF
    return np.where(none, np.float32(-np.inf), best), np.where(none, -1, names)


def _ranked_long(
    scores: NDArray[np.float32], ids: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The same where ids do not fit 32 bits."""
    order = np.lexsort((ids, -scores), axis=1)
    scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    again = np.zeros(ids.shape, dtype=bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    scores, ids = np.where(again, -np.inf, scores).astype(np.float32), np.where(again, -1, ids)
    order = np.argsort(ids < 0, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
