"""Searching on CUDA devices with faiss-gpu."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..progress import note
from .library import load_faiss

# FAISS's kernels select no more than this many rows, and look into no more lists.
MOST = 2048


def devices(device: str | None) -> tuple[int, ...]:
    """Numbers of the CUDA devices that ``"cuda"`` (all) or ``"cuda:1"`` names; none for the CPU.

    Where FAISS cannot use them, a line says so once, and there are none: the CPU searches.

    Raises:
        ArgumentError: there is no such device.
    """
    kind, _, number = (device or "cpu").partition(":")
    if kind != "cuda":
        return ()
    count = load_faiss().get_num_gpus()
    if not count:
        _say("FAISS sees no CUDA device, so rows are searched on the CPU. For the GPU: pip install 'gradindex[gpu]'.")
        return ()
    if number and not (number.isdecimal() and int(number) < count):
        raise ArgumentError(f"device is {device!r}, but FAISS sees {count} CUDA devices, from cuda:0 on.")
    return (int(number),) if number else tuple(range(count))


@cache
def _say(text: str) -> None:
    note(text)


@cache
def _resources(number: int) -> Any:
    """Streams and scratch memory of a device, which FAISS shares among the indexes there."""
    return load_faiss().StandardGpuResources()


_LOCK = threading.Lock()  # indexes on a device, and what they share, take one thread at a time


def knn(
    query: NDArray[np.float32], rows: NDArray[np.float32], k: int, gpus: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """As ``faiss.knn`` by inner product, on the first device where ``k`` is not too large for one."""
    faiss = load_faiss()
    if not gpus or k > MOST:
        best: tuple[NDArray[np.float32], NDArray[np.int64]] = faiss.knn(
            query, rows, k, metric=faiss.METRIC_INNER_PRODUCT
        )
        return best
    with _LOCK:
        scores, places = faiss.knn_gpu(
            _resources(gpus[0]), query, rows, k, metric=faiss.METRIC_INNER_PRODUCT, device=gpus[0]
        )
    return scores, places


class GpuCopy:
    """A compact index's codes on one or several devices, its rows shared out among them.

    Args:
        codes: FAISS's ``IndexIVFScalarQuantizer``; or rows, an ``IndexFlatIP``, which become float16 there.
        ids: of rows, by place; ``None`` for lists, which have their own.
        gpus: numbers of the devices.
    """

    def __init__(self, codes: Any, ids: NDArray[np.int64] | None, gpus: Sequence[int]) -> None:
        faiss = load_faiss()
        self._ids = ids
        options = faiss.GpuMultipleClonerOptions()
        options.shard, options.useFloat16 = len(gpus) > 1, self._ids is not None
        resources = [_resources(number) for number in gpus]
        self._index = faiss.index_cpu_to_gpu_multiple_py(resources, codes, options, list(gpus))

    def search(self, query: NDArray[np.float32], k: int, probes: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and ids (n_query, k) by inner product; -1 where fewer are found. ``k`` and ``probes`` up to 2,048."""
        faiss = load_faiss()
        with _LOCK:
            if self._ids is None:
                faiss.GpuParameterSpace().set_index_parameter(self._index, "nprobe", probes)
            scores, ids = self._index.search(query, k)
        if self._ids is not None:
            ids = np.where(ids >= 0, self._ids[ids], -1)
        return scores, ids


def train_centroids(rows: NDArray[np.float32], count: int, iterations: int, seed: int, gpus: Sequence[int]) -> Any:
    """(count, d) unit-normed centroids of directions, by spherical k-means."""
    faiss = load_faiss()
    means = faiss.Kmeans(
        rows.shape[1],
        count,
        niter=iterations,
        spherical=True,
        seed=seed,
        verbose=False,
        gpu=len(gpus) or False,
        min_points_per_centroid=1,
    )
    means.train(rows)
    return means.centroids.reshape(count, rows.shape[1])


def nearest(centroids: NDArray[np.float32], gpus: Sequence[int]) -> Any:
    """A flat index of centroids by inner product, on the first device where there is one."""
    faiss = load_faiss()
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    return faiss.index_cpu_to_gpu(_resources(gpus[0]), gpus[0], index) if gpus else index
