"""How far a loop is, on standard error, in words that Captum's users look for."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

_EVERY_S = 0.2


def shown(items: Iterable[Any], label: str, wanted: bool) -> Iterator[Any]:
    """The items; if ``wanted`` with a line that says how many are done: in per cent, where the length is known."""
    if not wanted:
        yield from items
        return
    total: int | None
    try:
        total = len(items)  # type: ignore[arg-type]  # where it has one
    except TypeError:
        total = None
    done, said = 0, time.monotonic()
    for item in items:
        yield item
        done += 1
        if time.monotonic() - said >= _EVERY_S:
            said = time.monotonic()
            _say(label, done, total, "\r")
    _say(label, done, done if total is None else total, "\n")


def _say(label: str, done: int, total: int | None, end: str) -> None:
    share = f"{done} done" if total is None else f"{100 * done // max(total, 1)}% {done}/{total}"
    print(f"{label}: {share}", file=sys.stderr, end=end, flush=True)
