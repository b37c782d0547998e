"""Progress on standard error with rate and time left: a bar, or a line a minute where that is no terminal."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

_LINE_S = 60.0


def note(text: str) -> None:
    """A line for a person, on standard error."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar and yield ``advance(n)``.

    On a terminal the bar is click's. In a notebook it is that of ``tqdm.auto``, where tqdm is installed.

    Args:
        label: what is going on.
        total: how many there are in all.
        unit: their name, in the plural.
        done: how many were finished before, when a job goes on.
    """
    tqdm = _notebook_bar()
    if tqdm is not None:
        with tqdm(total=total, desc=label, unit=f" {unit}", initial=done) as shown:
            yield shown.update
        return
    import click

    started, count, terminal = time.monotonic(), 0, sys.stderr.isatty()
    said = started
    with click.progressbar(
        length=total, label=label, file=sys.stderr, item_show_func=lambda item: item, hidden=not terminal
    ) as bar:
        if done:
            bar.update(done, "")

        def advance(n: int) -> None:
            nonlocal count, said
            count += n
            now = time.monotonic()
            rate = count / max(now - started, 1e-9)
            speed = f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"
            bar.update(n, speed)
            if not terminal and now - said >= _LINE_S:  # the log of a batch queue
                said = now
                left = timedelta(seconds=round((total - done - count) / max(rate, 1e-9)))
                note(f"{label}: {done + count:,} of {total:,} {unit}, {speed}, {left} left")

        yield advance


def _notebook_bar() -> Any:
    """The class of ``tqdm.auto``, in a notebook that has it; else ``None``."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or not hasattr(shell, "kernel"):  # IPython on a terminal has no kernel
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets the bar is of text, which is as good
            from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm
