"""Runs of the Hugging Face Trainer: folders ``checkpoint-N`` with weights, optimizer, scheduler and a log.

Source: transformers, ``Trainer._save_checkpoint`` and ``TrainerState``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...weights import Content, Trained, numbers_of, read, remembered
from .base import SOURCES, Source, optimizer_at
from .layouts import METADATA, Place, json_of
from .optimizers import Optimizer
from .records import record_of
from .schedules import Schedule, replayed

STATE = "trainer_state.json"
# Where FSDP keeps the optimizer in parts.
_OPTIMIZER_PARTS = "optimizer_0"
_OPTIMIZERS, _SCHEDULER = ("optimizer.pt", "optimizer.bin"), "scheduler.pt"
# Beside the weights also where Trainer.save_model wrote them, but then without an optimizer.
_ARGUMENTS = "training_args.bin"
_FOLDER = re.compile(r"checkpoint-(\d+)")
_SHOWN_DIGITS = 1e-9


@SOURCES.register("trainer")
class TrainerRun(Source):
    """One checkpoint of such a run."""

    label = "Hugging Face Trainer"

    @classmethod
    def recognises(cls, place: Place, content: Content) -> bool:
        """See :class:`Source`."""
        folder = place.folder
        if folder is None or (folder / STATE).is_file():
            return folder is not None
        begun = (folder / _ARGUMENTS).is_file() and any(
            (folder / name).is_file() for name in (_SCHEDULER, _OPTIMIZERS[0])
        )
        if begun or (_FOLDER.fullmatch(folder.name) and _has_state_beside(folder)):
            raise CheckpointError(
                f"{folder} has no {STATE}, which the Trainer writes last: it is still being written, or was cut short. "
                "Wait, or give a pattern without it."
            )
        return False

    @property
    def folder(self) -> Path:
        """Of the checkpoint."""
        return self.place.folder or self.path

    def numbers(self) -> dict[str, int]:
        """See :class:`Source`."""
        return {**numbers_of(self.folder, Content(None)), "step": self.step}

    @cached_property
    def state(self) -> dict[str, Any]:
        """What the Trainer wrote of itself."""
        return json_of(self.folder / STATE)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        step = self.state.get("global_step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise CheckpointError(f"{self.folder / STATE} has no global_step. Copy it again, or give learning_rate=.")
        return step

    @cached_property
    def log(self) -> dict[int, dict[str, float]]:
        """What was logged at each step that logged a rate."""
        return remembered("log", self.folder / STATE, lambda: _log_of(self.state))

    @cached_property
    def scheduler(self) -> Mapping[str, Any]:
        """The state of the scheduler; empty where none was saved."""
        path = self.folder / _SCHEDULER
        value = remembered("value", path, lambda: read(path).value) if path.is_file() else {}
        return value if isinstance(value, Mapping) else {}

    @cached_property
    def optimizer_path(self) -> Path | None:
        """Where the optimizer's state is, if it was saved."""
        parts = self.folder / _OPTIMIZER_PARTS
        files = (self.folder / name for name in _OPTIMIZERS if (self.folder / name).is_file())
        return next(files, parts if (parts / METADATA).is_file() else None)

    @cached_property
    def optimizer(self) -> Optimizer | None:
        """The optimizer's state, without its numbers."""
        path = self.optimizer_path
        return None if path is None else Optimizer(path, optimizer_at(path, whole=False))

    def record(self, trained: Trained | None, since: int | None, moments: bool = False) -> Mapping[str, Any] | None:
        """See :class:`Source`: rates as they were logged, else as the scheduler's state has them."""
        if since is None:
            since = max((source.step for source in self._beside if source.step < self.step), default=0)
        logged = [self.log[step]["loss"] for step in sorted(self.log) if step <= self.step and "loss" in self.log[step]]
        path = self.optimizer_path

        def read_moments(trained: Trained) -> Any:
            if path is None:
                raise CheckpointError(
                    f"{self.folder} has no optimizer.pt, so no second moments. Drop preconditioner from the task."
                )
            return Optimizer(path, optimizer_at(path, whole=True)).second_moments(trained)

        return record_of(
            self.step,
            since,
            self._schedules(),
            self.optimizer,
            trained,
            moments=read_moments if moments else None,
            loss=logged[-1] if logged else None,
        )

    def _schedules(self) -> list[Schedule]:
        """Of each group: the log has the first group's rate; others are as much larger as they began."""
        shift = 1 if self._logs_next() else 0
        logged = {step + shift: entry["learning_rate"] for step, entry in self.log.items()}
        states = [(source.step, source.scheduler.get("_last_lr")) for source in (self, *self._beside)]
        reached = {
            step + 1: [float(rate) for rate in rates] for step, rates in states if isinstance(rates, list) and rates
        }
        base = self._base()
        if base is None:
            base = [1.0] * (len(reached[self.step + 1]) if self.step + 1 in reached else 1)
        ratios = [rate / base[0] if base[0] else 1.0 for rate in base]
        last = reached.get(self.step + 1)
        alike = last is None or (
            len(last) == len(ratios)
            and all(
                math.isclose(rate, last[0] * ratio, rel_tol=1e-5, abs_tol=1e-15)
                for rate, ratio in zip(last, ratios, strict=True)
            )
        )
        whole = replayed(self.scheduler, self.optimizer.groups if self.optimizer is not None else ())
        found = []
        for number, ratio in enumerate(ratios):
            rates = {step: each[number] for step, each in reached.items() if number < len(each)}
            if whole is not None and self.scheduler.get("last_epoch") == self.step:
                rates |= {step + 1: rate for step, rate in enumerate(whole[number])}
            if alike or number == 0:
                rates |= {step: rate * ratio for step, rate in logged.items()}
            found.append(Schedule(rates, base[number] if self._base() is not None else math.inf))
        return found

    def _base(self) -> list[float] | None:
        """The rates that a schedule multiplies, of each group."""
        given = self.scheduler.get("base_lrs")
        if isinstance(given, list) and given:
            return [float(rate) for rate in given]
        return None if self.optimizer is None else self.optimizer.rates("initial_lr") or self.optimizer.rates()

    def _logs_next(self) -> bool:
        """Whether a rate was logged with the step before the one that used it, as older versions did.

        They read it after the scheduler's step; so each checkpoint's log ends with the very rate that its scheduler
        holds, though the schedule moves. Later versions log what the step used.
        """
        equal, moving = 0, False
        for source in (self, *self._beside):
            last, entry = source.scheduler.get("_last_lr"), source.log.get(source.step)
            if not isinstance(last, list) or not last or entry is None:
                continue
            if not math.isclose(entry["learning_rate"], float(last[0]), rel_tol=_SHOWN_DIGITS, abs_tol=1e-15):
                return False
            equal += 1
            before = [source.log[step]["learning_rate"] for step in source.log if step < source.step]
            moving = moving or bool(before and before[-1] != entry["learning_rate"])
        return equal > 0 and moving

    @cached_property
    def _beside(self) -> list[TrainerRun]:
        """The other checkpoints of its run, as far as they are there now."""
        found = []
        for folder in sorted(self.folder.parent.glob("checkpoint-*")):
            if _FOLDER.fullmatch(folder.name) and folder.name != self.folder.name and (folder / STATE).is_file():
                found.append(TrainerRun(Place(folder, folder, self.place.layout), Content(None)))
        return found

    @classmethod
    def check_together(cls, sources: Sequence[Source]) -> None:
        """See :class:`Source`: all are in one folder, and each goes on with the log of the one before."""
        runs = [source for source in sources if isinstance(source, TrainerRun)]
        for one, other in pairwise(runs):
            differ = one.folder.parent.absolute() != other.folder.parent.absolute()
            for step in one.log.keys() & other.log.keys():
                differ = differ or any(
                    one.log[step].get(name) != other.log[step].get(name) for name in ("loss", "learning_rate")
                )
            if differ:
                raise CheckpointError(
                    f"{one.folder} and {other.folder} are of different runs: they are in different folders, or their "
                    f"{STATE} tells of different losses at the same step. Give the folder of one run, or a pattern."
                )


def _log_of(state: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    entries = state.get("log_history")
    found = {}
    for entry in entries if isinstance(entries, list) else []:
        rate, step = (entry.get("learning_rate"), entry.get("step")) if isinstance(entry, dict) else (None, None)
        if isinstance(step, int) and isinstance(rate, int | float) and math.isfinite(rate) and rate >= 0:
            found[step] = {k: v for k, v in entry.items() if isinstance(v, int | float)}
    return found


def _has_state_beside(folder: Path) -> bool:
    return any(_FOLDER.fullmatch(other.parent.name) for other in folder.parent.glob(f"checkpoint-*/{STATE}"))
