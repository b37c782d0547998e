"""Values by id, from the shards that hold them: one shard after the other, for not all can be open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .manifest import ShardEntry
from .shards import OpenShards, Shard


class Gatherer:
    """Gathers values of a store's shards.

    Args:
        shards: open.
        entries: of these shards.
    """

    def __init__(self, shards: OpenShards, entries: Sequence[ShardEntry]) -> None:
        self._shards = shards
        self._firsts = np.array([entry.first for entry in entries], dtype=np.int64)

    def by_shard(self, ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Shard, NDArray[np.int64]]]:
        """Where ids are in ``ids``, their shard, and their positions in it; one shard after the other."""
        owners = np.searchsorted(self._firsts, ids, side="right") - 1
        order = np.arange(len(ids)) if (owners[1:] >= owners[:-1]).all() else np.argsort(owners, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(owners[order])) + 1) if len(ids) else ():
            shard = self._shards[int(owners[places[0]])]
            yield places, shard, shard.positions(ids[places])

    def gather(self, names: Sequence[str], ids: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Values of some arrays by id, in the order of ``ids``, of which there is at least one."""
        places: list[NDArray[np.int64]] = []
        parts: list[list[NDArray[Any]]] = [[] for _ in names]
        for of_shard, shard, positions in self.by_shard(ids):
            places.append(of_shard)
            for name, part in zip(names, parts, strict=True):
                part.append(shard.take(name, positions))
        order, gathered = np.concatenate(places), [np.concatenate(part) for part in parts]
        return gathered if (order[1:] > order[:-1]).all() else [_at_places(values, order) for values in gathered]


def _at_places(values: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
    """``values``, each at its place."""
    result = np.empty_like(values)
    result[places] = values
    return result
