"""Old names and orders, which work for one version more and say what to write instead."""

from __future__ import annotations

import warnings
from typing import Any


def deprecated(old: str, new: str, depth: int = 2) -> None:
    """Say that ``old`` is deprecated and ``new`` takes its place.

    Args:
        old: what was written.
        new: what to write.
        depth: how many calls lie between here and whoever wrote it, this one counted.
    """
    warnings.warn(f"{old} is deprecated, write {new}.", DeprecationWarning, stacklevel=depth + 1)


def in_order(first: Any, second: Any, kind: type, call: str) -> tuple[Any, Any]:
    """Two arguments whose order was turned round: the first is to be a ``kind``.

    Args:
        first: as given.
        second: as given.
        kind: of what comes first now.
        call: how to write it.

    Returns:
        Both, in the new order.
    """
    if isinstance(second, kind) and not isinstance(first, kind):
        deprecated("the old order of arguments", call, depth=3)
        return second, first
    return first, second
