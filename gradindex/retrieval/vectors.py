"""What of queries can travel: arrays alone, which a search elsewhere needs and which need no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..examples import Sides

# By (checkpoint, layer): of queries that are questions of their own activations (n_query, d_in) and output gradients
# (n_query, d_out); of a group the matrix of their weighted sum, (d_out, d_in).
QueryFactors = Mapping[tuple[int, int], Sides | NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class QueryVectors:
    """Queries as arrays.

    Args:
        rows: (n_query, dim) float32.
        norms: (n_query,) float64, what exact scores are divided by to become cosines.
        factors: see ``QueryFactors``; ``None`` where the store has none.
        fingerprint: of the store's map, which the rows belong to.
        grouped: whether they are one question about several examples.
        wide: (n_query, C wide) float32 wide rows; ``None`` where the store has none.
    """

    rows: NDArray[np.float32]
    norms: NDArray[np.float64]
    factors: QueryFactors | None
    fingerprint: str
    grouped: bool = False
    wide: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.rows)
