"""Reading of torch's distributed checkpoints, in one process.

torch's own reader unpickles whatever ``.metadata`` holds, and what is no tensor; here only what describes tensors, and
plain values, are allowed.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ...errors import CheckpointError
from ...weights import remembered
from .layouts import METADATA

# Begins of names that are no weights.
_NO_WEIGHTS = re.compile(
    r"(optim|optimizers?|lr_schedulers?|schedulers?|rng|dataloader|train_state|second_moments)(_\w+)?(\.|$)"
)
# The state of an optimizer, also inside an application's own state, and that of a scheduler.
_STATE = re.compile(r"((?:\w+\.)*?(?:optim|optimizers?)(?:_\w+)?)\.(?:state|param_groups)(?:\.|$)")
_SCHEDULER = re.compile(r"(?:\w+\.)*?(?:lr_)?schedulers?(?:_\w+)?\.\w+$")
# What is read of a group of parameters; flattened, each parameter has all of it.
_OF_A_GROUP = {"param_groups", "params", "lr", "initial_lr", "scheduled_lr", "max_lr", "min_lr", "betas", "step"}
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
    parts = _Parts(folder)
    weights = {name for name in parts.tensors if not _NO_WEIGHTS.match(name) and not _STATE.match(name)}
    plain = {name for name in parts.others if "." not in name}
    return _nested(parts.read(weights | plain, weights if data else set()), parts.metadata.planner_data)


def tensors_under(folder: Path, key: str) -> dict[str, Tensor]:
    """Tensors by their names under a key, whatever dots these have.

    Raises:
        CheckpointError: as for :func:`joined`.
    """
    parts = _Parts(folder)
    wanted = {name for name in parts.tensors if name.startswith(f"{key}.")}
    return {name[len(key) + 1 :]: tensor for name, tensor in parts.read(wanted, wanted).items()}


def optimizers_in(folder: Path, fields: Collection[str] = ()) -> list[dict[str, Any]]:
    """States of optimizers as their ``state_dict()`` has them, by numbers or, in ``params``, by names.

    Source: torch, ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict``, with and without
    ``flatten_optimizer_state_dict``, and ``FullyShardedDataParallel.optim_state_dict``.

    Args:
        folder: with ``.metadata``.
        fields: of a parameter's state, those whose numbers are read; other tensors are on the meta device.

    Raises:
        CheckpointError: as for :func:`joined`.
    """
    if not fields:
        return remembered("optimizers", folder / METADATA, lambda: _optimizers_in(folder, ()))
    return _optimizers_in(folder, fields)


def _optimizers_in(folder: Path, fields: Collection[str]) -> list[dict[str, Any]]:
    parts = _Parts(folder)
    by_key: dict[str, set[str]] = {}
    for name in (*parts.tensors, *parts.others):
        found = _STATE.match(name)
        if found is not None:
            by_key.setdefault(found[1], set()).add(name)
    states = []
    for key, names in sorted(by_key.items()):
        told = {name for name in names if name in parts.tensors or name.rpartition(".")[2] in _OF_A_GROUP}
        values = parts.read(told, {name for name in told if name.rpartition(".")[2] in fields})
        paths = parts.metadata.planner_data if isinstance(parts.metadata.planner_data, Mapping) else {}
        state = _state_of_optimizer(
            {name[len(key) + 1 :]: value for name, value in values.items()}, len(key) + 1, paths
        )
        states += [state] if state["param_groups"] else []
    return states


def holds_optimizer(folder: Path) -> bool:
    """Whether the state of an optimizer is there, by its names."""
    return any(_STATE.match(name) for name in _Parts(folder).metadata.state_dict_metadata)


def schedulers_in(folder: Path) -> list[dict[str, Any]]:
    """States of schedulers, as far as they are plain.

    Raises:
        CheckpointError: as for :func:`joined`.
    """
    return remembered("schedulers", folder / METADATA, lambda: _schedulers_in(folder))


def _schedulers_in(folder: Path) -> list[dict[str, Any]]:
    parts = _Parts(folder)
    names = {name for name in parts.others if _SCHEDULER.match(name)}
    found: dict[str, dict[str, Any]] = {}
    for name, value in parts.read(names, set()).items():
        key, _, field = name.rpartition(".")
        found.setdefault(key, {})[field] = value
    return [state for _, state in sorted(found.items()) if "last_epoch" in state]


def _state_of_optimizer(flat: Mapping[str, Any], skip: int, paths: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict()`` of its flat names; ``skip`` is how much of the names in ``paths`` stands before these."""
    state: dict[Any, dict[str, Any]] = {}
    numbered: dict[int, dict[str, Any]] = {}
    named: dict[str, dict[str, Any]] = {}
    cuts = {name[skip:]: path for name, path in paths.items()}
    for name, value in flat.items():
        kind, _, rest = name.partition(".")
        owner, _, field = rest.rpartition(".")
        if kind == "state":
            state.setdefault(owner, {})[field] = value
        elif not rest:  # older versions keep the list of groups whole
            numbered |= dict(enumerate(value if isinstance(value, list) else ()))
        elif isinstance(number := cuts.get(name, ("",) * 3)[-2:][0], int):
            numbered.setdefault(number, {})[field] = value
        else:
            named.setdefault(owner, {})[field] = value
    groups = [group for _, group in sorted(numbered.items()) if isinstance(group.get("params"), list)]
    for owner, settings in named.items():  # flattened: each parameter tells what its group says
        alike = next((g for g in groups if {**g, "params": 0} == {**settings, "params": 0}), None)
        if alike is None:
            groups.append({**settings, "params": [owner]})
        else:
            alike["params"].append(owner)
    if groups and all(isinstance(name, str) for group in groups for name in group["params"]):
        groups = [{**group, "param_names": group["params"]} for group in groups]
    else:
        state = {int(owner) if owner.isdigit() else owner: value for owner, value in state.items()}
    return {"state": state, "param_groups": groups}


class _Parts:
    """A folder, by its metadata."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.metadata = folder, _metadata_of(folder)
        kinds = sorted(self.metadata.state_dict_metadata.items())
        self.tensors = {name: about for name, about in kinds if isinstance(about, TensorStorageMetadata)}
        self.others = {name for name, about in kinds if isinstance(about, BytesStorageMetadata)}

    def read(self, names: Collection[str], numbers: Collection[str]) -> dict[str, Any]:
        """Tensors, those among ``numbers`` on the CPU and others on the meta device, and what is plain."""
        found: dict[str, Any] = {}
        for name in sorted(names):
            about = self.tensors.get(name)
            if about is not None:
                device = "cpu" if name in numbers else "meta"
                found[name] = torch.empty(about.size, dtype=about.properties.dtype, device=device)
        asked = {name: found.get(name, 0) for name in sorted(names) if name in self.others or name in numbers}
        if asked:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that there is a single process
                    load(asked, storage_reader=_Reader(self.folder, self.metadata), planner=_Planner(), no_dist=True)
            except (Exception, CheckpointException) as error:  # whatever damaged parts make it raise
                first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
                reason = " ".join(str(first).split())[:120]
                raise CheckpointError(
                    f"{self.folder} cannot be read as a distributed checkpoint; a part may be truncated or damaged "
                    f"({type(first).__name__}{reason and ': '}{reason}). Copy the whole folder again."
                ) from None
        return {**found, **asked}


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
    metadata = remembered("metadata", folder / METADATA, lambda: _described_in(folder / METADATA))
    missing = {str(info.relative_path) for info in (metadata.storage_data or {}).values()}
    absent = sorted(name for name in missing if Path(name).name != name or not (folder / name).is_file())
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of its {len(missing)} parts, such as {absent[0]}. Copy the whole folder "
            "again, or wait until the training has written it."
        )
    return metadata


def _described_in(path: Path) -> Metadata:
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
