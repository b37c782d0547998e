"""The engine over a user's batches: scores, self-influence and gradients as rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, NonFiniteGradientError, joined_names
from ..examples import Examples, Role
from ..factors import Gradients, Layer
from ..gradients import Engine, Products, check_queries, check_routes, in_batches
from ..gradients.functional import as_real
from ..gradients.layers import as_matrix
from ..projection.base import BlockMap
from ..task import Loss, Task
from .batches import Row, alike, examples_of, joined, rows_of

# Training examples that the routes are checked on, and the batches that are looked through for them.
_CHECKED_ON, _FIRST_BATCHES = 64, 8

NO_BATCH = "inputs holds no batch. Give (*inputs, labels), or a loader of such batches."


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
        with self.engine:
            check_routes(self.engine)

    @property
    def layers(self) -> Sequence[Layer]:
        """What is tracked."""
        return self.engine.layers

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
            if not self._asked:
                self._check(groups[0])
            yield [Products(engine, group, "query", np.ones(len(group)) if together else None) for group in groups]

    def _check(self, rows: list[Row]) -> None:
        """Meet the query loss, or the first queries, before they are answered."""
        engine = self.engine
        if self._query_loss is None:
            check_queries(engine, rows, [f"Query {place}" for place in range(len(rows))])
        else:
            engine.task = replace(engine.task, query=rows, query_loss=self._query_loss)
            check_routes(engine)
        self._asked = True

    def scores(self, products: Sequence[Products], together: bool, batch: Any, first: int) -> Tensor:
        """(n_query, n) TracInCP of a training batch, whose ids begin with ``first``.

        Raises:
            NonFiniteGradientError: names the queries or the training examples.
        """
        examples = examples_of(batch, first)
        parts = [part.of(examples) for part in products]
        if not all(bool(part.isfinite().all()) for part in parts):
            finite = [one.finite(row) for one, part in zip(products, parts, strict=True) for row in range(len(part))]
            names = ["The sum of the queries"] if together else [f"Query {row}" for row in range(len(finite))]
            _finite(torch.tensor(finite), names, "gradient")
        scores = torch.stack(parts).sum(0) if together else torch.cat(parts)
        _finite(scores.isfinite().all(0), examples.names, "score")
        return scores

    def squares(self, checkpoints: Iterable[int], batch: Any, first: int, name: str = "") -> Tensor:
        """(n,) self-influence, sum_c eta_c ||grad l(w_c; z)||^2.

        Raises:
            NonFiniteGradientError: names the examples.
        """
        examples, chosen = examples_of(batch, first, "train", name), list(checkpoints)
        squares = torch.cat(in_batches(self.engine, partial(self._squares, chosen), examples))
        _finite(squares.isfinite(), examples.names, "self-influence")
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
        self, maps: Sequence[BlockMap], dim: int, batch: Any, first: int, role: Role = "train", name: str = ""
    ) -> Tensor:
        """(n, C dim) gradients times sqrt(eta), mapped, the checkpoints side by side.

        Raises:
            NonFiniteGradientError: names the examples.
        """
        examples = examples_of(batch, first, role, name)
        if role == "query" and not self._asked:
            self._check(rows_of(batch))
        rows = torch.cat(in_batches(self.engine, partial(self._rows, maps, dim), examples))
        _finite(rows.isfinite().all(1), examples.names, "gradient")
        return rows

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


def _finite(good: Tensor, names: Sequence[str], what: str) -> None:
    """Refuse what is not ``good``, by name."""
    bad = [name for name, fine in zip(names, good.tolist(), strict=True) if not fine]
    if bad:
        raise NonFiniteGradientError(
            f"{joined_names(bad)} {'has' if len(bad) == 1 else 'have'} a NaN or infinite {what}. Check the loss there, "
            "or leave what is wrong out."
        )
