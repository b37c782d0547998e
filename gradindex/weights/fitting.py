"""Weights fitted to a model by name: wrappers and prefixes, tied parameters, buffers that only one side has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..digests import digest
from ..errors import CheckpointError
from ..recorder import MODEL_KEY

# Where people keep weights inside a file.
_USUAL_KEYS = (MODEL_KEY, "state_dict", "model_state_dict", "module", "net", "model_state", "weights", "params")
# What wrappers put into names, at any place: DataParallel and averaged models, torch.compile, FSDP, checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_USUAL_PREFIX = "model."
# Buffers that hold no training, by the last part of their names; versions of libraries have or lack them.
_IDLE_BUFFERS = {
    "num_batches_tracked", "position_ids", "token_type_ids", "inv_freq", "original_inv_freq", "cos_cached",
    "sin_cached", "freqs_cis", "masked_bias", "attn_mask", "attention_mask", "causal_mask", "mask",
    "relative_position_index", "relative_coords_table", "n_averaged", "_float_tensor", "embed_positions",
}  # fmt: skip
# Statistics that training leaves in a model: its own are no stand-in.
_STATISTICS = {"running_mean", "running_var", "running_std", "weight_u", "weight_v", "_u", "_v"}
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
    twins = _twins(model, expected)
    shared: dict[str, list[str]] = {}
    for name, first in twins.items():
        shared.setdefault(first, []).append(name)
    groups = [{name: expected[name].shape for name in names} for names in shared.values()]
    if base is not None:  # what stands before what there is
        groups = [group for group in groups if base.tracked & group.keys() or _ends_in(weights, group)]
    chosen, others = _under_prefix(path, weights, groups, prefix)
    places = aligned(chosen, expected)
    problems, filled, tensors = [], [], {}
    from_base: list[str] = []
    for name, own in expected.items():
        if name in places:
            tensors[name] = chosen[places[name]]
        elif name not in twins and name.rpartition(".")[2] not in _STATISTICS:
            tensors[name] = own.detach().clone()
            filled.append(name)
        elif (twin := next((places[n] for n in shared.get(twins.get(name, ""), ()) if n in places), None)) is not None:
            tensors[name] = chosen[twin]
            filled.append(name)
        elif base is None:
            problems.append(f"{name} is missing")
        elif base.tracked.intersection(shared.get(twins.get(name, name), (name,))):
            problems.append(f"{name} is missing and tracked, so the model's own cannot stand in")
        else:
            tensors[name] = base.tensor(name, twins.get(name, name), own)
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
            tensors[name] = _checked(path, name, tensors[name], own, twins.get(name))
    for first, names in shared.items():
        _check_alike(path, {name: tensors[name] for name in names}, first)
    passed_over = [name for name in superfluous if name not in unknown] + others
    return Fitted(tensors, tuple(filled), tuple(passed_over), tuple(from_base))


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


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _twins(model: nn.Module, expected: Collection[str]) -> dict[str, str]:
    """Of each parameter the first name of the same tensor."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named if name in expected}


def _under_prefix(
    path: Path, weights: Mapping[str, Tensor], groups: Sequence[Mapping[str, torch.Size]], prefix: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights that have the prefix, without it, and the names of the others.

    Args:
        path: for errors.
        weights: by their names in the file.
        groups: names and shapes of the model's parameters, those of one tensor together.
        prefix: the one that was given.
    """
    if prefix is not None:
        return _without(path, weights, prefix)
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
        raise CheckpointError(
            f"{path} has the model's weights {len(candidates)} times, under {' and '.join(map(repr, candidates))}. "
            f"Choose one: Checkpoint(..., prefix={candidates[0]!r})."
        )
    # Where nothing fits, the nearest, for the error to name what differs.
    candidates = candidates or [_nearest(plain.keys(), wanted)]
    start = next((usual for usual in ("", _USUAL_PREFIX) if usual in candidates), candidates[0])
    copies = tuple(other for other in candidates if other != start)

    def has(name: str) -> bool:
        return _plain(name).startswith(start) and not _plain(name).startswith(copies)

    # Without a prefix wrappers' parts stay, for the model may have them as well.
    chosen = {_plain(name)[len(start) :] if start else name: tensor for name, tensor in weights.items() if has(name)}
    if len(chosen) != sum(map(has, weights)):
        raise CheckpointError(
            f"{path} has names that differ only in wrapper prefixes ({_some(list(weights))}). Choose one with prefix=."
        )
    return chosen, [name for name in weights if not has(name)]


def _ends_in(names: Collection[str], group: Collection[str]) -> bool:
    plain = {_plain(name) for name in names}
    return any(found == own or found.endswith(f".{own}") for own in map(_plain, group) for found in plain)


def _without(path: Path, weights: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    for start in dict.fromkeys((prefix if prefix.endswith(".") or not prefix else f"{prefix}.", prefix)):
        chosen = {name[len(start) :]: tensor for name, tensor in weights.items() if name.startswith(start)}
        if chosen:
            return chosen, [name for name in weights if not name.startswith(start)]
    raise CheckpointError(
        f"{path} has no name that starts with prefix {prefix!r}; its names are {_some(list(weights))}. "
        "Give another prefix, or none to have it detected."
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


def _is_beside(name: str, tensor: Tensor, model: nn.Module) -> bool:
    """Whether a name that the model does not have changes nothing of what it computes."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if last in _IDLE_BUFFERS or not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized):
        return last not in _STATISTICS
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" and others" if len(names) > _SHOWN else "")
