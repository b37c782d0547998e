"""Per-example gradients of the hooked layers, in one backward pass of the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TaskError
from ..factors import Gradients, Layer
from ..stacks import Rows, concatenated
from ..tree import map_tensors
from . import uses
from .owners import Call, Lay, Weights, basic_route, by_rows
from .rowuses import MakeOfRows, RowUses
from .rules import RULES

Consume = Callable[[int, Gradients], None]


class Hooks:
    """Watches the outputs of the hooked layers while a batch runs. Install before, remove after.

    Autograd computes the gradients of these outputs alone: no weight gradient, and no graph
    below the first tracked layers.

    Args:
        model: where the layers are.
        layers: all of them; those on other routes are left alone.
        dtype: to which gradients in half precision are widened.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self._layers = {number: layer for number, layer in enumerate(layers) if layer.hooked}
        self._used = {n: layer for n, layer in self._layers.items() if uses.is_used(layer)}
        self._model, self.dtype = model, dtype
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # By layer, a call each: what makes its gradients from that of its output, and that, once it is there.
        self._calls: dict[int, list[tuple[uses.Make, Tensor | None]]] = {}
        # By layer and place among its calls, those whose rows' owners are measured.
        self._by_rows: dict[tuple[int, int], Call] = {}
        self._leaves: list[Tensor] = []
        # From the forward pass on, and from the backward pass on.
        self._running = False
        self._receive: Callable[[int, int, Tensor], None] | None = None
        self._n = 0
        self._weights = Weights(1, None, torch.device("cpu"))
        # Uses, by layer and function, that went unwatched when the gradients were found right.
        self.harmless: set[tuple[str, str]] = set()
        self._scales: Mapping[str, float] = {}
        # Whether a layer's output that all examples share (first axis 1) is handed on once for each of them.
        self.shares = True
        self.at = "the forward pass"

    def install(self) -> None:
        """Put hooks on the modules."""
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(partial(self._entered, name)))
        for number, layer in self._layers.items():
            if number not in self._used:
                module = self._module_of(layer)
                self._handles.append(module.register_forward_hook(partial(self._called, number), with_kwargs=True))

    def remove(self) -> None:
        """Take them away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _module_of(self, layer: Layer) -> nn.Module:
        return self._model.get_submodule(layer.parameters[0].rpartition(".")[0])

    def _entered(self, name: str, module: nn.Module, args: Any) -> None:
        self.at = f"the forward pass of {name or 'the model'} ({type(module).__name__})"

    def run(
        self,
        through: Callable[[Callable[[Tensor], Tensor]], Tensor],
        state: Mapping[str, Tensor],
        scales: Mapping[str, float],
        n: int,
        consume: Consume,
        loss_scale: float = 1.0,
        lenient: bool = False,
        half: torch.dtype | None = None,
    ) -> Tensor:
        """Forward and backward, each layer's gradients consumed as soon as they are there.

        Args:
            through: the forward pass of the batch; what it is given takes the losses (n,), while the model still
                has the tensors that it ran with.
            state: the tensors that it runs with.
            scales: by parameter, what its gradients are multiplied by.
            n: examples in the batch.
            consume: called as ``consume(layer number, gradients)``.
            loss_scale: what the losses are multiplied by, so that half precision does not underflow;
                gradients are divided by it.
            lenient: leave out a layer whose rule fails.
            half: the type of autocast, if there is one.

        Returns:
            (n,) the losses.

        Raises:
            InseparableError: of a layer by rows, the rows cannot be told apart by example.
        """

        def note(number: int, position: int, delta: Tensor) -> None:
            if (number, position) in self._by_rows:
                self._by_rows[number, position].note(delta)

        def receive(number: int, position: int, delta: Tensor) -> None:
            note(number, position, delta)
            if len(delta) != n and not lenient and not by_rows(self._layers[number]):
                raise TaskError(
                    f"{self._layers[number].name} saw {len(delta)} rows for {n} examples, though each example was a "
                    "row of its own when the routes were checked. Leave it out, with layers=."
                )
            if loss_scale != 1:
                delta = delta.to(self.dtype) / loss_scale
            calls = self._calls[number]
            calls[position] = (calls[position][0], delta)
            if all(gradient is not None for _, gradient in calls):
                finish(number)

        def finish(number: int) -> None:
            self.at = f"the gradients of {self._layers[number].name or 'the model'}"
            calls, layer = self._calls.pop(number), self._layers[number]
            if lenient and not by_rows(layer) and any(delta is not None and len(delta) != n for _, delta in calls):
                return  # called on something else than the examples, too; the check moves such a layer
            try:
                parts = [make(delta) for make, delta in calls if delta is not None]
            except Exception:  # a shape that the rule does not know; the check moves such a layer
                if not lenient:
                    raise
            else:
                consume(number, concatenated(parts))

        def backward(losses: Tensor) -> Tensor:
            self._judge(mode.unknown | row_mode.unknown, lenient)
            leaves = list(self._leaves)
            if self._by_rows and leaves and losses.requires_grad:
                self._receive = note
                try:
                    for powers in self._weights.passes():
                        weighted = (losses * powers.to(losses)).sum() * loss_scale
                        torch.autograd.grad(weighted, leaves, allow_unused=True, retain_graph=True)
                except Exception:  # a backward pass that runs but once; the check moves the layers by rows
                    if not lenient:
                        raise
            # What runs again from here on (activation checkpointing) must do as before, and is no other call. The
            # function mode does not meet it: torch takes it off for autograd.grad.
            self._receive = receive
            if leaves and losses.requires_grad:
                torch.autograd.grad(losses.sum() * loss_scale, leaves, allow_unused=True)
            return losses.detach()

        self._running, self._n, self._scales = True, n, scales
        tensors = {number: (layer, state[f"model.{layer.parameters[0]}"]) for number, layer in self._used.items()}
        in_rows = {number: used for number, used in tensors.items() if by_rows(used[0])}
        tensors = {number: used for number, used in tensors.items() if number not in in_rows}
        mode, row_mode = uses.Uses(tensors, n, self._watch_use), RowUses(in_rows, n, self._watch_use_of_rows)
        self._weights = Weights(n, half, next(iter(state.values())).device)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                for met, used in ((mode, tensors), (row_mode, in_rows)):
                    if used:
                        stack.enter_context(met)
                losses = through(backward)
            for number in list(self._calls):
                if any(delta is not None for _, delta in self._calls[number]):
                    finish(number)  # a call whose output the loss does not use sends no gradient
        finally:
            self._running, self._receive = False, None
            self._calls.clear()
            self._by_rows.clear()
            self._leaves.clear()
        return losses

    def _judge(self, unknown: set[tuple[int, str]], lenient: bool) -> None:
        """Uses that were there when the gradients were found right (such as of a shape) do not matter; new ones do."""
        unwatched = {(self._layers[number].name, function) for number, function in unknown}
        if lenient:
            self.harmless |= unwatched
            return
        for name, function in sorted(unwatched - self.harmless):
            raise TaskError(
                f"The model uses {name} in {function}() on this batch, as it did not on the examples that the routes "
                "were checked on, so its gradients would be incomplete. Leave it out, with layers=."
            )

    def _called(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not (self._running and torch.is_grad_enabled()):  # under no_grad no gradient comes back
            return None
        name = "input" if "input" in kwargs else next(iter(kwargs), "")
        inputs, others = (args[0], args[1:]) if args else (kwargs[name], ())
        keywords = kwargs if args else {key: value for key, value in kwargs.items() if key != name}
        layer = self._layers[number]
        rule = RULES[basic_route(layer)]()
        if by_rows(layer):
            saved = rule.saved(module, inputs, *others, **keywords)
            lay = partial(_rows, rule.row_axes(module) or 0)
            return self._watch_rows(number, partial(self._by_rule_and_rows, number, module, saved), output, lay)
        if self.shares and output.shape[:1] == (1,) and self._n > 1:
            output = output.expand(self._n, *output.shape[1:])
            inputs = inputs.expand(self._n, *inputs.shape[1:])
        saved = rule.saved(module, inputs, *others, **keywords)
        return self._watch(number, partial(self._by_rule, number, module, saved), output)

    def _by_rule_and_rows(self, number: int, module: nn.Module, saved: Any, delta: Tensor, rows: Rows) -> Gradients:
        rule = RULES[basic_route(self._layers[number])]()

        def lay(axes: int, tensor: Tensor) -> Tensor:
            return rows.padded(_rows(axes, tensor))

        saved = rule.regrouped(module, saved, lambda tensor, axes: lay(axes, tensor))
        return self._by_rule(number, module, saved, lay(rule.row_axes(module) or 0, delta))

    def _by_rule(self, number: int, module: nn.Module, saved: Any, delta: Tensor) -> Gradients:
        layer = self._layers[number]
        rule = RULES[basic_route(layer)]()
        if not (rule.takes_half and delta.dtype == torch.bfloat16):  # what follows keeps more digits
            saved, delta = map_tensors(saved, self._widen), self._widen(delta)
        own = {name.rpartition(".")[2]: self._scales[name] for name in layer.parameters}
        return rule.gradients(module, saved, delta, own)

    def _watch_use(self, number: int, make: uses.Make, output: Tensor) -> Tensor:
        return self._watch(number, lambda delta: make(self._scaled(number, delta)), output)

    def _watch_use_of_rows(self, number: int, make: MakeOfRows, output: Tensor, lay: Lay) -> Tensor:
        def of_rows(delta: Tensor, rows: Rows) -> Gradients:
            return make(lay(self._scaled(number, delta)), rows)

        return self._watch_rows(number, of_rows, output, lay)

    def _scaled(self, number: int, delta: Tensor) -> Tensor:
        (name,) = self._layers[number].parameters
        return self._widen(delta) * self._scales[name]

    def _watch_rows(self, number: int, make: MakeOfRows, output: Tensor, lay: Lay) -> Tensor:
        """``make`` gets the rows' owners as well, which the backward passes before tell."""
        call = Call(lay)
        if self._receive is None:
            self._by_rows[number, len(self._calls.get(number, []))] = call
        return self._watch(number, lambda delta: make(delta, call.rows(self._weights)), output)

    def _watch(self, number: int, make: uses.Make, output: Tensor) -> Tensor:
        if not output.requires_grad:
            # A first tracked layer: autograd starts here and keeps nothing below. The clone
            # lets an in-place activation follow, which a leaf forbids.
            leaf = output.detach().requires_grad_()
            output = leaf.view_as(leaf) if 0 in leaf.stride() else leaf.clone()
            if self._receive is None:
                self._leaves.append(leaf)
        if self._receive is not None:
            return output
        calls = self._calls.setdefault(number, [])
        receive = partial(self._received, number, len(calls))
        calls.append((make, None))
        output.register_hook(receive)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return output

    def _received(self, number: int, position: int, delta: Tensor) -> None:
        if self._receive is not None:
            self._receive(number, position, delta)

    def _widen(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _rows(axes: int, tensor: Tensor) -> Tensor:
    """All but the last axes as one."""
    return tensor.reshape(-1, *tensor.shape[tensor.ndim - axes :])
