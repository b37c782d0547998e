"""Geometries of queries: what each makes of them, which questions it takes, and where its scores come from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..choices import Aggregate, QueryGeometry
from ..errors import ArgumentError
from ..gradients import Engine, Geometry, with_unit_norm
from ..rows import RowMaker
from ..store import GradientStore
from .asking import Queries, QueryExamples, check_aggregate, prepare
from .exactwhitening import ExactWhitening, checked_iterations
from .question import Question
from .scoring import Scores, measured, row_shares, scored_as, shares
from .streaming import against_rows, from_factors, streamed
from .whitening import Whitening, check_asked, whitened

Computing = Callable[[], AbstractContextManager[Engine]]


@dataclass(frozen=True)
class Asked:
    """By which inner product queries are to be compared, see :func:`gradindex.load`.

    Raises:
        ArgumentError: there is no such geometry, or an option is out of range or decides nothing.
    """

    geometry: QueryGeometry = "tracin"
    damping: float | None = None
    iterations: int | None = None

    def __post_init__(self) -> None:
        check_asked(self.geometry, self.damping)
        if self.iterations is not None and self.geometry != "whitened-exact":
            raise ArgumentError(
                f"iterations decides nothing with geometry={self.geometry!r}. Leave it out, or ask for "
                "'whitened-exact'."
            )
        checked_iterations(self.iterations)

    def of(self, engine: Engine, store: GradientStore, computing: Computing) -> Comparison:
        """Made ready for a store as it is now.

        Args:
            engine: whose geometry the store's rows were made by.
            store: a complete one.
            computing: locks the model.

        Raises:
            MismatchError, StoreError: the store lacks what the geometry is made of.
        """
        own = with_unit_norm(engine.geometry, store.manifest.map.unit_norm)
        if self.geometry == "tracin":
            return Comparison(own, computing)
        if self.geometry == "whitened":
            return ByRows(whitened(own, store, self.damping), computing)
        proposing = whitened(own, store, self.damping, by_factors=True)
        return ByDirections(proposing, computing, ExactWhitening(store, self.damping, self.iterations))


class Comparison:
    """Queries compared as the store's rows were made: scores are those of the store's geometry.

    Args:
        geometry: of the rows.
        computing: locks the model for as long as scores go through it.
    """

    def __init__(self, geometry: Geometry, computing: Computing) -> None:
        self.geometry, self._computing = geometry, computing

    @property
    def stamp(self) -> str:
        """What queries depend on besides the store's map."""
        return ""

    @property
    def whitening(self) -> Whitening | None:
        """What turns queries' rows; ``None`` where they are compared as they are."""
        return None

    def wanted(self, store: GradientStore) -> tuple[bool, int | None]:
        """Whether queries have factors, and how many numbers a checkpoint their wide rows have."""
        return store.has_factors, store.manifest.wide

    def prepared(
        self,
        examples: QueryExamples,
        maker: RowMaker,
        store: GradientStore,
        aggregate: Aggregate | None,
        fingerprint: str,
    ) -> Queries:
        """What takes the model, see :func:`prepare`."""
        return prepare(examples, maker, store, aggregate, fingerprint)

    def finished(self, queries: Queries, aggregate: Aggregate | None) -> Queries:
        """What is left to do once the model is free again."""
        return queries

    def fits(self, queries: Queries, store: GradientStore) -> bool:
        """Whether queries have what they are compared by."""
        factors, wide = self.wanted(store)
        return not (factors and queries.factors is None) and not (wide is not None and queries.vectors.wide is None)

    def question(self, question: Question) -> Question:
        """A question as it is asked here.

        Raises:
            ArgumentError: an option decides nothing, or asks for estimates of something else.
        """
        return question

    def check_tokens(self) -> None:
        """Refuse scores by token where there are none.

        Raises:
            ArgumentError: says why.
        """

    def measure(self, queries: Queries, last: str) -> str:
        """What scores are that come from a stage."""
        return self.geometry.measure

    def explained(
        self, store: GradientStore, queries: Queries, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], tuple[str, ...], str]:
        """Scores of some ids by checkpoint and layer (n_query, m, C, L), the layers' titles, and what scores are."""
        if store.has_factors:
            products = shares(store, queries, ids, None)
        else:
            with self._computing() as engine:
                products = shares(store, queries, ids, engine)
        return measured(store, self.geometry, products, queries.norms, ids), _titles(store), scored_as(store)

    def pieces(self, store: GradientStore, queries: Queries) -> Scores:
        """Exact scores of all rows, piece by piece."""
        return streamed(store, queries, self.geometry, self._computing)


class ByRows(Comparison):
    """Queries whose rows are whitened; what is compared are rows, which define the geometry."""

    @property
    def stamp(self) -> str:
        """See :class:`Comparison`."""
        return self.whitening.stamp

    @property
    def whitening(self) -> Whitening:
        """See :class:`Comparison`."""
        found: Whitening = self.geometry.whitening  # type: ignore[attr-defined]  # of Whitened alone
        return found

    def wanted(self, store: GradientStore) -> tuple[bool, int | None]:
        """See :class:`Comparison`."""
        return False, None

    def question(self, question: Question) -> Question:
        """See :class:`Comparison`."""
        return question.by_rows()

    def check_tokens(self) -> None:
        """See :class:`Comparison`."""
        raise ArgumentError("A whitened geometry adds up tokens. Explain tokens with geometry='tracin'.")

    def explained(
        self, store: GradientStore, queries: Queries, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], tuple[str, ...], str]:
        """By checkpoint alone, for rows add up layers. See :class:`Comparison`."""
        return row_shares(store, queries.rows, ids), ("all layers",), "projected"

    def pieces(self, store: GradientStore, queries: Queries) -> Scores:
        """See :class:`Comparison`."""
        return against_rows(store, queries.rows)


class ByDirections(ByRows):
    """Queries with the direction that :class:`ExactWhitening` finds; whitened rows propose its candidates.

    Args:
        geometry: whitened rows.
        computing: see :class:`Comparison`.
        solver: finds directions.
    """

    def __init__(self, geometry: Geometry, computing: Computing, solver: ExactWhitening) -> None:
        super().__init__(geometry, computing)
        self._solver = solver

    @property
    def stamp(self) -> str:
        """See :class:`Comparison`."""
        return f"{super().stamp} exact {self._solver.iterations}"

    def wanted(self, store: GradientStore) -> tuple[bool, int | None]:
        """See :class:`Comparison`."""
        return True, None

    def prepared(
        self,
        examples: QueryExamples,
        maker: RowMaker,
        store: GradientStore,
        aggregate: Aggregate | None,
        fingerprint: str,
    ) -> Queries:
        """Each by itself, for each has its own scale. See :class:`Comparison`."""
        check_aggregate(aggregate)
        return prepare(examples, maker, store, None, fingerprint)

    def finished(self, queries: Queries, aggregate: Aggregate | None) -> Queries:
        """See :class:`Comparison`."""
        return self._solver.solved(queries, aggregate)

    def question(self, question: Question) -> Question:
        """See :class:`Comparison`."""
        question.refuse_wide()
        return question

    def measure(self, queries: Queries, last: str) -> str:
        """See :class:`Comparison`."""
        measure = super().measure(queries, last)
        return f"{measure}, directions by {queries.solution}" if last == "exact" else measure

    def explained(
        self, store: GradientStore, queries: Queries, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], tuple[str, ...], str]:
        """See :class:`Comparison`."""
        return shares(store, queries, ids, None), _titles(store), scored_as(store)

    def pieces(self, store: GradientStore, queries: Queries) -> Scores:
        """See :class:`Comparison`."""
        return from_factors(store, queries, self.geometry)


def _titles(store: GradientStore) -> tuple[str, ...]:
    return tuple(layer.title for layer in store.manifest.map.layers)
