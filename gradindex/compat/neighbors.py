"""Rows in memory, and those of them with the largest inner products."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError, check_k
from ..index import SearchIndex, require


class NearestNeighbors(Protocol):
    """What Captum's ``NearestNeighbors`` does; any object with these two methods can take its place."""

    def setup(self, data: Tensor) -> None:
        """Keep (n, dim) rows."""

    def get_nearest_neighbors(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Ids (n_query, k) int64 and inner products (n_query, k) of the k rows with the largest ones."""


class ExactNeighbors:
    """Compares every row with every query, by FAISS in float32; the products returned are in the rows' precision."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None

    def setup(self, data: Tensor) -> None:
        """Keep (n, ...) rows; float32 rows on the CPU are not copied.

        Raises:
            DependencyError: there is no FAISS.
        """
        require()
        self._rows = data.detach().flatten(1)
        rows = self._rows.cpu().float().numpy()
        ids = torch.arange(len(rows)).numpy()
        self._index = SearchIndex(rows.shape[1], len(rows), lambda: [(ids, rows)])

    def get_nearest_neighbors(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The rows with the largest inner products.

        Args:
            query: (n_query, ...), of as many numbers as a row.
            k: how many, at most; there are no more than rows.

        Returns:
            Ids int64 and inner products, each (n_query, min(k, n)), by product descending, then id ascending.

        Raises:
            ArgumentError: ``k`` is below 1, or there are no rows yet.
        """
        if self._rows is None:
            raise ArgumentError("There are no rows yet. Call setup(data) first.")
        k = min(k, len(self._rows))
        check_k(k, len(self._rows))
        query = query.detach().flatten(1)
        _, found = self._index.search(query.cpu().float().numpy(), k)
        ids = torch.from_numpy(found).sort(1).values.to(self._rows.device)
        scores = torch.bmm(self._rows[ids], query.to(self._rows)[:, :, None])[:, :, 0]
        scores, order = scores.sort(stable=True, dim=1, descending=True)
        return ids.gather(1, order), scores
