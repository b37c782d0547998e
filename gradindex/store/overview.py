"""What there is to know about a store without reading its rows."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import is_there
from . import runs
from .bases import base_files
from .claiming import left_over
from .following import asked_again
from .job import Job, seconds_spent
from .manifest import MANIFEST, SHARDS
from .reader import GradientStore
from .shards import check_unchanged


def overview(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a store holds, complete or not, as JSON.

    Returns:
        The manifest without its shards and removed ids, and ``n_train``, ``bytes`` on disk, ``shards`` (their
        number), ``seconds`` that making them took, ``removed`` (how many), ``state`` and ``health``, a list of
        sentences; whether files are there is looked at, their content is not.

    Raises:
        StoreError: no store, a damaged manifest, or another version.
    """
    path = Path(folder)
    try:
        return asked_again(lambda: _overview(path))
    except StoreError:
        return _overview(path)  # it may have become complete between two looks


def _overview(path: Path) -> dict[str, Any]:
    job = Job.pending(path)
    if job is not None and not is_there(path / MANIFEST):
        return _unfinished(path, job)
    store = GradientStore(path)
    entries, removed = store.manifest["shards"], runs.count(store.manifest["removed"])
    health = []
    if job is not None:
        done = len(job.plan) - len(job.missing())
        health.append(f"an unfinished `{job.kind}`: {done} of {len(job.plan)} shards are made; give the command again")
    if removed:
        health.append(f"{removed:,} removed rows still take room; `gradindex compact` frees it")
    files = [Path(SHARDS) / f"{entry['name']}{suffix}" for entry in entries for suffix in (".h5", ".json")]
    digest = store.manifest["map"]["bases"]
    files += [] if digest is None else [Path(name) for name in sorted(base_files(digest))]
    missing = [file for file in files if not _is_file(path / file)]
    if missing:
        check_unchanged(path, store.manifest)
        health.append(f"{len(missing)} files are missing, the first is {missing[0]}; `build --repair` makes them")
    unnamed = left_over(path)
    if unnamed:
        health.append(
            f"{len(unnamed)} shards belong to no rows, the first is {SHARDS}/{unnamed[0]}: of a change that was given "
            "up, or of a newer manifest in whose place this one was put back; else they can be deleted"
        )
    return {
        **{name: value for name, value in store.manifest.items() if name not in ("shards", "removed")},
        "n_train": store.n_train,
        "shards": len(entries),
        "removed": removed,
        "bytes": _size(path),
        "seconds": seconds_spent(path, [entry["name"] for entry in entries]),
        "state": "complete",
        "health": health or ["all files are there; `gradindex verify` reads them"],
    }


def _unfinished(path: Path, job: Job) -> dict[str, Any]:
    missing = job.missing()
    done, total = job.rows_done()
    names = [planned["name"] for planned in job.plan if planned not in missing]
    return {
        **job.after,
        "n_train": total,
        "shards": len(job.plan),
        "removed": 0,
        "bytes": _size(path),
        "seconds": seconds_spent(path, names),
        "state": f"unfinished, {len(names)} shards done",
        "health": [f"{done:,} of {total:,} rows are made; give the same `gradindex build` again to go on"],
    }


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
