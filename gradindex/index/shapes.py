"""What an index is made of: directions fitted to the rows, and codes, all compared or in lists.

Gradient rows are a hard case for inner-product indexes: their norms are heavy-tailed, and most of a query's true
top-k come from the heaviest rows, of which lists made by k-means on raw vectors lose most. Here directions are
clustered on the sphere, and lists are probed by <query, centroid> times the norm that most of a list's rows stay
below, so that a list of heavy rows is looked into first. Where rows spread over very many directions, lists stop short
of a high recall, and all rows are compared by short codes instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..choices import IndexKind
from ..errors import ArgumentError
from . import gpu
from .flat import Blocks
from .library import load_faiss

# The share of a list's rows whose norm stays below what the list is probed by.
_NORM_QUANTILE = 0.9
_OVERSAMPLING, _POWER_ITERATIONS = 16, 3
_KMEANS_ITERATIONS, _ROWS_PER_LIST = 10, 39  # fewer, and FAISS warns
_NUMBERS_A_CODE, _CODE_BITS = 2, 4
# A byte's range goes up to this many times the largest size in the sample; rows beyond it are coded shorter.
_WIDEST = 8


@dataclass(frozen=True)
class Shape:
    """How an index is made.

    Args:
        kind: ``"flat"``: all rows are compared, a byte a number; ``"ivf"``: the same of the rows of the most promising
            lists; ``"pq"``: all rows are compared, four bits for two numbers (product quantisation after a random
            rotation), by table look-ups of which a processor does 32 or 64 at once.
        dim: numbers of a row in the index; for ``"pq"`` an even one.
        lists: of ``"ivf"``.

    Raises:
        ArgumentError: ``dim`` is odd for ``"pq"``.
    """

    kind: IndexKind
    dim: int
    lists: int = 0

    def __post_init__(self) -> None:
        if self.kind == "pq" and self.dim % _NUMBERS_A_CODE:
            raise ArgumentError(f"dim is {self.dim}, but must be even for pq.")

    def bytes_for(self, rows: int) -> int:
        """Memory that making an index of so many rows takes at most: codes and ids, whose arrays grow by doubling."""
        clustering = 8 * _ROWS_PER_LIST * self.lists * self.dim + 12 * rows if self.kind == "ivf" else 0
        return 2 * rows * (self.dim // (4 if self.kind == "pq" else 1) + 8) + clustering


@dataclass(frozen=True)
class Rows:
    """What an index is made of.

    Args:
        sample: (m, dim) rows that directions and codes are fitted to.
        blocks: hands out all ids and rows, piece by piece.
        seed: of what is random.
        gpus: devices that cluster and assign.
    """

    sample: NDArray[np.float32]
    blocks: Callable[[], Blocks]
    seed: int
    gpus: Sequence[int]


def made(shape: Shape, rows: Rows) -> Any:
    """A FAISS ``IndexPreTransform`` with inner product; rows stream, for ``"ivf"`` three times, for ``"flat"`` twice.

    Raises:
        ArgumentError: more directions than a row has numbers, or more lists than there are rows.
    """
    size = rows.sample.shape[1]
    if not 1 <= shape.dim <= size:
        raise ArgumentError(f"dim is {shape.dim}, but must be from 1 to the numbers in a row, {size}.")
    directions = fitted_directions(rows.sample, shape.dim, rows.seed)
    if shape.kind == "pq":  # turned at random, each number holds as much as the others
        turn = np.random.default_rng(rows.seed).standard_normal((shape.dim, shape.dim)).astype(np.float32)
        directions = np.ascontiguousarray(directions @ np.linalg.qr(turn)[0])

    def turned() -> Blocks:
        for ids, some in rows.blocks():
            if len(ids):
                yield ids, np.ascontiguousarray(some @ directions)

    make = {"flat": _flat, "ivf": _norm_aware_lists, "pq": _flat}[shape.kind]
    faiss = load_faiss()
    inner = make(shape, Rows(np.ascontiguousarray(rows.sample @ directions), turned, rows.seed, rows.gpus))
    linear = faiss.LinearTransform(size, shape.dim, False)
    faiss.copy_array_to_vector(np.ascontiguousarray(directions.T).ravel(), linear.A)
    linear.is_trained = True
    return faiss.IndexPreTransform(linear, inner)  # which keeps its parts alive


def fitted_directions(sample: NDArray[np.float32], dim: int, seed: int = 0) -> NDArray[np.float32]:
    """The directions that hold most of unit-normed rows: the top eigenvectors of their second moments.

    No mean is subtracted, for that would change inner products; rows are normed first, for the heavy ones are not
    to decide alone. By subspace iteration (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4).

    Args:
        sample: (m, n) rows.
        dim: how many, at most n.
        seed: of the start.

    Returns:
        (n, dim), orthonormal columns.
    """
    units = sample / _norms(sample)
    start = np.random.default_rng(seed).standard_normal((sample.shape[1], min(dim + _OVERSAMPLING, sample.shape[1])))
    found = start.astype(np.float32)
    for _ in range(_POWER_ITERATIONS):
        found = np.linalg.qr(units.T @ (units @ found))[0]
    inner = units @ found
    _, vectors = np.linalg.eigh((inner.T @ inner).astype(np.float64))
    directions: NDArray[np.float32] = np.ascontiguousarray((found @ vectors[:, ::-1][:, :dim]).astype(np.float32))
    return directions


def _norms(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(m, 1) to divide by: a zero row keeps its zeros."""
    norms: NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norms > 0, norms, np.float32(1))


def _flat(shape: Shape, rows: Rows) -> Any:
    """All rows: a byte a number, or four bits for two numbers."""
    faiss = load_faiss()
    if shape.kind == "pq":
        codes = faiss.IndexPQFastScan(shape.dim, shape.dim // _NUMBERS_A_CODE, _CODE_BITS, faiss.METRIC_INNER_PRODUCT)
        codes.pq.cp.seed = rows.seed + 1
        codes.pq.cp.min_points_per_centroid = 1  # FAISS warns of few, a line for each two numbers
    else:
        codes = faiss.index_factory(shape.dim, "SQ8", faiss.METRIC_INNER_PRODUCT)
    inner = faiss.IndexIDMap2(codes)
    if shape.kind == "pq":
        inner.train(rows.sample)
        for ids, some in rows.blocks():
            inner.add_with_ids(some, ids)
        return inner
    reach = _Reach(rows.sample)
    for _, some in rows.blocks():
        reach.add(some)
    inner.train(reach.ends)
    for ids, some in rows.blocks():
        inner.add_with_ids(reach.within(some), ids)
    return inner


class _Reach:
    """How far each number goes over all rows: bytes that ended where a sample does would cut the heaviest rows short.

    A few enormous rows must not leave all others in a handful of the 256 steps. They are coded in their own direction,
    but shorter, which still puts them before the others.
    """

    def __init__(self, sample: NDArray[np.float32]) -> None:
        self._low, self._high = sample.min(0), sample.max(0)
        self._most = _WIDEST * np.abs(sample).max()

    def add(self, rows: NDArray[np.float32]) -> None:
        rows = self.within(rows)
        self._low, self._high = np.minimum(self._low, rows.min(0)), np.maximum(self._high, rows.max(0))

    def within(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows, enormous ones shortened."""
        sizes = np.maximum(rows.max(1), -rows.min(1))
        if (sizes <= self._most).all():
            return rows
        shorter: NDArray[np.float32] = rows * (self._most / np.maximum(sizes, self._most))[:, None]
        return shorter

    @property
    def ends(self) -> NDArray[np.float32]:
        """(2, dim), what FAISS's bytes take their range from."""
        return np.stack([self._low, self._high])


def _norm_aware_lists(shape: Shape, rows: Rows) -> Any:
    """Lists of rows of about the same direction, probed by <query, centroid> times the norm of the list's rows."""
    faiss = load_faiss()
    spread = _spread(rows.blocks, _ROWS_PER_LIST * shape.lists)
    if not 1 <= shape.lists <= len(spread):
        raise ArgumentError(f"lists is {shape.lists}, but must be from 1 to the number of rows, {len(spread)}.")
    spread /= _norms(spread)
    centroids = gpu.train_centroids(spread, shape.lists, _KMEANS_ITERATIONS, rows.seed, rows.gpus)
    del spread
    finder = gpu.nearest(centroids, rows.gpus)
    assigned, lengths, reach = [], [], _Reach(rows.sample)
    for _, some in rows.blocks():
        reach.add(some)
        assigned.append(finder.search(some, 1)[1][:, 0])  # the norm of a row does not change its nearest direction
        lengths.append(np.linalg.norm(some, axis=1))
    lists = np.concatenate(assigned)
    quantizer = faiss.IndexFlatIP(shape.dim)
    quantizer.add(centroids * _norms_of(lists, np.concatenate(lengths), shape.lists)[:, None])
    inner = faiss.IndexIVFScalarQuantizer(
        quantizer, shape.dim, shape.lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, False
    )
    inner.train(reach.ends)
    start = 0
    for ids, some in rows.blocks():
        mine = np.ascontiguousarray(lists[start : start + len(ids)])
        some, ids = reach.within(some), np.ascontiguousarray(ids)
        inner.add_core(len(ids), faiss.swig_ptr(some), faiss.swig_ptr(ids), faiss.swig_ptr(mine))
        start += len(ids)
    return inner  # which keeps the quantizer alive


def _spread(blocks: Callable[[], Blocks], least: int) -> NDArray[np.float32]:
    """Every 2^i-th row: ``least`` to 2 x ``least`` of them, or all where there are fewer."""
    kept: list[tuple[int, NDArray[np.float32]]] = []  # with the first one's number among those that are kept
    step, seen, count = 1, 0, 0
    for _, rows in blocks():
        part = rows[-seen % step :: step].copy()
        kept.append((-(-seen // step), part))
        seen, count = seen + len(rows), count + len(part)
        while count >= 2 * least:
            kept = [(-(-first // 2), part[first % 2 :: 2].copy()) for first, part in kept]
            step, count = 2 * step, sum(len(part) for _, part in kept)
    return np.concatenate([part for _, part in kept])


def _norms_of(lists: NDArray[np.int64], norms: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """The norm that most of each list's rows stay below: (count,), 0 for an empty list."""
    order = np.lexsort((norms, lists))
    ends = np.searchsorted(lists[order], np.arange(count), side="right")
    starts = np.searchsorted(lists[order], np.arange(count), side="left")
    places = starts + np.floor(_NORM_QUANTILE * np.maximum(ends - starts - 1, 0)).astype(np.int64)
    return np.where(ends > starts, norms[order][np.minimum(places, len(norms) - 1)], 0).astype(np.float32)
