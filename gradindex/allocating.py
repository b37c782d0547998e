"""Large blocks of memory stay with the process while gradients are computed on the CPU, where glibc would return them.

glibc maps each large tensor anew and gives it back to the system when it dies, so that the next one takes a page fault
for every page. A pass over a batch makes and frees the same tensors again and again.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
# What glibc comes to by itself where large blocks were freed; it adjusts nothing any more once it was told anything.
_RETURNED = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
# With these, a person has decided.
_CHOSEN = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")

_lock, _depth = threading.Lock(), 0


@contextmanager
def memory_kept() -> Iterator[None]:
    """Have glibc keep freed memory for the time of the block, after which what is free goes back to the system.

    Nothing is done on other systems, and where the environment chooses (``MALLOC_MMAP_MAX_`` and the like,
    ``GLIBC_TUNABLES``) or loads another allocator. Nested blocks, also of several threads, are one.
    """
    global _depth
    libc = None if _chosen() else _glibc()
    if libc is None:
        yield
        return
    with _lock:
        _depth += 1
        if _depth == 1:
            _set(libc, _KEPT)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _set(libc, _RETURNED)
                libc.malloc_trim(0)


def _chosen() -> bool:
    return any(os.environ.get(name) for name in _CHOSEN) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def _set(libc: Any, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        libc.mallopt(parameter, value)


@cache
def _glibc() -> Any | None:
    """The C library of this process, if it is glibc."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
