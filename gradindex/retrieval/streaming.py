"""Exact scores of all that a store has, piece by piece, while the store may change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreChangedError
from ..gradients import Engine, Geometry
from ..store import GradientStore, asked_again, followed
from .asking import Queries
from .candidates import scan
from .scoring import Scores, by_factors, measured, scored_as, shown, through_model


def streamed(
    store: GradientStore, queries: Queries, geometry: Geometry, computing: Callable[[], AbstractContextManager[Engine]]
) -> Scores:
    """Exact scores of all ids of a store: from its factors where these are exact, else through the model.

    Args:
        store: a complete one.
        queries: the questions.
        geometry: of the store.
        computing: locks the model until the last piece.

    Raises:
        StoreChangedError: rows were removed meanwhile, or became other ones.
    """
    if queries.factors is not None and scored_as(store) == "exact":
        yield from from_factors(store, queries, geometry)
        return
    with computing() as engine:
        for which, ids, products in through_model(engine, queries, store.ids, store.manifest.batch_size):
            args = products, queries.norms[which], ids
            try:
                scores = measured(store, geometry, *args)
            except StoreChangedError:
                scores = asked_again(partial(_measured_later, store, geometry, *args))
            yield which, ids, scores


def against_rows(store: GradientStore, rows: NDArray[np.float32]) -> Scores:
    """Inner products of queries' rows (n_query, dim) with all rows, piece by piece."""
    for ids, scores in scan(store, rows):
        yield slice(0, len(rows)), ids, scores


def from_factors(store: GradientStore, queries: Queries, geometry: Geometry) -> Scores:
    """Scores of all ids of a store that has factors, from these; arguments as of :func:`streamed`."""
    return shown("exact scores", _from_factors(store, queries, geometry), len(queries) * store.n_train)


def _from_factors(store: GradientStore, queries: Queries, geometry: Geometry) -> Scores:
    """Goes on with the shards that a compaction made, where it takes those away that are read."""
    assert queries.factors is not None
    left, fresh = store.ids, True
    while len(left):
        try:
            for which, ids, products in by_factors(store, queries.factors, len(queries), left):
                yield which, ids, measured(store, geometry, products, queries.norms[which], ids)
                left, fresh = left[len(ids) :], True
        except StoreChangedError:
            if not fresh:
                raise
            store, fresh = asked_again(partial(followed, store, left)), False


def _measured_later(
    store: GradientStore,
    geometry: Geometry,
    products: NDArray[Any],
    norms: NDArray[np.float64],
    ids: NDArray[np.int64],
) -> NDArray[Any]:
    return measured(followed(store, ids), geometry, products, norms, ids)
