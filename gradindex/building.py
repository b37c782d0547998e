"""Fill a store: plan its shards, compute those that are missing, seal the whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .errors import ArgumentError, MismatchError
from .filling import consecutive, fill, running
from .gradients import Engine, Precision
from .matching import check_task
from .projection import Projection
from .rows import Norms, RowMaker, describe, fit_bases, pick_batch_size
from .store import (
    GradientStore,
    Job,
    Part,
    RowType,
    check_row_type,
    claimed,
    differences,
    fingerprint,
    number_bytes,
    write_bases,
)
from .task import Task

FactorType = Literal["float32", "float16"]


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
    shard_rows: int = 8192,
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
        shard_rows: rows per file, rounded up to whole batches.
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
    index, parts = part
    if not 1 <= index <= parts:
        raise ArgumentError(f"part is {index}/{parts}, but must be from 1/{parts} to {parts}/{parts}.")
    _build(task, Path(out), part, _Options(**{**(build.__kwdefaults__ or {}), **options}))


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
    shard_rows: int
    bases_from: str | os.PathLike[str] | None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("memory", 1), ("shard_rows", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ArgumentError(f"{name} is {value}, but must be at least {least}.")
        if self.batch_size is not None and self.memory is not None:
            raise ArgumentError("Give batch_size, or memory to have it chosen, not both.")
        if self.self_influence not in get_args(Norms):
            raise ArgumentError(f"self_influence is {self.self_influence!r}, but must be 'exact' or 'projected'.")
        if self.unit_norm and self.self_influence != "exact":
            raise ArgumentError("unit_norm needs exact norms. Leave out self_influence='projected', or unit_norm.")
        check_row_type(self.row_type)
        if self.factors is not None and self.factors not in get_args(FactorType):
            raise ArgumentError(f"factors is {self.factors!r}, but must be 'float32', 'float16' or None.")


def _build(task: Task, folder: Path, part: Part | None, options: _Options) -> None:
    row_type, projection = options.row_type, options.projection or Projection()
    projection = projection.resolved(len(task.checkpoints), *number_bytes(row_type))
    with running(task, options.precision, options.device, options.channels_last) as engine:
        described = {
            "task": task.name,
            "map": describe(engine, projection, options.unit_norm),
            "dim": projection.block_dim(engine.layers) * engine.n_checkpoints,
            "row_type": row_type,
            "factors": options.factors,
            "self_influence": options.self_influence,
            "columns": task.column_types(),
        }
        if GradientStore.complete(folder):
            _check_built(GradientStore(folder), described, engine)
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


def _begin_build(
    task: Task, folder: Path, engine: Engine, projection: Projection, options: _Options, described: dict[str, Any]
) -> Job:
    described |= {"next_id": task.n_train, "data": task.data_fingerprint(), "removed": []}
    if Job.pending(folder) is not None:
        return Job.begin(folder, "build", described, [])  # its own plan holds
    norms, batch_size = options.self_influence, options.batch_size
    if batch_size is None:
        batch_size = pick_batch_size(engine, projection, norms, options.memory)
    shard_rows = -(-options.shard_rows // batch_size) * batch_size
    described["map"] |= {"bases": None, "fitted_to": None}
    if options.bases_from is not None:
        described["map"] |= _bases_of(GradientStore(options.bases_from), folder, described)
    elif projection.fitted:
        fitted = fit_bases(engine, projection, batch_size, task.n_train)
        described["map"] |= {"bases": write_bases(folder, fitted), "fitted_to": task.n_train}
    described |= {"fingerprint": fingerprint(described["map"]), "batch_size": batch_size, "shard_rows": shard_rows}
    described |= {"threads": torch.get_num_threads()}
    return Job.begin(folder, "build", described, consecutive(0, task.n_train, shard_rows))


def _bases_of(other: GradientStore, folder: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a map that says which bases are used, those of another store, which are copied."""
    bases = other.bases()
    differing = differences(other.manifest, {"map": described["map"] | {"bases": other.manifest["map"]["bases"]}})
    differing = [name for name in differing if name != "fitted_to"]
    if bases is None or differing:
        raise MismatchError(
            f"{other.folder} has no bases for {folder}: {'; '.join(differing or ['projection'])} differ. "
            "Give a store that was built with the same task and a fitted projection."
        )
    return {"bases": write_bases(folder, bases), "fitted_to": other.manifest["map"]["fitted_to"]}


def _check_built(store: GradientStore, described: Mapping[str, Any], engine: Engine) -> None:
    """A finished build is left as it is, if it is this one."""
    task, stored = engine.task, store.manifest["next_id"]
    differing = differences(store.manifest, described)
    grown = stored < task.n_train and not differing
    if stored != task.n_train:
        differing.insert(0, f"data length ({stored} stored, {task.n_train} now)")
    if not differing:
        check_task(store, engine)
        return
    raise MismatchError(
        f"{store.folder} holds a build of another task: {'; '.join(differing)} differ. "
        f"Choose another folder, or delete this one.{' To add training examples: gradindex add.' if grown else ''}"
    )
