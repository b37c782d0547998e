"""Checkpoints in a folder: found by a pattern, in the order of their steps."""

from __future__ import annotations

import filecmp
import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..choices import Weighting
from ..digests import digest
from ..errors import CheckpointError
from ..progress import note
from ..weights import Rate, as_rate, as_rates, common_steps, read
from .file import Checkpoint, Load
from .sources import SOURCES, Source, layout_of, opened

# Suffixes of checkpoints in a folder, and how files begin that trainers write beside them.
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".tar")
_NO_WEIGHTS = (
    "optimizer", "optim", "scheduler", "lr_scheduler", "rng_state", "random_states", "training_args", "scaler",
    "trainer_state", "sampler", "dl_state_dict", "custom_checkpoint_",
)  # fmt: skip
# What a trainer leaves beside the checkpoints of a run: the weights at its end, once more.
_AT_THE_END = re.compile(r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)")
# Folders of checkpoints by their names, and those that a trainer renames once they are whole.
_NUMBERED = re.compile(r"(checkpoint|ckpt|global_?step|step|epoch)[-_=]?\d+", re.IGNORECASE)
_UNFINISHED = re.compile(r"tmp-checkpoint-\d+")
# How far below a folder its only run is looked for, as in lightning_logs/version_0/checkpoints.
_DEEPEST = 3


def find_checkpoints(
    pattern: str | os.PathLike[str],
    *,
    learning_rate: Rate | Mapping[int, Rate] | Sequence[Rate] | Callable[[int], Rate] | None = None,
    weighting: Weighting = "learning_rate",
    key: str | None = None,
    prefix: str | None = None,
    load: Load | None = None,
    base: Literal["model"] | None = None,
) -> list[Checkpoint]:
    """Find checkpoints, in the order of their steps.

    The step is what ``Recorder`` saved or a trainer wrote, else the number in the name that is labelled step, else
    epoch, else its only integer (or its folder's, as in ``checkpoint-100``); never part of a decimal, a version or a
    date. All checkpoints must be numbered in the same way.

    Args:
        pattern: a glob such as ``"runs/mnist/*.pt"``, or a folder: of files, of checkpoints' folders (such as a run of
            the Hugging Face Trainer), of a single run that lies deeper, or a checkpoint itself.
        learning_rate: eta where neither ``Recorder`` nor another trainer saved it: a number, numbers by parameter
            name, a list of one for each checkpoint in the order of their steps, ``{step: rate}``, or a function of
            the step (a schedule).
        weighting: see :class:`Checkpoint`.
        key: see :class:`Checkpoint`.
        prefix: see :class:`Checkpoint`.
        load: see :class:`Checkpoint`; everything that ``pattern`` matches, or lies in the folder, is given to it.
        base: see :class:`Checkpoint`.

    Returns:
        At least one checkpoint, by ascending step.

    Raises:
        CheckpointError: nothing matches, something has no step, two have the same, one is not whole, or they are of
            several trainings.
        ArgumentError: a checkpoint has no rate.
    """
    folder = Path(pattern)
    if folder.is_dir():
        paths = _of_loader(folder) if load is not None else _inside(folder, 0)
    else:
        paths = sorted(map(Path, glob.glob(os.fspath(pattern))))  # noqa: PTH207  # Path.glob refuses absolute patterns
    if not paths:
        raise CheckpointError(
            f"No checkpoint matches {pattern}. Check the path, or train with gradindex.Recorder first."
        )
    sources = [opened(path, data=False, own=load is not None) for path in paths]
    numbers = [source.numbers() for source in sources]
    by_step: dict[int, tuple[Source, Checkpoint]] = {}
    for source, found, step in zip(sources, numbers, common_steps(paths, numbers), strict=True):
        if step in by_step:
            _check_copy(by_step[step][0], source, step)
            continue
        path = str(source.path)
        checkpoint = Checkpoint(path, None, weighting, step, key, prefix, load=load, base=base, _numbers=found)
        by_step[step] = source, checkpoint
    in_order = [by_step[step] for step in sorted(by_step)]
    for kind in SOURCES.values():
        kind.check_together([source for source, _ in in_order if isinstance(source, kind)])
    checkpoints = [checkpoint for _, checkpoint in in_order]
    for number, (before, _) in enumerate(in_order[:-1], 1):
        since = before.numbers().get("step")
        checkpoints[number] = replace(checkpoints[number], _since=since)
    if learning_rate is None:
        return checkpoints
    rates = as_rates(learning_rate, sorted(by_step), [item.path for item in checkpoints])
    rated = zip(checkpoints, rates, strict=True)
    return [replace(item, learning_rate=as_rate(item.path, rate)) for item, rate in rated]  # None is no rate here


def _inside(folder: Path, depth: int) -> list[Path]:
    """The checkpoints of the only run in a folder, or the folder where it is one itself.

    Raises:
        CheckpointError: it holds several runs, or something that is not whole.
    """
    entries = _listed(folder)
    unfinished = [path for path in entries if _UNFINISHED.fullmatch(path.name)]
    if unfinished:
        raise CheckpointError(
            f"{unfinished[0]} is still being written, or was left by a run that was cut short. Wait or remove it, or "
            f"give a pattern without it: find_checkpoints({str(folder / 'checkpoint-*')!r})."
        )
    files = [path for path in entries if _is_checkpoint(path)]
    folders = [path for path in entries if path.is_dir()]
    numbered = [path for path in folders if _NUMBERED.fullmatch(path.name)]
    runs_of = [path for path in folders if path not in numbered and _holds_run(path)]
    whole = [path for path in folders if path in numbered or (path not in runs_of and _has_weights(path))]
    if numbered and not any(_has_weights(path) or _is_written(path) for path in numbered):
        numbered, whole = [], [path for path in whole if path not in numbered]  # a training's folders, not weights'
    if numbered:
        # Folders of another name hold the best, the last or the final one, once more.
        copies = [path for path in (*files, *whole) if _AT_THE_END.fullmatch(path.name) or path.is_dir()]
        for path in copies:
            if path not in numbered:
                note(f"{path} has no step in its name and is skipped; the checkpoints of {folder} have one.")
        return sorted([*numbered, *(path for path in files if path not in copies)])
    if layout_of(folder) is not None:
        return [folder]
    if files or whole:
        return sorted([*files, *whole])
    runs = [(path, found) for path in folders if depth < _DEEPEST and (found := _inside(path, depth + 1))]
    if len(runs) > 1:
        raise CheckpointError(
            f"{folder} holds {len(runs)} runs ({', '.join(path.name for path, _ in runs[:3])}"
            f"{' and others' if len(runs) > 3 else ''}), but one is needed. Give its folder: "
            f"find_checkpoints({str(runs[0][0])!r})."
        )
    return runs[0][1] if runs else []


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _of_loader(folder: Path) -> list[Path]:
    """What may be a checkpoint in a format that only the user knows: files with a usual suffix, else everything."""
    entries = [path for path in _listed(folder) if not path.name.startswith(_NO_WEIGHTS)]
    return [path for path in entries if path.suffix in _SUFFIXES or _NUMBERED.fullmatch(path.name)] or entries


def _has_weights(folder: Path) -> bool:
    return layout_of(folder) is not None


def _holds_run(folder: Path) -> bool:
    return any(path.is_dir() and _NUMBERED.fullmatch(path.name) and _has_weights(path) for path in _listed(folder))


def _is_written(folder: Path) -> bool:
    """Whether a trainer has begun to write a checkpoint into a folder."""
    return any(path.name.startswith((*_NO_WEIGHTS, "config.json")) for path in _listed(folder))


def _is_checkpoint(path: Path) -> bool:
    return path.suffix in _SUFFIXES and path.is_file() and not path.name.startswith((".", *_NO_WEIGHTS))


def _check_copy(kept: Source, other: Source, step: int) -> None:
    """Two checkpoints of one step are no fault where they are the same, such as a trainer's last.ckpt."""
    if not _same(kept, other):
        raise CheckpointError(
            f"{kept.path} and {other.path} both have step {step}, so it is unclear which one counts. Give a pattern "
            "that matches only one, or list the checkpoints yourself: "
            "[Checkpoint(path, learning_rate=..., step=...), ...]."
        )
    note(f"{other.path} is a copy of {kept.path} and is skipped.")


def _same(kept: Source, other: Source) -> bool:
    one, two = kept.path, other.path
    if one.samefile(two):
        return True
    if one.is_dir() or two.is_dir():
        return kept.content.value is not None and kept.place.layout.digest() == other.place.layout.digest()
    if filecmp.cmp(one, two, shallow=False):
        return True
    # Saved twice: a file holds its own name.
    return kept.content.value is not None and digest(read(one).value) == digest(read(two).value)
