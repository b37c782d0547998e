"""Queries whitened by the second moment of whole gradients, and not of their rows: conjugate gradients on factors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..choices import Aggregate
from ..errors import ArgumentError, OutOfMemoryError, StoreError, as_whole
from ..memory import free_bytes
from ..progress import progress
from ..store import GradientStore
from .asking import Queries, group_of
from .curvature import EigenBases, StoredGradients
from .vectors import QueryFactors, Solution
from .whitening import checked_damping

DEFAULT_ITERATIONS = 5
# Memory for what an iteration keeps of queries, and the most of them that share a pass.
_STATE_BYTES, _TOGETHER = 1 << 30, 64
_KEPT_BY_QUERY = 7  # vectors
# Directions among which what preconditions is whole (docs/whitening.md has what they save).
_LEADING = 1024
# Residuals that single precision does not get below, and standard deviations that are rounding, as shares.
_CONVERGED, _EQUAL = 1e-6, 1e-5

# What makes of vectors (b, size) as many others.
Product = Callable[[NDArray[np.float32]], NDArray[np.float32]]
# Some queries, their directions by (checkpoint, layer) (b, d_out, d_in), relative residuals (b, C), and passes.
Directions = Iterator[tuple[slice, dict[tuple[int, int], NDArray[np.float32]], NDArray[np.float64], int]]


class ExactWhitening:
    """Directions of queries, for each checkpoint c, with the gradients g_c of the model and no projection.

        v_c = (H_c + lambda_c I)^-1 g_c(q) / std_z <g_c(z), (H_c + lambda_c I)^-1 g_c(q)>

    with H_c the mean over all training examples z of g_c(z) g_c(z)^T mean(||g_c||) / ||g_c(z)||, lambda_c = damping
    trace(H_c), and gradients that have sqrt(eta_c) in them. Inner products of v_c with training gradients, added up
    over checkpoints, are the scores. A checkpoint whose scores are all equal counts nothing, as does a query of zeros.

    Found by conjugate gradients, preconditioned by EK-FAC of the same H_c, whole among its leading directions
    (:class:`EigenBases`). An iteration is a pass over a checkpoint's stored factors, which some queries share; another
    one tells residuals and standard deviations.

    Args:
        store: one that has factors; they are read four times.
        damping: see above; positive, by default as in :class:`Whitening`.
        iterations: at least 1, by default 5. What has converged in single precision ends before.

    Raises:
        ArgumentError: ``damping`` or ``iterations`` is out of range.
        StoreError: the store has no factors.
    """

    def __init__(self, store: GradientStore, damping: float | None = None, iterations: int | None = None) -> None:
        self._damping, self.iterations = checked_damping(damping), checked_iterations(iterations)
        if not store.has_factors:
            raise StoreError(
                f"{store.folder} has no factors, and exact whitening is made of them. Build a store with "
                "factors='float32', or ask with geometry='whitened'."
            )
        self._checkpoints = list[tuple[StoredGradients, NDArray[np.float64], float, Product]]()
        with progress("curvature of stored factors", store.n_checkpoints, "checkpoints") as advance:
            for checkpoint in range(store.n_checkpoints):
                self._checkpoints.append(self._curvature(StoredGradients(store, checkpoint)))
                advance(1)

    def _curvature(self, gradients: StoredGradients) -> tuple[StoredGradients, NDArray[np.float64], float, Product]:
        """Gradients, their weights in H, lambda, and what preconditions."""
        lengths = gradients.lengths()
        mean = lengths.mean()
        weights = np.divide(mean / len(lengths), lengths, out=np.zeros_like(lengths), where=lengths > 0)
        ridge = self._damping * float(mean**2) or 1.0  # the trace of H; of zeros, any map gives zero
        bases = EigenBases(gradients, weights, _LEADING)
        return gradients, weights, ridge, bases.inverse([ridge] * len(gradients.shapes))

    def solved(self, queries: Queries, aggregate: Aggregate | None = None) -> Queries:
        """Queries that were prepared one by one, with directions instead of their gradients.

        Args:
            queries: with factors, and rows that are whitened.
            aggregate: ``"sum"`` or ``"mean"`` makes one question of all of them.

        Raises:
            OutOfMemoryError: there is no room for all directions.
        """
        assert queries.factors is not None
        started, count, passes = time.perf_counter(), len(queries), 0
        name, weight = ("", 1.0) if aggregate is None else group_of(queries.examples, aggregate)
        found = self._room(count if aggregate is None else 1)
        residuals = np.zeros((count, len(self._checkpoints)))
        for which, directions, residuals[which], taken in self.directions(queries.factors, count):
            passes += taken
            for key, of_layer in directions.items():
                if aggregate is None:
                    found[key][which] = of_layer
                else:
                    found[key][0] += weight * of_layer.sum(0)
        solution = Solution(self.iterations, residuals, passes, time.perf_counter() - started)
        vectors = replace(queries.vectors, factors=found)
        if aggregate is None:
            return replace(queries, vectors=vectors, solution=solution)
        row = weight * queries.rows.sum(0, keepdims=True, dtype=np.float64)
        vectors = replace(vectors, rows=row.astype(np.float32), norms=np.ones(1))
        weights = np.full(count, weight)
        return replace(queries, names=(name,), vectors=vectors, weights=weights, solution=solution)

    def _room(self, count: int) -> dict[tuple[int, int], NDArray[np.float32]]:
        """For so many directions: by (checkpoint, layer) (count, d_out, d_in), of zeros."""
        needed, free = 4 * count * sum(gradients.size for gradients, *_ in self._checkpoints), free_bytes()
        if needed > free:
            raise OutOfMemoryError(
                f"The directions of {count:,} queries take {needed / 2**30:.3g} GiB, but {free / 2**30:.3g} GiB are "
                "free. Prepare fewer queries at a time."
            )
        room = dict[tuple[int, int], NDArray[np.float32]]()
        for gradients, *_ in self._checkpoints:
            room |= gradients.as_factors(np.zeros((count, gradients.size), dtype=np.float32))
        return room

    def directions(self, factors: QueryFactors, n_query: int) -> Directions:
        """Directions of some queries after others, see the class.

        Args:
            factors: of queries that are questions of their own.
            n_query: how many.
        """
        largest = max(gradients.size for gradients, *_ in self._checkpoints)
        together = max(1, min(_TOGETHER, _STATE_BYTES // (4 * _KEPT_BY_QUERY * largest)))
        with progress("directions of queries", n_query * len(self._checkpoints), "systems") as advance:
            for start in range(0, n_query, together):
                which = slice(start, min(start + together, n_query))
                found, residuals, passes = dict[tuple[int, int], NDArray[np.float32]](), [], 0
                for gradients, weights, ridge, precondition in self._checkpoints:
                    asked = gradients.of_queries(factors, which)
                    vectors, of_each, taken = self._direction(gradients, weights, ridge, precondition, asked)
                    found |= gradients.as_factors(vectors)
                    residuals.append(of_each)
                    passes += taken
                    advance(len(asked))
                yield which, found, np.stack(residuals, 1), passes

    def _direction(
        self,
        gradients: StoredGradients,
        weights: NDArray[np.float64],
        ridge: float,
        precondition: Product,
        asked: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], int]:
        """Directions (b, size) of some queries at one checkpoint, their residuals (b,), and how many passes."""
        solved, iterations = conjugate_gradients(
            lambda vectors: gradients.moment(vectors, weights) + np.float32(ridge) * vectors,
            precondition,
            asked,
            self.iterations,
        )
        sums, squares = np.zeros(len(asked)), np.zeros(len(asked))

        def seen(scores: NDArray[np.float32]) -> None:
            sums[:] += scores.sum(1, dtype=np.float64)
            squares[:] += np.einsum("qm,qm->q", scores, scores, dtype=np.float64)

        left = asked - gradients.moment(solved, weights, seen) - np.float32(ridge) * solved
        n = len(weights)
        variances = squares / n - (sums / n) ** 2
        equal = variances <= _EQUAL**2 * squares / n
        scales = np.where(equal, 0, 1 / np.sqrt(np.where(equal, 1, variances)))
        return solved * scales[:, None].astype(np.float32), _shares(_dots(left, left), asked), iterations + 1


def conjugate_gradients(
    product: Product,
    precondition: Product,
    right: NDArray[np.float32],
    iterations: int,
) -> tuple[NDArray[np.float32], int]:
    """Solve a positive definite system for several right sides (b, size) by preconditioned conjugate gradients.

    Args:
        product: of vectors (b, size) with the system.
        precondition: of vectors with what is like the system's inverse, positive definite.
        right: the right sides; of zeros, the solution is zero.
        iterations: how many at most; what has converged in single precision ends before.

    Returns:
        Solutions (b, size), and how many iterations it took.
    """
    solved, left = np.zeros_like(right), right.copy()
    turned = precondition(left)
    direction, size = turned.copy(), _dots(left, turned)
    for done in range(iterations):
        if (_shares(_dots(left, left), right) <= _CONVERGED).all():
            return solved, done
        moved = product(direction)
        step = _ratio(size, _dots(direction, moved))[:, None]
        solved += step * direction
        left -= step * moved
        turned = precondition(left)
        former, size = size, _dots(left, turned)
        direction = turned + _ratio(size, former)[:, None] * direction
    return solved, iterations


def _dots(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    dots: NDArray[np.float64] = np.einsum("bp,bp->b", one, other, dtype=np.float64)
    return dots


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float32]:
    """0 where nothing is left to divide by."""
    found = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return found.astype(np.float32)


def _shares(squares: NDArray[np.float64], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Norms as shares of those of the right sides, 0 for right sides of zeros."""
    whole = _dots(right, right)
    return np.sqrt(np.divide(squares, whole, out=np.zeros_like(squares), where=whole > 0))


def checked_iterations(iterations: int | None) -> int:
    """How many iterations, if a system can be solved with them.

    Raises:
        ArgumentError: below 1, or no whole number.
    """
    asked = DEFAULT_ITERATIONS if iterations is None else as_whole("iterations", iterations)
    if asked < 1:
        raise ArgumentError(f"iterations is {asked}, but must be at least 1, such as {DEFAULT_ITERATIONS}.")
    return asked
