"""Files of arrays: plain HDF5 to others, mapped and verified block by block here.

HDF5 lays the arrays out, contiguous and at known places. They are then written and read at these places,
so that no damaged metadata is ever parsed: a *seal* beside the file holds the places and a checksum of every
block of the file.
"""

from __future__ import annotations

import hashlib
import io
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, StoreError
from ..files import discard, flush, flushing, put_in_place, regular, storing, temporary_for, with_checksum
from .forms import WHOLE
from .hdf5 import Spec, lay_out, write_at

# 16 KiB: a row read at random costs little more than its own bytes, and checksums add 0.1% to a file.
BLOCK_BYTES = 1 << 14
_DIGEST_BYTES = 16
# Positions are scattered where they are among more than so many times as many.
_DENSE = 4


class Writer:
    """Writes into the arrays of a file that :func:`writing` laid out, each from its first position to its last."""

    def __init__(self, path: Path, temporary: Path, places: Mapping[str, dict[str, Any]]) -> None:
        self._path, self._places, self._written = path, places, dict.fromkeys(places, 0)
        self._grown: dict[str, list[NDArray[Any]]] = {}
        self._file = temporary.open("r+b", buffering=0)

    def put(self, name: str, start: int, values: NDArray[Any]) -> None:
        """Write ``values`` at positions from ``start`` on of the first axis, where those before them ended.

        Raises:
            StoreError: they do not fit, or cannot be written; the disk is full, for one.
        """
        place = self._places[name]
        content = np.ascontiguousarray(values, dtype=place["dtype"])
        end, (count, *shape) = start + len(content), place["shape"]
        if list(content.shape[1:]) != shape or start != self._written[name] or end > count:
            raise StoreError(
                f"{self._path} has {name} of shape {place['shape']}, but {list(content.shape)} came for position "
                f"{start} after {self._written[name]}. Nothing of it is kept; please report this."
            )
        self._written[name] = end
        with storing(self._path):
            write_at(self._file, place["offset"] + start * _item_bytes(place), content.reshape(-1).view(np.uint8).data)

    def grow(self, name: str, values: NDArray[Any]) -> None:
        """Add ``values`` to an array of what few rows have, laid out in the end; until then it is in memory."""
        self._grown.setdefault(name, []).append(np.ascontiguousarray(values))

    def grown(self) -> dict[str, NDArray[Any]]:
        """The arrays that grew, in the order of their names."""
        return {name: np.concatenate(parts) for name, parts in sorted(self._grown.items())}

    def put_grown(self, places: Mapping[str, dict[str, Any]]) -> None:
        """Write what grew, once the whole file is laid out again with room for it behind all else."""
        moved = [name for name, place in self._places.items() if places[name] != place]
        if moved:
            raise StoreError(
                f"{self._path} cannot grow: HDF5 has moved {moved[0]}. Nothing is kept; please report this."
            )
        self._places, grown = places, self.grown()
        self._written |= dict.fromkeys(grown, 0)
        for name, values in grown.items():
            self.put(name, 0, values)

    def close(self) -> None:
        """End writing."""
        self._file.close()

    def check_whole(self) -> None:
        """Refuse to end before every position of every array was written: what was not would read as zeros.

        Raises:
            StoreError: says of which array.
        """
        for name, written in self._written.items():
            if written != self._places[name]["shape"][0]:
                raise StoreError(
                    f"{self._path} has got {written} of {self._places[name]['shape'][0]} {name}, so it is not kept: "
                    "the data ended early. Check that the data set hands out as many examples as its length says."
                )


@contextmanager
def writing(
    path: Path, specs: Mapping[str, Spec], attributes: Mapping[str, Any], about: Mapping[str, Any]
) -> Iterator[Writer]:
    """Lay out an HDF5 file, have it filled, and seal it; whatever goes wrong, nothing is left of it.

    Args:
        path: ends in ``.h5``; the seal gets the suffix ``.json`` and is written last.
        specs: shape and little-endian type of each array, by its path in the file.
        attributes: of the file, ``"NAME"``, or of an array, ``"ARRAY@NAME"``.
        about: what else the seal says, as JSON.

    Raises:
        StoreError: it cannot be written.
    """
    seal_path = path.with_suffix(".json")
    temporary, seal_temporary = temporary_for(path), temporary_for(seal_path)
    try:
        with storing(path):
            places = lay_out(temporary, specs, attributes)
            writer = Writer(path, temporary, places)
        try:
            yield writer
            if grown := {name: (values.shape, values.dtype.str) for name, values in writer.grown().items()}:
                with storing(path):
                    places = lay_out(temporary, {**specs, **grown}, attributes)
                writer.put_grown(places)
        finally:
            writer.close()
        writer.check_whole()
        with storing(path):
            with flushing(temporary):
                seal = {"bytes": temporary.stat().st_size, "block_bytes": BLOCK_BYTES, "arrays": places}
                seal["blocks"] = _block_digests(temporary).hex()
                seal_temporary.write_text(with_checksum({**about, **seal})[0])
                flush(seal_temporary)
            put_in_place((temporary, path), (seal_temporary, seal_path))
    finally:
        discard(temporary, seal_temporary)


def _block_digests(path: Path) -> bytearray:
    digests, block = bytearray(), bytearray(BLOCK_BYTES)
    with path.open("rb") as file:
        while count := file.readinto(block):
            digests += _digest(memoryview(block)[:count])
    return digests


def _digest(block: memoryview) -> bytes:
    return hashlib.sha256(block).digest()[:_DIGEST_BYTES]


def _item_bytes(place: Mapping[str, Any]) -> int:
    shape: list[int] = place["shape"]
    size: int = np.dtype(place["dtype"]).itemsize
    return math.prod(shape[1:]) * size


def _first_block(place: Mapping[str, Any], block_bytes: int) -> int:
    offset: int = place["offset"]
    return offset // block_bytes


def _stop_block(place: Mapping[str, Any], block_bytes: int) -> int:
    end: int = place["offset"] + place["shape"][0] * _item_bytes(place)
    return -(-end // block_bytes)


def blocks_of(seal: Mapping[str, Any], beginnings: tuple[str, ...]) -> NDArray[np.int64]:
    """Ascending numbers of the blocks in which arrays lie whose names begin so; ``seal`` as for :class:`Container`."""
    size = seal["block_bytes"]
    spans = [
        np.arange(_first_block(place, size), _stop_block(place, size))
        for name, place in seal["arrays"].items()
        if name.startswith(beginnings) and math.prod(place["shape"])
    ]
    return np.unique(np.concatenate(spans)) if spans else np.empty(0, dtype=np.int64)


class Container:
    """A sealed file, mapped read-only; every block is compared with its checksum before it is first handed out.

    A file that another process cuts short while it is mapped ends this one (SIGBUS), as with any map; files
    here are only ever replaced whole.

    Args:
        path: the HDF5 file.
        seal: what :func:`writing` put beside it, already checked, also in its form (``forms``).
        sound: which blocks were found sound before, where the file was open before; shared with this one.

    Raises:
        StoreError: the file is not as long as when it was sealed.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, seal: Mapping[str, Any], sound: NDArray[np.bool_] | None = None) -> None:
        self.path, self._places = path, seal["arrays"]
        self._arrays: dict[str, tuple[NDArray[Any], int, int]] = {}
        self._block_bytes: int = seal["block_bytes"]
        self._digests = bytes.fromhex(seal["blocks"])
        with regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != seal["bytes"]:
                raise StoreError(f"{path} has {size} bytes instead of {seal['bytes']}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._bytes = memoryview(self._map)
        self._scattered = False
        self.sound = np.zeros(len(self._digests) // _DIGEST_BYTES, dtype=bool) if sound is None else sound

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(self.sound)

    def names(self, prefix: str = "") -> list[str]:
        """Arrays whose path starts with ``prefix``."""
        return [name for name in self._places if name.startswith(prefix)]

    def spec(self, name: str) -> Spec:
        """Shape and type of an array."""
        return tuple(self._places[name]["shape"]), self._places[name]["dtype"]

    def view(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Positions ``start`` to ``stop`` of an array: a read-only view of the file, its blocks verified.

        Raises:
            ArgumentError: there are no such positions.
            StoreError: a block is damaged.
        """
        place = self._places[name]
        stop = place["shape"][0] if stop is None else stop
        if not 0 <= start <= stop <= place["shape"][0]:
            raise ArgumentError(f"Positions {start} to {stop} are not among those of {name}, 0 to {place['shape'][0]}.")
        each = _item_bytes(place)
        if stop > start:
            first, last = place["offset"] + start * each, place["offset"] + stop * each - 1
            self._read_from(scattered=False)
            self._verify(np.arange(first // self._block_bytes, last // self._block_bytes + 1), name)
        return self._array(name)[0][start:stop]

    def at(self, names: Sequence[str], positions: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Read-only views of arrays, to be read at ``positions`` alone: the blocks that these touch are verified.

        Args:
            names: of the arrays.
            positions: (m,) of their first axis.

        Raises:
            StoreError: a block is damaged.
        """
        arrays = [self._array(name) for name in names]
        offsets, each = np.array([place[1:] for place in arrays]).T[:, :, None]
        starts = offsets + positions * each
        dense = int(np.ptp(positions)) < _DENSE * len(positions) if len(positions) else True
        self._read_from(scattered=not dense)
        first, last = starts // self._block_bytes, (starts + (each - 1)) // self._block_bytes
        if not (self.sound[first].all() and self.sound[last].all() and each.max() <= self._block_bytes):
            touched = []
            for begin, end in zip(first, last, strict=True):
                reach = np.arange((end - begin).max(initial=0) + 1)
                touched.append(np.unique(np.minimum(begin[:, None] + reach, end[:, None])))
                if not dense:
                    self._ask_for(touched[-1])
            for name, blocks in zip(names, touched, strict=True):
                self._verify(blocks, name)
        return [values for values, _, _ in arrays]

    def take(self, name: str, positions: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of the given positions of an array; see :meth:`at`."""
        (values,) = self.at([name], positions)
        return np.take(values, positions, axis=0)

    def verify(self, blocks: NDArray[np.int64], then: NDArray[np.int64]) -> None:
        """Verify blocks before anybody asks for them, and keep their pages with this process.

        Args:
            blocks: ascending numbers.
            then: those that come next, which the disk is asked for meanwhile.

        Raises:
            StoreError: one is damaged.
        """
        if len(then):
            self._will_need(int(then[0]) * self._block_bytes, (int(then[-1]) + 1) * self._block_bytes)
        self._verify(blocks)

    def _read_from(self, *, scattered: bool) -> None:
        """Say how the next bytes are read: for each that it lacks, the system reads 128 KiB, unless they are scattered.

        Of a file larger than the memory, that would be thirty times what is wanted, each time anew.
        """
        if scattered != self._scattered and hasattr(self._map, "madvise"):
            self._scattered = scattered  # another thread may have it otherwise, which costs time alone
            self._map.madvise(mmap.MADV_RANDOM if scattered else mmap.MADV_NORMAL)

    def _ask_for(self, blocks: NDArray[np.int64]) -> None:
        """Have the disk read what of ascending blocks is to be verified, all at once instead of one after the other."""
        unseen = blocks[~self.sound[blocks]]
        for run in np.split(unseen, np.flatnonzero(np.diff(unseen) != 1) + 1) if len(unseen) > 1 else ():
            self._will_need(int(run[0]) * self._block_bytes, (int(run[-1]) + 1) * self._block_bytes)

    def _will_need(self, start: int, stop: int) -> None:
        """Have the disk read bytes ahead, while others are worked on."""
        if hasattr(self._map, "madvise"):
            whole_pages = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, whole_pages, min(stop, len(self._map)) - whole_pages)

    def damaged(self) -> list[int]:
        """Numbers of all damaged blocks of the file, every block read anew, and not through the map.

        Raises:
            OSError: the disk does not give them.
        """
        found, block = [], bytearray(self._block_bytes)
        with regular(self.path) as unbuffered, io.BufferedReader(unbuffered) as file:
            for number in range(self.blocks):
                count = file.readinto(block)
                if _digest(memoryview(block)[:count]) != self._expected(number):
                    found.append(number)
        return found

    def positions_in(self, blocks: list[int]) -> tuple[int, int] | None:
        """First and last position, of any array, that one of the blocks holds a part of; ``None`` for none."""
        found: list[tuple[int, int]] = []
        for name, place in self._places.items():
            if WHOLE in name:  # not one for each row
                found += [(0, self._places["ids"]["shape"][0] - 1)] * self._touches(place, blocks)
                continue
            each, offset, count = _item_bytes(place), place["offset"], place["shape"][0]
            for block in blocks:
                low = (block * self._block_bytes - offset) // each
                high = ((block + 1) * self._block_bytes - 1 - offset) // each
                if high >= 0 and low < count:
                    found.append((max(low, 0), min(high, count - 1)))
        return (min(low for low, _ in found), max(high for _, high in found)) if found else None

    def _touches(self, place: Mapping[str, Any], blocks: list[int]) -> bool:
        first, size = place["offset"], place["shape"][0] * _item_bytes(place)
        return any(
            first < (block + 1) * self._block_bytes and first + size > block * self._block_bytes for block in blocks
        )

    def _array(self, name: str) -> tuple[NDArray[Any], int, int]:
        """An array, unverified; where it begins in the file, and the bytes of a position."""
        found = self._arrays.get(name)
        if found is None:
            place = self._places[name]
            values = np.frombuffer(self._bytes, place["dtype"], math.prod(place["shape"]), place["offset"])
            found = values.reshape(place["shape"]), place["offset"], _item_bytes(place)
            self._arrays[name] = found
        return found

    def _verify(self, blocks: NDArray[np.int64], name: str | None = None) -> None:
        """Compare those with their checksums that were not before; ``name`` of the array that they are read for."""
        for number in blocks[~self.sound[blocks]].tolist():
            start = number * self._block_bytes
            if _digest(self._bytes[start : start + self._block_bytes]) != self._expected(number):
                raise StoreError(
                    f"{self.path} is damaged (block {number}, in {name or self._holds(number)}). "
                    "Run `gradindex verify` to see all damage, and `gradindex build --repair` to compute damaged "
                    "shards again."
                )
            self.sound[number] = True

    def _holds(self, block: int) -> str:
        """Names of the arrays that have a part in a block."""
        size = self._block_bytes
        return " and ".join(
            name
            for name, place in self._places.items()
            if _first_block(place, size) <= block < _stop_block(place, size)
        )

    def _expected(self, number: int) -> bytes:
        return self._digests[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES]
