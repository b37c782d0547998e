"""Checkpoints of training loops that log no rates: Lightning's, accelerate's and timm's.

What they keep is the state of the optimizer and of the scheduler. That of torch's own schedulers is replayed; of others
each checkpoint of the run tells one rate, and what lies between is interpolated.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ...weights import Content, Trained, numbers_of, outline, read
from .base import SOURCES, STEPS_AND_MOMENTS, Source, optimizer_at
from .layouts import METADATA, Place
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


@SOURCES.register("lightning")
class Lightning(Loop):
    """A ``.ckpt`` of Lightning."""

    label = "Lightning"

    @classmethod
    def recognises(cls, place: Place, content: Content) -> bool:
        """See :class:`Source`."""
        return (
            isinstance(content.value, Mapping) and {"pytorch-lightning_version", "state_dict"} <= content.value.keys()
        )

    @property
    def kind(self) -> str:
        """See :class:`Source`."""
        return f"{super().kind}, with averaged weights" if self.key() else super().kind

    def key(self) -> str | None:
        """See :class:`Source`: those in training, where ``state_dict`` holds their average."""
        own = self.content.value.get("current_model_state")
        return "current_model_state" if isinstance(own, Mapping) and own else None

    @property
    def taken(self) -> int | None:
        """See :class:`Loop`."""
        step = self.content.value.get("global_step")
        return step if isinstance(step, int) else None

    @property
    def optimizers(self) -> Sequence[tuple[Path, Any]]:
        """See :class:`Loop`."""
        return [(self.path, state) for state in self.content.value.get("optimizer_states") or ()]

    def whole_optimizer(self) -> Any:
        """See :class:`Loop`."""
        whole = self.content.sha256 or not self.optimizers
        return self.optimizers[0][1] if whole else read(self.path).value["optimizer_states"][0]

    @property
    def schedulers(self) -> Sequence[Mapping[str, Any]]:
        """See :class:`Loop`."""
        return [state for state in self.content.value.get("lr_schedulers") or () if isinstance(state, Mapping)]

    def periods(self, count: int) -> tuple[int, bool] | None:
        """See :class:`Loop`: schedulers step after each step, or after the last one of an epoch, before it is saved."""
        epoch, taken = self.content.value.get("epoch"), self.taken or 0
        if count == taken:
            return 1, True
        if isinstance(epoch, int) and count == epoch + 1:
            return taken // count if taken % count == 0 else 0, True
        return (0, False) if count == epoch else None

    def beside(self) -> Sequence[Lightning]:
        """See :class:`Loop`."""
        found = []
        for path in sorted(self.path.parent.glob(f"*{self.path.suffix}")):
            if path.name != self.path.name:
                content = outline(path)
                place = Place(path, None, self.place.layout)
                found += [Lightning(place, content)] if self.recognises(place, content) else []
        return found


@SOURCES.register("accelerate")
class Accelerate(Loop):
    """A folder that ``Accelerator.save_state`` wrote."""

    label = "accelerate"

    @classmethod
    def recognises(cls, place: Place, content: Content) -> bool:
        """See :class:`Source`."""
        names = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")
        return place.folder is not None and any((place.folder / name).is_file() for name in names)

    @property
    def folder(self) -> Path:
        """Of the checkpoint."""
        return self.place.folder or self.path

    def numbers(self) -> dict[str, int]:
        """See :class:`Source`: the scheduler counts steps where the name does not."""
        named = numbers_of(self.folder, Content(None))
        count = self.schedulers[0].get("last_epoch") if self.schedulers else None
        return {"step": count // self._processes, **named} if isinstance(count, int) and count else named

    @cached_property
    def taken(self) -> int | None:
        """See :class:`Loop`: what Adam counted, unless scheduler and name agree."""
        named = numbers_of(self.folder, Content(None)).get("step")
        count = self.schedulers[0].get("last_epoch") if self.schedulers else None
        if named is not None and count in (named, named * self._processes):
            return named
        counted = Optimizer(self.folder, self.whole_optimizer()).taken() if self.optimizers else None
        return named if counted is None else counted

    @cached_property
    def _processes(self) -> int:
        return max(1, len(list(self.folder.glob("random_states_*.pkl"))))

    @cached_property
    def optimizers(self) -> Sequence[tuple[Path, Any]]:
        """See :class:`Loop`."""
        parts = (path for path in self.folder.glob("optimizer_*") if (path / METADATA).is_file())
        paths = self._files("optimizer") or sorted(parts)
        return [(path, optimizer_at(path, whole=False)) for path in paths]

    def whole_optimizer(self) -> Any:
        """See :class:`Loop`."""
        return optimizer_at(self.optimizers[0][0], whole=True)

    @cached_property
    def schedulers(self) -> Sequence[Mapping[str, Any]]:
        """See :class:`Loop`."""
        return [state for path in self._files("scheduler") if isinstance(state := read(path).value, Mapping)]

    def _files(self, name: str) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.bin") if re.fullmatch(rf"{name}(_\d+)?", path.stem))

    def periods(self, count: int) -> tuple[int, bool] | None:
        """See :class:`Loop`: accelerate steps a scheduler once for each process, or a user once an epoch."""
        taken = self.taken or 0
        if count == taken:
            return 1, True
        if count == taken * self._processes:
            return None  # several of the scheduler's steps in one of the optimizer's
        if taken % count == 0:
            return taken // count, True
        return (taken // (count + 1), False) if taken % (count + 1) == 0 else (0, False)

    def beside(self) -> Sequence[Accelerate]:
        """See :class:`Loop`."""
        found = []
        for folder in sorted(path for path in self.folder.parent.iterdir() if path.is_dir()):
            place = Place(folder, folder, self.place.layout)
            if folder.name != self.folder.name and self.recognises(place, Content(None)):
                found.append(Accelerate(place, Content(None)))
        return found


@SOURCES.register("timm")
class Timm(Loop):
    """A ``.pth.tar`` of timm's trainer, which saves at the end of an epoch, before its scheduler goes on."""

    label = "timm"

    @classmethod
    def recognises(cls, place: Place, content: Content) -> bool:
        """See :class:`Source`."""
        return isinstance(content.value, Mapping) and {"arch", "state_dict", "epoch"} <= content.value.keys()

    @property
    def taken(self) -> int | None:
        """See :class:`Loop`: in epochs."""
        epoch = self.content.value.get("epoch")
        return epoch if isinstance(epoch, int) else None

    @property
    def optimizers(self) -> Sequence[tuple[Path, Any]]:
        """See :class:`Loop`."""
        state = self.content.value.get("optimizer")
        return [] if state is None else [(self.path, state)]

    def whole_optimizer(self) -> Any:
        """See :class:`Loop`."""
        return self.optimizers[0][1] if self.content.sha256 else read(self.path).value["optimizer"]

    @property
    def schedulers(self) -> Sequence[Mapping[str, Any]]:
        """See :class:`Loop`: it saves none."""
        return []

    @property
    def keeps_schedulers(self) -> bool:
        """See :class:`Loop`: so that sums are not known."""
        return False

    def periods(self, count: int) -> tuple[int, bool] | None:
        """See :class:`Loop`."""
        return None

    def beside(self) -> Sequence[Loop]:
        """See :class:`Loop`."""
        return []

    def record(self, trained: Trained | None, since: int | None, moments: bool = False) -> Mapping[str, Any] | None:
        """See :class:`Source`."""
        arguments = self.content.value.get("args")
        if getattr(arguments, "sched_on_updates", False):
            return None  # the rate is then that of the next step
        return super().record(trained, since, moments)


@SOURCES.register("distributed")
class Parts(Loop):
    """A folder of a distributed checkpoint with an optimizer's state beside the weights, as torch's guide saves it."""

    @classmethod
    def recognises(cls, place: Place, content: Content) -> bool:
        """See :class:`Source`."""
        files = place.layout.files
        if not files or not (files[0] / METADATA).is_file():
            return False
        from .parts import holds_optimizer  # takes time to import; the layout says where it cannot be

        return holds_optimizer(files[0])

    @property
    def folder(self) -> Path:
        """Of the parts."""
        return self.place.layout.files[0]

    @cached_property
    def taken(self) -> int | None:
        """See :class:`Loop`: what Adam counted, else what is said; without a scheduler an epoch does as well."""
        states, said = _optimizers(self.folder, ("step",)), self.numbers()
        counted = Optimizer(self.folder, states[0]).taken() if states else None
        return counted or said.get("step") or (None if self.schedulers else next(iter(said.values()), None))

    @cached_property
    def optimizers(self) -> Sequence[tuple[Path, Any]]:
        """See :class:`Loop`."""
        return [(self.folder, state) for state in _optimizers(self.folder)]

    def whole_optimizer(self) -> Any:
        """See :class:`Loop`."""
        return _optimizers(self.folder, STEPS_AND_MOMENTS)[0]

    @cached_property
    def schedulers(self) -> Sequence[Mapping[str, Any]]:
        """See :class:`Loop`."""
        from .parts import schedulers_in

        return schedulers_in(self.folder)

    @property
    def keeps_schedulers(self) -> bool:
        """See :class:`Loop`: not by itself, so that sums are not known without one."""
        return False

    def periods(self, count: int) -> tuple[int, bool] | None:
        """See :class:`Loop`: schedulers step after each step, or after an epoch, before or after it is saved."""
        taken = self.taken or 0
        if taken % count == 0:
            return taken // count, True
        return (taken // (count + 1), False) if taken % (count + 1) == 0 else None

    def beside(self) -> Sequence[Parts]:
        """See :class:`Loop`."""
        found = []
        for folder in sorted(path for path in self.path.parent.iterdir() if (path / METADATA).is_file()):
            place = Place(folder, folder, type(self.place.layout)(folder, [folder]))
            if folder.name != self.path.name and self.recognises(place, Content(None)):
                found.append(Parts(place, place.layout.outline()))
        return found


def _optimizers(folder: Path, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    from .parts import optimizers_in

    return optimizers_in(folder, fields)
