"""Copying rows into the shards of a job, from other shards of the same store or of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from ..progress import progress
from . import runs
from .container import Writer
from .documents import PENDING, PlannedShard
from .hdf5 import Spec
from .job import Job
from .layout import FACTOR_SIDES, row_specs, whole_name
from .manifest import Manifest
from .reader import GradientStore
from .sealing import ShardWriter
from .shards import Shard
from .sides import FactorSides

# What is copied at once.
_PIECE_BYTES = 16 << 20
# As many samples of examples as a shard has that was computed.
_SAMPLES = 8


def copy_rows(job: Job, sources: Mapping[str, GradientStore]) -> None:
    """Make a job's shards from rows that other shards hold."""
    done, total = job.rows_done()
    job.tidy()
    try:
        with progress(job.kind, total, "rows", done) as advance:
            for planned in job.missing():
                parts = [
                    (_source(job, sources, name, shard), shift, sources[name].manifest)
                    for name, shard, shift in planned.sources
                ]
                advance(_copy_shard(job, planned, parts))
    except StoreError:
        if any(source.verify() for source in sources.values()):
            job.give_up()  # a repair comes first, and the copies are soon made again
        raise
    job.finish()


def _source(job: Job, sources: Mapping[str, GradientStore], name: str, shard: str) -> Shard:
    """A shard that a plan names."""
    found = None if name not in sources else sources[name].shard(shard)
    if found is None:
        raise StoreError(
            f"{job.folder} has an unfinished `{job.kind}` of shard {shard} of {name}, which is missing. Restore it, "
            f"or delete {job.folder / PENDING} to abandon the change."
        )
    return found


def _copy_shard(job: Job, planned: PlannedShard, parts: Sequence[tuple[Shard, int, Manifest]]) -> int:
    """Make one shard of the rows of some others, whose ids are shifted; returns how many."""
    count, there = planned.rows, sum(len(shard.ids) for shard, _, _ in parts)
    wanted = runs.to_ids(planned.ids) if count <= there else np.empty(0, dtype=np.int64)
    chosen = [(shard, np.intersect1d(wanted, shard.ids + shift), shift) for shard, shift, _ in parts]
    if not sum(len(ids) for _, ids, _ in chosen) == count == len(wanted):
        raise StoreError(
            f"{job.folder} has an unfinished `{job.kind}` of rows that its sources lack. "
            f"Delete {job.folder / PENDING} to abandon it."
        )
    places = [(shard, shard.positions(ids - shift)) for shard, ids, shift in chosen]
    samples = [
        (i + shift, text)
        for shard, ids, shift in chosen
        for i, text in shard.seal["samples"]
        if np.isin(i + shift, ids)
    ]
    samples = samples[:: max(1, -(-len(samples) // _SAMPLES))]
    columns = {
        name: np.concatenate([shard.arrays.take(f"columns/{name}", where) for shard, where in places])
        for name in job.after.columns
    }
    first = parts[0][0].arrays
    ours, specs = row_specs(job.after, len(wanted)), dict[str, Spec]()
    for name in first.names():  # also arrays that a later version may have added
        shape, kind = first.spec(name)
        if name != "ids" and not name.startswith(("columns/", "factors/")):
            specs[name] = (len(wanted), *shape[1:]), kind
    specs |= {name: spec for name, spec in ours.items() if name.startswith("factors/")}
    with job.shard(planned, columns, samples, specs) as writer:
        start = 0
        for (shard, where), (_, _, source) in zip(places, parts, strict=True):
            for name in specs:
                if not name.startswith("factors/"):
                    _copy_array(shard, name, where, writer.raw, start)
            if job.after.has_factors:
                _copy_factors(job.after, source, shard, where, writer, start)
            start += len(where)
    return len(wanted)


def _copy_factors(
    after: Manifest, source: Manifest, shard: Shard, where: NDArray[np.int64], writer: ShardWriter, start: int
) -> None:
    """Copy factors: as they are where both stores keep them alike, else unpacked and packed on the way."""
    sides = FactorSides(source)
    for key in sides.keys:
        layer = after.map.layers[key[1]]
        if after.packing.get(key[1]) == source.packing.get(key[1]):
            for name in sides.names(key):
                _copy_array(shard, name, where, writer.raw, start)
            _copy_whole(shard, key, where, writer.raw, start)
            continue
        step = max(1, _PIECE_BYTES // (4 * (layer.d_in + layer.d_out)))
        for begin in range(0, len(where), step):
            some = where[begin : begin + step]
            x, delta = (side.take(some).astype(np.float32, copy=False) for side in sides.at(shard, some, key)[key])
            writer.put_factors(start + begin, key, (x, delta), partial(_named, shard.ids[some]))


def _named(ids: NDArray[np.int64], row: int) -> str:
    return f"Training example {ids[row]}"


def _copy_whole(shard: Shard, key: tuple[int, int], where: NDArray[np.int64], raw: Writer, start: int) -> None:
    """Copy what is whole of packed factors, of the rows at positions ``where``."""
    name = whole_name(*key, "of")
    if name not in shard.arrays:
        return
    _, places, kept = np.intersect1d(where, shard.arrays.view(name), assume_unique=True, return_indices=True)
    if len(kept):
        raw.grow(name, start + places)
        for side in FACTOR_SIDES:
            raw.grow(whole_name(*key, side), shard.arrays.take(whole_name(*key, side), kept))


def _copy_array(shard: Shard, name: str, places: NDArray[np.int64], raw: Writer, start: int) -> None:
    shape, kind = shard.arrays.spec(name)
    step = max(1, _PIECE_BYTES // (np.dtype(kind).itemsize * math.prod(shape[1:])))
    for first in range(0, len(places), step):
        raw.put(name, start + first, shard.arrays.take(name, places[first : first + step]))
