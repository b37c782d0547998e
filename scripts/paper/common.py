"""What the experiments share: options, a result in JSON with pictures beside it, correlation."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, jvp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from harness import Bench, machine

Array = NDArray[np.float64]
Loss = Callable[[Any, tuple[Tensor, Tensor]], Tensor]
PROPONENT, OPPONENT, NEUTRAL = "#2a6fbb", "#c8402f", "0.45"


class Experiment(Bench):
    """A benchmark whose result is one JSON object, with curves and tables, and pictures beside it.

    Args:
        title: what the experiment is.
        description: for ``--help``.
        files: further options, each the path of a file, and their help.
        parts: further options, each choosing some of these names, by default all.
    """

    save_help = "also write the result as JSON, and pictures beside it, for docs/results/paper/"

    def __init__(
        self,
        title: str,
        description: str | None,
        files: Mapping[str, str] | None = None,
        parts: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(title, description, ("matplotlib",), files, parts)
        self._started = time.perf_counter()
        self._kept: dict[str, Any] = {}

    def keep(self, name: str, value: Any) -> None:
        """Put curves, tables or settings into the result: anything that JSON can say."""
        self._kept[name] = value

    def place(self, ending: str) -> Path | None:
        """Where a picture or page of this experiment goes, or ``None`` where nothing is saved."""
        save: Path | None = self.options.save
        return None if save is None else save.with_name(save.stem + ending)

    def draw(self, picture: Figure, ending: str = ".png") -> None:
        """Save a picture beside the result."""
        path = self.place(ending)
        if path is not None:
            picture.savefig(path, dpi=130)

    def saved(self) -> str:
        """The result as JSON."""
        result = {
            "title": self.title,
            **machine(self.packages),
            "command": self.command,
            "seconds": round(time.perf_counter() - self._started, 1),
            "bars": self.bars,
            "figures": self.figures,
            **({"tables": self.tables} if self.tables else {}),
            **self._kept,
        }
        return json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def pearson(one: NDArray[Any], other: NDArray[Any]) -> Array:
    """Pearson correlation along the last axis: (..., n), (..., n) to (...)."""
    one, other = (values - values.mean(-1, keepdims=True, dtype=np.float64) for values in (one, other))
    norms = np.sqrt(np.square(one).sum(-1) * np.square(other).sum(-1))
    return np.asarray((one * other).sum(-1) / norms, dtype=np.float64)


def spearman(one: NDArray[Any], other: NDArray[Any]) -> Array:
    """Pearson correlation of the ranks along the last axis, for values without ties."""
    return pearson(one.argsort(-1).argsort(-1), other.argsort(-1).argsort(-1))


def rounded(values: Any, digits: int = 4) -> Any:
    """Numbers as a nested list that a person can read."""
    return np.round(np.asarray(values, dtype=np.float64), digits).tolist()


def losses_and_slopes(
    model: nn.Module, loss: Loss, batch: tuple[Tensor, Tensor], direction: Mapping[str, Tensor]
) -> tuple[Array, Array]:
    """(n,) losses of a batch, and <grad l(w; z'), v> along a direction v in parameter space, by forward mode.

    In float64, whatever the model is in: a step changes small losses by less than float32 resolves.
    """
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    doubled = tuple(part.double() if part.is_floating_point() else part for part in batch)

    def losses(at: dict[str, Tensor]) -> Tensor:
        return loss(lambda inputs: functional_call(model, at, (inputs,)), doubled)

    values, slopes = jvp(losses, (weights,), ({name: v.double() for name, v in direction.items()},))
    return values.numpy(), slopes.numpy()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars inside a loop that reports its own progress."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
