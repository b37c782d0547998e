"""Fill a store: plan shards, run the missing ones, seal the whole, index it."""

from __future__ import annotations

import os
import time
from typing import Any, get_args

import numpy as np
from torch.utils.data import DataLoader, Subset

from .errors import ArgumentError
from .gradients import Engine, Precision
from .index import SearchIndex
from .index.flat import damage
from .progress import progress
from .projection import Bases, Projection
from .rows import Norms, RowMaker, describe, fit_bases, pick_batch_size
from .store import GradientStore, ShardRows
from .task import Task
from .tree import preserved_random_state


def build(
    task: Task,
    out: str | os.PathLike[str],
    *,
    projection: Projection | None = None,
    precision: Precision = "float32",
    self_influence: Norms = "exact",
    unit_norm: bool = False,
    device: str | None = None,
    channels_last: bool | None = None,
    workers: int = 0,
    batch_size: int | None = None,
    memory: int | None = None,
    shard_rows: int = 8192,
) -> GradientStore:
    """Build the store and index of a task; call it again to go on after an interruption.

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

    Returns:
        The complete store.

    Raises:
        GradIndexError: the task, its data or the folder cannot be used; finished shards stay.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("memory", memory, 1),
        ("shard_rows", shard_rows, 1),
        ("workers", workers, 0),
    ):
        if value is not None and value < least:
            raise ArgumentError(f"{name} is {value}, but must be at least {least}.")
    if batch_size is not None and memory is not None:
        raise ArgumentError("Give batch_size, or memory to have it chosen, not both.")
    if self_influence not in get_args(Norms):
        raise ArgumentError(f"self_influence is {self_influence!r}, but must be 'exact' or 'projected'.")
    if unit_norm and self_influence != "exact":
        raise ArgumentError("unit_norm needs exact norms. Leave out self_influence='projected', or unit_norm.")
    projection = (projection or Projection()).resolved(len(task.checkpoints))
    SearchIndex.require()
    task.check_reads_repeat()
    started = time.perf_counter()
    with preserved_random_state(), Engine(task, precision, device, channels_last) as engine:
        engine.check_routes()
        if batch_size is None:
            batch_size = _batch_size_begun(out) or pick_batch_size(engine, projection, self_influence, memory)
        shard_rows = -(-shard_rows // batch_size) * batch_size
        columns = task.column_arrays("train")
        starts = range(0, task.n_train, shard_rows)
        store = GradientStore.create(
            out,
            {
                **describe(engine, projection, unit_norm),
                "self_influence": self_influence,
                "dim": projection.block_dim(engine.layers) * engine.n_checkpoints,
                "columns": {name: values.dtype.kind for name, values in columns.items()},
                "batch_size": batch_size,
                "task": task.name,
                "shards": [{"start": s, "rows": min(shard_rows, task.n_train - s)} for s in starts],
            },
        )
        shards, batch_size = store.manifest["shards"], store.manifest["batch_size"]
        finished = set(range(len(shards))) if store.manifest["sealed"] else store.finished()
        maker = RowMaker(engine, projection, _bases(store, engine, projection), self_influence, unit_norm)
        done = sum(shards[number]["rows"] for number in finished)
        with progress("gradients", task.n_train, "rows", done) as advance:
            for number, shard in enumerate(shards):
                if number in finished:
                    continue
                parts: list[tuple[Any, ...]] = []
                end = shard["start"] + shard["rows"]
                subset: Subset[Any] = Subset(task.train, range(shard["start"], end))  # type: ignore[arg-type]  # or any sequence
                first = shard["start"]
                for items in DataLoader(subset, batch_size, collate_fn=list, num_workers=workers):
                    names = [f"Training example {first + i}" for i in range(len(items))]
                    parts.append(maker.rows(items, names, "train"))
                    first += len(items)
                    advance(len(items))
                rows, norms, losses = (np.concatenate(part) for part in zip(*parts, strict=True))
                chosen = {name: values[shard["start"] : end] for name, values in columns.items()}
                store.write_shard(
                    number, ShardRows(np.arange(shard["start"], end, dtype=np.int64), rows, norms, losses, chosen)
                )
        if not store.manifest["sealed"]:
            store.seal({"seconds": round(time.perf_counter() - started, 3)})
    if damage(store.folder / "index", store.manifest["fingerprint"]):
        SearchIndex.build(store.dim, store.blocks()).save(store.folder / "index", store.manifest["fingerprint"])
    return store


def _batch_size_begun(out: str | os.PathLike[str]) -> int | None:
    """What an earlier run chose, so that it is not measured again."""
    if not GradientStore.begun(out):
        return None
    chosen: int = GradientStore(out, sealed=False).manifest["batch_size"]
    return chosen


def _bases(store: GradientStore, engine: Engine, projection: Projection) -> Bases | None:
    """What a fitted projection needs: the store's own, or fitted now and kept there."""
    if not projection.fitted:
        return None
    bases = store.bases()
    if bases is not None:
        return bases
    fitted = fit_bases(engine, projection, store.manifest["batch_size"])
    store.write_bases(fitted)
    return fitted
