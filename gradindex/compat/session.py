"""The engine over a user's batches: scores, self-influence and gradients as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, NonFiniteGradientError, TaskError, joined_names
from ..examples import Examples, Role
from ..factors import Gradients
from ..gradients import Engine, Products, check_routes, in_batches
from ..gradients.functional import as_real
from ..gradients.layers import as_matrix
from ..memory import LARGEST_BATCH
from ..projection.base import BlockMap
from ..task import Loss, Task
from ..tree import tensors
from .batches import Row, alike, examples_of, joined, merged, rows_of

T = TypeVar("T")

# Training examples that the routes are checked on, and the batches that are looked through for them.
_CHECKED_ON, _FIRST_BATCHES = 64, 8

NO_BATCH = "inputs holds no batch. Give (*inputs, labels), or a loader of such batches."


@dataclass(frozen=True, eq=False)
class Piece:
    """Gradients of some examples, times sqrt(eta).

    Args:
        checkpoints: at each, by layer.
        names: what errors call the examples.
    """

    checkpoints: list[dict[int, Gradients]]
    names: list[str]

    @property
    def n_bytes(self) -> int:
        """What they take in memory."""
        return sum(t.nbytes for layers in self.checkpoints for gradients in layers.values() for t in tensors(gradients))


class Session:
    """An engine with the checkpoints in memory; its routes are checked on the first batches.

    Args:
        model: not wrapped.
        checkpoints: see :func:`snapshots_of`.
        layers: patterns of what is tracked; ``None`` is every parameter with ``requires_grad``.
        loss: of a training example.
        query_loss: of a query, if it is another one.
        batches: the training batches, of which the first are read.

    Raises:
        GradIndexError: as for :func:`check_routes`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoints: Sequence[Any],
        layers: Sequence[str] | None,
        loss: Loss,
        query_loss: Loss | None,
        batches: Iterable[Any],
    ) -> None:
        task = Task(model, loss, _first_rows(batches), checkpoints, layers=layers, collate=joined, name="captum")
        doubles = any(parameter.dtype == torch.float64 for parameter in model.parameters())
        self.engine = Engine(task, "float64" if doubles else "float32")
        self._query_loss, self._asked = query_loss, False
        # The training data's gradients by batch, once they are there, where they may stay.
        self.kept: list[list[Piece]] | None = None
        # Whether rows were made, which hold as long as the layers take these routes.
        self.fixed = False
        with self.engine:
            check_routes(self.engine)

    @contextmanager
    def products(self, batches: Iterable[Any], together: bool) -> Iterator[list[Products]]:
        """Exact products with queries, in groups whose batches can be joined.

        Args:
            batches: of queries.
            together: whether all of them are one question: their gradients are added up.
        """
        rows = [row for batch in batches for row in rows_of(batch)]
        if not rows:
            raise ArgumentError(NO_BATCH)
        with self.engine as engine:
            groups = list(alike(rows))
            self._check(groups[0])
            yield [Products(engine, group, "query", np.ones(len(group)) if together else None) for group in groups]

    def _check(self, rows: list[Row]) -> None:
        """Before the first question, check the routes with a query loss of its own: the training examples have not."""
        if self._query_loss is not None and not self._asked:
            before = list(self.engine.layers)
            self.engine.task = replace(self.engine.task, query=rows, query_loss=self._query_loss)
            check_routes(self.engine)
            if self.engine.layers != before:  # gradients from before are of other layers
                self.kept = None
                if self.fixed:
                    raise TaskError(
                        "The test loss uses the layer as the training loss does not, so that rows of both do not "
                        "compare. Use TracInCPFast."
                    )
        self._asked = True

    def scores(self, products: Sequence[Products], together: bool, batch: Any, first: int) -> Tensor:
        """(n_query, n) TracInCP of a training batch, whose ids begin with ``first``.

        Raises:
            NonFiniteGradientError: names the queries or the training examples.
        """
        examples = examples_of(rows_of(batch), first)
        parts = [torch.cat([one.of(part) for part in self._parts(examples)], 1) for one in products]
        if not all(bool(part.isfinite().all()) for part in parts):
            finite = [one.finite(row) for one, part in zip(products, parts, strict=True) for row in range(len(part))]
            names = ["The sum of the queries"] if together else [f"Query {row}" for row in range(len(finite))]
            refuse_non_finite(torch.tensor(finite), names, "gradient")
        scores = torch.stack(parts).sum(0) if together else torch.cat(parts)
        refuse_non_finite(scores.isfinite().all(0), examples.names, "score")
        return scores

    def _parts(self, examples: Examples) -> Iterator[Examples]:
        """A batch in parts that a processor is quickest with; a GPU takes it whole."""
        step = len(examples) if self.engine.device.type == "cuda" else LARGEST_BATCH
        for start in range(0, len(examples), step):
            yield examples[start : start + step]

    def _through(self, action: Callable[[Examples], list[T]], examples: Examples) -> list[T]:
        return [result for part in self._parts(examples) for result in in_batches(self.engine, action, part)]

    def pieces(self, batches: Iterable[Any], role: Role = "train") -> Iterator[list[Piece]]:
        """The gradients of batches, as they are: for a layer whose gradients are small factors."""
        first = 0
        for rows in merged(batches, LARGEST_BATCH):
            examples = examples_of(rows, first, role, "Query" if role == "query" else "")
            if role == "query":
                self._check(rows)
            yield self._through(self._piece, examples)
            first += len(rows)

    def _piece(self, examples: Examples) -> list[Piece]:
        checkpoints = []
        for checkpoint in range(self.engine.n_checkpoints):
            by_layer: dict[int, Gradients] = {}
            self.engine.run(checkpoint, examples, by_layer.__setitem__)
            checkpoints.append(by_layer)
        return [Piece(checkpoints, examples.names)]

    def query_pieces(self, batches: Iterable[Any]) -> list[Piece]:
        """The gradients of queries.

        Raises:
            NonFiniteGradientError: names the queries.
        """
        pieces = list(chain.from_iterable(self.pieces(batches, "query")))
        if not pieces:
            raise ArgumentError(NO_BATCH)
        for piece in pieces:
            refuse_non_finite(self.squares_of(piece).isfinite(), piece.names, "gradient")
        return pieces

    def scores_of(self, queries: Sequence[Piece], train: Piece) -> Tensor:
        """(n_query, n) TracInCP of gradients.

        Raises:
            NonFiniteGradientError: names the training examples.
        """
        shape, engine = (sum(len(query.names) for query in queries), len(train.names)), self.engine
        scores, start = torch.zeros(shape, dtype=engine.dtype, device=engine.device), 0
        for query in queries:
            rows = slice(start, start + len(query.names))
            for ours, theirs in zip(train.checkpoints, query.checkpoints, strict=True):
                for number in ours.keys() & theirs.keys():
                    for part, piece in ours[number].parts():
                        scores[rows, part] += piece.products(theirs[number]).T
            start = rows.stop
        refuse_non_finite(scores.isfinite().all(0), train.names, "gradient")
        return scores

    def squares_of(self, piece: Piece) -> Tensor:
        """(n,) float64 squared norms of gradients over all checkpoints, which is self-influence."""
        squares = torch.zeros(len(piece.names), dtype=torch.float64, device=self.engine.device)
        for by_layer in piece.checkpoints:
            for gradients in by_layer.values():
                for part, one in gradients.parts():
                    squares[part] += one.squared_norms()
        return squares

    def squares(self, checkpoints: Iterable[int], batch: Any, first: int, name: str = "") -> Tensor:
        """(n,) self-influence, sum_c eta_c ||grad l(w_c; z)||^2.

        Raises:
            NonFiniteGradientError: names the examples.
        """
        examples, chosen = examples_of(rows_of(batch), first, "train", name), list(checkpoints)
        squares = torch.cat(self._through(partial(self._squares, chosen), examples))
        refuse_non_finite(squares.isfinite(), examples.names, "self-influence")
        return squares.to(self.engine.dtype)

    def _squares(self, checkpoints: Sequence[int], examples: Examples) -> list[Tensor]:
        squares = torch.zeros(len(examples), dtype=torch.float64, device=self.engine.device)

        def consume(number: int, gradients: Gradients) -> None:
            for part, piece in gradients.parts():
                squares[part] += piece.squared_norms()

        for checkpoint in checkpoints:
            self.engine.run(checkpoint, examples, consume)
        return [squares]

    def rows(
        self, maps: Sequence[BlockMap], dim: int, batches: Iterable[Any], role: Role = "train", name: str = ""
    ) -> Iterator[Tensor]:
        """(n, C dim) gradients of batches, times sqrt(eta), mapped, the checkpoints side by side.

        Raises:
            NonFiniteGradientError: names the examples.
        """
        first = 0
        for batch in merged(batches, LARGEST_BATCH):
            if role == "query":
                self._check(batch)
            examples = examples_of(batch, first, role, name)
            rows = torch.cat(self._through(partial(self._rows, maps, dim), examples))
            refuse_non_finite(rows.isfinite().all(1), examples.names, "gradient")
            yield rows
            first += len(batch)

    def _rows(self, maps: Sequence[BlockMap], dim: int, examples: Examples) -> list[Tensor]:
        engine, blocks = self.engine, []
        for checkpoint, block_map in enumerate(maps):
            block = torch.zeros(len(examples), dim, dtype=engine.dtype, device=engine.device)

            def consume(
                number: int, gradients: Gradients, block: Tensor = block, block_map: BlockMap = block_map
            ) -> None:
                for part, piece in gradients.parts():
                    block_map.add(block[part], number, piece)

            engine.run(checkpoint, examples, consume)
            blocks.append(block)
        return [torch.cat(blocks, 1)]


class ByParameter(BlockMap):
    """Whole gradients, each parameter as ``gradient.flatten()``, in the model's order.

    Args:
        engine: whose parameters and layers.
    """

    def __init__(self, engine: Engine) -> None:
        sizes = [as_real(engine.model.get_parameter(name)).shape for name in engine.parameters]
        starts = np.cumsum([0, *(size.numel() for size in sizes)]).tolist()
        numbers = {
            name: torch.arange(start, start + size.numel()).reshape(1, *size)
            for name, start, size in zip(engine.parameters, starts, sizes, strict=False)
        }
        self.size = starts[-1]
        # Where in the row each element of a layer's matrix stands.
        self._places = [as_matrix(layer, numbers).flatten().to(engine.device) for layer in engine.layers]

    def add(self, block: Tensor, number: int, gradients: Gradients) -> None:
        """See :class:`BlockMap`."""
        block.index_add_(1, self._places[number], gradients.gradient.flatten(1))


def _first_rows(batches: Iterable[Any]) -> list[Row]:
    """Of the first batches as many examples as are checked, if they can be joined to those of the first."""
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ArgumentError("train_dataset yields no batch. Give at least one example.")
    rows: list[Row] = []
    for number, batch in enumerate(chain([first], iterator)):
        rows += rows_of(batch)
        if len(rows) >= _CHECKED_ON or number + 1 == _FIRST_BATCHES:
            break
    return next(alike(rows))[:_CHECKED_ON]


def refuse_non_finite(good: Tensor, names: Sequence[str], what: str) -> None:
    """Refuse what is not ``good``, by name."""
    bad = [name for name, fine in zip(names, good.tolist(), strict=True) if not fine]
    if bad:
        raise NonFiniteGradientError(
            f"{joined_names(bad)} {'has' if len(bad) == 1 else 'have'} a NaN or infinite {what}. Check the loss there, "
            "or leave what is wrong out."
        )
