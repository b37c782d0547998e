"""What a shard holds, and how much room it takes, before there is one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dates import DATES, STORED_DATES
from ..errors import StoreError
from . import runs
from .container import BLOCK_BYTES
from .documents import PlannedShard
from .encoding import LARGEST_CODE, STORED, stored_width
from .forms import WHOLE
from .hdf5 import Spec
from .manifest import Manifest, ShardEntry

# HDF5's own part of a file without columns, and what a seal says of a block.
_HEADER_BYTES, _BLOCK_DIGEST_BYTES = 1 << 14, 32

FACTOR_SIDES = ("activations", "output_gradients")
WIDE = "wide"


def factor_name(checkpoint: int, layer: int, side: str) -> str:
    """Where a shard keeps one side of the exact factors of a layer at a checkpoint."""
    return f"factors/{checkpoint}/{layer}/{side}"


def whole_name(checkpoint: int, layer: int, what: str) -> str:
    """Where it keeps what is whole of packed factors: ``"of"``, positions of rows, or a side of these rows."""
    return f"factors/{checkpoint}/{layer}{WHOLE}{what}"


def row_specs(manifest: Manifest, count: int) -> dict[str, Spec]:
    """Shapes and types of the arrays that a manifest asks for in a shard of ``count`` rows, but for columns."""
    checkpoints, kind = manifest.n_checkpoints, STORED[manifest.row_type]
    specs: dict[str, Spec] = {
        "ids": ((count,), "<i8"),
        "rows": ((count, stored_width(manifest.row_type, manifest.dim)), kind),
    }
    if manifest.row_type in LARGEST_CODE:
        specs["scales"] = ((count, checkpoints), "<f4")
    if manifest.wide is not None:
        specs[WIDE] = ((count, checkpoints * manifest.wide // 2), "|u1")
        specs |= dict.fromkeys((f"{WIDE}_scales", f"{WIDE}_norms"), ((count, checkpoints), "<f4"))
    specs |= dict.fromkeys(("self_influence", "losses"), ((count, checkpoints), "<f8"))
    if manifest.factors is not None:
        for checkpoint in range(checkpoints):
            for number, layer in enumerate(manifest.map.layers):
                packing = manifest.packing.get(number)
                for which, size in enumerate((layer.d_in, layer.d_out)):
                    name = factor_name(checkpoint, number, FACTOR_SIDES[which])
                    if packing is None:
                        specs[name] = ((count, size), STORED[manifest.factors])
                        continue
                    parts = packing[which].specs(size).items()
                    specs |= {f"{name}/{part}": ((count, *shape), kind) for part, (shape, kind) in parts}
    return specs


def _whole_specs(manifest: Manifest) -> dict[str, Spec]:
    """Of arrays that a shard has where some rows of packed factors are whole: the shape of one row, and the type."""
    specs: dict[str, Spec] = {}
    for number in manifest.packing:
        layer = manifest.map.layers[number]
        for checkpoint in range(manifest.n_checkpoints):
            specs[whole_name(checkpoint, number, "of")] = (), "<i8"
            for side, size in zip(FACTOR_SIDES, (layer.d_in, layer.d_out), strict=True):
                specs[whole_name(checkpoint, number, side)] = (size,), STORED[manifest.factors or "float32"]
    return specs


class Expected:
    """The arrays that shards of a manifest must have, with all but their lengths; made once for many shards."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._arrays = {name: (list(shape[1:]), kind) for name, (shape, kind) in row_specs(manifest, 0).items()}
        self._whole = {name: (list(shape), kind) for name, (shape, kind) in _whole_specs(manifest).items()}

    def check(self, entry: ShardEntry, seal: Mapping[str, Any]) -> None:
        """Refuse a seal that does not fit the manifest and its entry there.

        Raises:
            ValueError: says what does not fit.
        """
        ids, manifest = seal["ids"], self._manifest
        count = sum(stop - start for start, stop in ids)
        if (ids[0][0], ids[-1][1] - 1, count) != (entry.first, entry.last, entry.rows):
            raise ValueError("its ids are not those that the manifest names")
        if seal["map"] != manifest.fingerprint or seal["row_type"] != manifest.row_type:
            raise ValueError("its rows are of another kind than the manifest's")
        places = seal["arrays"]
        for name, (shape, kind) in self._arrays.items():
            place = places.get(name)
            if place is None or place["shape"][1:] != shape or place["dtype"] != kind:
                raise ValueError(f"{name} is missing, or not of the shape and type that the manifest asks for")
        for name, (shape, kind) in self._whole.items():
            if (place := places.get(name)) is not None and (place["shape"][1:] != shape or place["dtype"] != kind):
                raise ValueError(f"{name} is not of the shape and type that the manifest asks for")
        for column, kind in manifest.columns.items():
            place = places.get(f"columns/{column}")
            # "S" is text, dates are numbers; the type of numbers is the manifest's.
            kind = STORED_DATES if kind == DATES else kind
            sound = place is not None and len(place["shape"]) == 1
            if place is None or not sound or (place["dtype"][:2] != "|S" if kind == "U" else place["dtype"] != kind):
                raise ValueError(f"columns/{column} is missing, or not of the type that the manifest asks for")


def as_stored(column: NDArray[Any], kind: str) -> NDArray[Any]:
    """A column as a shard holds it: text in UTF-8, padded with zeros; numbers in its type; dates as numbers."""
    if kind == DATES:
        return column.astype(DATES).view(STORED_DATES)
    if kind != "U":
        return column.astype(kind)
    encoded = column if column.dtype.kind == "S" else np.char.encode(column.astype(str), "utf-8")
    return encoded.astype(f"S{max(1, encoded.dtype.itemsize)}")


def shard_bytes(
    after: Manifest,
    plan: Sequence[PlannedShard],
    columns: Callable[[NDArray[np.int64]], Mapping[str, NDArray[Any]]],
) -> int:
    """What planned shards and their seals take on a disk, within a few KiB a shard.

    Args:
        after: the manifest that they are made for.
        plan: the shards, by their ``ids``.
        columns: values for ids (m,).
    """
    total = 0
    for shard in plan:
        ids = runs.to_ids(shard.ids)
        size = _HEADER_BYTES + sum(_bytes(spec) for spec in row_specs(after, len(ids)).values())
        size += sum(as_stored(values, after.columns[name]).nbytes for name, values in columns(ids).items())
        total += size + -(-size // BLOCK_BYTES) * _BLOCK_DIGEST_BYTES
    return total


def factor_bytes(after: Manifest, count: int) -> int:
    """How much of that are exact factors, of ``count`` rows."""
    return sum(_bytes(spec) for name, spec in row_specs(after, count).items() if name.startswith("factors/"))


def wide_bytes(after: Manifest, count: int) -> int:
    """How much of that are wide rows, of ``count`` rows."""
    return sum(_bytes(spec) for name, spec in row_specs(after, count).items() if name.startswith(WIDE))


def _bytes(spec: Spec) -> int:
    shape, kind = spec
    return math.prod(shape) * np.dtype(kind).itemsize


def free_bytes(folder: Path) -> int:
    """What the disk of a folder has free, which need not be there yet.

    Raises:
        StoreError: the disk does not say.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return shutil.disk_usage(there).free
    except OSError as error:
        raise StoreError(f"{there} cannot be used: {error.strerror}. Choose another folder.") from None


def check_room(folder: Path, wanted: int, way_out: str = "") -> None:
    """Refuse to begin what the disk has no room for; ``way_out`` is what would fit.

    Raises:
        StoreError: says how much is wanted, and how much is free.
    """
    free = free_bytes(folder)
    if wanted > free:
        raise StoreError(
            f"{folder} still needs about {wanted / 1e9:,.3g} GB, but its disk has {free / 1e9:,.3g} GB free. "
            "Free some space, choose another disk, or store less: "
            f"{way_out or 'fewer dimensions, a smaller row_type, no factors'}."
        )
