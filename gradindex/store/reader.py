"""An open store: rows and what stands beside them, by id or block by block, never all in memory."""

from __future__ import annotations

import copy
import heapq
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, StoreError, check_k
from ..progress import progress
from . import runs
from .bases import Bases, read_bases
from .job import progress_of
from .manifest import FIXED, MANIFEST, PENDING, read_manifest
from .shards import FACTOR_SIDES, OpenShards, factor_name, opened, problem_of, read_seal

# What `blocks` hands out at once.
_PIECE_BYTES = 16 << 20


class GradientStore:
    """A complete store, open for reading. Opening reads the manifest alone.

    Rows belong to *ids*, int64 keys (by default the positions in the training set) that never change and are
    never used again. Every block of a file is compared with its checksum before it is first handed out. One
    store can be read from many threads.

    Args:
        folder: what ``gradindex build`` wrote.

    Raises:
        StoreError: no store, not complete, damaged, or of another version.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.reload()

    def reload(self) -> None:
        """Read the manifest again, after the store has changed."""
        if not (self.folder / MANIFEST).exists() and (self.folder / PENDING).exists():
            done, shards = progress_of(self.folder)
            raise StoreError(
                f"{self.folder} is a build that has not finished ({done} of {shards} shards). "
                "Run the same `gradindex build` again to go on, or `gradindex seal` once every part is done."
            )
        self.manifest = read_manifest(self.folder)
        self.dim: int = self.manifest["dim"]
        self.n_checkpoints: int = len(self.manifest["map"]["checkpoints"])
        self._removed: list[list[int]] = self.manifest["removed"]
        self._serve(self.manifest["shards"])

    def _serve(self, entries: list[dict[str, Any]]) -> None:
        self._entries = entries
        self._runs: dict[int, runs.Runs] = {}
        self._firsts = np.array([entry["first"] for entry in entries], dtype=np.int64)
        self._shards = OpenShards(self.folder, entries, self.manifest["generation"])

    @staticmethod
    def complete(folder: str | os.PathLike[str]) -> bool:
        """Whether a complete store is here."""
        return (Path(folder) / MANIFEST).exists()

    @property
    def n_train(self) -> int:
        """The number of training examples that have a row, removed ones not counted."""
        rows: int = sum(entry["rows"] for entry in self._entries) - runs.count(self._removed)
        return rows

    @property
    def ids(self) -> NDArray[np.int64]:
        """(n_train,) the ids that have a row, ascending."""
        return runs.to_ids(self.id_runs)

    @property
    def id_runs(self) -> list[list[int]]:
        """The ids that have a row, as ``[[start, stop], ...]``."""
        found: list[list[int]] = []
        for number in range(len(self._entries)):
            for start, stop in runs.without(self.shard_runs(number), self._removed):
                if found and found[-1][1] == start:
                    found[-1][1] = stop
                else:
                    found.append([start, stop])
        return found

    def shard_runs(self, number: int) -> runs.Runs:
        """The ids of a shard, removed ones as well."""
        entry = self._entries[number]
        if entry["rows"] == entry["last"] - entry["first"] + 1:
            return [[entry["first"], entry["last"] + 1]]
        if number not in self._runs:
            self._runs[number] = opened(self.folder, entry, read_seal)["ids"]
        return self._runs[number]

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.manifest["columns"])

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Ids (m,) and rows (m, dim) float32 in the order of ids, in pieces of about 16 MiB."""
        step = max(1, _PIECE_BYTES // (4 * self.dim))
        for number, entry in enumerate(self._entries):
            for start in range(0, entry["rows"], step):
                shard, stop = self._shards[number], min(start + step, entry["rows"])
                ids, rows = shard.ids[start:stop], shard.rows(start, stop)
                kept = ~runs.contain(self._removed, ids)
                yield (ids, rows) if kept.all() else (ids[kept], rows[kept])

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(ids), dim) float32 rows in the order of ``ids``.

        Raises:
            ArgumentError: an id has no row.
            StoreError: a block that was touched is damaged.
        """
        return self._gather("rows", ids, (self.dim,), np.float32)

    def mapped(self, number: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` of a shard as they are stored: a read-only view of its file.

        Every block that the view touches is verified first. Removed rows are in it; of bfloat16 it has the bits,
        of int8 the codes.

        Args:
            number: of the shard, as in ``manifest["shards"]``.
            start: first position in the shard.
            stop: the position after the last, by default all.

        Raises:
            StoreError: a block is damaged.
        """
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
        """The values of a column: of all ids (n_train,), or of ``ids`` in their shape and order."""
        if name not in self.columns:
            raise ArgumentError(f"The store has no column {name!r}. It has: {', '.join(self.columns) or 'none'}.")
        if ids is None:
            return self._values(f"columns/{name}", None, ())
        return self._values(f"columns/{name}", ids.ravel(), ()).reshape(ids.shape)

    def factors(self, ids: NDArray[np.int64]) -> dict[tuple[int, int], tuple[NDArray[Any], NDArray[Any]]]:
        """Exact factors: by (checkpoint, layer) activations x (n, columns) and output gradients delta (n, rows).

        The layer's gradient times sqrt(eta) is delta x^T, so <G, G'> = (delta . delta')(x . x').

        Raises:
            ArgumentError: the store has none, or an id has no row.
        """
        if self.manifest["factors"] is None:
            raise ArgumentError(f"{self.folder} has no factors. Build a store with factors='float32'.")
        found = {}
        for checkpoint in range(self.n_checkpoints):
            for layer, described in enumerate(self.manifest["map"]["layers"]):
                sides = [
                    self._gather(factor_name(checkpoint, layer, side), ids, (size,), self.manifest["factors"])
                    for side, size in zip(FACTOR_SIDES, described["shape"][::-1], strict=True)
                ]
                found[checkpoint, layer] = (sides[0], sides[1])
        return found

    def top_self_influence(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The k ids with the highest self-influence and its sums over checkpoints, highest first; shards stream.

        Raises:
            ArgumentError: ``k`` is out of range.
        """
        check_k(k, self.n_train)
        best: list[tuple[float, int]] = []
        for number in range(len(self._entries)):
            ids, kept = self._live(number)
            sums = np.asarray(self._shards[number].arrays.view("self_influence")).sum(1)[kept]
            chosen = np.lexsort((ids, -sums))[:k]
            pairs = zip(sums[chosen].tolist(), (-ids[chosen]).tolist(), strict=True)
            best = heapq.nlargest(k, [*best, *pairs])
        return np.array([-i for _, i in best], dtype=np.int64), np.array([score for score, _ in best])

    def bases(self) -> Bases | None:
        """What a fitted projection was fitted to; ``None`` for other projections.

        Raises:
            StoreError: missing or damaged.
        """
        digest = self.manifest["map"]["bases"]
        return None if digest is None else read_bases(self.folder, digest)

    def samples(self, limit: int = 64) -> list[tuple[int, str]]:
        """Ids and digests of up to ``limit`` training examples, to tell whether data are still the same."""
        numbers = np.unique(np.linspace(0, len(self._entries) - 1, min(limit, len(self._entries))).astype(int))
        found = []
        for number in numbers:
            samples = [(i, hexadecimal) for i, hexadecimal in self._shards[int(number)].seal["samples"]]
            kept = [not gone for gone in runs.contain(self._removed, np.array([i for i, _ in samples], dtype=np.int64))]
            some = [sample for sample, keep in zip(samples, kept, strict=True) if keep]
            found += some[:: max(1, len(some) * len(numbers) // limit)]
        return found

    def damaged(self) -> Iterator[tuple[int, str]]:
        """Read every shard: numbers of the damaged ones, and a sentence that names the file and the ids in it."""
        with progress("verifying", sum(entry["rows"] for entry in self._entries), "rows") as advance:
            for number, entry in enumerate(self._entries):
                problem = problem_of(self.folder, entry)
                if problem:
                    yield number, problem
                advance(entry["rows"])

    def verify(self) -> list[str]:
        """Read every file and compare every block with its checksum.

        Returns:
            One sentence for each problem; empty when the store is sound.

        Raises:
            StoreError: the manifest is damaged.
        """
        self.reload()
        problems = [problem for _, problem in self.damaged()]
        try:
            self.bases()
        except StoreError as error:
            problems.append(str(error))
        return problems

    def first_and_last(self) -> NDArray[np.int64]:
        """The first and the last id; empty without any."""
        if not self.id_runs:
            return np.empty(0, dtype=np.int64)
        live = self.id_runs
        return np.array([live[0][0], live[-1][1] - 1], dtype=np.int64)

    def kept(self) -> dict[str, Any]:
        """The part of the manifest that a change does not touch."""
        return {name: self.manifest[name] for name in (*FIXED, "next_id", "removed")}

    def live_plan(self) -> list[dict[str, Any]]:
        """A plan that makes every shard anew, without removed rows."""
        live = [runs.without(self.shard_runs(number), self._removed) for number in range(len(self._entries))]
        return [{"ids": ids, "sources": []} for ids in live if ids]

    def without(self, numbers: Collection[int]) -> GradientStore:
        """The same store without some of its shards, which are damaged."""
        rest = copy.copy(self)
        rest._serve([entry for number, entry in enumerate(self._entries) if number not in numbers])
        return rest

    def check_ids(self, ids: NDArray[np.int64]) -> None:
        """Refuse ids that no row has."""
        gone = runs.contain(self._removed, ids)
        known = ~gone
        owners = self._owners(ids)
        for number in np.unique(owners):
            mine = owners == number
            known[mine] &= (number >= 0) & runs.contain(self.shard_runs(int(number)), ids[mine])
        if not known.all():
            wrong = int(ids[~known][0])
            if runs.contain(self._removed, np.array([wrong]))[0]:
                raise ArgumentError(f"Training example {wrong} was removed from {self.folder}.")
            raise ArgumentError(
                f"There is no training id {wrong}; ids go from {self._firsts[0]} to {self._entries[-1]['last']}."
            )

    def _owners(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._firsts, ids, side="right") - 1

    def _live(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The ids of a shard that are not removed, and where they are."""
        ids = self._shards[number].ids
        kept = ~runs.contain(self._removed, ids)
        return ids[kept], kept

    def _gather(self, name: str, ids: NDArray[np.int64], shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
        self.check_ids(ids)
        owners = self._owners(ids)
        order = np.argsort(owners, kind="stable")
        parts = []
        for mine in np.split(order, np.flatnonzero(np.diff(owners[order])) + 1) if len(ids) else []:
            shard = self._shards[int(owners[mine[0]])]
            parts.append(shard.take(name, shard.positions(ids[mine])))
        if not parts:
            return np.empty((0, *shape), dtype=kind)
        joined = np.concatenate(parts)
        result = np.empty_like(joined)
        result[order] = joined
        return result

    def _values(self, name: str, ids: NDArray[np.int64] | None, shape: tuple[int, ...]) -> NDArray[Any]:
        if ids is not None:
            return self._gather(name, ids, shape, np.float64 if shape else self.manifest["columns"][name[8:]])
        parts = []
        for number in range(len(self._entries)):
            parts.append(self._shards[number].take(name, np.flatnonzero(self._live(number)[1])))
        return np.concatenate(parts)
