"""Weights that many processes wrote: torch's distributed checkpoints (DCP, FSDP) and DeepSpeed's ZeRO.

ZeRO needs DeepSpeed, whose converter joins the parts.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...digests import digest
from ...errors import CheckpointError
from ...recorder import RECORD_FILE, RECORD_KEY
from ...weights import Content, remembered
from .base import SOURCES, STEPS_AND_MOMENTS, file_of
from .layouts import LAYOUTS, METADATA, Layout, Place, is_folder, json_of
from .loop import Loop
from .optimizers import Optimizer

# Where accelerate and the Trainer keep a model that FSDP saved in parts.
_INSIDE = ("pytorch_model_fsdp_0", "pytorch_model_fsdp", "model")


@LAYOUTS.register("distributed")
class Distributed(Layout):
    """A folder with ``.metadata`` and ``.distcp`` files."""

    label = "torch distributed checkpoint"

    @classmethod
    def found(cls, path: Path) -> Distributed | None:
        """See :class:`Layout`."""
        if not is_folder(path):
            return None
        for folder in (path, *(path / name for name in _INSIDE)):
            if (folder / METADATA).is_file():
                return cls(path, [folder])
            if is_folder(folder) and next(folder.glob("*.distcp"), None) is not None:
                raise CheckpointError(
                    f"{folder} has no {METADATA}, which is written last: it is still being written, or was cut short. "
                    "Wait, or copy the whole folder again."
                )
        return None

    def outline(self) -> Content:
        """See :class:`Layout`."""
        return Content(self._loaded(data=False))

    def read(self) -> Content:
        """See :class:`Layout`."""
        value = self._loaded(data=True)
        return Content(value, digest(value).hex())

    def _loaded(self, data: bool) -> dict[str, Any]:
        try:
            from .parts import joined  # torch may be built without what it needs, and it takes time to import
        except ImportError:
            raise CheckpointError(
                f"{self.path} is a distributed checkpoint, but this build of torch has no torch.distributed. Join it "
                "elsewhere: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUTPUT."
            ) from None
        found, record = joined(self.files[0], data), self.files[0] / RECORD_FILE
        return {**found, RECORD_KEY: json_of(record)} if record.is_file() else found


@LAYOUTS.register("zero")
class Zero(Layout):
    """A folder of DeepSpeed: ``latest`` and a folder of ZeRO's parts, or that folder itself.

    Source: DeepSpeed, ``deepspeed.utils.zero_to_fp32``.
    """

    label = "DeepSpeed ZeRO"

    @classmethod
    def found(cls, path: Path) -> Zero | None:
        """See :class:`Layout`."""
        if not is_folder(path):
            return None
        if any(path.glob("*_optim_states.pt")):
            return cls(path, [path])
        latest = path / "latest"
        tag = latest.read_text().strip() if latest.is_file() and latest.stat().st_size < 1000 else ""
        if not tag or Path(tag).name != tag:
            return None
        if not any((path / tag).glob("*_optim_states.pt")):
            raise CheckpointError(
                f"{path} names {tag} as its latest checkpoint, which has no parts (*_optim_states.pt). Copy the whole "
                "folder again, or wait until the training has written it."
            )
        return cls(path, [path / tag])

    def outline(self) -> Content:
        """See :class:`Layout`: nothing but whether it can be converted."""
        self._converter()
        return Content(None)

    def read(self) -> Content:
        """See :class:`Layout`."""
        folder = self.files[0]
        convert = self._converter()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does, among what a command answers
                weights = convert(str(folder.parent), tag=folder.name)
        except Exception as error:  # whatever DeepSpeed finds wrong with it
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(
                f"{folder} cannot be converted by DeepSpeed ({type(error).__name__}: {reason}). Copy all of its parts."
            ) from None
        value = {str(name): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
        return Content(value, digest(value).hex())

    def _converter(self) -> Any:
        try:
            module = importlib.import_module("deepspeed.utils.zero_to_fp32")
        except ImportError:
            raise CheckpointError(
                f"{self.path} is a DeepSpeed ZeRO checkpoint, which only DeepSpeed's converter joins. Install "
                f"deepspeed, or run `python zero_to_fp32.py {self.files[0].parent} OUTPUT` (the script lies beside the "
                "checkpoint) and give its output."
            ) from None
        return module.get_fp32_state_dict_from_zero_checkpoint


@SOURCES.register("distributed")
class DistributedRun(Loop):
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
        counted, said = remembered("taken", file_of(self.folder), self._counted), self.numbers()
        return counted or said.get("step") or (None if self.schedulers else next(iter(said.values()), None))

    def _counted(self) -> int | None:
        states = _optimizers(self.folder, ("step",))
        return Optimizer(self.folder, states[0]).taken() if states else None

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

    def beside(self) -> Sequence[DistributedRun]:
        """See :class:`Loop`."""
        found = []
        for folder in sorted(path for path in self.path.parent.iterdir() if (path / METADATA).is_file()):
            place = Place(folder, folder, type(self.place.layout)(folder, [folder]))
            if folder.name != self.path.name and self.recognises(place, Content(None)):
                found.append(DistributedRun(place, place.layout.outline()))
        return found


def _optimizers(folder: Path, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    from .parts import optimizers_in

    return optimizers_in(folder, fields)
