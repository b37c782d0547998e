"""Checkpoints of training loops that log no rates, whatever wrote them.

What they keep is the state of the optimizer and of the scheduler. That of torch's own schedulers is replayed; of others
each checkpoint of the run tells one rate, and what lies between is interpolated.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...weights import Trained
from .base import Source
from .optimizers import Optimizer
from .records import UNKNOWN, record_of
from .schedules import Schedule, replayed


class Loop(Source):
    """One checkpoint of such a loop."""

    @property
    @abstractmethod
    def taken(self) -> int | None:
        """Steps that the optimizer has taken, where it is known."""

    @property
    @abstractmethod
    def optimizers(self) -> Sequence[tuple[Path, Any]]:
        """States of the optimizers, without their numbers, and the files that they are in."""

    @property
    @abstractmethod
    def schedulers(self) -> Sequence[Mapping[str, Any]]:
        """States of the schedulers."""

    @property
    def keeps_schedulers(self) -> bool:
        """Whether it saves the state of a scheduler where there is one."""
        return True

    @abstractmethod
    def periods(self, count: int) -> tuple[int, bool] | None:
        """Steps of the optimizer between two of the scheduler, and whether the latest of the scheduler came after them.

        ``(0, ...)`` where the number is not known, ``None`` where nothing is.

        Args:
            count: of the scheduler's steps, at least 1.
        """

    @abstractmethod
    def beside(self) -> Sequence[Loop]:
        """The other checkpoints of its run."""

    def whole_optimizer(self) -> Any:
        """The state of the only optimizer, with its numbers."""
        return self.optimizers[0][1]

    def record(self, trained: Trained | None, since: int | None, moments: bool = False) -> Mapping[str, Any] | None:
        """See :class:`Source`."""
        if len(self.optimizers) != 1 or self.taken is None:
            return None
        path, state = self.optimizers[0]
        optimizer = Optimizer(path, state)
        rates = optimizer.rates()
        if rates is None:
            return None
        found = self._schedules(optimizer, rates)
        if found is None:
            count = self.schedulers[0].get("last_epoch")
            why = f"was saved after {self.taken} steps of its optimizer, but {count} of its scheduler do not match them"
            return {"version": 1, "step": self.taken, "groups": [], UNKNOWN: why}
        schedules, whole = found
        if since is None and whole:
            steps = [other.taken for other in self.beside()]
            since = max((step for step in steps if step is not None and step < self.taken), default=0)
        return record_of(
            self.taken,
            since,
            schedules,
            optimizer,
            trained,
            moments=(lambda trained: Optimizer(path, self.whole_optimizer()).second_moments(trained))
            if moments
            else None,
            totals=whole,
        )

    def _schedules(self, optimizer: Optimizer, rates: Sequence[float]) -> tuple[list[Schedule], bool] | None:
        """Of each group, and whether it holds for all steps up to now; ``None`` where steps cannot be matched."""
        taken = self.taken or 0
        if len(self.schedulers) != 1:
            return [Schedule({taken: rate}) for rate in rates], self.keeps_schedulers and not self.schedulers
        state = self.schedulers[0]
        count = state.get("last_epoch")
        if not isinstance(count, int) or count < 1:
            return [Schedule({taken: rate}) for rate in rates], False
        period = self.periods(count)
        if period is None:
            return None
        every, after = period
        # The number of the scheduler's steps before the optimizer's last one.
        wanted = count - 1 if after else count
        known = replayed(state, optimizer.groups)
        if known is None:
            reached: dict[int, Sequence[float]] = {}
            for other in (self, *self.beside()):
                last = other.schedulers[0].get("_last_lr") if len(other.schedulers) == 1 else None
                number = other.schedulers[0].get("last_epoch") if last else None
                if isinstance(last, list) and isinstance(number, int) and len(last) == len(rates):
                    reached[number] = last
            by_count = [{number: float(last[g]) for number, last in reached.items()} for g in range(len(rates))]
        else:
            by_count = [dict(enumerate(found)) for found in known]
        schedules = [Schedule(found) for found in by_count]
        if not all(schedules):
            return [], False
        if every == 0:
            return [Schedule({taken: schedule.at(wanted)}) for schedule in schedules], False
        steps = range(1, taken + 1)
        return [Schedule({step: one.at((step - 1) // every) for step in steps}) for one in schedules], True
