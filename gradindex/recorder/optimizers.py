"""Optimizers, out of their wrappers, and what a step of theirs is made of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError

# Where wrappers keep the optimizer, or optimizers, inside.
_INNER = ("optimizer", "_optimizer", "optim", "base_optimizer", "inner_optimizer", "optimizers", "_optimizers")
# What a group holds that is no setting of its own: what it steps, and rates, which are recorded step by step.
_NO_SETTINGS = {"params", "param_names", "lr", "initial_lr", "scheduled_lr", "max_lr", "min_lr"}


def listened_to(given: Any, own: set[int]) -> list[torch.optim.Optimizer]:
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
    inside = {id(parameter) for one in found for parameter in held_by(one)}
    if found and inside <= own and {id(parameter) for parameter in held_by(optimizer)} & own <= inside:
        return found
    if isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_post_hooks"):
        return [optimizer]
    return found


def held_by(optimizer: Any) -> list[Tensor]:
    """The parameters in all groups of an optimizer."""
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def has_gradient(parameter: Tensor) -> bool:
    """Whether a step would change it."""
    return parameter.requires_grad and parameter.grad is not None


def rate_of(optimizer: Any, group: Mapping[str, Any]) -> float:
    """The learning rate of a group's next step.

    Raises:
        ArgumentError: it has none that is a finite number.
    """
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


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What else a group says of its steps: momentum, weight decay, betas and so on, as plain numbers and words."""
    found = {}
    for name, value in group.items():
        plain = [_plain(item) for item in value] if isinstance(value, (list, tuple)) else _plain(value)
        if name not in _NO_SETTINGS and plain is not None and not (isinstance(plain, list) and None in plain):
            found[name] = plain
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, (bool, int, float, str)) else None


def is_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step is that of ``torch.optim.SGD``, whose use of gradients is known."""
    kind = type(optimizer)
    return isinstance(optimizer, torch.optim.SGD) and inspect.unwrap(kind.step) is inspect.unwrap(torch.optim.SGD.step)


def share_after(group: Mapping[str, Any], before: float | None, factor: float) -> tuple[float | None, float]:
    """How much gradient is in SGD's momentum buffer after a step, and how much in the step itself.

    With c the factor by which clipping shrank this step's gradient g, the buffer is B = mu B + (1 - d) c g and starts
    as c g; the step is eta B, and with Nesterov's momentum eta (c g + mu B). Were all gradients equal, B would
    be a multiple of them: the first number returned is this multiple for B, the second for the step.

    Args:
        group: of the optimizer.
        before: the multiple in the buffer, ``None`` where there is no buffer yet.
        factor: c.
    """
    momentum = float(group["momentum"])
    if momentum == 0:
        return before, factor
    buffer = factor if before is None else momentum * before + (1 - float(group["dampening"])) * factor
    return buffer, factor + momentum * buffer if group["nesterov"] else buffer


def settled_share(group: Mapping[str, Any]) -> float:
    """What the buffer holds after many steps that were not clipped: (1 - d) / (1 - mu)."""
    momentum = float(group["momentum"])
    return (1 - float(group["dampening"])) / (1 - momentum) if momentum < 1 else 1.0
