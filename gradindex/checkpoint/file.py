"""Checkpoints on disk: their weights, and the step size eta that each one stands for."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from ..choices import WEIGHTINGS, Weighting
from ..digests import digest
from ..errors import ArgumentError, CheckpointError, user_code
from ..weights import Base, Rate, Trained, as_rate, fitted, found_weights, rate_for, read
from .recorded import Recorded, no_moments
from .sources import Source, opened, recorded
from .sources.layouts import place_of

# What a user's own loader is: from the path and a copy of the model to weights by name.
Load: TypeAlias = Callable[[Any, nn.Module], Mapping[str, Tensor]]

_WAY_OUT = (
    "Give learning_rate= to Checkpoint or find_checkpoints, train with gradindex.Recorder, "
    "or choose weighting='uniform'."
)


@dataclass(frozen=True)
class Loaded:
    """What one reading of a checkpoint's file gave.

    Args:
        checkpoint: what was read.
        tensors: the weights, by the names of ``model.state_dict()``: on the CPU, but for what the model itself lends;
            no file is mapped.
        record: what ``Recorder`` or another trainer saved beside them, by the names of what was trained.
        sha256: of the bytes that all this was read from; of tensors, where a loader of the user's own or a converter
            read them, and with those that are the model's own.
        filled: names of the model that the file does not have: tied to one that it has, or a buffer of the model.
        passed_over: names of the file that the model does not have.
        from_base: names of the model that the file does not have and that are the model's own, as its base.
        kind: what wrote the checkpoint, in words.
    """

    checkpoint: Checkpoint
    tensors: dict[str, Tensor]
    record: Mapping[str, Any] | None
    sha256: str
    filled: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    from_base: tuple[str, ...] = ()
    kind: str = ""
    _recorded: Recorded | None = field(default=None, repr=False, compare=False)

    def check_rates(self, rates: Mapping[str, float]) -> None:
        """Refuse a file that took the place of the one whose learning rates were read before.

        Raises:
            CheckpointError: it has others for the parameters that have one.
        """
        known = {name: rate for name, rate in rates.items() if rate != 0}
        if self.checkpoint._rates(self._recorded, list(known)) != known:
            raise CheckpointError(
                f"{self.checkpoint.path} has different learning rates than when its record was read, so it was "
                "changed in between. Try again once it is fully written."
            )

    def without_numbers(self) -> Loaded:
        """The same without what is as large as the model."""
        return replace(self, tensors={}, record=None, _recorded=None)

    def second_moments(self) -> dict[str, Tensor]:
        """As :meth:`Checkpoint.second_moments`, by the names of the model."""
        if self._recorded is None:
            raise no_moments(Path(self.checkpoint.path))
        return self._recorded.second_moments(list(self.tensors))

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

    def source(self) -> dict[str, Any]:
        """What to tell people of where it came from, as JSON."""
        return {
            "name": Path(self.checkpoint.path).name,
            "kind": self.kind,
            "from_model": {"parameters": len(self.from_base), "first": list(self.from_base[:3])},
        }


@dataclass(frozen=True, init=False)
class Checkpoint:
    """One set of weights on disk and its step size.

    Args:
        path: a file, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` (read with ``weights_only=True``) or
            ``.safetensors``, or a trainer's folder, such as ``checkpoint-100`` of the Hugging Face Trainer
            (docs/checkpoints.md lists what is known).
        learning_rate: eta, one for all parameters or by parameter name; names may be
            patterns such as ``"head.*"``, or modules, and the most specific one wins. Text such as ``"1e-3"``
            and tensors also count as numbers. ``None`` reads what ``Recorder`` or another trainer saved.
        weighting: which recorded number is eta: ``"learning_rate"`` at the checkpoint (the
            paper), ``"integrated"``, its sum over the steps since the previous checkpoint, ``"effective"``, that
            sum with SGD's momentum and clipping (for parameter groups with different momentum), or
            ``"uniform"``, 1 for every checkpoint. Ignored where ``learning_rate`` is given.
        step: optimizer steps taken; orders the checkpoints. Read from the file when recorded.
        key: where the weights are inside the file, such as ``"ema.model"``; by default the
            usual places are tried.
        prefix: the prefix of the model's names in the file, such as ``"encoder."``; names without it are
            ignored. By default it is detected. Wrappers (``module.``, ``_orig_mod.``) do not count.
        load: a loader of your own, ``load(path, model)``: gets the path as it was given and a copy of the model, and
            returns weights by name, as ``model.state_dict()`` does. What stands beside the weights (a Trainer's log,
            say) still counts.
        base: ``"model"`` takes weights that the checkpoint lacks from the task's model, as it is when the checkpoint is
            read, unless they are tracked; they are kept once for all checkpoints. An adapter does so by itself.

    Raises:
        ArgumentError: the learning rate, weighting, loader or base is invalid.
    """

    path: str | os.PathLike[str]
    learning_rate: Rate | None = None
    weighting: Weighting = "learning_rate"
    step: int | None = None
    key: str | None = None
    prefix: str | None = None
    base: Literal["model"] | None = None
    _loader: Load | None = field(default=None, repr=False)
    # What find_checkpoints took the step from: a file that says another thing later is another file.
    _numbers: Mapping[str, int] | None = field(default=None, repr=False, compare=False)
    # The step of the checkpoint that find_checkpoints found before this one.
    _since: int | None = field(default=None, repr=False, compare=False)

    # By hand, since ``load`` is a method as well.
    def __init__(
        self,
        path: str | os.PathLike[str],
        learning_rate: Rate | None = None,
        weighting: Weighting = "learning_rate",
        step: int | None = None,
        key: str | None = None,
        prefix: str | None = None,
        *,
        load: Load | None = None,
        base: Literal["model"] | None = None,
        _loader: Load | None = None,
        _numbers: Mapping[str, int] | None = None,
        _since: int | None = None,
    ) -> None:
        values = {
            "path": path,
            "learning_rate": learning_rate,
            "weighting": weighting,
            "step": step,
            "key": key,
            "prefix": prefix,
            "base": base,
            "_loader": _loader if load is None else load,
            "_numbers": _numbers,
            "_since": _since,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

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
        if self._loader is not None and not callable(self._loader):
            raise ArgumentError(
                f"load is a {type(self._loader).__name__}, but must be a function of the path and a model that returns "
                "weights by name, such as load=lambda path, model: torch.load(path)['weights']."
            )
        if self.base not in (None, "model"):
            raise ArgumentError(f"base is {self.base!r}, but must be 'model' or None.")
        if self.learning_rate is not None:
            object.__setattr__(self, "learning_rate", as_rate(self.path, self.learning_rate))

    def read(self, model: nn.Module, base: Base | None = None, moments: bool = False) -> Loaded:
        """Read weights and record once: both, and the digest, are of the same bytes.

        Args:
            model: that they are for.
            base: the model's own weights, where several checkpoints share them.
            moments: whether second moments are read that lie in a file of their own.

        Raises:
            CheckpointError: as for :meth:`load`.
        """
        path = Path(self.path)
        source = self._opened(data=True)
        if self._numbers is not None and dict(source.numbers()) != dict(self._numbers):
            raise CheckpointError(f"{path} has a different step than when it was found. Call find_checkpoints again.")
        if self._loader is not None:
            weights = self._given(self._loader, model)
            sha256 = digest(sorted(weights.items())).hex()
        else:
            weights, sha256 = self._weights(source, model), source.content.sha256
        base = (base or Base(model)) if self._lends(source) else None
        found = fitted(path, weights, model, self.prefix, base)
        if base is not None and found.from_base:
            sha256 = hashlib.sha256(f"{sha256} {base.digest(found.from_base)}".encode()).hexdigest()
        recorded = self._record(source, model, moments, weights, base)
        record = None if recorded is None else recorded.record
        names = found.filled, found.passed_over, found.from_base
        return Loaded(self, found.tensors, record, sha256, *names, source.kind, recorded)

    def _weights(self, source: Source, model: nn.Module) -> dict[str, Any]:
        """By the names in the file, with or without their numbers."""
        key = source.key() if self.key is None else self.key
        return source.place.layout.fitting(found_weights(source.path, source.content.value, key), model)

    def _lends(self, source: Source) -> bool:
        return self.base is not None or source.place.layout.of_model

    def _opened(self, data: bool) -> Source:
        return opened(Path(self.path), data, self._loader is not None)

    def _given(self, loader: Load, model: nn.Module) -> dict[str, Tensor]:
        what = f"load, the loader of {self.path},"
        with user_code(what, "It gets the path and a copy of the model, and must return weights by name."):
            given = loader(self.path, copy.deepcopy(model))
        named = given.items() if isinstance(given, Mapping) else ()
        weights = {str(name): value.detach().cpu() for name, value in named if isinstance(value, Tensor)}
        if not weights:
            what = f"a {type(given).__name__}" + (" without tensors" if isinstance(given, Mapping) else "")
            raise CheckpointError(
                f"load returned {what} for {self.path}, but must return weights by name. Return a state_dict."
            )
        return weights

    def load(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights, by the names of ``model.state_dict()``.

        A tied parameter that the file leaves out comes from its twin, a buffer that it lacks from the model. Of the
        model's own weights, which stand in as the base, these are copies.

        Raises:
            CheckpointError: the file is missing or damaged, or its names or shapes are not
                the model's; the message names the first that differ.
            UserCodeError: a loader of your own failed.
        """
        found = self.read(model)
        lent = set(found.from_base)
        return {name: tensor.clone() if name in lent else tensor for name, tensor in found.tensors.items()}

    def learning_rates(self, parameters: Sequence[str], model: nn.Module | None = None) -> dict[str, float]:
        """Eta of each named parameter.

        Args:
            parameters: names.
            model: whose they are; needed where a trainer's groups have different rates and say no names.

        Raises:
            CheckpointError: no weight is known for one of them.
        """
        needed = self.learning_rate is None and self.weighting != "uniform"
        return self._rates(self._record(self._opened(data=False), model) if needed else None, parameters)

    def _record(
        self,
        source: Source,
        model: nn.Module | None,
        moments: bool = False,
        weights: Mapping[str, Any] | None = None,
        base: Base | None = None,
    ) -> Recorded | None:
        """What was recorded, with what was trained: the task's model, or more."""
        trained = None
        if model is not None:
            read = None
            if self._loader is None and source.content.value is not None:
                read = (lambda: self._weights(source, model)) if weights is None else (lambda: weights)
            tracked = None if not self._lends(source) else () if base is None else base.tracked
            trained = Trained(source.path, model, read, source.content.ordered, self.prefix, tracked)
            if weights is not None:
                trained.own  # noqa: B018 - now, so that the numbers can go
        record = source.record(trained, self._since, moments)
        return None if record is None else Recorded(source.path, record, trained, self.prefix)

    def _rates(self, recorded: Recorded | None, parameters: Sequence[str]) -> dict[str, float]:
        given = self.learning_rate
        if given is None and self.weighting == "uniform":
            return dict.fromkeys(parameters, 1.0)
        if given is None:
            if recorded is None:
                raise CheckpointError(
                    f"{self.path} has no recorded learning rate, so its weight eta is unknown. {_WAY_OUT}"
                )
            rates = recorded.rates(self.weighting, parameters)
        elif isinstance(given, Mapping):
            rates = {name: float(rate) for name, rate in given.items()}
        else:
            return dict.fromkeys(parameters, float(given))  # type: ignore[arg-type]  # a number since __init__
        return {name: rate_for(self.path, rates, name, _WAY_OUT) for name in parameters}

    def recorded_training(
        self, parameters: Sequence[str], model: nn.Module | None = None
    ) -> dict[str, bool | None] | None:
        """By name, whether a parameter took a step since the previous checkpoint, as it was recorded.

        ``None`` for a file without a record, and for a parameter where it is not known: an earlier version of
        ``Recorder``, or a trainer whose groups say no names, tells only that there was training. Parameters that the
        optimizer did not hold are left out.
        """
        recorded = self._record(self._opened(data=False), model)
        return None if recorded is None else recorded.training(parameters)

    def second_moments(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Adam's bias-corrected second moments v by parameter name, as they were recorded.

        Args:
            model: whose they are; not needed for what ``Recorder`` saved.

        Raises:
            CheckpointError: they were not recorded.
        """
        recorded = self._record(self._opened(data=True), model, True)
        if recorded is None:
            raise no_moments(Path(self.path))
        return recorded.second_moments(None)

    def loss(self) -> float:
        """The training loss that ``Recorder.save(loss)`` recorded, or a trainer logged last.

        Raises:
            CheckpointError: it was not recorded.
        """
        record = self._opened(data=False).record(None, self._since) or {}
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

    def sha256(self, model: nn.Module | None = None) -> str:
        """SHA-256 of the weights as they are now, in hexadecimal: of their file, where they have one of their own.

        Args:
            model: for a loader of your own, which needs one.
        """
        if self._loader is None:
            return place_of(Path(self.path)).layout.digest()
        if model is None:
            raise ArgumentError("sha256 needs the model, for the loader of your own. Give it: sha256(model).")
        return self.read(model).sha256


def read_record(path: Path) -> dict[str, Any] | None:
    """What ``Recorder`` saved beside the weights, or ``None`` in other files."""
    record = recorded(read(path))
    return None if record is None else dict(record)
