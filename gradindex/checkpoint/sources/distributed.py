"""Weights that many processes wrote: torch's distributed checkpoints (DCP, FSDP) and DeepSpeed's ZeRO.

ZeRO needs DeepSpeed, whose converter joins the parts.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

from torch import Tensor

from ...digests import digest
from ...errors import CheckpointError
from ...recorder import RECORD_FILE, RECORD_KEY
from ...weights import Content
from .layouts import LAYOUTS, METADATA, Layout, is_folder, json_of

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
