"""Answers: which training examples, with which scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGN = "positive score = training on this example lowered the loss on the query (proponent); negative = raised it (opponent)"


@dataclass(frozen=True)
class Hits:
    """Top-k training examples of each query; prints as a table.

    Args:
        ids: (n_query, k) int64.
        scores: (n_query, k), signed; positive = proponent.
        kind: ``"proponents"`` or ``"opponents"``.
        scored: ``"exact"`` TracInCP, or ``"projected"``, its unbiased estimate.
        queries: what to call each query.
        columns: by name (n_query, k), of the training examples.
    """

    ids: NDArray[np.int64]
    scores: NDArray[Any]
    kind: str
    scored: str
    queries: tuple[str, ...]
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """One mapping for each hit."""
        return [
            {
                "query": query,
                "kind": self.kind,
                "rank": rank + 1,
                "id": int(self.ids[row, rank]),
                "score": float(self.scores[row, rank]),
                **{name: values[row, rank].item() for name, values in self.columns.items()},
            }
            for row, query in enumerate(self.queries)
            for rank in range(self.ids.shape[1])
        ]

    def __str__(self) -> str:
        return f"{table(self.records())}\n{self.scored} TracInCP scores; {SIGN}"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def table(records: list[dict[str, Any]]) -> str:
    """Records of the same keys as an aligned text table."""
    if not records:
        return "(nothing)"
    cells = [list(records[0])] + [[f"{v:.5g}" if isinstance(v, float) else str(v) for v in r.values()] for r in records]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
