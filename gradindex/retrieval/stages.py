"""A question's way to its answer: candidates, their full rows, exact scores; each stage counts what it looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..choices import AnswerKind
from ..errors import ArgumentError
from .hits import Stage
from .question import Question
from .ranking import Best, Ranked, ranked, strength, united
from .searcher import SIGNS, Proposed, Searcher, signs
from .vectors import QueryVectors

# For each kind of answer, ascending ids of each query.
ByKind: TypeAlias = Mapping[AnswerKind, Sequence[NDArray[np.int64]]]
# Of the candidates' top-k, the share that exact scores are computed for, as far as wide rows tell.
_SHARE = 0.99


@dataclass(frozen=True)
class Answer:
    """What was found for one kind.

    Args:
        found: for each query ids and scores, in order.
        stages: what they went through.
        last: the stage that the scores come from: ``"index"``, ``"rows"``, ``"wide"`` or ``"exact"``.
    """

    found: list[Ranked]
    stages: tuple[Stage, ...]
    last: Literal["index", "rows", "wide", "exact"]


def merged(kind: AnswerKind, answers: Sequence[Answer], k: int | None = None, at_least: float | None = None) -> Answer:
    """One answer from those of several searchers, each of which answered the same question for its own rows.

    Args:
        kind: of all of them.
        answers: at least one; the ids of any two are apart.
        k: how many hits a query has at most.
        at_least: strengths below are left out.

    Returns:
        The best of each query, by strength descending, then id ascending; stages with the rows of all added up, and
        the lowest of their shares.

    Raises:
        ArgumentError: scores of one come from another stage than those of the others.
    """
    lasts = sorted({answer.last for answer in answers})
    if len(lasts) > 1:
        raise ArgumentError(f"Answers by {' and '.join(lasts)} cannot be merged: their scores do not compare.")
    stages: dict[str, Stage] = {}
    for answer in answers:
        for stage in answer.stages:
            stages[stage.name] = stage.with_more(stages.get(stage.name))
    queries = zip(*(answer.found for answer in answers), strict=True)
    found = [ranked(kind, *united(parts), k, at_least) for parts in queries]
    return Answer(found, tuple(stages.values()), answers[0].last)


class Search:
    """One question about some queries, for one kind of answer or several.

    Args:
        searcher: has the rows, and exact scores.
        vectors: the queries.
        question: what is wanted; of ``kinds`` instead of its own kind.
        kinds: of answers, one or several.

    Raises:
        ArgumentError: ``k`` is out of range, ``candidates`` would decide nothing, or there are no wide rows to rank by.
    """

    def __init__(
        self, searcher: Searcher, vectors: QueryVectors, question: Question, kinds: Sequence[AnswerKind]
    ) -> None:
        self._searcher, self._vectors, self._question, self._kinds = searcher, vectors, question, kinds
        self._k = question.most(searcher.n_train)
        question.check_wide(searcher.wide)
        self._exhaustive = searcher.exhaustive and question.rerank == "exact"
        if self._exhaustive and question.at_least is not None and question.candidates is not None:
            raise ArgumentError(
                "candidates decides nothing with at_least: the store has factors, so all that may answer get exact "
                "scores. Leave it out."
            )

    def answers(self) -> list[Answer]:
        """One for each kind."""
        question, kinds = self._question, self._kinds
        if question.rerank in ("exact", "wide"):
            if question.at_least is None:
                return self._reranked(kinds)
            return self._all_exact(kinds) if self._exhaustive else self._doubling(kinds)
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
        """The candidates re-ranked by exact score, or by wide rows; those decide which of them get exact scores."""
        proposed = self._candidates(kinds, self._question.candidates)
        by_kind: ByKind = {kind: _candidate_ids(kind, proposed) for kind in kinds}
        stages, shares = proposed.stages, dict[AnswerKind, float | None]()
        narrowing = self._searcher.wide and self._question.rerank == "exact" and not self._exhaustive
        if narrowing:
            stages, shares = (*stages, Stage("wide", _longest(*by_kind.values()))), dict.fromkeys(by_kind, _SHARE)
            by_kind, scores = self._narrowed(by_kind)
        elif self._last == "wide":
            estimates = self._of_each(by_kind, self._searcher.estimate)
            scores = {kind: [each[0] for each in lists] for kind, lists in estimates.items()}
            if self._searcher.calibrated:
                shares = {kind: self._expected(kind, lists) for kind, lists in estimates.items()}
        else:
            scores = self._scored(by_kind)
        answers = []
        for kind in kinds:
            pairs = zip(by_kind[kind], scores[kind], strict=True)
            stage = self._stage(_longest(by_kind[kind]), shares.get(kind))
            found = [ranked(kind, ids, of_query, self._k) for ids, of_query in pairs]
            answers.append(Answer(found, (*stages, stage), self._last))
        return answers

    def _narrowed(self, by_kind: ByKind) -> tuple[ByKind, dict[AnswerKind, list[NDArray[np.float64]]]]:
        """Exact scores of the best by wide rows, and then of all others that may be better than the worst of these.

        Which may be is told by the standard errors of their estimates, or more where those of the best fall short of
        what the exact scores show: all but as many of the least likely ones as have less than 1 - ``_SHARE`` of the
        top-k among them, as far as is to be expected.
        """
        k, estimates = self._k or 1, self._of_each(by_kind, self._searcher.estimate)
        first = {
            kind: [
                np.sort(ranked(kind, ids, of_query[0], k)[0])
                for ids, of_query in zip(lists, estimates[kind], strict=True)
            ]
            for kind, lists in by_kind.items()
        }
        exact, rest = self._scored(first), dict[AnswerKind, list[NDArray[np.int64]]]()
        for kind, lists in by_kind.items():
            places = [np.searchsorted(ids, some) for ids, some in zip(lists, first[kind], strict=True)]
            known = [each[:, some] for each, some in zip(estimates[kind], places, strict=True)]
            wider = _short_of(known, exact[kind])
            rest[kind] = [
                ids[_may_enter(strength(kind, each[0]), wider * each[1], strength(kind, scores), some, k)]
                for ids, each, scores, some in zip(lists, estimates[kind], exact[kind], places, strict=True)
            ]
        more = self._scored(rest)
        return (
            {kind: [np.concatenate(both) for both in zip(first[kind], rest[kind], strict=True)] for kind in by_kind},
            {kind: [np.concatenate(both) for both in zip(exact[kind], more[kind], strict=True)] for kind in by_kind},
        )

    def _expected(self, kind: AnswerKind, estimates: Sequence[NDArray[np.float64]]) -> float:
        """Of the candidates' top-k, the share that is expected among the best k by estimates (2, m); of all queries."""
        shares = []
        for found, errors in estimates:
            strengths = strength(kind, found)
            order, k = np.argsort(-strengths), min(self._k or 1, len(strengths))
            left_out = order[k:]
            chances = _chances(strengths[left_out], errors[left_out], strengths[order[k - 1]] if k else 0.0)
            shares.append(max(0.0, 1 - chances.sum() / max(1, k)))
        return float(np.mean(shares))

    @property
    def _last(self) -> Literal["wide", "exact"]:
        return "wide" if self._question.rerank == "wide" else "exact"

    def _stage(self, rows: int, share: float | None = None) -> Stage:
        return Stage("wide" if self._last == "wide" else self._searcher.exact_from, rows, share)

    def _candidates(self, kinds: Sequence[AnswerKind], count: int | None) -> Proposed:
        return self._searcher.propose(self._vectors, signs(kinds), self._k, last=self._last, candidates=count)

    def _scored(self, by_kind: ByKind) -> dict[AnswerKind, list[NDArray[np.float64]]]:
        """Scores of some ascending ids of each query, for each kind: exact ones, or from wide rows."""
        if self._last == "exact":
            return self._of_each(by_kind, self._searcher.score)
        estimates = self._of_each(by_kind, self._searcher.estimate)
        return {kind: [of_query[0] for of_query in lists] for kind, lists in estimates.items()}

    def _of_each(
        self,
        by_kind: ByKind,
        score: Callable[[QueryVectors, Sequence[NDArray[np.int64]]], list[NDArray[np.float64]]],
    ) -> dict[AnswerKind, list[NDArray[np.float64]]]:
        """What several kinds want is scored once; scores have ids as their last axis."""
        lists = [of_query[0] if len(of_query) == 1 else np.unique(np.concatenate(of_query))
                 for of_query in zip(*by_kind.values(), strict=True)]  # fmt: skip
        scores = score(self._vectors, lists)
        return {
            kind: [
                of_query if ids is wanted else of_query[..., np.searchsorted(ids, wanted)]
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
        if self._vectors.formed:
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
            scores = self._scored(fresh)
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
        last = {kind: self._stage(_longest(seen[kind])) for kind in kinds}
        return [Answer(strong[kind].found(), (*stages, last[kind]), self._last) for kind in kinds]


def _longest(*of_kinds: Sequence[NDArray[np.int64]]) -> int:
    return max(len(ids) for lists in of_kinds for ids in lists)


def _short_of(estimates: Sequence[NDArray[np.float64]], exact: Sequence[NDArray[np.float64]]) -> float:
    """How many times their standard errors (2, m) estimates are off by, in the root of the mean square; at least 1."""
    (found, errors), true = np.concatenate(estimates, 1), np.concatenate(exact)
    off = np.divide(true - found, errors, out=np.zeros_like(found), where=errors > 0)
    return max(1.0, float(np.sqrt(np.square(off).mean())))


def _chances(strengths: NDArray[np.float64], errors: NDArray[np.float64], least: float) -> NDArray[np.float64]:
    """(m,) of each, how likely it is above ``least``, by its estimate and its standard error."""
    below = least - strengths
    below = np.divide(below, errors, out=np.copysign(np.inf, below), where=errors > 0)
    return np.array([math.erfc(each / math.sqrt(2)) / 2 for each in below.tolist()])


def _may_enter(
    strengths: NDArray[np.float64],
    errors: NDArray[np.float64],
    exact: NDArray[np.float64],
    known: NDArray[np.int64],
    k: int,
) -> NDArray[np.bool_]:
    """Which others may be among the best k: (m,).

    Args:
        strengths: (m,) estimates.
        errors: (m,) their standard errors.
        exact: strengths of those that are known.
        known: their places among the m.
        k: how many are the best.
    """
    if len(exact) < k:
        return ~np.isin(np.arange(len(strengths)), known)
    chances = _chances(strengths, errors, float(exact.min()))
    chances[known] = 0
    order = np.argsort(chances, kind="stable")
    wanted = np.zeros(len(chances), dtype=bool)
    wanted[order[np.cumsum(chances[order]) > (1 - _SHARE) * k]] = True
    return wanted


def _candidate_ids(kind: AnswerKind, proposed: Proposed) -> list[NDArray[np.int64]]:
    """Ascending ids of each query."""
    lists = [proposed.by_kind[sign] for sign in SIGNS[kind]]
    if len(lists) == 1:
        return [np.sort(ids) for ids, _ in lists[0]]
    return [np.unique(np.concatenate([ids for ids, _ in of_query])) for of_query in zip(*lists, strict=True)]
