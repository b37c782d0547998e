"""The state of an optimizer: whose parameters it held, at which rates, and Adam's second moments.

A state numbers its parameters in the order of its groups. Which they are follows from how trainers make groups out of a
model's parameters; counts and shapes say whether it is so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import CheckpointError
from ...weights import aligned

# What the Hugging Face Trainer takes weight decay away from, besides the parameters of LayerNorm.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_NO_DECAY_BEFORE = re.compile(r"bias")
# Which entries of a parameter's state have its shape.
_LIKE_THE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "max_exp_avg_sq")


class Optimizer:
    """A ``state_dict()`` of an optimizer.

    Args:
        path: of its file, for errors.
        state: with or without the numbers.

    Raises:
        CheckpointError: it is no such state.
    """

    def __init__(self, path: Path, state: Any) -> None:
        self._path = path
        if not (isinstance(state, Mapping) and isinstance(state.get("param_groups"), list)):
            raise CheckpointError(
                f"{path} holds no state of an optimizer, with state and param_groups. Give learning_rate= instead, or "
                "copy the checkpoint again."
            )
        self.groups: list[Mapping[str, Any]] = [g for g in state["param_groups"] if isinstance(g, Mapping)]
        held = state.get("state")
        self._state: Mapping[Any, Mapping[str, Any]] = held if isinstance(held, Mapping) else {}

    def rates(self, key: str = "lr") -> list[float] | None:
        """The rate of each group as the state has it; ``None`` where one has none."""
        found = [_number(group.get(key)) for group in self.groups]
        return None if any(rate is None for rate in found) else [rate for rate in found if rate is not None]

    def names(self, model: nn.Module) -> list[list[str]] | None:
        """The names of each group's parameters in the model; ``None`` where they cannot be told.

        Raises:
            CheckpointError: no parameters of the model have these counts and shapes.
        """
        numbers = [list(group.get("params", ())) for group in self.groups]
        own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        fitting: list[list[list[str]]] = []
        for groups in self._candidates(model, [len(group) for group in numbers]):
            if [len(group) for group in groups] == [len(group) for group in numbers] and all(
                own[name] == shape
                for names, keys in zip(groups, numbers, strict=True)
                for name, key in zip(names, keys, strict=True)
                if (shape := self._shape(key)) is not None
            ):
                fitting += [groups] if groups not in fitting else []
        if len(fitting) == 1 or (fitting and self._says_names):
            return fitting[0]
        if not fitting:
            self._check_that_it_can_be_the_models(own, sum(map(len, numbers)))
        return None

    def second_moments(self, model: nn.Module) -> dict[str, Tensor]:
        """Adam's v / (1 - beta2^t) by the names of the model, of parameters that took steps.

        Raises:
            CheckpointError: it keeps none, or the parameters' names cannot be told.
        """
        groups = self.names(model)
        if groups is None:
            raise CheckpointError(
                f"{self._path} does not tell which of the model's parameters its {len(self.groups)} groups hold. Make "
                "the optimizer with names (Adam(model.named_parameters())), or drop preconditioner from the task."
            )
        moments = {}
        for group, names in zip(self.groups, groups, strict=True):
            for name, key in zip(names, group["params"], strict=True):
                state = self._state.get(key)
                if not state:
                    continue
                taken, betas = _number(state.get("step", group.get("step"))), group.get("betas", ())
                if not isinstance(state.get("exp_avg_sq"), Tensor) or not taken or len(betas) != 2:
                    raise CheckpointError(
                        f"{self._path} keeps no second moments (exp_avg_sq) for {name}, so it is not of the Adam "
                        "family. Drop preconditioner from the task."
                    )
                moments[name] = state["exp_avg_sq"].detach().float() / (1.0 - float(betas[1]) ** taken)
        return moments

    def taken(self) -> int | None:
        """How many steps it took, where it counts them, of a state with numbers."""
        counts = [_number(state.get("step")) for state in self._state.values() if isinstance(state, Mapping)]
        known = [count for count in counts if count is not None]
        return int(max(known)) if known else None

    def trained(self, groups: Sequence[Sequence[str]]) -> set[str]:
        """Names of the parameters that it has a state of, so that took a step; of an optimizer without any, all."""
        return {
            name
            for group, names in zip(self.groups, groups, strict=True)
            for name, key in zip(names, group["params"], strict=True)
            if not self._state or self._state.get(key)
        }

    @property
    def _says_names(self) -> bool:
        return all(isinstance(group.get("param_names"), list) for group in self.groups)

    def _candidates(self, model: nn.Module, sizes: Sequence[int]) -> list[list[list[str]]]:
        """What the groups can be: the names that it says, or what trainers make of all or of the trainable ones."""
        if self._says_names:
            places = aligned(
                [name for name, _ in model.named_parameters()],
                [str(name) for group in self.groups for name in group["param_names"]],
            )
            return [[[places.get(str(name), "") for name in g["param_names"]] for g in self.groups]] if places else []
        found: list[list[list[str]]] = []
        named = dict(model.named_parameters())
        for names in ([name for name in named if named[name].requires_grad], list(named)):
            if len(names) != sum(sizes):
                continue
            cuts = [sum(sizes[:number]) for number in range(len(sizes))]
            found.append([names[start : start + size] for start, size in zip(cuts, sizes, strict=True)])
            for plain in (_without_decay(model, names, _NO_DECAY), _without_decay(model, names, _NO_DECAY_BEFORE)):
                found.append([[n for n in names if n not in plain], [n for n in names if n in plain]])
            flat = {name for name in names if named[name].ndim <= 1 or name.endswith(".bias")}  # as timm does
            decayed = [name for name in names if name not in flat]
            found += [[list(filter(flat.__contains__, names)), decayed], [decayed, [n for n in names if n in flat]]]
        return [[group for group in groups if group] if len(groups) > len(sizes) else groups for groups in found]

    def _shape(self, key: Any) -> tuple[int, ...] | None:
        state = self._state.get(key, {})
        like = (state.get(name) for name in _LIKE_THE_PARAMETER)
        return next((tuple(tensor.shape) for tensor in like if isinstance(tensor, Tensor) and tensor.ndim), None)

    def _check_that_it_can_be_the_models(self, own: Mapping[str, tuple[int, ...]], count: int) -> None:
        keys = [key for group in self.groups for key in group.get("params", ())]
        shapes = Counter(shape for key in keys if (shape := self._shape(key)) is not None)
        foreign = shapes - Counter(own.values())
        if count > len(own) or foreign or self._says_names:
            what = f", such as one of shape {next(iter(foreign))}" if foreign else ""
            raise CheckpointError(
                f"{self._path} is the optimizer of another model: it holds {count} parameters{what}, but the task's "
                f"model has {len(own)}. Check that the task builds the model this checkpoint was saved from, or give "
                "learning_rate= and remove the file."
            )


def _without_decay(model: nn.Module, names: Sequence[str], pattern: re.Pattern[str]) -> set[str]:
    normed = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    return {name for name in names if name in normed or pattern.search(name.lower())}


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 and not value.is_meta else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
