"""Weights fitted to a model by name: wrappers and prefixes, tied parameters, buffers that only one side has."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..digests import digest
from ..errors import CheckpointError
from ..recorder import MODEL_KEY
from .naming import IDLE_BUFFERS, STATISTICS, aligned, shape_groups, start_of, twins

# Where people keep weights inside a file.
_USUAL_KEYS = (MODEL_KEY, "state_dict", "model_state_dict", "module", "net", "model_state", "weights", "params")
_BESIDE = re.compile(r"criteri(on|a)|loss|metric|accuracy|(train|val|valid|test)_(acc|f1|auc|auroc)", re.IGNORECASE)
_EXTRA = "_extra_state"
_SHOWN = 3


@dataclass(frozen=True)
class Fitted:
    """The weights of a model, whole.

    Args:
        tensors: by the names of ``model.state_dict()``.
        filled: names that the file does not have: tied to one that it has, or a buffer of the model.
        passed_over: names that the model does not have and does not need.
        from_base: names that the file does not have and that are the model's own, as its base.
    """

    tensors: dict[str, Tensor]
    filled: tuple[str, ...]
    passed_over: tuple[str, ...]
    from_base: tuple[str, ...] = ()


class Base:
    """A model's own weights, which stand in for what checkpoints lack: lent as they lie in the model, buffers copied.

    A copy would double the memory of a large model. So whoever computes with them asks :meth:`check` first.

    Args:
        model: as it is when a weight is first asked for.
        tracked: names of parameters that checkpoints must have, since their gradients are asked for.
    """

    def __init__(self, model: nn.Module, tracked: Collection[str] = ()) -> None:
        self._model, self.tracked = model, frozenset(tracked)
        self._lent = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._tensors: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._digests: dict[tuple[str, ...], str] = {}

    def tensor(self, name: str, first: str, own: Tensor) -> Tensor:
        """A tensor of the model, where it is; ``first`` is the first of the names that it has there."""
        if first not in self._tensors:
            self._tensors[first] = own.detach() if first in self._lent else own.detach().clone()
            self._versions[first] = self._tensors[first]._version
        self._tensors[name] = self._tensors[first]
        return self._tensors[name]

    def check(self) -> None:
        """Refuse weights that were changed in place after they were lent.

        Raises:
            CheckpointError: names one.
        """
        for name, version in self._versions.items():
            if self._tensors[name]._version != version:
                raise CheckpointError(
                    f"{name} of the model was changed after it was read as the base of the checkpoints. Load the store "
                    "again, or give the task a copy of the model (copy.deepcopy)."
                )

    def digest(self, names: Sequence[str]) -> str:
        """SHA-256 over the copies of these names, in hexadecimal."""
        key = tuple(sorted(names))
        if key not in self._digests:
            self._digests[key] = digest([(name, self._tensors[name]) for name in key]).hex()
        return self._digests[key]


def found_weights(path: Path, content: Any, key: str | None) -> dict[str, Any]:
    """The tensors in what a file holds, by their names there.

    Raises:
        CheckpointError: there is no ``key``, or nothing under it or the usual keys is a state dict.
    """
    if key is not None:
        for part in key.split("."):
            if not isinstance(content, Mapping) or part not in content:
                names = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
                raise CheckpointError(f"{path} has no key {key!r}. It holds: {names[:200]}.")
            content = content[part]
    else:
        for usual in _USUAL_KEYS:
            if isinstance(content, Mapping) and isinstance(content.get(usual), Mapping):
                content = content[usual]
                break
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, but a state_dict is needed. Save model.state_dict()."
        )
    if {"state", "param_groups"} <= content.keys():
        raise CheckpointError(
            f"{path} holds the state of an optimizer, but weights are needed. Give the file with the model's weights."
        )
    weights = {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    # What a module keeps by get_extra_state is of any type.
    weights |= {name: value for name, value in content.items() if str(name).endswith(_EXTRA) and name not in weights}
    if not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f"{path} holds no weights under the usual keys; it holds: {', '.join(map(str, content))[:200]}. "
            "Give their key with key=."
        )
    return weights


def fitted(
    path: Path, weights: Mapping[str, Any], model: nn.Module, prefix: str | None, base: Base | None = None
) -> Fitted:
    """Weights by the names of ``model.state_dict()``, as copies that keep no larger memory alive.

    A wrapper's part of a name (``module.``, ``_orig_mod.`` and their like) counts on neither side, wherever it stands.
    A prefix is ``prefix``, or what stands before all of the model's names; what has another is passed over. What the
    file lacks and ``base`` does not track is the base's.

    Raises:
        CheckpointError: a parameter is missing, has another shape, cannot be a weight or holds NaN, or a name is not
            the model's; the message names the first.
    """
    own_state = model.state_dict(keep_vars=True)
    extra = {name: own_state.pop(name) for name in list(own_state) if name.endswith(_EXTRA)}
    for name, kept in extra.items():
        if name in weights and digest(weights[name]) != digest(kept):
            raise CheckpointError(
                f"{path} has a different {name} than the model; it is not a weight, so it is not loaded. Load that "
                "state into the model first, with load_state_dict, or list only checkpoints that share one state."
            )
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(_EXTRA)}
    expected = {name: tensor for name, tensor in own_state.items() if isinstance(tensor, Tensor)}
    firsts = twins(model, expected)
    shared: dict[str, list[str]] = {}
    for name, first in firsts.items():
        shared.setdefault(first, []).append(name)
    groups = shape_groups(model, weights, None if base is None else base.tracked)
    chosen, others = start_of(path, weights, groups, prefix).under(path, weights)
    places = aligned(chosen, expected)
    problems, filled, tensors = [], [], {}
    from_base: list[str] = []
    # What is neither parameter nor buffer belongs to a base: the scales of quantised weights (bitsandbytes).
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, own in expected.items():
        if name in places:
            tensors[name] = chosen[places[name]]
        elif name not in firsts and name.rpartition(".")[2] not in STATISTICS and (base is None or name in buffers):
            tensors[name] = own.detach().clone()
            filled.append(name)
        elif (twin := next((places[n] for n in shared.get(firsts.get(name, ""), ()) if n in places), None)) is not None:
            tensors[name] = chosen[twin]
            filled.append(name)
        elif base is None:
            problems.append(f"{name} is missing")
        elif base.tracked.intersection(shared.get(firsts.get(name, name), (name,))):
            problems.append(f"{name} is missing and tracked, so the model's own cannot stand in")
        else:
            tensors[name] = base.tensor(name, firsts.get(name, name), own)
            from_base.append(name)
    if base is not None and not places:
        problems.insert(0, "none of its names is the model's")
    idle = {name for name, _ in model.named_buffers()} - expected.keys()  # not persistent
    superfluous = [name for name in chosen if name not in places.values()]
    unknown = [name for name in superfluous if not (name in idle or _is_beside(name, chosen[name], model))]
    problems += [f"{name} is not in the model" for name in unknown]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model {tuple(own.shape)}"
        for name, own in expected.items()
        if name in places and tensors[name].shape != own.shape
    ]
    if problems:
        raise CheckpointError(_misfit(path, problems, weights))
    for name, own in expected.items():
        if name in places:
            tensors[name] = _checked(path, name, tensors[name], own, firsts.get(name))
    for first, names in shared.items():
        _check_alike(path, {name: tensors[name] for name in names}, first)
    passed_over = [name for name in superfluous if name not in unknown] + others
    return Fitted(tensors, tuple(filled), tuple(passed_over), tuple(from_base))


def _is_beside(name: str, tensor: Tensor, model: nn.Module) -> bool:
    """Whether a name that the model does not have changes nothing of what it computes."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if last in IDLE_BUFFERS or not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized):
        return last not in STATISTICS
    return not hasattr(model, first) and _BESIDE.search(first) is not None


def _misfit(path: Path, problems: list[str], weights: Mapping[str, Tensor]) -> str:
    if path.name.startswith("adapter_model") or all("lora_" in name for name in weights):
        return (
            f"{path} holds only an adapter ({len(weights)} tensors), but all weights of the model are needed. "
            "Load it into the model and save everything: torch.save(model.state_dict(), 'step_N.pt')."
        )
    more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
    return (
        f"{path} does not fit the model: {'; '.join(problems[:_SHOWN])}{more}. "
        "Check that the task builds the model this checkpoint was saved from, or give key= and prefix= (or, for a part "
        "of the weights, base='model')."
    )


def _checked(path: Path, name: str, tensor: Tensor, own: Tensor, parameter: str | None) -> Tensor:
    """A tensor that can stand in the model's place, in memory of its own."""

    def refused(what: str, way_out: str) -> CheckpointError:
        return CheckpointError(f"{path} has {what} in {name}, but the model has {_type(own)}. {way_out}")

    if tensor.is_quantized and own.is_quantized:
        return tensor
    if tensor.is_quantized:
        raise refused("quantised numbers", "Save the weights before quantisation, or dequantize() them.")
    if tensor.layout != own.layout:
        raise refused(f"the layout {_type(tensor, layout=True)}", "Save tensor.to_dense().")
    if tensor.is_meta:
        raise CheckpointError(
            f"{path} has no data in {name}, which was saved on the meta device. Save it after loading the weights."
        )
    if tensor.is_complex() != own.is_complex():
        raise refused(_type(tensor), "Check that the task builds the model this checkpoint was saved from.")
    if parameter is None or not (own.is_floating_point() or own.is_complex() or tensor.is_floating_point()):
        tensor = tensor.to(own.dtype)  # as load_state_dict does
    elif not (tensor.is_floating_point() or tensor.is_complex()):
        raise refused(f"{_type(tensor)} numbers", "Save the weights as floating-point numbers.")
    else:
        numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # a float8 has no sum
        count = 0
        if not bool(numbers.sum().isfinite()):  # a sum can also overflow
            # A frozen parameter can be a mask with infinities.
            count = int((~numbers.isfinite() if own.requires_grad else numbers.isnan()).sum())
        if count:
            raise CheckpointError(
                f"{path} has {count:,} NaN or infinite numbers in {name}, so it has no gradients. "
                "Drop this checkpoint, or check why training diverged."
            )
    if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes:
        return tensor.clone()
    return tensor


def _type(tensor: Tensor, layout: bool = False) -> str:
    return str(tensor.layout if layout else tensor.dtype).removeprefix("torch.")


def _check_alike(path: Path, tensors: Mapping[str, Tensor], first: str) -> None:
    for name, tensor in tensors.items():
        if tensor is not tensors[first] and not torch.equal(tensor, tensors[first]):
            raise CheckpointError(
                f"{path} has different numbers in {first} and {name}, but they are one parameter of the model. "
                "Check that the task builds the model this checkpoint was saved from (tied weights)."
            )
