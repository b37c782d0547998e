"""Computing the shards of a job: what building and growing a store share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from .allocating import memory_kept
from .choices import Precision
from .examples import Coded, Examples, RowBatch
from .forking import check_threads, one_thread_in_children
from .gradients import Engine, Geometry, Tracked, check_routes, with_unit_norm
from .index import require
from .lengths import Window, window_rows, windows
from .matching import check_losses
from .options import ComputeOptions
from .progress import note, progress
from .projection import Bases
from .reading import read, reading_processes
from .rows import Blocks, RowMaker, projection_of
from .spotcheck import SpotCheck
from .store import GradientStore, Job, Manifest, Part, PlannedShard, read_bases, runs, wide_encoded
from .task import Task, sampled
from .tree import preserved_random_state


def planned(ids: NDArray[np.int64], shard_rows: int) -> list[PlannedShard]:
    """A plan of shards for ascending ids (m,)."""
    pieces = (ids[start : start + shard_rows] for start in range(0, len(ids), shard_rows))
    return [PlannedShard(runs.to_runs(piece).tolist()) for piece in pieces]


@contextmanager
def running(
    task: Task,
    precision: Precision,
    options: ComputeOptions,
    batch_size: int | None,
    tracked: Tracked | None = None,
) -> Iterator[Engine]:
    """The engine of a task whose data and routes are checked, and a FAISS that can be used later.

    Args:
        task: what is differentiated.
        precision: of the gradients.
        options: where and how they are computed.
        batch_size: examples in a pass, if that is known; with 1, each goes by itself.
        tracked: which parameters, by default as the task says.
    """
    require()
    one_thread_in_children("torch", torch.set_num_threads)
    task.check_reads_repeat()
    engine = Engine(
        task, precision, options.device, options.channels_last, tracked, batch_size == 1, options.one_at_a_time
    )
    engine.batch_tokens = options.batch_tokens
    kept = memory_kept() if engine.device.type == "cpu" else nullcontext()
    with preserved_random_state(), kept, engine:
        for line in engine.notes:
            note(line)
        check_routes(engine)
        yield engine


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sums depend on the number of threads: a build that goes on takes as many as it began with."""
    check_threads(count)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row_maker(engine: Engine, manifest: Manifest, bases: Bases | None, first: int = 0) -> RowMaker:
    """Makes rows as a manifest says; ``first`` as in :class:`RowMaker`."""
    return RowMaker(
        engine,
        projection_of(manifest.map),
        bases,
        manifest.self_influence,
        with_unit_norm(engine.geometry, manifest.map.unit_norm and first == 0),  # added blocks: with the others
        manifest.has_factors,
        first,
        manifest.wide,
    )


def fill(
    job: Job, engine: Engine, task: Task, workers: int, part: Part | None = None, beside: GradientStore | None = None
) -> None:
    """Compute the missing shards of a job, the whole or the blocks that go beside those of a store."""
    digest, first = job.after.map.bases, 0 if beside is None else beside.n_checkpoints
    bases = None if digest is None else read_bases(job.folder, digest)
    maker = row_maker(engine, job.after, bases, first)
    check_losses(engine, job.made(16), first, job.folder)
    job.tidy(part)
    done, total = job.rows_done(part)
    if done:
        note(f"{job.folder}: resuming, {done:,} of {total:,} rows are done")
    with (
        threads(job.after.threads),
        reading_processes(),
        progress("gradients", total, "rows", done) as advance,
    ):
        for missing in job.missing(part):
            ids = runs.to_ids(missing.ids)
            samples: list[tuple[int, str]] = []
            with job.shard(missing, task.column_arrays("train", ids), samples) as writer:
                for examples, rows in batches(maker, task, ids, job.after, workers, samples, advance):
                    writer.append(rows if beside is None else _beside(beside, engine, examples, rows))


def _beside(store: GradientStore, engine: Engine, examples: Examples, later: RowBatch) -> RowBatch:
    """What a store has of some examples, with the blocks of later checkpoints after its own."""
    ids, geometry = examples.ids, with_unit_norm(engine.geometry, store.manifest.map.unit_norm)
    squares = store.self_influence(ids)
    return RowBatch(
        geometry.joined_rows(store.rows(ids), squares, later.rows, later.self_influence),
        np.concatenate([squares, later.self_influence], 1),
        np.concatenate([store.losses(ids), later.losses], 1),
        {**(store.factors(ids) if store.has_factors else {}), **later.factors},
        None if later.wide is None else _beside_wide(store, geometry, ids, later),
    )


def _beside_wide(store: GradientStore, geometry: Geometry, ids: NDArray[np.int64], later: RowBatch) -> Coded:
    """The same of wide rows: codes stay as they are, and what they are multiplied by changes as rows do."""
    assert isinstance(later.wide, np.ndarray)
    stored, added = store.wide(ids), wide_encoded(later.wide, later.self_influence.shape[1])
    squares = store.self_influence(ids), later.self_influence
    scales, norms = (
        geometry.joined_rows(mine, squares[0], new, squares[1])
        for mine, new in ((stored.scales, added.scales), (stored.norms, added.norms))
    )
    return Coded(np.concatenate([stored.codes, added.codes], 1), scales, norms)


def batches(
    maker: RowMaker,
    task: Task,
    ids: NDArray[np.int64],
    manifest: Manifest,
    workers: int,
    samples: list[tuple[int, str]],
    advance: Callable[[int], None] | None = None,
) -> Iterator[tuple[Examples, RowBatch]]:
    """Examples and their rows in the order of ids; each is read once, and the digests of some are added to ``samples``.

    Those of very different lengths are computed in the order of their lengths, some batches at a time: which ones
    depends on the examples alone, so a shard that is computed again has the same bytes.

    Args:
        maker: makes the rows.
        task: whose examples they are.
        ids: of a shard.
        manifest: says how many examples a batch has.
        workers: processes that read.
        samples: gets ids and digests.
        advance: is told of how many examples were through, batch by batch.
    """
    size, wanted = manifest.batch_size, set(sampled(ids).tolist())
    most, spot_check = window_rows(size, maker.row_bytes), SpotCheck(maker, task, ids)

    def computed(window: Window, first: int, turn: Sequence[int]) -> Iterator[Blocks]:
        for number, examples in enumerate(window.batches(), first):
            blocks = maker.blocks(examples, turn)
            spot_check.check(number, examples, blocks, turn)
            yield blocks

    *before, last = maker.turns
    earlier: list[list[Blocks]] = []
    for turn in before:  # all of these ids at one checkpoint, then all at the next, each read for rows and checks once
        earlier.append([])
        for window in windows(read(task, ids, size, workers), size, most):
            earlier[-1] += computed(window, len(earlier[-1]), turn)
    number = 0
    for window in windows(read(task, ids, size, workers), size, most):
        read_now = zip(window.examples.ids.tolist(), window.examples.items, strict=True)
        samples += [(i, task.example_digest(item)) for i, item in read_now if i in wanted]
        parts = []
        for blocks in computed(window, number, last):
            parts.append(Blocks.beside([*(turn[number] for turn in earlier), blocks]))
            number += 1
            if advance is not None:
                advance(len(blocks.rows))
        whole, places = Blocks.below(parts), window.places
        whole = whole if places is None else whole.at(places)
        yield window.examples, maker.finished([whole], window.examples.role)
