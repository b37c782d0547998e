"""What there is to know about a store without reading its rows."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import is_there
from . import runs
from .bases import base_files
from .claiming import left_over
from .documents import MANIFEST, SHARDS, as_json
from .following import asked_again
from .job import Job, seconds_spent
from .manifest import Manifest
from .reader import GradientStore
from .shards import check_unchanged


@dataclass(frozen=True)
class Overview:
    """What a store holds, complete or not.

    Args:
        manifest: of the store, or the one that it will have.
        n_train: how many examples have a row, or will have one.
        shards: how many there are, or will be.
        removed: how many rows were removed.
        bytes: on disk.
        seconds: that making its shards took.
        state: ``"complete"``, or how far it is.
        health: sentences; whether files are there is looked at, their content is not.
        search: how rows are searched, where somebody looked.
        data: of a build that has not finished, by which the same data are known again.
    """

    manifest: Manifest
    n_train: int
    shards: int
    removed: int
    bytes: int
    seconds: float
    state: str
    health: list[str]
    search: str | None = None
    data: Any = None

    @property
    def complete(self) -> bool:
        """Whether it answers queries."""
        return self.state == "complete"

    def searched(self, how: str) -> Overview:
        """The same with how its rows are searched."""
        return replace(self, search=how)

    def to_json(self) -> dict[str, Any]:
        """The manifest without its shards and removed ids, and all else that is said here."""
        if self.complete:
            said = as_json(self.manifest) | {"sha256": self.manifest.sha256}
        else:
            said = self.manifest.to_json() | {"data": self.data}
        names = ("n_train", "shards", "removed", "bytes", "seconds", "state", "health")
        said |= {name: getattr(self, name) for name in names}
        return said | ({} if self.search is None else {"search": self.search})


def overview(folder: str | os.PathLike[str]) -> Overview:
    """What a store holds, complete or not, without reading its rows.

    Raises:
        StoreError: no store, a damaged manifest, or another version.
    """
    path = Path(folder)
    try:
        return asked_again(lambda: _overview(path))
    except StoreError:
        return _overview(path)  # it may have become complete between two looks


def _overview(path: Path) -> Overview:
    job = Job.pending(path)
    if job is not None and not is_there(path / MANIFEST):
        return _unfinished(path, job)
    store = GradientStore(path)
    entries, removed = store.manifest.shards, runs.count(store.manifest.removed)
    health = []
    if job is not None:
        done = len(job.plan) - len(job.missing())
        health.append(
            f"an unfinished `{job.kind}`: {done} of {len(job.plan)} shards are done; rerun the command to resume"
        )
    if removed:
        health.append(f"{removed:,} removed rows still take space; `gradindex compact` frees it")
    files = [Path(SHARDS) / f"{entry.name}{suffix}" for entry in entries for suffix in (".h5", ".json")]
    digest = store.manifest.map.bases
    files += [] if digest is None else [Path(name) for name in sorted(base_files(digest))]
    missing = [file for file in files if not _is_file(path / file)]
    if missing:
        check_unchanged(path, store.manifest)
        health.append(f"{len(missing)} files are missing, the first is {missing[0]}; `build --repair` recomputes them")
    unnamed = left_over(path)
    if unnamed:
        health.append(
            f"{len(unnamed)} shards belong to no rows, the first is {SHARDS}/{unnamed[0]}: they are left from an "
            "abandoned change and can be deleted, unless this manifest was restored over a newer one that names them"
        )
    return Overview(
        manifest=store.manifest,
        n_train=store.n_train,
        shards=len(entries),
        removed=removed,
        bytes=_size(path),
        seconds=seconds_spent(path, [entry.name for entry in entries]),
        state="complete",
        health=health or ["all files are there; `gradindex verify` reads them"],
    )


def _unfinished(path: Path, job: Job) -> Overview:
    missing = job.missing()
    done, total = job.rows_done()
    names = [planned.name for planned in job.plan if planned not in missing]
    return Overview(
        manifest=job.after,
        n_train=total,
        shards=len(job.plan),
        removed=0,
        bytes=_size(path),
        seconds=seconds_spent(path, names),
        state=f"unfinished, {len(names)} shards done",
        health=[f"{done:,} of {total:,} rows are done; rerun the same `gradindex build` to resume"],
        data=job.data,
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _size(path: Path) -> int:
    size = 0
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):  # a temporary file may be gone by now
            size += file.stat().st_size if file.is_file() else 0
    return size
