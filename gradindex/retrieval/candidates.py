"""Which rows may be a query's top-k: from the store's index where there is one, else from all rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..choices import AnswerKind, QueryGeometry
from ..errors import IndexFileError
from ..files import signature
from ..index import MANIFEST, CompactIndex, LeftOut, SearchIndex, devices, paired_products
from ..store import GradientStore, runs

INDEX_FOLDER = "index"

# What the manifest of a store's own index says besides what every index says.
_SAID = {"map", "ids", "effort", "recall"}
# What is gathered, and how many scores are made, at once.
_GATHERED_BYTES, _SCORES = 64 << 20, 4 << 20
# Where fewer than this share of the rows are wanted, they are gathered; else all rows stream by.
_FEW = 1 / 8


@dataclass(frozen=True)
class Effort:
    """How far a search with an index goes.

    Args:
        probes: lists that are looked into.
        proposals: rows that the index proposes, to be compared in full.
        exact: how many of these get exact scores, those that are best by the largest entries of their factors; ``None``
            where all of them do.
    """

    probes: int
    proposals: int
    exact: int | None = None


class Candidates:
    """Finds the rows with the largest inner products with a query's row.

    An index proposes rows by a few numbers each; their full rows settle the order, so that scores are the same with
    and without one, but for rounding. Rows that came after the index are compared in full, and removed ones left out,
    so that an index is never out of date; it is useless where rows that it holds are other ones now, because the map
    has changed, or because the store was built anew or put back to an older state and then went another way.

    Args:
        store: a complete one.
        index: an index to try; by default the store's own.
        use_index: whether there is to be an index at all.
        device: ``"cuda"`` searches on all CUDA devices, ``"cuda:1"`` on one; else the CPU does.
        geometry: of the queries; the store's own index is used where it was tuned with such.
        damping: by which they are whitened; ``None`` for any. Another one makes other queries.

    Attributes:
        index: the index in use, or ``None``.
        stale: whether the store has an index that is of no use any more.
        tuned: whether the store's index, if there is one, was tuned with such queries.
        folder: of the store's index, where it has one.
        geometry: of the queries.

    Raises:
        IndexFileError: the store's index is damaged.
        ArgumentError: there is no such device.
    """

    def __init__(
        self,
        store: GradientStore,
        index: CompactIndex | None = None,
        *,
        use_index: bool = True,
        device: str | None = None,
        geometry: QueryGeometry = "tracin",
        damping: float | None = None,
    ) -> None:
        self._store, self._gpus = store, devices(device)
        self.geometry = geometry
        self._folders = index_folders(store.folder, geometry)
        self._seen = [signature(folder / MANIFEST) for folder in self._folders]
        load = index is None and use_index
        found = self._loaded() if load else index
        own = index is None and found is not None
        if own and found is not None:
            _check_said(store, self.folder, found.about)
        self.stale = own and found is not None and _of_other_rows(store, found.about)
        self._tuning = None if found is None else tuning_of(found.about, geometry, damping)
        self.tuned = not own or self._tuning is not None
        self.index = found if self.tuned and not self.stale else None
        if self.index is not None:
            live = store.id_runs
            covered = self.index.about["ids"] if own else live
            self._new = runs.without(live, covered)
            self._gone = LeftOut(runs.to_ids(runs.without(covered, live)))

    def _loaded(self) -> CompactIndex | None:
        """The index of this geometry alone, or else the one that others share."""
        for folder in self._folders:
            found = CompactIndex.load(folder, self._gpus)
            if found is not None:
                self.folder = folder
                return found
        return None

    @property
    def store(self) -> GradientStore:
        """Whose rows are searched."""
        return self._store

    @property
    def n_train(self) -> int:
        """The number of rows that are searched."""
        return self._store.n_train

    @property
    def current(self) -> bool:
        """Whether the store and its index on disk are still those that were opened."""
        return self._store.current and [signature(folder / MANIFEST) for folder in self._folders] == self._seen

    @property
    def how(self) -> str:
        """How rows are searched, for people."""
        if self.stale:
            return "exact over all rows; the index is stale (built from other rows), `gradindex index` rebuilds it"
        if not self.tuned:
            return (
                "exact over all rows; the index was tuned with queries of another geometry or damping, "
                f"`gradindex index --geometry {self.geometry}` tunes it"
            )
        if self.index is None:
            return "exact over all rows"
        recall = self._said["recall"]
        new = f"; {runs.count(self._new):,} newer rows are scanned in full" if len(self._new) else ""
        gone = len(self._gone.ids)
        new += f"; {gone:,} removed rows are skipped, `gradindex index` drops them" if gone else ""
        return (
            f"index {self.index.shape}, recall@{recall['k']} at least "
            f"{min(recall['proponents_at_least'], recall['opponents_at_least']):.4f} ({recall['against']}){new}"
        )

    def effort(self, k: int, sign: AnswerKind = "proponents") -> Effort:
        """What the index was tuned to for a kind; more for a larger k than it was tuned for."""
        assert self.index is not None
        tuned = self._said.get("efforts", {}).get(sign, self._said["effort"])
        times = max(1, -(-k // self._said["recall"]["k"]))
        exact = tuned.get("exact")
        return Effort(tuned["probes"], tuned["proposals"] * times, None if exact is None else exact * times)

    def handed_on(self, k: int, effort: Effort) -> int:
        """How many rows get the scores that decide; through the model these are dear, and full rows choose the best."""
        every = self._store.has_factors or self.geometry != "tracin"
        return max(k, effort.proposals if every else min(effort.proposals, candidates_for(k)))

    @property
    def _said(self) -> Mapping[str, Any]:
        """What the index says of queries of this geometry; one that is no store's says nothing of any."""
        assert self.index is not None
        return self._tuning or self.index.about

    @property
    def newer(self) -> int:
        """How many rows came after the index, and are compared in full."""
        return 0 if self.index is None else runs.count(self._new)

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
        return self.compared(query, k, effort)[:2]

    def compared(
        self, query: NDArray[np.float32], k: int, effort: Effort | None = None, least: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], int]:
        """As :meth:`search`, and the most rows that were compared in full for one query.

        ``least`` as for :meth:`propose`.
        """
        n = self._store.n_train
        effort = None if self.index is None else effort or self.effort(k)
        if self.index is None or effort is None or effort.proposals >= n:
            return *self._all_rows(query, k), n
        scores = np.full((len(query), k), -np.inf, dtype=np.float32)
        ids = np.full((len(query), k), -1, dtype=np.int64)
        proposed = self.index.search(query, max(k, effort.proposals), probes=effort.probes, removed=self._gone)[1]
        newer, most = self._best_of_new(query, k)[1], 0
        for number, row in enumerate(query):
            some = np.sort(np.concatenate([proposed[number][proposed[number] >= 0], newer[number]]))
            if len(some) < (k if least is None else min(k, least)):  # few lists, and none of the others was looked into
                scores[number : number + 1], ids[number : number + 1] = self._all_rows(query[number : number + 1], k)
                most = n
                continue
            products = self.products(row, some)
            best = np.lexsort((some, -products))[:k]
            scores[number, : len(best)], ids[number, : len(best)] = products[best], some[best]
            most = max(most, len(some) + self.newer - newer.shape[1])
        return scores, ids, most

    def propose(
        self, query: NDArray[np.float32], k: int, effort: Effort, least: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k best rows of each query by the index's own estimates, and rows that it lacks by their inner products.

        Args:
            query: (n_query, dim) float32 rows, negated for opponents.
            k: how many, from 1 to the number of rows.
            effort: as for :meth:`search`; there must be an index.
            least: a query for which the index finds fewer rows is compared with all of them instead; by default k.

        Returns:
            Estimates and ids, (n_query, k), by estimate descending, then id ascending; ids of -1 at the end where fewer
            are found.
        """
        assert self.index is not None
        scores, ids = self.index.search(query, k, probes=effort.probes, removed=self._gone)
        if self.newer:
            more, new = self._best_of_new(query, k)
            scores, ids = np.concatenate([scores, more], 1), np.concatenate([ids, new], 1)
            order = np.lexsort((ids, -scores), axis=1)[:, :k]
            scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        few = np.flatnonzero((ids >= 0).sum(1) < (k if least is None else min(k, least)))
        if len(few):
            width = ((0, 0), (0, k - ids.shape[1]))
            scores, ids = np.pad(scores, width), np.pad(ids, width)
            scores[few], ids[few] = self._all_rows(query[few], k)
        return scores, ids

    def _all_rows(self, query: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        store = self._store
        return SearchIndex(store.dim, store.n_train, store.blocks, self._gpus).search(query, k)

    def products(self, row: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """(m,) inner products of a query's row with the rows of ascending ids, each computed alone."""
        found = [np.empty(0, dtype=np.float32)]
        for some in pieces(ids, _GATHERED_BYTES // (4 * self._store.dim)):
            rows, places = np.ascontiguousarray(self._store.rows(some), dtype=np.float32), np.arange(len(some))
            found += paired_products(np.zeros_like(places), places, [(np.ascontiguousarray(row[None]), rows)])
        return np.concatenate(found)

    def _best_of_new(self, query: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best, (n_query, at most k), of the rows that are not in the index, which are all compared."""
        count = self.newer
        if not count:
            return np.empty((len(query), 0), dtype=np.float32), np.empty((len(query), 0), dtype=np.int64)
        new = SearchIndex(self._store.dim, count, partial(self._store.blocks, self._new), self._gpus)
        return new.search(query, min(k, count))


def index_folders(folder: Path, geometry: QueryGeometry) -> list[Path]:
    """Where a store has an index for queries of a geometry: one of its own first, then that of all."""
    own = [] if geometry == "tracin" else [folder / f"{INDEX_FOLDER}-{geometry}"]
    return [*own, folder / INDEX_FOLDER]


def tuning_of(
    about: Mapping[str, Any], geometry: QueryGeometry, damping: float | None = None
) -> Mapping[str, Any] | None:
    """What an index was tuned to with queries of a geometry: efforts, recall, milliseconds; ``None`` where it was not.

    Args:
        about: its manifest.
        geometry: of the queries.
        damping: by which they are whitened; ``None`` for any.
    """
    tunings: Mapping[str, Any] = about.get("geometries", {"tracin": about})
    found: Mapping[str, Any] | None = tunings.get(geometry)
    return None if found is None or (damping is not None and found.get("damping") != damping) else found


def _check_said(store: GradientStore, folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse an index that does not say what a store must know of it."""
    missing = sorted(_SAID - about.keys())
    if missing or runs.count(about["ids"]) != about["rows"]:
        wrong = f"lacks {', '.join(missing)}" if missing else "lists different ids than it has rows"
        raise IndexFileError(
            f"{folder / MANIFEST} {wrong}. Rebuild the index: gradindex index {store.folder}, "
            "or remove it to scan all rows: the same with --drop."
        )


def _of_other_rows(store: GradientStore, about: Mapping[str, Any]) -> bool:
    """Whether an index holds a row of an id whose row in the store is another one."""
    if about["map"] != store.manifest.fingerprint or "covers" not in about:
        return True
    known = runs.of_same_origin(store.origins, about["covers"])
    both = runs.without(about["ids"], runs.without(about["ids"], store.id_runs))
    return bool(len(runs.without(both, known)))


def scan(
    store: GradientStore, query: NDArray[np.float32], only: NDArray[np.int64] | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Compare rows in full: ids (m,) and inner products (n_query, m), piece by piece.

    Args:
        store: a complete one.
        query: (n_query, dim) float32 rows.
        only: ascending ids that are wanted, by default all. A few are gathered; else all rows stream by.
    """
    at_once = max(1, _SCORES // len(query))
    if only is not None and len(only) < _FEW * store.n_train:
        for ids in pieces(only, min(at_once, _GATHERED_BYTES // (4 * store.dim))):
            yield ids, query @ store.rows(ids).T
        return
    for ids, rows in store.blocks():
        if only is not None and len(only) < store.n_train:
            wanted = contained(only, ids)
            ids, rows = ids[wanted], rows[wanted]
        for start in range(0, len(ids), at_once):
            yield ids[start : start + at_once], query @ rows[start : start + at_once].T


def candidates_for(k: int) -> int:
    """How many rows get exact scores for a top-k unasked, where they were found by their full rows."""
    return 10 * k


def contained(ids: NDArray[np.int64], some: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of ``some`` are among ascending ``ids``, without a look at all of these."""
    places = np.searchsorted(ids, some)
    found = np.zeros(len(some), dtype=bool)
    inside = places < len(ids)
    found[inside] = ids[places[inside]] == some[inside]
    return found


def pieces(ids: NDArray[np.int64], at_once: int) -> Iterator[NDArray[np.int64]]:
    """Some ids after others."""
    step = max(1, at_once)
    for start in range(0, len(ids), step):
        yield ids[start : start + step]
