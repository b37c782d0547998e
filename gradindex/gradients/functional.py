"""The loss as a function of weights, and the general routes to per-example gradients of any parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ..errors import LossError, user_code
from ..task import Loss
from ..tree import map_tensors, tensors

# What the user's code is called when it fails.
LOSS, QUERY_LOSS, BACKWARD, COLLATE = "The loss", "The query loss", "The backward pass of the loss", "collate"

# Tensors by name, each name with "model." in front.
State = Mapping[str, Tensor]

_Result = TypeVar("_Result")


class LossModule(nn.Module):
    """The loss as a module, so that ``functional_call`` can swap the model's weights under it.

    Args:
        model: the model.
        loss: one number per example.
        half: run both under autocast to this type. Autocast ends with the forward pass: what
            becomes of the gradients chooses its precision itself.
        name: what to call the loss when it fails.
    """

    def __init__(self, model: nn.Module, loss: Loss, half: torch.dtype | None = None, name: str = LOSS) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.autocast, self._name = half, name

    def forward(self, batch: Any, then: Callable[[Any], _Result]) -> _Result:
        """What ``then`` makes of the losses (batch,) with the weights that are in the model now."""
        device = next(self.model.parameters()).device.type
        half = contextlib.nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)
        with half, user_code(self._name):
            losses = self.loss(self.model, batch)
        return then(losses)

    def losses(self, state: State, batch: Any, n: int) -> Tensor:
        """(n,) the losses with other weights in the model, for the time of the call.

        Raises:
            LossError: the loss is not one number per example.
        """
        return self.through(state, batch, n, lambda losses: losses)

    def through(self, state: State, batch: Any, n: int, then: Callable[[Tensor], _Result]) -> _Result:
        """What ``then`` makes of the losses (n,) while the other weights are still in the model; see :meth:`within`.

        Raises:
            LossError: the loss is not one number per example.
        """

        def checked(losses: Any) -> _Result:
            if not isinstance(losses, Tensor):
                raise LossError(
                    f"The loss returned a {type(losses).__name__}, but must return a tensor of shape ({n},)."
                )
            if losses.shape != (n,):
                raise LossError(
                    f"The loss has shape {tuple(losses.shape)}, but must be per example, of shape ({n},) "
                    f"for a batch of {n}. Use reduction='none' and no mean over the batch."
                )
            if losses.dtype == torch.bool or losses.is_complex():
                raise LossError(f"The loss is of type {losses.dtype}, but must be real numbers that have a gradient.")
            return then(losses)

        return self.within(state, batch, checked)

    def within(self, state: State, batch: Any, then: Callable[[Any], _Result]) -> _Result:
        """What ``then`` makes of what the loss returned, while the other weights are still in the model.

        A backward pass belongs there: activation checkpointing, and whatever else runs parts of the model again
        on the way back, must meet the weights of the way forward.

        torch's own tie_weights swaps a module that stands in the model under two names twice and
        puts the swapped tensor back; so each module is swapped once, under its first name, and
        gets the tensor of the first shared name.

        A model may write to its buffers, even in eval mode (averages, counters, caches); each call begins with the
        checkpoint's, so that no example depends on those before it.
        """
        first = {id(tensor): name for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        written = {name: state[name].clone() for name, _ in self.named_buffers() if name in state}
        state, swapped = {**state, **written}, {}
        for prefix, module in self.named_modules():
            own = (*module.named_parameters(prefix, False, False), *module.named_buffers(prefix, False, False))
            swapped.update({name: state[first[id(tensor)]] for name, tensor in own if first[id(tensor)] in state})
        result: _Result = functional_call(self, swapped, (batch, then), tie_weights=False)
        return result


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor with real and imaginary parts as a last axis of two; any other as it is.

    The inner product of two such gradients is that of the real parameters that a step of training moves.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_direction(numbers: Tensor, parameter: Tensor) -> Tensor:
    """What :func:`as_real` laid out, flat or not, in the shape and kind of the parameter."""
    if parameter.is_complex():
        return torch.view_as_complex(numbers.reshape(*parameter.shape, 2).contiguous())
    return numbers.reshape(parameter.shape)


def vmap_gradients(
    wrapper: LossModule, state: State, names: Sequence[str], batch: Any, n: int, loss_scale: float = 1.0
) -> list[Tensor]:
    """(n, *shape) for each name, in one pass vectorised over the first axis of every tensor of the batch.

    The losses are multiplied by ``loss_scale``, and the gradients divided by it. Those of complex parameters are real,
    see :func:`as_real`.
    """
    parts = tensors(batch)
    if any(part.ndim == 0 or len(part) != n for part in parts):
        raise RuntimeError("a tensor of the batch has another first axis than the examples")

    def one(tracked: dict[str, Tensor], *slices: Tensor) -> Tensor:
        remaining = iter(slices)
        single = map_tensors(batch, lambda _: next(remaining).unsqueeze(0))
        return wrapper.losses({**state, **tracked}, single, 1).sum() * loss_scale

    tracked = {f"model.{name}": state[f"model.{name}"] for name in names}
    gradients = vmap(grad(one), in_dims=(None, *([0] * len(parts))))(tracked, *parts)
    return [as_real(gradients[f"model.{name}"].detach()) / loss_scale for name in names]


def loop_gradients(
    wrapper: LossModule, state: State, names: Sequence[str], singles: Iterable[Any], loss_scale: float = 1.0
) -> list[Tensor]:
    """The same by one autograd pass for each of n batches of one: slow, and right for anything."""
    rows = []
    for single in singles:
        tracked = {f"model.{name}": state[f"model.{name}"].detach().requires_grad_() for name in names}
        leaves = list(tracked.values())

        def backward(losses: Tensor, leaves: list[Tensor] = leaves) -> list[Tensor]:
            if not losses.requires_grad:
                return [torch.zeros_like(leaf) for leaf in leaves]
            with user_code(BACKWARD):
                return list(torch.autograd.grad(losses.sum() * loss_scale, leaves, materialize_grads=True))

        with torch.enable_grad():
            row = wrapper.through({**state, **tracked}, single, 1, backward)
        rows.append([as_real(gradient.to_dense()) / loss_scale for gradient in row])  # embeddings may be sparse
    return [torch.stack(column) for column in zip(*rows, strict=True)]
