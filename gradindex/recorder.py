"""Saves checkpoints, with the step sizes that TracIn needs, from a user's own training loop."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, CheckpointError
from .files import replacing

RECORD_KEY = "gradindex"
MODEL_KEY = "model"


class Recorder:
    """Record checkpoints and learning rates while a model trains.

    Three lines in a training loop::

        recorder = Recorder(model, optimizer, "checkpoints")
        for epoch in range(10):
            ...                      # the loop as it was: optimizer.step(), scheduler.step()
            recorder.save()

    Each call of ``save`` writes ``step_<n>.pt`` with the model's ``state_dict``, the
    learning rate of each parameter group at the latest step, and its sum over the steps
    since the previous ``save``. The rates are read when the optimizer steps, so any
    scheduler (or none) is followed, and steps that a gradient scaler skips do not count.

    Source: Pruthi et al. 2020 (arXiv:2002.08484), section 3.3: eta_i is the step size
    between checkpoints i-1 and i.

    Args:
        model: the model in training.
        optimizer: its optimizer; every parameter of it must belong to ``model``.
        directory: where checkpoints go; made if missing.
        second_moments: also save Adam's bias-corrected second moments.
        first_step: the number of steps already taken, when a training goes on.
        overwrite: delete an earlier training's ``step_*.pt`` in ``directory`` instead of
            refusing to mix two trainings.

    Raises:
        ArgumentError: the folder holds another training's checkpoints, or the optimizer
            holds parameters that are not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        directory: str | os.PathLike[str],
        *,
        second_moments: bool = False,
        first_step: int = 0,
        overwrite: bool = False,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._directory = Path(directory)
        self._second_moments = second_moments
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        foreign = sum(id(p) not in self._names for group in optimizer.param_groups for p in group["params"])
        if foreign:
            raise ArgumentError(
                f"The optimizer holds {foreign} parameters that are not the model's. "
                "Give Recorder the same model that the optimizer was made from."
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        earlier = [path for path in self._directory.glob("step_*.pt") if _step_of(path) > first_step]
        if first_step == 0:
            earlier = list(self._directory.glob("step_*.pt"))
        if earlier and not overwrite:
            raise ArgumentError(
                f"{self._directory} already holds {len(earlier)} checkpoints of another training. "
                "If this training goes on from there, pass first_step=; else choose another folder, or pass "
                "overwrite=True to delete them."
            )
        for path in earlier:
            path.unlink()
        self.step = first_step
        self._rates: dict[int, float] = {}
        self._sums: dict[int, float] = {}
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.step += 1
        for number, group in enumerate(optimizer.param_groups):
            rate = float(group["lr"])
            self._rates[number] = rate
            self._sums[number] = self._sums.get(number, 0.0) + rate

    def save(self, loss: float | None = None) -> Path:
        """Write a checkpoint of the present weights and return its path.

        Args:
            loss: the training loss, such as its mean over the epoch, which
                ``gradindex.checkpoint.by_loss_drop`` chooses checkpoints by.

        Raises:
            ArgumentError: the loss is not finite.
            CheckpointError: no optimizer step was taken since the last ``save``, or second
                moments were asked for and the optimizer has none.
        """
        if loss is not None and not math.isfinite(loss):
            raise ArgumentError(
                f"loss is {loss} at step {self.step}, but must be finite. Leave it out, or see why training diverged."
            )
        if not self._sums:
            raise CheckpointError(
                f"No optimizer step was taken before Recorder.save() at step {self.step}, so there is no "
                "learning rate to record. Call save() after optimizer.step()."
            )
        groups = [
            {
                "parameters": [self._names[id(p)] for p in group["params"]],
                "learning_rate": self._rates.get(number, 0.0),
                "learning_rate_sum": self._sums.get(number, 0.0),
            }
            for number, group in enumerate(self._optimizer.param_groups)
        ]
        record: dict[str, Any] = {"version": 1, "step": self.step, "groups": groups}
        if loss is not None:
            record["loss"] = float(loss)
        if self._second_moments:
            record["second_moments"] = self._read_second_moments()
        state = {name: tensor.detach().cpu() for name, tensor in self._model.state_dict().items()}
        path = self._directory / f"step_{self.step:08d}.pt"
        with replacing(path) as temporary:
            torch.save({MODEL_KEY: state, RECORD_KEY: record}, temporary)
        self._sums.clear()
        return path

    def _read_second_moments(self) -> dict[str, Tensor]:
        """Adam's v / (1 - beta2^t) by parameter name."""
        moments: dict[str, Tensor] = {}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                if "exp_avg_sq" not in state:
                    raise CheckpointError(
                        f"{type(self._optimizer).__name__} keeps no second moments (exp_avg_sq) for "
                        f"{self._names[id(parameter)]}. Use an optimizer of the Adam family, or second_moments=False."
                    )
                correction = 1.0 - group["betas"][1] ** float(state["step"])
                moments[self._names[id(parameter)]] = (state["exp_avg_sq"] / correction).detach().cpu()
        return moments

    def close(self) -> None:
        """Stop listening to the optimizer."""
        self._hook.remove()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdigit() else 0


def recorded_groups(record: dict[str, Any], field: str) -> dict[str, float]:
    """Parameter name to the recorded number ``field`` of its group."""
    groups: Iterable[dict[str, Any]] = record["groups"]
    return {name: float(group[field]) for group in groups for name in group["parameters"]}
