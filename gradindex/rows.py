"""From examples to rows: the engine and the projection joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .choices import Norms
from .errors import TaskError
from .examples import Examples, Role, RowBatch, Sides
from .factors import Factors, Gradients, Layer
from .gradients import Engine, Geometry, in_batches, non_finite
from .losses import name_of
from .memory import LARGEST_TRIED, available_bytes, batch_size_for, pass_bytes
from .progress import progress
from .projection import Bases, Fit, Projection, Share, WideMap, hash64, key
from .store import RowMap, StoredCheckpoint, StoredLayer, StoredProjection

# Of how many examples, at most, bases are fitted to the gradients.
FITTED_TO = 2000


@dataclass(frozen=True, eq=False)
class Blocks:
    """What rows of b examples are made of at some checkpoints, on the CPU.

    Args:
        rows: (b, C block_dim) in the engine's type, before the geometry's last map.
        squares: (b, C) float64, squared norms of the gradients.
        losses: (b, C) float64.
        factors: as of :class:`RowBatch`.
        wide: (b, C wide) in the engine's type, of a store that has wide rows.
    """

    rows: Tensor
    squares: Tensor
    losses: Tensor
    factors: dict[tuple[int, int], Sides]
    wide: Tensor | None = None

    @classmethod
    def below(cls, parts: Sequence[Blocks]) -> Blocks:
        """Of several batches at the same checkpoints."""
        if len(parts) == 1:
            return parts[0]
        sides = {name: list(zip(*(part.factors[name] for part in parts), strict=True)) for name in parts[0].factors}
        return cls(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.squares for part in parts]),
            torch.cat([part.losses for part in parts]),
            {name: (np.concatenate(x), np.concatenate(d)) for name, (x, d) in sides.items()},
            _joined([part.wide for part in parts], 0),
        )

    def at(self, places: NDArray[np.int64]) -> Blocks:
        """Of the examples at some places, in that order."""
        which = torch.from_numpy(places)
        sides = {name: (x[places], d[places]) for name, (x, d) in self.factors.items()}
        wide = None if self.wide is None else self.wide[which]
        return Blocks(self.rows[which], self.squares[which], self.losses[which], sides, wide)

    @classmethod
    def beside(cls, parts: Sequence[Blocks]) -> Blocks:
        """Of the same batch at several checkpoints."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.rows for part in parts], 1),
            torch.cat([part.squares for part in parts], 1),
            torch.cat([part.losses for part in parts], 1),
            {name: sides for part in parts for name, sides in part.factors.items()},
            _joined([part.wide for part in parts], 1),
        )


def _joined(parts: Sequence[Tensor | None], axis: int) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there, axis) if there else None


class RowMaker:
    """Makes rows with one map per checkpoint; the engine must be entered and its routes checked.

    Args:
        engine: computes the gradients.
        projection: which maps.
        bases: of a fitted projection.
        norms: whether self-influence is ``"exact"`` or the squared norm of the row (``"projected"``).
        geometry: what is done to gradients and rows, by default as the engine's task says.
        factors: whether exact factors are made as well.
        first: the number of the engine's first checkpoint among all of a store's, whose maps are
            independent.
        wide: numbers of a checkpoint in a wide row, where such are made as well.

    Raises:
        TaskError: factors or wide rows were asked for, but give no scores in this geometry.
    """

    def __init__(
        self,
        engine: Engine,
        projection: Projection,
        bases: Bases | None = None,
        norms: Norms = "exact",
        geometry: Geometry | None = None,
        factors: bool = False,
        first: int = 0,
        wide: int | None = None,
    ) -> None:
        self._exact_norms = norms == "exact"
        self._factors, self._first = factors, first
        self.engine, self.geometry = engine, engine.geometry if geometry is None else geometry
        if not self.geometry.by_factors and (factors or wide):
            lacking, option = (
                ("Stored factors give no exact", "factors") if factors else ("Wide rows estimate no", "wide")
            )
            raise TaskError(
                f"{lacking} scores with preconditioner {engine.task.preconditioner!r}. Build without {option}."
            )
        like = torch.zeros((), dtype=engine.dtype, device=engine.device)
        numbers = range(first, first + engine.n_checkpoints)
        self._maps = [projection.for_checkpoint(c, engine.layers, like, bases) for c in numbers]
        self._block_dim = projection.block_dim(engine.layers)
        self._wide = [
            WideMap(block_map, wide, number, engine.layers, projection.seed, like)
            for number, block_map in zip(numbers, self._maps, strict=True)
            if wide is not None
        ]

    @property
    def makes_factors(self) -> bool:
        """Whether factors come with the rows."""
        return self._factors

    @property
    def dim(self) -> int:
        """Numbers in a row."""
        return self._block_dim * len(self._maps)

    @property
    def wide_dim(self) -> int:
        """Numbers in a wide row, 0 where none are made."""
        return sum(wide_map.dim for wide_map in self._wide)

    @property
    def row_bytes(self) -> int:
        """What a row takes with its factors and wide row, as they are computed."""
        sides = sum(layer.d_in + layer.d_out for layer in self.engine.layers) if self._factors else 0
        return self.engine.dtype.itemsize * (self.dim + self.wide_dim) + 4 * sides * len(self._maps)

    @property
    def turns(self) -> list[list[int]]:
        """Numbers of checkpoints whose weights are held together, one turn after the other."""
        checkpoints = list(range(len(self._maps)))
        return [[c] for c in checkpoints] if self.engine.states.one_at_a_time else [checkpoints]

    def rows(self, examples: Examples) -> RowBatch:
        """Rows of examples, and what stands beside them; they go through the engine as :func:`in_batches` says.

        Raises:
            NonFiniteGradientError: names the example and the checkpoint.
            OutOfMemoryError: one example alone does not fit.
            UserCodeError: the loss or collate failed; names the example.
            TaskError: factors were asked for, and a layer's gradient is not one outer product.
        """
        return self.finished([self.blocks(examples, range(len(self._maps)))], examples.role)

    def blocks(self, examples: Examples, checkpoints: Sequence[int]) -> Blocks:
        """What rows are made of at some of the checkpoints, side by side; examples and errors as for :meth:`rows`."""
        return Blocks.below(in_batches(self.engine, partial(self._blocks, checkpoints), examples))

    def finished(self, parts: Sequence[Blocks], role: Role) -> RowBatch:
        """Rows of examples whose blocks at all checkpoints are there, in the order of the checkpoints."""
        whole = Blocks.beside(parts)
        finish = self.geometry.query_rows if role == "query" else self.geometry.train_rows
        squares = whole.squares.to(self.engine.device)
        rows, wide = (
            None if made is None else finish(made.to(self.engine.device), squares).float().cpu().numpy()
            for made in (whole.rows, whole.wide)
        )
        assert rows is not None
        return RowBatch(rows, whole.squares.numpy(), whole.losses.numpy(), whole.factors, wide)

    def _blocks(self, checkpoints: Sequence[int], examples: Examples) -> list[Blocks]:
        blocks, wide_blocks, norms, losses = [], [], [], []
        factors: dict[tuple[int, int], Sides] = {}
        for checkpoint in checkpoints:
            for loss_scale in self.engine.loss_scales:
                block, wide, squared, loss, sides = self._at_checkpoint(checkpoint, examples, loss_scale)
                bad = ~(loss.isfinite() & squared.isfinite() & block.isfinite().all(1) & wide.isfinite().all(1))
                if not bool(bad.any()):
                    break
            else:
                names = [name for name, wrong in zip(examples.names, bad.tolist(), strict=True) if wrong]
                raise non_finite(self.engine, checkpoint, names, bool(loss.isfinite().all()))
            blocks.append(block)
            wide_blocks.append(wide.cpu())
            norms.append(squared)
            losses.append(loss.double())
            factors |= {(self._first + checkpoint, number): pair for number, pair in sides.items()}
        squares, columns = torch.stack(norms, 1), torch.stack(losses, 1)
        beside = torch.cat(wide_blocks, 1) if self._wide else None
        return [Blocks(torch.cat(blocks, 1).cpu(), squares.cpu(), columns.cpu(), factors, beside)]

    def _at_checkpoint(
        self, checkpoint: int, examples: Examples, loss_scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[int, Sides]]:
        """Blocks (b, block_dim), wide blocks (b, wide), squared norms (b,), losses (b,) and factors by layer."""
        engine, block_map, mapped = self.engine, self._maps[checkpoint], self._mapped(examples)
        block = torch.zeros(len(examples), self._block_dim, dtype=engine.dtype, device=engine.device)
        wide_map = self._wide[checkpoint] if self._wide else None
        wide = block.new_zeros(len(examples), 0 if wide_map is None else wide_map.dim)
        squared = torch.zeros(len(examples), dtype=torch.float64, device=engine.device)
        sides = {number: _no_sides(layer, len(examples)) for number, layer in enumerate(engine.layers) if self._factors}

        def consume(number: int, gradients: Gradients) -> None:
            gradients = mapped(checkpoint, engine.layers[number], gradients)
            if self._factors:
                sides[number] = _sides(engine.layers[number], gradients)
            for part, piece in gradients.parts():
                block_map.add(block[part], number, piece)
                if wide_map is not None:
                    wide_map.add(wide[part], number, piece)
                if self._exact_norms:
                    squared[part] += piece.squared_norms()

        losses = engine.run(checkpoint, examples, consume, loss_scale=loss_scale)
        if wide_map is not None:
            wide = wide_map.finished(wide, block)
        return block, wide, squared if self._exact_norms else block.double().square().sum(1), losses, sides

    def _mapped(self, examples: Examples) -> Callable[[int, Layer, Gradients], Gradients]:
        return self.geometry.query if examples.role == "query" else self.geometry.train

    def losses_and_norms(self, checkpoint: int, examples: Examples) -> tuple[Tensor, Tensor]:
        """(n,) float64 each, of examples in one batch at one checkpoint: what stands beside rows, without these."""
        engine, mapped = self.engine, self._mapped(examples)
        squared = torch.zeros(len(examples), dtype=torch.float64, device=engine.device)

        def consume(number: int, gradients: Gradients) -> None:
            for part, piece in mapped(checkpoint, engine.layers[number], gradients).parts():
                squared[part] += piece.squared_norms()

        return engine.run(checkpoint, examples, consume).double(), squared.sqrt()


def _no_sides(layer: Layer, count: int) -> Sides:
    """Of a layer that the loss does not depend on."""
    return np.zeros((count, layer.d_in), np.float32), np.zeros((count, layer.d_out), np.float32)


def _sides(layer: Layer, gradients: Gradients) -> Sides:
    if not (isinstance(gradients, Factors) and gradients.rank_one):
        raise TaskError(
            f"The gradient of {layer.name or 'the model'} is not one outer product (it has positions, as in "
            "convolutions and sequences, or no such form), so it has no exact factors to store. "
            "Track linear layers without positions alone, with layers=, or build without factors."
        )
    activations, output_gradients = gradients.activations[:, 0], gradients.output_gradients[:, 0]
    return activations.float().cpu().numpy(), output_gradients.float().cpu().numpy()


def fit_bases(engine: Engine, projection: Projection, batch_size: int, n: int, first: int = 0) -> Bases:
    """Fit a projection to up to 2,000 training examples, chosen by its seed, at every checkpoint.

    Each example is read once for each of the two passes, and for each checkpoint where these are held one at a time. A
    batch that does not fit the memory is
    halved until it does.

    Args:
        engine: entered, its routes checked.
        projection: a fitted one.
        batch_size: examples per pass.
        n: the first n training examples are those to choose from, but for skipped ones.
        first: as for :class:`RowMaker`.

    Returns:
        The bases by (checkpoint, layer), for :class:`RowMaker`.

    Raises:
        NonFiniteGradientError: names the example and the checkpoint.
        OutOfMemoryError: one example alone does not fit.
    """
    task = engine.task
    order = np.argsort(hash64(key(projection.seed, "sample"), n), kind="stable")
    ids = np.sort(order[np.isin(order, task.train_ids)][:FITTED_TO])
    like = torch.zeros((), dtype=engine.dtype, device=engine.device)
    checkpoints = range(engine.n_checkpoints)
    fits = [projection.fit(first + c, engine.layers, like) for c in checkpoints]
    # Each pass takes each batch through all checkpoints, or where one is held at a time all batches through each.
    turns = [[c] for c in checkpoints] if engine.states.one_at_a_time else [list(checkpoints)]
    with progress("fitting the projection", projection.passes * len(turns) * len(ids), "rows") as advance:
        for _ in range(projection.passes):
            for turn in turns:
                for start in range(0, len(ids), batch_size):
                    examples = task.read(ids[start : start + batch_size])
                    for c in turn:
                        fits[c].add(in_batches(engine, partial(_shares, engine, c, fits[c]), examples))
                    advance(len(examples))
            for fit in fits:
                fit.end_pass()
    return {(first + c, number): sides for c, fit in enumerate(fits) for number, sides in enumerate(fit.sides())}


def _shares(engine: Engine, checkpoint: int, fit: Fit, examples: Examples) -> list[Share]:
    """What a batch adds to a fit, complete or not at all."""
    for loss_scale in engine.loss_scales:
        shares: list[Share] = []

        def consume(number: int, gradients: Gradients, shares: list[Share] = shares) -> None:
            gradients = engine.geometry.train(checkpoint, engine.layers[number], gradients)
            shares.append(fit.share(number, gradients))

        engine.run(checkpoint, examples, consume, loss_scale=loss_scale)
        if all(bool(side.isfinite().all()) for _, sides in shares for side in sides):
            return shares
    if len(examples) == 1:
        raise non_finite(engine, checkpoint, examples.names)
    return [share for example in examples for share in _shares(engine, checkpoint, fit, example)]


def pick_batch_size(
    engine: Engine, projection: Projection, norms: Norms, budget: int | None, wide: int | None = None
) -> int:
    """How many examples fit into a memory budget at once; see :func:`batch_size_for`.

    Args:
        engine: entered, its routes checked.
        projection: which maps.
        norms: as for :class:`RowMaker`.
        budget: bytes, by default what the device can spare.
        wide: as for :class:`RowMaker`.
    """
    budget = available_bytes(engine.device) if budget is None else budget
    return batch_size_for(_hungriest(engine, projection, norms, wide), _few(engine), budget, engine.device)


def memory_of_pass(engine: Engine, projection: Projection, norms: Norms, wide: int | None = None) -> tuple[int, int]:
    """Bytes that a pass takes whatever its size, and bytes for each example; arguments as above."""
    return pass_bytes(_hungriest(engine, projection, norms, wide), _few(engine), engine.device)


def _few(engine: Engine) -> Examples:
    return engine.task.read(engine.task.train_ids[:LARGEST_TRIED])


def _hungriest(engine: Engine, projection: Projection, norms: Norms, wide: int | None) -> Callable[[Examples], Any]:
    """What a build does with a batch that takes most memory."""
    rows = RowMaker(engine, projection.unfitted, norms=norms, wide=wide).rows
    if not projection.fitted:
        return rows
    like = torch.zeros((), dtype=engine.dtype, device=engine.device)
    shares = partial(in_batches, engine, partial(_shares, engine, 0, projection.fit(0, engine.layers, like)))
    # Fitting takes more than what follows, but for wide rows.
    return (lambda examples: (shares(examples), rows(examples))) if wide else shares


def projection_of(rows: RowMap) -> Projection:
    """The map that made a store's rows."""
    stored = rows.projection
    return Projection(stored.kind, stored.dim, stored.seed)


def describe(engine: Engine, projection: Projection, unit_norm: bool = False) -> RowMap:
    """Everything that rows depend on: two rows compare only when these agree. Bases are not known yet."""
    task = engine.task
    layers = (StoredLayer(x.name, x.parameters, x.d_out, x.d_in, x.route) for x in engine.layers)
    checkpoints = (
        StoredCheckpoint(
            **loaded.described(),
            step=loaded.checkpoint.step,
            weighting=loaded.checkpoint.weight_source,
            learning_rates=rates,
        )
        for loaded, rates in zip(engine.loaded, engine.learning_rates, strict=True)
    )
    return RowMap(
        model=tuple((name, tuple(x.shape)) for name, x in task.model.state_dict().items() if isinstance(x, Tensor)),
        loss=name_of(task.loss),
        layers=tuple(layers),
        checkpoints=tuple(checkpoints),
        projection=StoredProjection(projection.kind, projection.dim, projection.seed),
        precision=engine.precision,
        preconditioner=task.preconditioner,
        unit_norm=unit_norm,
    )
