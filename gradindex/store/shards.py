"""Open shards: their ids, their arrays, and how many stay open."""

from __future__ import annotations

import contextlib
import errno
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreChangedError, StoreError
from ..files import read_checked
from . import runs
from .container import Container
from .documents import MANIFEST, SHARDS
from .encoding import decode
from .forms import check_seal
from .layout import Expected
from .manifest import Manifest, ShardEntry

T = TypeVar("T")

_TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
_MOST_OPEN = 4096


class TooManyOpenError(StoreError):
    """This process may open no further file."""


def read_seal(folder: Path, entry: ShardEntry, expected: Expected | None = None) -> dict[str, Any]:
    """The seal of a shard, which fits its entry in the manifest and what is ``expected`` of all of them.

    Raises:
        StoreError: it is damaged, or not the one that the manifest names.
        OSError: it cannot be read.
    """
    path = folder / SHARDS / f"{entry.name}.json"
    try:
        seal = read_checked(path)
        if seal["sha256"] != entry.seal:
            raise StoreError(f"{path} is not the file that the manifest names")
        check_seal(seal)
        if expected is not None:
            expected.check(entry, seal)
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error})") from None
    return seal


class Shard:
    """One sealed file of rows.

    Args:
        folder: the store's.
        entry: the manifest's.
        expected: what it must hold.
        seal: where it was read before.
        sound: blocks that were verified before.

    Raises:
        StoreError: it is damaged or does not belong here.
        OSError: it cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        entry: ShardEntry,
        expected: Expected | None = None,
        seal: dict[str, Any] | None = None,
        sound: NDArray[np.bool_] | None = None,
    ) -> None:
        self.seal = read_seal(folder, entry, expected) if seal is None else seal
        self.arrays = Container(folder / SHARDS / f"{entry.name}.h5", self.seal, sound)
        self.row_type: str = self.seal["row_type"]

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """(m,) ascending, removed ones as well."""
        return runs.to_ids(self.seal["ids"])

    def positions(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where ids lie, all of which are in this shard."""
        (start, _), *more = self.seal["ids"]
        return np.searchsorted(self.ids, ids) if more else ids - start

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """(stop - start, dim) float32; where rows are stored so, a view of the file."""
        scales = self.arrays.view("scales", start, stop) if "scales" in self.arrays else None
        return decode(self.arrays.view("rows", start, stop), scales, self.row_type)

    def take(self, name: str, positions: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of an array's values at ``positions``: rows decoded, text as strings."""
        values = self.arrays.take(name, positions)
        if name == "rows":
            scales = self.arrays.take("scales", positions) if "scales" in self.arrays else None
            return decode(values, scales, self.row_type)
        return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values


def opened(folder: Path, entry: ShardEntry, action: Callable[[Path, ShardEntry], T]) -> T:
    """Open a shard of a store, or do something else with it, with errors that say what to do.

    Raises:
        StoreError: it is missing or damaged, or too many files are open.
    """
    path = folder / SHARDS / f"{entry.name}.h5"
    try:
        return action(folder, entry)
    except StoreError as error:
        problem = str(error)
    except OSError as error:
        if error.errno in _TOO_MANY_OPEN:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise TooManyOpenError(
                f"{path} cannot be opened: this process is at its limit of open files ({limit}). "
                "Close some, or raise the limit with `ulimit -n`."
            ) from None
        missing = error.errno == errno.ENOENT
        problem = f"{error.filename or path} {'is missing' if missing else f'cannot be opened: {error.strerror}'}"
    raise StoreError(
        f"{problem}. Run `gradindex verify {folder}` to see all damage, and `gradindex build --repair` to recompute "
        "damaged shards."
    )


def problem_of(folder: Path, entry: ShardEntry, expected: Expected | None = None) -> str | None:
    """Read a whole shard: a sentence that says what is damaged, and the ids that it holds; ``None`` if it is sound."""
    everything = f"(ids {entry.first} to {entry.last})"
    try:
        shard = Shard(folder, entry, expected)
        damaged = shard.arrays.damaged()
    except StoreError as error:
        return f"{error} {everything}"
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        return f"{error.filename or entry.name} {reason} {everything}"
    if not damaged:
        return None
    places = shard.arrays.positions_in(damaged)
    blocks = f"{shard.arrays.path} is damaged in {len(damaged)} of {shard.arrays.blocks} blocks"
    if places is None:
        return f"{blocks}, which hold no row but what other readers need"
    return f"{blocks} (ids {shard.ids[places[0]]} to {shard.ids[places[1]]})"


class OpenShards:
    """Shards by their number in the manifest, opened when asked for; safe to share among threads.

    An open shard takes a file descriptor, so not all stay open; what was learned of a shard stays.

    Args:
        folder: the store's.
        entries: of its manifest, all or some.
        manifest: the manifest.
    """

    def __init__(self, folder: Path, entries: Sequence[ShardEntry], manifest: Manifest) -> None:
        self._folder, self._entries, self._manifest = folder, entries, manifest
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._seals: dict[int, dict[str, Any]] = {}
        self._sound: dict[int, NDArray[np.bool_]] = {}
        self._at_once = min(_MOST_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> Shard:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            while len(self._open) >= self._at_once:
                self._open.popitem(last=False)
            shard = self._said(number, self._opened)
            self._open[number] = shard
            return shard

    def seal(self, number: int) -> dict[str, Any]:
        """The seal of a shard, which need not be open."""
        if number not in self._seals:

            def read(folder: Path, entry: ShardEntry) -> dict[str, Any]:
                return read_seal(folder, entry, self._expected)

            self._seals[number] = self._said(number, lambda n: opened(self._folder, self._entries[n], read))
        return self._seals[number]

    @cached_property
    def _expected(self) -> Expected:
        return Expected(self._manifest)

    def _opened(self, number: int) -> Shard:
        def shard(folder: Path, entry: ShardEntry) -> Shard:
            made = Shard(folder, entry, self._expected, self._seals.get(number), self._sound.get(number))
            self._seals[number], self._sound[number] = made.seal, made.arrays.sound
            return made

        try:
            return opened(self._folder, self._entries[number], shard)
        except TooManyOpenError:
            if not self._open:
                raise
            self._open.clear()
            return opened(self._folder, self._entries[number], shard)

    def _said(self, number: int, action: Callable[[int], T]) -> T:
        """What cannot be opened may be gone because the store went on without it."""
        try:
            return action(number)
        except StoreError:
            check_unchanged(self._folder, self._manifest)
            raise


def check_unchanged(folder: Path, manifest: Manifest) -> None:
    """Refuse to go on with a manifest in whose place another one is now.

    Raises:
        StoreChangedError: the store has changed.
    """
    with contextlib.suppress(OSError, ValueError):
        if read_checked(folder / MANIFEST)["sha256"] != manifest.sha256:
            raise StoreChangedError(f"{folder} has changed since it was opened. Open it again.")
