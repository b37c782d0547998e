"""From examples to rows: the engine and the projection joined."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import NonFiniteGradientError
from .factors import Gradients
from .gradients import Engine
from .memory import available_bytes, batch_size_for, in_halves
from .progress import progress
from .projection import Bases, Projection, Share, SubspaceFit, hash64, key

Norms = Literal["exact", "projected"]
_FITTED_TO = 2000


class RowMaker:
    """Makes rows with one map per checkpoint; the engine must be entered and its routes checked.

    Args:
        engine: computes the gradients.
        projection: which maps.
        bases: of a fitted projection.
        norms: whether self-influence is ``"exact"`` or the squared norm of the row (``"projected"``).
        unit_norm: divide each row by the norm of its whole gradients, so that inner products
            estimate cosines.
    """

    def __init__(
        self,
        engine: Engine,
        projection: Projection,
        bases: Bases | None = None,
        norms: Norms = "exact",
        unit_norm: bool = False,
    ) -> None:
        self._exact_norms = norms == "exact"
        self._unit_norm = unit_norm
        self._engine = engine
        like = torch.zeros((), dtype=engine.dtype, device=engine.device)
        self._maps = [projection.for_checkpoint(c, engine.layers, like, bases) for c in range(engine.n_checkpoints)]
        self._block_dim = projection.block_dim(engine.layers)

    @property
    def dim(self) -> int:
        """Numbers in a row."""
        return self._block_dim * len(self._maps)

    def rows(
        self, items: list[Any], names: list[str], role: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
        """Rows (batch, dim), self-influence (batch, C) and losses (batch, C) of a batch.

        A batch that does not fit the memory is halved until it does.

        Raises:
            NonFiniteGradientError: names the example and the checkpoint.
            OutOfMemoryError: one example alone does not fit.
        """
        named = list(zip(items, names, strict=True))
        parts = in_halves(lambda some: [self._rows(some, role)], named, names, lambda: self._engine.at)
        rows, squares, losses = (np.concatenate(part) for part in zip(*parts, strict=True))
        return rows, squares, losses

    def _rows(
        self, named: list[tuple[Any, str]], role: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
        items = [item for item, _ in named]
        blocks, norms, losses = [], [], []
        for checkpoint in range(len(self._maps)):
            for loss_scale in self._engine.loss_scales:
                block, squared, loss = self._at_checkpoint(checkpoint, items, role, loss_scale)
                bad = ~(squared.isfinite() & block.isfinite().all(1))
                if not bool(bad.any()):
                    break
            else:
                raise _non_finite(self._engine, checkpoint, named[int(bad.nonzero()[0])][1])
            blocks.append(block)
            norms.append(squared)
            losses.append(loss.double())
        squares, rows = torch.stack(norms, 1), torch.cat(blocks, 1)
        if self._unit_norm:
            rows = rows / _safe(squares.sum(1).sqrt())[:, None]
        return rows.float().cpu().numpy(), squares.cpu().numpy(), torch.stack(losses, 1).cpu().numpy()

    def _at_checkpoint(
        self, checkpoint: int, items: list[Any], role: str, loss_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks (batch, block_dim), squared norms (batch,) and losses (batch,)."""
        engine, block_map = self._engine, self._maps[checkpoint]
        block = torch.zeros(len(items), self._block_dim, dtype=engine.dtype, device=engine.device)
        squared = torch.zeros(len(items), dtype=torch.float64, device=engine.device)

        def consume(number: int, gradients: Gradients) -> None:
            for part, some in gradients.parts():
                block_map.add(block[part], number, some)
                if self._exact_norms:
                    squared[part] += some.squared_norms()

        losses = engine.run(checkpoint, items, consume, role, loss_scale=loss_scale)
        return block, squared if self._exact_norms else block.double().square().sum(1), losses


def _safe(norms: Tensor) -> Tensor:
    """Norms to divide by: a zero gradient has no direction and keeps its zeros."""
    return norms.where(norms > 0, 1.0)


def fit_bases(engine: Engine, projection: Projection, batch_size: int) -> Bases:
    """Fit a projection to up to 2,000 training examples, chosen by its seed, at every checkpoint.

    Each example is read once for each of the two passes. A batch that does not fit the memory is
    halved until it does.

    Returns:
        The bases by (checkpoint, layer), for :class:`RowMaker`.

    Raises:
        NonFiniteGradientError: names the example and the checkpoint.
        OutOfMemoryError: one example alone does not fit.
    """
    task = engine.task
    order = np.argsort(hash64(key(projection.seed, "sample"), task.n_train), kind="stable")
    ids = [int(i) for i in np.sort(order[:_FITTED_TO])]
    like = torch.zeros((), dtype=engine.dtype, device=engine.device)
    checkpoints = range(engine.n_checkpoints)
    fits = [SubspaceFit(engine.layers, projection.dim, key(projection.seed, c), like) for c in checkpoints]
    with progress("fitting the projection", SubspaceFit.PASSES * len(ids), "rows") as advance:
        for _ in range(SubspaceFit.PASSES):
            for start in range(0, len(ids), batch_size):
                chosen = ids[start : start + batch_size]
                names = _names(chosen)
                named = list(zip([task.train[i] for i in chosen], names, strict=True))
                for c, fit in enumerate(fits):
                    fit.add(in_halves(partial(_shares, engine, c, fit), named, names, lambda: engine.at))
                advance(len(chosen))
            for fit in fits:
                fit.end_pass()
    return {(c, number): sides for c, fit in enumerate(fits) for number, sides in enumerate(fit.sides())}


def _shares(engine: Engine, checkpoint: int, fit: SubspaceFit, named: list[tuple[Any, str]]) -> list[Share]:
    """What a batch adds to a fit, complete or not at all."""
    for loss_scale in engine.loss_scales:
        found: list[Share] = []

        def consume(number: int, gradients: Gradients, into: list[Share] = found) -> None:
            into.append(fit.share(number, gradients))

        engine.run(checkpoint, [item for item, _ in named], consume, loss_scale=loss_scale)
        if all(bool(side.isfinite().all()) for _, sides in found for side in sides):
            return found
    if len(named) == 1:
        raise _non_finite(engine, checkpoint, named[0][1])
    return [share for one in named for share in _shares(engine, checkpoint, fit, [one])]


def _names(ids: Iterable[int]) -> list[str]:
    return [f"Training example {i}" for i in ids]


def _non_finite(engine: Engine, checkpoint: int, name: str) -> NonFiniteGradientError:
    return NonFiniteGradientError(
        f"{name} has a NaN or infinite gradient at checkpoint {checkpoint} "
        f"({engine.task.checkpoints[checkpoint].path}). Check the example, or leave that checkpoint out."
    )


def pick_batch_size(engine: Engine, projection: Projection, norms: Norms, budget: int | None) -> int:
    """How many examples fit into a memory budget at once; see :func:`batch_size_for`.

    Args:
        engine: entered, its routes checked.
        projection: which maps.
        norms: as for :class:`RowMaker`.
        budget: bytes, by default what the device can spare.
    """
    like = torch.zeros((), dtype=engine.dtype, device=engine.device)
    if projection.fitted:  # fitting takes more than what follows
        shares = partial(_shares, engine, 0, SubspaceFit(engine.layers, projection.dim, 0, like))

        def action(items: list[Any]) -> None:
            names = _names(range(len(items)))
            in_halves(shares, list(zip(items, names, strict=True)), names, lambda: engine.at)
    else:
        maker = RowMaker(engine, projection, norms=norms)

        def action(items: list[Any]) -> None:
            maker.rows(items, _names(range(len(items))), "train")

    budget = available_bytes(engine.device) if budget is None else budget
    return batch_size_for(action, engine.task.train, budget, engine.device)  # type: ignore[arg-type]  # or a data set


def describe(engine: Engine, projection: Projection, unit_norm: bool = False) -> dict[str, Any]:
    """Everything that rows depend on, as JSON: two rows compare only when these agree.

    Returns:
        ``map``: model, loss, layers, checkpoints, projection and precision; ``data``: the
        number of training examples and their fingerprint.
    """
    task = engine.task
    described = {
        "model": [[name, list(tensor.shape)] for name, tensor in task.model.state_dict().items()],
        "loss": getattr(task.loss, "__qualname__", type(task.loss).__qualname__),
        "layers": [
            {"name": x.name, "parameters": list(x.parameters), "shape": [x.rows, x.columns], "route": x.route}
            for x in engine.layers
        ],
        "checkpoints": [
            {
                "sha256": checkpoint.sha256(),
                "step": checkpoint.step,
                "weighting": checkpoint.weight_source,
                "learning_rates": rates,
            }
            for checkpoint, rates in zip(task.checkpoints, engine.learning_rates, strict=True)
        ],
        "projection": {"kind": projection.kind, "dim": projection.dim, "seed": projection.seed},
        "precision": engine.precision,
        "preconditioner": task.preconditioner,
        "unit_norm": unit_norm,
    }
    return {"map": described, "data": {"n_train": task.n_train, "fingerprint": task.data_fingerprint()}}
