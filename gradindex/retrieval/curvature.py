"""Curvature from stored factors: products with second moments of whole gradients, and their eigenbases (EK-FAC).

Vectors are flat: the gradients of all layers at one checkpoint side by side, each as a matrix whose rows belong to the
layer's shorter side, so that what is between two products of matrices stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..store import GradientStore
from .candidates import pieces
from .vectors import QueryFactors

# Memory for factors that are read, and numbers between two products of matrices, at once.
_FACTOR_BYTES, _BETWEEN = 64 << 20, 4 << 20
# A side with more numbers has no eigenbasis: to find it would take minutes, and room for the square of these.
WIDEST = 4096

# For each layer the shorter and the longer sides of some examples: (m, short) and (m, long).
SidesOfLayers = list[tuple[NDArray[np.float32], NDArray[np.float32]]]


class StoredGradients:
    """Whole gradients of a store's training examples at one checkpoint, read from its factors piece by piece.

    Args:
        store: one that has factors.
        checkpoint: which.

    Attributes:
        ids: (n,) of the examples, in the order of everything that is by example.
        size: how many numbers a gradient has.
    """

    def __init__(self, store: GradientStore, checkpoint: int) -> None:
        self._store, self._checkpoint = store, checkpoint
        self.ids = store.ids
        layers = store.manifest.map.layers
        # Whether a layer's activations are its shorter side, so that its matrix is transposed.
        self._turned = [layer.d_in < layer.d_out for layer in layers]
        self.shapes = [tuple(sorted((layer.d_out, layer.d_in))) for layer in layers]
        ends = np.cumsum([short * long for short, long in self.shapes]).tolist()
        self.size = ends[-1]
        self._spans = [slice(end - short * long, end) for end, (short, long) in zip(ends, self.shapes, strict=True)]

    def each(self, n_query: int = 1) -> Iterator[tuple[slice, SidesOfLayers]]:
        """The factors of some examples after others: where they are among all, and both sides of each layer."""
        numbers, short = sum(map(sum, self.shapes)), max(short for short, _ in self.shapes)
        start = 0
        for some in pieces(self.ids, min(_FACTOR_BYTES // (4 * numbers), _BETWEEN // (n_query * short))):
            found = self._store.factors(some, self._checkpoint)
            yield (
                slice(start, start + len(some)),
                [self._ordered(layer, *found[self._checkpoint, layer]) for layer in range(len(self.shapes))],
            )
            start += len(some)

    def _ordered(
        self, layer: int, x: NDArray[np.floating], delta: NDArray[np.floating]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        sides = (x, delta) if self._turned[layer] else (delta, x)
        short, long = (side.astype(np.float32, copy=False) for side in sides)
        return short, long

    def lengths(self) -> NDArray[np.float64]:
        """(n,) norms of the gradients."""
        squares = np.zeros(len(self.ids))
        for places, sides in self.each():
            for short, long in sides:
                squares[places] += _squares(short) * _squares(long)
        return np.sqrt(squares)

    def products(self, vectors: NDArray[np.float32]) -> Iterator[tuple[slice, SidesOfLayers, NDArray[np.float32]]]:
        """Inner products (q, m) of vectors (q, size) with some gradients after others."""
        matrices = self.matrices(vectors)
        for places, sides in self.each(len(vectors)):
            total = np.zeros((len(vectors), places.stop - places.start), dtype=np.float32)
            for matrix, (short, long) in zip(matrices, sides, strict=True):
                between = (matrix.reshape(-1, matrix.shape[2]) @ long.T).reshape(*matrix.shape[:2], len(long))
                between *= short.T
                total += between.sum(1)
            yield places, sides, total

    def moment(
        self,
        vectors: NDArray[np.float32],
        weights: NDArray[np.float64],
        seen: Callable[[NDArray[np.float32]], None] | None = None,
    ) -> NDArray[np.float32]:
        """sum_z weights_z g_z <g_z, v> for each vector v: (q, size), in one pass.

        Args:
            vectors: (q, size).
            weights: (n,).
            seen: gets the inner products (q, m), some after others.
        """
        total = np.zeros_like(vectors)
        for places, sides, scores in self.products(vectors):
            if seen is not None:
                seen(scores)
            scores = scores * weights[places].astype(np.float32)
            for span, (rows, columns), (short, long) in zip(self._spans, self.shapes, sides, strict=True):
                between = scores[:, None] * short.T  # (q, short, m)
                share = between.reshape(-1, len(long)) @ long
                total[:, span] += share.reshape(len(vectors), rows * columns)
        return total

    def matrices(self, vectors: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Vectors (q, size) layer by layer: (q, short, long)."""
        return [vectors[:, span].reshape(-1, *shape) for span, shape in zip(self._spans, self.shapes, strict=True)]

    def joined(self, matrices: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """What :meth:`matrices` took apart."""
        return np.concatenate([matrix.reshape(len(matrix), -1) for matrix in matrices], 1)

    def of_queries(self, factors: QueryFactors, which: slice) -> NDArray[np.float32]:
        """The gradients of some queries as vectors: (q, size)."""
        found = []
        for layer in range(len(self.shapes)):
            x, delta = (np.asarray(side[which]) for side in factors[self._checkpoint, layer])
            short, long = self._ordered(layer, x, delta)
            found.append(short[:, :, None] * long[:, None])
        return self.joined(found)

    def as_factors(self, vectors: NDArray[np.float32]) -> dict[tuple[int, int], NDArray[np.float32]]:
        """Vectors (q, size) as formed gradients: by (checkpoint, layer) (q, d_out, d_in)."""
        return {
            (self._checkpoint, layer): np.ascontiguousarray(matrix.swapaxes(1, 2) if turned else matrix)
            for layer, (matrix, turned) in enumerate(zip(self.matrices(vectors), self._turned, strict=True))
        }


class EigenBases:
    """The second moment of gradients in Kronecker-factored eigenbases with corrected eigenvalues (EK-FAC).

        sum_z w_z g_z g_z^T ~ (U_B kron U_A) diag(sum_z w_z (U_B^T delta_z)^2 (U_A^T x_z)^2) (U_B kron U_A)^T

    layer by layer, with the eigenvectors U_A of sum_z w_z x_z x_z^T and U_B of sum_z w_z delta_z delta_z^T. A side of
    more than ``WIDEST`` numbers keeps its own axes. Among the ``leading`` directions of the largest eigenvalues of all
    layers, the second moment is whole instead of diagonal.

    Source: George et al. 2018 (arXiv:1806.03884); Grosse et al. 2023 (arXiv:2308.03296), section 3.1.

    Args:
        gradients: of the training examples, read twice, or thrice where there are leading directions.
        weights: (n,) w_z.
        leading: how many; none for EK-FAC as it is known.

    Attributes:
        values: for each layer the eigenvalues, (short, long).
    """

    def __init__(self, gradients: StoredGradients, weights: NDArray[np.float64], leading: int = 0) -> None:
        self._gradients = gradients
        sums = [[np.zeros((n, n)) if n <= WIDEST else None for n in shape] for shape in gradients.shapes]
        for places, sides in gradients.each():
            roots = np.sqrt(weights[places])[:, None]
            for totals, pair in zip(sums, sides, strict=True):
                for total, side in zip(totals, pair, strict=True):
                    if total is not None:
                        weighted = side * roots
                        total += weighted.T @ weighted
        self._bases = [[None if total is None else _eigenvectors(total) for total in totals] for totals in sums]
        self.values = [np.zeros(shape) for shape in gradients.shapes]
        for places, turned in self._turned():
            for values, (short, long) in zip(self.values, turned, strict=True):
                squares = np.square(short) * weights[places, None].astype(np.float32)
                values += squares.T @ np.square(long)
        flat = np.concatenate([values.ravel() for values in self.values])
        self._leading = np.sort(np.argsort(-flat, kind="stable")[:leading])
        self._moment = self._whole(weights)

    def _turned(self) -> Iterator[tuple[slice, SidesOfLayers]]:
        """Sides of some examples after others, in the eigenbases."""
        for places, sides in self._gradients.each():
            pairs = zip(sides, self._bases, strict=True)
            yield places, [(_in_basis(short, left), _in_basis(long, right)) for (short, long), (left, right) in pairs]

    def _whole(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The second moment of the leading directions."""
        total, start = np.zeros((len(self._leading),) * 2), 0
        if not len(self._leading):
            return total
        chosen = []  # of each layer the rows and columns of its leading directions
        for rows, columns in self._gradients.shapes:
            mine = self._leading[(self._leading >= start) & (self._leading < start + rows * columns)] - start
            chosen.append(np.unravel_index(mine, (rows, columns)))
            start += rows * columns
        for places, turned in self._turned():
            pairs = zip(turned, chosen, strict=True)
            parts = [short[:, rows] * long[:, columns] for (short, long), (rows, columns) in pairs]
            numbers = np.concatenate(parts, 1).astype(np.float64)
            numbers *= np.sqrt(weights[places])[:, None]
            total += numbers.T @ numbers
        return total

    def inverse(self, ridges: Sequence[float]) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """What makes (E + ridge)^-1 v of each of (q, size) vectors v; zero where neither E nor the ridge is anything.

        Args:
            ridges: one for each layer; positive where there are leading directions.
        """
        damped = [values + ridge for values, ridge in zip(self.values, ridges, strict=True)]
        shares = np.concatenate([
            np.divide(1, each, out=np.zeros_like(each), where=each > 0).ravel() for each in damped
        ]).astype(np.float32)  # fmt: skip
        of_each = np.repeat(ridges, [values.size for values in self.values])
        whole = np.linalg.inv(self._moment + np.diag(of_each[self._leading])).astype(np.float32)

        def solved(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
            turned = self._rotated(vectors)
            leading = turned[:, self._leading] @ whole
            turned *= shares
            turned[:, self._leading] = leading
            return self._rotated(turned, back=True)

        return solved

    def _rotated(self, vectors: NDArray[np.float32], back: bool = False) -> NDArray[np.float32]:
        """Vectors (q, size) in the eigenbases, or back from there."""
        found = []
        for matrix, (left, right) in zip(self._gradients.matrices(vectors), self._bases, strict=True):
            if left is not None:
                matrix = (left if back else left.T) @ matrix
            found.append(matrix if right is None else matrix @ (right.T if back else right))
        return self._gradients.joined(found)


def _in_basis(side: NDArray[np.float32], basis: NDArray[np.float32] | None) -> NDArray[np.float32]:
    return side if basis is None else side @ basis


def _squares(side: NDArray[np.float32]) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.einsum("md,md->m", side, side, dtype=np.float64)
    return squares


def _eigenvectors(moment: NDArray[np.float64]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = torch.linalg.eigh(torch.from_numpy(moment)).eigenvectors.float().numpy()
    return found
