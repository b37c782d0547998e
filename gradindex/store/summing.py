"""Passes over rows that make second moments, or add to them what changed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OutOfMemoryError, StoreError
from ..files import discard, is_there, locked, storing
from ..progress import progress
from . import runs
from .changing import changing
from .claiming import Part, check_part
from .documents import LOCK
from .moments import PART, WHOLE, Moments, described_rows, home_of, kept_as, of_use, save
from .reader import GradientStore

# Rows whose products are made at once, as bytes.
_TOGETHER = 64 << 20
# A pass that is ended goes on from here, so many seconds back at most.
_SAVED_EVERY = 60.0


def second_moments(folder: Path | str, part: Part | None = None) -> Moments:
    """Make a store's second moments, or bring them up to date, and keep them; call again to go on after an end.

    Args:
        folder: of the store.
        part: only of the i-th of n parts of its shards, while other processes make the others; a call without then
            joins them.

    Raises:
        OutOfMemoryError: they take more memory than is free.
        StoreError: the store is damaged, another process changes it or makes this part, or they cannot be written.
    """
    check_part(part)
    if part is None:
        with changing(folder) as store:
            return _brought_up(store)
    store = GradientStore(folder)
    home = home_of(store)
    with storing(home):
        home.mkdir(exist_ok=True)
    stem = f"part-{part[0]}-of-{part[1]}"
    with locked(home / f"{LOCK}-{stem}"):
        shards = range(part[0] - 1, len(store.manifest.shards), part[1])
        mine = [run for number in shards for run in store.shard_runs(number)]
        wanted = runs.without(mine, store.manifest.removed)
        found, about = kept_as(store, stem) or (_none(store), described_rows(store, ()))
        return _updated(store, found, about, wanted, stem)


def moments_of(store: GradientStore) -> Moments:
    """Those of an open store's rows; where rows came or went since they were made, the difference is added here.

    Raises:
        StoreError: there are none, they are of other rows, or damaged.
    """
    way_out = f"Make them: gradindex whiten {store.folder}."
    kept = kept_as(store, "all")
    if kept is None:
        other = is_there(home_of(store)) and any(WHOLE.fullmatch(path.name) for path in home_of(store).iterdir())
        state = "has second moments of other rows" if other else "has no second moments of its rows"
        raise StoreError(f"{store.folder} {state}, and a whitened geometry is made of them. {way_out}")
    return _updated(store, *kept, store.id_runs, None)


def follow_moments(folder: Path | str) -> None:
    """Bring the moments of a store that has changed up to date, if there are any; claimed by whoever changed it.

    Raises:
        StoreError: they cannot be written.
    """
    store = GradientStore(folder)
    kept = kept_as(store, "all")
    if kept is not None:
        _updated(store, *kept, store.id_runs, "all")


def extend_moments(before: GradientStore, after: GradientStore) -> None:
    """Go on with the moments of a store whose rows got further checkpoints and are otherwise the same.

    Raises:
        StoreError: they cannot be written.
    """
    kept = kept_as(before, "all")
    if kept is None or not runs.same(kept[1]["ids"], after.id_runs):
        return
    dim, first = before.dim // before.n_checkpoints, before.dim
    later = Moments.none(after.n_checkpoints - before.n_checkpoints, dim)
    with progress("second moments", after.n_train, "rows") as advance:
        for ids, rows in _pieces(after, after.id_runs):
            later = later.plus(np.ascontiguousarray(rows[:, first:]))
            advance(len(ids))
    save(after, "all", kept[0].beside(later), after.id_runs)


def _brought_up(store: GradientStore) -> Moments:
    home = home_of(store)
    with storing(home):
        home.mkdir(exist_ok=True)
    found, about = kept_as(store, "all") or (_none(store), described_rows(store, ()))
    parts, before = [path for path in home.iterdir() if PART.fullmatch(path.name)], found.count
    for path in parts:
        part = of_use(store, path)
        if part is not None and not runs.count(_both(part[1]["ids"], about["ids"])):
            found, about = found.joined(part[0]), described_rows(store, _all(about["ids"], part[1]["ids"]))
    found = _updated(store, found, about, store.id_runs, "all", joined=found.count > before)
    discard(*(each for path in parts for each in (path, path.with_suffix(".h5"))))
    discard(*(path for path in home.iterdir() if path.name.startswith(f"{LOCK}-part-")))
    return found


def _updated(
    store: GradientStore,
    found: Moments,
    about: Mapping[str, Any],
    wanted: runs.Runs,
    stem: str | None,
    joined: bool = False,
) -> Moments:
    """With the rows that lack and without those that are too many; saved now and then, where they have a name."""
    done = runs.as_runs(about["ids"])
    gone, new = runs.without(done, wanted), runs.without(wanted, done)
    if not runs.count(gone) and not runs.count(new):
        if stem is not None and (joined or list(about["covers"]) != store.origins):
            save(store, stem, found, done)
        return found
    saved = time.monotonic()
    with progress("second moments", runs.count(gone) + runs.count(new), "rows") as advance:
        for some, sign in ((gone, -1), (new, 1)):
            for ids, rows in _pieces(store, some):
                found = found.plus(rows, sign)
                mine = runs.to_runs(ids)
                done = _all(done, mine) if sign > 0 else runs.without(done, mine)
                advance(len(ids))
                if stem is not None and time.monotonic() - saved > _SAVED_EVERY:
                    save(store, stem, found, done)
                    saved = time.monotonic()
    if stem is not None:
        save(store, stem, found, done)
    return found


def _pieces(store: GradientStore, wanted: runs.Runs) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Rows of some ids, removed ones as well, so many at once that adding up is not most of the work."""
    kept: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    size = 0
    for ids, rows in store.blocks(wanted, removed=True) if runs.count(wanted) else ():
        kept.append((ids, rows))
        size += rows.nbytes
        if size >= _TOGETHER:
            yield _one(kept)
            kept, size = [], 0
    if kept:
        yield _one(kept)


def _one(parts: list[tuple[NDArray[np.int64], NDArray[np.float32]]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([rows for _, rows in parts])


def _none(store: GradientStore) -> Moments:
    """Of no rows, if there is room for them."""
    from ..memory import free_bytes  # which brings torch, that reading a store does without

    dim, count = store.dim // store.n_checkpoints, store.n_checkpoints
    needed, free = 2 * count * dim * dim * 8, free_bytes()
    if needed > free:
        raise OutOfMemoryError(
            f"The second moments of {count} blocks of {dim:,} numbers take {needed / 2**30:.3g} GiB, but "
            f"{free / 2**30:.3g} GiB are free. Build a store with fewer numbers a checkpoint, or use a larger machine."
        )
    return Moments.none(count, dim)


def _both(one: runs.Runs, other: runs.Runs) -> NDArray[np.int64]:
    return runs.without(one, runs.without(one, other))


def _all(one: runs.Runs, other: runs.Runs) -> NDArray[np.int64]:
    """Of runs that are apart."""
    return runs.to_runs(np.union1d(runs.to_ids(one), runs.to_ids(other)))
