"""Names of a model's parameters in a file and in what was recorded: through wrappers, and under a prefix.

A model may be a part of what was trained, such as the network of a LightningModule. One prefix then stands before its
names everywhere: in the file, where it is found by names and shapes, and in records and optimizers of that training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

# What wrappers put into names, at any place: DataParallel and averaged models, torch.compile, FSDP, checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_USUAL_PREFIX = "model."
# Buffers that hold no training, by the last part of their names; versions of libraries have or lack them.
IDLE_BUFFERS = {
    "num_batches_tracked", "position_ids", "token_type_ids", "inv_freq", "original_inv_freq", "cos_cached",
    "sin_cached", "freqs_cis", "masked_bias", "attn_mask", "attention_mask", "causal_mask", "mask",
    "relative_position_index", "relative_coords_table", "n_averaged", "_float_tensor", "embed_positions",
}  # fmt: skip
# Statistics that training leaves in a model: its own are no stand-in.
STATISTICS = {"running_mean", "running_var", "running_std", "weight_u", "weight_v", "_u", "_v"}
_SHOWN = 3
Shapes = Mapping[str, tuple[int, ...]]


def aligned(have: Iterable[str], want: Iterable[str]) -> dict[str, str]:
    """Of each wanted name the one that means it: the same, or the same but for the parts of wrappers."""
    have, want = list(have), list(want)
    found = {name: name for name in set(have) & set(want)}
    plain_have: dict[str, list[str]] = {}
    for name in have:
        if name not in found:
            plain_have.setdefault(_plain(name), []).append(name)
    plain_want: dict[str, list[str]] = {}
    for name in want:
        plain_want.setdefault(_plain(name), []).append(name)
    for plain, names in plain_want.items():
        if len(names) == 1 and names[0] not in found and len(plain_have.get(plain, ())) == 1:
            found[names[0]] = plain_have[plain][0]
    return found


def recorded_as(path: Path, have: Iterable[str], want: Iterable[str], prefix: str | None = None) -> dict[str, str]:
    """Of each wanted name the recorded one that means it, where nothing but names is known.

    Args:
        path: for errors.
        have: recorded names.
        want: a model's, or some of them.
        prefix: what stands before them in ``have``; by default what stands before most of them.

    Raises:
        CheckpointError: several prefixes fit as well.
    """
    have, want = list(have), list(want)
    for start in ("", _USUAL_PREFIX) if prefix is None else _spelt(prefix):
        found = aligned(have, [f"{start}{name}" for name in want])
        if found:
            return {name: found[f"{start}{name}"] for name in want if f"{start}{name}" in found}
    if prefix is not None:
        return {}
    counts: Counter[str] = Counter()
    plain = {_plain(name) for name in have}
    for own in {_plain(name) for name in want}:
        counts.update(name[: -len(own)] for name in plain if name.endswith(f".{own}"))
    likely = sorted(start for start, count in counts.items() if count == max(counts.values()))
    if len(likely) > 1:
        raise _several(path, "recorded parameters", likely)
    return recorded_as(path, have, want, likely[0]) if likely else {}


@dataclass(frozen=True)
class Start:
    """What stands before a model's names.

    Args:
        prefix: that is taken.
        copies: under which the same names stand once more, and which are left.
        given: whether a person gave it, with wrappers as they are.
    """

    prefix: str
    copies: tuple[str, ...] = ()
    given: bool = False

    def has(self, name: str) -> bool:
        """Whether a name stands under it."""
        if self.given:
            return name.startswith(self.prefix)
        return _plain(name).startswith(self.prefix) and not (self.copies and _plain(name).startswith(self.copies))

    def under(self, path: Path, weights: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Weights that stand under it, without it, and the names of the others.

        Raises:
            CheckpointError: two names are the same but for wrappers.
        """
        others = [name for name in weights if not self.has(name)]
        # Without a prefix wrappers' parts stay, for the model may have them as well.
        as_it_is = self.given or not self.prefix
        chosen = {
            (name if as_it_is else _plain(name))[len(self.prefix) :]: tensor
            for name, tensor in weights.items()
            if self.has(name)
        }
        if len(chosen) + len(others) != len(weights):
            raise CheckpointError(
                f"{path} has names that differ only in wrapper prefixes ({some(list(weights))}). Choose one with "
                "prefix=."
            )
        return chosen, others


def start_of(
    path: Path, weights: Mapping[str, Any], groups: Sequence[Mapping[str, torch.Size]], prefix: str | None
) -> Start:
    """What stands before a model's names in a file.

    Args:
        path: for errors.
        weights: by their names in the file.
        groups: names and shapes of the model's parameters, those of one tensor together.
        prefix: the one that was given.

    Raises:
        CheckpointError: nothing stands under the one that was given, or several fit.
    """
    if prefix is not None:
        for spelt in _spelt(prefix):
            if any(name.startswith(spelt) for name in weights):
                return Start(spelt, given=True)
        raise CheckpointError(
            f"{path} has no name that starts with prefix {prefix!r}; its names are {some(list(weights))}. "
            "Give another prefix, or none to have it detected."
        )
    plain = {_plain(name): tensor for name, tensor in weights.items()}
    wanted = [{_plain(name): shape for name, shape in group.items()} for group in groups]
    named = _prefixes(plain.keys(), wanted)
    fitting = [
        start
        for start in named
        if all(
            start + name not in plain or plain[start + name].shape == shape for g in wanted for name, shape in g.items()
        )
    ]
    candidates = fitting or named
    if len(candidates) > 1 and not {"", _USUAL_PREFIX} & set(candidates):
        raise _several(path, "model's weights", candidates)
    # Where nothing fits, the nearest, for the error to name what differs.
    candidates = candidates or [_nearest(plain.keys(), wanted)]
    start = next((usual for usual in ("", _USUAL_PREFIX) if usual in candidates), candidates[0])
    return Start(start, tuple(other for other in candidates if other != start))


def shape_groups(
    model: nn.Module, weights: Mapping[str, Any], tracked: Collection[str] | None
) -> list[dict[str, torch.Size]]:
    """Names and shapes of a model's parameters, those of one tensor together.

    Args:
        model: whose state they are in.
        weights: of a file.
        tracked: where the file may lack others than these: then only what it has counts.
    """
    state = model.state_dict(keep_vars=True)
    shared: dict[str, dict[str, torch.Size]] = {}
    for name, first in twins(model, state).items():
        if isinstance(state[name], Tensor):
            shared.setdefault(first, {})[name] = state[name].shape
    groups = list(shared.values())
    if tracked is None:
        return groups
    parts = [_plain(name).split(".") for name in weights]
    ends = {".".join(each[at:]) for each in parts for at in range(len(each))}
    known = set(tracked)
    return [group for group in groups if known & group.keys() or not ends.isdisjoint(map(_plain, group))]


def twins(model: nn.Module, expected: Collection[str]) -> dict[str, str]:
    """Of each parameter the first name of the same tensor."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named if name in expected}


@dataclass(frozen=True)
class _Tensor:
    """What is kept of a tensor, whose numbers may be as large as the model."""

    shape: torch.Size
    floating: bool
    place: tuple[Any, ...] | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Tensor:
        place = None
        if tensor.layout == torch.strided and not tensor.is_quantized:
            place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride(), tensor.shape)
        return cls(tensor.shape, tensor.is_floating_point(), place)


class Trained:
    """What was trained, of which a model is the whole or a part.

    Args:
        path: of the checkpoint, for errors.
        model: of the task.
        weights: what reads the checkpoint's weights by their names there, with or without numbers; ``None`` where they
            are not known, as of a loader of the user's own.
        ordered: whether their order is that of the parameters in training.
        prefix: as a person gave it.
        tracked: as of :func:`shape_groups`.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        weights: Callable[[], Mapping[str, Any]] | None = None,
        ordered: bool = False,
        prefix: str | None = None,
        tracked: Collection[str] | None = None,
    ) -> None:
        self.path, self.model = path, model
        self._weights, self._ordered, self._given, self._tracked = weights, ordered, prefix, tracked

    @cached_property
    def _file(self) -> dict[str, _Tensor]:
        weights = {} if self._weights is None else self._weights()
        self._weights = None  # which may hold numbers
        return {name: _Tensor.of(tensor) for name, tensor in weights.items() if isinstance(tensor, Tensor)}

    @cached_property
    def prefix(self) -> str:
        """What stands before the model's names, wrappers left out."""
        if not self._file:
            return _plain(_spelt(self._given)[0]) if self._given else ""
        groups = shape_groups(self.model, self._file, self._tracked)
        return _plain(start_of(self.path, self._file, groups, self._given).prefix)

    @cached_property
    def own(self) -> dict[str, nn.Parameter]:
        """The model's parameters by their names in training, in its order."""
        return {self._in_training(name): parameter for name, parameter in self.model.named_parameters()}

    def _in_training(self, name: str) -> str:
        return self.prefix + (name if self._alike else _plain(name))

    @cached_property
    def _alike(self) -> bool:
        """Whether names of the model differ only in what wrappers are called, as ``weight`` and ``module.weight``."""
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        return len(set(map(_plain, names))) < len(names)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters by their names in training, as far as they are known: the model's, then the others."""
        found = {name: tuple(parameter.shape) for name, parameter in self.own.items()}
        return found | {name: shape for name, shape in self._in_file.items() if name not in found}

    @cached_property
    def in_order(self) -> list[str] | None:
        """The names of all parameters in the order of the training; ``None`` where it is not known."""
        return list(self._in_file) if self._ordered and self.own.keys() <= self._in_file.keys() else None

    @cached_property
    def _in_file(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the file's parameters, each tensor once."""
        members = {self._in_training(name) for name, _ in self.model.named_buffers()}
        members |= {self._in_training(name) for name, _ in self.model.named_parameters(remove_duplicate=False)}
        found, known = {}, set[tuple[Any, ...]]()
        for name, tensor in self._file.items():
            plain = name if self._alike else _plain(name)
            if plain in members and plain not in self.own:
                continue
            if plain not in self.own:
                idle = plain.rpartition(".")[2] in STATISTICS | IDLE_BUFFERS
                if idle or not tensor.floating or tensor.place in known:  # what is tied, an optimizer holds once
                    continue
            if tensor.place is not None:
                known.add(tensor.place)
            found[plain] = tuple(tensor.shape)
        return found

    def recorded(self, have: Iterable[str]) -> dict[str, str]:
        """Of each name of the model the recorded one that means it.

        Names that are not the file's may be those of the model alone, whose optimizer knew nothing of the whole.

        Raises:
            CheckpointError: the weights are not known, and several prefixes fit.
        """
        have = list(have)
        want = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        if not self._file:
            return recorded_as(self.path, have, want, self._given)
        by_trained = {self._in_training(name): name for name in want}
        found = aligned(have, by_trained)
        if not found and self.prefix:
            whole = {_plain(name) for name in self._file}
            return aligned([name for name in have if _plain(name) not in whole], want)
        return {by_trained[name]: recorded for name, recorded in found.items()}


def some(names: Sequence[str]) -> str:
    """The first of several names."""
    return ", ".join(names[:_SHOWN]) + (" and others" if len(names) > _SHOWN else "")


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _spelt(prefix: str) -> list[str]:
    """What a prefix may mean: a module's name, or the beginning of a name."""
    return list(dict.fromkeys((prefix if prefix.endswith(".") or not prefix else f"{prefix}.", prefix)))


def _several(path: Path, what: str, starts: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} has the {what} {len(starts)} times, under {' and '.join(map(repr, starts))}. "
        f"Choose one: Checkpoint(..., prefix={starts[0]!r})."
    )


def _prefixes(names: Collection[str], wanted: Sequence[Collection[str]]) -> list[str]:
    """What stands before the names of all the model's parameters."""
    if not wanted:
        return [""]
    anchors = max(wanted, key=lambda group: max(map(len, group)))
    found = {name[: -len(a)] for a in anchors for name in names if name == a or name.endswith(f".{a}")}
    return sorted(p for p in found if all(any(p + name in names for name in group) for group in wanted))


def _nearest(names: Collection[str], wanted: Sequence[Collection[str]]) -> str:
    """What stands before most of the model's parameters."""
    counts: Counter[str] = Counter({"": 0})
    for a in (name for group in wanted for name in group):
        counts.update(name[: -len(a)] for name in names if name == a or name.endswith(f".{a}"))
    return counts.most_common(1)[0][0]
