"""A question's way to its answer: candidates, their full rows, exact scores; each stage counts what it looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..choices import AnswerKind
from ..errors import ArgumentError
from .hits import Stage
from .question import Question
from .ranking import Best, Ranked, ranked, united
from .searcher import SIGNS, Proposed, Searcher, signs
from .vectors import QueryVectors


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


def merged(kind: AnswerKind, answers: Sequence[Answer], k: int | None = None, at_least: float | None = None) -> Answer:
    """One answer from those of several searchers, each of which answered the same question for its own rows.

    Args:
        kind: of all of them.
        answers: at least one; the ids of any two are apart.
        k: how many hits a query has at most.
        at_least: strengths below are left out.

    Returns:
        The best of each query, by strength descending, then id ascending; stages with the rows of all added up.

    Raises:
        ArgumentError: scores of one come from another stage than those of the others.
    """
    lasts = sorted({answer.last for answer in answers})
    if len(lasts) > 1:
        raise ArgumentError(f"Answers by {' and '.join(lasts)} cannot be merged: their scores do not compare.")
    rows: dict[str, int] = {}
    for answer in answers:
        for stage in answer.stages:
            rows[stage.name] = rows.get(stage.name, 0) + stage.rows
    queries = zip(*(answer.found for answer in answers), strict=True)
    found = [ranked(kind, *united(parts), k, at_least) for parts in queries]
    return Answer(found, tuple(Stage(name, count) for name, count in rows.items()), answers[0].last)


class Search:
    """One question about some queries, for one kind of answer or several.

    Args:
        searcher: has the rows, and exact scores.
        vectors: the queries.
        question: what is wanted; of ``kinds`` instead of its own kind.
        kinds: of answers, one or several.

    Raises:
        ArgumentError: ``k`` is out of range, or ``candidates`` would decide nothing.
    """

    def __init__(
        self, searcher: Searcher, vectors: QueryVectors, question: Question, kinds: Sequence[AnswerKind]
    ) -> None:
        self._searcher, self._vectors, self._question, self._kinds = searcher, vectors, question, kinds
        self._k = question.most(searcher.n_train)
        if searcher.exhaustive and question.at_least is not None and question.candidates is not None:
            raise ArgumentError(
                "candidates decides nothing with at_least: the store has factors, so all that may answer get exact "
                "scores. Leave it out."
            )

    def answers(self) -> list[Answer]:
        """One for each kind."""
        question, kinds = self._question, self._kinds
        if question.rerank == "exact":
            if question.at_least is None:
                return self._reranked(kinds)
            return self._all_exact(kinds) if self._searcher.exhaustive else self._doubling(kinds)
        proposed = self._searcher.propose(
            self._vectors, kinds, self._k, last=question.rerank, at_least=question.a_little_less
        )
        if proposed.last == "index":
            return [Answer(proposed.by_kind[kind], proposed.stages, "index") for kind in kinds]
        return [Answer(self._each_alone(kind, proposed.by_kind[kind]), proposed.stages, "rows") for kind in kinds]

    def _each_alone(self, kind: AnswerKind, proposed: list[Ranked]) -> list[Ranked]:
        """The same, each row's product computed alone: equal rows have equal scores, and ids decide.

        In a product of matrices, a row's sum may be rounded otherwise than an equal one's elsewhere. What was found
        is let go query by query, for it may be every row.
        """
        settled = []
        for query in range(len(self._vectors)):
            ids, proposed[query] = np.sort(proposed[query][0]), (proposed[query][0][:0], proposed[query][1][:0])
            scores = self._searcher.products(self._vectors, query, ids)
            settled.append(ranked(kind, ids, scores, self._k, self._question.at_least))
        return settled

    def _reranked(self, kinds: Sequence[AnswerKind]) -> list[Answer]:
        """The candidates re-ranked by exact score."""
        proposed = self._candidates(kinds, self._question.candidates)
        by_kind = {kind: _candidate_ids(kind, proposed) for kind in kinds}
        scores = self._exact(by_kind)
        answers = []
        for kind in kinds:
            pairs = zip(by_kind[kind], scores[kind], strict=True)
            stage = Stage(self._searcher.exact_from, max(map(len, by_kind[kind])))
            found = [ranked(kind, ids, of_query, self._k) for ids, of_query in pairs]
            answers.append(Answer(found, (*proposed.stages, stage), "exact"))
        return answers

    def _candidates(self, kinds: Sequence[AnswerKind], count: int | None) -> Proposed:
        return self._searcher.propose(self._vectors, signs(kinds), self._k, last="exact", candidates=count)

    def _exact(
        self, by_kind: Mapping[AnswerKind, list[NDArray[np.int64]]]
    ) -> dict[AnswerKind, list[NDArray[np.float64]]]:
        """Exact scores of some ascending ids of each query, for each kind; what several kinds want is scored once."""
        lists = [of_query[0] if len(of_query) == 1 else np.unique(np.concatenate(of_query))
                 for of_query in zip(*by_kind.values(), strict=True)]  # fmt: skip
        scores = self._searcher.score(self._vectors, lists)
        return {
            kind: [
                of_query if ids is wanted else of_query[np.searchsorted(ids, wanted)]
                for ids, of_query, wanted in zip(lists, scores, of_kind, strict=True)
            ]
            for kind, of_kind in by_kind.items()
        }

    def _all_exact(self, kinds: Sequence[AnswerKind]) -> list[Answer]:
        """Exact scores, from factors, of all that may answer."""
        least = self._question.a_little_less
        best = {kind: Best(kind, len(self._vectors), self._k, least) for kind in kinds}
        looked_at = np.zeros(len(self._vectors), dtype=np.int64)
        for _, ids, scores, mask in self._searcher.score_all(self._vectors):
            looked_at += len(ids) if mask is None else mask.sum(1)
            for kind in kinds:
                best[kind].add(ids, scores, mask)
        stages = (Stage(self._searcher.exact_from, int(looked_at.max())),)
        return [Answer(self._scored_again(kind, best[kind].found()), stages, "exact") for kind in kinds]

    def _scored_again(self, kind: AnswerKind, found: list[Ranked]) -> list[Ranked]:
        """The same with scores computed as those of candidates are: bit by bit the same, whatever was asked.

        Scores of all rows come from products of matrices, which round otherwise.
        """
        if self._vectors.grouped:
            return [ranked(kind, *each, self._k, self._question.at_least) for each in found]
        lists = [np.sort(ids) for ids, _ in found]
        pairs = zip(lists, self._searcher.score(self._vectors, lists), strict=True)
        return [ranked(kind, ids, scores, self._k, self._question.at_least) for ids, scores in pairs]

    def _doubling(self, kinds: Sequence[AnswerKind]) -> list[Answer]:
        """More and more candidates through the model, until twice as many hold no more hits."""
        question, n_train, n_query = self._question, self._searcher.n_train, len(self._vectors)
        strong = {kind: Best(kind, n_query, self._k, question.at_least) for kind in kinds}
        seen = {kind: [np.empty(0, dtype=np.int64) for _ in range(n_query)] for kind in kinds}
        wanted, stages = question.candidates, tuple[Stage, ...]()
        going = {kind: list(range(n_query)) for kind in kinds}
        first = True
        while any(going.values()):
            proposed = self._candidates(kinds, wanted)
            wanted, stages = proposed.wanted or n_train, proposed.stages
            fresh = {}
            for kind in kinds:
                active = set(going[kind])
                fresh[kind] = [
                    np.setdiff1d(ids, seen[kind][query], assume_unique=True) if query in active else ids[:0]
                    for query, ids in enumerate(_candidate_ids(kind, proposed))
                ]
            scores = self._exact(fresh)
            for kind in kinds:
                left = []
                for query in going[kind]:
                    ids, exact = fresh[kind][query], scores[kind][query]
                    strong[kind].add(ids, exact[None], queries=[query])
                    added = len(ranked(kind, ids, exact, at_least=question.at_least)[0])
                    seen[kind][query] = np.union1d(seen[kind][query], ids)
                    if (first or added) and len(ids) and wanted < n_train:
                        left.append(query)
                going[kind] = left
            wanted, first = min(n_train, 2 * wanted), False
        last = {kind: Stage(self._searcher.exact_from, max(map(len, seen[kind]))) for kind in kinds}
        return [Answer(strong[kind].found(), (*stages, last[kind]), "exact") for kind in kinds]


def _candidate_ids(kind: AnswerKind, proposed: Proposed) -> list[NDArray[np.int64]]:
    """Ascending ids of each query."""
    lists = [proposed.by_kind[sign] for sign in SIGNS[kind]]
    if len(lists) == 1:
        return [np.sort(ids) for ids, _ in lists[0]]
    return [np.unique(np.concatenate([ids for ids, _ in of_query])) for of_query in zip(*lists, strict=True)]
