"""Exact factors where they lie in a shard, whole or packed: numbers to compare, or copies of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .layout import FACTOR_SIDES, factor_name, whole_name
from .manifest import Manifest
from .packing import Packing
from .scratch import rooms
from .shards import Shard

# Codes become numbers so much at a time, to stay in a processor's cache.
_CACHED_BYTES = 256 << 10


class Comparable(NamedTuple):
    """Rows of a side, for inner products with a query's side q: ``steps <numbers, q> + lowest sum(q)``.

    Args:
        numbers: (m, d) float32.
        steps: (m,) float32, ``None`` for 1.
        lowest: (m,) float32, ``None`` for 0.
    """

    numbers: NDArray[np.float32]
    steps: NDArray[np.float32] | None = None
    lowest: NDArray[np.float32] | None = None

    def products(self, found: NDArray[np.float32], at: NDArray[np.int64], sums: NDArray[np.float64]) -> NDArray[Any]:
        """(n,) inner products, from those ``found`` of the numbers ``at`` rows and ``sums`` of the queries' sides."""
        if self.steps is None or self.lowest is None:
            return found
        return found * self.steps[at].astype(np.float64) + self.lowest[at] * sums


@dataclass(frozen=True)
class WholeSide:
    """A side that is stored as it is.

    Args:
        values: (rows of the shard, d), to be read at verified positions alone.
    """

    values: NDArray[Any]

    def take(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """(m, d) as stored."""
        return np.take(self.values, positions, axis=0, mode="clip")

    def comparable(self, positions: NDArray[np.int64]) -> Comparable:
        """The rows at ``positions``, copied."""
        return Comparable(self.take(positions).astype(np.float32, copy=False))


@dataclass(frozen=True)
class PackedSide:
    """A side that is packed.

    Args:
        packing: how.
        parts: its arrays, to be read at verified positions alone.
        of: ascending positions of the rows that are whole besides.
        whole: (len(of), d) these.
    """

    packing: Packing
    parts: Mapping[str, NDArray[Any]]
    of: NDArray[np.int64]
    whole: NDArray[Any]

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """(m, d)."""
        values = self.packing.unpacked(self._gathered(positions))
        if len(self.of):
            where, which = self._whole_among(positions)
            values[where] = self.whole[which]
        return values

    def comparable(self, positions: NDArray[np.int64]) -> Comparable:
        """The rows at ascending ``positions``: codes as numbers, whose products are multiplied by their step.

        They are good until this thread compares the next side.
        """
        (numbers,) = rooms("numbers", [((len(positions), self.parts["codes"].shape[1]), np.float32)])
        scales = np.take(self.parts["scales"], positions, axis=0, mode="clip")
        lowest, steps = scales.T
        steps[steps == 0] = 1
        at_once = max(1, _CACHED_BYTES // (4 * max(1, numbers.shape[1])))
        for start in range(0, len(positions), at_once):
            some = slice(start, start + at_once)
            at = positions[some]
            if at[-1] - at[0] + 1 == len(at):  # neighbours
                parts = {name: part[at[0] : at[-1] + 1] for name, part in self.parts.items()}
            else:
                parts = self._gathered(at)
            self.packing.write_steps(parts, numbers[some])
            if self.packing.kept:
                kept = (parts["values"] - lowest[some, None]) / steps[some, None]
                numbers[some][np.arange(len(kept))[:, None], parts["places"]] = kept
        if len(self.of):
            where, which = self._whole_among(positions)
            numbers[where], steps[where], lowest[where] = self.whole[which], 1, 0
        return Comparable(numbers, steps, lowest)

    def _gathered(self, positions: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return {name: np.take(part, positions, axis=0, mode="clip") for name, part in self.parts.items()}

    def _whole_among(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where in ``positions`` are rows that are whole, and where these are in ``of``."""
        return _among(positions, self.of)


Side = WholeSide | PackedSide
# Places among what is gathered, the shard, and positions in it.
InShard = tuple[NDArray[np.int64], Shard, NDArray[np.int64]]
StoredSides = dict[tuple[int, int], tuple[Side, Side]]


def comparable(
    stored: StoredSides, positions: NDArray[np.int64]
) -> Iterator[tuple[list[tuple[tuple[int, int], int]], list[Comparable], NDArray[np.int64]]]:
    """Sides of rows at ``positions`` (m,), for inner products: which they are, their rows, and where in these each is.

    Where all are stored as they are, in float32, nothing is copied, and all come at once. Else each side comes alone,
    to be done with before the next one takes its room, and each row is copied once.
    """
    names = [(key, number) for key in stored for number in (0, 1)]
    sides = [stored[key][number] for key, number in names]
    whole = [side for side in sides if isinstance(side, WholeSide) and side.values.dtype == np.float32]
    if len(whole) == len(sides):
        yield names, [Comparable(side.values) for side in whole], positions
        return
    used, at = np.unique(positions, return_inverse=True)
    for name, side in zip(names, sides, strict=True):
        yield [name], [side.comparable(used)], at


# Places of some rows, and both sides of them.
WholeRows = tuple[NDArray[np.int64], list[NDArray[Any]]]


class FactorSides:
    """The factors of a store's shards.

    Args:
        manifest: the store's, which has factors.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._packing = manifest.packing
        layers = manifest.map.layers
        self.keys = [(c, number) for c in range(manifest.n_checkpoints) for number in range(len(layers))]
        self._parts: dict[tuple[int, int], list[list[str]]] = {}
        for key in self.keys:
            sizes, packing = (layers[key[1]].d_in, layers[key[1]].d_out), self._packing.get(key[1])
            names = [factor_name(*key, side) for side in FACTOR_SIDES]
            self._parts[key] = [
                [name] if packing is None else [f"{name}/{part}" for part in packing[which].specs(sizes[which])]
                for which, name in enumerate(names)
            ]

    def names(self, *keys: tuple[int, int]) -> list[str]:
        """Of the arrays, one position for each row, of all layers at all checkpoints or of some."""
        return [name for key in keys or self.keys for side in self._parts[key] for name in side]

    def at(self, shard: Shard, positions: NDArray[np.int64], *keys: tuple[int, int]) -> StoredSides:
        """By (checkpoint, layer), all or some, both sides, whose arrays are verified at ``positions``.

        Raises:
            StoreError: a block is damaged.
        """
        names = self.names(*keys)
        arrays = dict(zip(names, shard.arrays.at(names, positions), strict=True))
        return {key: self._sides(shard, key, arrays) for key in keys or self.keys}

    def gathered(self, found: Iterable[InShard], count: int) -> StoredSides:
        """Both sides of rows of several shards, copied as they are stored; row j is that of place j.

        Args:
            found: places, the shard and positions in it, places from 0 to ``count`` in ascending order.
            count: how many rows.

        Raises:
            StoreError: a block is damaged.
        """
        whole: dict[tuple[int, int], list[tuple[NDArray[np.int64], list[NDArray[Any]]]]] = {
            key: [] for key in self.keys
        }

        def noted() -> Iterator[InShard]:
            for places, shard, positions in found:
                yield places, shard, positions
                for key in self.keys:
                    of = _view(shard, whole_name(*key, "of"))
                    at, which = _among(positions, of)
                    if len(at):
                        rows = [shard.arrays.take(whole_name(*key, side), which) for side in FACTOR_SIDES]
                        whole[key].append((places[0] + at, rows))

        arrays = gathered(noted(), self.names(), count)
        made = {}
        for key in self.keys:
            of, sides = None, [np.empty((0, 0))] * 2
            if whole[key]:
                of = np.concatenate([places for places, _ in whole[key]])
                sides = [np.concatenate([rows[number] for _, rows in whole[key]]) for number in (0, 1)]
            made[key] = self._made(key, arrays, of, sides)
        return made

    def _sides(self, shard: Shard, key: tuple[int, int], arrays: Mapping[str, NDArray[Any]]) -> tuple[Side, Side]:
        of = _view(shard, whole_name(*key, "of"))
        whole = [np.empty((0, 0)) if of is None else shard.arrays.view(whole_name(*key, side)) for side in FACTOR_SIDES]
        return self._made(key, arrays, of, whole)

    def _made(
        self,
        key: tuple[int, int],
        arrays: Mapping[str, NDArray[Any]],
        of: NDArray[np.int64] | None,
        whole: Sequence[NDArray[Any]],
    ) -> tuple[Side, Side]:
        packing, parts = self._packing.get(key[1]), self._parts[key]
        if packing is None:
            x, delta = (WholeSide(arrays[name]) for (name,) in parts)
            return x, delta
        found = []
        for way, names, rows in zip(packing, parts, whole, strict=True):
            mine = {name.rpartition("/")[2]: arrays[name] for name in names}
            found.append(PackedSide(way, mine, np.empty(0, np.int64) if of is None else of, rows))
        return found[0], found[1]


def gathered(found: Iterable[InShard], names: Sequence[str], count: int) -> dict[str, NDArray[Any]]:
    """Values of some arrays as they are stored, of rows of several shards, good until this thread gathers again.

    See :meth:`FactorSides.gathered`.
    """
    into: dict[str, NDArray[Any]] = {}
    for places, shard, positions in found:
        arrays = shard.arrays.at(names, positions)
        if not into:
            specs = [((count, *array.shape[1:]), array.dtype) for array in arrays]
            into = dict(zip(names, rooms("gathered", specs), strict=True))
        some = slice(int(places[0]), int(places[-1]) + 1)
        for name, array in zip(names, arrays, strict=True):
            np.take(array, positions, axis=0, out=into[name][some], mode="clip")  # unclipped, it would copy twice
    return into


_NOWHERE = np.empty(0, dtype=np.int64)


def _among(positions: NDArray[np.int64], of: NDArray[np.int64] | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where in ``positions`` those are that stand in ascending ``of``, and where in that."""
    if of is None or not len(of):
        return _NOWHERE, _NOWHERE
    which = np.minimum(of.searchsorted(positions), len(of) - 1)
    where = np.flatnonzero(of[which] == positions)
    return where, which[where]


def _view(shard: Shard, name: str) -> NDArray[Any] | None:
    return shard.arrays.view(name) if name in shard.arrays else None


class LeadingEntries(NamedTuple):
    """What of some rows tells most of their scores.

    Args:
        norms: (m, C) eta_c times the squared norm of the gradient.
        entries: for each checkpoint places and values of the largest entries of delta: (m, kept) each.
    """

    norms: NDArray[np.float64]
    entries: list[tuple[NDArray[Any], NDArray[np.float32]]]


def leading_entries(found: Iterable[InShard], n_checkpoints: int, count: int) -> LeadingEntries:
    """The largest entries of the first layer's output gradients, which are packed; see :meth:`FactorSides.gathered`.

    Raises:
        StoreError: a block is damaged.
    """
    sides = [factor_name(checkpoint, 0, FACTOR_SIDES[1]) for checkpoint in range(n_checkpoints)]
    names = ["self_influence", *(f"{side}/{part}" for side in sides for part in ("places", "values"))]
    arrays = gathered(found, names, count)
    norms, *parts = (arrays[name] for name in names)
    return LeadingEntries(norms, list(zip(parts[::2], parts[1::2], strict=True)))
