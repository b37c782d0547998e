"""A change of a store under way: which shards it makes, which are done, and the manifest at its end.

Build, add, add-checkpoint, compact and merge are all jobs: the plan is written first, then shards, each whole
or not there, in any order and by any number of processes; the manifest comes last and makes all of them the
store's at once. Until then a store answers as before. Whoever gives the same command again goes on.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, MismatchError, StoreError
from ..files import discard, is_there, leftovers, locked, own_file, read_checked, read_text, storing, write_checked
from . import runs
from .claiming import Part, begin_unfinished, check_part, clean, end_unfinished, unused_number
from .container import Spec
from .forms import Expected, check_manifest, check_pending, check_seal, needs_of
from .layout import shard_bytes
from .manifest import (
    FORMAT,
    LOCK,
    LOG,
    MANIFEST,
    PENDING,
    SHARDS,
    UNFINISHED,
    VERSION,
    differences,
    read_manifest,
    read_pending,
)
from .sealing import ShardWriter, entry_of, shard_writer
from .shards import Shard, expected_of


def share(plan: list[dict[str, Any]], part: Part | None) -> list[dict[str, Any]]:
    """The shards of a plan that a part makes: every n-th, or all."""
    return plan if part is None else plan[part[0] - 1 :: part[1]]


class Job:
    """The plan of a change and what is done of it. The store must be claimed.

    Attributes:
        after: what the manifest says in the end, without its shards.
        plan: the shards to make: ``name``, ``ids`` (runs) and, where rows are copied, ``sources``.
    """

    def __init__(self, folder: Path, pending: Mapping[str, Any]) -> None:
        self.folder = folder
        self.kind: str = pending["job"]
        self.after: dict[str, Any] = pending["after"]
        self.plan: list[dict[str, Any]] = pending["plan"]
        self._keep: list[dict[str, Any]] = pending["keep"]

    @classmethod
    def pending(cls, folder: Path) -> Job | None:
        """The job that is under way, or ``None``."""
        pending = read_pending(folder)
        if pending is None:
            return None
        ended = pending["after"]["generation"] <= generation_of(folder)  # but for taking the plan away
        return None if ended else cls(folder, pending)

    @classmethod
    def begin(
        cls,
        folder: Path,
        kind: str,
        after: Mapping[str, Any],
        plan: Sequence[Mapping[str, Any]],
        keep: Sequence[Mapping[str, Any]] = (),
    ) -> Job:
        """Write down a plan, or go on with the one that an earlier run of the same command wrote.

        Args:
            folder: the store's.
            kind: of the job, for people.
            after: the manifest without ``shards``, and ``data``, by which the same data are known again.
            plan: ``ids`` of each shard, and ``sources``.
            keep: entries of the manifest that stay.

        Raises:
            MismatchError: another job is under way.
            StoreError: the plan cannot be written.
        """
        before = read_manifest(folder) if is_there(folder / MANIFEST) else None
        generation = 1 if before is None else before["generation"] + 1
        staying = {entry["name"] for entry in keep}
        superseded: dict[str, Any] = {"shards": [], "bases": None}
        if before is not None:
            superseded["shards"] = [entry["name"] for entry in before["shards"] if entry["name"] not in staying]
            superseded["bases"] = before["map"]["bases"]
        with storing(folder / PENDING), locked(folder / f"{LOCK}-plan", wait=True):
            job = cls.pending(folder)
            if job is not None:
                job.check_same(after)
                return job
            first = unused_number(folder, generation)
            named = [{"name": f"{first:04d}-{number:05d}", **planned} for number, planned in enumerate(plan)]
            header = {"format": FORMAT, "version": VERSION, "needs": needs_of(after), "job": kind}
            pending = {**header, "after": {**after, "generation": generation}, "plan": named, "keep": list(keep)}
            pending["supersedes"] = superseded
            try:
                check_pending(json.loads(json.dumps(pending)))  # what could not be read is never written
            except ValueError as error:
                raise ArgumentError(f"{folder} cannot hold this: {error}. Change the task.") from None
            if before is not None:  # what is left of a build is refused as it is
                begin_unfinished(folder, [planned["name"] for planned in named], after["map"]["bases"])
            write_checked(folder / PENDING, pending)
        return cls(folder, pending)

    def check_same(self, after: Mapping[str, Any]) -> None:
        """Refuse to go on with what another command began.

        Raises:
            MismatchError: says what differs.
        """
        way_out = f"Finish it with the same command as before, or delete {self.folder / PENDING} to give it up."
        # Bases fitted by two processes can differ in their last digits; those of the plan hold.
        unfitted = {**after, "map": {name: value for name, value in after["map"].items() if name != "bases"}}
        differing = differences(self.after, unfitted)
        lengths = self.after["next_id"], after["next_id"]
        if lengths[0] != lengths[1]:
            differing.append(f"data length ({lengths[0]} then, {lengths[1]} now)")
        elif self.after["data"] != after["data"]:
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

    def missing(self, part: Part | None = None) -> list[dict[str, Any]]:
        """The planned shards that are still to be made, all or those of a part."""
        check_part(part)
        return [planned for planned in share(self.plan, part) if self._entry(planned) is None]

    def bytes_missing(self, columns: Callable[[NDArray[np.int64]], Mapping[str, NDArray[Any]]]) -> int:
        """What is still to be written, of all parts; ``columns`` gives values for ids (m,)."""
        return shard_bytes(self.after, self.missing(), columns)

    def tidy(self, part: Part | None = None) -> None:
        """Delete what killed processes left of the shards that are still to be made."""
        names = [f"{planned['name']}{suffix}" for planned in self.missing(part) for suffix in (".h5", ".json")]
        discard(*leftovers(self.folder / SHARDS, *names))

    def rows_done(self, part: Part | None = None) -> tuple[int, int]:
        """How many rows are made, and how many there are to be, in all or in a part."""
        mine = share(self.plan, part)
        rows = [(runs.count(planned["ids"]), self._entry(planned) is not None) for planned in mine]
        return sum(count for count, done in rows if done), sum(count for count, _ in rows)

    def _entry(self, planned: Mapping[str, Any]) -> dict[str, Any] | None:
        """The manifest's entry of a shard, if it is whole."""
        path = self.folder / SHARDS / f"{planned['name']}.h5"
        try:
            seal = read_checked(path.with_suffix(".json"))
            check_seal(seal)
            entry = entry_of(planned["name"], seal)
            self._expected.check(entry, seal)
            if seal["ids"] != planned["ids"] or path.stat().st_size != seal["bytes"]:
                return None
        except (OSError, ValueError):
            return None
        return entry | ({"origins": planned["origins"]} if "origins" in planned else {})

    @cached_property
    def _expected(self) -> Expected:
        return expected_of(self.after)

    def finish(self) -> None:
        """Make the planned shards the store's, and take away what it no longer needs.

        Raises:
            StoreError: a shard is missing, or the manifest cannot be written.
        """
        entries = [self._entry(planned) for planned in self.plan]
        missing = [planned["name"] for planned, entry in zip(self.plan, entries, strict=True) if entry is None]
        if missing:
            raise StoreError(
                f"{self.folder} is a `{self.kind}` that has not finished: {len(missing)} of {len(self.plan)} shards "
                f"are missing, the first is {missing[0]}. Run the same `gradindex {self.kind}` again."
            )
        made = [entry for entry in entries if entry is not None]
        shards = sorted([*self._keep, *made], key=lambda entry: int(entry["first"]))
        after = {name: value for name, value in self.after.items() if name != "data"}
        end_unfinished(self.folder)
        write_manifest(self.folder, {**after, "shards": shards})
        clean(self.folder)

    def give_up(self) -> None:
        """Take the plan away, and the shards that were made for it."""
        discard(*(self.folder / SHARDS / f"{shard['name']}{end}" for shard in self.plan for end in (".json", ".h5")))
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
                discard(self.folder / SHARDS / f"{entry['name']}.json")
        return found

    @contextmanager
    def shard(
        self,
        planned: Mapping[str, Any],
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
        note = {"job": self.kind, "shard": planned["name"], "rows": runs.count(planned["ids"])}
        note |= {"seconds": round(time.perf_counter() - started, 3), "host": socket.gethostname()}
        # Beside the manifest, which is the same whenever a store is made; and nothing depends on it.
        with (
            contextlib.suppress(OSError),
            io.FileIO(own_file(self.folder / LOG, os.O_WRONLY | os.O_APPEND), "a") as log,
        ):
            log.write(f"{json.dumps(note)}\n".encode())


def generation_of(folder: Path) -> int:
    """How often the store has changed; 0 before it is complete."""
    generation: int = read_manifest(folder)["generation"] if is_there(folder / MANIFEST) else 0
    return generation


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest, which changes the store at once.

    Raises:
        StoreError: it cannot be written, or shards overlap.
    """
    shards = manifest["shards"]
    for before, after in itertools.pairwise(shards):
        if before["last"] >= after["first"]:
            raise StoreError(f"{folder}: the ids of {before['name']} and {after['name']} overlap.")
    whole = {"format": FORMAT, "version": VERSION, "needs": needs_of(manifest), **manifest}
    try:
        check_manifest(whole)  # what could not be read is never written
    except ValueError as error:
        raise StoreError(f"{folder} cannot become what this change makes of it: {error}. It stays as it was.") from None
    with storing(folder / MANIFEST):
        write_checked(folder / MANIFEST, whole)


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
