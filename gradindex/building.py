"""Fill a store: plan its shards, compute those that are missing, seal the whole."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .choices import FACTOR_TYPES, NORMS, FactorType, Norms, Precision, RowType
from .errors import ArgumentError, MismatchError
from .estimating import Estimate, timed
from .filling import fill, planned, running
from .gradients import Engine
from .matching import check_task, hint_at_frozen
from .memory import available_bytes, largest_batch
from .projection import Projection
from .reading import check_workers
from .rows import FITTED_TO, RowMaker, describe, fit_bases, memory_of_pass, pick_batch_size
from .store import (
    GradientStore,
    Job,
    Manifest,
    Part,
    RowMap,
    check_part,
    check_room,
    check_row_type,
    claimed,
    factor_bytes,
    free_bytes,
    number_bytes,
    shard_bytes,
    share,
    take_ended_plan,
    write_bases,
)
from .task import Task

# Rows of a shard at least, and shards at most, unasked: what is lost when a build is cut off, and what a query touches.
_SHARD_ROWS, _SHARDS = 8192, 64


def build(
    task: Task,
    out: str | os.PathLike[str],
    *,
    projection: Projection | None = None,
    precision: Precision = "float32",
    self_influence: Norms = "exact",
    unit_norm: bool = False,
    row_type: RowType = "float32",
    factors: FactorType | None = None,
    device: str | None = None,
    channels_last: bool | None = None,
    workers: int = 0,
    batch_size: int | None = None,
    memory: int | None = None,
    shard_rows: int | None = None,
    bases_from: str | os.PathLike[str] | None = None,
) -> GradientStore:
    """Build the store of a task; call it again to go on after an interruption.

    Args:
        task: the model, its checkpoints and its training data.
        out: an empty or missing folder, or one that the same build began.
        projection: the map from gradients to rows; by default a TensorSketch of 1,024
            numbers per checkpoint.
        precision: of the gradients.
        self_influence: ``"exact"``, or ``"projected"``: the squared norm of the row, which costs
            nothing and is an estimate (with a fitted projection: too low).
        unit_norm: divide each row by its norm: answers are ranked by the cosine of the gradients,
            which takes away the advantage of heavy examples.
        row_type: how rows are stored: ``"float32"``, ``"float16"`` (a number too large is an error),
            ``"bfloat16"``, or ``"int8"`` with a scale for each row and checkpoint.
        factors: also store what each layer's gradient is the outer product of, in ``"float32"`` or
            ``"float16"``, so that exact scores need no pass over training examples; for linear layers
            without positions alone.
        device: where to compute, such as ``"cuda"``, by default where the model is.
        channels_last: whether pictures are laid out with the channels last in memory, which
            changes the speed of convolutions and no result but rounding; by default where the
            model has two-dimensional convolutions and runs with it.
        workers: processes that read examples beside the computation.
        batch_size: examples per pass, halved where memory runs out; by default as many, up to
            256, as ``memory`` holds. Fixed for a store once it is begun.
        memory: bytes that a pass may take beside the weights, by default a quarter of the
            machine's free memory, or half of what a CUDA device has free.
        shard_rows: rows per file, rounded up to whole batches; by default 8,192, or more where that would make over
            64 files, for each one that a query's candidates lie in takes time.
        bases_from: another store with the same map but for its bases, whose bases a fitted projection
            takes, so that the two can be merged.

    Returns:
        The complete store.

    Raises:
        GradIndexError: the task, its data or the folder cannot be used; finished shards stay.
    """
    options = _Options(
        projection, precision, self_influence, unit_norm, row_type, factors, device, channels_last, workers,
        batch_size, memory, shard_rows, bases_from,
    )  # fmt: skip
    _build(task, Path(out), None, options)
    return GradientStore(out)


def build_part(task: Task, out: str | os.PathLike[str], part: Part, **options: Any) -> None:
    """Make every n-th shard of a build, beside processes that make the others; then call :func:`seal`.

    Args:
        task: the same for all parts.
        out: a folder that all processes see.
        part: (i, n), the i-th of n parts, from 1 on.
        **options: as for :func:`build`, the same for all parts.

    Raises:
        GradIndexError: as for :func:`build`, or another process makes the same part.
    """
    check_part(part)
    _build(task, Path(out), part, _Options(**{**(build.__kwdefaults__ or {}), **options}))


def estimate(task: Task, out: str | os.PathLike[str], *, part: Part | None = None, **options: Any) -> Estimate:
    """What a build will take: disk, memory and time, the last from a few timed batches; nothing is written.

    Args:
        task: as for :func:`build`.
        out: as for :func:`build`; what is there of the same build counts as done.
        part: (i, n), time and rows of the i-th of n parts alone.
        **options: as for :func:`build`.

    Raises:
        GradIndexError: as for :func:`build`.
    """
    check_part(part)
    chosen, folder = _Options(**{**(build.__kwdefaults__ or {}), **options}), Path(out)
    with running(task, chosen.precision, chosen.device, chosen.channels_last, chosen.batch_size) as engine:
        projection, described = _described(task, engine, chosen)
        columns, norms = partial(task.column_arrays, "train"), chosen.self_influence
        fixed, each = memory_of_pass(engine, projection, norms)
        budget = available_bytes(engine.device) if chosen.memory is None else chosen.memory
        batch_size = chosen.batch_size or largest_batch(fixed, each, budget)
        plan = planned(task.train_ids, _rows_a_shard(chosen, task, batch_size))
        disk = left = shard_bytes(described, plan, columns)
        rows, done = sum(shard.rows for shard in share(plan, part)), 0
        to_fit = projection.fitted and chosen.bases_from is None
        if GradientStore.complete(folder):
            _check_built(GradientStore(folder), described, engine)
            left, done, to_fit = 0, rows, False
        elif (job := Job.pending(folder)) is not None:
            job.check_same(described, task.data_fingerprint())
            batch_size, left, (done, rows) = job.after.batch_size, job.bytes_missing(columns), job.rows_done(part)
            to_fit = False
        # Bases that are not fitted yet are as large as random ones.
        maker = RowMaker(engine, projection.unfitted, None, norms, chosen.unit_norm, chosen.factors is not None)
        read_s, compute_s = timed(maker, task, batch_size)
        return Estimate(
            rows=rows,
            rows_done=done,
            dim=described.dim,
            row_bytes=disk // len(task.train_ids),
            factor_bytes=factor_bytes(described, 1),
            disk_bytes=disk,
            disk_left_bytes=left,
            free_bytes=free_bytes(folder),
            weight_bytes=sum(tensor.nbytes for state in engine.states for tensor in state.values()),
            pass_bytes=fixed + each * batch_size,
            batch_size=batch_size,
            workers=chosen.workers,
            read_s=read_s,
            compute_s=compute_s,
            fitting_rows=projection.passes * min(FITTED_TO, len(task.train_ids)) if to_fit else 0,
        )


@dataclass(frozen=True)
class _Options:
    """What :func:`build` was asked for; see there."""

    projection: Projection | None
    precision: Precision
    self_influence: Norms
    unit_norm: bool
    row_type: RowType
    factors: FactorType | None
    device: str | None
    channels_last: bool | None
    workers: int
    batch_size: int | None
    memory: int | None
    shard_rows: int | None
    bases_from: str | os.PathLike[str] | None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("memory", 1), ("shard_rows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ArgumentError(f"{name} is {value}, but must be at least {least}.")
        check_workers(self.workers)
        if self.batch_size is not None and self.memory is not None:
            raise ArgumentError("Give batch_size, or memory to have it chosen, not both.")
        if self.self_influence not in NORMS:
            raise ArgumentError(f"self_influence is {self.self_influence!r}, but must be 'exact' or 'projected'.")
        if self.unit_norm and self.self_influence != "exact":
            raise ArgumentError("unit_norm needs exact norms. Leave out self_influence='projected', or unit_norm.")
        check_row_type(self.row_type)
        if self.factors is not None and self.factors not in FACTOR_TYPES:
            raise ArgumentError(f"factors is {self.factors!r}, but must be 'float32', 'float16' or None.")


def _build(task: Task, folder: Path, part: Part | None, options: _Options) -> None:
    with running(task, options.precision, options.device, options.channels_last, options.batch_size) as engine:
        projection, described = _described(task, engine, options)
        if GradientStore.complete(folder):
            _check_built(GradientStore(folder), described, engine)
            take_ended_plan(folder)
            return
        if options.factors is not None:  # before hours of other work
            RowMaker(engine, Projection("none"), factors=True).rows(task.first_and_last(), ["first", "last"], "train")
        with claimed(folder, part, new=True):
            if GradientStore.complete(folder):  # in the meantime, by another process
                _check_built(GradientStore(folder), described, engine)
                return
            job = _begin_build(task, folder, engine, projection, options, described)
            fill(job, engine, task, options.workers, part)
            if part is None:
                job.finish()


def _described(task: Task, engine: Engine, options: _Options) -> tuple[Projection, Manifest]:
    """The map with its size, and what the manifest will say as far as it is known before bases are fitted."""
    projection = options.projection or Projection()
    projection = projection.resolved(engine.n_checkpoints, *number_bytes(options.row_type))
    return projection, Manifest(
        task=task.name,
        map=describe(engine, projection, options.unit_norm),
        tracked=engine.tracked.described,
        dim=projection.block_dim(engine.layers) * engine.n_checkpoints,
        row_type=options.row_type,
        factors=options.factors,
        self_influence=options.self_influence,
        columns=task.column_types(),
        next_id=task.n_train,
    )


def _rows_a_shard(options: _Options, task: Task, batch_size: int) -> int:
    rows = options.shard_rows or max(_SHARD_ROWS, -(-task.n_train // _SHARDS))
    return -(-rows // batch_size) * batch_size


def _begin_build(
    task: Task, folder: Path, engine: Engine, projection: Projection, options: _Options, described: Manifest
) -> Job:
    columns, data = partial(task.column_arrays, "train"), task.data_fingerprint()
    if Job.pending(folder) is not None:
        job = Job.begin(folder, "build", described, data, [])  # its own plan holds
        begun = job.after.batch_size
        if options.batch_size not in (None, begun):
            raise MismatchError(
                f"{folder} holds a build that was begun with batch_size {begun}, but {options.batch_size} is asked "
                "for. Go on without batch_size, choose another folder, or delete this one."
            )
        check_room(folder, job.bytes_missing(columns))
        return job
    check_room(folder, shard_bytes(described, planned(task.train_ids, _rows_a_shard(options, task, 1)), columns))
    norms, batch_size = options.self_influence, options.batch_size
    if batch_size is None:
        batch_size = pick_batch_size(engine, projection, norms, options.memory)
    shard_rows = _rows_a_shard(options, task, batch_size)
    rows = described.map
    if options.bases_from is not None:
        rows = _with_bases_of(GradientStore(options.bases_from), folder, rows)
    elif projection.fitted:
        fitted = fit_bases(engine, projection, batch_size, task.n_train)
        rows = replace(rows, bases=write_bases(folder, fitted), fitted_to=task.n_train)
    after = replace(described, map=rows, batch_size=batch_size, shard_rows=shard_rows, threads=torch.get_num_threads())
    return Job.begin(folder, "build", after, data, planned(task.train_ids, shard_rows))


def _with_bases_of(other: GradientStore, folder: Path, rows: RowMap) -> RowMap:
    """A map that takes the bases of another store, which are copied."""
    bases = other.bases()
    differing = other.manifest.map.differences(rows, bases=False)
    if bases is None or differing:
        raise MismatchError(
            f"{other.folder} has no bases for {folder}: {'; '.join(differing or ['projection'])} differ. "
            "Give a store that was built with the same task and a fitted projection."
        )
    return replace(rows, bases=write_bases(folder, bases), fitted_to=other.manifest.map.fitted_to)


def _check_built(store: GradientStore, described: Manifest, engine: Engine) -> None:
    """A finished build is left as it is, if it is this one."""
    task, stored = engine.task, store.manifest.next_id
    differing = store.manifest.differences(described)
    grown = stored < task.n_train and not differing
    if stored != task.n_train:
        differing.insert(0, f"data length ({stored} stored, {task.n_train} now)")
    if not differing:
        check_task(store, engine)
        return
    raise MismatchError(
        f"{store.folder} holds a build of another task: {'; '.join(differing)} differ. "
        f"Choose another folder, or delete this one.{' To add training examples: gradindex add.' if grown else ''}"
        f"{hint_at_frozen(store.manifest.map, engine)}"
    )
