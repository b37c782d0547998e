"""Exact inner-product search over a store's own rows, block by block (owns faiss)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, DimensionMismatchError, check_k
from . import gpu

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
    """The k best of each row, by score descending, then id ascending."""
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
