"""What callbacks share: when to save, and a Recorder from the start of a training to its end."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import ArgumentError, as_whole
from ..recorder import Recorder

_DEFAULT_COUNT = 10


class Schedule:
    """The optimizer steps after which a checkpoint is saved.

    Args:
        every: so many steps apart, and at the end of the training.
        at: these steps, and no other.
        count: so many, at the ends of equal spans of the training, the last one at its end.

    Raises:
        ArgumentError: more than one is given, or one is out of range.
    """

    def __init__(self, every: int | None, at: Iterable[int] | None, count: int | None) -> None:
        if sum(given is not None for given in (every, at, count)) > 1:
            raise ArgumentError("every, at and count exclude each other. Give one, or none for count=10.")
        self.every = None if every is None else _positive("every", every)
        self.at = None if at is None else sorted({_positive("at", step) for step in at})
        self.count = None if count is None else _positive("count", count)
        if self.at == []:
            raise ArgumentError("at is empty. Give the optimizer steps after which to save.")
        if self.every is None and self.at is None and self.count is None:
            self.count = _DEFAULT_COUNT
        self._due: frozenset[int] = frozenset(self.at or ())

    def begin(self, total: float | None) -> None:
        """Learn how many steps the training will take.

        Args:
            total: the number, ``None`` or infinite where it is not known.

        Raises:
            ArgumentError: it is needed and not known, or ``at`` lies behind it.
        """
        known = total is not None and math.isfinite(total) and total > 0
        if self.count is not None:
            if not known:
                raise ArgumentError(
                    f"count={self.count} needs the number of optimizer steps, which this training does not know "
                    "beforehand. Give every= or at=."
                )
            spans = min(self.count, int(total or 0))
            self._due = frozenset(-(-number * int(total or 0) // spans) for number in range(1, spans + 1))
        elif self.at is not None and known and self.at[-1] > int(total or 0):
            raise ArgumentError(
                f"at has step {self.at[-1]}, but the training takes {int(total or 0)} optimizer steps. Give others."
            )

    def due(self, before: int, now: int) -> bool:
        """Whether to save at step ``now``, after the steps since ``before``."""
        if self.every is not None:
            return now // self.every > before // self.every
        return any(step in self._due for step in range(before + 1, now + 1))

    @property
    def at_the_end(self) -> bool:
        """Whether steps that are left over at the end of the training get a checkpoint."""
        return self.at is None


def _positive(name: str, value: Any) -> int:
    number = as_whole(name, value)
    if number < 1:
        raise ArgumentError(f"{name} is {number}, but must be at least 1.")
    return number


class Session:
    """Records one training; the methods are called by a callback.

    Args:
        directory: where to write checkpoints.
        schedule: when.
        options: further arguments of :class:`Recorder`.
    """

    def __init__(self, directory: str | os.PathLike[str], schedule: Schedule, **options: bool) -> None:
        self.directory, self._schedule, self._options = os.fspath(directory), schedule, options
        self.recorder: Recorder | None = None
        self._before = 0

    def arguments(self) -> dict[str, Any]:
        """What makes such a callback again, as JSON can hold it."""
        chosen = {name: getattr(self._schedule, name) for name in ("every", "at", "count")}
        return {"directory": self.directory, **{k: v for k, v in chosen.items() if v is not None}, **self._options}

    def begin(
        self,
        model: nn.Module,
        optimizers: Any,
        *,
        total: float | None,
        taken: int,
        state: Mapping[str, Any] | None,
        clipping_unknown: bool,
    ) -> None:
        """Start to listen.

        Args:
            model: in training.
            optimizers: one or several.
            total: optimizer steps of the whole training.
            taken: steps that the trainer says were taken before, when a training is resumed.
            state: what was counted until then, where it was kept.
            clipping_unknown: see :class:`Recorder`.
        """
        self.close()
        self._schedule.begin(total)
        first_step = taken if state is None else int(state["step"])
        # Files from behind the step where a training resumes are of steps that will be taken anew.
        options = self._options | {"overwrite": self._options["overwrite"] or first_step > 0}
        recorder = Recorder(
            model, optimizers, self.directory, first_step=first_step, clipping_unknown=clipping_unknown, **options
        )
        if state is not None:
            recorder.load_state_dict(state)
        self.recorder, self._before = recorder, recorder.step

    def due(self) -> bool:
        """Whether to save now; asked once after each batch."""
        if self.recorder is None or self.recorder.step == self._before:
            return False
        before, self._before = self._before, self.recorder.step
        return self._schedule.due(before, self.recorder.step)

    def state(self) -> dict[str, Any] | None:
        """What was counted, or ``None`` outside a training."""
        return None if self.recorder is None else self.recorder.state_dict()

    def end(self, loss: float | None = None, save: bool = True) -> None:
        """Save what is left over, and stop to listen."""
        if self.recorder is not None and save and self._schedule.at_the_end and not self.recorder.saved:
            self.recorder.save(loss)
        self.close()

    def close(self) -> None:
        """Stop to listen."""
        if self.recorder is not None:
            self.recorder.close()
        self.recorder = None
