"""Getting ready for queries in the background: what they will read is verified and in memory before the first one."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ..errors import GradIndexError, StoreChangedError
from ..files import regular
from ..forking import no_fork_meanwhile
from ..memory import free_bytes
from ..progress import progress
from ..store import GradientStore
from .candidates import Candidates
from .leading import leads

# The share of the free memory that files are brought into: more would push out what came first.
_SHARE = 0.8
_READ_BYTES = 8 << 20
# How often whoever waits looks at how far it is.
_LOOK_S = 0.1
_MB = 1_000_000


@dataclass(frozen=True)
class Warmth:
    """How far a retriever has got ready for queries; prints as a sentence.

    Args:
        done_bytes: of files, verified and read.
        total_bytes: of files, to be verified and read in all.
        left_out_bytes: of files, that do not fit the free memory besides; queries verify and read them as they come.
        over: whether it has ended: all is ready, it was stopped, or damage was found.
        ready: whether queries find everything ready that fits the free memory.
        note: what is not ready, and why.
    """

    done_bytes: int
    total_bytes: int
    left_out_bytes: int
    over: bool
    ready: bool
    note: str = ""

    def __str__(self) -> str:
        done, total = self.done_bytes / _MB, self.total_bytes / _MB
        said = f"ready, {done:,.0f} MB verified" if self.ready else f"{done:,.0f} of {total:,.0f} MB verified"
        if self.left_out_bytes:
            said += f"; {self.left_out_bytes / _MB:,.0f} MB left out, which the free memory does not hold"
        return f"{said}; {self.note}" if self.note else said


class _State:
    """What the thread and its owner share: the owner's end ends the thread, so it must not hold the owner."""

    def __init__(self) -> None:
        self.done = self.total = self.left_out = 0
        self.planned, self.stopped = threading.Event(), threading.Event()
        self.over = self.ready = False
        self.note = ""
        self.problem: Exception | None = None


class Warming:
    """A thread that verifies and reads what queries need, and then asks a question as they do.

    The thread ends with its work, when it is told to (:meth:`stop`), when nobody holds this object any more, and with
    the process. It runs no code of the user's.

    Args:
        store: a complete one.
        candidates: its search.
        rehearsed: asks a question of them, without a result.
        note: what is not ready already, and why.
    """

    def __init__(
        self,
        store: GradientStore,
        candidates: Candidates,
        rehearsed: Callable[[GradientStore, Candidates], object] | None,
        note: str = "",
    ) -> None:
        self._rehearsed, self._state = rehearsed, _State()
        self._state.note = note
        self._thread = threading.Thread(
            target=_warm, args=(self._state, store, candidates, rehearsed), name="gradindex warming", daemon=True
        )
        self._thread.start()
        # Also runs before the interpreter goes down, in which a thread must not be left behind.
        self._end = weakref.finalize(self, _stopped, self._state, self._thread)

    def again(self, store: GradientStore, candidates: Candidates) -> Warming:
        """The same for a store that has changed; this one ends."""
        self.stop()
        return Warming(store, candidates, self._rehearsed, self._state.note)

    @property
    def warmth(self) -> Warmth:
        """How far it is."""
        state = self._state
        over = state.over or not self._thread.is_alive()  # a child of a fork has no such thread
        return Warmth(state.done, state.total, state.left_out, over, state.ready, state.note)

    def waited(self) -> Warmth:
        """Wait until it has ended, with progress.

        Raises:
            StoreError: a file is damaged.
        """
        state = self._state
        while self._thread.is_alive() and not state.planned.wait(_LOOK_S):
            pass
        shown = 0
        with progress("getting ready", state.total // _MB, "MB") as advance:
            while True:
                self._thread.join(_LOOK_S)
                now = state.done // _MB
                advance(now - shown)
                shown = now
                if not self._thread.is_alive():
                    break
        self.check()
        return self.warmth

    def check(self) -> None:
        """Raise what the thread met, once: queries that meet it again raise it again.

        Raises:
            StoreError: a file is damaged.
        """
        problem, self._state.problem = self._state.problem, None
        if problem is not None:
            raise problem

    def stop(self) -> None:
        """End it, which takes no longer than a piece of its work."""
        self._end()


def _stopped(state: _State, thread: threading.Thread) -> None:
    state.stopped.set()
    if thread is not threading.current_thread():  # the garbage may be collected there
        thread.join()


def _warm(
    state: _State,
    store: GradientStore,
    candidates: Candidates,
    rehearsed: Callable[[GradientStore, Candidates], object] | None,
) -> None:
    """What the thread does. Whatever goes wrong is the next query's to say."""
    try:
        with no_fork_meanwhile():
            groups = _needed(store, candidates)
            sizes = [store.bytes_of(*group) for group in groups]
            index = _index_bytes(candidates)
            whole, room = index + sum(sizes), int(_SHARE * free_bytes())
            state.total = min(whole, room)
            state.left_out = whole - state.total
        state.planned.set()
        of_index = _index_read(store, candidates) if index else iter(())
        pieces = itertools.chain(of_index, *(store.verified(*group) for group in groups))
        while not state.stopped.is_set():
            with no_fork_meanwhile():
                piece = next(pieces, None) if state.done < state.total else None
                if piece is None:
                    if rehearsed is not None:
                        rehearsed(store, candidates)
                    state.done, state.ready = state.total, True
                    break
            state.done = min(state.done + piece, state.total)
    except StoreChangedError:
        state.note = "the store has changed"  # the next query opens it anew, and all this begins again
    except Exception as error:  # whatever it is, it must reach a caller
        state.problem = error
        state.note = f"stopped: {error}" if isinstance(error, GradIndexError) else f"stopped: {error!r}"
    finally:
        state.over = True
        state.planned.set()


def _needed(store: GradientStore, candidates: Candidates) -> list[tuple[str, ...]]:
    """Beginnings of the names of arrays, what is needed most first."""
    norms = store.manifest.map.unit_norm or leads(store)
    beside = ("ids", "columns/", *(("self_influence",) if norms else ()))
    rows, factors = ("rows", "scales"), ("factors/",)
    if not store.has_factors:
        return [beside, rows, *([] if store.manifest.wide is None else [("wide",)])]
    if candidates.index is None or candidates.newer:
        return [beside, rows, factors]
    return [beside, factors, rows]  # full rows only for filters and thresholds


def _index_bytes(candidates: Candidates) -> int:
    return 0 if candidates.index is None else int(candidates.index.about["file"]["bytes"])


def _index_read(store: GradientStore, candidates: Candidates) -> Iterator[int]:
    """Bring the index's file into memory, which was verified when it was opened."""
    assert candidates.index is not None
    try:
        with regular(candidates.folder / candidates.index.about["file"]["name"]) as file:
            yield from map(len, iter(partial(file.read, _READ_BYTES), b""))
    except OSError:  # replaced since: what was opened stays open, and the next query opens the new one
        return
