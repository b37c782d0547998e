"""The place of a checkpoint in its training: from the file, else from its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..recorder import RECORD_KEY
from .reading import Content

# By label, the better first: what files and names call it.
_INSIDE = {
    "step": ("global_step", "step", "iteration", "iter", "num_updates", "global_steps", "steps"),
    "epoch": ("epoch", "current_epoch", "epochs"),
}
_WORDS = {"step": r"(?:global[_-]?)?steps?|iter(?:ation)?s?|updates?", "epoch": r"epochs?|ep"}
_NUMBERED_FOLDER = re.compile(
    r"(?:(?:checkpoint|ckpt|(?:global[_-]?)?step|iter(?:ation)?|epoch)[=_-]?\d+[-_]?)+|\d+", re.IGNORECASE
)
_LARGEST = 2**63
_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".tar", ".pkl"}
# What are no steps: decimals, dates and times, versions, hashes, and numbers that another word explains.
_OTHER = re.compile(
    r"""\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+"""
    r"""|(?:19|20)\d\d[-_]?[01]\d[-_]?[0-3]\d(?:[-_T]?\d\d[-_:]?\d\d(?:[-_:]?\d\d)?)?|\d\d[-_:]\d\d[-_:]\d\d"""
    r"""|v\d+(?:\.\d+)*"""
    r"""|(?<![0-9a-z])(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{7,}(?![0-9a-z])"""
    r"""|[a-z_]*(?:loss|acc|accuracy|f1|auc|score|error|ppl|seed|fold|rank|lr|bs|batch|batch_size|dim|size|world)"""
    r"""[=_-]*-?\d+(?:\.\d+)?"""
    r"""|[a-z_]+=-?\d+(?:\.\d+)?""",
    re.IGNORECASE,
)


def numbers_of(path: Path, content: Content) -> dict[str, int]:
    """The numbers that can be a checkpoint's step, by what they are: ``"step"``, ``"epoch"`` or ``"number"``.

    What the file says goes before what its name says. A name without a number takes its folder's, as in
    ``checkpoint-100/model.safetensors``.

    Raises:
        CheckpointError: the name has two numbers of the same kind.
    """
    inside = _inside(content)
    if "step" in inside:
        return inside
    named = _in_name(path, _stem(path))
    if not named and not re.search(r"\d", _stem(path)):
        folder = path.absolute().parent.name
        if _NUMBERED_FOLDER.fullmatch(folder):
            named = _in_name(path, folder)
    return {**named, **inside}


def common_steps(paths: Sequence[Path], numbers: Sequence[Mapping[str, int]]) -> list[int]:
    """The step of each of a training's checkpoints, all by the same kind of number.

    Raises:
        CheckpointError: one has none, they have different kinds, or two are equal.
    """
    way_out = "List the checkpoints yourself: [Checkpoint(path, learning_rate=..., step=...), ...]."
    for path, found in zip(paths, numbers, strict=True):
        if not found:
            raise CheckpointError(
                f"{path} has no step in its name that is unambiguous, and none inside, so its place among the "
                f"checkpoints is unknown. {way_out}"
            )
    label = next((label for label in ("step", "epoch", "number") if all(label in found for found in numbers)), None)
    if label is None:
        pairs = combinations(zip(paths, numbers, strict=True), 2)
        (one, first), (other, second) = next(pair for pair in pairs if not pair[0][1].keys() & pair[1][1].keys())
        kinds = [" and ".join(f"{label} {n}" for label, n in found.items()) for found in (first, second)]
        raise CheckpointError(
            f"{one} is ordered by {kinds[0]}, but {other} by {kinds[1]}, so their order is unknown. {way_out}"
        )
    return [found[label] for found in numbers]


def _inside(content: Content) -> dict[str, int]:
    value = content.value
    if not isinstance(value, Mapping):
        return {}
    record = value.get(RECORD_KEY)
    if isinstance(record, Mapping) and _whole(record.get("step")) is not None:
        return {"step": int(record["step"])}
    if any(
        isinstance(item, Mapping) for item in value.values()
    ):  # a trainer's: no state dict, whose buffers have names
        source: Mapping[str, Any] = value
    else:
        source = {name: int(text) for name, text in content.metadata.items() if text.isascii() and text.isdigit()}
    found = {}
    for label, names in _INSIDE.items():
        number = next((n for n in (_whole(source.get(name)) for name in names) if n is not None), None)
        if number is not None:
            found[label] = number
    return found


def _whole(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LARGEST:
        return None
    return int(value) if value == int(value) else None


def _stem(path: Path) -> str:
    name = path.name
    while Path(name).suffix.lower() in _SUFFIXES:
        name = Path(name).stem
    return name


def _in_name(path: Path, name: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for label, words in _WORDS.items():
        before = rf"(?<![a-z])(?:{words})[=_\-. :]*(\d+)(?![\d.]*\d)(?![a-z])"
        after = rf"(?<![\d.a-z=])(\d+)[_-]?(?:{words})(?![a-z0-9])"
        values = {int(n) for n in re.findall(before, name, re.IGNORECASE)}
        values = values or {int(n) for n in re.findall(after, name, re.IGNORECASE)}
        if len(values) > 1:
            raise _several(path, label, values)
        if values:
            found[label] = values.pop()
    if found:
        return found
    rest = _OTHER.sub("~", name)
    alone = re.findall(r"(?<![a-z0-9~])(\d+)(?![a-z0-9~])", rest, re.IGNORECASE)
    glued = re.findall(r"(?<![0-9~])(\d+)(?![a-z0-9~])", rest, re.IGNORECASE)
    numbers = alone or glued
    if len(numbers) > 1:
        raise _several(path, "number", [int(n) for n in numbers])
    return {"number": int(numbers[0])} if numbers else {}


def _several(path: Path, label: str, values: Collection[int]) -> CheckpointError:
    return CheckpointError(
        f"{path} has {label}s {' and '.join(map(str, sorted(values)))} in its name, so its step is unknown. "
        "List the checkpoints yourself: [Checkpoint(path, learning_rate=..., step=...), ...]."
    )
