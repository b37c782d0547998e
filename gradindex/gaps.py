"""Texts that are missing, among texts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# A text that is missing, in a store: a character that Unicode will never give a meaning. Other readers see it so.
MISSING_TEXT = "\uffff"


def with_gaps(values: NDArray[Any]) -> NDArray[Any]:
    """Texts with NaN for those that are missing, as objects; other values, and texts without gaps, as they are."""
    if values.dtype.kind != "U":
        return values
    missing = values == MISSING_TEXT
    return np.where(missing, np.array(np.nan, dtype=object), values) if missing.any() else values
