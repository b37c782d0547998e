"""Reading of torch's distributed checkpoints, in one process.

torch's own reader unpickles whatever ``.metadata`` holds, and what is no tensor; here only what describes tensors, and
plain values, are allowed.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ...errors import CheckpointError

_METADATA = ".metadata"
# Begins of names that are no weights.
_NO_WEIGHTS = re.compile(r"(optim|optimizers?|lr_schedulers?|schedulers?|rng|dataloader|train_state)(_\w+)?(\.|$)")
_DESCRIBING = {
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",
}
_PLAIN = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib", "WindowsPath"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}  # fmt: skip


def joined(folder: Path, data: bool) -> dict[str, Any]:
    """The weights, nested as they were saved, and what is plain beside them.

    Args:
        folder: with ``.metadata``.
        data: whether the numbers are read; else tensors are on the meta device.

    Raises:
        CheckpointError: a part is missing or damaged, or it holds Python objects.
    """
    metadata = _metadata_of(folder)
    kinds = metadata.state_dict_metadata
    wanted: dict[str, Any] = {}
    for name, about in sorted(kinds.items()):
        if isinstance(about, TensorStorageMetadata) and not _NO_WEIGHTS.match(name):
            device = "cpu" if data else "meta"
            wanted[name] = torch.empty(about.size, dtype=about.properties.dtype, device=device)
    others = (name for name, about in kinds.items() if isinstance(about, BytesStorageMetadata))
    plain = dict.fromkeys((name for name in others if "." not in name), 0)
    asked = {**plain, **(wanted if data else {})}
    if asked:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is a single process
                load(asked, storage_reader=_Reader(folder, metadata), planner=_Planner(), no_dist=True)
        except (Exception, CheckpointException) as error:  # whatever damaged parts make it raise
            first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            reason = " ".join(str(first).split())[:120]
            raise CheckpointError(
                f"{folder} cannot be read as a distributed checkpoint; a part may be truncated or damaged "
                f"({type(first).__name__}{reason and ': '}{reason}). Copy the whole folder again."
            ) from None
    return _nested({**wanted, **asked}, metadata.planner_data)


class _Reader(FileSystemReader):
    """torch's own, but for the pickle of the metadata."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._read = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._read


class _Planner(DefaultLoadPlanner):
    """Takes what is no tensor only where it is plain."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            plain = None
        self.original_state_dict[read_item.dest_index.fqn] = plain


class _RefusedError(pickle.UnpicklingError):
    pass


class _Describing(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        classes = module in _DESCRIBING and (name == "_StorageInfo" or not name.startswith("_")) and "." not in name
        if classes or (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _RefusedError(f"{module}.{name}")


def _metadata_of(folder: Path) -> Metadata:
    path = folder / _METADATA
    try:
        with path.open("rb") as file:
            metadata = _Describing(file).load()
    except _RefusedError as error:
        raise CheckpointError(
            f"{path} holds Python objects besides descriptions of tensors ({error}), which gradindex never executes. "
            "Save it again with torch.distributed.checkpoint."
        ) from None
    except Exception as error:  # whatever damaged bytes make pickle raise
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}). Copy the whole folder again.") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} describes no checkpoint. Copy the whole folder again.")
    missing = {str(info.relative_path) for info in (metadata.storage_data or {}).values()}
    absent = sorted(name for name in missing if Path(name).name != name or not (folder / name).is_file())
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of its {len(missing)} parts, such as {absent[0]}. Copy the whole folder "
            "again, or wait until the training has written it."
        )
    return metadata


def _nested(flat: Mapping[str, Any], paths: Any) -> dict[str, Any]:
    """Names as they were nested when they were saved."""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        path = paths.get(name, (name,)) if isinstance(paths, Mapping) else (name,)
        inner = found
        for part in path[:-1]:
            below = inner.setdefault(str(part), {})
            inner = below if isinstance(below, dict) else {}
        inner[str(path[-1])] = value
    return found
