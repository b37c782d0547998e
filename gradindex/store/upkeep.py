"""What a store goes through after it is built, without any gradient: remove, compact, merge; and swapping shards."""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, MismatchError, StoreError
from ..files import is_there, read_checked, storing
from . import runs
from .changing import changing
from .claiming import begin_unfinished, claimed, clean, end_unfinished, supersede, unused_number
from .copying import copy_rows
from .documents import PENDING, SHARDS, PlannedShard, Superseded, write_manifest
from .job import Job
from .layout import check_room, shard_bytes
from .manifest import Manifest, ShardEntry
from .packing import PACKING_SAMPLE, packing_of, why_whole
from .reader import GradientStore
from .sealing import ShardWriter, entry_of, shard_writer
from .shards import read_seal
from .summing import follow_moments

_LARGEST_ID = (1 << 63) - 2


def remove(folder: str | os.PathLike[str], ids: NDArray[np.int64] | Sequence[int]) -> GradientStore:
    """Drop training examples from every answer at once; :func:`compact` frees their space.

    Args:
        folder: of the store.
        ids: (m,) integers; already removed ones are ignored.

    Raises:
        ArgumentError: an id was never there, or nothing would be left.
        StoreError: another process changes the store, or it cannot be written.
    """
    wanted = np.unique(runs.as_ids(ids))
    with changing(folder) as store:
        gone = store.manifest.removed
        store.check_ids(wanted[~runs.contain(gone, wanted)])
        removed = runs.to_runs(np.union1d(runs.to_ids(gone), wanted))
        if removed.tolist() == [list(run) for run in gone]:
            return store  # the command was given again after its end
        if runs.count(removed) == store.manifest.rows:
            raise ArgumentError(f"No training example would be left in {store.folder}. Delete the folder instead.")
        generation = store.manifest.generation + 1
        write_manifest(store.folder, replace(store.manifest, removed=removed.tolist(), generation=generation))
        follow_moments(store.folder)
        return GradientStore(store.folder)


def compact(folder: str | os.PathLike[str], *, upgrade: bool = False) -> GradientStore:
    """Give back the room of removed rows and join small shards; ids stay. Answers stay the same meanwhile.

    Call it again to resume after an interruption.

    Args:
        folder: of the store.
        upgrade: also pack exact factors where that spares room, which version 2 of the format has; scores change by
            less than float32's rounding.

    Raises:
        ArgumentError: ``upgrade`` would change nothing; says why.
        StoreError: a shard is damaged, another process changes the store, or it cannot be written.
    """
    with changing(folder, "compact") as store:
        follow_moments(store.folder)  # while the rows are there that went
        if upgrade:
            return _upgraded(store)
        plan, keep = _repacking(store)
        if Job.pending(store.folder) is None and keep == list(store.manifest.shards):
            return store
        job = Job.begin(store.folder, "compact", replace(kept(store), removed=()), None, plan, keep)
        copy_rows(job, {".": store})
        return GradientStore(store.folder)


def merge(
    folder: str | os.PathLike[str],
    others: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    offset: int | None = None,
) -> GradientStore:
    """Copy the rows of stores that were built apart with the same map into one of them.

    Call it again to resume after an interruption.

    Args:
        folder: the store that grows.
        others: the stores whose rows are copied; they stay as they are.
        offset: added to the ids of the first of the others, so that their order goes on; the following
            stores start where the one before ended. By default ids stay as they are.

    Raises:
        MismatchError: the stores' maps or contents differ; says what.
        ArgumentError: ids collide with some that are or were used, or ``offset`` is out of range.
        StoreError: a store is damaged, another process changes it, or it cannot be written.
    """
    paths = [Path(others)] if isinstance(others, (str, os.PathLike)) else [Path(other) for other in others]
    if not paths:
        raise ArgumentError("There is no store to merge. Name at least one.")
    offset = None if offset is None else operator.index(offset)
    shift = offset or 0
    if shift < 0:
        raise ArgumentError(f"offset is {shift}, but must not be negative.")
    with changing(folder, "merge") as store:
        sources = {os.path.realpath(path): GradientStore(path) for path in paths}
        merged = [str(source.manifest.sha256) for source in sources.values()]
        if Job.pending(store.folder) is None and set(merged) <= set(store.manifest.merged):
            return store  # the command was given again after its end
        if len(sources) < len(paths) or os.path.realpath(store.folder) in sources:
            raise ArgumentError("A store is named twice. Name each store once.")
        plan: list[PlannedShard] = []
        end = store.manifest.next_id
        for name, source in sources.items():
            _check_mergeable(store, source)
            for number, entry in enumerate(source.manifest.shards):
                live = runs.without(source.shard_runs(number), source.manifest.removed)
                if len(live):
                    plan.append(PlannedShard((live + shift).tolist(), [[name, entry.name, shift]]))
            last = source.manifest.next_id + shift
            if last > _LARGEST_ID:
                raise ArgumentError(f"offset is {shift}, but ids must stay below 2^63. Give a smaller one.")
            end, shift = max(end, last), shift if offset is None else last
        plan.sort(key=lambda planned: planned.ids[0][0])
        if Job.pending(store.folder) is None:
            _check_apart(store, plan)
        after = replace(kept(store), next_id=end, merged=(*store.manifest.merged, *merged))
        job = Job.begin(store.folder, "merge", after, [merged, offset], plan, store.manifest.shards)
        copy_rows(job, sources)
        follow_moments(store.folder)
        return GradientStore(store.folder)


def seal(folder: str | os.PathLike[str]) -> GradientStore:
    """Complete a job whose parts were made by several processes.

    Args:
        folder: of the store.

    Raises:
        StoreError: shards are missing; says how many.
    """
    path = Path(folder)
    if is_there(path / PENDING):
        with claimed(path):
            job = Job.pending(path)
            if job is not None:
                job.finish()
            elif GradientStore.complete(path):
                clean(path)
    return GradientStore(path)


def kept(store: GradientStore) -> Manifest:
    """What a change keeps of the manifest, also of what a later version may have added: all but the shards."""
    return replace(store.manifest, shards=(), sha256=None)


def live_plan(store: GradientStore) -> list[PlannedShard]:
    """A plan that makes every shard anew, without removed rows."""
    removed = store.manifest.removed
    live = [runs.without(store.shard_runs(number), removed) for number in range(len(store.manifest.shards))]
    return [PlannedShard(ids.tolist()) for ids in live if len(ids)]


@contextmanager
def rewritten(
    store: GradientStore,
    number: int,
    columns: Callable[[NDArray[np.int64]], Mapping[str, NDArray[Any]]],
    sample: Callable[[NDArray[np.int64]], Sequence[tuple[int, str]]],
) -> Iterator[tuple[NDArray[np.int64], ShardWriter]]:
    """Make a damaged shard of a claimed store again, under a new name: its ids, and what to write its rows with.

    When the block ends well, the new shard takes the old one's place.

    Args:
        store: claimed.
        number: of the shard.
        columns: gives the columns of ids.
        sample: gives ids and digests of some of the examples of ids.

    Raises:
        StoreError: its ids are lost, or it cannot be written.
        MismatchError: its examples are not those that the store was built from.
    """
    manifest = GradientStore(store.folder).manifest
    entry = manifest.shards[number]
    try:
        ids = runs.to_ids(store.shard_runs(number))
    except StoreError as error:
        raise StoreError(
            f"{error} But its ids were lost with its seal, so repair is impossible: restore a copy, or build again."
        ) from None
    try:
        samples = [(int(i), text) for i, text in read_seal(store.folder, entry)["samples"]]
        now = dict(sample(np.array([i for i, _ in samples], dtype=np.int64))) if samples else {}
        agree = all(now[i] == text for i, text in samples)
    except (OSError, StoreError):
        samples = list(sample(ids))
        seal = {"ids": runs.to_runs(ids).tolist(), "samples": samples, "sha256": ""}
        agree = entry_of("", seal).data == entry.data
    if not agree:
        raise MismatchError(
            f"The training examples of {entry.name} (ids {entry.first} to {entry.last}) are not those that "
            f"{store.folder} was built from, so it is not repaired. Give the same data, or restore it from a copy."
        )
    generation = manifest.generation + 1
    name = f"{unused_number(store.folder, generation):04d}-{number:05d}"
    planned = PlannedShard(runs.to_runs(ids).tolist(), name=name)
    (store.folder / SHARDS).mkdir(exist_ok=True)
    with storing(store.folder):
        begin_unfinished(store.folder, [name], None)
    try:
        with shard_writer(store.folder, manifest, planned, columns(ids), samples) as writer:
            yield ids, writer
        made = entry_of(name, read_checked(store.folder / SHARDS / f"{name}.json"))
        made = made._replace(origins=entry.computed_in)  # the same examples at the same checkpoints
        shards = (*manifest.shards[:number], made, *manifest.shards[number + 1 :])
        end_unfinished(store.folder)
        write_manifest(store.folder, replace(manifest, generation=generation, shards=shards))
    except BaseException:
        supersede(store.folder, GradientStore(store.folder).manifest, Superseded([name]))
        end_unfinished(store.folder)
        raise
    supersede(store.folder, GradientStore(store.folder).manifest, Superseded([entry.name]))


def _upgraded(store: GradientStore) -> GradientStore:
    """The store with every shard copied, its factors packed."""
    job = Job.pending(store.folder)
    if job is None:
        if not store.has_factors:
            raise ArgumentError(f"{store.folder} has no factors, so there is nothing to upgrade.")
        if store.manifest.packing:
            return store  # the command was given again after its end
        sample = store.factors(store.spread_ids(PACKING_SAMPLE))
        packing = packing_of(sample, store.manifest.factors or "float32")
        if not packing:
            why = "; ".join(f"{layer.title}: {why_whole(layer.d_out)}" for layer in store.manifest.map.layers)
            raise ArgumentError(f"{store.folder} has no layer whose factors take less room packed ({why}). It stays.")
        plan = [
            PlannedShard(runs.to_runs(ids).tolist(), [[".", entry.name, 0]], _origins_within([entry], ids[0], ids[-1]))
            for number, entry in enumerate(store.manifest.shards)
            if len(ids := runs.to_ids(runs.without(store.shard_runs(number), store.manifest.removed)))
        ]
        after = replace(kept(store), removed=(), packing=packing)
        columns = lambda ids: {name: store.column_as_stored(name, ids) for name in after.columns}  # noqa: E731
        check_room(store.folder, shard_bytes(after, plan, columns))
        job = Job.begin(store.folder, "compact", after, None, plan)
    copy_rows(job, {".": store})
    return GradientStore(store.folder)


def _repacking(store: GradientStore) -> tuple[list[PlannedShard], list[ShardEntry]]:
    """The shards that a compaction makes, and the entries of those that stay as they are."""
    keep: list[ShardEntry] = []
    plan: list[PlannedShard] = []
    group: list[tuple[ShardEntry, NDArray[np.int64]]] = []
    removed, shard_rows = runs.as_runs(store.manifest.removed), store.manifest.shard_rows

    def end_group() -> None:
        if len(group) == 1 and runs.count(group[0][1]) == group[0][0].rows:
            keep.append(group[0][0])  # small, but with no neighbour to join
        elif group:
            ids = runs.to_ids(np.concatenate([live for _, live in group]))
            for start in range(0, len(ids), shard_rows):
                new_ids = ids[start : start + shard_rows]
                first, last = int(new_ids[0]), int(new_ids[-1])
                entries = [entry for entry, _ in group if entry.first <= last and entry.last >= first]
                sources = [[".", entry.name, 0] for entry in entries]
                origins = _origins_within(entries, first, last)
                plan.append(PlannedShard(runs.to_runs(new_ids).tolist(), sources, origins))
        group.clear()

    for number, entry in enumerate(store.manifest.shards):
        live = runs.without(store.shard_runs(number), removed)
        if runs.count(live) == entry.rows >= shard_rows // 2:
            end_group()
            keep.append(entry)
        else:
            group.append((entry, live))
    end_group()
    return plan, keep


def _origins_within(entries: Sequence[ShardEntry], first: int, last: int) -> list[list[Any]]:
    """Where ids from ``first`` to ``last`` were computed that are copied from some shards."""
    spans = [(seal, max(begin, first), min(end, last)) for entry in entries for seal, begin, end in entry.computed_in]
    return [[seal, begin, end] for seal, begin, end in spans if begin <= end]


def _check_mergeable(store: GradientStore, other: GradientStore) -> None:
    differing = store.manifest.differences(other.manifest, bases=True)
    if store.manifest.fingerprint != other.manifest.fingerprint and not differing:
        differing = ["map"]
    if differing and set(differing) <= {"bases", "fitted_to"}:
        raise MismatchError(
            f"{other.folder} cannot be merged into {store.folder}: each projection was fitted to its own data, so "
            f"their bases differ. Rebuild {other.folder} with: gradindex build --bases-from {store.folder}."
        )
    if differing:
        raise MismatchError(
            f"{other.folder} cannot be merged into {store.folder}: {'; '.join(differing)} differ. "
            "Rebuild it with the task and options of the other."
        )


def _check_apart(store: GradientStore, plan: Sequence[PlannedShard]) -> None:
    """Ids must be new: apart from each other, and from all that the store has or ever had."""
    spans = [(0, store.manifest.next_id, store.folder.name)]
    spans += [(shard.ids[0][0], shard.ids[-1][1], Path(shard.sources[0][0]).name) for shard in plan]
    for (_, stop, one), (start, _, other) in itertools.pairwise(sorted(spans)):
        if start < stop:
            raise ArgumentError(
                f"Ids of {one} and {other} collide: {other} has {start}, and {one} has or had ids up to {stop - 1}. "
                f"Give an offset, such as {store.manifest.next_id}."
            )
