"""Which range a byte of a number stands for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# A byte's range goes up to this many times the largest size in the sample; rows beyond it are coded shorter.
_WIDEST = 8


class Reach:
    """How far each number goes over all rows: bytes that ended where a sample does would cut the heaviest rows short.

    A few enormous rows must not leave all others in a handful of the 256 steps. They are coded in their own direction,
    but shorter, which still puts them before the others.
    """

    def __init__(self, sample: NDArray[np.float32]) -> None:
        self._low, self._high = sample.min(0), sample.max(0)
        self._most = _WIDEST * np.abs(sample).max()

    def add(self, rows: NDArray[np.float32]) -> None:
        """Take these rows into account."""
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
