"""What of queries can travel: arrays alone, which a search elsewhere needs and which need no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..examples import Sides

# By (checkpoint, layer): of queries that are compared as they are, activations (n_query, d_in) and output gradients
# (n_query, d_out); of others, such as weighted sums of several, the gradients themselves, (n_query, d_out, d_in).
QueryFactors = Mapping[tuple[int, int], Sides | NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Solution:
    """How directions were found.

    Args:
        iterations: of conjugate gradients, at most.
        residuals: (n_query, C) of each query's system at each checkpoint, ||g - (H + lambda) v|| / ||g||.
        passes: over the factors of all training examples at a checkpoint, of all checkpoints and queries.
        seconds: that they took.
    """

    iterations: int
    residuals: NDArray[np.float64]
    passes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.iterations} iterations, relative residual {np.median(self.residuals):.2g} in the middle and "
            f"{self.residuals.max():.2g} at most, {self.passes:,} passes over a checkpoint's factors, "
            f"{self.seconds:.3g} s"
        )


@dataclass(frozen=True, eq=False)
class QueryVectors:
    """Queries as arrays.

    Args:
        rows: (n_query, dim) float32.
        norms: (n_query,) float64, what exact scores are divided by to become cosines.
        factors: see ``QueryFactors``; ``None`` where the store has none.
        fingerprint: of the store's map, which the rows belong to.
        wide: (n_query, C wide) float32 wide rows; ``None`` where the store has none.
    """

    rows: NDArray[np.float32]
    norms: NDArray[np.float64]
    factors: QueryFactors | None
    fingerprint: str
    wide: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def formed(self) -> bool:
        """Whether their factors are whole gradients, which nothing but a matrix holds."""
        return self.factors is not None and any(not isinstance(sides, tuple) for sides in self.factors.values())
