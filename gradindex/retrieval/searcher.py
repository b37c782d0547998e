"""Where rows are searched and exact scores come from: the seam behind which a store, or many machines, can stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..choices import AnswerKind, Rerank
from ..gradients import HALF, Engine, Geometry
from ..rows import projection_of
from ..store import GradientStore
from .asking import Queries
from .candidates import Candidates, Effort, candidates_for, pieces, scan
from .filters import Allowed
from .hits import Stage
from .leading import leading
from .question import DEFAULT_K
from .ranking import Best, Ranked, ranked, united
from .scoring import Scores, by_factors, by_wide_rows, measured, of_candidates, through_model
from .vectors import QueryVectors

_FAISS_K = 1024
# Ids whose exact scores stream together where all are scored.
_STREAMED = 1 << 16
# What is searched for a kind: each with the query or with its negation, never as the lowest of what was found.
SIGNS: Mapping[AnswerKind, Sequence[AnswerKind]] = {
    "proponents": ("proponents",),
    "opponents": ("opponents",),
    "absolute": ("proponents", "opponents"),
}
Efforts: TypeAlias = Mapping[AnswerKind, Effort]
# Which of some scores count, (q, m); ``None`` for all.
Mask = NDArray[np.bool_] | None


@dataclass(frozen=True)
class Proposed:
    """What a searcher proposes.

    Args:
        by_kind: for each kind, for each query ids and scores, the best first.
        stages: what was compared.
        last: what the scores are: the index's estimates or inner products with full rows.
        wanted: how many candidates were asked for.
    """

    by_kind: dict[AnswerKind, list[Ranked]]
    stages: tuple[Stage, ...]
    last: Literal["index", "rows"]
    wanted: int | None = None


class Searcher(Protocol):
    """Answers for the rows that it has and that may answer; ids of two searchers are apart.

    Attributes:
        n_train: how many rows it has, whether they may answer or not.
        exact_from: where exact scores come from, ``"stored factors"`` or ``"model"``.
        exhaustive: whether exact scores of all rows cost little enough to be asked for (:meth:`score_all`).
        wide: whether it has wide rows, which :meth:`estimate` exact scores.
        calibrated: whether the errors of these estimates are all that they are off by: gradients of half precision and
            rows of four bits are off by an unknown amount more.
    """

    n_train: int
    exact_from: str
    exhaustive: bool
    wide: bool
    calibrated: bool

    def propose(
        self,
        vectors: QueryVectors,
        kinds: Sequence[AnswerKind],
        k: int | None,
        *,
        last: Rerank,
        at_least: float | None = None,
        candidates: int | None = None,
    ) -> Proposed:
        """The best rows of each query.

        Args:
            vectors: the queries.
            kinds: what is the best; where they go to exact scores, proponents and opponents alone.
            k: how many at most; ``None`` for all from ``at_least`` on.
            last: ``"none"``: by the index's own estimates, where there is one that can be used; ``"rows"``: by full
                rows; ``"exact"`` and ``"wide"``: as candidates for such scores.
            at_least: strengths below are left out.
            candidates: how many of these; by default what suits.
        """

    def products(self, vectors: QueryVectors, query: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """(m,) inner products of a query's row with the rows of ascending ids, each computed alone."""

    def estimate(self, vectors: QueryVectors, lists: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
        """Estimates of each query's own ascending ids from wide rows, and their standard errors: (2, m) each."""

    def score(self, vectors: QueryVectors, lists: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
        """Exact scores of each query's own ascending ids, the same bit by bit whatever else is asked."""

    def score_all(self, vectors: QueryVectors) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.float64], Mask]]:
        """Exact scores of all that may answer, piece by piece: queries, ids (m,), scores (q, m), and which count."""


class LocalSearcher:
    """Searches a store on this machine; see :class:`Searcher`.

    Args:
        store: a complete one.
        candidates: its search.
        computing: locks the model for as long as scores go through it.
        queries: whose gradients exact scores through the model compare.
        allowed: who may answer, if not all.
        geometry: of the store, which says what scores are.
    """

    def __init__(
        self,
        store: GradientStore,
        candidates: Candidates,
        computing: Callable[[], AbstractContextManager[Engine]],
        queries: Queries,
        allowed: Allowed | None,
        geometry: Geometry,
    ) -> None:
        self._store, self._candidates, self._computing = store, candidates, computing
        self._queries, self._allowed, self._geometry = queries, allowed, geometry
        self.n_train, self.exhaustive = store.n_train, store.has_factors
        self.exact_from = "stored factors" if store.has_factors else "model"
        self.wide = store.manifest.wide is not None
        self.calibrated = store.manifest.map.precision not in HALF and store.manifest.row_type != "int4"

    def propose(
        self,
        vectors: QueryVectors,
        kinds: Sequence[AnswerKind],
        k: int | None,
        *,
        last: Rerank,
        at_least: float | None = None,
        candidates: int | None = None,
    ) -> Proposed:
        """See :class:`Searcher`."""
        if last in ("exact", "wide"):
            return self._for_exact(vectors, kinds, k, candidates)
        if last == "none" and k is not None and at_least is None:
            efforts = self._efforts(kinds, k)
            if efforts is not None:
                return self._estimated(vectors, kinds, k, efforts)
        return self._by_rows(vectors, kinds, k, at_least)

    def _efforts(self, kinds: Sequence[AnswerKind], k: int) -> Efforts | None:
        """How far the index goes for proponents and for opponents.

        ``None`` where all rows, or all that are allowed, are compared.
        """
        if self._candidates.index is None or self._allowed is not None:
            return None
        efforts = {sign: self._candidates.effort(k, sign) for sign in signs(kinds)}
        return None if any(effort.proposals >= self.n_train for effort in efforts.values()) else efforts

    def _estimated(self, vectors: QueryVectors, kinds: Sequence[AnswerKind], k: int, efforts: Efforts) -> Proposed:
        """By the index's own estimates."""
        by_sign = {sign: self._proposed(vectors, sign, k, k, effort) for sign, effort in efforts.items()}
        newer = self._candidates.newer
        stages = (Stage("index", k), *([Stage("rows", newer)] if newer else []))
        return Proposed({kind: _best_of(kind, by_sign, k) for kind in kinds}, stages, "index", k)

    def _proposed(self, vectors: QueryVectors, sign: AnswerKind, k: int, least: int, effort: Effort) -> list[Ranked]:
        return _listed(sign, *self._candidates.propose(_signed(sign, vectors), k, effort, least))

    def _by_rows(
        self, vectors: QueryVectors, kinds: Sequence[AnswerKind], k: int | None, at_least: float | None = None
    ) -> Proposed:
        """The best by full rows: of those that the index proposes, or of all that may answer."""
        if k is not None and at_least is None and self._allowed is None:
            efforts = self._efforts(kinds, k)
            # FAISS compares all rows for one kind at a time, and merges its blocks' answers in a time that grows with
            # their length; beyond that one pass of our own serves every kind and length.
            if efforts is not None or (len(kinds) == 1 and kinds[0] != "absolute" and k <= _FAISS_K):
                return self._compared(vectors, kinds, k, efforts)
        best = {kind: Best(kind, len(vectors), k, at_least) for kind in kinds}
        looked_at = np.zeros(len(vectors), dtype=np.int64)
        only = None if self._allowed is None else self._allowed.ids
        for ids, scores in scan(self._store, vectors.rows, only):
            mask = None if self._allowed is None else self._allowed.mask(ids)
            looked_at += len(ids) if mask is None else mask.sum(1)
            for of_kind in best.values():
                of_kind.add(ids, scores, mask)
        stages = (Stage("rows", int(looked_at.max())),)
        return Proposed({kind: of_kind.found() for kind, of_kind in best.items()}, stages, "rows", k)

    def _compared(
        self,
        vectors: QueryVectors,
        kinds: Sequence[AnswerKind],
        k: int,
        efforts: Efforts | None,
        least: int | None = None,
    ) -> Proposed:
        """The best by full rows of what the index proposes, or of all rows."""
        by_sign, most = {}, 0
        for sign in signs(kinds):
            effort = None if efforts is None else efforts[sign]
            scores, ids, compared = self._candidates.compared(_signed(sign, vectors), k, effort, least)
            by_sign[sign], most = _listed(sign, scores, ids), max(most, compared)
        proposed = () if efforts is None else (Stage("index", max(k, *(e.proposals for e in efforts.values()))),)
        by_kind = {kind: _best_of(kind, by_sign, k) for kind in kinds}
        return Proposed(by_kind, (*proposed, Stage("rows", most)), "rows", k)

    def _for_exact(
        self, vectors: QueryVectors, kinds: Sequence[AnswerKind], k: int | None, candidates: int | None
    ) -> Proposed:
        """Candidates for exact scores. Where the index proposes no more than these, their full rows decide nothing."""
        k = k or min(DEFAULT_K, self.n_train)
        efforts = self._efforts(kinds, k)
        if efforts is None:
            # An index that would have to propose all rows has promised what exact scores of all hold.
            all_of_them = self._candidates.index is not None and self._allowed is None and self.exhaustive
            unasked = self.n_train if all_of_them else candidates_for(k)
            return self._by_rows(vectors, kinds, min(self.n_train, candidates or unasked))
        # Wide rows cost little, and how far an index goes for full rows' top-k says nothing of theirs; nor does what it
        # was tuned to with whitened queries, whose truth are rows, say anything of exact whitened scores.
        least = candidates_for(k) if self.wide or self._candidates.geometry != "tracin" else 0
        wanted = {
            sign: min(self.n_train, candidates or max(least, self._candidates.handed_on(k, effort)))
            for sign, effort in efforts.items()
        }
        most = max(wanted.values())
        if most >= self.n_train:
            return self._by_rows(vectors, kinds, most)
        if self._candidates.newer or any(wanted[sign] < effort.proposals for sign, effort in efforts.items()):
            return self._compared(vectors, kinds, most, efforts, k)
        by_kind = {sign: self._proposed(vectors, sign, wanted[sign], k, effort) for sign, effort in efforts.items()}
        if candidates is None and not vectors.formed and any(effort.exact for effort in efforts.values()):
            return self._narrowed(vectors, by_kind, efforts, most)
        return Proposed(by_kind, (Stage("index", most),), "index", most)

    def _narrowed(
        self, vectors: QueryVectors, by_kind: Mapping[AnswerKind, list[Ranked]], efforts: Efforts, most: int
    ) -> Proposed:
        """Of what the index proposes, the best by the largest entries of their factors."""
        assert vectors.factors is not None
        kept = {}
        for kind, found in by_kind.items():
            exact = efforts[kind].exact
            if exact is None:
                kept[kind] = found
                continue
            estimates = leading(self._store, vectors.factors, [ids for ids, _ in found])
            kept[kind] = [ranked(kind, ids, scores, exact) for (ids, _), scores in zip(found, estimates, strict=True)]
        wanted = max(effort.exact or effort.proposals for effort in efforts.values())
        return Proposed(kept, (Stage("index", most), Stage("largest entries", most)), "index", wanted)

    def products(self, vectors: QueryVectors, query: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`Searcher`."""
        return self._candidates.products(vectors.rows[query], ids)

    def estimate(self, vectors: QueryVectors, lists: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
        """See :class:`Searcher`."""
        estimated = []
        for query, ids in enumerate(lists):
            found = by_wide_rows(self._store, vectors, query, ids)
            if projection_of(self._store.manifest.map).orthonormal:  # wide rows hold what rows leave out
                found[0] += self.products(vectors, query, ids)
            estimated.append(found)
        return estimated

    def score(self, vectors: QueryVectors, lists: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
        """See :class:`Searcher`."""
        if self.exhaustive and not vectors.formed:
            assert vectors.factors is not None
            pairs = enumerate(zip(lists, of_candidates(self._store, vectors.factors, lists), strict=True))
            return [
                self._measured(vectors, slice(query, query + 1), ids, scores[None])[0] for query, (ids, scores) in pairs
            ]
        scores = [np.empty(len(ids)) for ids in lists]
        if self.exhaustive:
            for query, ids in enumerate(lists):  # each alone, so that nothing depends on what else is asked
                self._collect(vectors, self._by_stored(vectors, ids, query), lists, scores)
            return scores
        union = lists[0] if len(lists) == 1 else np.unique(np.concatenate(lists))
        if len(union):
            with self._computing() as engine:
                pieces_ = through_model(engine, self._queries, union, self._store.manifest.batch_size)
                self._collect(vectors, pieces_, lists, scores)
        return scores

    def score_all(self, vectors: QueryVectors) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.float64], Mask]]:
        """See :class:`Searcher`."""
        allowed = self._allowed
        everyone = self._store.ids if allowed is None or allowed.ids is None else allowed.ids
        for piece in pieces(everyone, _STREAMED):
            for queries, ids, scores in self._by_stored(vectors, piece):
                mask = None if allowed is None else allowed.mask(ids)
                yield queries, ids, self._measured(vectors, queries, ids, scores), mask

    def _collect(
        self,
        vectors: QueryVectors,
        scored: Scores,
        lists: Sequence[NDArray[np.int64]],
        into: Sequence[NDArray[np.float64]],
    ) -> None:
        for queries, ids, scores in scored:
            exact = self._measured(vectors, queries, ids, scores)
            for row, query in enumerate(range(queries.start, queries.stop)):
                start, stop = np.searchsorted(lists[query], [ids[0], ids[-1] + 1])
                into[query][start:stop] = exact[row, np.searchsorted(ids, lists[query][start:stop])]

    def _by_stored(self, vectors: QueryVectors, ids: NDArray[np.int64], query: int | None = None) -> Scores:
        """Of all queries, or of one whose factors are formed."""
        assert vectors.factors is not None
        if query is None:
            yield from by_factors(self._store, vectors.factors, len(vectors), ids)
            return
        which = slice(query, query + 1)
        mine = {key: sides[which] for key, sides in vectors.factors.items() if not isinstance(sides, tuple)}
        for _, some, scores in by_factors(self._store, mine, 1, ids):
            yield which, some, scores

    def _measured(
        self, vectors: QueryVectors, queries: slice, ids: NDArray[np.int64], scores: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        return measured(self._store, self._geometry, scores, vectors.norms[queries], ids)


def signs(kinds: Sequence[AnswerKind]) -> list[AnswerKind]:
    """What is searched for some kinds, each once."""
    return list(dict.fromkeys(sign for kind in kinds for sign in SIGNS[kind]))


def _signed(sign: AnswerKind, vectors: QueryVectors) -> NDArray[np.float32]:
    return vectors.rows if sign == "proponents" else -vectors.rows


def _listed(sign: AnswerKind, scores: NDArray[np.float32], ids: NDArray[np.int64]) -> list[Ranked]:
    signed = scores if sign == "proponents" else -scores
    return [(some[some >= 0], of_some[some >= 0]) for some, of_some in zip(ids, signed, strict=True)]


def _best_of(kind: AnswerKind, by_sign: Mapping[AnswerKind, list[Ranked]], k: int) -> list[Ranked]:
    if kind != "absolute":
        return by_sign[kind]
    return [ranked(kind, *united(pair), k) for pair in zip(*by_sign.values(), strict=True)]
