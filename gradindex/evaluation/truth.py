"""What an index is judged by: the true top-k of queries, and how sure a measured recall is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..choices import QueryGeometry
from ..errors import ArgumentError
from ..examples import Sides
from ..gradients import HALF
from ..retrieval.retriever import Retriever
from ..retrieval.scoring import Scores, by_factors, shown
from ..retrieval.streaming import against_rows
from ..retrieval.vectors import QueryFactors
from ..retrieval.whitening import Whitening, check_asked
from ..store import GradientStore, moments_of

# Fewer queries say too little.
_LEAST_QUERIES = 20
_WHITENED = "whitened scores of all rows"


@dataclass(frozen=True)
class Truth:
    """What an index is judged by.

    Args:
        rows: (n_query, dim) float32 rows of the queries, in random order.
        best: for both signs (1 and -1), (n_query, m) ids whose true score is at least the k-th largest; -1 elsewhere.
        own: (n_query,) the query's own id, which does not count; -1 where it has none.
        k: how many are the top.
        against: what the scores are, for people.
        factors: of the queries, where the store has some.
    """

    rows: NDArray[np.float32]
    best: dict[int, NDArray[np.int64]]
    own: NDArray[np.int64]
    k: int
    against: str
    factors: Mapping[tuple[int, int], Sides] | None = None

    def part(self, which: int, of: int = 2) -> Truth:
        """Every ``of``-th query, from ``which`` on."""
        mine = slice(which, None, of)
        best = {sign: ids[mine] for sign, ids in self.best.items()}
        return Truth(self.rows[mine], best, self.own[mine], self.k, self.against, _taken(self.factors, mine))

    def recalls(self, sign: int, proposed: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        """(n_query,) shares of the true top-k among the first ``count`` of (n_query, m) ids but the query's own.

        An id of -1 is none.
        """
        found = []
        for true, mine, own in zip(self.best[sign], proposed, self.own, strict=True):
            others = mine[(mine != own) & (mine >= 0)][:count]
            found.append(np.isin(others, true[true >= 0]).sum())
        return np.minimum(found, self.k) / self.k


def truth_from(
    rows: NDArray[np.float32],
    scored: Scores,
    own: NDArray[np.int64],
    k: int,
    against: str,
    seed: int,
    factors: QueryFactors | None = None,
) -> Truth:
    """From true scores, piece by piece.

    Queries with more equal scores at the k-th place than are kept cannot be judged and are left out.
    """
    width = 2 * k + 1
    shape = len(rows), width
    best = {sign: (np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)) for sign in (1, -1)}
    for which, ids, scores in scored:
        for sign, (kept, names) in best.items():
            signed = np.where(ids == own[which, None], -np.inf, sign * scores).astype(np.float32)
            places = np.argpartition(-signed, min(width, len(ids)) - 1, axis=1)[:, :width]
            both = np.concatenate([kept[which], np.take_along_axis(signed, places, 1)], 1)
            mine = np.concatenate([names[which], ids[places]], 1)
            places = np.argpartition(-both, width - 1, axis=1)[:, :width]
            kept[which], names[which] = np.take_along_axis(both, places, 1), np.take_along_axis(mine, places, 1)
    clear, top = np.ones(len(rows), dtype=bool), {}
    for sign, (kept, names) in best.items():
        kth = np.partition(kept, -k, axis=1)[:, -k]
        top[sign] = np.where(kept >= kth[:, None], names, -1)
        clear &= (kept < kth[:, None]).any(1)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(clear))  # halves must not be alike
    if len(order) < _LEAST_QUERIES:
        raise ArgumentError(
            f"Only {len(order)} of {len(rows)} queries have a top-{k} without ties, but at least {_LEAST_QUERIES} are "
            "needed. Give more queries, or another k if many scores are equal."
        )
    ordered = {sign: ids[order] for sign, ids in top.items()}
    return Truth(rows[order], ordered, own[order], k, against, _taken(factors, order))


def _taken(factors: QueryFactors | None, which: Any) -> dict[tuple[int, int], Sides] | None:
    """Of some queries, each a question of its own."""
    if factors is None:
        return None
    return {key: (sides[0][which], sides[1][which]) for key, sides in factors.items()}


def held_out(store: GradientStore, n_query: int, k: int, seed: int = 0, whitening: Whitening | None = None) -> Truth:
    """Training examples as queries, each without itself; truth is exact where the store has exact factors.

    Args:
        store: a complete one.
        n_query: how many, at most.
        k: how many are the top.
        seed: which.
        whitening: of queries of a whitened geometry, whose scores are inner products of rows.

    Raises:
        ArgumentError: ``k`` is out of range, or there are fewer than 20 queries whose top-k is clear.
    """
    ids = store.ids
    if not 1 <= k < len(ids):
        raise ArgumentError(
            f"k is {k}, but must be from 1 to {len(ids) - 1}, because each training example is a query and its top-k "
            "is among the others. Choose another k, or give a task with queries of its own."
        )
    chosen = np.sort(np.random.default_rng(seed).choice(ids, min(n_query, len(ids)), replace=False))
    described = store.manifest.map
    exact = store.manifest.factors == "float32" and not (described.unit_norm or described.precision in HALF)
    rows, factors = store.rows(chosen), None
    if whitening is not None:
        rows, exact = whitening.of(torch.from_numpy(rows)).numpy(), False
    elif store.has_factors:
        factors = store.factors(chosen)
    scored = by_factors(store, factors, len(chosen), ids) if exact and factors else against_rows(store, rows)
    kind = "exact scores" if exact else "scores of all rows" if whitening is None else _WHITENED
    scored = shown("true scores", scored, len(chosen) * len(ids))
    return truth_from(rows, scored, chosen, k, f"against {kind}, training examples as queries", seed, factors)


def asked_geometry(asked: QueryGeometry | None, damping: float | None, retriever: Retriever | None) -> QueryGeometry:
    """By what queries are compared: as asked for, or as a retriever does.

    Raises:
        ArgumentError: they differ, or damping is out of range.
    """
    if retriever is None:
        check_asked(asked or "tracin", damping)
        if asked == "whitened-exact":
            raise ArgumentError(
                "Exact whitened scores are of a task's queries. Give the task, or ask with geometry='whitened'."
            )
        return asked or "tracin"
    if (asked is not None and asked != retriever.geometry) or damping is not None:
        raise ArgumentError(
            f"The retriever asks by geometry={retriever.geometry!r}, and has its damping. Leave out geometry and "
            "damping, or load it with them."
        )
    return retriever.geometry


def whitening_of(
    store: GradientStore, geometry: QueryGeometry, damping: float | None, retriever: Retriever | None
) -> Whitening | None:
    """What turns queries' rows, of a retriever or of the store; ``None`` where they are compared as they are."""
    if geometry == "tracin":
        return None
    return Whitening(moments_of(store), damping) if retriever is None else retriever.whitening


def truth_of(
    store: GradientStore,
    retriever: Retriever | None,
    n_query: int,
    k: int,
    seed: int,
    whitening: Whitening | None = None,
) -> Truth:
    """By the queries of a retriever's task (:func:`real`), or else by training examples (:func:`held_out`)."""
    if retriever is None:
        return held_out(store, n_query, k, seed, whitening)
    return real(retriever, n_query, k, seed)


def real(retriever: Retriever, n_query: int, k: int, seed: int = 0) -> Truth:
    """The task's own queries, drawn at random, with exact scores.

    Args:
        retriever: open, of a task with query data.
        n_query: how many, at most.
        k: how many are the top.
        seed: which.

    Raises:
        ArgumentError: the task has no query data, or too few queries.
    """
    n = retriever.task.n_query
    if n == 0:
        raise ArgumentError("The task has no query data. Give Task(query=...), or drop the task.")
    queries = [int(q) for q in np.random.default_rng(seed).choice(n, min(n_query, n), replace=False)]
    asked = retriever.prepare(queries)
    own = np.full(len(asked), -1)
    kind = {"tracin": "exact scores", "whitened": _WHITENED}.get(retriever.geometry, "exact whitened scores")
    factors = None if asked.vectors.formed else asked.factors
    pieces = retriever.exact_pieces(asked)
    return truth_from(asked.rows, pieces, own, k, f"against {kind}, the task's queries", seed, factors)


def lower_bound(recalls: NDArray[np.float64], k: int, tries: int = 1) -> float:
    """The lower end of a one-sided 95% interval of the mean recall.

    By Student's t, with one query more that misses one of its top-k, so that equal recalls do not pretend to be
    certain; the 5% are shared out among ``tries`` measurements (Bonferroni).

    Args:
        recalls: (n,) of queries, drawn at random.
        k: how many are the top.
        tries: see :func:`measure`.
    """
    values = np.append(recalls, max(0.0, recalls.min() - 1 / k))
    free = len(values) - 1
    z = NormalDist().inv_cdf(1 - 0.05 / tries)
    # Quantile of Student's t from that of the normal distribution (Abramowitz and Stegun, 26.7.5).
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return max(0.0, float(values.mean() - t * values.std(ddof=1) / len(values) ** 0.5))
