"""An open store: rows and what stands beside them, by id or block by block, never all in memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dates import DATES
from ..errors import ArgumentError, StoreError, check_k
from ..examples import Coded
from ..files import is_there, signature
from ..gaps import with_gaps
from ..output import as_html, data_frame
from . import runs
from .bases import Bases, read_bases
from .documents import MANIFEST, PENDING, read_manifest
from .gathering import Gatherer
from .job import progress_of
from .layout import WIDE, row_specs
from .manifest import ShardEntry
from .shards import OpenShards, Shard, check_unchanged
from .sides import FactorSides, LeadingEntries, StoredSides, leading_entries
from .summary import described, flat
from .touching import bytes_of, verified
from .verifying import damaged, problems_of

# Places in a list of ids, their positions in a shard, and by (checkpoint, layer) activations and output gradients.
FactorsInPlace = tuple[NDArray[np.int64], NDArray[np.int64], StoredSides]

# What `blocks` hands out at once.
_PIECE_BYTES = 16 << 20


class GradientStore:
    """A complete store, open for reading. Opening reads only the manifest.

    Rows belong to *ids*, int64 keys (by default the positions in the training set) that never change and are
    never reused. Every block of a file is checked against its checksum before its first use. A store stays as it was
    when it was opened, also for threads that share it; :attr:`current` says whether it is up to date.

    Args:
        folder: what ``gradindex build`` wrote.

    Raises:
        StoreError: not a store, incomplete, damaged, or of another version.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.complete(folder) and is_there(self.folder / PENDING):
            done, shards = progress_of(self.folder)
            raise StoreError(
                f"{self.folder} is a build that has not finished ({done} of {shards} shards). "
                "Rerun the same `gradindex build` to resume, or `gradindex seal` once every part is done."
            )
        self._seen = signature(self.folder / MANIFEST)
        self.manifest = read_manifest(self.folder)
        self.dim, self.n_checkpoints = self.manifest.dim, self.manifest.n_checkpoints
        self.has_factors = self.manifest.has_factors
        self._removed = runs.as_runs(self.manifest.removed)
        self._serve(self.manifest.shards)

    def _serve(self, entries: Sequence[ShardEntry]) -> None:
        self._entries = entries
        self._shards = OpenShards(self.folder, entries, self.manifest)
        self._gatherer = Gatherer(self._shards, entries)
        self._live_runs: NDArray[np.int64] | None = None

    @staticmethod
    def complete(folder: str | os.PathLike[str]) -> bool:
        """Whether a complete store is here."""
        return is_there(Path(folder) / MANIFEST)

    @property
    def current(self) -> bool:
        """Whether the store on disk is still the one that was opened."""
        return signature(self.folder / MANIFEST) == self._seen

    def __len__(self) -> int:
        return self.n_train

    def __repr__(self) -> str:
        return f"<GradientStore {str(self.folder)!r}: {'; '.join(described(self).values())}>"

    def _repr_html_(self) -> str:
        return as_html(described(self) | {"folder": str(self.folder)})

    @property
    def n_train(self) -> int:
        """The number of training examples that have a row, removed ones not counted."""
        return sum(entry.rows for entry in self._entries) - runs.count(self._removed)

    @property
    def ids(self) -> NDArray[np.int64]:
        """(n_train,) the ids that have a row, ascending."""
        return runs.to_ids(self.id_runs)

    @property
    def id_runs(self) -> NDArray[np.int64]:
        """The ids that have a row, as runs ``[[start, stop], ...]``."""
        if self._live_runs is None:
            every = [runs.as_runs(self.shard_runs(number)) for number in range(len(self._entries))]
            joined = np.concatenate(every) if every else np.empty((0, 2), dtype=np.int64)
            self._live_runs = runs.without(joined, self._removed)
        return self._live_runs

    @property
    def origins(self) -> list[list[Any]]:
        """Where rows were computed, in the order of ids: ``[digest, first id, last id]``.

        Compacting and repairing keep them, and other rows have others: an index knows its rows again by them.
        """
        return [origin for entry in self._entries for origin in entry.computed_in]

    def shard(self, name: str) -> Shard | None:
        """The shard of this name, open; ``None`` where there is none."""
        numbers = [number for number, entry in enumerate(self._entries) if entry.name == name]
        return self._shards[numbers[0]] if numbers else None

    def shard_runs(self, number: int) -> runs.Runs:
        """The ids of a shard, removed ones as well."""
        entry = self._entries[number]
        if entry.rows == entry.last - entry.first + 1:
            return [[entry.first, entry.last + 1]]
        found: list[list[int]] = self._shards.seal(number)["ids"]
        return found

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.manifest.columns)

    def blocks(
        self, only: runs.Runs | None = None, removed: bool = False
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Ids (m,) and rows (m, dim) float32 in the order of ids, in pieces of about 16 MiB.

        Args:
            only: the ids that are wanted, by default all.
            removed: whether removed ones are handed out as well, as long as their rows are there.
        """
        step = max(1, _PIECE_BYTES // (4 * self.dim))
        for number, entry in enumerate(self._entries):
            if only is not None and not len(runs.without(only, runs.without(only, self.shard_runs(number)))):
                continue
            for start in range(0, entry.rows, step):
                shard, stop = self._shards[number], min(start + step, entry.rows)
                ids, rows = shard.ids[start:stop], shard.rows(start, stop)
                kept = ~runs.contain(self._removed, ids) | removed
                if only is not None:
                    kept &= runs.contain(only, ids)
                yield (ids, rows) if kept.all() else (ids[kept], rows[kept])

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(ids), dim) float32 rows in the order of ``ids``.

        Raises:
            ArgumentError: an id has no row.
            StoreError: a block that was touched is damaged.
        """
        return self._gathered("rows", ids, (self.dim,), np.float32)

    def mapped(self, number: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` of a shard as they are stored: a read-only view of its file.

        Every block that the view touches is verified first. Removed rows are in it; of bfloat16 it has the bits,
        of int8 the codes.

        Args:
            number: of the shard, as in ``manifest.shards``.
            start: first position in the shard.
            stop: the position after the last, by default all.

        Raises:
            ArgumentError: there is no such shard, or no such position in it.
            StoreError: a block is damaged.
        """
        if not 0 <= number < len(self._entries):
            raise ArgumentError(f"There is no shard {number}; they go from 0 to {len(self._entries) - 1}.")
        return self._shards[number].arrays.view("rows", start, stop)

    def self_influence(self, ids: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """(n, C) float64: eta_c ||grad l(w_c; z)||^2; the sum over C is TracInCP(z, z).

        Exact or projected, as the manifest's ``self_influence`` says.

        Args:
            ids: (n,) int64; by default all, in the order of :attr:`ids`.
        """
        return self._values("self_influence", ids, (self.n_checkpoints,))

    def losses(self, ids: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """(n, C) float64 training losses, of ``ids`` or of all."""
        return self._values("losses", ids, (self.n_checkpoints,))

    def column(self, name: str, ids: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """The values of a column: of all ids (n_train,), or of ``ids`` in their shape and order.

        Texts are ``str_``, or objects where some are missing (NaN); dates are ``datetime64[us]`` (NaT where there is
        none), which ``tolist()`` makes ``datetime``.
        """
        return with_gaps(self.column_as_stored(name, ids))

    def column_as_stored(self, name: str, ids: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """The same with ``MISSING_TEXT`` for texts that are missing, so that all are of one type."""
        if name not in self.columns:
            raise ArgumentError(f"The store has no column {name!r}. It has: {', '.join(self.columns) or 'none'}.")
        if ids is None:
            values = self._values(f"columns/{name}", None, ())
        else:
            ids = runs.as_ids(ids)
            values = self._values(f"columns/{name}", ids.ravel(), ()).reshape(ids.shape)
        return values.view(DATES) if self.manifest.columns[name] == DATES else values

    def longest(self, name: str) -> int:
        """The most bytes that a text of a column takes in UTF-8, at least 1."""
        specs = [self._shards.seal(number)["arrays"][f"columns/{name}"] for number in range(len(self._entries))]
        return max(int(np.dtype(spec["dtype"]).itemsize) for spec in specs)

    def to_pandas(self, ids: NDArray[np.int64] | None = None) -> Any:
        """A DataFrame by id: columns, ``self_influence`` (the sum), and by checkpoint ``self_influence_0``, ``loss_0``.

        Args:
            ids: (n,) int64; by default all, in the order of :attr:`ids`.

        Raises:
            DependencyError: pandas is missing.
        """
        ids = self.ids if ids is None else self._checked(ids)
        return data_frame(flat(self, ids), index=("id", ids))

    def factors(
        self, ids: NDArray[np.int64], checkpoint: int | None = None
    ) -> dict[tuple[int, int], tuple[NDArray[Any], NDArray[Any]]]:
        """Exact factors: by (checkpoint, layer) activations x (n, d_in) and output gradients delta (n, d_out).

        The layer's gradient times sqrt(eta) is delta x^T, so <G, G'> = (delta . delta')(x . x').

        Args:
            ids: (n,) int64, in any order.
            checkpoint: whose alone, by default all checkpoints'.

        Raises:
            ArgumentError: the store has none, or an id has no row.
        """
        ids, manifest, layers = self._checked(ids), self.manifest, self.manifest.map.layers
        found = {}
        keys = [key for key in self._factor_sides.keys if checkpoint in (None, key[0])]
        for key in keys:
            kind = np.float32 if key[1] in manifest.packing else manifest.factors
            sizes = layers[key[1]].d_in, layers[key[1]].d_out
            found[key] = np.empty((len(ids), sizes[0]), dtype=kind), np.empty((len(ids), sizes[1]), dtype=kind)
        for places, shard, positions in self._gatherer.by_shard(ids):
            for key, sides in self._factor_sides.at(shard, positions, *keys).items():
                for room, side in zip(found[key], sides, strict=True):
                    room[places] = side.take(positions)
        return found

    def factors_in_place(self, ids: NDArray[np.int64]) -> Iterator[FactorsInPlace]:
        """The same where they lie: shard by shard, where the ids are in ``ids``, their positions, and the sides.

        Read the sides at those positions alone: only they are verified. Packed sides are copied, as they are stored, of
        all ids at once, and are good until this thread reads some again.

        Args:
            ids: (m,) int64, in any order, each as often as wanted.

        Raises:
            ArgumentError: the store has none, or an id has no row.
            StoreError: a block that an id touches is damaged.
        """
        sides, ids = self._factor_sides, self._checked(ids)
        if self.manifest.packing and len(ids):  # all in one: to unpack a few rows of each shard would take longer
            used, at = np.unique(ids, return_inverse=True)
            yield np.arange(len(ids)), at, sides.gathered(self._gatherer.by_shard(used), len(used))
            return
        for places, shard, positions in self._gatherer.by_shard(ids):
            yield places, positions, sides.at(shard, positions)

    def leading_entries(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], LeadingEntries]:
        """The largest entries of the first layer's packed output gradients: where each id's are, and all of them.

        Args:
            ids: (m,) int64, at least one, in any order, each as often as wanted.

        Raises:
            ArgumentError: an id has no row.
            StoreError: a block that an id touches is damaged.
        """
        used, at = np.unique(self._checked(ids), return_inverse=True)
        return at, leading_entries(self._gatherer.by_shard(used), self.n_checkpoints, len(used))

    def wide(self, ids: NDArray[np.int64]) -> Coded:
        """Wide rows as they are stored, in the order of ``ids``.

        Raises:
            ArgumentError: the store has none, or an id has no row.
            StoreError: a block that an id touches is damaged.
        """
        if self.manifest.wide is None:
            raise ArgumentError(
                f"{self.folder} has no wide rows. Build a store with wide=16384, or another even number."
            )
        names, ids = (WIDE, f"{WIDE}_scales", f"{WIDE}_norms"), self._checked(ids)
        if not len(ids):
            specs = row_specs(self.manifest, 0)
            return Coded(*(np.empty(*specs[name]) for name in names))
        return Coded(*self._gatherer.gather(names, ids))

    @cached_property
    def _factor_sides(self) -> FactorSides:
        if not self.has_factors:
            raise ArgumentError(f"{self.folder} has no factors. Build a store with factors='float32'.")
        return FactorSides(self.manifest)

    def top_self_influence(
        self, k: int, only: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The ids with the highest self-influence and its sums over checkpoints, highest first; shards stream.

        Args:
            k: how many, from 1 to n_train.
            only: ascending ids that count, by default all; where these are fewer than k, all of them are returned.

        Returns:
            Ids (m,) and sums (m,) float64, by sum descending, then id ascending. No more than 2 k ids and
            sums, and a shard's, are in memory.

        Raises:
            ArgumentError: ``k`` is out of range.
        """
        check_k(k, self.n_train)
        best, largest = [np.empty(0, dtype=np.int64)], [np.empty(0)]

        def cut() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
            ids, sums = np.concatenate(best), np.concatenate(largest)
            order = np.lexsort((ids, -sums))[:k]
            return ids[order], sums[order]

        for number in range(len(self._entries)):
            ids, kept = self._live(number)
            sums = np.asarray(self._shards[number].arrays.view("self_influence")).sum(1)[kept]
            if only is not None and len(ids):
                start, stop = np.searchsorted(only, [ids[0], ids[-1] + 1])
                wanted = np.isin(ids, only[start:stop], assume_unique=True)
                ids, sums = ids[wanted], sums[wanted]
            best.append(ids)
            largest.append(sums)
            if sum(map(len, best)) > 2 * k:
                ids, sums = cut()
                best, largest = [ids], [sums]
        return cut()

    def bases(self) -> Bases | None:
        """What a fitted projection was fitted to; ``None`` for other projections.

        Raises:
            StoreError: missing or damaged.
        """
        digest = self.manifest.map.bases
        try:
            return None if digest is None else read_bases(self.folder, digest)
        except StoreError:
            check_unchanged(self.folder, self.manifest)
            raise

    def samples(self, limit: int = 64) -> list[tuple[int, str]]:
        """Ids and digests of up to ``limit`` training examples, to tell whether data are still the same."""
        numbers = np.unique(np.linspace(0, len(self._entries) - 1, min(limit, len(self._entries))).astype(int))
        found = []
        for number in numbers:
            samples = [(int(i), text) for i, text in self._shards.seal(int(number))["samples"]]
            gone = runs.contain(self._removed, np.array([i for i, _ in samples], dtype=np.int64))
            kept = [sample for sample, removed in zip(samples, gone, strict=True) if not removed]
            found += kept[:: max(1, len(kept) * len(numbers) // limit)]
        return found

    def spread_ids(self, limit: int) -> NDArray[np.int64]:
        """Up to ``limit`` ids, evenly spaced among those that have a row."""
        lengths = np.cumsum(self.id_runs[:, 1] - self.id_runs[:, 0])
        if not len(lengths):
            return np.empty(0, dtype=np.int64)
        places = np.unique(np.linspace(0, lengths[-1] - 1, min(limit, int(lengths[-1]))).astype(np.int64))
        mine = np.searchsorted(lengths, places, side="right")
        ids: NDArray[np.int64] = self.id_runs[mine, 1] - (lengths[mine] - places)
        return ids

    def damaged(self) -> Iterator[tuple[int, str]]:
        """Read every shard: numbers of the damaged ones, and a sentence that names the file and the ids in it."""
        return damaged(self.folder, self._entries, self.manifest)

    def verify(self) -> list[str]:
        """Read every file and compare every block with its checksum.

        Returns:
            One sentence for each problem; empty if the store is undamaged.

        Raises:
            StoreError: the manifest is damaged.
            StoreChangedError: the store changed in the meantime; verify it again.
        """
        return problems_of(GradientStore(self.folder))

    def without(self, numbers: Collection[int]) -> GradientStore:
        """The same store without some of its shards, which are damaged."""
        rest = copy.copy(self)
        rest._serve([entry for number, entry in enumerate(self._entries) if number not in numbers])
        return rest

    def check_ids(self, ids: NDArray[np.int64]) -> None:
        """Refuse ids that no row has."""
        known = runs.contain(self.id_runs, ids)
        if not known.all():
            wrong = int(ids[~known][0])
            if runs.contain(self._removed, np.array([wrong]))[0]:
                raise ArgumentError(f"Training example {wrong} was removed from {self.folder}.")
            raise ArgumentError(
                f"There is no training id {wrong}; ids go from {self._entries[0].first} to {self._entries[-1].last}."
            )

    def bytes_of(self, *beginnings: str) -> int:
        """What :meth:`verified` goes through, in bytes."""
        return bytes_of(self._shards, len(self._entries), beginnings)

    def verified(self, *beginnings: str) -> Iterator[int]:
        """Verify the arrays whose names begin so, as queries would on their way; see :mod:`.touching`.

        Yields:
            How many bytes are through, after each piece of some MiB.

        Raises:
            StoreError: a block is damaged.
        """
        return verified(self._shards, len(self._entries), beginnings)

    def _live(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The ids of a shard that are not removed, and where they are."""
        ids = self._shards[number].ids
        kept = ~runs.contain(self._removed, ids)
        return ids[kept], kept

    def _gathered(self, name: str, ids: NDArray[np.int64], shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
        ids = self._checked(ids)
        return self._gatherer.gather([name], ids)[0] if len(ids) else np.empty((0, *shape), dtype=kind)

    def _checked(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        ids = runs.as_ids(ids)
        if ids.ndim != 1:
            raise ArgumentError(f"ids have shape {ids.shape}, but must be a list of ids.")
        self.check_ids(ids)
        return ids

    def _values(self, name: str, ids: NDArray[np.int64] | None, shape: tuple[int, ...]) -> NDArray[Any]:
        if ids is not None:
            kind = np.float64 if shape else self.manifest.columns[name.removeprefix("columns/")]
            return self._gathered(name, ids, shape, kind)
        parts = []
        for number in range(len(self._entries)):
            parts.append(self._shards[number].take(name, np.flatnonzero(self._live(number)[1])))
        return np.concatenate(parts)
