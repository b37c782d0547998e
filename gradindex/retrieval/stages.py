"""A question's way to its answer: candidates, their full rows, exact scores; each stage counts what it looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..choices import AnswerKind
from ..errors import ArgumentError
from ..gradients import Engine
from ..store import GradientStore
from .asking import Queries
from .candidates import Candidates, Effort, candidates_for, pieces, scan
from .filters import Allowed
from .hits import Stage
from .question import DEFAULT_K, Question
from .ranking import Best, Ranked, ranked
from .scoring import Scores, by_factors, cosine_norms, of_candidates, through_model

_FAISS_K = 1024
# Ids whose exact scores stream together where all are scored.
_STREAMED = 1 << 16
# What is searched for a kind: each with the query or with its negation, never as the lowest of what was found.
_SIGNS: Mapping[AnswerKind, Sequence[AnswerKind]] = {
    "proponents": ("proponents",),
    "opponents": ("opponents",),
    "absolute": ("proponents", "opponents"),
}


@dataclass(frozen=True)
class Answer:
    """What was found for one kind.

    Args:
        found: for each query ids and scores, in order.
        stages: what they went through.
        last: the stage that the scores come from: ``"index"``, ``"rows"`` or ``"exact"``.
    """

    found: list[Ranked]
    stages: tuple[Stage, ...]
    last: Literal["index", "rows", "exact"]


class Search:
    """One question about some queries, for one kind of answer or several.

    Args:
        store: a complete one.
        candidates: its search.
        computing: locks the model for as long as scores go through it.
        queries: prepared.
        question: what is wanted; of ``kinds`` instead of its own kind.
        kinds: of answers, one or several.
        allowed: who may answer, if not all.
        unit_norm: whether the store's rows have unit norm, so that scores are cosines.

    Raises:
        ArgumentError: ``k`` is out of range, or ``candidates`` would decide nothing.
    """

    def __init__(
        self,
        store: GradientStore,
        candidates: Candidates,
        computing: Callable[[], AbstractContextManager[Engine]],
        queries: Queries,
        question: Question,
        kinds: Sequence[AnswerKind],
        allowed: Allowed | None,
        unit_norm: bool,
    ) -> None:
        self._store, self._candidates, self._computing = store, candidates, computing
        self._queries, self._question, self._kinds = queries, question, kinds
        self._allowed, self._unit_norm = allowed, unit_norm
        self._n, self._k = store.n_train, question.most(store.n_train)
        self._by_factors = store.has_factors
        self._exact_stage = "stored factors" if self._by_factors else "model"
        if self._by_factors and question.at_least is not None and question.candidates is not None:
            raise ArgumentError(
                "candidates decides nothing with at_least: the store has factors, so all that may answer get exact "
                "scores. Leave it out."
            )

    def answers(self) -> list[Answer]:
        """One for each kind."""
        question, kinds = self._question, self._kinds
        if question.rerank == "exact":
            if question.at_least is None:
                return self._settled(kinds)
            return self._all_exact(kinds) if self._by_factors else self._doubling(kinds)
        if self._k is not None and question.at_least is None and question.rerank == "none":
            effort = self._effort(self._k)
            if effort is not None:
                return self._estimated(kinds, self._k, effort)
        found, stages = self._by_rows(kinds, self._k, question.a_little_less)
        return [Answer(self._by_row_alone(kind, found[kind]), stages, "rows") for kind in kinds]

    def _effort(self, k: int) -> Effort | None:
        """How far the index goes for this question; ``None`` where all rows, or all that are allowed, are compared."""
        if self._candidates.index is None or self._allowed is not None:
            return None
        effort = self._candidates.effort(k)
        return None if effort.proposals >= self._n else effort

    def _estimated(self, kinds: Sequence[AnswerKind], k: int, effort: Effort) -> list[Answer]:
        """By the index's own estimates."""
        by_sign = {sign: self._ragged(sign, self._candidates.propose(self._signed(sign), k, effort))
                   for sign in _signs(kinds)}  # fmt: skip
        newer = self._candidates.newer
        stages = (Stage("index", k), *([Stage("rows", newer)] if newer else []))
        return [Answer(self._best_of(kind, by_sign, k), stages, "index") for kind in kinds]

    def _by_rows(
        self, kinds: Sequence[AnswerKind], k: int | None, at_least: float | None = None
    ) -> tuple[dict[AnswerKind, list[Ranked]], tuple[Stage, ...]]:
        """The best by full rows: of those that the index proposes, or of all that may answer."""
        if k is not None and at_least is None and self._allowed is None:
            effort = self._effort(k)
            # FAISS compares all rows for one kind at a time, and merges its blocks' answers in a time that grows with
            # their length; beyond that one pass of our own serves every kind and length.
            if effort is not None or (len(kinds) == 1 and kinds[0] != "absolute" and k <= _FAISS_K):
                return self._compared(kinds, k, effort)
        best = {kind: Best(kind, len(self._queries), k, at_least) for kind in kinds}
        looked_at = np.zeros(len(self._queries), dtype=np.int64)
        only = None if self._allowed is None else self._allowed.ids
        for ids, scores in scan(self._store, self._queries.rows, only):
            mask = None if self._allowed is None else self._allowed.mask(ids)
            looked_at += len(ids) if mask is None else mask.sum(1)
            for some in best.values():
                some.add(ids, scores, mask)
        return {kind: some.found() for kind, some in best.items()}, (Stage("rows", int(looked_at.max())),)

    def _compared(
        self, kinds: Sequence[AnswerKind], k: int, effort: Effort | None
    ) -> tuple[dict[AnswerKind, list[Ranked]], tuple[Stage, ...]]:
        """The best by full rows of what the index proposes, or of all rows."""
        by_sign, most = {}, 0
        for sign in _signs(kinds):
            scores, ids, compared = self._candidates.compared(self._signed(sign), k, effort)
            by_sign[sign], most = self._ragged(sign, (scores, ids)), max(most, compared)
        proposed = () if effort is None else (Stage("index", max(k, effort.proposals)),)
        return {kind: self._best_of(kind, by_sign, k) for kind in kinds}, (*proposed, Stage("rows", most))

    def _by_row_alone(self, kind: AnswerKind, found: list[Ranked]) -> list[Ranked]:
        """The same, each row's product computed alone: equal rows have equal scores, and ids decide.

        In a product of matrices, a row's sum may be rounded otherwise than an equal one's elsewhere. What was found
        is let go query by query, for it may be every row.
        """
        settled = []
        for query, row in enumerate(self._queries.rows):
            ids, found[query] = np.sort(found[query][0]), (found[query][0][:0], found[query][1][:0])
            scores = self._candidates.products(row, ids)
            settled.append(ranked(kind, ids, scores, self._k, self._question.at_least))
        return settled

    def _signed(self, sign: AnswerKind) -> NDArray[np.float32]:
        rows = self._queries.rows
        return rows if sign == "proponents" else -rows

    @staticmethod
    def _ragged(sign: AnswerKind, found: tuple[NDArray[np.float32], NDArray[np.int64]]) -> list[Ranked]:
        scores = found[0] if sign == "proponents" else -found[0]
        return list(zip(found[1], scores, strict=True))

    @staticmethod
    def _best_of(kind: AnswerKind, by_sign: Mapping[AnswerKind, list[Ranked]], k: int) -> list[Ranked]:
        if kind != "absolute":
            return by_sign[kind]
        return [ranked(kind, *_united(one, other), k) for one, other in zip(*by_sign.values(), strict=True)]

    def _settled(self, kinds: Sequence[AnswerKind]) -> list[Answer]:
        """The candidates' order settled by exact scores."""
        wanted, effort = self._wanted()
        by_sign, stages = self._proposed(_signs(kinds), wanted, effort)
        chosen = {kind: self._candidates_of(kind, by_sign) for kind in kinds}
        scores = self._exact(chosen)
        answers = []
        for kind in kinds:
            pairs = zip(chosen[kind], scores[kind], strict=True)
            count = max(map(len, chosen[kind]))
            found = [ranked(kind, ids, some, self._k) for ids, some in pairs]
            answers.append(Answer(found, (*stages, Stage(self._exact_stage, count)), "exact"))
        return answers

    def _wanted(self) -> tuple[int, Effort | None]:
        """How many candidates go to exact scores, by default what the index was tuned to propose; and its effort."""
        k = self._k or min(DEFAULT_K, self._n)
        effort = self._effort(k)
        default = candidates_for(k)
        if effort is not None:
            default = max(k, effort.proposals if self._by_factors else min(effort.proposals, default))
        return min(self._n, self._question.candidates or default), effort

    def _proposed(
        self, signs: Sequence[AnswerKind], wanted: int, effort: Effort | None
    ) -> tuple[dict[AnswerKind, list[Ranked]], tuple[Stage, ...]]:
        """Candidates for exact scores. Where the index proposes no more than these, their full rows decide nothing."""
        if effort is None or wanted >= self._n:
            return self._by_rows(signs, wanted)
        if wanted >= effort.proposals and not self._candidates.newer:
            found = {sign: self._ragged(sign, self._candidates.propose(self._signed(sign), wanted, effort))
                     for sign in signs}  # fmt: skip
            return found, (Stage("index", wanted),)
        return self._compared(signs, wanted, effort)

    @staticmethod
    def _candidates_of(kind: AnswerKind, by_sign: Mapping[AnswerKind, list[Ranked]]) -> list[NDArray[np.int64]]:
        """Ascending ids of each query."""
        lists = [by_sign[sign] for sign in _SIGNS[kind]]
        if len(lists) == 1:
            return [np.sort(ids) for ids, _ in lists[0]]
        return [np.unique(np.concatenate([ids for ids, _ in mine])) for mine in zip(*lists, strict=True)]

    def _exact(
        self, chosen: Mapping[AnswerKind, list[NDArray[np.int64]]]
    ) -> dict[AnswerKind, list[NDArray[np.float64]]]:
        """Exact scores of some ascending ids of each query, for each kind."""
        if self._by_factors and self._queries.weights is None:
            return {kind: self._each_its_own(lists) for kind, lists in chosen.items()}
        lists = [ids for some in chosen.values() for ids in some]
        union = lists[0] if len(lists) == 1 else np.unique(np.concatenate(lists))
        scores = {kind: [np.empty(len(ids)) for ids in some] for kind, some in chosen.items()}
        if not len(union):
            return scores
        if self._by_factors:
            self._collect(self._by_stored(union), chosen, scores)
        else:
            with self._computing() as engine:
                found = through_model(engine, self._queries, union, self._store.manifest.batch_size)
                self._collect(found, chosen, scores)
        return scores

    def _each_its_own(self, lists: list[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
        """Exact scores of each query's ids from factors; no query pays for another's."""
        assert self._queries.factors is not None
        found = of_candidates(self._store, self._queries.factors, lists)
        pairs = enumerate(zip(lists, found, strict=True))
        return [self._measured(slice(query, query + 1), ids, scores[None])[0] for query, (ids, scores) in pairs]

    def _collect(
        self,
        found: Scores,
        chosen: Mapping[AnswerKind, list[NDArray[np.int64]]],
        into: Mapping[AnswerKind, list[NDArray[np.float64]]],
    ) -> None:
        for queries, ids, scores in found:
            exact = self._measured(queries, ids, scores)
            for kind, lists in chosen.items():
                for row, query in enumerate(range(queries.start, queries.stop)):
                    start, stop = np.searchsorted(lists[query], [ids[0], ids[-1] + 1])
                    places = np.searchsorted(ids, lists[query][start:stop])
                    into[kind][query][start:stop] = exact[row, places]

    def _by_stored(self, ids: NDArray[np.int64]) -> Scores:
        factors = self._queries.factors
        assert factors is not None
        return by_factors(self._store, factors, len(self._queries), ids)

    def _measured(self, queries: slice, ids: NDArray[np.int64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores as the store measures: cosines where its rows have unit norm."""
        return scores / cosine_norms(self._store, self._queries.norms[queries], ids) if self._unit_norm else scores

    def _all_exact(self, kinds: Sequence[AnswerKind]) -> list[Answer]:
        """Exact scores, from factors, of all that may answer."""
        allowed, least = self._allowed, self._question.a_little_less
        best = {kind: Best(kind, len(self._queries), self._k, least) for kind in kinds}
        looked_at = np.zeros(len(self._queries), dtype=np.int64)
        for some in self._everyone():
            for queries, ids, scores in self._by_stored(some):
                mask = None if allowed is None else allowed.mask(ids)
                looked_at += len(ids) if mask is None else mask.sum(1)
                for kind in kinds:
                    best[kind].add(ids, self._measured(queries, ids, scores), mask)
        stages = (Stage(self._exact_stage, int(looked_at.max())),)
        return [Answer(self._again(kind, best[kind].found()), stages, "exact") for kind in kinds]

    def _again(self, kind: AnswerKind, found: list[Ranked]) -> list[Ranked]:
        """The same with scores computed as those of candidates are: bit by bit the same, whatever was asked.

        Scores of all rows come from products of matrices, which round otherwise.
        """
        if self._queries.weights is not None:
            return [ranked(kind, *each, self._k, self._question.at_least) for each in found]
        lists = [np.sort(ids) for ids, _ in found]
        pairs = zip(lists, self._each_its_own(lists), strict=True)
        return [ranked(kind, ids, scores, self._k, self._question.at_least) for ids, scores in pairs]

    def _everyone(self) -> list[NDArray[np.int64]]:
        ids = self._store.ids if self._allowed is None or self._allowed.ids is None else self._allowed.ids
        return list(pieces(ids, _STREAMED))

    def _doubling(self, kinds: Sequence[AnswerKind]) -> list[Answer]:
        """More and more candidates through the model, until twice as many hold no more hits."""
        question = self._question
        strong = {kind: Best(kind, len(self._queries), self._k, question.at_least) for kind in kinds}
        seen = {kind: [np.empty(0, dtype=np.int64) for _ in self._queries.names] for kind in kinds}
        wanted, effort = self._wanted()
        stages: tuple[Stage, ...] = ()
        going = {kind: list(range(len(self._queries))) for kind in kinds}
        first = True
        while any(going.values()):
            by_sign, stages = self._proposed(_signs(kinds), wanted, effort)
            fresh = {}
            for kind in kinds:
                proposed = self._candidates_of(kind, by_sign)
                active = set(going[kind])
                fresh[kind] = [
                    np.setdiff1d(ids, seen[kind][query], assume_unique=True) if query in active else ids[:0]
                    for query, ids in enumerate(proposed)
                ]
            scores = self._exact(fresh)
            for kind in kinds:
                left = []
                for query in going[kind]:
                    ids, some = fresh[kind][query], scores[kind][query]
                    strong[kind].add(ids, some[None], queries=[query])
                    added = len(ranked(kind, ids, some, at_least=question.at_least)[0])
                    seen[kind][query] = np.union1d(seen[kind][query], ids)
                    if (first or added) and len(ids) and wanted < self._n:
                        left.append(query)
                going[kind] = left
            wanted, first = min(self._n, 2 * wanted), False
        return [
            Answer(strong[kind].found(), (*stages, Stage(self._exact_stage, max(map(len, seen[kind])))), "exact")
            for kind in kinds
        ]


def _signs(kinds: Sequence[AnswerKind]) -> list[AnswerKind]:
    return list(dict.fromkeys(sign for kind in kinds for sign in _SIGNS[kind]))


def _united(one: Ranked, other: Ranked) -> Ranked:
    """Both, each id once."""
    ids, places = np.unique(np.concatenate([one[0], other[0]]), return_index=True)
    return ids, np.concatenate([one[1], other[1]])[places]
