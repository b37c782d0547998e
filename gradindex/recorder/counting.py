"""The steps of each parameter since the previous checkpoint, counted as optimizers take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .optimizers import has_gradient, held_by, is_sgd, rate_of, settings_of, settled_share, share_after


class Steps(NamedTuple):
    """Of a parameter, or of a group: how many steps, the rate at the latest one, and sums over them.

    Args:
        taken: how many.
        rate: at the latest one.
        total: the sum of rates.
        factors: the sum of the factors by which clipping shrank the gradients.
        effective: the sum of rates times the share of gradients in the step, see :func:`share_after`.
    """

    taken: int = 0
    rate: float = 0.0
    total: float = 0.0
    factors: float = 0.0
    effective: float = 0.0

    def and_one(self, rate: float, factor: float, share: float) -> Steps:
        """With another step."""
        return Steps(self.taken + 1, rate, self.total + rate, self.factors + factor, self.effective + rate * share)


class StepCounter:
    """Listens to optimizers.

    A step counts when an optimizer steps that has stepped since the latest one was counted, so that several that step
    in turn count as one.

    Args:
        optimizers: those that really step.
        first_step: how many steps were taken before.

    Attributes:
        step: how many steps were taken in all.
        clipping_told: whether a factor of clipping was ever told.
        clipping_unknown: whether gradients were clipped by factors that nobody told.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], first_step: int) -> None:
        self._optimizers = optimizers
        self.step = first_step
        self.clipping_told = self.clipping_unknown = False
        # Since the previous save: what each parameter's steps were, and those of groups by (optimizer, number).
        self._steps: dict[Tensor, Steps] = {}
        self._group_steps: dict[tuple[int, int], Steps] = {}
        # Settings of groups as the latest step used them: schedules change momentum after a step.
        self._settings: dict[tuple[int, int], dict[str, Any]] = {}
        # How much gradient is in each momentum buffer; clipping of the coming step, by optimizer.
        self._shares: dict[Tensor, float] = {}
        self._factors: dict[int, float] = {}
        # Of the latest step, for a factor that is told late: its parameters, SGD's settings, what buffers held, rates.
        self._latest: list[tuple[Tensor, Mapping[str, Any] | None, float | None, float]] = []
        # Optimizers that stepped since the latest step was counted, and parameters with a gradient in a step under way.
        self._stepped: set[int] = set()
        self._begun: dict[int, set[Tensor]] = {}
        self._hooks = []
        for number, one in enumerate(optimizers):
            self._hooks.append(one.register_step_pre_hook(partial(self._before_step, number)))
            self._hooks.append(one.register_step_post_hook(partial(self._after_step, number)))

    def _before_step(self, number: int, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._begun[number] = {parameter for parameter in held_by(optimizer) if has_gradient(parameter)}
        if is_sgd(optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if optimizer.state.get(parameter, {}).get("momentum_buffer") is None:
                        self._shares.pop(parameter, None)  # it begins, or its state was cleared
                    elif parameter not in self._shares:
                        self._shares[parameter] = settled_share(group)

    def _after_step(self, number: int, optimizer: torch.optim.Optimizer, *_: object) -> None:
        begun = self._begun.pop(number, None)
        if begun is None:  # the step of a parent class inside a step, which told already
            return
        factor = self._factors.pop(number, 1.0)
        skipped = getattr(optimizer, "found_inf", None)  # how a gradient scaler tells a fused optimizer not to step
        if isinstance(skipped, Tensor) and bool(skipped):
            return
        none, sgd = Steps(), is_sgd(optimizer)
        if number in self._stepped or not self._stepped:
            self.step += 1
            self._stepped, self._latest = set(), []
        self._stepped.add(number)
        for place, group in enumerate(optimizer.param_groups):
            rate = rate_of(optimizer, group)
            self._settings[number, place] = settings_of(group)
            momentum = {name: group[name] for name in ("momentum", "dampening", "nesterov")} if sgd else None
            self._group_steps[number, place] = self._group_steps.get((number, place), none).and_one(rate, factor, 0.0)
            for parameter in group["params"]:
                # A closure, as LBFGS has, computes gradients inside the step; other steps may clear them.
                if parameter not in begun and not has_gradient(parameter):
                    continue
                share, before = factor, self._shares.get(parameter)
                self._latest.append((parameter, momentum, before, rate))
                if sgd:
                    buffer, share = share_after(group, before, factor)
                    if buffer is not None:
                        self._shares[parameter] = buffer
                if rate != 0:
                    self._steps[parameter] = self._steps.get(parameter, none).and_one(rate, factor, share)

    def clipped(self, factor: float) -> None:
        """Clipping shrank the gradients of each optimizer's coming step by this factor."""
        self.clipping_told = True
        self._factors = dict.fromkeys(range(len(self._optimizers)), factor)

    def was_clipped(self, factor: float) -> None:
        """Clipping shrank the gradients of the latest step, which nobody had told, by this factor."""
        self.clipping_told = True
        for parameter, group, before, rate in self._latest:
            share, whole = factor, 1.0
            if group is not None:
                whole = share_after(group, before, 1.0)[1]
                buffer, share = share_after(group, before, factor)
                if buffer is not None:
                    self._shares[parameter] = buffer
            if rate != 0:
                steps = self._steps[parameter]
                self._steps[parameter] = steps._replace(
                    factors=steps.factors + factor - 1, effective=steps.effective + rate * (share - whole)
                )
        self._latest = []

    @property
    def any_taken(self) -> bool:
        """Whether there was a step since the previous checkpoint."""
        return bool(self._group_steps)

    def stepped(self) -> set[Tensor]:
        """The parameters that took steps since the previous checkpoint."""
        return set(self._steps)

    def groups(self, names: Mapping[int, str]) -> list[tuple[dict[str, Any], list[tuple[str, Steps, bool]]]]:
        """Of each group of each optimizer its settings, and its parameters' names, steps, and whether they lie here.

        A parameter is not here when all of its shards are another process's. Groups that are gone come last, as one.
        """
        found, told = [], set[Tensor]()
        for number, one in enumerate(self._optimizers):
            for place, group in enumerate(one.param_groups):
                # What a group's steps were is kept of parameters that took none: a task may name them all the same.
                untaken = self._group_steps.get((number, place), Steps(0, rate_of(one, group)))
                untaken = untaken._replace(taken=0, factors=0.0, effective=0.0)
                settings: dict[str, Any] = {
                    "optimizer": type(one).__name__,
                    "settings": self._settings.get((number, place), {}),
                }
                if is_sgd(one):
                    settings["effective"] = True
                own = [parameter for parameter in group["params"] if parameter not in told]
                told.update(own)
                found.append((settings, [(names[id(p)], self._steps.get(p, untaken), p.numel() > 0) for p in own]))
        gone = [(p, steps) for p, steps in self._steps.items() if p not in told and id(p) in names]
        if gone:
            found.append(({}, [(names[id(p)], steps, p.numel() > 0) for p, steps in gone]))
        return found

    def clear(self) -> None:
        """Begin the span of another checkpoint."""
        self._steps.clear()
        self._group_steps.clear()
        self._stepped.clear()
        self._latest.clear()

    def state_dict(self, names: Mapping[int, str]) -> dict[str, Any]:
        """What was counted, as JSON can hold it."""
        return {
            "step": self.step,
            "clipping_told": self.clipping_told,
            "clipping_unknown": self.clipping_unknown,
            "stepped": sorted(self._stepped),
            "steps": {names[id(p)]: list(steps) for p, steps in self._steps.items() if id(p) in names},
            "group_steps": [[*where, *steps] for where, steps in self._group_steps.items()],
            "shares": {names[id(p)]: share for p, share in self._shares.items() if id(p) in names},
        }

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[int, str]) -> None:
        """Go on from what another counter gave."""
        by_name: dict[str, Tensor] = {
            names[id(parameter)]: parameter for one in self._optimizers for parameter in held_by(one)
        }
        self.step, self.clipping_told = state["step"], state["clipping_told"]
        self.clipping_unknown |= state.get("clipping_unknown", False)
        self._stepped = set(state["stepped"])
        self._steps = {by_name[name]: _as_steps(values) for name, values in state["steps"].items() if name in by_name}
        self._group_steps = {(number, place): _as_steps(rest) for number, place, *rest in state["group_steps"]}
        self._shares = {by_name[name]: float(share) for name, share in state["shares"].items() if name in by_name}

    def close(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()


def _as_steps(values: Iterable[Any]) -> Steps:
    taken, *sums = values
    return Steps(int(taken), *map(float, sums))
