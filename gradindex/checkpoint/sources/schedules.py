"""Learning rates by step: from what a training logged, or from the state of its scheduler.

A rate stands at the step that used it, counted from 1. A scheduler that was saved after its own step holds the rate of
the *next* step of the optimizer.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import lr_scheduler

# Schedulers whose arguments their state holds, and by which keys each is known.
_REPLAYED: dict[type[Any], set[str]] = {
    lr_scheduler.StepLR: {"step_size", "gamma"},
    lr_scheduler.MultiStepLR: {"milestones", "gamma"},
    lr_scheduler.CosineAnnealingLR: {"T_max", "eta_min"},
    lr_scheduler.CosineAnnealingWarmRestarts: {"T_0", "T_mult", "eta_min"},
    lr_scheduler.LinearLR: {"start_factor", "end_factor", "total_iters"},
    lr_scheduler.ConstantLR: {"factor", "total_iters"},
    lr_scheduler.PolynomialLR: {"total_iters", "power"},
    lr_scheduler.OneCycleLR: {"total_steps", "_schedule_phases"},
    lr_scheduler.ExponentialLR: {"gamma"},
}
_LONGEST = 10_000_000


class Schedule:
    """The rates of one group of parameters, known at some steps and interpolated between them.

    Args:
        rates: by the step that used them.
        ceiling: no rate is above, where it is known.
    """

    def __init__(self, rates: Mapping[int, float], ceiling: float = math.inf) -> None:
        self._steps = np.array(sorted(rates), dtype=np.float64)
        self._rates = np.array([rates[step] for step in sorted(rates)], dtype=np.float64)
        self._known, self._ceiling = dict(rates), ceiling

    def __bool__(self) -> bool:
        return bool(self._known)

    def knows(self, step: int) -> bool:
        """Whether the rate of ``step`` was read and not interpolated."""
        return step in self._known

    def at(self, step: int) -> float:
        """The rate that ``step`` used: known, on the line between its neighbours, or on the line of the nearest two."""
        return self._known.get(step, float(self._all(np.array([float(step)]))[0]))

    def total(self, after: int, upto: int) -> float:
        """The sum of the rates of the steps from ``after + 1`` to ``upto``."""
        rates = self._all(np.arange(after + 1, upto + 1, dtype=np.float64))
        return float(math.fsum(rates.tolist()))

    def _all(self, steps: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        rates = np.interp(steps, self._steps, self._rates)
        if len(self._steps) > 1:
            for end, beside, outside in ((0, 1, steps < self._steps[0]), (-1, -2, steps > self._steps[-1])):
                slope = (self._rates[end] - self._rates[beside]) / (self._steps[end] - self._steps[beside])
                line = self._rates[end] + slope * (steps - self._steps[end])
                rates = np.where(outside, np.clip(line, 0.0, self._ceiling), rates)
        return np.asarray(rates)


def replayed(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[list[float]] | None:
    """All rates of each group that torch's scheduler has set up to now, the first as it was made.

    Entry i is the rate after i steps of the scheduler, so the one that step i + 1 of the optimizer uses if both step in
    turn. ``None`` where the scheduler keeps functions, is of another library, or what it replays is not what its state
    says it reached.

    Args:
        state: the scheduler's ``state_dict()``.
        groups: of the optimizer's ``state_dict()``.
    """
    count = state.get("last_epoch")
    last = state.get("_last_lr")
    base = state.get("base_lrs")
    if not (
        isinstance(count, int)
        and 0 <= count <= _LONGEST
        and isinstance(last, list)
        and isinstance(base, list)
        and len(base) == len(last)
    ):
        return None
    kind = next((kind for kind, keys in _REPLAYED.items() if keys <= state.keys()), None)
    if kind is None or "lr_lambdas" in state or "_schedulers" in state:
        return None
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in base]
    kept = [{key: value for key, value in group.items() if key.endswith("_lr")} for group in groups]
    optimizer = torch.optim.SGD(
        [
            {"params": [parameter], "lr": float(rate), **(kept[number] if len(kept) == len(base) else {})}
            for number, (parameter, rate) in enumerate(zip(parameters, base, strict=True))
        ],
        lr=0.0,
    )
    for group, rate in zip(optimizer.param_groups, base, strict=True):
        group["initial_lr"] = float(rate)
    found: list[list[float]] = [[] for _ in base]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no step of the optimizer came between
            scheduler = _made(kind, state, optimizer)
            for number in range(count + 1):
                for rates, group in zip(found, optimizer.param_groups, strict=True):
                    rates.append(float(group["lr"]))
                if number < count:
                    scheduler.step()
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
        return None  # a state that is not this scheduler's
    if not np.allclose([rates[-1] for rates in found], [float(rate) for rate in last], rtol=1e-5, atol=1e-12):
        return None
    return found


def _made(kind: type[Any], state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    if kind is lr_scheduler.OneCycleLR:
        for group in optimizer.param_groups:
            group.setdefault("max_lr", group["lr"])
        own = [dict(group) for group in optimizer.param_groups]
        made = lr_scheduler.OneCycleLR(
            optimizer, [g["max_lr"] for g in optimizer.param_groups], int(state["total_steps"]), cycle_momentum=False
        )
        # Its own phases instead of those of the default arguments.
        made.load_state_dict({**state, "last_epoch": 0, "_step_count": 1, "cycle_momentum": False})
        for group, before in zip(optimizer.param_groups, own, strict=True):
            group |= {name: value for name, value in before.items() if name.endswith("_lr")}
            group["lr"] = group["initial_lr"]
        return made
    takes = [name for name in inspect.signature(kind).parameters if name != "last_epoch" and name in state]
    given = {name: state[name] for name in takes}
    if "milestones" in given:
        given["milestones"] = sorted(given["milestones"].elements())
    return kind(optimizer, **given)
