"""Several stores of the same training examples asked as one: of other runs of the training, for one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..choices import Aggregate, Source
from ..errors import ArgumentError, MismatchError
from ..store import GradientStore, asked_again, runs
from .answering import hits_of
from .asking import Queries
from .candidates import pieces
from .filters import allow
from .hits import Hits, Stage
from .question import Question, SearchKeywords
from .ranking import Best
from .retriever import Retriever
from .scoring import by_factors, measured, scored_as
from .stages import Answer

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Ids whose scores of all stores are added up together.
_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class EnsembleQueries:
    """Queries as each store takes them.

    Args:
        each: for each store, see :class:`Queries`.
    """

    each: tuple[Queries, ...]

    def __len__(self) -> int:
        return len(self.each[0])


class Ensemble:
    """Several stores asked as one: a score is the sum of their scores.

    Stores of several runs of a training (other seeds), whose scores added up predict a new run better than those of
    one. All rows are scored: an index of one store promises nothing of the sum. From stored float32 factors scores are
    exact, else they are inner products of rows, as in a whitened geometry always.

    Args:
        retrievers: open, see :func:`load`; their stores hold the same ids, and their tasks the same examples.

    Raises:
        ArgumentError: there are none.
        MismatchError: ids, geometries, or the number of queries differ.
    """

    def __init__(self, retrievers: Sequence[Retriever]) -> None:
        if not retrievers:
            raise ArgumentError("An ensemble has no stores. Give at least one retriever.")
        self._retrievers = tuple(retrievers)
        first = self._retrievers[0]
        for other in self._retrievers[1:]:
            where = f"{first.store.folder} and {other.store.folder}"
            if other.geometry != first.geometry:
                raise MismatchError(
                    f"{where} are asked by {first.geometry!r} and {other.geometry!r}, whose scores do not add up. "
                    "Load both by one geometry."
                )
            if other.task.n_query != first.task.n_query or other.task.n_train != first.task.n_train:
                raise MismatchError(f"The tasks of {where} have other numbers of examples. Give the same data to both.")
        self._stores()

    def __repr__(self) -> str:
        names = ", ".join(str(retriever.store.folder) for retriever in self._retrievers)
        return f"<Ensemble of {len(self._retrievers)} stores: {names}>"

    def _stores(self) -> list[GradientStore]:
        """The stores as they are now.

        Raises:
            MismatchError: they do not hold the same ids.
        """
        stores = [retriever.store for retriever in self._retrievers]
        for store in stores[1:]:
            if not runs.same(store.id_runs, stores[0].id_runs):
                raise MismatchError(
                    f"{stores[0].folder} and {store.folder} hold other ids ({stores[0].n_train:,} and "
                    f"{store.n_train:,} rows), so that scores cannot be added up. Add or remove the same examples."
                )
        return stores

    def prepare(
        self, queries: int | Sequence[Any], source: Source = "query", aggregate: Aggregate | None = None
    ) -> EnsembleQueries:
        """Compute the gradients of queries once for each store, see :meth:`Retriever.prepare`."""
        return EnsembleQueries(tuple(each.prepare(queries, source, aggregate) for each in self._retrievers))

    def search(
        self, queries: int | Sequence[Any] | EnsembleQueries, k: int | None = None, **options: Unpack[SearchKeywords]
    ) -> Hits:
        """The best training examples for each query, by the sum of the stores' scores.

        Args:
            queries: as in :meth:`Retriever.search`, or what :meth:`prepare` made.
            k: most hits per query.
            **options: fields of :class:`Question` but ``rerank`` and ``candidates``: all rows are scored.

        Raises:
            ArgumentError: an option is out of range, or decides nothing here.
        """
        question = Question(k=k, **options)
        if question.candidates is not None or question.rerank != "exact":
            raise ArgumentError("An ensemble scores all rows, so rerank and candidates decide nothing. Drop them.")
        prepared = self._prepared(queries, question.source, question.aggregate)

        def answer() -> Hits:
            stores = self._stores()
            most = question.most(stores[0].n_train)
            columns = prepared.each[0].examples.columns
            allowed = allow(stores[0], question, columns, len(prepared)) if question.filtered else None
            best, looked_at = Best(question.kind, len(prepared), most, question.at_least), 0
            only = None if allowed is None else allowed.ids
            for ids, scores in self._pieces(stores, prepared, stores[0].ids if only is None else only):
                best.add(ids, scores, None if allowed is None else allowed.mask(ids))
                looked_at += len(ids)
            first, found = self._retrievers[0], best.found()
            if self._exact(stores, prepared):
                answered = Answer(found, (Stage("stored factors", looked_at),), "exact")
            else:
                answered = Answer(found, (Stage("rows", looked_at),), "rows")
            measure = f"sums of {len(stores)} stores' {first.measure}"
            return hits_of(first.task, stores[0], prepared.each[0], question.kind, answered, measure)

        return asked_again(answer)

    def exact_scores(
        self, queries: int | Sequence[Any] | EnsembleQueries, source: Source = "query"
    ) -> NDArray[np.float64]:
        """(n_query, n_train) sums of the stores' scores of all rows, in the order of the stores' ids."""
        prepared = self._prepared(queries, source, None)

        def scores() -> NDArray[np.float64]:
            stores = self._stores()
            found = [piece for _, piece in self._pieces(stores, prepared, stores[0].ids)]
            return np.concatenate(found, 1)

        return asked_again(scores)

    def _prepared(
        self, queries: int | Sequence[Any] | EnsembleQueries, source: Source, aggregate: Aggregate | None
    ) -> EnsembleQueries:
        return queries if isinstance(queries, EnsembleQueries) else self.prepare(queries, source, aggregate)

    def _exact(self, stores: Sequence[GradientStore], queries: EnsembleQueries) -> bool:
        """Whether all have scores from factors that are exact."""
        pairs = zip(stores, queries.each, strict=True)
        return all(asked.factors is not None and scored_as(store) == "exact" for store, asked in pairs)

    def _pieces(
        self, stores: Sequence[GradientStore], queries: EnsembleQueries, ids: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Ids (m,) and sums of scores (n_query, m), piece by piece."""
        exact = self._exact(stores, queries)
        for some in pieces(ids, _AT_ONCE):
            total = np.zeros((len(queries), len(some)))
            for retriever, store, asked in zip(self._retrievers, stores, queries.each, strict=True):
                if not exact:
                    total += asked.rows.astype(np.float64) @ store.rows(some).T
                    continue
                assert asked.factors is not None
                start = 0
                for _, mine, products in by_factors(store, asked.factors, len(asked), some):
                    scores = measured(store, retriever.inner_product, products, asked.norms, mine)
                    total[:, start : start + len(mine)] += scores
                    start += len(mine)
            yield some, total
