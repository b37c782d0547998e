"""Why a training example is a proponent: its score by checkpoint and by layer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DependencyError
from ..output import data_frame, printable, table
from ..report import Section, heat_map, write_page
from .hits import SIGN

# Pairs of a query and a training example that a notebook shows.
_NOTEBOOK_PAIRS = 6


@dataclass(frozen=True)
class Explanation:
    """Exact scores of training examples by checkpoint and layer; prints as tables.

    Args:
        scores: (n_query, n_ids, C, L) float64, signed; the sum over C and L is the exact score.
        queries: what to call each query.
        ids: (n_ids,) int64, the training examples.
        checkpoints: what to call each of the C checkpoints.
        layers: what to call each of the L layers.
        scored: ``"exact"``, or what the factors are where they are not.
        measure: what the scores are.
    """

    scores: NDArray[np.float64]
    queries: tuple[str, ...]
    ids: NDArray[np.int64]
    checkpoints: tuple[str, ...]
    layers: tuple[str, ...]
    scored: str = "exact"
    measure: str = "TracInCP scores"

    @property
    def note(self) -> str:
        """One line: what the numbers are and what their sign means."""
        return f"{self.scored} {self.measure} by checkpoint and layer, which add up; {SIGN}"

    def records(self) -> list[dict[str, Any]]:
        """One mapping for each number: query, id, checkpoint, layer and score."""
        return [
            {"query": query, "id": int(i), "checkpoint": checkpoint, "layer": layer,
             "score": float(self.scores[q, n, c, number])}
            for q, query in enumerate(self.queries)
            for n, i in enumerate(self.ids)
            for c, checkpoint in enumerate(self.checkpoints)
            for number, layer in enumerate(self.layers)
        ]  # fmt: skip

    def to_pandas(self) -> Any:
        """A DataFrame of :meth:`records`.

        Raises:
            DependencyError: pandas is missing.
        """
        places = np.indices(self.scores.shape).reshape(4, -1)
        names = (np.array(self.queries), self.ids, np.array(self.checkpoints), np.array(self.layers))
        titles = ("query", "id", "checkpoint", "layer")
        columns = {title: values[place] for title, values, place in zip(titles, names, places, strict=True)}
        return data_frame(columns | {"score": self.scores.ravel()})

    def __repr__(self) -> str:
        n_query, n_ids, n_checkpoints, n_layers = self.scores.shape
        shape = f"{n_query} x {n_ids} scores by {n_checkpoints} checkpoints and {n_layers} layers"
        return f"<Explanation: {shape}, {self.scored} {self.measure}; print it for tables>"

    def __str__(self) -> str:
        blocks = [f"{self._title(q, n, '.5g')}\n{table(self._grid(q, n))}" for q, n in self._pairs()]
        return "\n\n".join([*blocks, self.note])

    def _repr_html_(self) -> str:
        pairs = self._pairs()
        try:
            shown = [
                f'<p>{escape(self._title(q, n, "+.4g"))}</p><img alt="scores by checkpoint and layer" '
                f'src="{heat_map(self.scores[q, n], self.checkpoints, self.layers)}">'
                for q, n in pairs[:_NOTEBOOK_PAIRS]
            ]
        except DependencyError as error:
            return f"<pre>{escape(str(self))}\n{escape(str(error))}</pre>"
        rest = [f"<p>The first {_NOTEBOOK_PAIRS} of {len(pairs)}.</p>"] if len(pairs) > _NOTEBOOK_PAIRS else []
        return "".join([*shown, *rest, f"<p>{escape(self.note)}</p>"])

    def _pairs(self) -> list[tuple[int, int]]:
        return [(q, n) for q in range(len(self.queries)) for n in range(len(self.ids))]

    def _title(self, query: int, which: int, form: str) -> str:
        score = self.scores[query, which].sum()
        return f"{printable(self.queries[query])}, id {self.ids[which]}: score {score:{form}}"

    def _grid(self, query: int, which: int) -> list[dict[str, Any]]:
        """Checkpoints down, layers across, with the sums of both."""
        scores = self.scores[query, which]
        rows = [*zip(self.checkpoints, scores, strict=True), ("all checkpoints", scores.sum(0))]
        return [
            {"at checkpoint": name}
            | dict(zip(self.layers, row.tolist(), strict=True))
            | {"all layers": float(row.sum())}
            for name, row in rows
        ]

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained page with a heat map for each query and training example.

        Args:
            path: the file.

        Raises:
            DependencyError: the extra ``demo`` is not installed.
            StoreError: the file cannot be written.
        """
        sections = [
            Section(
                self._title(q, n, "+.4g"),
                figure=heat_map(self.scores[q, n], self.checkpoints, self.layers),
                caption=f"Score of training example {self.ids[n]} for {self.queries[q]} by checkpoint (down) and "
                "layer (across): green lowered the loss, orange raised it.",
                table=self._grid(q, n),
            )
            for q, n in self._pairs()
        ]
        write_page(Path(path), "Where influence comes from", self.note, sections)
