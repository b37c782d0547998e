"""Learning rates as people have them: a number, text, one for each checkpoint, by step, by parameter or its module."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat, TypeAlias

from torch import Tensor

from ..errors import ArgumentError, CheckpointError

Number: TypeAlias = SupportsFloat | str
Rate: TypeAlias = "Number | Sequence[Number] | Mapping[str, Number]"

_FORMS = "Give a number, {'head.*': 0.1, '*': 0.01}, or to find_checkpoints a list or {step: rate}."


def as_rate(where: str | os.PathLike[str], given: Any) -> float | dict[str, float]:
    """The rate of one checkpoint, for all parameters or by name.

    Args:
        where: the checkpoint, for errors.
        given: a number, text such as ``"1e-3"``, a tensor or list of one number, or a mapping of these.

    Raises:
        ArgumentError: it is none of these, not finite, or negative.
    """
    if isinstance(given, Mapping):
        if not given:
            raise ArgumentError(f"{where} has an empty mapping of learning rates. {_FORMS}")
        return {str(name): _number(where, rate) for name, rate in given.items()}
    return _number(where, given)


def as_rates(given: Any, steps: Sequence[int], paths: Sequence[str | os.PathLike[str]]) -> list[Any]:
    """What stands for each checkpoint's rate, of one that was given for all of them.

    Args:
        given: what :func:`as_rate` takes, a function of the step, or one of these for each checkpoint: in the order of
            steps, or by step.
        steps: of the checkpoints, ascending.
        paths: of the checkpoints.

    Raises:
        ArgumentError: there is not one for each checkpoint.
    """
    if callable(given):
        return [given(step) for step in steps]
    if isinstance(given, Mapping) and given and all(_is_step(key) for key in given):
        by_step = {int(key): rate for key, rate in given.items()}
        missing = [step for step in steps if step not in by_step]
        if missing:
            raise ArgumentError(
                f"learning_rate has steps {_some(sorted(by_step))}, but {paths[steps.index(missing[0])]} has step "
                f"{missing[0]}. Give a rate for the step of each checkpoint."
            )
        return [by_step[step] for step in steps]
    values = _listed(given)
    if values is None:
        return [given] * len(steps)
    if len(values) != len(steps):
        raise ArgumentError(
            f"learning_rate is a list of {len(values)}, but there are {len(steps)} checkpoints. Give one rate for each "
            "in the order of their steps, one number for all, or {step: rate}."
        )
    return values


def rate_for(path: str | os.PathLike[str], rates: Mapping[str, float], name: str, way_out: str) -> float:
    """The rate of a parameter: by its name, else by the closest pattern of its name or of a module that it lies in.

    Raises:
        CheckpointError: none matches, or two that are as close say different rates.
    """
    if name in rates:
        return float(rates[name])
    matches = {
        pattern: rate
        for pattern, rate in rates.items()
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
    }
    if not matches:
        raise CheckpointError(
            f"{path} has learning rates for {len(rates)} parameters, but none for {name}. "
            f"Exclude it with layers=, or: {way_out}"
        )
    closest = max(map(_closeness, matches))
    found = {pattern: rate for pattern, rate in matches.items() if _closeness(pattern) == closest}
    if len(set(found.values())) > 1:
        raise CheckpointError(
            f"{path} has learning rates {' and '.join(f'{rate:g} ({pattern})' for pattern, rate in found.items())} for "
            f"{name}. Give its rate by its full name."
        )
    return float(next(iter(found.values())))


def negligible(paths: Sequence[str | os.PathLike[str]], rates: Sequence[Mapping[str, float]]) -> list[str]:
    """What to tell of checkpoints that hardly count, such as the last one of a schedule that ends at 0.

    Args:
        paths: of the checkpoints.
        rates: eta of each, by parameter.

    Raises:
        CheckpointError: none counts.
    """
    largest = [max(each.values(), default=0.0) for each in rates]
    way_out = (
        "Give the rates of the steps before with learning_rate= (a list or {step: rate}), choose "
        "weighting='integrated' where a schedule was recorded or logged, or 'uniform'"
    )
    if not any(largest):
        raise CheckpointError(
            f"{paths[0]}{and_others(len(paths) - 1)} has learning rate 0, so all scores would be 0. {way_out}."
        )
    return [
        f"{path} has learning rate {rate:.3g}, below 1/1000 of the largest, {max(largest):.3g}, so it hardly "
        f"counts. {way_out}, or drop it."
        for path, rate in zip(paths, largest, strict=True)
        if rate < 1e-3 * max(largest)
    ]


def and_others(count: int) -> str:
    """How a sentence on the first of several goes on."""
    return "" if count <= 0 else f" (like {count} other{'s' if count > 1 else ''})"


def _closeness(pattern: str) -> int:
    return sum(letter not in "*?[]" for letter in pattern)


def _is_step(key: Any) -> bool:
    if isinstance(key, str):
        return key.isascii() and key.isdigit()
    return not isinstance(key, bool | float) and hasattr(key, "__index__")


def _listed(given: Any) -> list[Any] | None:
    """The members of a list, tuple or array; ``None`` of what is one number or a mapping."""
    if isinstance(given, str | bytes | Mapping):
        return None
    if isinstance(given, Tensor) or hasattr(given, "__array__"):
        found = given.tolist() if hasattr(given, "tolist") else list(given)
        return found if isinstance(found, list) else None
    return list(given) if hasattr(given, "__len__") else None


def _number(where: str | os.PathLike[str], given: Any) -> float:
    values = _listed(given)
    if values is not None:
        if len(values) != 1:
            raise ArgumentError(f"{where} has {len(values)} learning rates, but is a single checkpoint. {_FORMS}")
        given = values[0]
    try:
        if isinstance(given, bool) or callable(given):
            raise TypeError
        rate = float(given)
    except (TypeError, ValueError, OverflowError):
        shown = repr(given) if isinstance(given, str) else f"of type {type(given).__name__}"
        raise ArgumentError(f"{where} has a learning rate {shown[:60]}, but needs a number. {_FORMS}") from None
    if not (rate >= 0 and math.isfinite(rate)):
        raise ArgumentError(f"{where} has learning rate {rate}, but a rate must be finite and not negative.")
    return rate


def _some(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:5])) + (" and others" if len(steps) > 5 else "")
