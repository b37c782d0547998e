"""Which rows may be a query's top-k: from the store's index where there is one, else from all rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .files import signature
from .index import MANIFEST, CompactIndex, SearchIndex
from .store import GradientStore, runs

INDEX_FOLDER = "index"


@dataclass(frozen=True)
class Effort:
    """How far a search with an index goes.

    Args:
        probes: lists that are looked into.
        proposals: rows that the index proposes, to be compared in full.
    """

    probes: int
    proposals: int


class Candidates:
    """Finds the rows with the largest inner products with a query's row.

    An index proposes rows by a few numbers each; their full rows settle the order, so that scores are the same with
    and without one. Rows that came after the index are compared in full, and removed ones left out, so that an index
    is never out of date; only rows that are other ones, because the map has changed, make it useless.

    Args:
        store: a complete one.
        index: an index to try; by default the store's own.
        use_index: whether there is to be an index at all.

    Attributes:
        index: the index in use, or ``None``.
        stale: whether the store has an index that is of no use any more.

    Raises:
        IndexFileError: the store's index is damaged.
    """

    def __init__(self, store: GradientStore, index: CompactIndex | None = None, *, use_index: bool = True) -> None:
        self._store = store
        self._seen = signature(store.folder / INDEX_FOLDER / MANIFEST)
        found = CompactIndex.load(store.folder / INDEX_FOLDER) if index is None and use_index else index
        own = index is None and found is not None
        self.stale = own and found is not None and found.about["map"] != store.manifest["fingerprint"]
        self.index = None if self.stale else found
        if self.index is not None:
            live = store.id_runs
            covered = self.index.about["ids"] if own else live
            self._new = runs.without(live, covered)
            self._gone = runs.to_ids(runs.without(covered, live))

    @property
    def n_train(self) -> int:
        """The number of rows that are searched."""
        return self._store.n_train

    @property
    def current(self) -> bool:
        """Whether the store and its index on disk are still those that were opened."""
        return self._store.current and signature(self._store.folder / INDEX_FOLDER / MANIFEST) == self._seen

    @property
    def how(self) -> str:
        """How rows are searched, for people."""
        if self.stale:
            return "exact over all rows; the index is of other rows, `gradindex index` makes it anew"
        if self.index is None:
            return "exact over all rows"
        shape, recall = self.index.about["shape"], self.index.about["recall"]
        lists = f", {shape['lists']} lists" if shape["kind"] == "ivf" else ""
        new = f"; {runs.count(self._new):,} newer rows are compared in full" if len(self._new) else ""
        return (
            f"index {shape['kind']} of {shape['dim']} numbers{lists}, recall@{recall['k']} at least "
            f"{min(recall['proponents_at_least'], recall['opponents_at_least']):.4f} ({recall['against']}){new}"
        )

    def effort(self, k: int) -> Effort:
        """What the index was tuned to; more for a larger k than it was tuned for."""
        assert self.index is not None
        tuned = self.index.about["effort"]
        return Effort(tuned["probes"], tuned["proposals"] * max(1, -(-k // self.index.about["recall"]["k"])))

    def search(
        self, query: NDArray[np.float32], k: int, effort: Effort | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k best rows of each query, among those that the index proposes.

        Args:
            query: (n_query, dim) float32 rows, negated for opponents.
            k: how many, from 1 to the number of rows.
            effort: with an index, by default what it was tuned to.

        Returns:
            Inner products with the full rows and ids, (n_query, k), by score descending, then id ascending.

        Raises:
            DimensionMismatchError: the query has another dimension than the rows.
            ArgumentError: ``k`` is out of range, or the query is not finite.
            StoreError: a block of the store is damaged.
        """
        store, all_rows = self._store, SearchIndex(self._store.dim, self._store.n_train, self._store.blocks)
        effort = None if self.index is None else effort or self.effort(k)
        if self.index is None or effort is None or effort.proposals >= store.n_train:
            return all_rows.search(query, k)
        scores = np.empty((len(query), k), dtype=np.float32)
        ids = np.empty((len(query), k), dtype=np.int64)
        proposed = self.index.search(query, max(k, effort.proposals), probes=effort.probes, removed=self._gone)[1]
        newer = self._best_of_new(query, k)
        for number, row in enumerate(query):
            some = np.sort(np.concatenate([proposed[number][proposed[number] >= 0], newer[number]]))
            if len(some) < k:  # few lists, and none of the others was looked into
                scores[number : number + 1], ids[number : number + 1] = all_rows.search(query[number : number + 1], k)
                continue
            products = store.rows(some) @ row
            best = np.lexsort((some, -products))[:k]
            scores[number], ids[number] = products[best], some[best]
        return scores, ids

    def _best_of_new(self, query: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """(n_query, at most k) ids among the rows that are not in the index, which are all compared."""
        count = runs.count(self._new)
        if not count:
            return np.empty((len(query), 0), dtype=np.int64)
        new = SearchIndex(self._store.dim, count, partial(self._store.blocks, self._new))
        return new.search(query, min(k, count))[1]
