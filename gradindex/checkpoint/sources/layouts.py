"""How a checkpoint's weights lie on disk: in one file, in shards, as an adapter, distributed over processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ...errors import CheckpointError
from ...registry import Registry
from ...weights import Content, digest_of_file, outline, read, remembered

# What trainers call the weights in a checkpoint's folder; the better first.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(.+)-(\d{3,})-of-(\d{3,})\.(safetensors|bin)")
_LONGEST_JSON = 1 << 28
# What torch writes last into the folder of a distributed checkpoint.
METADATA = ".metadata"


class Layout(ABC):
    """Weights at a path, read in one go.

    Args:
        path: of the checkpoint, as it was given.
        files: of the weights, whatever they are to this layout.
    """

    label: ClassVar[str] = ""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path, self.files = path, list(files)

    @classmethod
    @abstractmethod
    def found(cls, path: Path) -> Layout | None:
        """The weights of this layout at ``path``, where there are any."""

    @abstractmethod
    def outline(self) -> Content:
        """Names, types and shapes; tensors are on the meta device."""

    @abstractmethod
    def read(self) -> Content:
        """The weights on the CPU, with a digest of what was read."""

    def digest(self) -> str:
        """SHA-256 of the weights as they are now, in hexadecimal."""
        return self.read().sha256

    def fitting(self, weights: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        """Weights by the names of ``model``, where this layout calls them otherwise."""
        return dict(weights)

    @property
    def of_model(self) -> bool:
        """Whether what these weights lack is the model's by design, as the base of an adapter is."""
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder is there; no name is too long to ask."""
    return os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises where a name cannot be one


LAYOUTS: Registry[type[Layout]] = Registry("layout", order=("adapter", "file", "shards", "distributed", "zero"))


def layout_of(path: Path) -> Layout | None:
    """How the weights at ``path`` lie; ``None`` of a folder without any. What is no folder is taken for a file."""
    return next((found for kind in LAYOUTS.values() if (found := kind.found(path)) is not None), None)


class Given(Layout):
    """Weights that a loader of the user's own reads."""

    label = "own loader"

    @classmethod
    def found(cls, path: Path) -> Given | None:
        """See :class:`Layout`: never by itself."""
        return None

    def outline(self) -> Content:
        """See :class:`Layout`: nothing."""
        return Content(None)

    def read(self) -> Content:
        """See :class:`Layout`: nothing."""
        return Content(None)


@LAYOUTS.register("file")
class OneFile(Layout):
    """A file that torch.save or safetensors wrote, alone or in a trainer's folder."""

    @classmethod
    def found(cls, path: Path) -> OneFile | None:
        """See :class:`Layout`."""
        if is_folder(path):
            inside = [path / name for name in _WHOLE if (path / name).is_file()]
            return cls(path, inside[:1]) if inside else None
        return cls(path, [path]) if path.name not in _INDEX else None

    def outline(self) -> Content:
        """See :class:`Layout`."""
        return outline(self.files[0])

    def read(self) -> Content:
        """See :class:`Layout`."""
        return read(self.files[0])

    def digest(self) -> str:
        """See :class:`Layout`."""
        return digest_of_file(self.files[0])


@LAYOUTS.register("shards")
class Shards(Layout):
    """A model in several files, by an index that says which name lies in which, or by the numbers in their names."""

    label = "sharded"

    def __init__(self, path: Path, files: Sequence[Path], names: Mapping[str, str] | None) -> None:
        super().__init__(path, files)
        self._names = names

    @classmethod
    def found(cls, path: Path) -> Shards | None:
        """See :class:`Layout`."""
        folder = path if is_folder(path) else path.parent
        indexes = [folder / name for name in _INDEX if (folder / name).is_file()] if is_folder(path) else [path]
        if indexes:
            names = _weight_map(indexes[0])
            files = [folder / name for name in sorted(set(names.values()))]
        else:
            names, files = None, _numbered(folder)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{path} lacks {len(missing)} of its {len(files)} shards, such as {missing[0]}. Copy the whole folder "
                "again, or wait until the training has written it."
            )
        return cls(path, files, names) if files else None

    def outline(self) -> Content:
        """See :class:`Layout`."""
        return self._joined([outline(file, part=True) for file in self.files])

    def read(self) -> Content:
        """See :class:`Layout`."""
        return self._joined([read(file, part=True) for file in self.files])

    def digest(self) -> str:
        """See :class:`Layout`."""
        return joined_digest((file.name, digest_of_file(file, part=True)) for file in self.files)

    def _joined(self, parts: Sequence[Content]) -> Content:
        value: dict[str, Any] = {}
        for file, part in zip(self.files, parts, strict=True):
            if not isinstance(part.value, Mapping):
                raise CheckpointError(f"{file} holds a {type(part.value).__name__}, but a shard is a state_dict.")
            for name, tensor in part.value.items():
                if self._names is None or self._names.get(name) == file.name:
                    value[name] = tensor
        lacking = sorted(set(self._names or ()) - value.keys())
        if lacking:
            raise CheckpointError(
                f"{self.path} lacks {lacking[0]} in {(self._names or {})[lacking[0]]}, where its index says that it is "
                f"({len(lacking)} such weights in all). Copy the whole folder again."
            )
        digests = zip((file.name for file in self.files), (part.sha256 for part in parts), strict=True)
        return Content(value, joined_digest(digests), ordered=all(part.ordered for part in parts))


def joined_digest(digests: Any) -> str:
    """One digest over several, each with the name of what it is of."""
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in digests).encode()).hexdigest()


def json_of(path: Path) -> dict[str, Any]:
    """An object of JSON that a trainer wrote, read once until it changes; nobody may change it.

    Raises:
        CheckpointError: it is missing, damaged or something else.
    """
    return remembered("json", path, lambda: _json_of(path))


def _json_of(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text() if path.stat().st_size <= _LONGEST_JSON else "too long"
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(
            f"{path} cannot be read as JSON ({reason}). If it is still being written, try again later; else copy it "
            "again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, but a JSON object is expected. Copy it again.")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    names = json_of(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{index} has no weight_map from names to files. Copy it again.")
    outside = next((file for file in names.values() if Path(file).name != file), None)
    if outside is not None:
        raise CheckpointError(f"{index} names the shard {outside!r}, which is not in its folder. Copy it again.")
    return names


def _numbered(folder: Path) -> list[Path]:
    """All shards that the names of those in a folder without an index tell of."""
    for file in sorted(folder.iterdir()) if is_folder(folder) else []:
        found = _SHARD.fullmatch(file.name)
        if found is not None and found[1] in ("model", "pytorch_model"):
            width = len(found[2])
            return [
                folder / f"{found[1]}-{number:0{width}}-of-{found[3]}.{found[4]}"
                for number in range(1, int(found[3]) + 1)
            ]
    return []


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is.

    Args:
        path: as it was given.
        folder: in which its trainer keeps what belongs to it; ``None`` of a single file.
        layout: of its weights.
    """

    path: Path
    folder: Path | None
    layout: Layout


def place_of(path: Path) -> Place:
    """Where the checkpoint at ``path`` is: a folder, its file of weights, or a file of its own.

    Raises:
        CheckpointError: a folder has no weights, or not all of them.
    """
    layout = layout_of(path)
    if layout is None:
        inside = sorted(file.name for file in path.iterdir())
        holds = (
            f"it holds {', '.join(inside[:4])}{' and others' if len(inside) > 4 else ''}" if inside else "it is empty"
        )
        raise CheckpointError(
            f"{path} is a folder without weights that gradindex knows: {holds}. If a training is still writing it, "
            f"wait; if it holds checkpoints, give find_checkpoints({str(path)!r}); else give the file of weights in it."
        )
    of_folder = path.name in (*_WHOLE, *_INDEX) or (path.parent / "adapter_config.json").is_file()
    return Place(path, path if is_folder(path) else path.parent if of_folder else None, layout)
