"""Checkpoints in a folder: found by a pattern, in the order of their steps."""

from __future__ import annotations

import filecmp
import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..choices import Weighting
from ..digests import digest
from ..errors import CheckpointError
from ..progress import note
from ..weights import Rate, as_rate, as_rates, common_steps, numbers_of, outline, read
from .file import Checkpoint

# Suffixes of checkpoints in a folder, and how files begin that trainers write beside them.
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".tar")
_NO_WEIGHTS = (
    "optimizer", "optim", "scheduler", "lr_scheduler", "rng_state", "random_states", "training_args", "scaler",
    "trainer_state", "sampler",
)  # fmt: skip


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
    labelled step, else epoch, else its only integer (or its folder's, as in ``checkpoint-100``); never part of a
    decimal, a version or a date. All files must be numbered in the same way.

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
        ArgumentError: a checkpoint has no rate.
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
                f"{folder} holds folders, but no checkpoint files. Give the files in them: "
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


def _is_checkpoint(path: Path) -> bool:
    return path.suffix in _SUFFIXES and path.is_file() and not path.name.startswith((".", *_NO_WEIGHTS))


def _check_copy(kept: Path, other: Path, step: int) -> None:
    """Two files of one step are no fault where they are the same, such as a trainer's last.ckpt."""
    same = kept.samefile(other) or filecmp.cmp(kept, other, shallow=False)
    if not (same or digest(read(kept).value) == digest(read(other).value)):  # saved twice: a file holds its own name
        raise CheckpointError(
            f"{kept} and {other} both have step {step}, so it is unclear which one counts. Give a pattern that matches "
            "only one, or list the checkpoints yourself: [Checkpoint(path, learning_rate=..., step=...), ...]."
        )
    note(f"{other} is a copy of {kept} and is skipped.")
