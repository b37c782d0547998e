"""Fill a store: plan its shards, compute those that are missing, seal the whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import torch

from .errors import ArgumentError, MismatchError
from .estimating import Estimate, timed
from .examples import RowBatch
from .filling import fill, planned, running
from .gradients import Engine, with_unit_norm
from .matching import check_task, hint_at_frozen
from .memory import available_bytes, largest_batch
from .options import BuildKeywords, BuildOptions, chosen
from .progress import note
from .projection import Projection
from .rows import FITTED_TO, RowMaker, describe, fit_bases, memory_of_pass, pick_batch_size
from .store import (
    MANY_OUTPUTS,
    PACKING_SAMPLE,
    GradientStore,
    Job,
    Manifest,
    Part,
    RowMap,
    check_part,
    check_room,
    claimed,
    factor_bytes,
    free_bytes,
    number_bytes,
    packing_of,
    shard_bytes,
    share,
    stored_width,
    take_ended_plan,
    why_whole,
    wide_bytes,
    write_bases,
)
from .task import Task

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Rows of a shard at least, and shards at most, unasked: what is lost when a build is cut off, and what a query touches.
_SHARD_ROWS, _SHARDS = 8192, 64
# Examples of a pass of those by which it is chosen how factors are packed.
_SAMPLED_AT_ONCE = 64


@overload
def build(
    task: Task,
    out: str | os.PathLike[str],
    *,
    options: BuildOptions | None = None,
    part: None = None,
    **keywords: Unpack[BuildKeywords],
) -> GradientStore: ...


@overload
def build(
    task: Task,
    out: str | os.PathLike[str],
    *,
    options: BuildOptions | None = None,
    part: Part,
    **keywords: Unpack[BuildKeywords],
) -> None: ...


def build(
    task: Task,
    out: str | os.PathLike[str],
    *,
    options: BuildOptions | None = None,
    part: Part | None = None,
    **keywords: Unpack[BuildKeywords],
) -> GradientStore | None:
    """Build the store of a task; call it again to resume after an interruption.

    Args:
        task: the model, its checkpoints and its training data.
        out: an empty or missing folder, or one where the same build was started.
        options: how rows are computed and stored.
        part: (i, n), to build only the i-th of n parts, see :func:`build_part`.
        **keywords: fields of :class:`~gradindex.BuildOptions`, such as ``row_type="int8"``; they replace those of
            ``options``.

    Returns:
        The complete store; ``None`` for a part.

    Raises:
        GradIndexError: the task, its data or the folder cannot be used; finished shards are kept.
    """
    check_part(part)
    _build(task, Path(out), part, chosen(options, keywords, BuildOptions))
    return GradientStore(out) if part is None else None


def build_part(
    task: Task,
    out: str | os.PathLike[str],
    part: Part,
    *,
    options: BuildOptions | None = None,
    **keywords: Unpack[BuildKeywords],
) -> None:
    """Build every n-th shard, in parallel with processes that build the others; then call :func:`seal`.

    Args:
        task: the same for all parts.
        out: a folder that all processes share.
        part: (i, n), the i-th of n parts, from 1 on.
        options: as for :func:`build`, the same for all parts.
        **keywords: as for :func:`build`, the same for all parts.

    Raises:
        GradIndexError: as for :func:`build`, or another process is building the same part.
    """
    build(task, out, options=options, part=part, **keywords)


def estimate(
    task: Task,
    out: str | os.PathLike[str],
    *,
    options: BuildOptions | None = None,
    part: Part | None = None,
    **keywords: Unpack[BuildKeywords],
) -> Estimate:
    """Estimate what a build will take: disk, memory, and time from a few timed batches; nothing is written.

    Args:
        task: as for :func:`build`.
        out: as for :func:`build`; finished shards of the same build count as done.
        options: as for :func:`build`.
        part: (i, n), for time and rows of only the i-th of n parts.
        **keywords: as for :func:`build`.

    Raises:
        GradIndexError: as for :func:`build`.
    """
    check_part(part)
    options, folder = chosen(options, keywords, BuildOptions), Path(out)
    with running(task, options.precision, options, options.batch_size) as engine:
        projection, described = _described(task, engine, options)
        described = _with_packing(engine, options, described)
        columns, norms = partial(task.column_arrays, "train"), options.self_influence
        fixed, each = memory_of_pass(engine, projection, norms, options.wide)
        budget = available_bytes(engine.device) if options.memory is None else options.memory
        batch_size = options.batch_size or largest_batch(fixed, each, budget)
        plan = planned(task.train_ids, _rows_a_shard(options, task, batch_size))
        disk = left = shard_bytes(described, plan, columns)
        rows, done = sum(shard.rows for shard in share(plan, part)), 0
        to_fit = projection.fitted and options.bases_from is None
        if GradientStore.complete(folder):
            _check_built(GradientStore(folder), described, engine)
            left, done, to_fit = 0, rows, False
        elif (job := Job.pending(folder)) is not None:
            job.check_same(described, task.data_fingerprint())
            batch_size, left, (done, rows) = job.after.batch_size, job.bytes_missing(columns), job.rows_done(part)
            to_fit = False
        # Bases that are not fitted yet are as large as random ones.
        geometry = with_unit_norm(engine.geometry, options.unit_norm)
        factors = options.factors is not None
        maker = RowMaker(engine, projection.unfitted, None, norms, geometry, factors, wide=options.wide)
        read_s, compute_s = timed(maker, task, batch_size)
        return Estimate(
            rows=rows,
            rows_done=done,
            dim=described.dim,
            n_checkpoints=described.n_checkpoints,
            row_bytes=disk // len(task.train_ids),
            factor_bytes=factor_bytes(described, 1),
            wide_bytes=wide_bytes(described, 1),
            disk_bytes=disk,
            disk_left_bytes=left,
            free_bytes=free_bytes(folder),
            weight_bytes=engine.states.nbytes,
            pass_bytes=fixed + each * batch_size,
            batch_size=batch_size,
            workers=options.workers,
            read_s=read_s,
            compute_s=compute_s,
            fitting_rows=projection.passes * min(FITTED_TO, len(task.train_ids)) if to_fit else 0,
        )


def _build(task: Task, folder: Path, part: Part | None, options: BuildOptions) -> None:
    with running(task, options.precision, options, options.batch_size) as engine:
        projection, described = _described(task, engine, options)
        if GradientStore.complete(folder):
            store = GradientStore(folder)
            _check_built(store, described, engine)
            _check_packing(folder, store.manifest, options)
            take_ended_plan(folder)
            return
        if Job.pending(folder) is None:  # what cannot be stored beside rows is refused before hours of other work
            if options.wide is not None:
                RowMaker(engine, Projection("none"), wide=options.wide).rows(task.first_and_last())
            described = _with_packing(engine, options, described)
        with claimed(folder, part, new=True):
            if GradientStore.complete(folder):  # in the meantime, by another process
                _check_built(GradientStore(folder), described, engine)
                return
            job = _begin_build(task, folder, engine, projection, options, described)
            fill(job, engine, task, options.workers, part)
            if part is None:
                job.finish()


def _described(task: Task, engine: Engine, options: BuildOptions) -> tuple[Projection, Manifest]:
    """The map with its size, and what the manifest will say as far as it is known before bases are fitted."""
    projection = options.projection or Projection()
    projection = projection.resolved(engine.n_checkpoints, *number_bytes(options.row_type))
    if options.wide is not None:
        _check_wide(options.wide, projection, projection.block_dim(engine.layers))
    dim = projection.block_dim(engine.layers) * engine.n_checkpoints
    stored_width(options.row_type, dim)  # refuses what would not fit
    return projection, Manifest(
        task=task.name,
        map=describe(engine, projection, options.unit_norm),
        tracked=engine.tracked.described,
        sources=tuple(loaded.source() for loaded in engine.loaded),
        dim=dim,
        row_type=options.row_type,
        factors=options.factors,
        self_influence=options.self_influence,
        columns=task.column_types(),
        next_id=task.n_train,
        wide=options.wide,
    )


def _check_wide(wide: int, projection: Projection, block_dim: int) -> None:
    if projection.whole:
        raise ArgumentError(
            f"Rows of projection {projection.kind!r} are whole gradients, whose products are exact, so wide rows would "
            "decide nothing. Leave wide out, or choose another projection."
        )
    if wide <= block_dim:
        raise ArgumentError(
            f"wide is {wide:,}, but must be more than the {block_dim:,} numbers per checkpoint of a row. Give more, "
            f"such as {16 * block_dim:,}, or a smaller dim."
        )


def _that_fit(described: Manifest, bytes_of: Callable[[Manifest], int], free: int) -> str:
    """What to say of a disk that is too small for wide rows: how wide they may be, if that is any use."""
    wide, least = described.wide or 0, described.dim // described.n_checkpoints
    while (wide := wide // 4 * 2) > least:
        if bytes_of(replace(described, wide=wide)) <= free:
            return f"wide={wide} fits"
    return "leave wide out" if described.wide else ""


def _with_packing(engine: Engine, options: BuildOptions, described: Manifest) -> Manifest:
    """The same with how factors are packed, by a sample; what has no factors is refused before hours of other work."""
    if options.factors is None:
        return described
    ids = engine.task.train_ids
    some = ids[np.unique(np.linspace(0, len(ids) - 1, min(PACKING_SAMPLE, len(ids))).astype(np.int64))]
    maker = RowMaker(engine, Projection(dim=1), norms="projected", factors=True)
    if options.pack is False or all(layer.d_out < MANY_OUTPUTS for layer in engine.layers):
        some = some[[0, -1]]
    pieces = np.array_split(some, -(-len(some) // _SAMPLED_AT_ONCE))
    factors = RowBatch.joined([maker.rows(engine.task.read(piece)) for piece in pieces])
    packing = {} if options.pack is False else packing_of(factors.factors, options.factors)
    if options.pack:
        for number, layer in enumerate(engine.layers):
            if number not in packing:
                note(f"factors of {layer.name or 'the model'} are kept whole: {why_whole(layer.d_out)}")
    return replace(described, packing=packing)


def _check_packing(folder: Path, begun: Manifest, options: BuildOptions) -> None:
    """Refuse to go on with packed factors where whole ones are asked for."""
    if options.pack is False and begun.packing:
        raise MismatchError(
            f"{folder} holds a build whose factors are packed, but pack is False. Rerun it without pack to resume, "
            "choose another folder, or delete this one."
        )


def _rows_a_shard(options: BuildOptions, task: Task, batch_size: int) -> int:
    rows = options.shard_rows or max(_SHARD_ROWS, -(-task.n_train // _SHARDS))
    return -(-rows // batch_size) * batch_size


def _begin_build(
    task: Task, folder: Path, engine: Engine, projection: Projection, options: BuildOptions, described: Manifest
) -> Job:
    columns, data = partial(task.column_arrays, "train"), task.data_fingerprint()
    if Job.pending(folder) is not None:
        job = Job.begin(folder, "build", described, data, [])  # its own plan holds
        begun = job.after.batch_size
        if options.batch_size not in (None, begun):
            raise MismatchError(
                f"{folder} holds a build that was started with batch_size {begun}, not {options.batch_size}. "
                "Rerun it without batch_size to resume, choose another folder, or delete this one."
            )
        _check_packing(folder, job.after, options)
        check_room(folder, job.bytes_missing(columns))
        return job

    def bytes_of(manifest: Manifest) -> int:
        return shard_bytes(manifest, planned(task.train_ids, _rows_a_shard(options, task, 1)), columns)

    wanted, free = bytes_of(described), free_bytes(folder)
    check_room(folder, wanted, _that_fit(described, bytes_of, free) if wanted > free else "")
    norms, batch_size = options.self_influence, options.batch_size
    if batch_size is None:
        batch_size = pick_batch_size(engine, projection, norms, options.memory, options.wide)
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
