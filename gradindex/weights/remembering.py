"""What was read of a file but for its weights, kept until the file changes.

A checkpoint's header and record are asked for when it is found, when a task chooses what is tracked, and when weights
are read. They are small, and the file is opened for them once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..files import signature

T = TypeVar("T")
# How many tensors and other values are kept in all, each a few hundred bytes; those of files not asked for long go.
_MOST = 200_000
# Bytes of numbers that count as one value.
_NUMBERS = 512
_LOCK = threading.Lock()
_KEPT: OrderedDict[tuple[str, str], tuple[tuple[int, int, int], Any, int]] = OrderedDict()


def remembered(what: str, path: Path, read: Callable[[], T]) -> T:
    """What ``read`` gives of a file, from before if inode, size and time of change are what they were.

    Nobody may change what is returned.

    Args:
        what: tells several readings of one file apart.
        path: of the file.
        read: called where nothing is kept; what it raises is not.
    """
    now, key = signature(path), (what, str(path.absolute()))
    with _LOCK:
        kept = _KEPT.get(key)
        if kept is not None and kept[0] == now:
            _KEPT.move_to_end(key)
            value: T = kept[1]
            return value
    value = read()
    if now is not None and signature(path) == now:
        size = _size(value)
        with _LOCK:
            _KEPT[key] = (now, value, size)
            _KEPT.move_to_end(key)
            held = sum(each[2] for each in _KEPT.values())
            while held > _MOST:
                held -= _KEPT.popitem(last=False)[1][2]
    return value


def _size(value: Any) -> int:
    """How many values are in something that was read; numbers in memory count by their bytes."""
    if isinstance(value, Tensor):
        return 1 if value.is_meta else 1 + value.numel() * value.element_size() // _NUMBERS
    if isinstance(value, Mapping):
        return 1 + sum(map(_size, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return 1 + sum(map(_size, value))
    return 1 + (sum(map(_size, vars(value).values())) if hasattr(value, "__dict__") else 0)
