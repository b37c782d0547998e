"""Ask: proponents and opponents from the index, settled by exact scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .building import describe_map
from .errors import ArgumentError, MismatchError
from .factors import Factors
from .gradients import Engine, Precision
from .hits import Hits
from .index import SearchIndex
from .progress import progress
from .projection import Projection
from .rows import RowMaker
from .store import GradientStore
from .task import Task
from .tree import preserved_random_state

Rerank = Literal["exact", "none"]


def exact_scores(
    task: Task,
    items: Sequence[Any],
    ids: NDArray[np.int64] | None = None,
    *,
    role: str = "query",
    precision: Precision = "float32",
    batch_size: int = 256,
) -> NDArray[Any]:
    """Exact TracInCP of training examples for each query, nothing projected.

        TracInCP(z, z') = sum_c eta_c <grad l(w_c; z), grad l(w_c; z')>

    Source: Pruthi et al. 2020 (arXiv:2002.08484), section 3.3.

    Args:
        items: the queries.
        ids: (m,) training ids, by default all.
        role: whether queries are scored with the ``"query"`` or the ``"train"`` loss.
    Returns:
        (n_query, m) in ``precision``, signed; positive = proponent.
    """
    with preserved_random_state(), Engine(task, precision) as engine:
        engine.check_routes([task.train[0], task.train[task.n_train - 1]])
        ids = np.arange(task.n_train, dtype=np.int64) if ids is None else np.asarray(ids, dtype=np.int64)
        return _exact(engine, list(items), ids, role, batch_size)


def _exact(engine: Engine, items: list[Any], ids: NDArray[np.int64], role: str, batch_size: int) -> NDArray[Any]:
    scores = torch.zeros(len(items), len(ids), dtype=engine.dtype, device=engine.device)
    queries: list[dict[int, Factors]] = []
    for checkpoint in range(engine.n_checkpoints):
        found: dict[int, Factors] = {}
        engine.run(checkpoint, items, found.__setitem__, role)
        queries.append(found)
    with progress("exact scores", len(ids), "rows") as advance:
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            batch = [engine.task.train[int(i)] for i in part]
            target = scores[:, start : start + len(part)]
            for checkpoint, found in enumerate(queries):

                def consume(number: int, factors: Factors, q: Any = found, t: Any = target) -> None:
                    if number in q:
                        t += q[number].products(factors)

                engine.run(checkpoint, batch, consume)
            advance(len(part))
    return scores.cpu().numpy()


class Retriever:
    """An open store, its index and its task, ready for queries. Make one with :func:`load`."""

    def __init__(self, store: GradientStore, task: Task) -> None:
        self.store = store
        self.task = task
        stored = store.manifest["map"]
        self._projection = Projection(**stored["projection"])
        self._engine = Engine(task, stored["precision"])
        with preserved_random_state(), self._engine as engine:
            engine.check_routes([task.train[0], task.train[task.n_train - 1]])
        now = describe_map(self._engine, self._projection)
        differing = [name for name in now if now[name] != stored.get(name)]
        if task.n_train != store.n_train:
            differing.append(f"data length ({store.n_train} stored, {task.n_train} now)")
        elif task.data_fingerprint() != store.manifest["data"]["fingerprint"]:
            differing.append("data")
        if differing:
            raise MismatchError(
                f"The task does not match {store.folder}: {', '.join(differing)} differ. "
                "Use the task that the store was built from."
            )
        self._index = SearchIndex.load(store.folder / "index", store.manifest["map_fingerprint"])

    def proponents(self, queries: Any, k: int = 10, **options: Any) -> Hits:
        """The k training examples with the highest scores; options as in :meth:`search`."""
        return self.search(queries, k, opponents=False, **options)

    def opponents(self, queries: Any, k: int = 10, **options: Any) -> Hits:
        """The k training examples with the lowest scores; options as in :meth:`search`."""
        return self.search(queries, k, opponents=True, **options)

    def search(
        self,
        queries: int | Sequence[Any],
        k: int = 10,
        *,
        opponents: bool = False,
        source: Literal["query", "train"] = "query",
        candidates: int | None = None,
        rerank: Rerank = "exact",
    ) -> Hits:
        """Top-k of each query.

        Args:
            queries: positions in ``task.query`` (or ids, with ``source="train"``), or items.
            k: how many, from 1 to n_train.
            candidates: how many the index proposes for exact re-scoring, by default 10 k.
            rerank: ``"exact"``, or ``"none"`` for the index's own estimates.
        Raises:
            ArgumentError: ``k``, a position or an option is out of range.
        """
        n = self.store.n_train
        if not 1 <= k <= n:
            raise ArgumentError(f"k is {k}, but must be between 1 and the number of training examples, {n}.")
        if rerank not in ("exact", "none"):
            raise ArgumentError(f"rerank is {rerank!r}, but must be 'exact' or 'none'.")
        items, names = self._items(queries, source)
        wanted = k if rerank == "none" else min(n, max(k, 10 * k if candidates is None else candidates))
        sign = -1.0 if opponents else 1.0
        with preserved_random_state(), self._engine as engine:
            rows = RowMaker(engine, self._projection).rows(items, names, "query")[0]
            scores, ids = self._index.search(np.asarray(sign * rows, dtype=np.float32), wanted)
            if rerank == "exact":
                union = np.unique(ids)
                exact = sign * _exact(engine, items, union, "query", self.store.manifest["batch_size"])
                scores = np.take_along_axis(exact, np.searchsorted(union, ids), 1)
                order = np.lexsort((ids, -scores), axis=1)[:, :k]
                scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        columns = {name: self.store.column(name)[ids] for name in self.store.columns}
        kind = "opponents" if opponents else "proponents"
        return Hits(ids, sign * scores, kind, "exact" if rerank == "exact" else "projected", tuple(names), columns)

    def _items(self, queries: int | Sequence[Any], source: str) -> tuple[list[Any], list[str]]:
        chosen = [queries] if isinstance(queries, (int, np.integer)) else list(queries)
        if not chosen:
            raise ArgumentError("There are no queries. Give at least one position or item.")
        if not all(isinstance(q, (int, np.integer)) for q in chosen):
            return chosen, [f"item {i}" for i in range(len(chosen))]
        data = self.task.train if source == "train" else self.task.query
        n = self.task.n_train if source == "train" else self.task.n_query
        for q in chosen:
            if data is None or not 0 <= q < n:
                raise ArgumentError(f"There is no {source} example {q}; the task has {n}. Positions start at 0.")
        return [data[int(q)] for q in chosen], [f"{source} {q}" for q in chosen]  # type: ignore[index]  # None refused above


def load(folder: str | os.PathLike[str], task: Task) -> Retriever:
    """Open a store for queries.

    Raises:
        StoreError, IndexFileError: missing, damaged or not complete.
        MismatchError: the task is not the store's; says what differs.
    """
    return Retriever(GradientStore(folder), task)
