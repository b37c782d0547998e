"""Saves checkpoints, with the step sizes that TracIn needs, from a user's own training loop."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ArgumentError, CheckpointError, GradIndexError
from .files import replacing

RECORD_KEY = "gradindex"
MODEL_KEY = "model"

# Where wrappers keep the optimizer, or optimizers, inside.
_INNER = ("optimizer", "_optimizer", "optim", "base_optimizer", "inner_optimizer", "optimizers", "_optimizers")
# Modules around a model, and under which name they hold it.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


class Recorder:
    """Record checkpoints and learning rates while a model trains.

    Three lines in a training loop::

        recorder = Recorder(model, optimizer, "checkpoints")
        for epoch in range(10):
            ...                      # the loop as it was: optimizer.step(), scheduler.step()
            recorder.save()

    Each call of ``save`` writes ``step_<n>.pt`` with the model's ``state_dict`` and, for each
    parameter that the optimizer holds, its learning rate at its latest step, the sum of its rates
    and the number of its steps since the previous ``save``. The rates are read when the optimizer
    steps, so any scheduler (or none) is followed; steps that a gradient scaler skips do not count,
    and neither do steps of parameters without a gradient (frozen or unused).

    Source: Pruthi et al. 2020 (arXiv:2002.08484), section 3.3: eta_i is the step size
    between checkpoints i-1 and i.

    Args:
        model: the model in training, also inside DistributedDataParallel or ``torch.compile``: names
            are saved without the prefixes that these add.
        optimizer: its optimizer, also wrapped (as accelerate does), or a list of several: a step is
            counted when one of them steps that has stepped since the latest step was counted, so that
            two that step in turn count as one. Every parameter must belong to ``model``.
        directory: where to write checkpoints; created if missing.
        second_moments: also save Adam's bias-corrected second moments.
        first_step: the number of steps already taken, when a training run is resumed.
        overwrite: delete an earlier training's ``step_*.pt`` in ``directory`` instead of
            refusing to mix two trainings.

    Raises:
        ArgumentError: the folder holds another training's checkpoints, or the optimizer
            holds parameters that are not the model's, has no learning rate, or is none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        directory: str | os.PathLike[str],
        *,
        second_moments: bool = False,
        first_step: int = 0,
        overwrite: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model is a {type(model).__name__}, but must be the torch.nn.Module in training.")
        self._model = model
        self._optimizers = _listened_to(optimizer, {id(parameter) for parameter in model.parameters()})
        self._check_that_all_are_the_models(ArgumentError)
        for one in self._optimizers:
            for group in one.param_groups:
                _rate(one, group)
        self._directory = Path(directory)
        self._second_moments = second_moments
        self._directory.mkdir(parents=True, exist_ok=True)
        earlier = [path for path in self._directory.glob("step_*.pt") if _step_of(path) > first_step]
        if first_step == 0:
            earlier = list(self._directory.glob("step_*.pt"))
        if earlier and not overwrite:
            raise ArgumentError(
                f"{self._directory} already holds {len(earlier)} checkpoints of another training. "
                "If this run resumes that training, pass first_step=; otherwise choose another folder, or pass "
                "overwrite=True to delete them."
            )
        for path in earlier:
            path.unlink()
        self.step = first_step
        # Since the previous save: what each parameter's steps were, and those of groups by (optimizer, number).
        self._steps: dict[Tensor, _Steps] = {}
        self._group_steps: dict[tuple[int, int], _Steps] = {}
        # Optimizers that stepped since the latest step was counted, and parameters with a gradient in a step under way.
        self._stepped: set[int] = set()
        self._begun: dict[int, set[Tensor]] = {}
        self._hooks = []
        for number, one in enumerate(self._optimizers):
            self._hooks.append(one.register_step_pre_hook(partial(self._before_step, number)))
            self._hooks.append(one.register_step_post_hook(partial(self._after_step, number)))

    def _before_step(self, number: int, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._begun[number] = {parameter for parameter in _held_by(optimizer) if _has_gradient(parameter)}

    def _after_step(self, number: int, optimizer: torch.optim.Optimizer, *_: object) -> None:
        begun = self._begun.pop(number, None)
        if begun is None:  # the step of a parent class inside a step, which told already
            return
        skipped = getattr(optimizer, "found_inf", None)  # how a gradient scaler tells a fused optimizer not to step
        if isinstance(skipped, Tensor) and bool(skipped):
            return
        none = _Steps()
        if number in self._stepped or not self._stepped:
            self.step += 1
            self._stepped = set()
        self._stepped.add(number)
        for place, group in enumerate(optimizer.param_groups):
            rate = _rate(optimizer, group)
            self._group_steps[number, place] = self._group_steps.get((number, place), none).and_one(rate)
            if rate == 0:
                continue
            for parameter in group["params"]:
                # A closure, as LBFGS has, computes gradients inside the step; other steps may clear them.
                if parameter in begun or _has_gradient(parameter):
                    self._steps[parameter] = self._steps.get(parameter, none).and_one(rate)

    def save(self, loss: float | None = None) -> Path:
        """Write a checkpoint of the current weights and return its path.

        Args:
            loss: the training loss, such as its mean over the epoch, which
                ``gradindex.checkpoint.by_loss_drop`` chooses checkpoints by.

        Raises:
            ArgumentError: the loss is not finite.
            CheckpointError: no optimizer step was taken since the last ``save``, second moments
                were asked for and the optimizer has none, or it holds parameters by now that are
                not the model's.
        """
        if loss is not None and not math.isfinite(loss):
            raise ArgumentError(
                f"loss is {loss} at step {self.step}, but must be finite. Omit it, or check why training diverged."
            )
        self._check_that_all_are_the_models(CheckpointError)
        if not self._group_steps:
            raise CheckpointError(
                f"No optimizer step was taken before Recorder.save() at step {self.step}, so there is no "
                "learning rate to record. Call save() after optimizer.step(); an optimizer that was made later needs "
                "a Recorder of its own, with first_step=."
            )
        record: dict[str, Any] = {"version": 1, "step": self.step, "groups": self._groups()}
        if loss is not None:
            record["loss"] = float(loss)
        if self._second_moments:
            record["second_moments"] = self._read_second_moments()
        strip = _without_wrappers(self._model)
        state = {
            strip(name): tensor.detach().cpu()
            for name, tensor in self._model.state_dict().items()
            if isinstance(tensor, Tensor)
        }
        path = self._directory / f"step_{self.step:08d}.pt"
        with replacing(path) as temporary:
            torch.save({MODEL_KEY: state, RECORD_KEY: record}, temporary)
        self._steps.clear()
        self._group_steps.clear()
        self._stepped.clear()
        return path

    def _names(self) -> dict[int, str]:
        """Names by the ids of parameters, as they are now: layers may have been added."""
        strip = _without_wrappers(self._model)
        return {id(parameter): strip(name) for name, parameter in self._model.named_parameters()}

    def _check_that_all_are_the_models(self, error: type[GradIndexError]) -> None:
        own = {id(parameter) for parameter in self._model.parameters()}
        foreign = sum(id(parameter) not in own for one in self._optimizers for parameter in _held_by(one))
        if foreign:
            raise error(
                f"The optimizer holds {foreign} parameters that are not the model's. "
                "Give Recorder the same model that the optimizer was made from (one module that holds all of them, or "
                "a Recorder for each model); an optimizer of copies in another precision cannot be recorded."
            )

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters with the same steps in the same group of an optimizer, together."""
        names, told = self._names(), set[Tensor]()
        groups: dict[tuple[int, int, _Steps], list[str]] = {}
        for number, one in enumerate(self._optimizers):
            for place, group in enumerate(one.param_groups):
                # What a group's steps were is kept of parameters that took none: a task may name them all the same.
                untaken = self._group_steps.get((number, place), _Steps(0, _rate(one, group)))
                for parameter in group["params"]:
                    if parameter not in told:
                        steps = self._steps.get(parameter, untaken._replace(taken=0))
                        groups.setdefault((number, place, steps), []).append(names[id(parameter)])
                        told.add(parameter)
        for parameter, steps in self._steps.items():  # those of groups that are gone
            if parameter not in told and id(parameter) in names:
                groups.setdefault((-1, -1, steps), []).append(names[id(parameter)])
        return [
            {
                "parameters": parameters,
                "learning_rate": steps.rate,
                "learning_rate_sum": steps.total,
                "steps": steps.taken,
            }
            for (_, _, steps), parameters in groups.items()
        ]

    def _read_second_moments(self) -> dict[str, Tensor]:
        """Adam's v / (1 - beta2^t) by parameter name, of parameters that took steps."""
        names, moments = self._names(), dict[str, Tensor]()
        for one in self._optimizers:
            for group in one.param_groups:
                for parameter in group["params"]:
                    state = one.state.get(parameter, {})
                    if not state and parameter not in self._steps:
                        continue
                    # Where the count of steps is kept, by Adam, fused Adam, and Adam without a schedule.
                    taken = state.get("step", group.get("step", group.get("k")))
                    if "exp_avg_sq" not in state or taken is None or len(group.get("betas", ())) != 2:
                        raise CheckpointError(
                            f"{type(one).__name__} keeps no second moments (exp_avg_sq) for "
                            f"{names[id(parameter)]}. Use an optimizer of the Adam family, or second_moments=False."
                        )
                    correction = 1.0 - float(group["betas"][1]) ** float(taken)
                    moments[names[id(parameter)]] = (state["exp_avg_sq"] / correction).detach().cpu()
        return moments

    def close(self) -> None:
        """Stop listening to the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Steps(NamedTuple):
    """How many steps there were, the rate at the latest one, and the sum of rates."""

    taken: int = 0
    rate: float = 0.0
    total: float = 0.0

    def and_one(self, rate: float) -> _Steps:
        return _Steps(self.taken + 1, rate, self.total + rate)


def _listened_to(given: Any, own: set[int]) -> list[torch.optim.Optimizer]:
    """The optimizers that really step, out of their wrappers, each once.

    Args:
        given: an optimizer, or several.
        own: ids of the model's parameters.

    Raises:
        ArgumentError: what was given is no optimizer.
    """
    several = list(given.values()) if isinstance(given, Mapping) else given
    found: dict[int, torch.optim.Optimizer] = {}
    for one in several if isinstance(several, (list, tuple)) else [several]:
        inside = _inside(one, own, ())
        if not inside:
            raise ArgumentError(
                f"optimizer is a {type(one).__name__} whose steps cannot be observed, but must be a "
                "torch.optim.Optimizer, a wrapper around one, or a list of them."
            )
        found.update({id(optimizer): optimizer for optimizer in inside})
    if not found:
        raise ArgumentError("optimizer is an empty list. Give at least one.")
    return list(found.values())


def _inside(optimizer: Any, own: set[int], above: tuple[Any, ...]) -> list[torch.optim.Optimizer]:
    """The innermost optimizers, if they hold all of the model's parameters that their wrapper holds.

    A wrapper's own ``step`` may skip. An optimizer that is split among processes holds a part of the parameters, and
    one of copies in another precision holds none of the model's: there the wrapper itself is listened to.
    """
    found: list[torch.optim.Optimizer] = []
    for name in _INNER:
        inner = getattr(optimizer, name, None)
        inner = list(inner.values()) if isinstance(inner, Mapping) else inner
        for one in inner if isinstance(inner, (list, tuple)) else [inner]:
            if hasattr(one, "param_groups") and not any(one is other for other in (*above, optimizer)):
                found += _inside(one, own, (*above, optimizer))
        if found:
            break
    inside = {id(parameter) for one in found for parameter in _held_by(one)}
    if found and inside <= own and {id(parameter) for parameter in _held_by(optimizer)} & own <= inside:
        return found
    if isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_post_hooks"):
        return [optimizer]
    return found


def _held_by(optimizer: Any) -> list[Tensor]:
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.grad is not None


def _rate(optimizer: Any, group: Mapping[str, Any]) -> float:
    # Optimizers without a schedule (Defazio et al. 2024) warm up by themselves and tell the rate in use.
    given = group.get("scheduled_lr", group.get("lr"))
    try:
        rate = float(given)
    except (TypeError, ValueError, RuntimeError):
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise ArgumentError(
            f"{type(optimizer).__name__} has the learning rate {given!r}, but Recorder needs a finite number, not "
            "below 0. Give the optimizer one (lr=), or save checkpoints yourself: find_checkpoints(learning_rate=...)."
        )
    return rate


def _without_wrappers(model: nn.Module) -> Callable[[str], str]:
    """Takes out of a name of the model what DistributedDataParallel and torch.compile put in."""
    inserted = [
        (f"{path}." if path else "", f"{_WRAPPERS[type(module).__name__]}.")
        for path, module in model.named_modules()
        if type(module).__name__ in _WRAPPERS
    ]

    def strip(name: str) -> str:
        for path, part in reversed(inserted):  # the innermost first
            if name.startswith(path + part):
                name = path + name[len(path + part) :]
        return name

    return strip


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdigit() else 0


def recorded_groups(record: dict[str, Any], field: str) -> dict[str, float]:
    """Parameter name to the recorded number ``field`` of its group."""
    groups: Iterable[dict[str, Any]] = record["groups"]
    return {name: float(group[field]) for group in groups for name in group["parameters"]}


def recorded_training(record: dict[str, Any]) -> dict[str, bool | None]:
    """Whether each parameter that the optimizer held took a step since the previous ``save``.

    ``None`` where records do not tell, those of earlier versions: the optimizer held it and had a rate for it.
    """
    found: dict[str, bool | None] = {}
    for group in record["groups"]:
        took: bool | None = group["steps"] > 0 if "steps" in group else None
        if group["learning_rate"] == group["learning_rate_sum"] == 0:
            took = False
        found |= dict.fromkeys(group["parameters"], took)
    return found
