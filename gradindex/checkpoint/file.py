"""Checkpoints on disk: their weights, and the step size eta that each one stands for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..choices import WEIGHTINGS, Weighting
from ..errors import ArgumentError, CheckpointError
from ..recorder import RECORD_KEY, recorded_groups, recorded_training
from ..weights import (
    Content,
    Rate,
    aligned,
    and_others,
    as_rate,
    digest_of_file,
    fitted,
    found_weights,
    numbers_of,
    outline,
    rate_for,
    read,
)

_RECORDED_FIELD = {
    "learning_rate": "learning_rate",
    "integrated": "learning_rate_sum",
    "effective": "effective_sum",
}
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
                f"{self.checkpoint.path} has different learning rates than when its record was read, so it was "
                "changed in between. Try again once it is fully written."
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
            patterns such as ``"head.*"``, or modules, and the most specific one wins. Text such as ``"1e-3"``
            and tensors also count as numbers. ``None`` reads what ``Recorder`` saved.
        weighting: which recorded number is eta: ``"learning_rate"`` at the checkpoint (the
            paper), ``"integrated"``, its sum over the steps since the previous checkpoint, ``"effective"``, that
            sum with SGD's momentum and clipping (for parameter groups with different momentum), or
            ``"uniform"``, 1 for every checkpoint. Ignored where ``learning_rate`` is given.
        step: optimizer steps taken; orders the checkpoints. Read from the file when recorded.
        key: where the weights are inside the file, such as ``"ema.model"``; by default the
            usual places are tried.
        prefix: the prefix of the model's names in the file, such as ``"encoder."``; names without it are
            ignored. By default it is detected. Wrappers (``module.``, ``_orig_mod.``) do not count.

    Raises:
        ArgumentError: the learning rate or weighting is invalid.
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
                f"path is a {type(self.path).__name__}, but must be the path of a file. To use weights in "
                "memory, save them first: torch.save(model.state_dict(), 'step_1.pt')."
            )
        if self.weighting not in WEIGHTINGS:
            raise ArgumentError(
                f"weighting is {self.weighting!r}, but must be 'learning_rate', 'integrated', 'effective' or 'uniform'."
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
            raise CheckpointError(f"{path} has a different step than when it was found. Call find_checkpoints again.")
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
            if not recorded and self.weighting == "effective":
                raise CheckpointError(
                    f"{self.path} has no effective rates: they are recorded for torch.optim.SGD where the clipping is "
                    "known. Choose weighting='integrated'."
                )
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
            parts.append(f"lacks {_names(filled)}, filled in from the tied parameter or from the model's buffer")
        if passed_over:
            parts.append(f"has {_names(passed_over)} that the model lacks, ignored")
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
            "gradindex.Recorder(..., second_moments=True), or drop preconditioner from the task."
        )
    found: dict[str, Tensor] = dict((record or {})["second_moments"])
    if names is None:
        return found
    return {name: found[recorded] for name, recorded in _recorded(found, names).items()}
