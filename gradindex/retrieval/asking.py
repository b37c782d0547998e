"""Queries made ready: what is asked about, its rows and its factors, computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..gradients import Engine, Products
from ..progress import progress
from ..rows import RowBatch, RowMaker, Sides
from ..spotcheck import check_alone, smallest_of_uneven
from ..store import GradientStore
from ..task import Task

Source = Literal["query", "train"]
Aggregate = Literal["sum", "mean"]

# By (checkpoint, layer): of queries that are questions of their own both sides; of a group the matrix of their
# weighted sum, (rows, columns).
Asked = Mapping[tuple[int, int], Sides | NDArray[np.float32]]


class Chosen(Sequence[Any]):
    """Some examples of a data set, read when they are asked for.

    Args:
        data: a data set, or the items themselves.
        positions: which, in which order.
    """

    def __init__(self, data: Any, positions: Sequence[int]) -> None:
        self._data, self._positions = data, positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, which: int) -> Any: ...

    @overload
    def __getitem__(self, which: slice) -> Chosen: ...

    def __getitem__(self, which: int | slice) -> Any:
        if isinstance(which, slice):
            return Chosen(self._data, self._positions[which])
        return self._data[self._positions[which]]


@dataclass(frozen=True)
class Examples:
    """What is asked about, before anything is computed.

    Args:
        items: the m examples.
        names: what to call each.
        columns: by name (m,); empty for items given by hand.
    """

    items: Chosen
    names: list[str]
    columns: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Queries:
    """Queries whose gradients were computed; every search takes them in place of positions. Made by ``Retriever.ask``.

    Args:
        examples: what they are.
        names: what to call each question, (n_query,): one for each example, or one for a group.
        rows: (n_query, dim) float32.
        norms: (n_query,) float64, what exact scores are divided by to become cosines.
        factors: see ``Asked``; ``None`` where the store has none.
        weights: (m,) of the examples of a group; ``None`` where each is a question of its own.
        fingerprint: of the store's map, which the rows belong to.
    """

    examples: Examples
    names: tuple[str, ...]
    rows: NDArray[np.float32]
    norms: NDArray[np.float64]
    factors: Asked | None
    weights: NDArray[np.float64] | None
    fingerprint: str
    # With the engine that they belong to, for another retriever has one of its own.
    _kept: list[tuple[Engine, Products]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def products(self, engine: Engine, at_once: int) -> Iterator[tuple[slice, Products]]:
        """The queries' whole gradients, some queries after others; kept for the next question if they go at once.

        Args:
            engine: entered.
            at_once: how many queries' gradients may be in memory.
        """
        if self._kept and self._kept[0][0] is engine:
            yield slice(0, len(self)), self._kept[0][1]
        elif self.weights is not None or len(self) <= at_once:
            weights = None if self.weights is None else self.weights.tolist()
            products = Products(engine, self.examples.items, "query", weights)
            self._kept[:] = [(engine, products)]
            yield slice(0, len(self)), products
        else:
            for start in range(0, len(self), at_once):
                some = self.examples.items[start : start + at_once]
                yield slice(start, start + len(some)), Products(engine, some, "query")


def find(task: Task, queries: int | Sequence[Any], source: Source) -> Examples:
    """Examples given as positions or as items.

    Args:
        task: whose data are looked up.
        queries: positions in ``task.query`` (or ids, with ``source="train"``), or items.
        source: ``"query"`` or ``"train"``.

    Raises:
        ArgumentError: there is nothing to ask about, or a position is out of range.
    """
    if source not in ("query", "train"):
        raise ArgumentError(f"source is {source!r}, but must be 'query' or 'train'.")
    chosen = [queries] if isinstance(queries, (int, np.integer)) else list(queries)
    if not chosen:
        raise ArgumentError("There are no queries. Give at least one position or item.")
    if not all(isinstance(q, (int, np.integer)) for q in chosen):
        return Examples(Chosen(chosen, range(len(chosen))), [f"item {i}" for i in range(len(chosen))], {})
    data, n = (task.train, task.n_train) if source == "train" else (task.query, task.n_query)
    if data is None:
        raise ArgumentError(
            "The task has no query data to look positions up in. "
            "Give items, give Task(query=...), or ask for training examples with source='train'."
        )
    for q in chosen:
        if not 0 <= q < n:
            raise ArgumentError(f"There is no {source} example {q}; positions go from 0 to {n - 1}.")
    positions = [int(q) for q in chosen]
    return Examples(
        Chosen(data, positions), [f"{source} {q}" for q in positions], task.column_arrays(source, positions)
    )


def prepare(
    examples: Examples, maker: RowMaker, store: GradientStore, unit_norm: bool, aggregate: Aggregate | None = None
) -> Queries:
    """Compute rows and, where the store has them, factors; those of a group are added up as they come.

    Args:
        examples: what is asked about.
        maker: its engine entered; makes factors if the store has them.
        store: a complete one.
        unit_norm: whether its rows have unit norm.
        aggregate: ``"sum"`` or ``"mean"`` makes one question of all examples.

    Raises:
        ArgumentError: ``aggregate`` is something else.
        NonFiniteGradientError: names the query and the checkpoint.
    """
    if aggregate not in (None, "sum", "mean"):
        raise ArgumentError(f"aggregate is {aggregate!r}, but must be 'sum', 'mean' or None.")
    fingerprint, stored = store.manifest["fingerprint"], store.manifest["factors"] is not None
    if aggregate is None:
        made = RowBatch.joined(list(_batches(examples, maker, store)))
        norms, factors = np.sqrt(made.self_influence.sum(1)), made.factors if stored else None
        return Queries(examples, tuple(examples.names), made.rows, norms, factors, None, fingerprint)
    m = len(examples.names)
    weight = 1 / m if aggregate == "mean" else 1.0
    row, sums = np.zeros(maker.dim), dict[tuple[int, int], NDArray[np.float32]]()
    weights: list[NDArray[np.float64]] = []
    for batch in _batches(examples, maker, store):
        row += weight * batch.rows.sum(0, dtype=np.float64)
        # Rows of unit norm have their cosines' weights in them already; factors do not.
        lengths = np.sqrt(batch.self_influence.sum(1))
        weights.append(weight / np.where(lengths > 0, lengths, 1) if unit_norm else np.full(len(lengths), weight))
        for key, (activations, output_gradients) in batch.factors.items():
            share = (output_gradients * weights[-1][:, None].astype(np.float32)).T @ activations
            sums[key] = sums[key] + share if key in sums else share
    name = f"{aggregate} of {m:,} {'query' if m == 1 else 'queries'}"
    rows, every = row[None].astype(np.float32), np.concatenate(weights)
    return Queries(examples, (name,), rows, np.ones(1), sums if stored else None, every, fingerprint)


def _batches(examples: Examples, maker: RowMaker, store: GradientStore) -> Iterator[RowBatch]:
    step = store.manifest["batch_size"]
    with progress("gradients of queries", len(examples.names), "queries") as advance:
        for start in range(0, len(examples.names), step):
            items, names = list(examples.items[start : start + step]), examples.names[start : start + step]
            batch = maker.rows(items, names, "query")
            check_alone(maker, items, names, batch, [smallest_of_uneven(items) or 0], "query")
            yield batch
            advance(len(names))
