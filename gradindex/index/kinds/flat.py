"""All rows are compared, a byte a number."""

from __future__ import annotations

from typing import Any

from ..library import load_faiss
from .base import INDEXES, LISTS_FROM, IndexMethod, Rows
from .reach import Reach


@INDEXES.register("flat")
class Flat(IndexMethod):
    """All rows are compared, a byte a number; rows stream twice."""

    passes = 2

    def make(self, rows: Rows) -> Any:
        """See :class:`IndexMethod`."""
        faiss = load_faiss()
        codes = faiss.IndexIDMap2(faiss.index_factory(self.dim, "SQ8", faiss.METRIC_INNER_PRODUCT))
        reach = Reach(rows.sample)
        for _, block in rows.blocks():
            reach.add(block)
        codes.train(reach.ends)
        for ids, block in rows.blocks():
            codes.add_with_ids(reach.within(block), ids)
        return codes

    @classmethod
    def tried_unasked(cls, n_rows: int, dim: int | None) -> bool:
        """See :class:`IndexMethod`."""
        return n_rows < LISTS_FROM
