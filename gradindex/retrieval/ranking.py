"""What kinds of answers there are, and how the best of a stream of scores are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..choices import AnswerKind

# Ids (m,) and scores (m,) of one query.
Ranked = tuple[NDArray[np.int64], NDArray[Any]]

# A buffer may hold this many times k before it is cut.
_SLACK = 4

_NOTHING: Ranked = np.empty(0, dtype=np.int64), np.empty(0)


def strength(kind: AnswerKind, scores: NDArray[Any]) -> NDArray[np.float64]:
    """What a kind of answer is ordered by, descending: the score, the negated score, or its size."""
    wide = scores.astype(np.float64)
    if kind == "absolute":
        return np.abs(wide)
    return wide if kind == "proponents" else -wide


def ranked(
    kind: AnswerKind, ids: NDArray[np.int64], scores: NDArray[Any], k: int | None = None, at_least: float | None = None
) -> Ranked:
    """The best of one query, by strength descending, then id ascending.

    Args:
        kind: what is the best.
        ids: (m,) in any order.
        scores: (m,) signed.
        k: how many at most.
        at_least: strengths below are left out.

    Returns:
        Ids and scores, at most k.
    """
    keys = strength(kind, scores)
    if at_least is not None or (k is not None and _SLACK * k < len(keys)):
        least = -np.inf if at_least is None else at_least
        if k is not None and k < len(keys):
            least = max(least, np.partition(keys, -k)[-k])
        chosen = np.flatnonzero(keys >= least)  # equal strengths all stay, for ids decide among them
        ids, scores, keys = ids[chosen], scores[chosen], keys[chosen]
    order = np.lexsort((ids, -keys))[:k]
    return ids[order], scores[order]


def united(parts: Sequence[Ranked]) -> Ranked:
    """The ids of all parts with their scores, each once."""
    ids, places = np.unique(np.concatenate([ids for ids, _ in parts]), return_index=True)
    return ids, np.concatenate([scores for _, scores in parts])[places]


class Best:
    """The best of each query in a stream, never more than a few times the answer in memory.

    Args:
        kind: what is the best.
        n_query: how many queries.
        k: how many at most, by default all that are strong enough.
        at_least: strengths below are left out.
    """

    def __init__(self, kind: AnswerKind, n_query: int, k: int | None = None, at_least: float | None = None) -> None:
        self._kind, self._k, self._at_least = kind, k, at_least
        self._least = np.full(n_query, -np.inf if at_least is None else at_least)
        self._kept: list[list[Ranked]] = [[] for _ in range(n_query)]
        self._counts = [0] * n_query

    def add(
        self,
        ids: NDArray[np.int64],
        scores: NDArray[Any],
        allowed: NDArray[np.bool_] | None = None,
        queries: Sequence[int] | None = None,
    ) -> None:
        """Take more scores.

        Args:
            ids: (m,), each of which comes once in the whole stream.
            scores: (q, m).
            allowed: (q, m) which of them count, by default all.
            queries: (q,) whose scores these are, by default of all queries.
        """
        keys = strength(self._kind, scores)
        for row, query in enumerate(range(len(self._kept)) if queries is None else queries):
            fits = keys[row] >= self._least[query]
            chosen = np.flatnonzero(fits if allowed is None else fits & allowed[row])
            if not len(chosen):
                continue
            mine = ids[chosen], scores[row, chosen]
            if self._k is not None and len(chosen) > _SLACK * self._k:
                mine = ranked(self._kind, *mine, self._k)
            self._kept[query].append(mine)
            self._counts[query] += len(mine[0])
            if self._k is not None and self._counts[query] > _SLACK * self._k:
                best = self._of(query)
                self._kept[query], self._counts[query] = [best], len(best[0])
                self._least[query] = strength(self._kind, best[1][-1:])[0]

    def found(self) -> list[Ranked]:
        """The best of each query so far, in order; nothing is in memory twice."""
        for query, kept in enumerate(self._kept):
            if kept:
                self._kept[query] = [self._of(query)]
        return [kept[0] if kept else _NOTHING for kept in self._kept]

    def _of(self, query: int) -> Ranked:
        kept = self._kept[query]
        if not kept:
            return _NOTHING
        ids, scores = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        return ranked(self._kind, ids, scores, self._k, self._at_least)
