"""What a hook on a module cannot see: parameters by the torch functions that they are used in.

A class token, a learned scale, positions, the weight of a norm written by hand, an embedding that is also
the output layer: while the forward pass runs, a function mode meets every call that takes such a parameter.
Nothing here is trusted: the engine compares every parameter with autograd on examples before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.overrides import TorchFunctionMode

from ..factors import Factors, Formed, Gradients, Layer, Lookups
from .owners import BY_ROWS, basic_route, by_rows

# The second is for embeddings, whose gradient has a column for each word.
ROUTE, TRANSPOSED = "function", "function^T"

# Turns the gradient of an output into the parameter's per-example gradients.
Make = Callable[[Tensor], Gradients]
Watch = Callable[[int, Make, Tensor], Tensor]

ELEMENTWISE = {
    "add",
    "add_",
    "sub",
    "sub_",
    "subtract",
    "rsub",
    "mul",
    "mul_",
    "multiply",
    "div",
    "div_",
    "true_divide",
}
_EXPANDING = {"expand", "expand_as", "broadcast_to"}
VIEWING = {"view", "reshape", "unsqueeze", "squeeze", "flatten", "__getitem__", "permute", "transpose", "to", "float"}


def used_layer(model: nn.Module, parameter: str, rows: bool = False) -> Layer:
    """A parameter on this route, ``rows`` if by rows: two axes are a matrix, anything else is one row.

    By rows, three axes are a stack of matrices, which stand side by side.
    """
    tensor, suffix = model.get_parameter(parameter), BY_ROWS if rows else ""
    if any(isinstance(module, nn.Embedding) and module.weight is tensor for module in model.modules()):
        return Layer(parameter, (parameter,), tensor.shape[1], tensor.shape[0], TRANSPOSED + suffix)
    shape = (tensor.shape[0], tensor.shape[1]) if tensor.ndim == 2 else (1, tensor.numel())
    if rows and tensor.ndim == 3:
        shape = (tensor.shape[1], tensor.shape[0] * tensor.shape[2])
    return Layer(parameter, (parameter,), *shape, ROUTE + suffix)


def is_used(layer: Layer) -> bool:
    """Whether a layer is on this route."""
    return basic_route(layer) in (ROUTE, TRANSPOSED)


def as_matrix(layer: Layer, gradient: Tensor) -> Tensor:
    """(batch, *the parameter's shape) as the layer's matrix (batch, d_out, d_in)."""
    if basic_route(layer) == TRANSPOSED:
        return gradient.transpose(1, 2)
    if by_rows(layer) and gradient.ndim == 4:
        gradient = gradient.transpose(1, 2)
    return gradient.reshape(len(gradient), layer.d_out, layer.d_in)


@dataclass(frozen=True)
class _Tracked:
    """A parameter, or a view of one.

    Args:
        number: of its layer.
        parameter: whole.
        pull: turns a gradient of the view (batch, *its shape) into one of the parameter (batch, *its shape).
    """

    number: int
    parameter: Tensor
    pull: Callable[[Tensor], Tensor]


class Uses(TorchFunctionMode):
    """Meets the calls that take a tracked parameter, and has their outputs watched.

    Args:
        layers: of this route, by number, with the tensor that is in the model now.
        n: examples in the batch; what has another first axis is not per example.
        watch: ``watch(number, make, output)`` returns the output to go on with.
    """

    def __init__(self, layers: Mapping[int, tuple[Layer, Tensor]], n: int, watch: Watch) -> None:
        super().__init__()
        self._layers = {number: layer for number, (layer, _) in layers.items()}
        self._tracked = {id(p): _Tracked(number, p, lambda delta: delta) for number, (_, p) in layers.items()}
        self._views: list[Tensor] = []  # alive, so that no other tensor gets the id of one
        self._n, self._watch, self._met = n, watch, 0
        # By layer, the functions that took its parameter and went unwatched.
        self.unknown: set[tuple[int, str]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch instead of ``func``."""
        kwargs = kwargs or {}
        known = [self._tracked[id(value)] for value in (*args, *kwargs.values()) if id(value) in self._tracked]
        if not known:
            return func(*args, **kwargs)
        met = self._met
        result = self._meet(func, getattr(func, "__name__", "a function"), args, kwargs)
        if self._met < met + len(known) and isinstance(result, Tensor):
            self.unknown |= {(tracked.number, getattr(func, "__name__", "a function")) for tracked in known}
        return result

    def _meet(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        places = [place for place, value in enumerate(args) if id(value) in self._tracked]
        if name == "linear" and not kwargs:
            return self._linear(func, args)
        if len(places) == 1:
            place, tracked = places[0], self._tracked[id(args[places[0]])]
            if name in ELEMENTWISE:
                return self._elementwise(func, args, kwargs, place, tracked)
            if name in _EXPANDING and place == 0:
                return self._expanded(func(*args, **kwargs), args[0], tracked)
            if name in VIEWING and place == 0:
                return self._view(func, args, kwargs, tracked)
            if name == "embedding" and place == 1:
                return self._embedding(func, args, kwargs, tracked)
            if name in ("matmul", "mm") and place == 1 and args[1].ndim == 2:
                return self._product(func(*args, **kwargs), args[0], tracked, args[1], transposed=True)
        return func(*args, **kwargs)

    def _watched(self, tracked: _Tracked, make: Make, output: Tensor) -> Tensor:
        self._met += 1
        return self._watch(tracked.number, make, output) if torch.is_grad_enabled() else output

    def _elementwise(self, func: Any, args: Any, kwargs: Any, place: int, tracked: _Tracked) -> Any:
        shapes = [value.shape for value in args if isinstance(value, Tensor)]
        shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        used = args[place]
        if len(shapes) > 1 and shape[:1] == (self._n,) and (used.ndim < len(shape) or used.shape[0] == 1):
            args = (*args[:place], self._expanded(used.expand(shape), used, tracked), *args[place + 1 :])
        return func(*args, **kwargs)

    def _expanded(self, output: Tensor, used: Tensor, tracked: _Tracked) -> Tensor:
        """``used``, once for each example."""
        if output.shape[:1] != (self._n,) or (used.ndim == output.ndim and used.shape[0] != 1):
            return output
        shape = used.shape
        aligned = (self._n, *((1,) * (output.ndim - len(shape)) + shape)[1:])

        def make(delta: Tensor) -> Gradients:
            return self._formed(tracked, delta.sum_to_size(aligned).reshape(len(delta), *shape))

        return self._watched(tracked, make, output)

    def _view(self, func: Any, args: Any, kwargs: Any, tracked: _Tracked) -> Any:
        view, pull = vjp(lambda tensor: func(tensor, *args[1:], **kwargs), args[0])[:2]
        self._met += 1
        self._views.append(view)
        self._tracked[id(view)] = _Tracked(
            tracked.number, tracked.parameter, lambda delta: tracked.pull(vmap(pull)(delta.to(view.dtype))[0])
        )
        return view

    def _linear(self, func: Any, args: Any) -> Any:
        inputs, weight, *rest = args
        output = func(*args)
        if id(weight) in self._tracked:
            output = self._product(output, inputs, self._tracked[id(weight)], weight, transposed=False)
        if rest and id(rest[0]) in self._tracked and output.shape[:1] == (self._n,):
            bias = self._tracked[id(rest[0])]

            def make(delta: Tensor) -> Gradients:
                return self._formed(bias, delta.reshape(len(delta), -1, delta.shape[-1]).sum(1))

            output = self._watched(bias, make, output)
        return output

    def _product(self, output: Tensor, inputs: Tensor, tracked: _Tracked, used: Tensor, transposed: bool) -> Tensor:
        """X W^T, or x W where ``transposed``: sums of outer products."""
        if output.shape[:1] != (self._n,) or inputs.shape[:1] != (self._n,) or used.ndim != 2:
            return output
        saved, whole = inputs.detach(), used is tracked.parameter
        turned = transposed != (whole and self._layers[tracked.number].route == TRANSPOSED)

        def make(delta: Tensor) -> Gradients:
            sides = [tensor.reshape(len(tensor), -1, tensor.shape[-1]).to(delta.dtype) for tensor in (saved, delta)]
            factors = Factors(*sides[::-1]) if turned else Factors(*sides)
            return factors if whole else self._formed(tracked, factors.gradient)

        return self._watched(tracked, make, output)

    def _embedding(self, func: Any, args: Any, kwargs: Any, tracked: _Tracked) -> Any:
        output, (indices, used) = func(*args, **kwargs), args  # torch hands on the rest by name
        unusual = kwargs.get("max_norm") is not None or kwargs.get("scale_grad_by_freq")
        if len(indices) != self._n or unusual or used is not tracked.parameter:
            return output
        padding = kwargs.get("padding_idx")
        if self._layers[tracked.number].route != TRANSPOSED:
            return output

        def make(delta: Tensor) -> Gradients:
            places = indices.reshape(len(indices), -1).long()
            delta = delta.reshape(*places.shape, -1)
            if padding is not None:
                delta = delta * (places != padding % len(used))[:, :, None]
            return Lookups(places, delta, len(used))

        return self._watched(tracked, make, output)

    def _formed(self, tracked: _Tracked, gradient: Tensor) -> Gradients:
        return Formed(as_matrix(self._layers[tracked.number], tracked.pull(gradient)))
