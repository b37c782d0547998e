"""From examples to rows: the engine and the projection joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .choices import Norms
from .errors import TaskError, training_names
from .factors import Factors, Gradients, Layer
from .gradients import Engine, blamed, non_finite
from .memory import LARGEST_TRIED, available_bytes, batch_size_for, in_halves, pass_bytes
from .progress import progress
from .projection import Bases, Fit, Projection, Share, hash64, key
from .store import RowMap, StoredCheckpoint, StoredLayer, StoredProjection

# Of how many examples, at most, bases are fitted to the gradients.
FITTED_TO = 2000


Sides = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class RowBatch:
    """What is stored of b examples at C checkpoints.

    Args:
        rows: (b, dim) float32, a block for each checkpoint, side by side.
        self_influence: (b, C) float64, eta_c ||grad l(w_c; z)||^2.
        losses: (b, C) float64.
        factors: by (checkpoint, layer), where asked for: activations (b, d_in) and output gradients
            (b, d_out) of layers whose gradient is one outer product, times sqrt(eta_c).
    """

    rows: NDArray[np.float32]
    self_influence: NDArray[np.float64]
    losses: NDArray[np.float64]
    factors: Mapping[tuple[int, int], Sides]

    @classmethod
    def joined(cls, parts: Sequence[RowBatch]) -> RowBatch:
        """Batches one after another."""
        if len(parts) == 1:
            return parts[0]

        def along(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate(values)

        sides = {key: [part.factors[key] for part in parts] for key in parts[0].factors}
        return cls(
            along([part.rows for part in parts]),
            along([part.self_influence for part in parts]),
            along([part.losses for part in parts]),
            {key: (along([x for x, _ in pairs]), along([d for _, d in pairs])) for key, pairs in sides.items()},
        )


class RowMaker:
    """Makes rows with one map per checkpoint; the engine must be entered and its routes checked.

    Args:
        engine: computes the gradients.
        projection: which maps.
        bases: of a fitted projection.
        norms: whether self-influence is ``"exact"`` or the squared norm of the row (``"projected"``).
        unit_norm: divide each row by the norm of its whole gradients, so that inner products
            estimate cosines.
        factors: whether exact factors are made as well.
        first: the number of the engine's first checkpoint among all of a store's, whose maps are
            independent.
    """

    def __init__(
        self,
        engine: Engine,
        projection: Projection,
        bases: Bases | None = None,
        norms: Norms = "exact",
        unit_norm: bool = False,
        factors: bool = False,
        first: int = 0,
    ) -> None:
        self._exact_norms = norms == "exact"
        self._unit_norm, self._factors, self._first = unit_norm, factors, first
        self.engine = engine
        like = torch.zeros((), dtype=engine.dtype, device=engine.device)
        numbers = range(first, first + engine.n_checkpoints)
        self._maps = [projection.for_checkpoint(c, engine.layers, like, bases) for c in numbers]
        self._block_dim = projection.block_dim(engine.layers)

    @property
    def dim(self) -> int:
        """Numbers in a row."""
        return self._block_dim * len(self._maps)

    def rows(self, items: list[Any], names: list[str], role: str) -> RowBatch:
        """Rows of a batch, and what stands beside them.

        A batch that does not fit the memory is halved until it does.

        Raises:
            NonFiniteGradientError: names the example and the checkpoint.
            OutOfMemoryError: one example alone does not fit.
            TaskError: factors were asked for, and a layer's gradient is not one outer product.
        """
        named, engine = list(zip(items, names, strict=True)), self.engine
        with blamed(engine, items, names, role):
            parts = in_halves(lambda some: [self._rows(some, role)], named, names, lambda: engine.at, engine.alone)
        return RowBatch.joined(parts)

    def _rows(self, named: list[tuple[Any, str]], role: str) -> RowBatch:
        items = [item for item, _ in named]
        blocks, norms, losses = [], [], []
        factors: dict[tuple[int, int], Sides] = {}
        for checkpoint in range(len(self._maps)):
            for loss_scale in self.engine.loss_scales:
                block, squared, loss, sides = self._at_checkpoint(checkpoint, items, role, loss_scale)
                bad = ~(loss.isfinite() & squared.isfinite() & block.isfinite().all(1))
                if not bool(bad.any()):
                    break
            else:
                names = [name for (_, name), wrong in zip(named, bad.tolist(), strict=True) if wrong]
                raise non_finite(self.engine, checkpoint, names, bool(loss.isfinite().all()))
            blocks.append(block)
            norms.append(squared)
            losses.append(loss.double())
            factors |= {(self._first + checkpoint, number): pair for number, pair in sides.items()}
        squares, rows = torch.stack(norms, 1), torch.cat(blocks, 1)
        if self._unit_norm:
            rows = rows / _safe(squares.sum(1).sqrt())[:, None]
        return RowBatch(
            rows.float().cpu().numpy(), squares.cpu().numpy(), torch.stack(losses, 1).cpu().numpy(), factors
        )

    def _at_checkpoint(
        self, checkpoint: int, items: list[Any], role: str, loss_scale: float
    ) -> tuple[Tensor, Tensor, Tensor, dict[int, Sides]]:
        """Blocks (batch, block_dim), squared norms (batch,), losses (batch,) and factors by layer."""
        engine, block_map = self.engine, self._maps[checkpoint]
        block = torch.zeros(len(items), self._block_dim, dtype=engine.dtype, device=engine.device)
        squared = torch.zeros(len(items), dtype=torch.float64, device=engine.device)
        sides = {number: _no_sides(layer, len(items)) for number, layer in enumerate(engine.layers) if self._factors}

        def consume(number: int, gradients: Gradients) -> None:
            if self._factors:
                sides[number] = _sides(engine.layers[number], gradients)
            for part, some in gradients.parts():
                block_map.add(block[part], number, some)
                if self._exact_norms:
                    squared[part] += some.squared_norms()

        losses = engine.run(checkpoint, items, consume, role, loss_scale=loss_scale)
        return block, squared if self._exact_norms else block.double().square().sum(1), losses, sides


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


def _safe(norms: Tensor) -> Tensor:
    """Norms to divide by: a zero gradient has no direction and keeps its zeros."""
    return norms.where(norms > 0, 1.0)


def fit_bases(engine: Engine, projection: Projection, batch_size: int, n: int, first: int = 0) -> Bases:
    """Fit a projection to up to 2,000 training examples, chosen by its seed, at every checkpoint.

    Each example is read once for each of the two passes. A batch that does not fit the memory is
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
    ids = [int(i) for i in np.sort(order[np.isin(order, task.train_ids)][:FITTED_TO])]
    like = torch.zeros((), dtype=engine.dtype, device=engine.device)
    checkpoints = range(engine.n_checkpoints)
    fits = [projection.fit(first + c, engine.layers, like) for c in checkpoints]
    with progress("fitting the projection", projection.passes * len(ids), "rows") as advance:
        for _ in range(projection.passes):
            for start in range(0, len(ids), batch_size):
                chosen = ids[start : start + batch_size]
                names = training_names(chosen)
                items = task.examples(chosen)
                named = list(zip(items, names, strict=True))
                for c, fit in enumerate(fits):
                    with blamed(engine, items, names, "train"):
                        shares = in_halves(
                            partial(_shares, engine, c, fit), named, names, lambda: engine.at, engine.alone
                        )
                    fit.add(shares)
                advance(len(chosen))
            for fit in fits:
                fit.end_pass()
    return {(first + c, number): sides for c, fit in enumerate(fits) for number, sides in enumerate(fit.sides())}


def _shares(engine: Engine, checkpoint: int, fit: Fit, named: list[tuple[Any, str]]) -> list[Share]:
    """What a batch adds to a fit, complete or not at all."""
    for loss_scale in engine.loss_scales:
        found: list[Share] = []

        def consume(number: int, gradients: Gradients, into: list[Share] = found) -> None:
            into.append(fit.share(number, gradients))

        engine.run(checkpoint, [item for item, _ in named], consume, loss_scale=loss_scale)
        if all(bool(side.isfinite().all()) for _, sides in found for side in sides):
            return found
    if len(named) == 1:
        raise non_finite(engine, checkpoint, [named[0][1]])
    return [share for one in named for share in _shares(engine, checkpoint, fit, [one])]


def pick_batch_size(engine: Engine, projection: Projection, norms: Norms, budget: int | None) -> int:
    """How many examples fit into a memory budget at once; see :func:`batch_size_for`.

    Args:
        engine: entered, its routes checked.
        projection: which maps.
        norms: as for :class:`RowMaker`.
        budget: bytes, by default what the device can spare.
    """
    budget = available_bytes(engine.device) if budget is None else budget
    return batch_size_for(_hungriest(engine, projection, norms), _few(engine), budget, engine.device)


def memory_of_pass(engine: Engine, projection: Projection, norms: Norms) -> tuple[int, int]:
    """Bytes that a pass takes whatever its size, and bytes for each example; arguments as above."""
    return pass_bytes(_hungriest(engine, projection, norms), _few(engine), engine.device)


def _few(engine: Engine) -> list[Any]:
    return engine.task.examples(engine.task.train_ids[:LARGEST_TRIED])


def _hungriest(engine: Engine, projection: Projection, norms: Norms) -> Callable[[list[Any]], None]:
    """What a build does with a batch that takes most memory."""
    if projection.fitted:  # fitting takes more than what follows
        like = torch.zeros((), dtype=engine.dtype, device=engine.device)
        shares = partial(_shares, engine, 0, projection.fit(0, engine.layers, like))

        def action(items: list[Any]) -> None:
            names = training_names(range(len(items)))
            in_halves(shares, list(zip(items, names, strict=True)), names, lambda: engine.at, engine.alone)
    else:
        maker = RowMaker(engine, projection, norms=norms)

        def action(items: list[Any]) -> None:
            maker.rows(items, training_names(range(len(items))), "train")

    return action


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
        loss=getattr(task.loss, "__qualname__", type(task.loss).__qualname__),
        layers=tuple(layers),
        checkpoints=tuple(checkpoints),
        projection=StoredProjection(projection.kind, projection.dim, projection.seed),
        precision=engine.precision,
        preconditioner=task.preconditioner,
        unit_norm=unit_norm,
    )
