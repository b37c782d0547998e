"""Finds functions that run parts of the model again on the way back, so that no per-example gradient passes through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..errors import TaskError
from ..tree import map_tensors, tensors
from .functional import LossModule, State
from .narrow import Narrow

# The node that torch.utils.checkpoint leaves in the graph with use_reentrant=True.
_NODE = "CheckpointFunctionBackward"


def refuse_reentrant(wrapper: LossModule, state: State, parameters: Sequence[str], single: Any) -> None:
    """Refuse reentrant checkpointing in or behind what uses a tracked parameter, and reversible layers of a like kind.

    Its forward pass is outside the graph, and its backward pass refuses ``torch.autograd.grad``; and where nothing
    before it is tracked, it would leave the parameters inside without a gradient and without an error.

    Args:
        wrapper: the loss.
        state: the tensors that it runs with.
        parameters: the tracked ones.
        single: one example as a batch.

    Raises:
        TaskError: names what is run so.
    """
    own = {f"model.{name}" for name, _ in wrapper.model.named_parameters()}
    # As in training, where the layers before it are trained as well. Of frozen weights that are held narrow, and would
    # all become wide, those of embeddings are enough, and the inputs.
    first = {
        f"model.{name}.weight" for name, module in wrapper.model.named_modules() if isinstance(module, nn.Embedding)
    }
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in state.items()
        if name in own and _differentiable(tensor) and (name in first or not isinstance(tensor, Narrow))
    }
    if any(isinstance(tensor, Narrow) for tensor in state.values()):
        single = map_tensors(single, lambda tensor: tensor.requires_grad_() if _differentiable(tensor) else tensor)

    tracked = {parameter: leaves[f"model.{parameter}"] for parameter in parameters}

    def lost(losses: Tensor) -> dict[int, Any]:
        functions, graph = _lost([losses.grad_fn]), list(_nodes([losses.grad_fn]))
        reached = _variables(graph)
        unreached = {name: leaf for name, leaf in tracked.items() if id(leaf) not in reached}
        if unreached and not functions and any(isinstance(node, BackwardCFunction) for node in graph):
            _refuse_hidden(losses, unreached, graph)
        return functions

    with torch.enable_grad():
        functions = wrapper.through({**state, **leaves}, single, 1, lost)
    for parameter, leaf in tracked.items():
        key = id(leaf)
        if key in functions:
            raise TaskError(
                f"{_named(wrapper.model, functions[key])} is run by torch.utils.checkpoint with use_reentrant=True, "
                f"through which the gradient of {parameter} cannot be traced. Use use_reentrant=False there, or turn "
                "activation checkpointing off: neither changes a value."
            )


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _lost(roots: Iterable[Any]) -> dict[int, Any]:
    """By the id of a leaf inside or before what is checkpointed, the function that is run there."""
    functions: dict[int, Any] = {}
    for node in reversed([node for node in _nodes(roots) if node.name() == _NODE]):
        inputs = list(node.inputs)
        for place, tensor in zip(node.tensor_indices, node.saved_tensors, strict=True):
            inputs[place] = tensor.detach().requires_grad_(_differentiable(tensor))
        inside = [output.grad_fn for output in tensors(node.run_function(*inputs))]
        functions = _lost(inside) | functions
        for leaf in (*_variables(_nodes(inside)), *_variables(_nodes([node]))):
            functions.setdefault(leaf, node.run_function)
    return functions


def _refuse_hidden(losses: Tensor, unreached: dict[str, Tensor], graph: list[Any]) -> None:
    """Refuse parameters that are not in the graph, but get a gradient from a backward pass inside the backward pass."""
    variables = [node.variable for node in graph if hasattr(node, "variable")]
    gradients = [variable.grad for variable in variables]  # the loss may have leaves of its own
    losses.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for variable, gradient in zip(variables, gradients, strict=True):
        variable.grad = gradient
    for name, leaf in unreached.items():
        if leaf.grad is not None:
            raise TaskError(
                f"{name} is hidden in a function that runs it again in its backward pass, as reversible layers do, so "
                "its gradient cannot be traced. Leave it out, with layers=, or run the layer without that function."
            )


def _nodes(roots: Iterable[Any]) -> Iterator[Any]:
    """Every node of the graphs that end in ``roots``."""
    seen: set[Any] = set()
    waiting = [root for root in roots if root is not None]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions if following is not None]


def _variables(nodes: Iterable[Any]) -> set[int]:
    """The ids of the leaves among them."""
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


def _named(model: nn.Module, function: Any) -> str:
    """What is run, by its name in the model, or that of a function."""
    while isinstance(function, partial):
        function = function.func
    module = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    for name, part in model.named_modules():
        if part is module:
            return f"{name or 'The model'} ({type(part).__name__})"
    return f"A part of the model ({getattr(function, '__qualname__', type(function).__name__)})"
