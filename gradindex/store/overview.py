"""What there is to know about a store without reading its rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import StoreError
from . import runs
from .job import Job, seconds_spent
from .manifest import MANIFEST, PENDING, SHARDS
from .reader import GradientStore


def overview(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a store holds, complete or not, as JSON.

    Returns:
        The manifest without its shards and removed ids, and ``n_train``, ``bytes`` on disk, ``shards`` (their
        number), ``seconds`` that making them took, ``removed`` (how many), ``state``, ``search``, and ``health``,
        a list of sentences; whether files are there and of the right size is looked at, their content is not.

    Raises:
        StoreError: no store, a damaged manifest, or another version.
    """
    path = Path(folder)
    job = Job.pending(path) if (path / PENDING).exists() else None
    if not (path / MANIFEST).exists() and job is not None:
        return _unfinished(path, job)
    store = GradientStore(path)
    entries, removed = store.manifest["shards"], runs.count(store.manifest["removed"])
    health = []
    if job is not None:
        done = len(job.plan) - len(job.missing())
        health.append(f"an unfinished `{job.kind}`: {done} of {len(job.plan)} shards are made; give the command again")
    if removed:
        health.append(f"{removed:,} removed rows still take room; `gradindex compact` frees it")
    missing = [e["name"] for e in entries if not (path / SHARDS / f"{e['name']}.h5").exists()]
    if missing:
        health.append(f"{len(missing)} shards are missing, the first is {missing[0]}; `build --repair` makes them")
    return {
        **{name: value for name, value in store.manifest.items() if name not in ("shards", "removed")},
        "n_train": store.n_train,
        "shards": len(entries),
        "removed": removed,
        "bytes": _size(path),
        "seconds": seconds_spent(path, [entry["name"] for entry in entries]),
        "state": "complete",
        "search": "exact over all rows",
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
        "search": "none before it is complete",
        "health": [f"{done:,} of {total:,} rows are made; give the same `gradindex build` again to go on"],
    }


def _size(path: Path) -> int:
    try:
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}. Check the folder.") from None
