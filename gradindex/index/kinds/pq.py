"""All rows are compared by short codes."""

from __future__ import annotations

from typing import Any

from ...errors import ArgumentError
from ..library import load_faiss
from .base import DIMS, INDEXES, IndexMethod, Rows

_NUMBERS_A_CODE, _CODE_BITS = 2, 4
# Tried unasked up to so many rows, for all are compared, and from so many numbers on.
_MOST_ROWS, _LEAST_DIM = 500_000, 256


@INDEXES.register("pq")
class Pq(IndexMethod):
    """All rows are compared, four bits for two numbers (product quantisation after a random rotation).

    By table look-ups, of which a processor does 32 or 64 at once. Rows stream once.

    Raises:
        ArgumentError: ``dim`` is odd.
    """

    turned = True

    def __init__(self, dim: int, lists: int = 0, copies: int = 1) -> None:
        if dim % _NUMBERS_A_CODE:
            raise ArgumentError(f"dim is {dim}, but must be even for pq.")
        super().__init__(dim, lists, copies)

    def make(self, rows: Rows) -> Any:
        """See :class:`IndexMethod`."""
        faiss = load_faiss()
        inner = faiss.IndexPQFastScan(self.dim, self.dim // _NUMBERS_A_CODE, _CODE_BITS, faiss.METRIC_INNER_PRODUCT)
        inner.pq.cp.seed = rows.seed + 1
        inner.pq.cp.min_points_per_centroid = 1  # FAISS warns of few, a line for each two numbers
        codes = faiss.IndexIDMap2(inner)
        codes.train(rows.sample)
        for ids, block in rows.blocks():
            codes.add_with_ids(block, ids)
        return codes

    def options(self, index: Any, n_query: int, probes: int, selector: Any) -> None:
        """None: FAISS's search by table look-ups takes none."""

    @property
    def code_bytes(self) -> int:
        """See :class:`IndexMethod`."""
        return self.dim * _CODE_BITS // (8 * _NUMBERS_A_CODE)

    @classmethod
    def tried_unasked(cls, n_rows: int, dim: int | None) -> bool:
        """See :class:`IndexMethod`."""
        return dim is None and n_rows <= _MOST_ROWS

    @classmethod
    def dims(cls, row_dim: int, asked: bool) -> list[int]:
        """See :class:`IndexMethod`; few numbers of so few bits are tried only where the kind is asked for."""
        if not asked:
            return [dim for dim in DIMS if _LEAST_DIM <= dim < row_dim]
        even = row_dim // _NUMBERS_A_CODE * _NUMBERS_A_CODE
        return [dim for dim in DIMS if dim < row_dim] or [max(1, even)]
