"""How much of the true top-k a search hands on, and how sure that is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import check_k
from ..retrieval.candidates import Candidates, Effort, candidates_for
from ..retrieval.retriever import Retriever
from ..store import GradientStore
from .truth import Truth, held_out, lower_bound, real


@dataclass(frozen=True)
class Measured:
    """Mean recall of both kinds of answers, and the lower ends of their one-sided 95% intervals over queries."""

    proponents: float
    opponents: float
    proponents_at_least: float
    opponents_at_least: float

    @property
    def at_least(self) -> float:
        """The lower end of the worse."""
        return min(self.proponents_at_least, self.opponents_at_least)


def measure(search: Candidates, truth: Truth, count: int, effort: Effort | None = None, tries: int = 1) -> Measured:
    """How many of the true top-k are among the rows that a search hands on to exact scores.

    Args:
        search: with an index or without.
        truth: see :class:`Truth`.
        count: rows that are handed on: the index's proposals as they are, where these are no more, else the best of
            them by their full rows.
        effort: with an index, by default what it was tuned to.
        tries: among how many measurements this one may be the luckiest.
    """
    n = min(count + 1, search.n_train)  # one of them may be the query itself
    effort = effort if effort is not None or search.index is None else search.effort(truth.k)
    as_proposed = effort is not None and effort.proposals <= count

    def find(query: NDArray[np.float32]) -> NDArray[np.int64]:
        return (search.propose(query, n, effort) if as_proposed and effort else search.search(query, n, effort))[1]

    found = {sign: find(sign * truth.rows) for sign in (1, -1)}
    return measured_of(truth, found, count, tries)


def measured_of(truth: Truth, found: dict[int, NDArray[np.int64]], count: int, tries: int = 1) -> Measured:
    """Of what was found, by sign."""
    recalls = [truth.recalls(sign, found[sign], count) for sign in (1, -1)]
    least = [lower_bound(values, truth.k, tries) for values in recalls]
    return Measured(float(recalls[0].mean()), float(recalls[1].mean()), least[0], least[1])


def evaluate(
    folder: str | os.PathLike[str],
    *,
    k: int = 100,
    n_query: int = 500,
    retriever: Retriever | None = None,
    seed: int = 1,
) -> tuple[str, dict[str, Measured]]:
    """Measure again how much of the true top-k is found: by the store's index, and by its rows alone.

    Args:
        folder: of the store.
        k: how many are the top.
        n_query: how many queries.
        retriever: as for :func:`index`.
        seed: which training examples are queries.

    Returns:
        What truth is, and recall by what proposes: the index, and the best k and 10 k of all rows.

    Raises:
        ArgumentError: ``k`` is out of range.
        StoreError, IndexFileError: the store or its index is damaged.
    """
    store = GradientStore(folder)
    check_k(k, store.n_train)
    truth = held_out(store, n_query, k, seed) if retriever is None else real(retriever, n_query, k, seed)
    search, found = Candidates(store), {}
    if search.index is not None:
        effort = search.effort(k)
        count = handed_on(store, effort, k)
        found[f"index, {effort.proposals:,} proposals"] = measure(search, truth, count, effort)
    everything = Candidates(store, use_index=False)
    for count in (k, 10 * k):
        found[f"best {min(count, store.n_train):,} of all rows"] = measure(everything, truth, count)
    return truth.against, found


def handed_on(store: GradientStore, effort: Effort, k: int) -> int:
    """How many rows go to exact scores; through the model they are dear, and full rows choose the best."""
    return effort.proposals if store.manifest.factors else min(effort.proposals, candidates_for(k))


def as_records(found: dict[str, Measured], k: int) -> list[dict[str, Any]]:
    """Results as rows of a table."""
    return [
        {"proposed by": name, f"recall@{k} proponents": m.proponents, "at least": m.proponents_at_least,
         f"recall@{k} opponents": m.opponents, "at least ": m.opponents_at_least}
        for name, m in found.items()
    ]  # fmt: skip
