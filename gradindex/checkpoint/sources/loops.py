"""Checkpoints of training loops that log no rates: Lightning's, accelerate's and timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ...weights import Content, Trained, numbers_of, outline, read, remembered
from .base import SOURCES, file_of, optimizer_at
from .layouts import METADATA, Place
from .loop import Loop
from .optimizers import Optimizer


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
        counted = remembered("taken", file_of(self.optimizers[0][0]), self._counted) if self.optimizers else None
        return named if counted is None else counted

    def _counted(self) -> int | None:
        return Optimizer(self.folder, self.whole_optimizer()).taken()

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
        values = [remembered("content", path, partial(read, path)).value for path in self._files("scheduler")]
        return [state for state in values if isinstance(state, Mapping)]

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
