"""What an index is made of: directions fitted to the rows, and codes of one kind.

Gradient rows are a hard case for inner-product indexes: their norms are heavy-tailed, and most of a query's true
top-k come from the heaviest rows, of which lists made by k-means on raw vectors lose most. Here directions are
clustered on the sphere, and lists are probed by <query, centroid> times the norm that most of a list's rows stay
below, so that a list of heavy rows is looked into first. Where rows spread over very many directions, such as those of
a thousand classes, a row has parts in several, and a list for the largest of them stops short of a high recall. There
a row stands in several lists, or all rows are compared by short codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..choices import IndexKind
from ..errors import ArgumentError
from .kinds import INDEXES, IndexMethod, Rows
from .kinds.base import norms_of
from .library import load_faiss

_OVERSAMPLING, _POWER_ITERATIONS = 16, 3


@dataclass(frozen=True)
class Shape:
    """How an index is made.

    Args:
        kind: ``"flat"``: all rows are compared, a byte a number; ``"ivf"``: the same of the rows of the most promising
            lists; ``"pq"``: all rows are compared, four bits for two numbers (product quantisation after a random
            rotation), by table look-ups of which a processor does 32 or 64 at once; ``"spill"``: four bits for four
            numbers of the rows of the most promising lists, each row in several of them.
        dim: numbers of a row in the index; for ``"pq"`` an even one, for ``"spill"`` a multiple of 8.
        lists: of ``"ivf"`` and ``"spill"``.
        copies: of ``"spill"``, in how many lists each row stands.

    Raises:
        ArgumentError: there is no such kind, or it does not take this ``dim`` or ``copies``.
    """

    kind: IndexKind
    dim: int
    lists: int = 0
    copies: int = 1

    def __post_init__(self) -> None:
        INDEXES.check(self.kind)
        _ = self.method  # which may refuse the numbers

    @property
    def method(self) -> IndexMethod:
        """The kind's implementation, of this shape."""
        return INDEXES[self.kind](self.dim, self.lists, self.copies)

    def bytes_for(self, n_rows: int) -> int:
        """Memory that making an index of so many rows takes at most."""
        return self.method.bytes_for(n_rows)

    def __str__(self) -> str:
        return f"{self.kind} of {self.dim} numbers{self.method.details}"


def made(shape: Shape, rows: Rows) -> Any:
    """A FAISS ``IndexPreTransform`` with inner product; where ``rows`` have no directions yet, such as fit the sample.

    Raises:
        ArgumentError: more directions than a row has numbers, or more lists than there are rows.
    """
    row_dim, method = rows.sample.shape[1], shape.method
    if not 1 <= shape.dim <= row_dim:
        raise ArgumentError(f"dim is {shape.dim}, but must be from 1 to the numbers in a row, {row_dim}.")
    fitted = fitted_directions(rows.sample, shape.dim, rows.seed) if rows.directions is None else rows.directions
    directions = method.directions(fitted, rows.seed)
    faiss, turned = load_faiss(), np.ascontiguousarray(rows.sample @ directions)
    codes = method.make(replace(rows, sample=turned, directions=directions))
    linear = faiss.LinearTransform(row_dim, shape.dim, False)
    faiss.copy_array_to_vector(np.ascontiguousarray(directions.T).ravel(), linear.A)
    linear.is_trained = True
    return faiss.IndexPreTransform(linear, codes)  # which keeps its parts alive


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
    units = sample / norms_of(sample)
    start = np.random.default_rng(seed).standard_normal((sample.shape[1], min(dim + _OVERSAMPLING, sample.shape[1])))
    basis = start.astype(np.float32)
    for _ in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(units.T @ (units @ basis))[0]
    inner = units @ basis
    _, vectors = np.linalg.eigh((inner.T @ inner).astype(np.float64))
    directions: NDArray[np.float32] = np.ascontiguousarray((basis @ vectors[:, ::-1][:, :dim]).astype(np.float32))
    return directions
