"""A change of a store under way: which shards it makes, which are done, and the manifest at its end.

Build, add, add-checkpoint, compact and merge are all jobs: the plan is written first, then shards, each whole
or not there, in any order and by any number of processes; the manifest comes last and makes all of them the
store's at once. Until then a store answers as before. Whoever gives the same command again goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MismatchError, StoreError
from ..files import discard, is_there, leftovers, locked, own_file, read_checked, read_text, storing
from .claiming import Part, begin_unfinished, check_part, clean, end_unfinished, unused_number
from .documents import (
    LOCK,
    LOG,
    MANIFEST,
    PENDING,
    SHARDS,
    UNFINISHED,
    Plan,
    PlannedShard,
    Superseded,
    check_plan,
    read_manifest,
    read_plan,
    write_manifest,
    write_plan,
)
from .forms import check_seal
from .hdf5 import Spec
from .layout import Expected, shard_bytes
from .manifest import Manifest, ShardEntry
from .sealing import ShardWriter, entry_of, shard_writer
from .shards import Shard


def share(plan: Sequence[PlannedShard], part: Part | None) -> Sequence[PlannedShard]:
    """The shards of a plan that a part makes: every n-th, or all."""
    return plan if part is None else plan[part[0] - 1 :: part[1]]


class Job:
    """The plan of a change and what is done of it. The store must be claimed.

    Attributes:
        after: what the manifest says in the end, without its shards.
        data: by which the same data are known again.
        plan: the shards to make.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.kind, self.after, self.data, self.plan = plan.job, plan.after, plan.data, plan.shards
        self._keep = plan.keep

    @classmethod
    def pending(cls, folder: Path) -> Job | None:
        """The job that is under way, or ``None``."""
        plan = read_plan(folder)
        if plan is None:
            return None
        ended = plan.after.generation <= generation_of(folder)  # but for taking the plan away
        return None if ended else cls(folder, plan)

    @classmethod
    def begin(
        cls,
        folder: Path,
        kind: str,
        after: Manifest,
        data: Any,
        plan: Sequence[PlannedShard],
        keep: Sequence[ShardEntry] = (),
    ) -> Job:
        """Write down a plan, or go on with the one that an earlier run of the same command wrote.

        Args:
            folder: the store's.
            kind: of the job, for people.
            after: the manifest at the end, without its shards.
            data: by which the same data are known again, as JSON.
            plan: the shards to make, without names.
            keep: entries of the manifest that stay.

        Raises:
            MismatchError: another job is under way.
            StoreError: the plan cannot be written.
        """
        before = read_manifest(folder) if is_there(folder / MANIFEST) else None
        generation = 1 if before is None else before.generation + 1
        superseded = Superseded()
        if before is not None:
            staying = {entry.name for entry in keep}
            leaving = [entry.name for entry in before.shards if entry.name not in staying]
            superseded = Superseded(leaving, before.map.bases)
        with storing(folder / PENDING), locked(folder / f"{LOCK}-plan", wait=True):
            job = cls.pending(folder)
            if job is not None:
                job.check_same(after, data)
                return job
            first = unused_number(folder, generation)
            named = tuple(planned._replace(name=f"{first:04d}-{number:05d}") for number, planned in enumerate(plan))
            written = Plan(kind, replace(after, generation=generation), data, named, tuple(keep), superseded)
            check_plan(folder, written)
            if before is not None:  # what is left of a build is refused as it is
                begin_unfinished(folder, [planned.name for planned in named], after.map.bases)
            write_plan(folder, written)
        return cls(folder, written)

    def check_same(self, after: Manifest, data: Any) -> None:
        """Refuse to go on with what another command began.

        Raises:
            MismatchError: says what differs.
        """
        way_out = f"Rerun the same command to finish it, or delete {self.folder / PENDING} to abandon it."
        # Bases fitted by two processes can differ in their last digits; those of the plan hold.
        differing = self.after.differences(after)
        lengths = self.after.next_id, after.next_id
        if lengths[0] != lengths[1]:
            differing.append(f"data length ({lengths[0]} then, {lengths[1]} now)")
        elif self.data != data:
            differing.append("data")
        if not differing:
            return
        if self.kind == "build":
            raise MismatchError(
                f"{self.folder} holds a build of another task: {'; '.join(differing)} differ. "
                "Choose another folder, or delete this one."
            )
        raise MismatchError(
            f"{self.folder} has an unfinished `{self.kind}` of other data: {'; '.join(differing)} differ. {way_out}"
        )

    def missing(self, part: Part | None = None) -> list[PlannedShard]:
        """The planned shards that are still to be made, all or those of a part."""
        check_part(part)
        return [planned for planned in share(self.plan, part) if self._entry(planned) is None]

    def bytes_missing(self, columns: Callable[[NDArray[np.int64]], Mapping[str, NDArray[Any]]]) -> int:
        """What is still to be written, of all parts; ``columns`` gives values for ids (m,)."""
        return shard_bytes(self.after, self.missing(), columns)

    def tidy(self, part: Part | None = None) -> None:
        """Delete what killed processes left of the shards that are still to be made."""
        names = [f"{planned.name}{suffix}" for planned in self.missing(part) for suffix in (".h5", ".json")]
        discard(*leftovers(self.folder / SHARDS, *names))

    def rows_done(self, part: Part | None = None) -> tuple[int, int]:
        """How many rows are made, and how many there are to be, in all or in a part."""
        rows = [(planned.rows, self._entry(planned) is not None) for planned in share(self.plan, part)]
        return sum(count for count, done in rows if done), sum(count for count, _ in rows)

    def _entry(self, planned: PlannedShard) -> ShardEntry | None:
        """The manifest's entry of a shard, if it is whole."""
        path = self.folder / SHARDS / f"{planned.name}.h5"
        try:
            seal = read_checked(path.with_suffix(".json"))
            check_seal(seal)
            entry = entry_of(planned.name, seal)
            self._expected.check(entry, seal)
            if seal["ids"] != planned.ids or path.stat().st_size != seal["bytes"]:
                return None
        except (OSError, ValueError):
            return None
        return entry._replace(origins=planned.origins)

    @cached_property
    def _expected(self) -> Expected:
        return Expected(self.after)

    def finish(self) -> None:
        """Make the planned shards the store's, and take away what it no longer needs.

        Raises:
            StoreError: a shard is missing, or the manifest cannot be written.
        """
        entries = [self._entry(planned) for planned in self.plan]
        missing = [planned.name for planned, entry in zip(self.plan, entries, strict=True) if entry is None]
        if missing:
            raise StoreError(
                f"{self.folder} is a `{self.kind}` that has not finished: {len(missing)} of {len(self.plan)} shards "
                f"are missing, the first is {missing[0]}. Run the same `gradindex {self.kind}` again."
            )
        made = [entry for entry in entries if entry is not None]
        shards = sorted([*self._keep, *made], key=lambda entry: entry.first)
        end_unfinished(self.folder)
        write_manifest(self.folder, replace(self.after, shards=tuple(shards)))
        clean(self.folder)

    def give_up(self) -> None:
        """Take the plan away, and the shards that were made for it."""
        discard(*(self.folder / SHARDS / f"{shard.name}{end}" for shard in self.plan for end in (".json", ".h5")))
        discard(self.folder / PENDING, self.folder / UNFINISHED)

    def made(self, limit: int) -> list[tuple[int, NDArray[np.float64]]]:
        """The first id of up to ``limit`` shards that are made, and its losses (C,).

        A shard that turns out to be damaged loses its seal, and so is to be made again.
        """
        entries = [entry for planned in self.plan if (entry := self._entry(planned)) is not None]
        found = []
        for entry in entries[:: max(1, len(entries) // limit)]:
            try:
                shard = Shard(self.folder, entry, self._expected)
                found.append((int(shard.ids[0]), shard.arrays.view("losses", 0, 1)[0]))
            except (OSError, StoreError):
                discard(self.folder / SHARDS / f"{entry.name}.json")
        return found

    @contextmanager
    def shard(
        self,
        planned: PlannedShard,
        columns: Mapping[str, NDArray[Any]],
        samples: Sequence[tuple[int, str]],
        specs: Mapping[str, Spec] | None = None,
    ) -> Iterator[ShardWriter]:
        """Make one shard: whole and sealed when the block ends well, else not there.

        Args:
            planned: of the plan.
            columns: values for its ids.
            samples: ids and digests of some of its examples; what is added meanwhile is kept as well.
            specs: shapes and types of arrays, where they are copied; by default those of computed rows.

        Raises:
            StoreError: it cannot be written.
        """
        started = time.perf_counter()
        with shard_writer(self.folder, self.after, planned, columns, samples, specs) as writer:
            yield writer
        note = {"job": self.kind, "shard": planned.name, "rows": planned.rows}
        note |= {"seconds": round(time.perf_counter() - started, 3), "host": socket.gethostname()}
        # Beside the manifest, which is the same whenever a store is made; and nothing depends on it.
        with (
            contextlib.suppress(OSError),
            io.FileIO(own_file(self.folder / LOG, os.O_WRONLY | os.O_APPEND), "a") as log,
        ):
            log.write(f"{json.dumps(note)}\n".encode())


def generation_of(folder: Path) -> int:
    """How often the store has changed; 0 before it is complete."""
    return read_manifest(folder).generation if is_there(folder / MANIFEST) else 0


def progress_of(folder: Path) -> tuple[int, int]:
    """How many shards of the job under way are made, and how many it plans."""
    job = Job.pending(folder)
    return (0, 0) if job is None else (len(job.plan) - len(job.missing()), len(job.plan))


def seconds_spent(folder: Path, names: Collection[str]) -> float:
    """How long it took to make these shards, by the log."""
    seconds: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in read_text(folder / LOG).decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a killed process did not end
                note = json.loads(line)
                seconds[note["shard"]] = float(note["seconds"])
    return sum(seconds.get(name, 0.0) for name in names)
