"""From examples to rows: the engine and the projection joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import NonFiniteGradientError, OutOfMemoryError
from .factors import Gradients
from .gradients import Engine
from .progress import progress
from .projection import Bases, Projection, SubspaceFit, hash64, key

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
        try:
            return self._rows(items, names, role)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
                raise
            if len(items) == 1:
                reason = str(error).splitlines()[0][:160]
                raise OutOfMemoryError(
                    f"{names[0]} alone needs more memory than there is ({reason}). Track fewer layers, or use a "
                    "machine with more memory."
                ) from None
        half = len(items) // 2
        first, second = self.rows(items[:half], names[:half], role), self.rows(items[half:], names[half:], role)
        return (
            np.concatenate([first[0], second[0]]),
            np.concatenate([first[1], second[1]]),
            np.concatenate([first[2], second[2]]),
        )

    def _rows(
        self, items: list[Any], names: list[str], role: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
        rows, norms, losses = [], [], []
        for checkpoint, block_map in enumerate(self._maps):
            block = torch.zeros(len(items), self._block_dim, dtype=self._engine.dtype, device=self._engine.device)
            squared = torch.zeros(len(items), dtype=torch.float64, device=self._engine.device)

            def consume(
                number: int, gradients: Gradients, m: Any = block_map, b: Any = block, s: Any = squared
            ) -> None:
                for part, some in gradients.parts():
                    m.add(b[part], number, some)
                    if self._exact_norms:
                        s[part] += some.squared_norms()

            losses.append(self._engine.run(checkpoint, items, consume, role).double())
            if not self._exact_norms:
                squared = block.double().square().sum(1)
            bad = ~(squared.isfinite() & block.isfinite().all(1))
            if bool(bad.any()):
                path = self._engine.task.checkpoints[checkpoint].path
                raise NonFiniteGradientError(
                    f"{names[int(bad.nonzero()[0])]} has a NaN or infinite gradient at checkpoint {checkpoint} "
                    f"({path}). Check the example, or leave that checkpoint out."
                )
            rows.append(block)
            norms.append(squared)
        squares, stacked = torch.stack(norms, 1), torch.cat(rows, 1)
        if self._unit_norm:
            stacked = stacked / _safe(squares.sum(1).sqrt())[:, None]
        return stacked.float().cpu().numpy(), squares.cpu().numpy(), torch.stack(losses, 1).cpu().numpy()


def _safe(norms: Tensor) -> Tensor:
    """Norms to divide by: a zero gradient has no direction and keeps its zeros."""
    return norms.where(norms > 0, 1.0)


def fit_bases(engine: Engine, projection: Projection, batch_size: int) -> Bases:
    """Fit a projection to up to 2,000 training examples, chosen by its seed, at every checkpoint.

    Returns:
        The bases by (checkpoint, layer), for :class:`RowMaker`.
    """
    task = engine.task
    order = np.argsort(hash64(key(projection.seed, "sample"), task.n_train), kind="stable")
    ids = np.sort(order[:_FITTED_TO])
    like = torch.zeros((), dtype=engine.dtype, device=engine.device)
    bases: dict[tuple[int, int], tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    with progress("fitting the projection", 2 * len(ids) * engine.n_checkpoints, "rows") as advance:
        for checkpoint in range(engine.n_checkpoints):

            def sample(consume: Callable[[int, Gradients], None], c: int = checkpoint) -> None:
                for start in range(0, len(ids), batch_size):
                    items = [task.train[int(i)] for i in ids[start : start + batch_size]]
                    engine.run(c, items, consume)
                    advance(len(items))

            fit = SubspaceFit(engine.layers, projection.dim, key(projection.seed, checkpoint), like)
            bases |= {(checkpoint, number): sides for number, sides in enumerate(fit.sides(sample))}
    return bases


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
