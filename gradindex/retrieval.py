"""Ask: proponents and opponents from the index, settled by exact scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .candidates import Candidates
from .errors import ArgumentError, NonFiniteGradientError, StoreError, check_k
from .gradients import HALF, Engine, Precision, Products
from .hits import Hits
from .index import require
from .matching import check_task
from .memory import in_halves
from .progress import progress
from .projection import Projection
from .rows import RowBatch, RowMaker
from .store import GradientStore, runs
from .task import Task
from .tree import preserved_random_state

Rerank = Literal["exact", "none"]
Source = Literal["query", "train"]

# Memory for the gradients of queries while they are compared; more queries go in turns.
_QUERY_BYTES = 2 << 30


def exact_scores(
    task: Task,
    items: Sequence[Any],
    ids: NDArray[np.int64] | None = None,
    *,
    role: Source = "query",
    precision: Precision = "float32",
    device: str | None = None,
    batch_size: int | None = None,
) -> NDArray[Any]:
    """Exact TracInCP of training examples for each query, nothing projected.

        TracInCP(z, z') = sum_c eta_c <grad l(w_c; z), grad l(w_c; z')>

    Source: Pruthi et al. 2020 (arXiv:2002.08484), section 3.3.

    Args:
        task: the model, its checkpoints and its training data.
        items: the queries, as the task's data sets hand them out.
        ids: (m,) training ids, by default all that the task does not skip.
        role: whether queries are scored with the ``"query"`` or the ``"train"`` loss.
        precision: of the gradients and scores; those of half precision are not exact.
        device: where to compute, by default where the model is.
        batch_size: training examples per pass, by default as many, up to 256, as the free memory holds.

    Returns:
        (n_query, m) in ``precision``, signed; positive = proponent.

    Raises:
        ArgumentError: there are no queries, or an id is out of range.
        GradIndexError: the task cannot be used as it is.
    """
    items = list(items)
    if not items:
        raise ArgumentError("There are no queries. Give at least one item.")
    ids = task.train_ids if ids is None else runs.as_ids(ids)
    wrong = ids[(ids < 0) | (ids >= task.n_train)]
    if len(wrong):
        raise ArgumentError(f"There is no training id {wrong[0]}; ids go from 0 to {task.n_train - 1}.")
    with preserved_random_state(), Engine(task, precision, device) as engine:
        engine.check_routes()
        return _exact(engine, items, ids, role, batch_size)


def _exact(engine: Engine, items: list[Any], ids: NDArray[np.int64], role: str, batch_size: int | None) -> NDArray[Any]:
    each = sum(layer.size for layer in engine.layers) * engine.n_checkpoints * engine.dtype.itemsize
    at_once = max(1, _QUERY_BYTES // each)
    parts = [items[start : start + at_once] for start in range(0, len(items), at_once)]
    scores: list[NDArray[Any]] = []
    with progress("exact scores", len(ids) * len(parts), "rows") as advance:
        for part in parts:
            products = Products(engine, part, role)
            batch_size = batch_size or products.pick_batch_size(len(ids))
            columns: list[torch.Tensor] = []
            for start in range(0, len(ids), batch_size):
                chosen = [int(i) for i in ids[start : start + batch_size]]
                batch, names = engine.task.examples(chosen), [f"Training example {i}" for i in chosen]
                columns += in_halves(products.of, batch, names, lambda: engine.at)
                advance(len(chosen))
            scores.append(torch.cat(columns, 1).cpu().numpy())
    found = np.concatenate(scores)
    bad = ~np.isfinite(found)
    if bad.any():
        query, column = np.argwhere(bad)[0]
        who = f"Query {query} of {len(items)}" if bad[query].all() else f"Training example {ids[column]}"
        raise NonFiniteGradientError(f"{who} has a NaN or infinite gradient. Check the example.")
    return found


class Retriever:
    """An open store and its task, ready for queries. Make one with :func:`load`.

    Args:
        store: a complete store.
        task: the task that it was built from.
        device: where to compute, by default where the model is.
        use_index: whether an index is used, where there is one.

    Raises:
        MismatchError: the task is not the store's; says what differs.
        StoreError: the store is damaged.
    """

    def __init__(self, store: GradientStore, task: Task, device: str | None = None, use_index: bool = True) -> None:
        require()
        self.task = task
        stored = store.manifest["map"]
        self._projection = Projection(**stored["projection"])
        self._unit_norm: bool = stored["unit_norm"]
        # Queries and exact scores take full precision, even where rows were made in half precision.
        self._engine = Engine(task, "float32" if stored["precision"] in HALF else stored["precision"], device)
        with preserved_random_state(), self._engine as engine:
            engine.check_routes()
            check_task(store, engine)
        self._bases = store.bases()
        self._use_index = use_index
        self._opened = store, Candidates(store, use_index=use_index)

    @property
    def store(self) -> GradientStore:
        """The store as it is now: what was added answers, what was removed does not.

        Raises:
            StoreError: its rows are other ones now, or it is gone.
        """
        return self._now()[0]

    def _now(self) -> tuple[GradientStore, Candidates]:
        store, candidates = self._opened
        if not candidates.current:
            now = GradientStore(store.folder)
            if now.manifest["fingerprint"] != store.manifest["fingerprint"]:
                raise StoreError(f"{store.folder} has other rows than when it was opened. Load it again.")
            self._opened = store, candidates = now, Candidates(now, use_index=self._use_index)
        return store, candidates

    @property
    def unseen(self) -> int:
        """How many of the task's training examples came after the store, which answers without them."""
        return self.task.n_train - int(self.store.manifest["next_id"])

    def proponents(self, queries: int | Sequence[Any], k: int = 10, **options: Any) -> Hits:
        """The k training examples with the highest scores; options as in :meth:`search`."""
        return self.search(queries, k, opponents=False, **options)

    def opponents(self, queries: int | Sequence[Any], k: int = 10, **options: Any) -> Hits:
        """The k training examples with the lowest scores; options as in :meth:`search`."""
        return self.search(queries, k, opponents=True, **options)

    def search(
        self,
        queries: int | Sequence[Any],
        k: int = 10,
        *,
        opponents: bool = False,
        source: Source = "query",
        candidates: int | None = None,
        rerank: Rerank = "exact",
    ) -> Hits:
        """Top-k training examples of each query.

        The index proposes candidates by projected scores (for opponents with the negated
        query); exact TracInCP of these settles the order.

        Args:
            queries: positions in ``task.query`` (or ids, with ``source="train"``), or items.
            k: how many, from 1 to n_train.
            opponents: the lowest scores instead of the highest.
            source: where positions are looked up; the query loss is explained either way.
            candidates: how many rows are re-scored exactly, by default 10 k, or what the index was tuned to.
            rerank: ``"exact"``, or ``"none"`` for the index's own estimates.

        Returns:
            Hits with ids and scores of shape (n_query, k).

        Raises:
            ArgumentError: ``k``, a position or an option is out of range.
        """
        store, searched = self._now()
        n = store.n_train
        check_k(k, n)
        if rerank not in ("exact", "none"):
            raise ArgumentError(f"rerank is {rerank!r}, but must be 'exact' or 'none'.")
        if candidates is not None and (rerank == "none" or candidates < k):
            raise ArgumentError(
                f"candidates is {candidates}, but must be at least k, {k}, and goes with rerank='exact' alone."
            )
        items, names, query_columns = self._resolve(queries, source)
        wanted = (
            k if rerank == "none" else min(n, _default_candidates(searched, k) if candidates is None else candidates)
        )
        sign = -1.0 if opponents else 1.0
        with preserved_random_state(), self._engine as engine:
            stored = store.manifest["factors"] is not None and rerank == "exact"
            maker = RowMaker(engine, self._projection, self._bases, unit_norm=self._unit_norm, factors=stored)
            query = maker.rows(items, names, "query")
            scores: NDArray[Any]
            scores, ids = searched.search(np.asarray(sign * query.rows, dtype=np.float32), wanted)
            if rerank == "exact":
                union = np.unique(ids)
                if stored:
                    exact = sign * _by_factors(store, query, union)
                else:
                    exact = sign * _exact(engine, items, union, "query", store.manifest["batch_size"])
                if self._unit_norm:
                    exact = _cosines(store, exact, query, union)
                found = np.take_along_axis(exact, np.searchsorted(union, ids), 1)
                order = np.lexsort((ids, -found), axis=1)[:, :k]
                scores, ids = np.take_along_axis(found, order, 1), np.take_along_axis(ids, order, 1)
        show = self.task.show
        return Hits(
            ids=ids,
            scores=sign * scores,
            kind="opponents" if opponents else "proponents",
            scored=_scored(store) if rerank == "exact" else "projected",
            queries=tuple(names),
            measure="cosines of the gradients behind TracInCP" if self._unit_norm else "TracInCP scores",
            columns={name: store.column(name, ids) for name in store.columns},
            query_columns=query_columns,
            show_train=None if show is None else lambda i: show(self.task.train[i]),
            show_query=None if show is None else lambda row: show(items[row]),
        )

    @property
    def search_note(self) -> str:
        """How rows are searched: with which index and recall, or all of them."""
        return self._now()[1].how

    def query_rows(self, queries: int | Sequence[Any], source: Source = "query") -> NDArray[np.float32]:
        """(n_query, dim) float32 rows of queries, as :meth:`search` takes them."""
        items, names, _ = self._resolve(queries, source)
        with preserved_random_state(), self._engine as engine:
            maker = RowMaker(engine, self._projection, self._bases, unit_norm=self._unit_norm)
            return maker.rows(items, names, "query").rows

    def exact_scores(self, queries: int | Sequence[Any], source: Source = "query") -> NDArray[Any]:
        """(n_query, n_train) exact scores of all rows' training examples, in the order of the store's ids.

        TracInCP, or cosines where the store's rows have unit norm.
        """
        items, names, _ = self._resolve(queries, source)
        store = self.store
        with preserved_random_state(), self._engine as engine:
            exact = _exact(engine, items, store.ids, "query", store.manifest["batch_size"])
            if not self._unit_norm:
                return exact
            maker = RowMaker(engine, self._projection, self._bases, unit_norm=True)
            return _cosines(store, exact, maker.rows(items, names, "query"), store.ids)

    def _resolve(
        self, queries: int | Sequence[Any], source: Source
    ) -> tuple[list[Any], list[str], dict[str, NDArray[Any]]]:
        """Items, names and columns of queries given as positions or as items."""
        if source not in ("query", "train"):
            raise ArgumentError(f"source is {source!r}, but must be 'query' or 'train'.")
        chosen = [queries] if isinstance(queries, (int, np.integer)) else list(queries)
        if not chosen:
            raise ArgumentError("There are no queries. Give at least one position or item.")
        if not all(isinstance(q, (int, np.integer)) for q in chosen):
            return chosen, [f"item {i}" for i in range(len(chosen))], {}
        data, n = (self.task.train, self.task.n_train) if source == "train" else (self.task.query, self.task.n_query)
        if data is None:
            raise ArgumentError(
                "The task has no query data to look positions up in. "
                "Give items, give Task(query=...), or ask for training examples with source='train'."
            )
        for q in chosen:
            if not 0 <= q < n:
                raise ArgumentError(f"There is no {source} example {q}; positions go from 0 to {n - 1}.")
        columns = self.task.column_arrays(source, [int(q) for q in chosen])
        return [data[int(q)] for q in chosen], [f"{source} {q}" for q in chosen], columns


def load(folder: str | os.PathLike[str], task: Task, *, device: str | None = None, use_index: bool = True) -> Retriever:
    """Open a store for queries.

    Args:
        folder: what :func:`build` filled.
        task: the task that it was built from.
        device: where to compute, such as ``"cuda"``, by default where the model is.
        use_index: whether an index is used, where there is one; else all rows are compared.

    Raises:
        StoreError: missing, damaged or not complete.
        MismatchError: the task is not the store's; says what differs.
    """
    return Retriever(GradientStore(folder), task, device, use_index)


def _default_candidates(searched: Candidates, k: int) -> int:
    """As many as the index was tuned to propose, which then hold the top-k with the recall that it promises."""
    return 10 * k if searched.index is None else max(k, searched.effort(k).proposals)


def _scored(store: GradientStore) -> str:
    """What scores after re-scoring are: factors of gradients in half precision, or kept so, are not exact."""
    kept, precision = store.manifest["factors"], store.manifest["map"]["precision"]
    rough = [kind for kind in (kept, precision) if kind in HALF]
    return f"{rough[0]}-factor" if kept and rough else "exact"


def _by_factors(store: GradientStore, query: RowBatch, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n_query, len(ids)) sum over checkpoints and layers of (delta . delta')(x . x'), from stored factors."""
    scores = np.zeros((len(query.rows), len(ids)))
    for key, (activations, output_gradients) in store.factors(ids).items():
        mine = query.factors[key]
        products = (mine[1] @ output_gradients.astype(np.float32).T, mine[0] @ activations.astype(np.float32).T)
        scores += products[0].astype(np.float64) * products[1]
    return scores


def _cosines(store: GradientStore, exact: NDArray[Any], query: RowBatch, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Exact scores (n_query, len(ids)) divided by the norms; that of a zero gradient is taken as 1: its cosine is 0."""
    norms = np.sqrt(np.outer(query.self_influence.sum(1), store.self_influence(ids).sum(1)))
    cosines: NDArray[np.float64] = exact / np.where(norms > 0, norms, 1.0)
    return cosines
