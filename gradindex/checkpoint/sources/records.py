"""Records in the form that ``Recorder`` saves, made of what other trainers keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...weights import Trained
from .optimizers import Optimizer
from .schedules import Schedule

# Stands for all parameters that no other group names.
ALL = "*"
# Why rates are not known, where they are not.
UNKNOWN = "unknown"


def record_of(
    step: int,
    since: int | None,
    schedules: Sequence[Schedule],
    optimizer: Optimizer | None,
    trained: Trained | None,
    *,
    moments: Callable[[Trained], Any] | None = None,
    loss: float | None = None,
    totals: bool = True,
) -> dict[str, Any] | None:
    """The record of a checkpoint at ``step``; ``None`` where no rate is known.

    Args:
        step: the number of steps taken.
        since: the step of the previous checkpoint; without it, sums are not known.
        schedules: of each of the optimizer's groups.
        optimizer: its state, where it was saved.
        trained: whose parameters it held.
        moments: what reads the second moments, if these are asked for.
        loss: of the training, where it was logged.
        totals: whether the schedules hold for all steps, not only for the last.
    """
    if not schedules or not all(schedules):
        return None
    steps = None if since is None else step - since
    rates = [schedule.at(step) for schedule in schedules]
    sums = [None if since is None or not totals else schedule.total(since, step) for schedule in schedules]
    names: list[list[str]] | None = None
    if optimizer is not None and trained is not None:
        names = optimizer.names(trained)
    groups: list[dict[str, Any]] = []
    if names is not None and optimizer is not None and len(names) == len(rates):
        stepped = optimizer.trained(names)
        for held, rate, total in zip(names, rates, sums, strict=True):
            for took in (True, False):
                told = [name for name in held if name and (name in stepped) == took]
                if told:
                    group = {"parameters": told, "learning_rate": rate, "learning_rate_sum": total}
                    if not took:
                        group["steps"] = 0
                    elif steps is not None:
                        group["steps"] = steps
                    groups.append(group)
    elif len(set(rates)) == 1 and len(set(sums)) == 1:
        groups.append({"parameters": [ALL], "learning_rate": rates[0], "learning_rate_sum": sums[0]})
    record: dict[str, Any] = {"version": 1, "step": step, "groups": groups}
    if not groups:
        shown = " and ".join(f"{rate:g}" for rate in dict.fromkeys(rates))
        record[UNKNOWN] = f"has learning rates {shown} for groups of parameters whose names are not known"
    if loss is not None:
        record["loss"] = loss
    if moments is not None and trained is not None:
        record["second_moments"] = moments(trained)
    return record
