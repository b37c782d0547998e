"""Lists of rows that lie near a direction or its opposite, each row in several of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArgumentError
from ..library import load_faiss
from .base import DIMS, ID_BYTES, INDEXES, LISTS_FROM, IndexMethod, Rows, norms_of
from .lists import most

# Numbers that share a code: few, or more where many copies of a row would take much room, and are worth more.
_NUMBERS_A_CODE, _OF_MANY_COPIES, _MANY_COPIES, _CODE_BITS = 4, 8, 5, 4
_ITERATIONS, _ROWS_PER_DIRECTION = 8, 24
# While learning: of a sampled row's number, twice a float32; of each copy, its list and its part.
_CLUSTERED_BYTES, _ASSIGNED_BYTES = 8, 16
# Directions: so many times the square root of the number of rows, each with two lists; above the middle number twice as
# many, for a list of a million rows takes less time than looking for it among as many.
_DIRECTIONS, _MIDDLE = 4, 2500
# Many long directions are compared by two bits a number, and so many times the lists that are wanted in full.
_CODED_FROM, _COMPARED = 1 << 20, 8
# Fewer numbers are tried only where the kind is asked for: rows of few directions are found in one list each.
_LEAST_DIM = 256
_PRODUCTS = 1 << 21  # of rows and directions, at once: in a processor's cache


@INDEXES.register("spill")
class Spill(IndexMethod):
    """The rows of the most promising lists are compared, a bit a number or less; a row stands in ``copies`` lists.

    Directions are learnt (k-means of lines through the origin), and each has two lists, one for each sign. A row goes
    to the direction that explains most of it, then to the one that explains most of what is left, and so on (matching
    pursuit). So a row with a few large parts, as the gradient of a classifier's last layer is, is found by a query that
    shares any of them, whichever sign it has there: an opponent shares one with the query that is not its own largest.
    Copies of a row have the same code: 4 bits for every four numbers, or from five copies on for every eight. Rows
    stream once, and a part of them before.

    Source: lists that a row's residual chooses are Sun et al. 2023 (arXiv:2404.00774), SOAR, for nearest neighbours;
    matching pursuit is Mallat and Zhang 1993.

    Raises:
        ArgumentError: ``dim`` is not a multiple of 8, or there are fewer directions than copies.
    """

    passes = 2
    turned = True
    copies_tried = (4, 6, 3)

    def __init__(self, dim: int, lists: int = 0, copies: int = 1) -> None:
        if dim % (2 * _NUMBERS_A_CODE):
            raise ArgumentError(f"dim is {dim}, but must be a multiple of {2 * _NUMBERS_A_CODE} for spill.")
        super().__init__(dim, lists, copies)

    def make(self, rows: Rows) -> Any:
        """See :class:`IndexMethod`."""
        faiss = load_faiss()
        lines = learnt(rows, self.lists // 2)
        if not 1 <= self.copies <= len(lines):
            raise ArgumentError(f"copies is {self.copies}, but must be from 1 to the directions, {len(lines)}.")
        quantizer = _quantizer(2 * len(lines), self.dim)
        codes = faiss.IndexIVFPQ(
            quantizer, self.dim, 2 * len(lines), self.dim // self._together, _CODE_BITS, faiss.METRIC_INNER_PRODUCT
        )
        codes.by_residual = False
        codes.pq.cp.seed, codes.pq.cp.min_points_per_centroid = rows.seed + 1, 1
        codes.pq.train(rows.sample)
        codes.is_trained = True
        found, shared = [], lines @ lines.T
        for ids, block in rows.blocks():
            lists, parts = assigned(block, lines, self.copies, shared)
            _add(codes, ids, codes.pq.compute_codes(block), lists)
            found.append((lists, parts))
        lists, parts = (np.concatenate(side) for side in zip(*found, strict=True))
        del found, shared
        # What lists are probed by is known once all rows are in theirs.
        centroids = np.concatenate([lines, -lines]) * most(lists.ravel(), parts.ravel(), 2 * len(lines))[:, None]
        quantizer.train(centroids)
        quantizer.add(centroids)
        return faiss.IndexIVFPQFastScan(codes)

    def options(self, index: Any, n_query: int, probes: int, selector: Any) -> Any:
        """See :class:`IndexMethod`."""
        return load_faiss().SearchParametersIVF(nprobe=probes, sel=selector)

    def for_gpu(self, codes: Any) -> None:
        """None: GPUs do not know these codes."""

    @property
    def code_bytes(self) -> int:
        """See :class:`IndexMethod`."""
        of_code = -(-self.dim * _CODE_BITS // (8 * self._together))
        return self.copies * (of_code + ID_BYTES) - ID_BYTES

    @property
    def _together(self) -> int:
        return _NUMBERS_A_CODE if self.copies < _MANY_COPIES else _OF_MANY_COPIES

    def bytes_for(self, n_rows: int) -> int:
        """See :class:`IndexMethod`: codes twice, for FAISS lays them out anew."""
        learning = _CLUSTERED_BYTES * _ROWS_PER_DIRECTION * self.lists // 2 * self.dim
        assigned = self.copies * _ASSIGNED_BYTES * n_rows
        return super().bytes_for(n_rows) + learning + assigned

    @property
    def details(self) -> str:
        """See :class:`IndexMethod`."""
        return f", {self.lists} lists, {self.copies} copies of a row"

    @classmethod
    def tried_unasked(cls, n_rows: int, dim: int | None) -> bool:
        """See :class:`IndexMethod`."""
        return n_rows >= LISTS_FROM and (dim is None or dim % (2 * _NUMBERS_A_CODE) == 0)

    @classmethod
    def dims(cls, row_dim: int, asked: bool) -> list[int]:
        """See :class:`IndexMethod`; as many as there are as well, for their codes are small."""
        step = 2 * _NUMBERS_A_CODE
        every = max(step, row_dim // step * step)
        least = 1 if asked else _LEAST_DIM
        found = sorted({dim for dim in (*DIMS, every) if least <= dim <= min(every, DIMS[-1])})
        return found or ([every] if asked else [])

    @classmethod
    def lists_for(cls, n_rows: int) -> int:
        """See :class:`IndexMethod`."""
        root = math.sqrt(n_rows)
        wanted = max(min(_DIRECTIONS * root, _MIDDLE), _DIRECTIONS / 2 * root)
        return 2 * max(1, min(n_rows, round(wanted)))


def _add(codes: Any, ids: NDArray[np.int64], block: NDArray[np.uint8], lists: NDArray[np.int32]) -> None:
    """Put coded rows into several lists each; FAISS takes the list's number, little-endian, before a code."""
    width = codes.coarse_code_size()
    for of_copy in lists.T:
        numbers = of_copy.astype("<i8")[:, None].view(np.uint8)[:, :width]
        codes.add_sa_codes(np.concatenate([numbers, block], 1), ids)


def _quantizer(count: int, dim: int) -> Any:
    """Finds the centroids with the largest inner products; of many long ones by codes first, a fifth of the time."""
    faiss = load_faiss()
    if count * dim < _CODED_FROM or dim % 4:
        return faiss.IndexFlatIP(dim)
    codes = faiss.IndexPQFastScan(dim, dim // 2, _CODE_BITS, faiss.METRIC_INNER_PRODUCT)
    codes.pq.cp.min_points_per_centroid = 1
    quantizer = faiss.IndexRefineFlat(codes)
    quantizer.k_factor = _COMPARED
    return quantizer


def learnt(rows: Rows, count: int) -> NDArray[np.float32]:
    """(count, dim) unit directions such that most rows lie near the line through one of them, by k-means of lines."""
    sample = rows.every_nth(_ROWS_PER_DIRECTION * count)
    sample = sample[np.linalg.norm(sample, axis=1) > 0]
    if not 1 <= count <= len(sample):
        raise ArgumentError(
            f"lists is {2 * count}, but must be from 2 to twice the number of rows that are not zero, {len(sample)}."
        )
    sample /= norms_of(sample)
    generator = np.random.default_rng(rows.seed)
    lines: NDArray[np.float32] = sample[generator.choice(len(sample), count, replace=False)].copy()
    for _ in range(_ITERATIONS):
        sums = np.zeros_like(lines)
        for some in _pieces(sample, count):
            products = some @ lines.T
            nearest = np.abs(products).argmax(1)
            signed = some * np.sign(products[np.arange(len(some)), nearest])[:, None]
            order = np.argsort(nearest, kind="stable")
            used, starts = np.unique(nearest[order], return_index=True)
            sums[used] += np.add.reduceat(signed[order], starts)
        lone = np.flatnonzero(~sums.any(1))
        sums[lone] = sample[generator.choice(len(sample), len(lone), replace=False)]
        lines = sums / norms_of(sums)
    return lines


def assigned(
    rows: NDArray[np.float32], lines: NDArray[np.float32], copies: int, shared: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Which lists rows stand in, and their parts along the lists' directions: (m, copies) each.

    List j is direction j, list j + count its opposite.

    Args:
        rows: (m, dim).
        lines: (count, dim) the directions.
        copies: lists of a row.
        shared: (count, count) inner products of the directions.
    """
    lists, parts = np.empty((len(rows), copies), np.int32), np.empty((len(rows), copies), np.float32)
    start = 0
    for some in _pieces(rows, len(lines)):
        products, every, here = some @ lines.T, np.arange(len(some)), slice(start, start + len(some))
        sizes = np.empty_like(products)
        for copy in range(copies):
            np.abs(products, out=sizes)
            sizes[every[:, None], lists[here, :copy] % len(lines)] = -1  # a part of zero must not be taken again
            chosen = sizes.argmax(1)
            part = products[every, chosen]
            lists[here, copy], parts[here, copy] = np.where(part < 0, chosen + len(lines), chosen), np.abs(part)
            if copy + 1 < copies:
                products -= part[:, None] * shared[chosen]  # with what is left of the rows
        start += len(some)
    return lists, parts


def _pieces(rows: NDArray[np.float32], count: int) -> Iterator[NDArray[np.float32]]:
    """Some rows after others, whose products with so many directions fit the memory."""
    step = max(1, _PRODUCTS // count)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
