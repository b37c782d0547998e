"""Checkpoints on disk: their weights, and the step size eta that each one stands for."""

from __future__ import annotations

import fnmatch
import glob
import math
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import ArgumentError, CheckpointError, DependencyError
from .files import sha256
from .recorder import MODEL_KEY, RECORD_KEY, recorded_groups, recorded_training

Weighting = Literal["learning_rate", "integrated", "uniform"]

_USUAL_KEYS = (MODEL_KEY, "state_dict", "model_state_dict", "module", "net")
_USUAL_PREFIXES = ("module.", "_orig_mod.", "model.")
_RECORDED_FIELD = {"learning_rate": "learning_rate", "integrated": "learning_rate_sum"}


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights on disk and its step size.

    Args:
        path: ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` (read with ``weights_only=True``) or
            ``.safetensors``.
        learning_rate: eta, one for all parameters or by parameter name (names may be
            patterns such as ``"head.*"``). ``None`` reads what ``Recorder`` saved.
        weighting: which recorded number is eta: ``"learning_rate"`` at the checkpoint (the
            paper), ``"integrated"``, its sum over the steps since the previous checkpoint, or
            ``"uniform"``, 1 for every checkpoint. Ignored where ``learning_rate`` is given.
        step: optimizer steps taken; orders the checkpoints. Read from the file when recorded.
        key: where the weights lie inside the file, such as ``"ema.model"``; by default the
            usual places are tried.
        prefix: what to strip from every name, such as ``"module."``; by default the usual
            prefixes are stripped when the model does not have them itself.
    """

    path: str | os.PathLike[str]
    learning_rate: float | Mapping[str, float] | None = None
    weighting: Weighting = "learning_rate"
    step: int | None = None
    key: str | None = None
    prefix: str | None = None

    def __post_init__(self) -> None:
        if self.weighting not in ("learning_rate", "integrated", "uniform"):
            raise ArgumentError(
                f"weighting is {self.weighting!r}, but must be 'learning_rate', 'integrated' or 'uniform'."
            )
        given = self.learning_rate
        rates = given.values() if isinstance(given, Mapping) else [] if given is None else [given]
        for rate in rates:
            if not (rate >= 0 and rate < float("inf")):
                raise ArgumentError(
                    f"{self.path} has learning rate {rate}, but a rate must be finite and not negative."
                )

    def load(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights, by the names of ``model.state_dict()``.

        Raises:
            CheckpointError: the file is missing or damaged, or its names or shapes are not
                the model's; the message names the first that differ.
        """
        weights = self._weights(_read(Path(self.path)))
        expected = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
        weights = self._strip(weights, expected)
        problems = [f"{name} is missing" for name in expected if name not in weights]
        problems += [f"{name} is not in the model" for name in weights if name not in expected]
        problems += [
            f"{name} has shape {tuple(weights[name].shape)}, the model {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise CheckpointError(
                f"{self.path} does not fit the model: {'; '.join(problems[:3])}{more}. "
                "Check that the task builds the model this checkpoint was saved from, or give key= and prefix=."
            )
        return weights

    def learning_rates(self, parameters: Sequence[str]) -> dict[str, float]:
        """Eta of each named parameter.

        Raises:
            CheckpointError: no weight is known for one of them.
        """
        way_out = (
            "Give learning_rate= to Checkpoint or find_checkpoints, train with gradindex.Recorder, "
            "or choose weighting='uniform'."
        )
        if self.learning_rate is None and self.weighting == "uniform":
            return dict.fromkeys(parameters, 1.0)
        if self.learning_rate is None:
            record = read_record(Path(self.path))
            if record is None:
                raise CheckpointError(
                    f"{self.path} has no recorded learning rate, so its weight eta is unknown. {way_out}"
                )
            rates: Mapping[str, float] = recorded_groups(record, _RECORDED_FIELD[self.weighting])
            for prefix in _USUAL_PREFIXES:
                rates = {name.removeprefix(prefix): rate for name, rate in rates.items()} | dict(rates)
        elif isinstance(self.learning_rate, Mapping):
            rates = self.learning_rate
        else:
            return dict.fromkeys(parameters, float(self.learning_rate))
        found: dict[str, float] = {}
        for name in parameters:
            if name in rates:
                found[name] = float(rates[name])
                continue
            matches = [rate for pattern, rate in rates.items() if fnmatch.fnmatchcase(name, pattern)]
            if not matches:
                raise CheckpointError(
                    f"{self.path} has learning rates for {len(rates)} parameters, but none for {name}. "
                    f"Leave it out with layers=, or: {way_out}"
                )
            found[name] = float(matches[0])
        return found

    def recorded_training(self) -> dict[str, bool | None] | None:
        """By name, whether a parameter took a step since the previous checkpoint, as ``Recorder`` saved it.

        ``None`` for a file that it did not save, and for a parameter where it is not known: an earlier version tells
        only what the optimizer held.
        """
        record = None if Path(self.path).suffix == ".safetensors" else read_record(Path(self.path))
        if record is None:
            return None
        found = recorded_training(record)
        for prefix in _USUAL_PREFIXES:
            found = {name.removeprefix(prefix): took for name, took in found.items()} | found
        return found

    def second_moments(self) -> dict[str, Tensor]:
        """Adam's bias-corrected second moments v by parameter name, as ``Recorder`` saved them.

        Raises:
            CheckpointError: they were not recorded.
        """
        record = read_record(Path(self.path)) or {}
        if "second_moments" not in record:
            raise CheckpointError(
                f"{self.path} has no recorded second moments. Train with gradindex.Recorder(..., second_moments=True), "
                "or leave preconditioner out of the task."
            )
        found: dict[str, Tensor] = dict(record["second_moments"])
        for prefix in _USUAL_PREFIXES:
            found = {name.removeprefix(prefix): moments for name, moments in found.items()} | found
        return found

    def loss(self) -> float:
        """The training loss that ``Recorder.save(loss)`` recorded.

        Raises:
            CheckpointError: it was not recorded.
        """
        record = read_record(Path(self.path)) or {}
        if "loss" not in record:
            raise CheckpointError(
                f"{self.path} has no recorded training loss. Train with gradindex.Recorder and save(loss), "
                "or give losses."
            )
        return float(record["loss"])

    @property
    def weight_source(self) -> str:
        """Where eta comes from, in words: the weighting, or ``"given"``."""
        return self.weighting if self.learning_rate is None else "given"

    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        with _opened(Path(self.path)):
            return sha256(Path(self.path))

    def _weights(self, content: Any) -> dict[str, Tensor]:
        if self.key is not None:
            for part in self.key.split("."):
                if not isinstance(content, Mapping) or part not in content:
                    names = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
                    raise CheckpointError(f"{self.path} has no key {self.key!r}. It holds: {names[:200]}.")
                content = content[part]
        else:
            for key in _USUAL_KEYS:
                if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                    content = content[key]
                    break
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{self.path} holds a {type(content).__name__}, but a state_dict is needed. Save model.state_dict()."
            )
        weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if not weights:
            raise CheckpointError(
                f"{self.path} holds no weights under the usual keys; it holds: {', '.join(map(str, content))[:200]}. "
                "Say where they are with key=."
            )
        return weights

    def _strip(self, weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        prefixes: Sequence[str] = _USUAL_PREFIXES if self.prefix is None else (self.prefix,)
        for prefix in prefixes:
            if not all(name.startswith(prefix) for name in weights):
                continue
            if self.prefix is None and all(name.startswith(prefix) for name in expected):
                continue
            weights = {name[len(prefix) :]: tensor for name, tensor in weights.items()}
        return weights


def find_checkpoints(
    pattern: str | os.PathLike[str],
    *,
    learning_rate: float | Mapping[str, float] | Callable[[int], float] | None = None,
    weighting: Weighting = "learning_rate",
    key: str | None = None,
    prefix: str | None = None,
) -> list[Checkpoint]:
    """Find checkpoint files, in the order of their steps.

    The step is what ``Recorder`` saved, else the last whole number in the file's name.

    Args:
        pattern: a glob such as ``"runs/mnist/*.pt"``, or a folder.
        learning_rate: eta where ``Recorder`` did not save it: a number, numbers by parameter
            name, or a function of the step (a schedule).
        weighting: see :class:`Checkpoint`.
        key: see :class:`Checkpoint`.
        prefix: see :class:`Checkpoint`.

    Returns:
        At least one checkpoint, by ascending step.

    Raises:
        CheckpointError: nothing matches, or a file has no step.
    """
    folder = Path(pattern)
    if folder.is_dir():
        paths = [str(path) for suffix in ("*.pt", "*.pth", "*.safetensors") for path in folder.glob(suffix)]
    else:
        paths = glob.glob(os.fspath(pattern))  # noqa: PTH207  # Path.glob refuses absolute patterns
    if not paths:
        raise CheckpointError(
            f"No checkpoint matches {pattern}. Check the path, or train with gradindex.Recorder first."
        )
    found = []
    for path in paths:
        record = read_record(Path(path))
        numbers = re.findall(r"\d+", Path(path).stem)
        if record is not None:
            step = int(record["step"])
        elif numbers:
            step = int(numbers[-1])
        else:
            raise CheckpointError(
                f"{path} has no step in its name, so its place among the checkpoints is unknown. "
                "List the checkpoints yourself: [Checkpoint(path, learning_rate=..., step=...), ...]."
            )
        found.append(Checkpoint(path, None, weighting, step, key, prefix))
    found.sort(key=lambda checkpoint: (checkpoint.step, str(checkpoint.path)))
    if learning_rate is None:
        return found
    if callable(learning_rate):
        return [replace(item, learning_rate=float(learning_rate(item.step or 0))) for item in found]
    return [replace(item, learning_rate=learning_rate) for item in found]


def evenly(checkpoints: Sequence[Checkpoint], count: int) -> list[Checkpoint]:
    """The checkpoint nearest to the middle of each of ``count`` equal spans, in the order of training.

    TracInCP stands for a sum over all steps, and the middle of a span stands for it best (the midpoint rule):
    on MNIST, 5 of 20 agree with the sum over all steps to a mean Pearson of 0.936, the ends of the spans to
    0.917 (docs/paper.md). Each keeps its own weight; ``"integrated"`` covers the steps since the checkpoint
    saved before it, also where that one is not chosen.

    Args:
        checkpoints: in the order of training, saved at equal distances.
        count: from 1 to their number.

    Raises:
        ArgumentError: ``count`` is out of range.
    """
    _check_count(checkpoints, count)
    n = len(checkpoints)
    # Checkpoint j of n stands at the end of step j, so the middle (k - 1/2) n / count is rounded to a whole j.
    return [checkpoints[((2 * number - 1) * n + count) // (2 * count) - 1] for number in range(1, count + 1)]


def by_loss_drop(
    checkpoints: Sequence[Checkpoint], count: int, losses: Sequence[float] | None = None
) -> list[Checkpoint]:
    """Those before which the training loss fell most, in the order of training.

    The drop of a checkpoint is the loss at the one before it minus its own; the first has none before it
    and is chosen only when all are.

    Source: Pruthi et al. 2020 (arXiv:2002.08484): checkpoints from where the loss falls.

    Args:
        checkpoints: in the order of training.
        count: from 1 to their number.
        losses: the training loss of each; by default what ``Recorder.save(loss)`` recorded.

    Raises:
        ArgumentError: ``count`` is out of range, or there is not one finite loss for each checkpoint.
        CheckpointError: no loss was recorded.
    """
    _check_count(checkpoints, count)
    values = [item.loss() for item in checkpoints] if losses is None else [float(loss) for loss in losses]
    if len(values) != len(checkpoints) or not all(map(math.isfinite, values)):
        finite = sum(map(math.isfinite, values))
        raise ArgumentError(
            f"losses has {finite} finite values, but there are {len(checkpoints)} checkpoints. Give one for each."
        )
    drops = [-math.inf] + [before - after for before, after in pairwise(values)]
    chosen = sorted(range(len(values)), key=lambda number: -drops[number])[:count]
    return [checkpoints[number] for number in sorted(chosen)]


def _check_count(checkpoints: Sequence[Checkpoint], count: int) -> None:
    if not 1 <= count <= len(checkpoints):
        raise ArgumentError(
            f"count is {count}, but must be from 1 to {len(checkpoints)}, the number of checkpoints. Choose another."
        )


def read_record(path: Path) -> dict[str, Any] | None:
    """What ``Recorder`` saved beside the weights, or ``None`` in other files."""
    content = _read(path)
    record = content.get(RECORD_KEY) if isinstance(content, Mapping) else None
    return record if isinstance(record, dict) and "groups" in record else None


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise CheckpointError(f"Checkpoint {path} does not exist. Check the path in the task.") from None
    except OSError as error:
        raise CheckpointError(f"Checkpoint {path} cannot be read: {error.strerror}.") from None


def _read(path: Path) -> Any:
    with _opened(path):
        pass
    if path.suffix == ".safetensors":
        try:
            import safetensors
            from safetensors.torch import load_file
        except ImportError:
            raise DependencyError(
                f"{path} needs the package safetensors. Install it: pip install 'gradindex[safetensors]'."
            ) from None
        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(_damaged(path, error)) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "Unsupported global" in text or "Unsupported class" in text:
            raise CheckpointError(
                f"{path} holds Python objects besides tensors and plain values, which gradindex never executes. "
                "Save model.state_dict() instead of the model."
            ) from None
        raise CheckpointError(_damaged(path, error)) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(_damaged(path, error)) from None


def _damaged(path: Path, error: Exception) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return f"{path} cannot be read as a checkpoint; it may be truncated or damaged ({first}). Copy or save it again."
