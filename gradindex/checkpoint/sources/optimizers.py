"""The state of an optimizer: whose parameters it held, at which rates, and Adam's second moments.

A state numbers its parameters in the order of its groups. Which they are follows from how trainers make groups out of a
model's parameters; counts and shapes say whether it is so. The task's model may be a part of what was trained.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import CheckpointError
from ...weights import Trained, aligned

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

    def names(self, trained: Trained) -> list[list[str]] | None:
        """The names of each group's parameters in training; ``None`` where they cannot be told.

        Where the task's model is a part of what was trained, parameters that are not the model's may have no name,
        ``""``.

        Raises:
            CheckpointError: no parameters of the model have these counts and shapes.
        """
        for candidates in (self._of_all(trained), self._of_a_part(trained)):
            fitting: list[list[list[str]]] = []
            for groups in candidates:
                if self._fits(groups, trained.shapes) and groups not in fitting:
                    fitting.append(groups)
            if len(fitting) == 1 or (fitting and self._says_names):
                return fitting[0]
            if fitting:
                return None
        self._check_that_it_can_be_the_models(trained)
        return None

    def _fits(self, groups: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether groups of names have the counts and, as far as these are known, the shapes of the state."""
        return [len(group) for group in groups] == self._sizes and all(
            shapes.get(name, shape) == shape
            for names, group in zip(groups, self._shapes, strict=True)
            for name, shape in zip(names, group, strict=True)
            if shape is not None
        )

    def second_moments(self, trained: Trained) -> dict[str, Tensor]:
        """Adam's v / (1 - beta2^t) by the names in training, of parameters that took steps.

        Raises:
            CheckpointError: it keeps none, or the parameters' names cannot be told.
        """
        groups = self.names(trained)
        if groups is None:
            raise CheckpointError(
                f"{self._path} does not tell which of the model's parameters its {len(self.groups)} groups hold. Make "
                "the optimizer with names (Adam(model.named_parameters())), or drop preconditioner from the task."
            )
        moments = {}
        for group, names in zip(self.groups, groups, strict=True):
            for name, key in zip(names, group["params"], strict=True):
                state = self._state.get(key)
                if not state or not name:
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

    def _of_all(self, trained: Trained) -> list[list[list[str]]]:
        """What the groups can be: the names that it says, or all parameters of the model or of what was trained."""
        if self._says_names:
            said = [str(name) for group in self.groups for name in group["param_names"]]
            # A submodule's own names, of which the optimizer was made.
            prefix = "" if aligned(trained.own, said) else trained.prefix
            places = aligned(trained.shapes, [f"{prefix}{name}" for name in said])
            if not places:
                return []
            return [[[places.get(f"{prefix}{name}", "") for name in g["param_names"]] for g in self.groups]]
        frozen = {name for name, parameter in trained.own.items() if not parameter.requires_grad}
        # Of a part the count alone says nothing: the optimizer may have held as many others.
        sure = len(trained.own) == len(trained.shapes) or any(map(any, self._shapes))
        found = []
        for whole in (list(trained.own) if sure else None, trained.in_order):
            for names in ([], []) if whole is None else ([name for name in whole if name not in frozen], whole):
                if len(names) == sum(self._sizes):
                    found.append(self._cut(names))
                    found += _sorted_out(trained, names)
        sizes = len(self._sizes)
        return [[group for group in groups if group] if len(groups) > sizes else groups for groups in found]

    def _of_a_part(self, trained: Trained) -> list[list[list[str]]]:
        """What the groups can be where the model's parameters, in their order, stand among others.

        The order of the others is not needed: where the model's begin in a group follows from the shapes.
        """
        if self._says_names or len(trained.shapes) == len(trained.own):
            return []
        trainable = [name for name, parameter in trained.own.items() if parameter.requires_grad]
        return [*self._placed(trained, list(trained.own)), *self._placed(trained, trainable)]

    def _placed(self, trained: Trained, names: list[str]) -> list[list[list[str]]]:
        others, shapes = sum(self._sizes) - len(names), [shape for group in self._shapes for shape in group]
        found = []
        for start in range(others + 1):
            if _alike(names, shapes[start : start + len(names)], trained):
                found.append(self._cut([""] * start + names + [""] * (others - start)))
        for groups in _sorted_out(trained, names):
            if len(groups) != len(self._sizes) or any(len(g) > n for g, n in zip(groups, self._sizes, strict=True)):
                continue
            placed: list[list[list[str]]] = [[]]
            for group, size, here in zip(groups, self._sizes, self._shapes, strict=True):
                starts = [s for s in range(size - len(group) + 1) if _alike(group, here[s : s + len(group)], trained)]
                ways = [[""] * start + group + [""] * (size - len(group) - start) for start in starts]
                placed = [[*before, way] for before in placed for way in ways[:2]]  # two are as unclear as many
            found += placed
        return found

    def _cut(self, names: Sequence[str]) -> list[list[str]]:
        """Names by group, one group after the other."""
        ends = list(accumulate(self._sizes, initial=0))
        return [list(names[start:end]) for start, end in pairwise(ends)]

    @cached_property
    def _sizes(self) -> list[int]:
        return [len(group.get("params", ())) for group in self.groups]

    @cached_property
    def _shapes(self) -> list[list[tuple[int, ...] | None]]:
        """Of each group's parameters, where the state tells."""
        return [[self._shape(key) for key in group.get("params", ())] for group in self.groups]

    def _shape(self, key: Any) -> tuple[int, ...] | None:
        state = self._state.get(key, {})
        like = (state.get(name) for name in _LIKE_THE_PARAMETER)
        return next((tuple(tensor.shape) for tensor in like if isinstance(tensor, Tensor) and tensor.ndim), None)

    def _check_that_it_can_be_the_models(self, trained: Trained) -> None:
        shapes = Counter(shape for group in self._shapes for shape in group if shape is not None)
        foreign, count, known = shapes - Counter(trained.shapes.values()), sum(self._sizes), len(trained.shapes)
        if count > known or foreign or self._says_names:
            what = f", such as one of shape {next(iter(foreign))}" if foreign else ""
            owner = "the task's model" if known == len(trained.own) else "what was trained with the task's model"
            raise CheckpointError(
                f"{self._path} is the optimizer of another model: it holds {count} parameters{what}, but {owner} has "
                f"{known}. Check that the task builds the model this checkpoint was saved from, or give "
                "learning_rate= and remove the file."
            )


def _alike(names: Sequence[str], shapes: Sequence[tuple[int, ...] | None], trained: Trained) -> bool:
    return all(shape in (None, trained.shapes[name]) for name, shape in zip(names, shapes, strict=True))


def _sorted_out(trained: Trained, names: Sequence[str]) -> list[list[list[str]]]:
    """Two groups, with and without weight decay, as trainers make them of parameters in their order."""
    found = []
    for plain in (_without_decay(trained, names, _NO_DECAY), _without_decay(trained, names, _NO_DECAY_BEFORE)):
        found.append([[n for n in names if n not in plain], [n for n in names if n in plain]])
    flat = {name for name in names if len(trained.shapes[name]) <= 1 or name.endswith(".bias")}  # as timm does
    decayed = [name for name in names if name not in flat]
    held = [name for name in names if name in flat]
    return [*found, [held, decayed], [decayed, held]]


def _without_decay(trained: Trained, names: Sequence[str], pattern: re.Pattern[str]) -> set[str]:
    of_norms = {
        id(parameter)
        for module in trained.model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters(recurse=False)
    }
    normed = {name for name, parameter in trained.own.items() if id(parameter) in of_norms}
    return {name for name in names if name in normed or pattern.search(name.lower())}


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 and not value.is_meta else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
