"""Progress on standard error with rate and time left; silent when that is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def note(text: str) -> None:
    """A line for a person, on standard error."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar and yield ``advance(n)``.

    Args:
        label: what is going on.
        total: how many there are in all.
        unit: their name, in the plural.
        done: how many were finished before, when a job goes on.
    """
    import click

    started, count = time.monotonic(), 0
    with click.progressbar(
        length=total, label=label, file=sys.stderr, item_show_func=lambda item: item, hidden=not sys.stderr.isatty()
    ) as bar:
        if done:
            bar.update(done, "")

        def advance(n: int) -> None:
            nonlocal count
            count += n
            bar.update(n, f"{count / max(time.monotonic() - started, 1e-9):,.0f} {unit}/s")

        yield advance
