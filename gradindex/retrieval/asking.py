"""Queries made ready: what is asked about, its rows and its factors, computed once."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..choices import AGGREGATES, SOURCES, Aggregate, Source
from ..columns import is_whole, positions_of, values_of
from ..errors import ArgumentError, GradIndexError
from ..examples import Coded, Examples, RowBatch, read_example
from ..gradients import Engine, Products
from ..lengths import window_rows, windows
from ..progress import progress
from ..rows import Blocks, RowMaker
from ..spotcheck import check_alone, smallest_of_uneven
from ..store import GradientStore
from ..task import Task
from .vectors import QueryFactors, QueryVectors, Solution

_NO_QUERIES = "There are no queries. Give at least one position or item."
# Parts of an item that an error tells of, and how it calls what is read.
_PARTS = 4
_ROLES = {"query": "query", "train": "training", "item": "given"}


class Chosen(Sequence[Any]):
    """Some examples of a data set, read when they are asked for.

    Args:
        data: a data set, or the items themselves.
        positions: which, in which order.
        role: ``"query"``, ``"train"`` or ``"item"``, for errors.
    """

    def __init__(self, data: Any, positions: Sequence[int], role: str) -> None:
        self._data, self._positions, self._role = data, positions, role

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, which: int) -> Any: ...

    @overload
    def __getitem__(self, which: slice) -> Chosen: ...

    def __getitem__(self, which: int | slice) -> Any:
        if isinstance(which, slice):
            return Chosen(self._data, self._positions[which], self._role)
        position = self._positions[which]
        if self._role == "item" and isinstance(self._data, (list, tuple)):
            return self._data[position]
        return read_example(self._data, position, _ROLES[self._role])


@dataclass(frozen=True)
class QueryExamples:
    """What is asked about, before anything is read or computed.

    Args:
        items: the m examples.
        names: what to call each.
        columns: by name (m,); empty for items given by hand.
    """

    items: Chosen
    names: list[str]
    columns: Mapping[str, NDArray[Any]]

    def read(self, start: int, stop: int) -> Examples:
        """Those at some places, with the query loss; fewer at the end."""
        items, names = list(self.items[start:stop]), self.names[start:stop]
        return Examples(np.arange(start, start + len(items)), items, names, "query")


@dataclass(frozen=True, eq=False, repr=False)
class Queries:
    """Queries whose gradients were computed, by ``Retriever.prepare``; every search takes them in place of positions.

    Args:
        examples: what they are.
        names: what to call each question, (n_query,): one for each example, or one for a group.
        vectors: their rows, norms and factors.
        weights: (m,) of the examples of a group; ``None`` where each is a question of its own.
        solution: how the directions of exact whitening were found, ``None`` where nothing was solved.
    """

    examples: QueryExamples
    names: tuple[str, ...]
    vectors: QueryVectors
    weights: NDArray[np.float64] | None
    solution: Solution | None = None
    # With the engine that they belong to, for another retriever has one of its own.
    _products: list[tuple[Engine, Products]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def rows(self) -> NDArray[np.float32]:
        """(n_query, dim) float32."""
        return self.vectors.rows

    @property
    def norms(self) -> NDArray[np.float64]:
        """(n_query,) float64, what exact scores are divided by to become cosines."""
        return self.vectors.norms

    @property
    def factors(self) -> QueryFactors | None:
        """What exact scores from stored factors need; ``None`` where the store has none."""
        return self.vectors.factors

    def __repr__(self) -> str:
        more = f" and {len(self) - 2:,} more" if len(self) > 2 else ""
        return f"<Queries: {', '.join(self.names[:2])}{more}; rows of {self.rows.shape[1]:,} numbers>"

    def products(self, engine: Engine, at_once: int) -> Iterator[tuple[slice, Products]]:
        """The queries' whole gradients, some queries after others; kept for the next question if they go at once.

        Args:
            engine: entered.
            at_once: how many queries' gradients may be in memory.
        """
        if self._products and self._products[0][0] is engine:
            yield slice(0, len(self)), self._products[0][1]
        elif self.weights is not None or len(self) <= at_once:
            products = Products(engine, self.examples.items, "query", self.weights)
            self._products[:] = [(engine, products)]
            yield slice(0, len(self)), products
        else:
            for start in range(0, len(self), at_once):
                items = self.examples.items[start : start + at_once]
                yield slice(start, start + len(items)), Products(engine, items, "query")


def find(task: Task, queries: Any, source: Source) -> QueryExamples:
    """Examples given as positions or as items.

    Whole numbers are positions, in whatever holds them; a mask with a boolean for each example, and a slice, are
    positions too. Anything else is items: a mapping, a text, or what looks like an example of the task is one item,
    a list or a tuple of these is several.

    Args:
        task: whose data are looked up.
        queries: positions in ``task.query`` (or ids, with ``source="train"``), or items.
        source: ``"query"`` or ``"train"``.

    Raises:
        ArgumentError: there is nothing to ask about, or a position is out of range.
    """
    if source not in SOURCES:
        raise ArgumentError(f"source is {source!r}, but must be 'query' or 'train'.")
    if isinstance(queries, slice) or is_whole(queries):
        return _at_positions(task, queries, source)
    if isinstance(queries, Dataset) and hasattr(queries, "__len__"):
        items: Any = queries
    else:
        items = _listed(task, queries)
        if (
            isinstance(items, Sequence)
            and len(items)
            and all(is_whole(q) or isinstance(q, (bool, np.bool_)) for q in items)
        ):
            return _at_positions(task, items, source)
    if not len(items):
        raise ArgumentError(_NO_QUERIES)
    return QueryExamples(Chosen(items, range(len(items)), "item"), [f"item {i}" for i in range(len(items))], {})


def _at_positions(task: Task, given: Any, source: Source) -> QueryExamples:
    data, n = (task.train, task.n_train) if source == "train" else (task.query, task.n_query)
    if data is None:
        raise ArgumentError(
            "The task has no query data to look positions up in. "
            "Give items, give Task(query=...), or ask for training examples with source='train'."
        )
    given = values_of(range(n)[given] if isinstance(given, slice) else given)
    for q in given:
        if is_whole(q) and not 0 <= q < n:
            raise ArgumentError(f"There is no {source} example {int(q)}; positions go from 0 to {n - 1}.")
    positions = positions_of("queries", given, n, source).tolist()
    if not positions:
        raise ArgumentError(_NO_QUERIES)
    return QueryExamples(
        Chosen(data, positions, source),
        [f"{source} {q}" for q in positions],
        task.column_arrays(source, positions),
    )


def _listed(task: Task, queries: Any) -> Sequence[Any]:
    """Queries that are not one position as a list of positions or items, of one where it is an item by itself.

    Raises:
        ArgumentError: they are neither.
    """
    what = f"queries is a {type(queries).__name__}"
    if queries is None or isinstance(queries, (bool, float, np.floating, np.bool_)):
        raise ArgumentError(f"queries is {queries!r}, but must be positions, which are integers, or items.")
    if isinstance(queries, (DataLoader, IterableDataset)):
        raise ArgumentError(f"{what}, which yields batches or has no length. Give its data set, or a list of items.")
    if isinstance(queries, Set) and not isinstance(queries, (KeysView, ItemsView)):
        raise ArgumentError(f"{what}, which has no order. Give a list.")
    if isinstance(queries, Mapping):
        return [queries]
    if isinstance(queries, list) and queries and all(isinstance(q, (tuple, Mapping, str)) for q in queries):
        return queries
    example = _an_example(task)
    if isinstance(queries, type(example)) and not isinstance(queries, (list, tuple, str, bytes, Tensor, np.ndarray)):
        return [queries]
    if isinstance(queries, (str, bytes)):
        if not isinstance(example, (type(queries), type(None))):
            raise ArgumentError(f"{what}, but examples of the task are {_kind(example)}. Give items like these.")
        return [queries]
    if isinstance(queries, (Tensor, np.ndarray)):
        return _of_array(queries, example)
    if hasattr(queries, "__array__") and hasattr(queries, "__len__"):  # a Series: by place, whatever its labels
        if np.ndim(queries) != 1:
            raise ArgumentError(f"{what} with {np.ndim(queries)} axes. Give positions, or a list of items.")
        return values_of(queries)
    if (
        not isinstance(queries, (Sequence, Iterator))
        and hasattr(queries, "__len__")
        and hasattr(queries, "__getitem__")
    ):
        return cast("Sequence[Any]", queries)  # a data set
    if not isinstance(queries, Iterable):
        return [queries]
    items = queries if isinstance(queries, Sequence) else list(queries)
    if not len(items) or all(map(is_whole, items)) or all(isinstance(q, (bool, np.bool_)) for q in items):
        return items
    several = example is not None and all(_alike(example, q) for q in items)
    if not several and isinstance(queries, (list, tuple)) and _is_one(example, queries):
        return [queries]
    if not several and any(is_whole(q) or isinstance(q, (float, np.floating)) for q in items):
        raise ArgumentError(
            f"queries mix positions, which are integers, with other values ({_kind(items)}), and do not look like an "
            f"example of the task ({_kind(example)}). Give only positions, or a list of items: [(x, y)]."
        )
    return items


def _of_array(queries: Any, example: Any) -> Sequence[Any]:
    whole = not queries.is_floating_point() if isinstance(queries, Tensor) else queries.dtype.kind in "iubO"
    if queries.ndim == 1 and (whole or not len(queries)):
        return values_of(queries)
    if isinstance(example, (Tensor, np.ndarray)):
        if queries.ndim == example.ndim:
            return [queries]
        if queries.ndim == example.ndim + 1:
            return list(queries)
    raise ArgumentError(
        f"queries is a {type(queries).__name__} of shape {tuple(queries.shape)} and type {queries.dtype}, but "
        f"positions are integers along one axis, and examples of the task are {_kind(example)}. Give a list of items "
        "like these."
    )


def _an_example(task: Task) -> Any:
    """What items of the task look like; ``None`` where none can be read."""
    try:
        data, first = (task.train, int(task.train_ids[0])) if task.query is None else (task.query, 0)
        return read_example(data, first, "training" if task.query is None else "query")
    except GradIndexError:
        return None


def _is_one(example: Any, queries: Sequence[Any]) -> bool:
    """Whether a list or tuple is one item and not several."""
    if _alike(example, queries):
        return True
    parts = isinstance(example, (list, tuple)) and not any(isinstance(q, (list, tuple, Mapping)) for q in queries)
    return parts and isinstance(queries, tuple) and len(queries) == len(example)


def _alike(example: Any, item: Any) -> bool:
    """Whether an item is put together as another."""
    if isinstance(example, (list, tuple)):
        if not isinstance(item, (list, tuple)):
            return False
        if isinstance(example, tuple):
            return len(item) == len(example) and all(map(_alike, example, item))
        return all(_alike(example[0], part) for part in item) if example else not item
    if isinstance(example, Mapping):
        return isinstance(item, Mapping)
    axes = [one.ndim or None if hasattr(type(one), "ndim") else None for one in (example, item)]
    if axes != [None, None]:
        return axes[0] == axes[1]
    numbers = [isinstance(one, (int, float, np.number, np.bool_, Tensor, np.ndarray)) for one in (example, item)]
    return numbers == [True, True] or isinstance(item, type(example)) or isinstance(example, type(item))


def _kind(item: Any) -> str:
    """What an item is, in a few words."""
    if isinstance(item, (list, tuple)):
        more = ", ..." if len(item) > _PARTS else ""
        return f"a {type(item).__name__} of ({', '.join(type(part).__name__ for part in item[:_PARTS])}{more})"
    return f"a {type(item).__name__}"


def prepare(
    examples: QueryExamples,
    maker: RowMaker,
    store: GradientStore,
    aggregate: Aggregate | None = None,
    fingerprint: str | None = None,
) -> Queries:
    """Compute rows and, where the store has them, factors; those of a group are added up as they come.

    Args:
        examples: what is asked about.
        maker: its engine entered; makes factors if the store has them.
        store: a complete one.
        aggregate: ``"sum"`` or ``"mean"`` makes one question of all examples.
        fingerprint: what they are known by, by default the store's map.

    Raises:
        ArgumentError: ``aggregate`` is something else.
        NonFiniteGradientError: names the query and the checkpoint.
    """
    check_aggregate(aggregate)
    fingerprint, stored = fingerprint or store.manifest.fingerprint, maker.makes_factors
    if aggregate is None:
        made = RowBatch.joined(list(_batches(examples, maker, store)))
        norms, factors = np.sqrt(made.self_influence.sum(1)), made.factors if stored else None
        assert not isinstance(made.wide, Coded)  # but for a store
        vectors = QueryVectors(made.rows, norms, factors, fingerprint, wide=made.wide)
        return Queries(examples, tuple(examples.names), vectors, None)
    name, weight = group_of(examples, aggregate)
    row, wide, sums = np.zeros(maker.dim), np.zeros(maker.wide_dim), dict[tuple[int, int], NDArray[np.float32]]()
    weights: list[NDArray[np.float64]] = []
    for batch in _batches(examples, maker, store):
        row += weight * batch.rows.sum(0, dtype=np.float64)
        if isinstance(batch.wide, np.ndarray):
            wide += weight * batch.wide.sum(0, dtype=np.float64)
        # Rows have what the geometry divides by in them already; factors do not.
        weights.append(weight / maker.geometry.lengths(np.sqrt(batch.self_influence.sum(1))))
        for key, (activations, output_gradients) in batch.factors.items():
            share = (output_gradients * weights[-1][:, None].astype(np.float32)).T @ activations
            sums[key] = sums[key] + share if key in sums else share
    rows, every = row[None].astype(np.float32), np.concatenate(weights)
    beside = wide[None].astype(np.float32) if len(wide) else None
    formed = {key: total[None] for key, total in sums.items()} if stored else None
    vectors = QueryVectors(rows, np.ones(1), formed, fingerprint, wide=beside)
    return Queries(examples, (name,), vectors, every)


def check_aggregate(aggregate: Aggregate | None) -> None:
    """Refuse a way to combine queries that there is none of.

    Raises:
        ArgumentError: says what there is.
    """
    if aggregate not in (None, *AGGREGATES):
        raise ArgumentError(f"aggregate is {aggregate!r}, but must be 'sum', 'mean' or None.")


def group_of(examples: QueryExamples, aggregate: Aggregate) -> tuple[str, float]:
    """What to call queries that are one question, and what each of them counts."""
    m = len(examples.names)
    return f"{aggregate} of {m:,} {'query' if m == 1 else 'queries'}", 1 / m if aggregate == "mean" else 1.0


def _batches(examples: QueryExamples, maker: RowMaker, store: GradientStore) -> Iterator[RowBatch]:
    """Rows of queries, some after others; those of very different lengths are computed in the order of lengths."""
    step, count = store.manifest.batch_size, len(examples.names)
    read = (examples.read(start, start + step) for start in range(0, count, step))
    with progress("gradients of queries", count, "queries") as advance:
        for window in windows(read, step, window_rows(step, maker.row_bytes)):
            parts = []
            for queries in window.batches():
                blocks = []
                for turn in maker.turns:
                    blocks.append(maker.blocks(queries, turn))
                    check_alone(maker, queries, blocks[-1], [smallest_of_uneven(queries.items) or 0], turn)
                parts.append(Blocks.beside(blocks))
                advance(len(queries))
            whole, places = Blocks.below(parts), window.places
            yield maker.finished([whole if places is None else whole.at(places)], window.examples.role)
