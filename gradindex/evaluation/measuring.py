"""How much of the true top-k a search hands on, and how sure that is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..choices import AnswerKind, QueryGeometry
from ..errors import check_k
from ..retrieval.candidates import Candidates
from ..retrieval.retriever import Retriever
from ..retrieval.whitening import searched_as
from ..store import GradientStore
from .efforts import SIGNS, Efforts, handed
from .truth import Truth, asked_geometry, lower_bound, truth_of, whitening_of


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


def measure(search: Candidates, truth: Truth, efforts: Efforts | None = None, tries: int = 1) -> Measured:
    """How many of the true top-k are among the rows that a search with an index hands on to exact scores.

    Args:
        search: with an index.
        truth: see :class:`Truth`.
        efforts: by default what it was tuned to.
        tries: among how many measurements this one may be the luckiest.
    """

    def recalls(kind: AnswerKind, sign: int) -> NDArray[np.float64]:
        effort = search.effort(truth.k, kind) if efforts is None else efforts[kind]
        if effort.exact is not None:
            return truth.recalls(sign, *handed(search.store, search, truth, effort, sign))
        count = search.handed_on(truth.k, effort)
        n = min(count + 1, search.n_train)  # one of them may be the query itself
        # The index's proposals as they are, where no more are handed on, else the best of them by their full rows.
        find = search.propose if effort.proposals <= count else search.search
        return truth.recalls(sign, find(sign * truth.rows, n, effort)[1], count)

    return _measured({kind: recalls(kind, sign) for kind, sign in SIGNS.items()}, truth.k, tries)


def measure_rows(search: Candidates, truth: Truth, count: int) -> Measured:
    """The same of a search without an index: of the best ``count`` of all rows."""
    n = min(count + 1, search.n_train)
    found = {kind: truth.recalls(sign, search.search(sign * truth.rows, n)[1], count) for kind, sign in SIGNS.items()}
    return _measured(found, truth.k)


def _measured(recalls: Mapping[AnswerKind, NDArray[np.float64]], k: int, tries: int = 1) -> Measured:
    means = (float(of_kind.mean()) for of_kind in recalls.values())
    return Measured(*means, *(lower_bound(of_kind, k, tries) for of_kind in recalls.values()))


def evaluate(
    folder: str | os.PathLike[str],
    *,
    k: int = 100,
    n_query: int = 500,
    retriever: Retriever | None = None,
    seed: int = 1,
    geometry: QueryGeometry | None = None,
    damping: float | None = None,
) -> tuple[str, dict[str, Measured]]:
    """Measure again how much of the true top-k is found: by the store's index, and by its rows alone.

    Args:
        folder: of the store.
        k: how many are the top.
        n_query: how many queries.
        retriever: as for :func:`index`.
        seed: which training examples are queries.
        geometry: of the queries, as for :func:`index`; with ``"whitened-exact"``, by a retriever's, recall is that of
            exact whitened scores among what whitened rows propose.
        damping: as for :func:`index`.

    Returns:
        What truth is, and recall by what proposes: the index, and the best k and 10 k of all rows.

    Raises:
        ArgumentError: ``k`` is out of range.
        StoreError, IndexFileError: the store or its index is damaged.
    """
    store = GradientStore(folder)
    check_k(k, store.n_train)
    geometry = asked_geometry(geometry, damping, retriever)
    whitening = whitening_of(store, geometry, damping, retriever)
    truth = truth_of(store, retriever, n_query, k, seed, whitening)
    geometry = searched_as(geometry)
    damping = None if whitening is None else whitening.damping
    search, found = Candidates(store, geometry=geometry, damping=damping), {}
    if search.index is not None:
        most = max(search.effort(k, kind).proposals for kind in SIGNS)
        found[f"index, {most:,} proposals"] = measure(search, truth)
    everything = Candidates(store, use_index=False, geometry=geometry)
    for count in (k, 10 * k):
        found[f"best {min(count, store.n_train):,} of all rows"] = measure_rows(everything, truth, count)
    return truth.against, found


def as_records(found: dict[str, Measured], k: int) -> list[dict[str, Any]]:
    """Results as rows of a table."""
    return [
        {"proposed by": name, f"recall@{k} proponents": m.proponents, "at least": m.proponents_at_least,
         f"recall@{k} opponents": m.opponents, "at least ": m.opponents_at_least}
        for name, m in found.items()
    ]  # fmt: skip
