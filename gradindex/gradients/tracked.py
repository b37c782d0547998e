"""What is tracked by default is what was trained; what is left out is said, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import TaskError
from ..task import Task
from .layers import refuse_without_gradient, select_parameters

# Names of parameters that are said; of more, there is only the number.
_FIRST = 3

# Whether the parameters that a checkpoint's optimizer held took steps before it; see recorder.recorded_training.
Record = Mapping[str, bool | None]


@dataclass(frozen=True)
class Tracked:
    """The parameters whose gradients are computed.

    Args:
        parameters: their names, in the model's order.
        learning_rates: eta by parameter, for each checkpoint.
        described: what is tracked and what is left out, as JSON, for people (docs/format.md).
    """

    parameters: list[str]
    learning_rates: list[dict[str, float]]
    described: dict[str, Any]


def choose(task: Task) -> Tracked:
    """What a task tracks, with its weights.

    Patterns are taken as they are. Without them, every parameter that took a step before one of the checkpoints: by the
    checkpoint's record, or where it has none (or an earlier version's, which only says what the optimizer held) by
    ``requires_grad``. In a model that was frozen as a whole, to be used, the records alone tell.

    A parameter that took no step before a checkpoint has the weight 0 there. One that took none before any is tracked
    only where a pattern names it, and then with the checkpoint's weights.

    Raises:
        TaskError: a pattern matches nothing, or nothing was trained as far as can be told.
        CheckpointError: a checkpoint has no weight for a parameter.
    """
    training = _Training(task)
    if task.layer_patterns is None:
        names = [name for name in training.names if training.reason(name) is None]
        if not names:
            raise TaskError(training.nothing())
    else:
        names = select_parameters(task.model, task.layer_patterns)
    refuse_without_gradient(task.model, names)
    return Tracked(names, training.rates(names), training.described(names))


def continued(task: Task, names: Sequence[str], first: int) -> Tracked:
    """For the checkpoints from number ``first`` on: what the store of those before it tracks.

    Args:
        task: with all checkpoints.
        names: the parameters of the store.
        first: how many checkpoints the store has.

    Raises:
        TaskError: the later checkpoints trained parameters that the store does not track.
    """
    training, whole = _Training(task), choose(task)
    new = [name for name in whole.parameters if name not in set(names)]
    if new:
        raise TaskError(
            f"The new checkpoints trained {_first(new)}, which the store does not track. Build a new store."
        )
    return Tracked(list(names), training.rates(names)[first:], training.described(names))


class _Training:
    """What is known about which parameters were trained before each of a task's checkpoints."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._parameters = dict(task.model.named_parameters())
        self.names = list(self._parameters)
        self._trainable = {name for name, parameter in self._parameters.items() if parameter.requires_grad}
        aliases = _aliases(task.model)
        self._records = [
            _renamed(checkpoint.recorded_training(list(aliases), task.model), aliases)
            for checkpoint in task.checkpoints
        ]
        self._held = {name for record in self._records if record for name in record}
        recorded = {name for name in self.names if any(self._took(record, name) for record in self._records if record)}
        # Where a checkpoint has no record, and the model no flags either, what other checkpoints' records say.
        self._else = self._trainable or recorded
        self._trained = {name for name in self.names if any(self._took(record, name) for record in self._records)}

    def _took(self, record: Record | None, name: str) -> bool:
        if record is None:
            return name in self._else
        took = record.get(name, False)
        return (name in self._trainable or not self._trainable) if took is None else took

    def reason(self, name: str) -> str | None:
        """Why a parameter counts as not trained; ``None`` if it was."""
        if name in self._trained:
            return None
        records = [record for record in self._records if record is not None]
        if not records or any(record.get(name, False) is None for record in records):
            return "frozen: requires_grad is False"
        if name in self._held:
            return "no step in the recorded training"
        return "not in the recorded optimizer"

    def nothing(self) -> str:
        """What to tell a person where no parameter was trained."""
        if all(record is None for record in self._records):
            return (
                "No parameter of the model has requires_grad, and no checkpoint was saved by gradindex.Recorder, so it "
                "is unknown what was trained. Set requires_grad on what was, or give Task layers='*' for all "
                "parameters (or patterns such as layers='head')."
            )
        return (
            "None of the model's parameters took a step in the recorded training, so there is nothing to track. Check "
            "that the task's model has the names of the recorded one, or name what to track, with layers= ('*' is all)."
        )

    def rates(self, names: Sequence[str]) -> list[dict[str, float]]:
        """Eta of parameters, for each checkpoint."""
        by_checkpoint = []
        for checkpoint, record in zip(self._task.checkpoints, self._records, strict=True):
            idle = {name for name in names if name in self._trained and not self._took(record, name)}
            if record is not None:  # held by another checkpoint's optimizer, but not by this one's
                idle |= {name for name in names if name in self._held and name not in record}
            known = checkpoint.learning_rates([name for name in names if name not in idle], self._task.model)
            by_checkpoint.append({name: known.get(name, 0.0) for name in names})
        return by_checkpoint

    def described(self, names: Sequence[str]) -> dict[str, Any]:
        """What is tracked, as JSON."""
        chosen, patterns = set(names), self._task.layer_patterns
        left_out: dict[str, list[str]] = {}
        for name in self.names:
            if name not in chosen:
                reason = self.reason(name) if patterns is None else "not named by layers="
                left_out.setdefault(str(reason), []).append(name)
        noted: dict[str, list[str]] = {}
        for name in names:
            reason = self.reason(name)
            if reason is not None:
                noted.setdefault(f"{reason}, but named by layers=", []).append(name)
            elif name not in self._trainable:
                noted.setdefault("requires_grad is False, but it took steps in the recorded training", []).append(name)
        return {
            "layers": None if patterns is None else list(patterns),
            **self._counted(names),
            "left_out": [self._summary(why, of) for why, of in left_out.items()],
            "noted": [self._summary(why, of) for why, of in noted.items()],
        }

    def _counted(self, names: Sequence[str]) -> dict[str, int]:
        return {"parameters": len(names), "numbers": sum(self._parameters[name].numel() for name in names)}

    def _summary(self, why: str, names: Sequence[str]) -> dict[str, Any]:
        return {"why": why, **self._counted(names), "first": list(names[:_FIRST])}


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of each parameter, to the first one, under which it is listed."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _renamed(record: Record | None, aliases: Mapping[str, str]) -> Record | None:
    """A record by the names of the model's parameters; parameters that it does not have are left out."""
    if record is None:
        return None
    return {aliases[name]: took for name, took in record.items() if name in aliases}


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FIRST} more" if len(names) > _FIRST else ""
    return f"{', '.join(names[:_FIRST])}{more}"
