"""Checkpoints on disk: their weights, and the step size eta that each one stands for."""

from __future__ import annotations

import filecmp
import glob
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .choices import WEIGHTINGS, Weighting
from .digests import digest
from .errors import ArgumentError, CheckpointError
from .progress import note
from .recorder import RECORD_KEY, recorded_groups, recorded_training
from .weights import (
    Content,
    Rate,
    aligned,
    and_others,
    as_rate,
    as_rates,
    common_steps,
    digest_of_file,
    fitted,
    found_weights,
    numbers_of,
    outline,
    rate_for,
    read,
)

_RECORDED_FIELD = {"learning_rate": "learning_rate", "integrated": "learning_rate_sum"}
# Suffixes of checkpoints in a folder, and how files begin that trainers write beside them.
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".tar")
_NO_WEIGHTS = (
    "optimizer", "optim", "scheduler", "lr_scheduler", "rng_state", "random_states", "training_args", "scaler",
    "trainer_state", "sampler",
)  # fmt: skip
_WAY_OUT = (
    "Give learning_rate= to Checkpoint or find_checkpoints, train with gradindex.Recorder, "
    "or choose weighting='uniform'."
)


@dataclass(frozen=True)
class Loaded:
    """What one reading of a checkpoint's file gave.

    Args:
        checkpoint: what was read.
        tensors: the weights, by the names of ``model.state_dict()``, on the CPU; no file is mapped.
        record: what ``Recorder`` saved beside them.
        sha256: of the bytes that all this was read from.
        filled: names of the model that the file does not have: tied to one that it has, or a buffer of the model.
        passed_over: names of the file that the model does not have.
    """

    checkpoint: Checkpoint
    tensors: dict[str, Tensor]
    record: Mapping[str, Any] | None
    sha256: str
    filled: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    def check_rates(self, rates: Mapping[str, float]) -> None:
        """Refuse a file that took the place of the one whose learning rates were read before.

        Raises:
            CheckpointError: it has others for the parameters that have one.
        """
        known = {name: rate for name, rate in rates.items() if rate != 0}
        if self.checkpoint._rates(self.record, list(known)) != known:
            raise CheckpointError(
                f"{self.checkpoint.path} has other learning rates than when its record was read, so it changed "
                "meanwhile. Try again when it is written."
            )

    def second_moments(self) -> dict[str, Tensor]:
        """As :meth:`Checkpoint.second_moments`, by the names of the model."""
        return _moments(self.checkpoint, self.record, list(self.tensors))

    def described(self) -> dict[str, Any]:
        """What of the file a store must remember."""
        found: dict[str, Any] = {"sha256": self.sha256}
        for name in ("key", "prefix"):
            if getattr(self.checkpoint, name) is not None:
                found[name] = getattr(self.checkpoint, name)
        for name in ("filled", "passed_over"):
            if getattr(self, name):
                found[name] = tuple(sorted(getattr(self, name)))
        return found


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights on disk and its step size.

    Args:
        path: ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` (read with ``weights_only=True``) or
            ``.safetensors``.
        learning_rate: eta, one for all parameters or by parameter name; names may be
            patterns such as ``"head.*"``, or modules, and the closest one counts. Text such as ``"1e-3"``
            and tensors are numbers, too. ``None`` reads what ``Recorder`` saved.
        weighting: which recorded number is eta: ``"learning_rate"`` at the checkpoint (the
            paper), ``"integrated"``, its sum over the steps since the previous checkpoint, or
            ``"uniform"``, 1 for every checkpoint. Ignored where ``learning_rate`` is given.
        step: optimizer steps taken; orders the checkpoints. Read from the file when recorded.
        key: where the weights lie inside the file, such as ``"ema.model"``; by default the
            usual places are tried.
        prefix: what stands before the model's names in the file, such as ``"encoder."``; names without
            it are passed over. By default it is looked for. Wrappers (``module.``, ``_orig_mod.``) do not count.

    Raises:
        ArgumentError: the learning rate or weighting is impossible.
    """

    path: str | os.PathLike[str]
    learning_rate: Rate | None = None
    weighting: Weighting = "learning_rate"
    step: int | None = None
    key: str | None = None
    prefix: str | None = None
    # What find_checkpoints took the step from: a file that says another thing later is another file.
    _numbers: Mapping[str, int] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise ArgumentError(
                f"path is a {type(self.path).__name__}, but must be the path of a file. Save weights that are in "
                "memory first: torch.save(model.state_dict(), 'step_1.pt')."
            )
        if self.weighting not in WEIGHTINGS:
            raise ArgumentError(
                f"weighting is {self.weighting!r}, but must be 'learning_rate', 'integrated' or 'uniform'."
            )
        if self.learning_rate is not None:
            object.__setattr__(self, "learning_rate", as_rate(self.path, self.learning_rate))

    def read(self, model: nn.Module) -> Loaded:
        """Read the file once: weights, record and digest are of the same bytes.

        Raises:
            CheckpointError: as for :meth:`load`.
        """
        path = Path(self.path)
        content = read(path)
        if self._numbers is not None and dict(numbers_of(path, content)) != dict(self._numbers):
            raise CheckpointError(
                f"{path} has another step than when it was found. Call find_checkpoints again for the present files."
            )
        found = fitted(path, found_weights(path, content.value, self.key), model, self.prefix)
        return Loaded(self, found.tensors, _record(content), content.sha256, found.filled, found.passed_over)

    def load(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights, by the names of ``model.state_dict()``.

        A tied parameter that the file leaves out comes from its twin, a buffer that it lacks from the model.

        Raises:
            CheckpointError: the file is missing or damaged, or its names or shapes are not
                the model's; the message names the first that differ.
        """
        return self.read(model).tensors

    def learning_rates(self, parameters: Sequence[str]) -> dict[str, float]:
        """Eta of each named parameter.

        Raises:
            CheckpointError: no weight is known for one of them.
        """
        needed = self.learning_rate is None and self.weighting != "uniform"
        return self._rates(_record(outline(Path(self.path))) if needed else None, parameters)

    def _rates(self, record: Mapping[str, Any] | None, parameters: Sequence[str]) -> dict[str, float]:
        given = self.learning_rate
        if given is None and self.weighting == "uniform":
            return dict.fromkeys(parameters, 1.0)
        if given is None:
            if record is None:
                raise CheckpointError(
                    f"{self.path} has no recorded learning rate, so its weight eta is unknown. {_WAY_OUT}"
                )
            recorded = recorded_groups(dict(record), _RECORDED_FIELD[self.weighting])
            rates = {name: recorded[found] for name, found in _recorded(recorded, parameters).items()}
        elif isinstance(given, Mapping):
            rates = {name: float(rate) for name, rate in given.items()}
        else:
            return dict.fromkeys(parameters, float(given))  # type: ignore[arg-type]  # a number since __post_init__
        return {name: rate_for(self.path, rates, name, _WAY_OUT) for name in parameters}

    def recorded_training(self, parameters: Sequence[str]) -> dict[str, bool | None] | None:
        """By name, whether a parameter took a step since the previous checkpoint, as ``Recorder`` saved it.

        ``None`` for a file that it did not save, and for a parameter where it is not known: an earlier version tells
        only what the optimizer held. Parameters that the optimizer did not hold are left out.
        """
        record = _record(outline(Path(self.path)))
        if record is None:
            return None
        found = recorded_training(record)
        return {name: found[recorded] for name, recorded in _recorded(found, parameters).items()}

    def second_moments(self) -> dict[str, Tensor]:
        """Adam's bias-corrected second moments v by parameter name, as ``Recorder`` saved them.

        Raises:
            CheckpointError: they were not recorded.
        """
        return _moments(self, _record(read(Path(self.path))), None)

    def loss(self) -> float:
        """The training loss that ``Recorder.save(loss)`` recorded.

        Raises:
            CheckpointError: it was not recorded.
        """
        record = _record(outline(Path(self.path))) or {}
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
        """SHA-256 of the file as it is now, in hexadecimal."""
        return digest_of_file(Path(self.path))


def find_checkpoints(
    pattern: str | os.PathLike[str],
    *,
    learning_rate: Rate | Mapping[int, Rate] | Sequence[Rate] | Callable[[int], Rate] | None = None,
    weighting: Weighting = "learning_rate",
    key: str | None = None,
    prefix: str | None = None,
) -> list[Checkpoint]:
    """Find checkpoint files, in the order of their steps.

    The step is what ``Recorder`` saved or a trainer wrote into the file, else the number in the file's name that is
    labelled step, else epoch, else its only whole number (or its folder's, as in ``checkpoint-100``); never a part of
    a decimal, a version or a date. All files must have the same kind.

    Args:
        pattern: a glob such as ``"runs/mnist/*.pt"``, or a folder.
        learning_rate: eta where ``Recorder`` did not save it: a number, numbers by parameter
            name, a list of one for each checkpoint in the order of their steps, ``{step: rate}``, or a function of
            the step (a schedule).
        weighting: see :class:`Checkpoint`.
        key: see :class:`Checkpoint`.
        prefix: see :class:`Checkpoint`.

    Returns:
        At least one checkpoint, by ascending step.

    Raises:
        CheckpointError: nothing matches, a file has no step, or two have the same.
        ArgumentError: there is not a rate for each checkpoint.
    """
    folder = Path(pattern)
    if folder.is_dir():
        paths = sorted(path for path in folder.iterdir() if _is_checkpoint(path))
    else:
        paths = sorted(map(Path, glob.glob(os.fspath(pattern))))  # noqa: PTH207  # Path.glob refuses absolute patterns
    if not paths:
        nested = sorted({path.name for path in folder.glob("*/*") if _is_checkpoint(path)}) if folder.is_dir() else []
        if nested:
            raise CheckpointError(
                f"{folder} holds folders, but no checkpoint itself. Give the files in them: "
                f"find_checkpoints({str(folder / '*' / nested[0])!r})."
            )
        raise CheckpointError(
            f"No checkpoint matches {pattern}. Check the path, or train with gradindex.Recorder first."
        )
    numbers = [numbers_of(path, outline(path)) for path in paths]
    by_step: dict[int, Checkpoint] = {}
    for path, found, step in zip(paths, numbers, common_steps(paths, numbers), strict=True):
        if step in by_step:
            _check_copy(Path(by_step[step].path), path, step)
            continue
        by_step[step] = Checkpoint(str(path), None, weighting, step, key, prefix, found)
    checkpoints = [by_step[step] for step in sorted(by_step)]
    if learning_rate is None:
        return checkpoints
    rates = as_rates(learning_rate, sorted(by_step), [item.path for item in checkpoints])
    rated = zip(checkpoints, rates, strict=True)
    return [replace(item, learning_rate=as_rate(item.path, rate)) for item, rate in rated]  # None is no rate here


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
    return _record(read(path))


def differing_names(read: Sequence[Loaded]) -> list[str]:
    """What to tell of names that only the file or only the model has, once for all checkpoints that are alike."""
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Loaded]] = {}
    for item in read:
        if item.filled or item.passed_over:
            alike.setdefault((item.filled, item.passed_over), []).append(item)
    said = []
    for (filled, passed_over), items in alike.items():
        parts = []
        if filled:
            parts.append(f"lacks {_names(filled)}, taken from the tied parameter or from the model's buffer")
        if passed_over:
            parts.append(f"has {_names(passed_over)} besides the model's, passed over")
        said.append(f"{items[0].checkpoint.path}{and_others(len(items) - 1)} {'; and '.join(parts)}.")
    return said


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _record(content: Content) -> dict[str, Any] | None:
    record = content.value.get(RECORD_KEY) if isinstance(content.value, Mapping) else None
    return record if isinstance(record, dict) and "groups" in record else None


def _recorded(names: Mapping[str, Any], parameters: Sequence[str]) -> dict[str, str]:
    """Of each parameter the name that it was recorded by, where it was: by a wrapped model, or one under ``model.``."""
    found = aligned(names, parameters)
    under = aligned(names, [f"model.{name}" for name in parameters if name not in found])
    return found | {name.removeprefix("model."): recorded for name, recorded in under.items()}


def _moments(
    checkpoint: Checkpoint, record: Mapping[str, Any] | None, names: Sequence[str] | None
) -> dict[str, Tensor]:
    if "second_moments" not in (record or {}):
        raise CheckpointError(
            f"{checkpoint.path} has no recorded second moments. Train with "
            "gradindex.Recorder(..., second_moments=True), or leave preconditioner out of the task."
        )
    found: dict[str, Tensor] = dict((record or {})["second_moments"])
    if names is None:
        return found
    return {name: found[recorded] for name, recorded in _recorded(found, names).items()}


def _is_checkpoint(path: Path) -> bool:
    return path.suffix in _SUFFIXES and path.is_file() and not path.name.startswith((".", *_NO_WEIGHTS))


def _check_copy(kept: Path, other: Path, step: int) -> None:
    """Two files of one step are no fault where they are the same, such as a trainer's last.ckpt."""
    same = kept.samefile(other) or filecmp.cmp(kept, other, shallow=False)
    if not (same or digest(read(kept).value) == digest(read(other).value)):  # saved twice: a file holds its own name
        raise CheckpointError(
            f"{kept} and {other} are both of step {step}, so which one counts is unknown. Give a pattern that matches "
            "one of them, or list the checkpoints yourself: [Checkpoint(path, learning_rate=..., step=...), ...]."
        )
    note(f"{other} is the same as {kept} and is left out.")
