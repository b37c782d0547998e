"""Children of a process that has computed with several threads: OpenMP's threads do not live on in them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import ArgumentError

_THREADS_OF: dict[str, Callable[[int], object]] = {}


def one_thread_in_children(library: str, set_threads: Callable[[int], object]) -> None:
    """Have children that are forked from now on use a library's OpenMP with one thread.

    GNU's OpenMP keeps its threads for the next parallel region. A forked child has none of them, and the first region
    of several threads would wait for them for ever; a region of one thread needs none.

    Args:
        library: its name.
        set_threads: sets its number of threads.
    """
    if not _THREADS_OF:
        os.register_at_fork(after_in_child=_after_fork)
    _THREADS_OF[library] = set_threads


def _after_fork() -> None:
    global _forked
    _forked = True
    for set_threads in _THREADS_OF.values():
        set_threads(1)


_forked = False


def check_threads(count: int) -> None:
    """Refuse to compute with several threads in a child that was forked from a process that had asked or built.

    Raises:
        ArgumentError: it would hang.
    """
    if _forked and count > 1:
        raise ArgumentError(
            f"This process was forked from one that had used gradindex, but a build with {count} threads would wait "
            "for threads that a fork leaves behind. Start it with multiprocessing's 'spawn', or as a command."
        )


@contextmanager
def no_fork_meanwhile() -> Iterator[None]:
    """Have this process fork before the block or after it, so that no lock that the block takes stays taken in a child.

    For short pieces of work of a thread of our own: whoever forks waits for the piece. It must run no code of users.
    """
    global _gated
    if not _gated:
        _gated = True
        os.register_at_fork(before=_GATE.acquire, after_in_parent=_GATE.release, after_in_child=_GATE.release)
    with _GATE:
        yield


_GATE, _gated = threading.Lock(), False
