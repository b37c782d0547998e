"""A store that goes on: new training examples, new checkpoints, damaged shards computed again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import MismatchError, StoreError
from .filling import batches, consecutive, fill, row_maker, running, threads
from .matching import check_task
from .projection import Projection
from .rows import describe, fit_bases
from .store import GradientStore, Job, changing, fingerprint, rewritten, write_bases
from .task import Task


def add(
    task: Task,
    folder: str | os.PathLike[str],
    *,
    device: str | None = None,
    channels_last: bool | None = None,
    workers: int = 0,
) -> GradientStore:
    """Add the training examples that a task has beyond those of its store; call it again to go on.

    Their ids are their positions in ``task.train``, which begins with the examples that are there already.

    Args:
        task: the one that the store was built from, with more training data.
        folder: of the store.
        device: as for :func:`build`.
        channels_last: as for :func:`build`.
        workers: as for :func:`build`.

    Returns:
        The store, as it was if there is nothing to add.

    Raises:
        MismatchError: the task is not the store's; says what differs.
        GradIndexError: the task, its data or the folder cannot be used; the store stays as it was.
    """
    with changing(folder, "add") as store:
        manifest, columns = store.manifest, task.column_arrays("train")
        with running(task, manifest["map"]["precision"], device, channels_last) as engine:
            check_task(store, engine)
            _check_columns(store, columns)
            first = manifest["next_id"]
            if first == task.n_train:
                return store
            new = np.arange(first, task.n_train, dtype=np.int64)
            after = {**store.kept(), "next_id": task.n_train, "data": task.data_fingerprint(new)}
            plan = consecutive(first, task.n_train, manifest["shard_rows"])
            job = Job.begin(store.folder, "add", after, plan, manifest["shards"])
            fill(job, engine, task, workers)
            job.finish()
    return GradientStore(folder)


def add_checkpoint(
    task: Task,
    folder: str | os.PathLike[str],
    *,
    device: str | None = None,
    channels_last: bool | None = None,
    workers: int = 0,
) -> GradientStore:
    """Add the checkpoints that a task has beyond those of its store, at the end; the others are not computed again.

    Rows of removed training examples are left out. Call it again to go on after an interruption.

    Args:
        task: the one that the store was built from, with checkpoints appended.
        folder: of the store.
        device: as for :func:`build`.
        channels_last: as for :func:`build`.
        workers: as for :func:`build`.

    Raises:
        MismatchError: the task is not the store's; says what differs.
        GradIndexError: the task, its data or the folder cannot be used; the store stays as it was.
    """
    with changing(folder, "add-checkpoint") as store:
        manifest, n = store.manifest, store.n_checkpoints
        precision = manifest["map"]["precision"]
        with running(replace(task, checkpoints=task.checkpoints[:n]), precision, device, channels_last) as engine:
            check_task(store, engine)
        if len(task.checkpoints) == n:
            return store
        later = replace(task, checkpoints=task.checkpoints[n:])
        with running(later, precision, device, channels_last) as engine:
            projection, unit_norm = Projection(**manifest["map"]["projection"]), manifest["map"]["unit_norm"]
            described = describe(engine, projection, unit_norm)
            if described["layers"] != manifest["map"]["layers"]:
                raise MismatchError(
                    f"The new checkpoints of {store.folder} need other routes for the layers. Build a new store."
                )
            map_ = {**manifest["map"], "checkpoints": manifest["map"]["checkpoints"] + described["checkpoints"]}
            if projection.fitted and Job.pending(store.folder) is None:
                fitted = fit_bases(engine, projection, manifest["batch_size"], first=n)
                map_["bases"] = write_bases(store.folder, {**(store.bases() or {}), **fitted})
            block_dim = manifest["dim"] // n
            after = {**store.kept(), "map": map_, "fingerprint": fingerprint(map_), "removed": []}
            after |= {"dim": block_dim * (n + engine.n_checkpoints), "data": None}
            job = Job.begin(store.folder, "add-checkpoint", after, store.live_plan())
            fill(job, engine, later, workers, beside=store)
            job.finish()
    return GradientStore(folder)


def repair(
    task: Task,
    folder: str | os.PathLike[str],
    *,
    device: str | None = None,
    channels_last: bool | None = None,
    workers: int = 0,
) -> list[str]:
    """Compute the damaged shards of a store again, and no others.

    Args:
        task: the one that the store was built from.
        folder: of the store.
        device: as for :func:`build`.
        channels_last: as for :func:`build`.
        workers: as for :func:`build`.

    Returns:
        One sentence for each shard that was mended; none if the store was sound.

    Raises:
        StoreError: something is damaged that cannot be computed again; says what.
        GradIndexError: the task, its data or the folder cannot be used.
    """
    said = []
    with changing(folder) as store:
        manifest = store.manifest
        projection = Projection(**manifest["map"]["projection"])
        damaged = list(store.damaged())
        basis = _damaged_bases(store)
        if not damaged and basis is None:
            return []
        with running(task, manifest["map"]["precision"], device, channels_last) as engine:
            if basis is not None:
                with threads(manifest["threads"]):
                    fitted = fit_bases(engine, projection, manifest["batch_size"])
                if write_bases(store.folder, fitted) != manifest["map"]["bases"]:
                    raise StoreError(f"{basis} Fitting them again gives others.")
                said.append(f"{basis} They were fitted again.")
            check_task(store.without([number for number, _ in damaged]), engine)
            maker = row_maker(engine, manifest, store.bases())
            columns = task.column_arrays("train")
            _check_columns(store, columns)
            for number, problem in damaged:
                with rewritten(store, number, columns, task.sample_digests) as (ids, writer):
                    for _, batch in batches(maker, task, ids, manifest, workers):
                        writer.append(batch.rows, batch.self_influence, batch.losses, batch.factors)
                said.append(f"{problem}: computed again")
    return said


def _check_columns(store: GradientStore, columns: Mapping[str, NDArray[Any]]) -> None:
    kinds = {name: values.dtype.kind for name, values in columns.items()}
    if kinds != store.manifest["columns"]:
        raise MismatchError(
            f"The task does not match {store.folder}: columns differ ({', '.join(store.columns) or 'none'} stored, "
            f"{', '.join(kinds) or 'none'} now). Give the same columns."
        )


def _damaged_bases(store: GradientStore) -> str | None:
    try:
        store.bases()
    except StoreError as error:
        return str(error)
    return None
