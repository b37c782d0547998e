"""What a store goes through after it is built, without any gradient: remove, compact, merge."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, MismatchError, StoreError
from ..files import read_checked
from ..progress import progress
from . import runs
from .container import Writer
from .job import Job, ShardWriter, claimed, entry_of, shard_writer, sweep, write_manifest
from .manifest import PENDING, SHARDS, differences
from .reader import GradientStore
from .runs import Runs
from .shards import Shard, opened

# What is copied at once.
_PIECE_BYTES = 16 << 20


def remove(folder: str | os.PathLike[str], ids: NDArray[np.int64]) -> GradientStore:
    """Take training examples out of every answer, at once; :func:`compact` frees their room.

    Args:
        folder: of the store.
        ids: (m,) int64; those that are removed already are passed over.

    Raises:
        ArgumentError: an id was never there, or nothing would be left.
        StoreError: another process changes the store, or it cannot be written.
    """
    with changing(folder) as store:
        ids = np.unique(np.asarray(ids, dtype=np.int64))
        gone: list[list[int]] = store.manifest["removed"]
        store.check_ids(ids[~runs.contain(gone, ids)])
        removed = runs.to_runs(np.union1d(runs.to_ids(gone), ids))
        if runs.count(removed) == sum(entry["rows"] for entry in store.manifest["shards"]):
            raise ArgumentError(f"No training example would be left in {store.folder}. Delete the folder instead.")
        write_manifest(store.folder, {**_next(store), "removed": removed})
        return GradientStore(store.folder)


def compact(folder: str | os.PathLike[str]) -> GradientStore:
    """Give back the room of removed rows and join small shards; ids stay. Answers stay the same meanwhile.

    Call it again to go on after an interruption.

    Args:
        folder: of the store.

    Raises:
        StoreError: a shard is damaged, another process changes the store, or it cannot be written.
    """
    with changing(folder, "compact") as store:
        plan, keep = _repacking(store)
        if Job.pending(store.folder) is None and not plan:
            return store
        job = Job.begin(store.folder, "compact", {**store.kept(), "removed": [], "data": None}, plan, keep)
        _copy(job, {".": store})
        return GradientStore(store.folder)


def merge(
    folder: str | os.PathLike[str], others: Sequence[str | os.PathLike[str]], *, offset: int | None = None
) -> GradientStore:
    """Copy the rows of stores that were built apart with the same map into one of them.

    Call it again to go on after an interruption.

    Args:
        folder: the store that grows.
        others: the stores whose rows are copied; they stay as they are.
        offset: added to the ids of the first of the others, so that their order goes on; the following
            stores start where the one before ended. By default ids stay as they are.

    Raises:
        MismatchError: the stores' maps or contents differ; says what.
        ArgumentError: ids collide, or ``offset`` is negative.
        StoreError: a store is damaged, another process changes it, or it cannot be written.
    """
    if offset is not None and offset < 0:
        raise ArgumentError(f"offset is {offset}, but must not be negative.")
    with changing(folder, "merge") as store:
        sources = {str(Path(other).resolve()): GradientStore(other) for other in others}
        if len(sources) < len(others) or str(store.folder.resolve()) in sources:
            raise ArgumentError("A store is named twice. Name each store once.")
        plan: list[dict[str, Any]] = []
        end = store.manifest["next_id"]
        for name, source in sources.items():
            _check_mergeable(store, source)
            shift = 0 if offset is None else offset
            for number, entry in enumerate(source.manifest["shards"]):
                live = runs.without(source.shard_runs(number), source.manifest["removed"])
                if live:
                    ids = [[start + shift, stop + shift] for start, stop in live]
                    plan.append({"ids": ids, "sources": [[name, entry["name"], shift]]})
            end = max(end, source.manifest["next_id"] + shift)
            offset = None if offset is None else offset + source.manifest["next_id"]
        plan.sort(key=lambda planned: int(planned["ids"][0][0]))
        _check_apart(store, plan)
        data = [[source.manifest["sha256"] for source in sources.values()], offset]
        job = Job.begin(
            store.folder, "merge", {**store.kept(), "next_id": end, "data": data}, plan, store.manifest["shards"]
        )
        _copy(job, sources)
        return GradientStore(store.folder)


def seal(folder: str | os.PathLike[str]) -> GradientStore:
    """Complete a job whose parts were made by several processes.

    Args:
        folder: of the store.

    Raises:
        StoreError: shards are missing; says how many.
    """
    path = Path(folder)
    if not path.is_dir():
        raise StoreError(f"{path} is not a gradindex store. Build one: gradindex build TASK --out DIR.")
    with claimed(path):
        job = Job.pending(path)
        if job is not None:
            job.finish()
    return GradientStore(path)


@contextmanager
def changing(folder: str | os.PathLike[str], kind: str = "") -> Iterator[GradientStore]:
    """A complete store that no other process changes, and whose unfinished job, if any, is a ``kind``.

    Raises:
        StoreError: there is no store, another process has it, or another job is unfinished.
    """
    store = GradientStore(folder)  # before anything is written into a folder that may be another's
    with claimed(store.folder):
        store.reload()
        job = Job.pending(store.folder)
        if job is not None and job.kind != kind:
            raise StoreError(
                f"{store.folder} has an unfinished `{job.kind}`. Finish it with the same command as before, or delete "
                f"{store.folder / PENDING} to give it up."
            )
        if job is None:
            sweep(store.folder)
        yield store


def _next(store: GradientStore) -> dict[str, Any]:
    """The manifest of a store after a change of nothing."""
    manifest = store.manifest
    return {**store.kept(), "generation": manifest["generation"] + 1, "shards": manifest["shards"]}


@contextmanager
def rewritten(
    store: GradientStore,
    number: int,
    columns: Mapping[str, NDArray[Any]],
    digests: Callable[[NDArray[np.int64]], Sequence[tuple[int, str]]],
) -> Iterator[tuple[NDArray[np.int64], ShardWriter]]:
    """Make a damaged shard of a claimed store again: its ids, and what to write its rows with.

    Args:
        store: claimed.
        number: of the shard.
        columns: values by id.
        digests: gives the ids and digests of some of its examples.

    Raises:
        StoreError: its ids are lost, or it cannot be written.
    """
    entry = store.manifest["shards"][number]
    try:
        planned = {"name": entry["name"], "ids": store.shard_runs(number)}
    except StoreError as error:
        raise StoreError(
            f"{error} But its ids went with its seal, so it cannot: restore it from a copy, or build again."
        ) from None
    ids = runs.to_ids(planned["ids"])
    chosen = {name: values[ids] for name, values in columns.items()}
    with shard_writer(store.folder, store.manifest, planned, chosen, digests(ids)) as writer:
        yield ids, writer
    seal = read_checked(store.folder / SHARDS / f"{entry['name']}.json")
    if seal["sha256"] != entry["seal"]:  # other bytes: another machine or version, or rows that were compacted
        after = _next(store)
        after["shards"] = [*after["shards"][:number], entry_of(entry["name"], seal), *after["shards"][number + 1 :]]
        write_manifest(store.folder, after)
    store.reload()


def _repacking(store: GradientStore) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The shards that a compaction makes, and the entries of those that stay as they are."""
    keep: list[dict[str, Any]] = []
    plan: list[dict[str, Any]] = []
    group: list[tuple[dict[str, Any], Runs]] = []
    removed, shard_rows = store.manifest["removed"], store.manifest["shard_rows"]

    def end_group() -> None:
        if len(group) == 1 and runs.count(group[0][1]) == group[0][0]["rows"]:
            keep.append(group[0][0])  # small, but with no neighbour to join
        else:
            ids = runs.to_ids([run for _, live in group for run in live])
            for start in range(0, len(ids), shard_rows):
                some = ids[start : start + shard_rows]
                names = [e["name"] for e, _ in group if e["first"] <= some[-1] and e["last"] >= some[0]]
                plan.append({"ids": runs.to_runs(some), "sources": [[".", name, 0] for name in names]})
        group.clear()

    for number, entry in enumerate(store.manifest["shards"]):
        live = runs.without(store.shard_runs(number), removed)
        if runs.count(live) == entry["rows"] >= shard_rows // 2:
            end_group()
            keep.append(entry)
        else:
            group.append((entry, live))
    end_group()
    return plan, keep


def _check_mergeable(store: GradientStore, other: GradientStore) -> None:
    differing = differences(store.manifest, other.manifest)
    if store.manifest["map"] != other.manifest["map"] and not differing:
        differing = ["map"]
    if differing:
        raise MismatchError(
            f"{other.folder} cannot be merged into {store.folder}: {'; '.join(differing)} differ. "
            "Build it again with the task and options of the other."
        )


def _check_apart(store: GradientStore, plan: Sequence[Mapping[str, Any]]) -> None:
    spans = [(e["first"], e["last"] + 1, store.folder.name) for e in store.manifest["shards"]]
    spans += [(p["ids"][0][0], p["ids"][-1][1], Path(p["sources"][0][0]).name) for p in plan]
    spans.sort()
    for (_, stop, one), (start, _, other) in itertools.pairwise(spans):
        if start < stop:
            raise ArgumentError(
                f"Ids of {one} and {other} collide: there is {start} in one and the other goes to {stop - 1}. "
                f"Give an offset, such as {store.manifest['next_id']}."
            )


def _copy(job: Job, sources: Mapping[str, GradientStore]) -> None:
    """Make a job's shards from rows that other shards hold."""
    entries = {(name, entry["name"]): entry for name, source in sources.items() for entry in source.manifest["shards"]}
    done, total = job.rows_done()
    job.tidy()
    with progress(job.kind, total, "rows", done) as advance:
        for planned in job.missing():
            wanted = runs.to_ids(planned["ids"])
            parts: list[tuple[Shard, NDArray[np.int64]]] = []
            samples: list[tuple[int, str]] = []
            for name, shard_name, shift in planned["sources"]:
                shard = opened(sources[name].folder, entries[name, shard_name], Shard)
                ids = np.intersect1d(wanted, shard.ids + shift)
                parts.append((shard, shard.positions(ids - shift)))
                kept = set(ids.tolist())
                samples += [(i + shift, text) for i, text in shard.seal["samples"] if i + shift in kept]
            columns = {
                name: np.concatenate([shard.arrays.take(f"columns/{name}", places) for shard, places in parts])
                for name in job.after["columns"]
            }
            with job.shard(planned, columns, samples) as writer:
                start = 0
                for shard, places in parts:
                    copy_arrays(shard, places, writer.raw, start)
                    start += len(places)
            advance(len(wanted))
    job.finish()


def copy_arrays(shard: Shard, places: NDArray[np.int64], raw: Writer, start: int) -> None:
    """Copy what a shard holds for some positions, but for its ids and columns, as it is stored."""
    for name in shard.arrays.names():
        if name == "ids" or name.startswith("columns/"):
            continue
        shape, kind = shard.arrays.spec(name)
        step = max(1, _PIECE_BYTES // (np.dtype(kind).itemsize * math.prod(shape[1:])))
        for first in range(0, len(places), step):
            raw.put(name, start + first, shard.arrays.take(name, places[first : first + step]))
