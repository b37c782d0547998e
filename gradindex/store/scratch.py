"""Memory that a thread keeps from one question to the next: allocated anew, it takes a page fault for every 4 KiB."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_BYTES, _ALIGNED_TO = 64 << 20, 64
_kept = threading.local()


def rooms(purpose: str, specs: Sequence[tuple[tuple[int, ...], Any]]) -> list[NDArray[Any]]:
    """Uninitialised arrays of these shapes and types, good until this thread asks again for the same purpose.

    Args:
        purpose: what they are for.
        specs: shape and type of each. More than 64 MiB in all is allocated anew, and not kept.
    """
    kinds = [np.dtype(kind) for _, kind in specs]
    sizes = [math.prod(shape) * kind.itemsize for (shape, _), kind in zip(specs, kinds, strict=True)]
    ends = np.cumsum([-(-size // _ALIGNED_TO) * _ALIGNED_TO for size in sizes], dtype=np.int64).tolist()
    needed = ends[-1] if ends else 0
    kept: NDArray[np.uint8] | None = getattr(_kept, purpose, None)
    if kept is None or len(kept) < needed:
        kept = np.empty(needed, dtype=np.uint8)
        if needed <= _MOST_BYTES:
            setattr(_kept, purpose, kept)
    starts = [0, *ends]
    return [
        kept[start : start + size].view(kind).reshape(shape)
        for start, size, kind, (shape, _) in zip(starts, sizes, kinds, specs, strict=False)
    ]
