"""Which tokens of a query and of a training example a score comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..gradients import Engine, TokenProducts
from ..output import data_frame, printable, table
from ..progress import progress
from ..report import Section, TokenText, token_texts_html, write_page
from ..store import GradientStore
from .asking import Queries
from .hits import SIGN
from .scoring import at_once, measured

# Pairs of a query and a training example that a notebook shows.
_NOTEBOOK_PAIRS = 6

Split = list[NDArray[np.float64]]


@dataclass(frozen=True)
class TokenExplanation:
    """Exact scores of training examples by token; prints as tables, and shows coloured text in a notebook.

    Two splits of the same score: by the tokens of the query, whose losses it is about, and by those of the training
    example, whose losses were trained on. Each adds up to the score. A token's share is that of its own loss, so it
    stands at the token that is predicted and not at those that it is predicted from.

    Args:
        by_query: for each query (n_ids, p) float64, with its p tokens; p = 0 where its loss is no sum over tokens.
        by_train: for each training example (n_query, p) float64, likewise.
        query_tokens: for each query, what to call its tokens.
        train_tokens: for each training example likewise.
        queries: what to call each query.
        ids: (n_ids,) int64, the training examples.
        measure: what the scores are.
    """

    by_query: Split
    by_train: Split
    query_tokens: tuple[tuple[str, ...], ...]
    train_tokens: tuple[tuple[str, ...], ...]
    queries: tuple[str, ...]
    ids: NDArray[np.int64]
    measure: str = "TracInCP scores"

    @property
    def scores(self) -> NDArray[np.float64]:
        """(n_query, n_ids) the scores that the shares add up to."""
        if self.query_tokens[0]:
            return np.stack([shares.sum(1) for shares in self.by_query])
        return np.stack([shares.sum(1) for shares in self.by_train], 1)

    @property
    def note(self) -> str:
        """One line: what the numbers are and what their sign means."""
        return f"exact {self.measure} by token, which add up on each side; {SIGN}"

    def records(self) -> list[dict[str, Any]]:
        """One mapping for each number: query, id, side (``"query"`` or ``"train"``), position, token and score."""
        return [
            {"query": self.queries[q], "id": int(self.ids[n]), "side": side, "position": position, "token": token,
             "score": float(score)}
            for q, n in self._pairs()
            for side, tokens, shares in self._sides(q, n)
            for position, (token, score) in enumerate(zip(tokens, shares, strict=True))
        ]  # fmt: skip

    def to_pandas(self) -> Any:
        """A DataFrame of :meth:`records`.

        Raises:
            DependencyError: pandas is missing.
        """
        records, names = self.records(), ("query", "id", "side", "position", "token", "score")
        return data_frame({name: [record[name] for record in records] for name in names})

    def __repr__(self) -> str:
        n_query, n_ids = self.scores.shape
        return f"<TokenExplanation: {n_query} x {n_ids} exact {self.measure} by token; print it for tables>"

    def __str__(self) -> str:
        return "\n\n".join([*(self._tables(q, n) for q, n in self._pairs()), self.note])

    def _tables(self, query: int, which: int) -> str:
        parts = [self._title(query, which, ".5g")]
        for side, tokens, shares in self._sides(query, which):
            rows = zip(range(len(tokens)), tokens, shares.tolist(), strict=True)
            parts.append(table([{"position": p, f"{side} token": token, "score": s} for p, token, s in rows]))
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        pairs = self._pairs()
        texts = [text for q, n in pairs[:_NOTEBOOK_PAIRS] for text in self._texts(q, n)]
        rest = f" The first {_NOTEBOOK_PAIRS} of {len(pairs)}." if len(pairs) > _NOTEBOOK_PAIRS else ""
        return token_texts_html(texts, self.note + rest)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained page with the texts of each pair, their tokens coloured by share.

        Args:
            path: the file.

        Raises:
            DependencyError: the extra ``demo`` is not installed.
            StoreError: the file cannot be written.
        """
        sections = [Section(self._title(q, n, "+.4g"), texts=self._texts(q, n)) for q, n in self._pairs()]
        write_page(Path(path), "Which tokens influence comes from", self.note, sections)

    def _texts(self, query: int, which: int) -> list[TokenText]:
        names = {"query": self.queries[query], "train": f"training example {self.ids[which]}"}
        return [
            TokenText(f"{self._title(query, which, '+.4g')}, by token of {printable(names[side])}", tokens, shares)
            for side, tokens, shares in self._sides(query, which)
        ]

    def _pairs(self) -> list[tuple[int, int]]:
        return [(q, n) for q in range(len(self.queries)) for n in range(len(self.ids))]

    def _sides(self, query: int, which: int) -> Iterator[tuple[str, tuple[str, ...], NDArray[np.float64]]]:
        """What is split, its tokens and their shares."""
        if self.query_tokens[query]:
            yield "query", self.query_tokens[query], self.by_query[query][which]
        if self.train_tokens[which]:
            yield "train", self.train_tokens[which], self.by_train[which][query]

    def _title(self, query: int, which: int, form: str) -> str:
        return f"{printable(self.queries[query])}, id {self.ids[which]}: score {self.scores[query, which]:{form}}"


def token_shares(
    store: GradientStore, queries: Queries, ids: NDArray[np.int64], engine: Engine
) -> tuple[Split, Split, list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Exact products by token, and the tokens' names, through the model.

    Each pair takes a pass for each side and checkpoint. Gradients of training examples are computed once for as many
    queries as fit into memory.

    Args:
        store: a complete one.
        queries: the questions, each of one query.
        ids: training ids that have a row.
        engine: entered, its routes checked.

    Returns:
        For each query (n_ids, p), for each id (n_query, p), and the names of the p tokens of both.

    Raises:
        ArgumentError: a question is a group of queries.
        TaskError: no loss is a sum over tokens.
        NonFiniteGradientError: names the example.
    """
    if queries.weights is not None:
        raise ArgumentError("A group of queries has no tokens of its own. Drop aggregate, and ask about each query.")
    products = TokenProducts(engine)
    asked = [queries.examples.read(q, q + 1) for q in range(len(queries))]
    trained = [engine.task.read([i]) for i in ids]
    names = [[products.token_names(example) for example in examples] for examples in (asked, trained)]
    by_query = [np.zeros((len(ids), len(tokens))) for tokens in names[0]]
    by_train = [np.zeros((len(asked), len(tokens))) for tokens in names[1]]
    size = max(1, at_once(engine) // 2)  # of each query its gradient and a direction
    with progress("scores by token", len(asked) * len(ids) * engine.n_checkpoints, "pairs") as advance:
        for start in range(0, len(asked), size):
            for checkpoint in range(engine.n_checkpoints):
                sides = [products.side(checkpoint, query) for query in asked[start : start + size]]
                for n, example in enumerate(trained):
                    other = products.side(checkpoint, example)
                    for q, side in enumerate(sides, start):
                        if names[0][q]:
                            by_query[q][n] += products.split(checkpoint, side, other).cpu().numpy()
                        if names[1][n]:
                            by_train[n][q] += products.split(checkpoint, other, side).cpu().numpy()
                        advance(1)
    return by_query, by_train, names[0], names[1]


def explain_tokens(
    store: GradientStore, queries: Queries, ids: NDArray[np.int64], engine: Engine, geometry: Any
) -> TokenExplanation:
    """The same as a store measures, such as parts of cosines where its rows have unit norm; arguments as above.

    Args:
        store: a complete one.
        queries: the questions.
        ids: training ids.
        engine: entered.
        geometry: of the store.
    """
    by_query, by_train, asked, trained = token_shares(store, queries, ids, engine)
    return TokenExplanation(
        [
            measured(store, geometry, shares[None], queries.norms[q : q + 1], ids)[0]
            for q, shares in enumerate(by_query)
        ],
        [
            measured(store, geometry, shares[:, None], queries.norms, ids[n : n + 1])[:, 0]
            for n, shares in enumerate(by_train)
        ],
        tuple(asked),
        tuple(trained),
        queries.names,
        ids,
        geometry.measure,
    )
