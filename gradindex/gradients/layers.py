"""Which parameters are tracked, and the factors of the layers that hooks can see."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import TaskError
from ..factors import Factors, Layer, Route


def select_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that the patterns choose, in the model's order.

    A pattern matches a parameter by its name, or a module by its name and then means every
    parameter at or below it.

    Raises:
        TaskError: a pattern matches nothing; close names are listed.
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


def plan_layers(model: nn.Module, selected: Sequence[str]) -> list[Layer]:
    """Group the selected parameters into layers and give each its cheapest candidate route.

    The hooks take a Linear or ungrouped Conv2d whose parameters are its own alone; every
    other parameter goes to ``torch.func``.
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers: list[Layer] = []
    route: Route
    taken: set[str] = set()
    wanted = set(selected)
    for module_name, module in model.named_modules():
        own = {f"{module_name}.{n}" if module_name else n: p for n, p in module.named_parameters(recurse=False)}
        names = tuple(name for name in own if name in wanted)
        if not names or any(owners[id(own[name])] > 1 for name in names):
            continue
        if type(module) is nn.Linear:
            route, rows, inputs = "linear", module.out_features, module.in_features
        elif type(module) is nn.Conv2d and module.groups == 1:
            route, rows = "conv2d", module.out_channels
            inputs = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        else:
            continue
        prefix = f"{module_name}." if module_name else ""
        if any(name not in (f"{prefix}weight", f"{prefix}bias") for name in own):
            continue  # parametrised: its weight is computed from other parameters
        columns = inputs * (f"{prefix}weight" in names) + (f"{prefix}bias" in names)
        layers.append(Layer(module_name, names, rows, columns, route))
        taken.update(names)
    for name in selected:
        if name not in taken:
            layers.append(general_layer(model, name, "vmap"))
    order = {name: position for position, name in enumerate(selected)}
    return sorted(layers, key=lambda layer: order[layer.parameters[0]])


def general_layer(model: nn.Module, parameter: str, route: Route) -> Layer:
    """A parameter on a general route: its gradient is one row."""
    return Layer(parameter, (parameter,), 1, model.get_parameter(parameter).numel(), route)


def layer_factors(
    layer: Layer, module: nn.Module, scales: Mapping[str, float], inputs: Tensor, output_gradients: Tensor
) -> Factors:
    """Factors of one call of a hooked layer, each parameter's columns times its scale.

    Args:
        layer: which parameters, and the route.
        module: the module behind it.
        scales: sqrt(eta) of each parameter.
        inputs: what the module got: (batch, ..., in) or (batch, channels, h, w).
        output_gradients: of the loss by the module's output, of its shape.
    """
    if layer.route == "conv2d":
        assert isinstance(module, nn.Conv2d)
        activations = _patches(module, inputs)
        deltas = output_gradients.flatten(2).transpose(1, 2)
    else:
        activations = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        deltas = output_gradients.reshape(len(output_gradients), -1, output_gradients.shape[-1])
    columns = []
    for name in layer.parameters:
        if name.endswith("weight"):
            columns.append(activations if scales[name] == 1 else activations * scales[name])
        else:
            # The bias belongs to the layer: its activation is 1 at every position.
            columns.append(activations.new_full((*activations.shape[:2], 1), scales[name]))
    return Factors(columns[0] if len(columns) == 1 else torch.cat(columns, 2), deltas)


def _patches(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """(batch, output positions, channels * kernel height * kernel width)."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    unfolded = functional.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return unfolded.transpose(1, 2)
