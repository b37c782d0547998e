"""What every rule offers, and what most of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...factors import Gradients
from ...registry import Registry


class Rule(Protocol):
    """How one kind of module is handled, whose own parameters are called ``"weight"`` and ``"bias"``.

        @RULES.register("scale")
        class Scale(Plain):
            def shape(self, module, names):
                return (module.weight.numel(), 1) if type(module) is Scaling else None

            def gradients(self, module, saved, delta, scales):
                return Formed((saved * delta)[:, :, None] * scales["weight"])

    ``names`` and ``scales`` go by the parameter's own name, such as ``"bias"``.

    Attributes:
        takes_half: whether bfloat16 comes as it is; else it is widened to float32.
        single: whether it is for one parameter of a module whose others have another rule.
    """

    takes_half: bool
    single: bool

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """(d_out, d_in) of the gradient of these parameters together, or ``None``: not by this rule."""

    def saved(self, module: nn.Module, inputs: Tensor, *others: Any, **keywords: Any) -> Any:
        """What to keep of the forward pass, while a checkpoint's tensors are in the module.

        ``others`` and ``keywords`` are what the module was called with besides its input.
        """

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """Gradients of the tracked parameters, each times its scale; ``delta`` is the output's gradient."""

    def row_axes(self, module: nn.Module) -> int | None:
        """The last axes of the output that make up a row, where rows can be laid out anew by example; else ``None``."""

    def regrouped(self, module: nn.Module, saved: Any, lay: Callable[[Tensor, int], Tensor]) -> Any:
        """What was saved, as it would be of (examples, rows of each).

        ``lay(tensor, axes)`` does so for a tensor whose rows have so many axes.
        """

    def as_matrix(self, name: str, gradient: Tensor) -> Tensor:
        """A parameter's gradient (batch, *its shape) as its columns of the layer's matrix (batch, d_out, -1)."""


# By the route of a layer. Of several rules that know a module, the first one registered is taken.
RULES: Registry[type[Rule]] = Registry("layer rule")


class Plain:
    """What most rules share."""

    takes_half = single = False

    def saved(self, module: nn.Module, inputs: Tensor, *others: Any, **keywords: Any) -> Any:
        """The input. See :class:`Rule`."""
        return inputs.detach()

    def row_axes(self, module: nn.Module) -> int | None:
        """None. See :class:`Rule`."""
        return None

    def regrouped(self, module: nn.Module, saved: Any, lay: Callable[[Tensor, int], Tensor]) -> Any:
        """Rows of inputs are as those of outputs. See :class:`Rule`."""
        return lay(saved, self.row_axes(module) or 0)

    def as_matrix(self, name: str, gradient: Tensor) -> Tensor:
        """One row for each of the first axis. See :class:`Rule`."""
        return gradient.flatten(2) if gradient.ndim > 2 else gradient[:, :, None]


def with_bias(activations: Tensor, scales: Mapping[str, float]) -> Tensor:
    """(batch, positions, d_in) scaled, and a column for the bias: its activation is 1 at every position."""
    parts = []
    if "weight" in scales:
        parts.append(activations if scales["weight"] == 1 else activations * scales["weight"])
    if "bias" in scales:
        parts.append(activations.new_full((*activations.shape[:2], 1), scales["bias"]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def wide(tensor: Tensor) -> Tensor:
    """At least in float32."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def columns(inputs: int, names: tuple[str, ...]) -> int:
    """How many the inputs and the bias take, of what is tracked."""
    return inputs * ("weight" in names) + ("bias" in names)
