"""Checkpoints that a function of the user's loads into the model, kept as the tensors that they left there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, Loaded
from ..errors import ArgumentError, user_code
from ..weights import Base, fitted, found_weights, read
from .batches import AssertedError

LoadFn = Callable[[nn.Module, Any], float]


@dataclass(frozen=True)
class Snapshot(Checkpoint):
    """A checkpoint in memory, with the learning rate that the function returned.

    Args:
        tensors: parameters and buffers by their names in the model, copies.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def read(self, model: nn.Module, base: Base | None = None, moments: bool = False) -> Loaded:
        """The tensors; there is no file, and so no digest of one. See :class:`Checkpoint`."""
        return Loaded(self, dict(self.tensors), None, sha256="")

    def recorded_training(self, parameters: Sequence[str], model: nn.Module | None = None) -> None:
        """Nothing is recorded. See :class:`Checkpoint`."""


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> float:
    """Load a file into a model, and return its learning rate.

    Args:
        model: gets the weights, which may lie under a usual key such as ``"model_state_dict"`` and may have the
            prefixes of wrappers.
        path: what torch saved, or ``.safetensors``; read with ``weights_only=True``.

    Returns:
        What the file has under ``"learning_rate"``, else 1.

    Raises:
        CheckpointError: it is missing, damaged or does not fit.
    """
    path = Path(path)
    value = read(path).value
    _put(model, fitted(path, found_weights(path, value, None), model, None).tensors)
    rate = value.get("learning_rate", 1.0) if isinstance(value, Mapping) else 1.0
    return float(rate)


def listed(checkpoints: Any) -> list[Any]:
    """Checkpoints as a list: the files of a folder and paths by the numbers in their names, others as they come.

    Raises:
        ArgumentError: there is none.
    """
    found: list[Any]
    if isinstance(checkpoints, (str, os.PathLike)):
        found = sorted(map(str, Path(checkpoints).glob("*")), key=_natural)
    elif isinstance(checkpoints, Iterable):
        found = list(checkpoints)
        if isinstance(checkpoints, list) and all(isinstance(path, str) for path in found):
            found = sorted(found, key=_natural)
    else:
        found = []
    if not found:
        raise ArgumentError(
            f"Invalid checkpoints provided for TracIn class: {checkpoints!r} holds none. Give a folder, a list of "
            "paths, or whatever checkpoints_load_func takes."
        )
    return found


def _natural(path: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def snapshots_of(model: nn.Module, inner: nn.Module, checkpoints: Sequence[Any], load: LoadFn) -> list[Snapshot]:
    """Load each checkpoint into the model and keep what it left there; the model then has its own tensors again.

    Args:
        model: what ``load`` takes.
        inner: the module in it that computes, or itself, by whose names tensors are kept.
        checkpoints: what ``load`` takes, too.
        load: returns the learning rate.

    Raises:
        ArgumentError: the function returns no learning rate.
        UserCodeError: the function raises.
    """
    taken = []
    with _kept(inner):
        for number, checkpoint in enumerate(checkpoints):
            named = isinstance(checkpoint, (str, os.PathLike))
            label = str(checkpoint) if named else f"checkpoint {number}"
            if checkpoint is None:
                raise AssertedError(f"checkpoints[{number}] is None, which cannot be loaded. Leave it out.")
            with user_code(f"checkpoints_load_func ({label})"):
                rate = load(model, checkpoint)
            if rate is None:
                raise ArgumentError(
                    f"checkpoints_load_func returned None for {label}, but must return its learning rate. Return 1.0 "
                    "where all checkpoints count the same."
                )
            taken.append(Snapshot(label, learning_rate=rate, tensors=_tensors(inner)))
    return taken


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    before = _tensors(model)
    try:
        yield
    finally:
        _put(model, before)


def _put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in tensors:
                tensor.copy_(tensors[name])
