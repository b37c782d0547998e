"""Exact scores of training examples: from stored factors, or through the model; never all in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..choices import Precision, Source
from ..errors import ArgumentError, NonFiniteGradientError, joined_names, left_out
from ..examples import Examples
from ..gradients import HALF, Engine, Geometry, Products, check_queries, check_routes
from ..index import paired_products
from ..lengths import Window, window_rows, windows
from ..progress import progress
from ..store import GradientStore, comparable, runs, wide_products
from ..task import Task
from ..tree import preserved_random_state
from .asking import Queries, find
from .candidates import pieces
from .vectors import QueryFactors, QueryVectors

# Memory for the gradients of queries while they are compared; more queries go in turns.
_QUERY_BYTES = 2 << 30
# Memory for factors that were gathered, and numbers of scores, at once.
_FACTOR_BYTES, _SCORES = 64 << 20, 4 << 20
# Wide rows, as numbers, whose codes are gathered at once.
_WIDE_BYTES = 256 << 20
# Pairs of a query and a training example that are scored at once.
_PAIRS = 1 << 20
# Scores that are kept while weights are held one checkpoint at a time.
_HELD_SCORES = 1 << 26
_SCORE_BYTES = 8

# Which queries, ids (m,), and scores (of these queries, m).
Scores = Iterator[tuple[slice, NDArray[np.int64], NDArray[Any]]]


def exact_scores(
    task: Task,
    items: Any,
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
        items: the queries, as the task's data sets hand them out, or positions in the one that ``role`` names.
        ids: (m,) training ids, by default all that the task does not skip.
        role: whether queries are scored with the ``"query"`` or the ``"train"`` loss.
        precision: of the gradients and scores; those of half precision are not exact.
        device: where to compute, by default where the model is.
        batch_size: training examples per pass, by default as many, up to 256, as the free memory holds; with 1, queries
            go one by one as well.

    Returns:
        (n_query, m) in ``precision``, signed; positive = proponent.

    Raises:
        ArgumentError: there are no queries, or an id is out of range.
        GradIndexError: the task cannot be used as it is.
    """
    items = list(find(task, items, role).items)
    ids = task.train_ids if ids is None else runs.as_ids(ids)
    wrong = ids[(ids < 0) | (ids >= task.n_train)]
    if len(wrong):
        raise ArgumentError(f"There is no training id {wrong[0]}; ids go from 0 to {task.n_train - 1}.")
    task.check_reads_repeat(ids)
    with Engine(task, precision, device, alone=batch_size == 1) as engine, preserved_random_state():
        check_routes(engine, ids)
        check_queries(engine, items, [f"Query {i} of {len(items)}" for i in range(len(items))], role)
        count = at_once(engine)
        turns = (
            (slice(start, min(start + count, len(items))), Products(engine, items[start : start + count], role))
            for start in range(0, len(items), count)
        )
        dtype = np.float64 if engine.dtype == torch.float64 else np.float32
        return joined(_compared(engine, turns, len(items), ids, batch_size), len(items), len(ids), dtype)


def through_model(engine: Engine, queries: Queries, ids: NDArray[np.int64], batch_size: int | None) -> Scores:
    """Exact scores by a pass over the training examples.

    Args:
        engine: entered, its routes checked; it must stay so until the last piece.
        queries: the questions.
        ids: training ids.
        batch_size: training examples per pass, by default as many as the free memory holds.

    Raises:
        NonFiniteGradientError: names the example.
    """
    return _compared(engine, queries.products(engine, at_once(engine)), len(queries), ids, batch_size)


def at_once(engine: Engine) -> int:
    """How many queries' whole gradients may be in memory."""
    each = sum(layer.size for layer in engine.layers) * engine.n_checkpoints * engine.dtype.itemsize
    return max(1, _QUERY_BYTES // each)


def joined(scores: Scores, n_query: int, n: int, dtype: Any) -> NDArray[Any]:
    """All pieces side by side: (n_query, n)."""
    whole, filled = np.empty((n_query, n), dtype), [0] * n_query
    for queries, ids, piece in scores:
        start = filled[queries.start]
        whole[queries, start : start + len(ids)] = piece
        filled[queries] = [start + len(ids)] * (queries.stop - queries.start)
    return whole


def _compared(
    engine: Engine,
    turns: Iterator[tuple[slice, Products]],
    n_query: int,
    ids: NDArray[np.int64],
    batch_size: int | None,
) -> Scores:
    with progress("exact scores", len(ids) * n_query, "scores") as advance:
        for queries, products in turns:
            size = batch_size or products.pick_batch_size(len(ids))
            for examples, found in _scored(engine, products, ids, size, queries.stop - queries.start):
                scores = found.cpu().numpy()
                _refuse_non_finite(scores, queries, n_query, examples, products)
                yield queries, examples.ids, scores
                advance(scores.size)


def _scored(
    engine: Engine, products: Products, ids: NDArray[np.int64], size: int, n_query: int
) -> Iterator[tuple[Examples, Tensor]]:
    """Training examples in the order of ids, and their scores (n_query, n)."""
    if not engine.states.one_at_a_time:
        for window in _windows(engine.task, ids, size, n_query):
            yield window.examples, _of_window(products.of, window)
        return
    # Many examples at one checkpoint, then the same at the next.
    for some in pieces(ids, max(size, _HELD_SCORES // n_query)):
        *before, last = range(engine.n_checkpoints)
        sums: dict[int, Tensor] = defaultdict(lambda: torch.zeros(()))
        for checkpoint in before:
            for number, window in enumerate(_windows(engine.task, some, size, n_query)):
                sums[number] = sums[number] + _of_window(partial(products.at, checkpoint), window).cpu()
        for number, window in enumerate(_windows(engine.task, some, size, n_query)):
            yield window.examples, sums[number] + _of_window(partial(products.at, last), window).cpu()


def _windows(task: Task, ids: NDArray[np.int64], size: int, n_query: int) -> Iterator[Window]:
    return windows(_read(task, ids, size), size, window_rows(size, _SCORE_BYTES * n_query))


def _of_window(scored: Callable[[Examples], Tensor], window: Window) -> Tensor:
    """Scores (n_query, n) of its examples, as they were read."""
    scores, places = torch.cat([scored(examples) for examples in window.batches()], 1), window.places
    return scores if places is None else scores[:, torch.from_numpy(places).to(scores.device)]


def _read(task: Task, ids: NDArray[np.int64], size: int) -> Iterator[Examples]:
    for piece in pieces(ids, size):
        yield task.read(piece)


def _refuse_non_finite(
    scores: NDArray[Any], queries: slice, n_query: int, examples: Examples, products: Products
) -> None:
    bad = ~np.isfinite(scores)
    if bad.any():
        query, column = np.argwhere(bad)[0]
        whole = not products.finite(int(query))
        names = [f"Query {queries.start + query} of {n_query}"] if whole else [examples.names[column]]
        raise NonFiniteGradientError(f"{joined_names(names)} has a NaN or infinite gradient. {left_out(names)}")


def shown(label: str, scores: Scores, total: int) -> Scores:
    """The same, with progress: ``total`` scores are to come."""
    with progress(label, total, "scores") as advance:
        for piece in scores:
            yield piece
            advance(piece[2].size)


def by_factors(store: GradientStore, factors: QueryFactors, n_query: int, ids: NDArray[np.int64]) -> Scores:
    """Exact scores from stored factors: sum over checkpoints and layers of (delta . delta')(x . x').

    Args:
        store: one that has factors.
        factors: of the queries, see :class:`QueryVectors`.
        n_query: how many questions.
        ids: training ids that have a row.
    """
    for piece in pieces(ids, _factors_at_once(store, n_query)):
        scores = np.zeros((n_query, len(piece)))
        for _, share in _factor_shares(store, factors, piece):
            scores += share
        yield slice(0, n_query), piece, scores


def by_wide_rows(
    store: GradientStore, vectors: QueryVectors, query: int, ids: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Estimates of exact scores from wide rows, and their standard errors: (2, m).

        sum_c <w_c(z), w_c(q)>, with a variance of about sum_c (||w_c(z)||^2 ||w_c(q)||^2 + <w_c(z), w_c(q)>^2) / wide

    Args:
        store: one that has wide rows.
        vectors: the queries.
        query: which of them.
        ids: (m,) training ids that have a row.
    """
    assert vectors.wide is not None
    wide, own = store.manifest.wide or 1, vectors.wide[query]
    squares = np.square(own, dtype=np.float64).reshape(store.n_checkpoints, -1).sum(1)
    found = [np.empty((2, 0))]
    for some in pieces(ids, _WIDE_BYTES // own.nbytes):
        coded = store.wide(some)
        products = wide_products(coded, own)
        variances = np.square(coded.norms, dtype=np.float64) @ squares + np.square(products).sum(1)
        found.append(np.stack([products.sum(1), np.sqrt(variances / wide)]))
    return np.concatenate(found, 1)


def of_candidates(
    store: GradientStore, factors: QueryFactors, lists: Sequence[NDArray[np.int64]]
) -> list[NDArray[np.float64]]:
    """Exact scores of each query's own candidates, from factors where they lie: what is stored as it is, is not copied.

    Args:
        store: one that has factors.
        factors: of the queries, each a question of its own.
        lists: for each query, training ids that have a row.

    Returns:
        For each query its candidates' scores.
    """
    counts = [len(ids) for ids in lists]
    asked = {key: [np.ascontiguousarray(side, dtype=np.float32) for side in sides] for key, sides in factors.items()}
    every, scores = np.repeat(np.arange(len(lists)), counts), np.zeros(sum(counts))
    sums = {key: [side.sum(1, dtype=np.float64) for side in sides] for key, sides in asked.items()}
    copied = store.manifest.factors in HALF or store.manifest.packing
    at_once = min(_PAIRS, _factors_at_once(store, 1)) if copied else _PAIRS
    for start, ids in zip(range(0, len(every), at_once), pieces(np.concatenate(lists), at_once), strict=True):
        queries, into = every[start : start + len(ids)], scores[start : start + len(ids)]
        for places, positions, stored in store.factors_in_place(ids):
            of_queries, total = queries[places], np.zeros(len(places))
            products: list[NDArray[Any]] = []
            for names, rows, at in comparable(stored, positions):
                pairs = [(asked[key][side], row.numbers) for (key, side), row in zip(names, rows, strict=True)]
                found = zip(names, rows, paired_products(of_queries, at, pairs), strict=True)
                products += [row.products(some, at, sums[key][side][of_queries]) for (key, side), row, some in found]
            for x, delta in zip(products[::2], products[1::2], strict=True):  # in one order, however many there are
                total += np.multiply(x, delta, dtype=np.float64)
            into[places] = total
    return np.split(scores, np.cumsum(counts)[:-1])


def _factors_at_once(store: GradientStore, n_query: int) -> int:
    sides = sum(layer.d_in + layer.d_out for layer in store.manifest.map.layers)
    return max(1, min(_FACTOR_BYTES // (4 * sides * store.n_checkpoints), _SCORES // n_query))


def _factor_shares(
    store: GradientStore, factors: QueryFactors, ids: NDArray[np.int64]
) -> Iterator[tuple[tuple[int, int], NDArray[Any]]]:
    """By (checkpoint, layer): (n_query, len(ids)) float32, or float64 of formed gradients."""
    for key, (activations, output_gradients) in store.factors(ids).items():
        x, delta = (side.astype(np.float32, copy=False) for side in (activations, output_gradients))
        of_queries = factors.get(key)
        if isinstance(of_queries, tuple):
            share = of_queries[1] @ delta.T
            share *= of_queries[0] @ x.T  # in place: large batches are bound by memory
            yield key, share
        elif of_queries is not None:  # delta^T M x, with the matrix M of a query
            yield key, np.stack([np.einsum("mr,mr->m", delta, x @ each.T, dtype=np.float64) for each in of_queries])


def shares(
    store: GradientStore, queries: Queries, ids: NDArray[np.int64], engine: Engine | None
) -> NDArray[np.float64]:
    """Exact scores by checkpoint and layer: (n_query, len(ids), C, L) float64.

    Args:
        store: a complete one.
        queries: the questions.
        ids: training ids that have a row.
        engine: entered, to go through the model; ``None`` where stored factors do.

    Raises:
        NonFiniteGradientError: names the example.
    """
    shape = (len(queries), len(ids), store.n_checkpoints, len(store.manifest.map.layers))
    split = np.zeros(shape)
    if engine is None:
        assert queries.factors is not None
        start = 0
        for piece in pieces(ids, _factors_at_once(store, len(queries))):
            for (checkpoint, layer), share in _factor_shares(store, queries.factors, piece):
                split[:, start : start + len(piece), checkpoint, layer] = share
            start += len(piece)
        return split
    for which, products in queries.products(engine, at_once(engine)):
        start = 0
        size = store.manifest.batch_size
        for examples in _read(engine.task, ids, size):
            scores = products.split(examples).cpu().numpy().swapaxes(0, 1)
            _refuse_non_finite(scores.sum((2, 3)), which, len(queries), examples, products)
            split[which, start : start + len(examples)] = scores
            start += len(examples)
    return split


def row_shares(store: GradientStore, rows: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Inner products of queries' rows (n_query, dim) with those of some ids, by checkpoint: (n_query, m, C, 1)."""
    blocks = rows.reshape(len(rows), store.n_checkpoints, -1)
    split = np.empty((len(rows), len(ids), store.n_checkpoints, 1))
    start = 0
    for some in pieces(ids, _WIDE_BYTES // (8 * store.dim)):
        theirs = store.rows(some).reshape(len(some), store.n_checkpoints, -1)
        split[:, start : start + len(some), :, 0] = np.einsum("qcd,mcd->qmc", blocks, theirs, dtype=np.float64)
        start += len(some)
    return split


def measured(
    store: GradientStore,
    geometry: Geometry,
    products: NDArray[np.float64],
    norms: NDArray[np.float64],
    ids: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Exact scores as a store measures, such as cosines where its rows have unit norm.

    Args:
        store: a complete one.
        geometry: of the store.
        products: (n_query, m, ...) exact inner products, or shares of them.
        norms: (n_query,) of the queries.
        ids: (m,) training ids that have a row.
    """
    return geometry.scores(products, norms, lambda: store.self_influence(ids))


def scored_as(store: GradientStore) -> str:
    """What scores after re-scoring are: factors of gradients in half precision, or kept so, are not exact."""
    factor_type, precision = store.manifest.factors, store.manifest.map.precision
    rough = [kind for kind in (factor_type, precision) if kind in HALF]
    return f"{rough[0]}-factor" if factor_type and rough else "exact"
