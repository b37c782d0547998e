"""A store that goes on: new training examples, new checkpoints, damaged shards computed again."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import MismatchError, StoreError
from .files import storing
from .filling import batches, fill, planned, row_maker, running, threads
from .gradients import Engine, continued
from .matching import check_task
from .options import ComputeKeywords, ComputeOptions, chosen
from .reading import reading_processes
from .rows import describe, fit_bases, projection_of
from .store import (
    GradientStore,
    Job,
    changing,
    digest_of_bases,
    extend_moments,
    follow_moments,
    kept,
    live_plan,
    rewritten,
    write_bases,
)
from .task import Task

if TYPE_CHECKING:
    from typing_extensions import Unpack


def add(
    task: Task,
    folder: str | os.PathLike[str],
    *,
    options: ComputeOptions | None = None,
    **keywords: Unpack[ComputeKeywords],
) -> GradientStore:
    """Add a task's new training examples to its store; call it again to resume after an interruption.

    Their ids are their positions in ``task.train``, which must start with the examples that the store already has.

    Args:
        task: the one that the store was built from, with more training data.
        folder: of the store.
        options: where and how gradients are computed.
        **keywords: fields of :class:`~gradindex.options.ComputeOptions`, such as ``device="cuda"``.

    Returns:
        The store; unchanged if there is nothing to add.

    Raises:
        MismatchError: the task is not the store's; says what differs.
        GradIndexError: the task, its data or the folder cannot be used; the store stays as it was.
    """
    options = chosen(options, keywords, ComputeOptions)
    with changing(folder, "add") as store:
        manifest = store.manifest
        precision = manifest.map.precision
        with running(task, precision, options, manifest.batch_size) as engine:
            check_task(store, engine)
            _check_columns(store, task)
            first = manifest.next_id
            if first == task.n_train:
                return store
            new = task.train_ids[task.train_ids >= first]
            after, data = replace(kept(store), next_id=task.n_train), task.data_fingerprint(new)
            plan = planned(new, manifest.shard_rows)
            job = Job.begin(store.folder, "add", after, data, plan, manifest.shards)
            fill(job, engine, task, options.workers)
            job.finish()
        follow_moments(store.folder)
    return GradientStore(folder)


def add_checkpoint(
    task: Task,
    folder: str | os.PathLike[str],
    *,
    options: ComputeOptions | None = None,
    **keywords: Unpack[ComputeKeywords],
) -> GradientStore:
    """Append a task's new checkpoints to its store; gradients of the others are not recomputed.

    Rows of removed training examples are dropped. Call it again to resume after an interruption.

    Args:
        task: the one that the store was built from, with checkpoints appended.
        folder: of the store.
        options: where and how gradients are computed.
        **keywords: fields of :class:`~gradindex.options.ComputeOptions`, such as ``device="cuda"``.

    Raises:
        MismatchError: the task is not the store's; says what differs.
        GradIndexError: the task, its data or the folder cannot be used; the store stays as it was.
    """
    options = chosen(options, keywords, ComputeOptions)
    with changing(folder, "add-checkpoint") as store:
        manifest, n = store.manifest, store.n_checkpoints
        precision, batch_size = manifest.map.precision, manifest.batch_size
        earlier = replace(task, checkpoints=task.checkpoints[:n])
        with running(earlier, precision, options, batch_size) as engine:
            check_task(store, engine)
            names = engine.parameters
        if len(task.checkpoints) == n:
            return store
        if Job.pending(store.folder) is None:  # hours of work that a damaged shard would end
            problems = store.verify()
            if problems:
                raise StoreError(f"{problems[0]}. Repair it first: gradindex build TASK --out {store.folder} --repair.")
        later = replace(task, checkpoints=task.checkpoints[n:])
        tracked = continued(task, names, n)
        with running(later, precision, options, batch_size, tracked) as engine:
            projection = projection_of(manifest.map)
            described = describe(engine, projection, manifest.map.unit_norm)
            if described.layers != manifest.map.layers:
                raise MismatchError(
                    f"The new checkpoints of {store.folder} need different routes for the layers. Build a new store."
                )
            longer = replace(manifest.map, checkpoints=manifest.map.checkpoints + described.checkpoints)
            if projection.fitted and Job.pending(store.folder) is None:
                fitted = fit_bases(engine, projection, manifest.batch_size, longer.fitted_to or 0, first=n)
                bases = write_bases(store.folder, {**(store.bases() or {}), **fitted})
                longer = replace(longer, bases=bases)
            dim = manifest.dim // n * (n + engine.n_checkpoints)
            sources = manifest.sources
            if len(sources) == n:  # an older store does not say it
                sources += tuple(loaded.source() for loaded in engine.loaded)
            after = replace(kept(store), map=longer, sources=sources, removed=(), dim=dim)
            follow_moments(store.folder)  # while the rows are there that went
            job = Job.begin(store.folder, "add-checkpoint", after, None, live_plan(store))
            fill(job, engine, later, options.workers, beside=store)
            job.finish()
        extend_moments(store, GradientStore(folder))
    return GradientStore(folder)


def repair(
    task: Task,
    folder: str | os.PathLike[str],
    *,
    options: ComputeOptions | None = None,
    **keywords: Unpack[ComputeKeywords],
) -> list[str]:
    """Compute the damaged shards of a store again, and no others.

    Args:
        task: the one that the store was built from.
        folder: of the store.
        options: where and how gradients are computed.
        **keywords: fields of :class:`~gradindex.options.ComputeOptions`, such as ``device="cuda"``.

    Returns:
        One sentence for each shard that was mended; none if the store was sound.

    Raises:
        StoreError: something is damaged that cannot be computed again; says what.
        GradIndexError: the task, its data or the folder cannot be used.
    """
    options = chosen(options, keywords, ComputeOptions)
    said = []
    with changing(folder) as store:
        manifest = store.manifest
        damaged, basis = list(store.damaged()), _damaged_bases(store)
        if not damaged and basis is None:
            return []
        precision = manifest.map.precision
        with running(task, precision, options, manifest.batch_size) as engine:
            intact = store.without([number for number, _ in damaged])
            check_task(intact, engine)
            _check_columns(intact, task)
            if basis is not None:
                _refit(store, engine, basis)
                said.append(f"{basis} They were refitted.")
            maker = row_maker(engine, manifest, store.bases())
            for number, problem in damaged:
                columns = partial(task.column_arrays, "train")
                with (
                    threads(manifest.threads),
                    reading_processes(),
                    rewritten(store, number, columns, task.sample_digests) as (ids, writer),
                ):
                    for _, rows in batches(maker, task, ids, manifest, options.workers, []):
                        writer.append(rows)
                said.append(f"{problem}: recomputed")
    return said


def _refit(store: GradientStore, engine: Engine, problem: str) -> None:
    """Fit the bases again, with the examples that they were fitted to."""
    manifest = store.manifest
    projection, n = projection_of(manifest.map), manifest.map.fitted_to or 0
    with threads(manifest.threads):
        fitted = fit_bases(engine, projection, manifest.batch_size, n)
    if digest_of_bases(fitted) != manifest.map.bases:
        raise StoreError(f"{problem} Refitting gives different bases on this machine or with this version of torch.")
    with storing(store.folder):
        write_bases(store.folder, fitted)


def _check_columns(store: GradientStore, task: Task) -> None:
    """Columns must be the same, and have the values that are stored, as far as some tell."""
    types, stored, ids = task.column_types(), store.manifest.columns, store.spread_ids(64)
    differing = [name for name in {**types, **stored} if types.get(name) != stored.get(name)]
    if not differing:
        now = task.column_arrays("train", ids)
        differing = [name for name in types if not _equal(now[name], store.column_as_stored(name, ids))]
    if differing:
        raise MismatchError(
            f"The task does not match {store.folder}: columns differ ({', '.join(differing)}). Give the same columns."
        )


def _equal(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind == other.dtype.kind and one.dtype.kind in "fM")


def _damaged_bases(store: GradientStore) -> str | None:
    try:
        store.bases()
    except StoreError as error:
        return str(error)
    return None
