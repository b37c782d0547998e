"""Which parameters are tracked, the layers and routes that they are planned for, and the layers' matrices."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import TaskError
from ..factors import Layer
from ..tree import made_of
from . import uses
from .functional import as_real
from .owners import basic_route
from .rules import RULES

# Packages whose layers (bitsandbytes.nn) or weights (torchao.quantization) are quantised, and pass gradients on.
_PACKING = {"bitsandbytes", "torchao"}


def select_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that the patterns choose, in the model's order.

    A pattern matches a parameter by its name, or a module by its name and then means every
    parameter at or below it. Whether a parameter was trained does not matter.

    Raises:
        TaskError: a pattern matches nothing (close names are listed).
    """
    parameters = [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        below = tuple(f"{name}." for name in modules if fnmatch.fnmatchcase(name, pattern))
        # named_parameters() lists a shared parameter once, under its first name.
        matched = {n for n in parameters if fnmatch.fnmatchcase(n, pattern) or n.startswith(below)}
        if not matched:
            names = modules + parameters
            close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or names[-5:]
            raise TaskError(
                f"The layer pattern {pattern!r} matches nothing in the model. Close names: {', '.join(close)}."
            )
        chosen |= matched
    return [name for name in parameters if name in chosen]


def refuse_without_gradient(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse parameters of types that have no gradient, or whose gradient is changed before it is used.

    Raises:
        TaskError: names the first one.
    """
    for name in names:
        parameter = model.get_parameter(name)
        if parameter._backward_hooks:
            raise TaskError(
                f"{name} has a gradient hook (register_hook), whose change of the gradient is not traced. Call "
                ".remove() on what register_hook returned, or leave the parameter out, with layers=."
            )
        dtype = parameter.dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            raise TaskError(f"The parameter {name} is of {dtype}, which has no gradient. Leave it out, with layers=.")


def plan_layers(model: nn.Module, selected: Sequence[str]) -> list[Layer]:
    """Group the selected parameters into layers and give each its cheapest candidate route.

    Hooks take the parameters of modules that a rule knows, if they are the module's own alone;
    every other parameter is looked for in the functions that use it.
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    wanted = set(selected)
    layers: list[Layer] = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        names = tuple(name for name in own if _joined(path, name) in wanted)
        known = set(own) <= {"weight", "bias"} and all(owners[id(own[name])] == 1 for name in names)
        if known and names and not any(parameter.is_complex() for parameter in own.values()):
            layers += _hooked(path, module, names)
    taken = {name for layer in layers for name in layer.parameters}
    for name in selected:
        if name not in taken:
            is_complex = model.get_parameter(name).is_complex()  # of which hooks know nothing
            layers.append(general_layer(model, name, "vmap") if is_complex else uses.used_layer(model, name))
    order = {name: position for position, name in enumerate(selected)}
    return sorted(layers, key=lambda layer: order[layer.parameters[0]])


def _hooked(path: str, module: nn.Module, names: tuple[str, ...]) -> list[Layer]:
    """One layer for all the names, else one for each name that a rule knows."""
    for route, rule in RULES.items():
        shape = rule().shape(module, names)
        if shape is not None:
            name = path if len(names) > 1 or not rule.single else _joined(path, names[0])
            return [Layer(name, tuple(_joined(path, n) for n in names), *shape, route)]
    return [] if len(names) == 1 else [layer for name in names for layer in _hooked(path, module, (name,))]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def general_layer(model: nn.Module, parameter: str, route: str) -> Layer:
    """A parameter on a general route: its gradient is one row, of a complex one the real and imaginary parts."""
    return Layer(parameter, (parameter,), 1, as_real(model.get_parameter(parameter)).numel(), route)


def as_matrix(layer: Layer, gradients: Mapping[str, Tensor]) -> Tensor:
    """Gradients by parameter, (batch, *its shape) each, as the layer's matrix (batch, d_out, d_in)."""
    parts = []
    for name in layer.parameters:
        gradient = gradients[name]
        if uses.is_used(layer):
            parts.append(uses.as_matrix(layer, gradient))
        elif layer.hooked:
            parts.append(RULES[basic_route(layer)]().as_matrix(name.rpartition(".")[2], gradient))
        else:
            parts.append(gradient.reshape(len(gradient), 1, -1))
    return torch.cat(parts, 2)


def packed_parameters(model: nn.Module, frozen: Collection[str]) -> dict[str, Tensor]:
    """Frozen parameters that only the model itself can hold: quantised, with what unpacks them beside them.

    Each pass runs with the model's own.
    """
    found = {}
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}" if prefix else own
            homes = {type(module).__module__.split(".")[0], type(parameter).__module__.split(".")[0]}
            if name in frozen and homes & _PACKING:
                found[name] = parameter
    return found


def same_packed(one: Tensor, other: Tensor) -> bool:
    """Whether two quantised weights are the same; those of torchao are made of tensors and compare by these."""
    (inside, how), (inside_other, how_other) = made_of(one), made_of(other)
    if inside is None or inside_other is None:
        return inside is inside_other and torch.equal(one.to(other.device), other.as_subclass(Tensor))
    alike = how == how_other and inside.keys() == inside_other.keys()
    return alike and all(same_packed(tensor, inside_other[name]) for name, tensor in inside.items())


def refuse_what_hides(model: nn.Module, tracked: Collection[str]) -> None:
    """Refuse modules that neither hooks nor swapped weights reach.

    Args:
        model: the model.
        tracked: names of the parameters whose gradients are wanted.

    Raises:
        TaskError: names the module and the way out.
    """
    for name, module in model.named_modules():
        kind, where = type(module), name or "The model"
        if kind.__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
            raise TaskError(
                f"{where} is compiled, so its weights cannot be swapped. Give Task the module before torch.compile "
                "(compiled._orig_mod is the same weights)."
            )
        if kind.__name__ in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
            raise TaskError(
                f"{where} is wrapped in {kind.__name__}, which splits batches. Give Task the module inside "
                "(wrapped.module)."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TaskError(f"{where} is a TorchScript module, which hides its layers. Give Task the Python module.")
        if ".quantized" in kind.__module__:
            raise TaskError(
                f"{where} ({kind.__name__}) is quantised and has no gradients. Give Task the model in floating point."
            )
        own = {f"{name}.{parameter}" if name else parameter for parameter, _ in module.named_parameters(recurse=False)}
        if kind.__module__.split(".")[0] in _PACKING and own & set(tracked):
            raise TaskError(
                f"{where} ({kind.__name__}) is quantised, so it passes gradients on but has none of its own. Track the "
                "adapters alone, with layers=, or give Task the model in floating point."
            )
