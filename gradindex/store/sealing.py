"""Making a shard: its rows, counted, then its seal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from ..examples import Coded, RowBatch, Sides
from ..files import digest_of
from . import runs
from .container import Writer, writing
from .documents import FORMAT, SHARDS, PlannedShard
from .encoding import encode
from .hdf5 import Spec
from .layout import FACTOR_SIDES, WIDE, as_stored, factor_name, row_specs, whole_name
from .manifest import Manifest, ShardEntry
from .packing import fine
from .wide import wide_encoded


class ShardWriter:
    """Appends rows to a shard.

    Args:
        raw: writes its arrays.
        after: the manifest.
        ids: (m,) of the shard.
    """

    def __init__(self, raw: Writer, after: Manifest, ids: NDArray[np.int64]) -> None:
        self.raw, self._after, self._ids, self._place = raw, after, ids, 0

    def append(self, batch: RowBatch) -> None:
        """The next rows, with what stands beside them.

        Raises:
            ArgumentError: a number is too large for the type in which it is stored.
            StoreError: they are more than the shard has ids, or cannot be written.
        """
        place = self._place
        if place + len(batch) > len(self._ids):
            raise StoreError(
                f"A shard of {len(self._ids)} training examples has got {place + len(batch)}, so it is dropped: "
                "the data set yields more examples than its length says."
            )
        name = lambda row: f"Training example {self._ids[place + row]}"  # noqa: E731  # short, used twice
        arrays = encode(batch.rows, self._after.row_type, batch.self_influence.shape[1], name)
        arrays |= {"self_influence": batch.self_influence, "losses": batch.losses}
        if batch.wide is not None:
            coded = batch.wide if isinstance(batch.wide, Coded) else wide_encoded(batch.wide, arrays["losses"].shape[1])
            arrays |= {WIDE: coded.codes, f"{WIDE}_scales": coded.scales, f"{WIDE}_norms": coded.norms}
        for array, values in arrays.items():
            self.raw.put(array, place, values)
        for key, sides in batch.factors.items():
            self.put_factors(place, key, sides, name)
        self._place += len(batch)

    def put_factors(self, place: int, key: tuple[int, int], sides: Sides, name: Callable[[int], str]) -> None:
        """Write the factors of a layer at a checkpoint, of rows from position ``place`` on.

        Args:
            place: of the first row.
            key: (checkpoint, layer).
            sides: activations (m, d_in) and output gradients (m, d_out) float32.
            name: what to call the row at a position of ``sides``, for the error.

        Raises:
            ArgumentError: a number is too large for the type in which it is stored.
            StoreError: they cannot be written.
        """
        kind, packing = self._after.factors or "float32", self._after.packing.get(key[1])
        if packing is None:
            for side, values in zip(FACTOR_SIDES, sides, strict=True):
                (stored,) = encode(values, kind, 1, name, "factors").values()
                self.raw.put(factor_name(*key, side), place, stored)
            return
        errors = []
        for side, way, values in zip(FACTOR_SIDES, packing, sides, strict=True):
            arrays = way.packed(values)
            errors.append(way.errors(values, arrays))
            for part, stored in arrays.items():
                self.raw.put(f"{factor_name(*key, side)}/{part}", place, stored)
        rough = np.flatnonzero(~fine(errors[0], errors[1], kind))
        if len(rough):
            self.raw.grow(whole_name(*key, "of"), place + rough)
            for side, values in zip(FACTOR_SIDES, sides, strict=True):
                (stored,) = encode(values[rough], kind, 1, lambda row: name(int(rough[row])), "factors").values()
                self.raw.grow(whole_name(*key, side), stored)


@contextmanager
def shard_writer(
    folder: Path,
    after: Manifest,
    planned: PlannedShard,
    columns: Mapping[str, NDArray[Any]],
    samples: Sequence[tuple[int, str]],
    specs: Mapping[str, Spec] | None = None,
) -> Iterator[ShardWriter]:
    """See :meth:`Job.shard`."""
    ids = runs.to_ids(planned.ids)
    values = {f"columns/{name}": as_stored(column, after.columns[name]) for name, column in columns.items()}
    all_specs = row_specs(after, len(ids)) if specs is None else {"ids": ((len(ids),), "<i8"), **specs}
    all_specs |= {name: (column.shape, column.dtype.str) for name, column in values.items()}
    attributes = {"format": FORMAT, "version": after.version, "map": after.fingerprint, "rows@row_type": after.row_type}
    about = {"name": planned.name, "map": after.fingerprint, "ids": planned.ids}
    about |= {"row_type": after.row_type, "samples": samples}
    with writing(folder / SHARDS / f"{planned.name}.h5", all_specs, attributes, about) as raw:
        for name, column in {"ids": ids, **values}.items():
            raw.put(name, 0, column)
        yield ShardWriter(raw, after, ids)


def entry_of(name: str, seal: Mapping[str, Any]) -> ShardEntry:
    """What the manifest says of a sealed shard."""
    ids = seal["ids"]
    data = digest_of({"ids": ids, "samples": seal["samples"]})
    return ShardEntry(name, ids[0][0], ids[-1][1] - 1, runs.count(ids), data, seal["sha256"])
