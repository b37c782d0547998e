"""Lists of rows of about the same direction, probed with regard to their norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...errors import ArgumentError
from .. import gpu
from ..library import load_faiss
from .base import INDEXES, LISTS_FROM, IndexMethod, Rows, norms_of
from .lists import most
from .reach import Reach

_KMEANS_ITERATIONS, _ROWS_PER_LIST = 10, 39  # fewer, and FAISS warns
_LISTS = 4  # times the square root of the number of rows, about
# While clustering: of a sampled row's number, twice a float32; of each row, its list and its norm.
_CLUSTERED_BYTES, _ASSIGNED_BYTES = 8, 12


@INDEXES.register("ivf")
class Ivf(IndexMethod):
    """The rows of the most promising lists are compared, a byte a number; rows stream three times.

    A list holds rows of about the same direction, and is probed by <query, centroid> times the norm that most of its
    rows stay below.
    """

    passes = 3
    mapped = True

    def make(self, rows: Rows) -> Any:
        """See :class:`IndexMethod`."""
        faiss = load_faiss()
        clustered = rows.every_nth(_ROWS_PER_LIST * self.lists)
        if not 1 <= self.lists <= len(clustered):
            raise ArgumentError(f"lists is {self.lists}, but must be from 1 to the number of rows, {len(clustered)}.")
        clustered /= norms_of(clustered)
        centroids = gpu.train_centroids(clustered, self.lists, _KMEANS_ITERATIONS, rows.seed, rows.gpus)
        del clustered
        finder = gpu.nearest(centroids, rows.gpus)
        assigned, lengths, reach = [], [], Reach(rows.sample)
        for _, block in rows.blocks():
            reach.add(block)
            assigned.append(finder.search(block, 1)[1][:, 0])  # the norm of a row does not change its nearest direction
            lengths.append(np.linalg.norm(block, axis=1))
        lists = np.concatenate(assigned)
        quantizer = faiss.IndexFlatIP(self.dim)
        quantizer.add(centroids * most(lists, np.concatenate(lengths), self.lists)[:, None])
        codes = faiss.IndexIVFScalarQuantizer(
            quantizer, self.dim, self.lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, False
        )
        codes.train(reach.ends)
        start = 0
        for ids, block in rows.blocks():
            block_lists = np.ascontiguousarray(lists[start : start + len(ids)])
            block, ids = reach.within(block), np.ascontiguousarray(ids)
            codes.add_core(len(ids), faiss.swig_ptr(block), faiss.swig_ptr(ids), faiss.swig_ptr(block_lists))
            start += len(ids)
        return codes  # which keeps the quantizer alive

    def options(self, index: Any, n_query: int, probes: int, selector: Any) -> Any:
        """See :class:`IndexMethod`."""
        faiss = load_faiss()
        # Threads share out the queries, or the lists of a single one; a race for this changes no answer.
        faiss.extract_index_ivf(index).parallel_mode = int(n_query == 1)
        return faiss.SearchParametersIVF(nprobe=probes, sel=selector)

    def after_mapping(self, index: Any) -> None:
        """Start no threads that read ahead: that takes six times as long as searching what is in memory."""
        faiss = load_faiss()
        lists = faiss.extract_index_ivf(index).invlists
        faiss.downcast_InvertedLists(lists).prefetch_nthread = 0

    def for_gpu(self, codes: Any) -> tuple[Any, None]:
        """See :class:`IndexMethod`."""
        return codes, None

    def bytes_for(self, n_rows: int) -> int:
        """See :class:`IndexMethod`."""
        clustering = _CLUSTERED_BYTES * _ROWS_PER_LIST * self.lists * self.dim + _ASSIGNED_BYTES * n_rows
        return super().bytes_for(n_rows) + clustering

    @property
    def details(self) -> str:
        """See :class:`IndexMethod`."""
        return f", {self.lists} lists"

    @classmethod
    def tried_unasked(cls, n_rows: int, dim: int | None) -> bool:
        """See :class:`IndexMethod`."""
        return n_rows >= LISTS_FROM

    @classmethod
    def lists_for(cls, n_rows: int) -> int:
        """See :class:`IndexMethod`."""
        return 1 << round(math.log2(_LISTS * n_rows**0.5))
