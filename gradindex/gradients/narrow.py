"""Weights that are held in fewer bits than gradients are computed in, and cast wherever they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

NARROW = (torch.bfloat16, torch.float16)

# What gives a part of a weight, which stays narrow.
_PARTS = {Tensor.__getitem__, Tensor.select, Tensor.t, torch.t, Tensor.transpose, torch.transpose}
# What says of a weight what is no matter of its type.
_FACTS: set[Any] = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
}
_FACTS |= {
    getattr(Tensor, name).__get__
    for name in ("shape", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "grad", "is_cuda")
}
_TYPE: Any = getattr(Tensor, "dtype").__get__  # noqa: B009  # mypy knows no __get__ of it


class Narrow(Tensor):
    """A frozen weight in bfloat16 or float16 that takes part in everything as its copy in a wider type would.

    The copy lasts as long as the operation: a linear layer keeps the narrow weight for its backward pass. It shares the
    memory of the tensor that it is made of.
    """

    _wide: torch.dtype

    @staticmethod
    def of(tensor: Tensor, wide: torch.dtype) -> Narrow:
        """A tensor that counts as one of type ``wide``."""
        found: Narrow = torch.Tensor._make_subclass(Narrow, tensor.detach(), False)
        found._wide = wide
        return found

    def plain(self) -> Tensor:
        """The tensor itself, in its own type."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def widened(self, wide: torch.dtype) -> Narrow:
        """The same weight for another type."""
        return Narrow.of(self.plain(), wide)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation of torch on the weight's copy in the wider type."""
        kwargs = kwargs or {}
        if func == _TYPE:
            return args[0]._wide
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _PARTS and isinstance(args[0], Narrow):
            return Narrow.of(func(args[0].plain(), *args[1:], **kwargs), args[0]._wide)
        if func is functional.embedding and isinstance(args[1], Narrow):
            return functional.embedding(args[0], args[1].plain(), *args[2:], **kwargs).to(args[1]._wide)
        if func is functional.linear and not kwargs and isinstance(args[1], Narrow):
            return _linear(args[0], args[1], args[2] if len(args) > 2 else None)
        if func is torch.addmm and not kwargs and isinstance(args[2], Narrow) and len(args) == 3:
            return _linear(args[1], args[2].t(), args[0])  # type: ignore[arg-type]  # a part is narrow as well
        args, kwargs = tree_map_only(Narrow, lambda weight: weight.plain().to(weight._wide), (args, kwargs))
        return func(*args, **kwargs)


def _linear(inputs: Tensor, weight: Narrow, bias: Tensor | None) -> Tensor:
    narrow, kind = weight.plain(), inputs.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == narrow.dtype:
        return functional.linear(inputs, narrow, bias)  # what autocast would make of the wide one
    if torch.is_autocast_enabled(kind):
        return functional.linear(inputs, narrow.to(weight._wide), bias)
    found: Tensor = _Linear.apply(inputs, narrow, bias, weight._wide)  # type: ignore[no-untyped-call]
    return found


class _Linear(torch.autograd.Function):
    """A linear layer that keeps its narrow weight for the backward pass, not the wide copy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
        """As ``functional.linear``."""
        return functional.linear(inputs, weight.to(wide), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the narrow weight."""
        _, weight, _, ctx.wide = inputs
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        """Of the input and the bias; the weight is frozen."""
        (weight,) = ctx.saved_tensors
        of_input = delta @ weight.to(ctx.wide) if ctx.needs_input_grad[0] else None
        of_bias = delta.reshape(-1, delta.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return of_input, None, of_bias, None

    @staticmethod
    def jvp(ctx: Any, inputs: Tensor | None, weight: None, bias: Tensor | None, wide: None) -> Tensor:
        """Along directions of the input and the bias."""
        (narrow,) = ctx.saved_tensors
        along = None if inputs is None else functional.linear(inputs, narrow.to(ctx.wide))
        if bias is None:
            assert along is not None
            return along
        return bias if along is None else along + bias
