"""HDF5's own part of a file, laid out before any array is written (owns h5py)."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_ALIGNED_TO = 64

# Shape and type of an array.
Spec = tuple[tuple[int, ...], str]


def lay_out(path: Path, specs: Mapping[str, Spec], attributes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write HDF5's own part of a file, which may hold some of the arrays already: where each array is to be."""
    import h5py  # reading needs none of it

    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_layout(h5py.h5d.CONTIGUOUS)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    places = {}
    pages = _Pages()
    aligned = {"alignment_threshold": 1, "alignment_interval": _ALIGNED_TO}
    with h5py.File(pages, "w", libver=("v110", "v110"), **aligned) as file:
        for name, (shape, kind) in specs.items():
            dtype = np.dtype(kind)
            stored = h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype
            data = file.create_dataset(name, shape, stored, dcpl=early)
            places[name] = {"offset": data.id.get_offset(), "dtype": dtype.str, "shape": list(shape)}
        for name, value in attributes.items():
            array, _, attribute = name.rpartition("@")
            (file[array] if array else file).attrs[attribute] = value
    pages.save(path)
    return places


class _Pages(io.RawIOBase):
    """A file in memory of which only what was written takes room: HDF5's metadata, not the arrays.

    HDF5 writes here instead of to the disk, so that a full disk is met where Python can tell of it.
    """

    _SIZE = 4096

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._pieces: list[tuple[int, int]] = []
        self._place = self._end = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See ``io``."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._end}[whence]
        return self._place

    def tell(self) -> int:
        """See ``io``."""
        return self._place

    def truncate(self, size: int | None = None) -> int:
        """See ``io``; HDF5 only ever lets its files grow."""
        self._end = self._place if size is None else size
        return self._end

    def write(self, content: Any) -> int:
        """See ``io``."""
        left = memoryview(content).cast("B")
        written = len(left)
        self._pieces.append((self._place, written))
        while left:
            number, start = divmod(self._place, self._SIZE)
            piece = left[: self._SIZE - start]
            self._pages.setdefault(number, bytearray(self._SIZE))[start : start + len(piece)] = piece
            self._place, left = self._place + len(piece), left[len(piece) :]
        self._end = max(self._end, self._place)
        return written

    def readinto(self, buffer: Any) -> int:
        """See ``io``."""
        into = memoryview(buffer).cast("B")
        count = done = min(len(into), max(0, self._end - self._place))
        while done:
            number, start = divmod(self._place, self._SIZE)
            size = min(done, self._SIZE - start)
            begin = count - done
            into[begin : begin + size] = self._pages.get(number, bytearray(self._SIZE))[start : start + size]
            self._place, done = self._place + size, done - size
        return count

    def save(self, path: Path) -> None:
        """Write it to a disk, as long as it is; of a file that is there, what was not written here stays."""
        path.touch()
        with path.open("r+b", buffering=0) as file:
            file.truncate(self._end)
            for start, count in self._pieces:
                piece = bytearray(count)
                self.seek(start)
                self.readinto(piece)
                write_at(file, start, memoryview(piece))


def write_at(file: io.FileIO, offset: int, content: memoryview) -> None:
    """Write all of ``content``, whatever the system takes at once."""
    file.seek(offset)
    while content:
        content = content[file.write(content) or 0 :]
