"""A change of a store under way: which shards it makes, which are done, and the manifest at its end.

Build, add, add-checkpoint, compact and merge are all jobs: the plan is written first, then shards, each whole
or not there, in any order and by any number of processes; the manifest comes last and makes all of them the
store's at once. Until then a store answers as before. Whoever gives the same command again goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, MismatchError, StoreError
from ..files import digest_of, discard, is_there, leftovers, locked, read_checked, storing, write_checked
from . import runs
from .bases import base_files
from .container import Spec, Writer, writing
from .encoding import encode
from .layout import as_stored, row_specs, shard_bytes
from .manifest import FORMAT, INDEX, LOCK, MANIFEST, PENDING, SHARDS, VERSION, differences, read_manifest, read_pending
from .shards import FACTOR_SIDES, Shard, factor_name

# The i-th of n parts of a job's shards, from 1 on.
Part = tuple[int, int]
_LOG = "log.jsonl"
_OUR_SHARDS = re.compile(r"\d{4,}-\d{5,}\.(h5|json)(\.tmp-.*)?")


def check_part(part: Part | None) -> None:
    """Refuse a part that there cannot be.

    Raises:
        ArgumentError: it is not from 1 to the number of parts.
    """
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ArgumentError(f"part is {part[0]}/{part[1]}, but must be from 1/{part[1]} to {part[1]}/{part[1]}.")


def share(plan: list[dict[str, Any]], part: Part | None) -> list[dict[str, Any]]:
    """The shards of a plan that a part makes: every n-th, or all."""
    return plan if part is None else plan[part[0] - 1 :: part[1]]


@contextmanager
def claimed(folder: Path, part: Part | None = None, *, new: bool = False) -> Iterator[None]:
    """Be the only process that changes a store, or that makes this part of it.

    Args:
        folder: the store's.
        part: let those in who make another part of as many.
        new: make the folder, unless something else is in it.

    Raises:
        StoreError: another process has it, it cannot be written, or it holds something else.
    """
    if new:
        _check_free(folder)
    with contextlib.ExitStack() as stack:
        with storing(folder):
            if new:
                (folder / SHARDS).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, shared=part is not None))
            if part is not None:
                stack.enter_context(locked(folder / f"{LOCK}-{part[0]}-of-{part[1]}"))
                for other in folder.glob(f"{LOCK}-*-of-*"):
                    if not other.name.endswith(f"-of-{part[1]}"):  # other parts would be of the same shards
                        with locked(other):
                            pass
        yield


def _check_free(folder: Path) -> None:
    """Refuse to make a store where something else is, or what is left of one."""
    shards = folder / SHARDS
    with storing(folder):
        if not folder.exists():
            return
        here = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
        inside = [path.name for path in shards.iterdir()] if shards.is_dir() else []
    if any(not _ours(name) for name in here) or any(not _OUR_SHARDS.fullmatch(name) for name in inside):
        raise StoreError(f"{folder} is not empty and holds no gradindex store. Choose another folder.")
    if inside and not is_there(folder / MANIFEST) and not is_there(folder / PENDING):
        raise StoreError(
            f"{folder} holds shards, but neither {MANIFEST} nor {PENDING}, which say what they are. "
            "Restore it from a copy, or delete the folder."
        )


def _ours(name: str) -> bool:
    own = name in (MANIFEST, PENDING, SHARDS, INDEX, _LOG, LOCK)
    return own or name.startswith((f"{LOCK}-", "bases-", f"{MANIFEST}.tmp-", f"{PENDING}.tmp-"))


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
        generation = generation_of(folder) + 1
        with storing(folder / PENDING), locked(folder / f"{LOCK}-plan", wait=True):
            job = cls.pending(folder)
            if job is not None:
                job.check_same(after)
                return job
            named = [{"name": f"{generation:04d}-{number:05d}", **planned} for number, planned in enumerate(plan)]
            header = {"format": FORMAT, "version": VERSION, "needs": [], "job": kind}
            pending = {**header, "after": {**after, "generation": generation}, "plan": named, "keep": list(keep)}
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
        for planned in self.missing(part):
            discard(*leftovers(self.folder / SHARDS, planned["name"]))

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
            if (seal["map"], seal["ids"]) != (self.after["fingerprint"], planned["ids"]):
                return None
            return entry_of(planned["name"], seal) if path.stat().st_size == seal["bytes"] else None
        except (OSError, ValueError, KeyError):
            return None

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
        write_manifest(self.folder, {**after, "shards": shards})
        discard(self.folder / PENDING)
        sweep(self.folder)

    def made(self, limit: int) -> list[tuple[int, NDArray[np.float64]]]:
        """The first id of up to ``limit`` shards that are made, and its losses (C,).

        A shard that turns out to be damaged loses its seal, and so is to be made again.
        """
        entries = [entry for planned in self.plan if (entry := self._entry(planned)) is not None]
        found = []
        for entry in entries[:: max(1, len(entries) // limit)]:
            try:
                shard = Shard(self.folder, entry)
                found.append((int(shard.ids[0]), shard.arrays.view("losses", 0, 1)[0]))
            except StoreError:
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
        with contextlib.suppress(OSError), (self.folder / _LOG).open("a") as log:
            log.write(json.dumps(note) + "\n")


class ShardWriter:
    """Appends rows to a shard.

    Args:
        raw: writes its arrays.
        after: the manifest.
        ids: (m,) of the shard.
    """

    def __init__(self, raw: Writer, after: Mapping[str, Any], ids: NDArray[np.int64]) -> None:
        self.raw, self._after, self._ids, self._place = raw, after, ids, 0

    def append(
        self,
        rows: NDArray[np.float32],
        self_influence: NDArray[np.float64],
        losses: NDArray[np.float64],
        factors: Mapping[tuple[int, int], tuple[NDArray[Any], NDArray[Any]]],
    ) -> None:
        """The next rows (b, dim), their self-influence and losses (b, C), and factors by (checkpoint, layer).

        Raises:
            ArgumentError: a number is too large for the type in which it is stored.
            StoreError: they cannot be written.
        """
        place, kind = self._place, self._after["factors"]
        name = lambda row: f"Training example {self._ids[place + row]}"  # noqa: E731  # short, used twice
        arrays = encode(rows, self._after["row_type"], self_influence.shape[1], name)
        arrays |= {"self_influence": self_influence, "losses": losses}
        for (checkpoint, layer), sides in factors.items():
            for side, values in zip(FACTOR_SIDES, sides, strict=True):
                (stored,) = encode(values, kind, 1, name, "factors").values()
                arrays[factor_name(checkpoint, layer, side)] = stored
        for array, values in arrays.items():
            self.raw.put(array, place, values)
        self._place += len(rows)


@contextmanager
def shard_writer(
    folder: Path,
    after: Mapping[str, Any],
    planned: Mapping[str, Any],
    columns: Mapping[str, NDArray[Any]],
    samples: Sequence[tuple[int, str]],
    specs: Mapping[str, Spec] | None = None,
) -> Iterator[ShardWriter]:
    """See :meth:`Job.shard`."""
    ids = runs.to_ids(planned["ids"])
    values = {f"columns/{name}": as_stored(column, after["columns"][name]) for name, column in columns.items()}
    all_specs = row_specs(after, len(ids)) if specs is None else {"ids": ((len(ids),), "<i8"), **specs}
    all_specs |= {name: (column.shape, column.dtype.str) for name, column in values.items()}
    attributes = {"format": FORMAT, "version": VERSION, "map": after["fingerprint"], "rows@row_type": after["row_type"]}
    about = {"name": planned["name"], "map": after["fingerprint"], "ids": planned["ids"]}
    about |= {"row_type": after["row_type"], "samples": samples}
    with writing(folder / SHARDS / f"{planned['name']}.h5", all_specs, attributes, about) as raw:
        for name, column in {"ids": ids, **values}.items():
            raw.put(name, 0, column)
        yield ShardWriter(raw, after, ids)


def entry_of(name: str, seal: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of a sealed shard."""
    ids = seal["ids"]
    return {
        "name": name,
        "first": ids[0][0],
        "last": ids[-1][1] - 1,
        "rows": runs.count(ids),
        "data": digest_of({"ids": ids, "samples": seal["samples"]}),
        "seal": seal["sha256"],
    }


def generation_of(folder: Path) -> int:
    """How often the store has changed; 0 before it is complete."""
    generation: int = read_manifest(folder)["generation"] if (folder / MANIFEST).exists() else 0
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
    with storing(folder / MANIFEST):
        write_checked(folder / MANIFEST, {"format": FORMAT, "version": VERSION, "needs": [], **manifest})


def sweep(folder: Path) -> None:
    """Delete files of the store that its manifest does not name."""
    manifest = read_manifest(folder)
    named = {f"{entry['name']}{suffix}" for entry in manifest["shards"] for suffix in (".h5", ".json")}
    digest = manifest["map"]["bases"]
    bases = set() if digest is None else base_files(digest)
    shards = [path for path in (folder / SHARDS).glob("*") if _OUR_SHARDS.fullmatch(path.name)]
    discard(*(path for path in shards if path.name not in named))
    discard(*(path for path in folder.glob("bases-*") if path.name not in bases), *leftovers(folder))


def progress_of(folder: Path) -> tuple[int, int]:
    """How many shards of the job under way are made, and how many it plans."""
    job = Job.pending(folder)
    return (0, 0) if job is None else (len(job.plan) - len(job.missing()), len(job.plan))


def seconds_spent(folder: Path, names: Collection[str]) -> float:
    """How long it took to make these shards, by the log."""
    seconds: dict[str, float] = {}
    with contextlib.suppress(OSError):
        for line in (folder / _LOG).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a killed process did not end
                note = json.loads(line)
                seconds[note["shard"]] = float(note["seconds"])
    return sum(seconds.get(name, 0.0) for name in names)
