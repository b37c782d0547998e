"""Per-example gradients of the tracked layers at any checkpoint, one batch at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ArgumentError, CheckpointError, LossError, TaskError
from ..factors import Formed, Gradients, Layer, concatenated
from ..task import Task
from ..tree import map_tensors, preserved_random_state
from .functional import LossModule, State, loop_gradients, vmap_gradients
from .layers import general_layer, plan_layers, select_parameters
from .rules import RULES

Precision = Literal["float32", "bfloat16", "float64"]
Consume = Callable[[int, Gradients], None]

_ADAM_EPSILON = 1e-8

# How far a fast route may be from autograd on one example alone, relative to the norms.
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-8}


class Engine:
    """Computes factors of the per-example gradients of a task, each scaled by sqrt(eta).

    Use as a context: hooks and eval mode last until it ends, whatever happens inside. The
    model's own weights are never written: each pass runs with a checkpoint's tensors in
    their place. With a row phi_c(z) = sqrt(eta_c) grad l(w_c, z), <phi_c(z), phi_c(z')>
    is one term of TracInCP (Pruthi et al. 2020, section 3.3).

    Args:
        task: what is differentiated.
        precision: ``"float32"``; ``"bfloat16"``, by autocast, faster where the processor has it;
            or ``"float64"`` for reference runs.
        device: where to compute, by default where the model is; the model itself is not moved.

    Raises:
        TaskError: a layer pattern matches nothing.
        CheckpointError: a checkpoint does not load or has no weight.
    """

    def __init__(self, task: Task, precision: Precision = "float32", device: str | torch.device | None = None) -> None:
        if precision not in get_args(Precision):
            raise ArgumentError(f"precision is {precision!r}, but must be one of: {', '.join(get_args(Precision))}.")
        self.task = task
        self.precision = precision
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.model = task.model
        first = next(self.model.parameters(), None)
        if first is None:
            raise TaskError("The model has no parameters, so there are no gradients to trace.")
        self.device = _usable(first.device if device is None else device)
        self.parameters = select_parameters(self.model, task.layer_patterns)
        self.layers = plan_layers(self.model, self.parameters)
        self.learning_rates = [checkpoint.learning_rates(self.parameters) for checkpoint in task.checkpoints]
        self._scales = [{name: eta**0.5 for name, eta in rates.items()} for rates in self.learning_rates]
        # All checkpoints stay in memory: each example is read once and runs through all of them.
        # A tensor shared under several names is given once, so that all of its uses follow it.
        unique = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
        # Buffers that checkpoints leave out go to the device as well.
        kept = {name: tensor for name, tensor in self.model.named_buffers() if name not in self.model.state_dict()}
        self._states = [
            {
                f"model.{name}": self._cast(t)
                for name, t in (kept | checkpoint.load(self.model)).items()
                if name in unique
            }
            for checkpoint in task.checkpoints
        ]
        self._moments = self._second_moments() if task.preconditioner == "adam" else []
        self._weights: dict[tuple[int, int], Tensor] = {}
        self._training: list[tuple[nn.Module, bool]] = []
        self._stack = contextlib.ExitStack()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._calls: dict[int, list[tuple[Any, Tensor | None]]] = {}
        self._leaves: list[Tensor] = []
        self._on_gradient: Callable[[int, int, Tensor], None] | None = None
        self._checking = False

    def _second_moments(self) -> list[dict[str, Tensor]]:
        found = [checkpoint.second_moments() for checkpoint in self.task.checkpoints]
        for checkpoint, moments in zip(self.task.checkpoints, found, strict=True):
            missing = [name for name in self.parameters if name not in moments]
            if missing:
                raise CheckpointError(
                    f"{checkpoint.path} has no second moments for {missing[0]} ({len(missing)} parameters in all). "
                    "Leave out what was not trained, with layers=."
                )
        return found

    @property
    def n_checkpoints(self) -> int:
        """The number of checkpoints."""
        return len(self._states)

    def __enter__(self) -> Engine:
        self._training = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        if self.device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in self.model.modules()):
            # cuDNN refuses the backward pass of a recurrent layer in eval mode; torch's own kernels do not.
            self._stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._uninstall()
        self._stack.close()
        for module, training in self._training:
            module.training = training

    def _install(self) -> None:
        for number, layer in enumerate(self.layers):
            if layer.hooked:
                hook = self._module_of(layer).register_forward_hook(self._forward_hook(number), with_kwargs=True)
                self._hooks.append(hook)

    def _module_of(self, layer: Layer) -> nn.Module:
        return self.model.get_submodule(layer.parameters[0].rpartition(".")[0])

    def _uninstall(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _forward_hook(self, number: int) -> Callable[..., Tensor | None]:
        rule = RULES[self.layers[number].route]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if self._on_gradient is None:
                return None
            changed = None
            if not output.requires_grad:
                # A first tracked layer: autograd starts here and keeps nothing below. The clone
                # lets an in-place activation follow, which a leaf forbids.
                leaf = output.detach().requires_grad_()
                self._leaves.append(leaf)
                output = changed = leaf.clone()
            calls = self._calls.setdefault(number, [])
            position = len(calls)
            calls.append((rule.saved(module, args[0] if args else next(iter(kwargs.values()))), None))
            receive = functools.partial(self._received, number, position)
            output.register_hook(receive)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return changed

        return hook

    def _received(self, number: int, position: int, delta: Tensor) -> None:
        if self._on_gradient is not None:
            self._on_gradient(number, position, delta)

    def run(self, checkpoint: int, items: list[Any], consume: Consume, role: str = "train") -> Tensor:
        """Run one batch through one checkpoint.

        Args:
            checkpoint: its position.
            items: the examples, uncollated.
            consume: called as ``consume(layer number, factors)``, for a hooked layer while the
                backward pass runs, so that nothing is kept longer than needed. Layers that the
                loss does not depend on have zero gradients and are not reported.
            role: ``"train"`` or ``"query"``, which chooses the loss.

        Returns:
            (batch,) the losses.

        Raises:
            LossError: the loss is not one number per example.
        """
        if self._moments:
            consume = functools.partial(self._precondition, checkpoint, consume)
        wrapper = LossModule(self.model, self.task.loss_for(role), half=self.precision == "bfloat16")
        return self._run(wrapper, self._states[checkpoint], self._scales[checkpoint], items, consume)

    def _precondition(self, checkpoint: int, consume: Consume, number: int, gradients: Gradients) -> None:
        """Hand on D^(1/2) g: every element has a weight of its own, so the gradient must be formed."""
        layer = self.layers[number]
        if (checkpoint, number) not in self._weights:
            roots = [(self._moments[checkpoint][name].sqrt() + _ADAM_EPSILON).rsqrt() for name in layer.parameters]
            pairs = zip(layer.parameters, roots, strict=True)
            matrix = torch.cat([self._as_matrix(layer, name, root[None]) for name, root in pairs], 2)
            self._weights[checkpoint, number] = self._cast(matrix)
        consume(number, Formed(gradients.gradient * self._weights[checkpoint, number]))

    def _run(
        self, wrapper: LossModule, state: State, scales: Mapping[str, float], items: list[Any], consume: Consume
    ) -> Tensor:
        batch = self._cast(self.task.collate(items))
        losses = self._run_hooks(wrapper, state, scales, batch, len(items), consume)
        general = {n: layer for n, layer in enumerate(self.layers) if layer.route in ("vmap", "loop")}
        for route in ("vmap", "loop"):
            chosen = {number: layer for number, layer in general.items() if layer.route == route}
            if chosen:
                names = [layer.parameters[0] for layer in chosen.values()]
                if route == "vmap":
                    gradients = vmap_gradients(wrapper, state, names, batch, len(items))
                else:
                    gradients = loop_gradients(wrapper, state, names, self._singles(items))
                for (number, layer), gradient in zip(chosen.items(), gradients, strict=True):
                    scaled = self._widen(gradient).reshape(len(items), 1, -1) * scales[layer.parameters[0]]
                    consume(number, Formed(scaled))
        return losses

    def losses(self, checkpoint: int, items: list[Any], role: str = "train") -> NDArray[np.float64]:
        """(batch,) the losses of a batch at a checkpoint, by a forward pass alone."""
        wrapper = LossModule(self.model, self.task.loss_for(role))
        with torch.no_grad():
            losses = wrapper.losses(self._states[checkpoint], self._cast(self.task.collate(items)), len(items))
        return losses.double().cpu().numpy()

    def _run_hooks(
        self,
        wrapper: LossModule,
        state: State,
        scales: Mapping[str, float],
        batch: Any,
        n: int,
        consume: Consume,
    ) -> Tensor:
        def on_gradient(number: int, position: int, delta: Tensor) -> None:
            calls = self._calls[number]
            calls[position] = (calls[position][0], delta)
            if all(gradient is not None for _, gradient in calls):
                finish(number)

        def finish(number: int) -> None:
            layer = self.layers[number]
            module, rule = self._module_of(layer), RULES[layer.route]
            own = {name.rpartition(".")[2]: scales[name] for name in layer.parameters}
            calls = self._calls.pop(number)
            try:
                pairs = [(x, d) for x, d in calls if d is not None]
                if not rule.takes_half:  # autocast hands on bfloat16; what follows keeps more digits
                    pairs = [(map_tensors(x, self._widen), self._widen(d)) for x, d in pairs]
                parts = [rule.gradients(module, x, d, own) for x, d in pairs]
            except Exception:  # a shape that the rule does not know; the check moves such a layer
                if not self._checking:
                    raise
            else:
                consume(number, concatenated(parts))

        self._on_gradient = on_gradient
        try:
            with torch.enable_grad():
                losses = wrapper.losses(state, batch, n)
                leaves = list(self._leaves)
                if leaves and losses.requires_grad:
                    torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
            for number in list(self._calls):
                if any(delta is not None for _, delta in self._calls[number]):
                    finish(number)  # a call whose output the loss does not use sends no gradient
        finally:
            self._on_gradient = None
            self._calls.clear()
            self._leaves.clear()
        return losses.detach()

    def check_routes(self) -> None:
        """Compare every route with autograd on two examples, each alone; move layers that disagree.

        Catches layers whose first axis is not the example, weights used outside their module
        and whatever else a hook cannot see; those go to the general routes.

        Raises:
            LossError: the loss is not one number per example, or an example's loss depends on
                the others of its batch.
        """
        task = self.task
        self._check_routes(task.first_and_last(), "train")
        if task.query_loss is not None:
            items = task.first_and_last() if task.query is None else [task.query[0], task.query[task.n_query - 1]]
            self._check_routes(items, "query")

    def _check_routes(self, items: list[Any], role: str) -> None:
        wrapper = LossModule(self.model, self.task.loss_for(role))
        state, tolerance = self._states[-1], _TOLERANCE[self.dtype]
        found: dict[int, Tensor] = {}

        def keep(number: int, gradients: Gradients) -> None:
            found[number] = gradients.gradient.flatten(1)

        with preserved_random_state():
            batch, singles = self._cast(self.task.collate(items)), self._singles(items)
            truth = loop_gradients(wrapper, state, self.parameters, singles)
            with torch.no_grad():
                alone = torch.cat([wrapper.losses(state, single, 1) for single in singles])
                together = wrapper.losses(state, batch, len(items))
            if not torch.allclose(
                alone, together, rtol=tolerance, atol=tolerance * float(alone.abs().max()), equal_nan=True
            ):
                raise LossError(
                    f"The loss of an example depends on the others of its batch ({float(alone[0]):.6g} alone, "
                    f"{float(together[0]):.6g} in a batch of {len(items)}), so it has no gradient of its own. "
                    "Use a per-example loss and normalisation with running statistics."
                )
            self._pick_general_route(wrapper, state, batch, len(items))
            # Unscaled, so that a layer whose eta is 0 at this checkpoint is checked as well.
            unscaled = dict.fromkeys(self.parameters, 1.0)
            self._checking = True
            try:
                self._run(wrapper, state, unscaled, items, keep)
            finally:
                self._checking = False
        by_name = dict(zip(self.parameters, truth, strict=True))
        total = sum(float(gradient.double().square().sum()) for gradient in truth) ** 0.5
        planned: list[Layer] = []
        for number, layer in enumerate(self.layers):
            expected = torch.cat([self._as_matrix(layer, p, by_name[p]) for p in layer.parameters], 2).flatten(1)
            got = found.get(number, torch.zeros_like(expected))
            allowed = tolerance * float(expected.norm()) + 1e-3 * tolerance * total
            agrees = got.shape == expected.shape and float((got - expected).norm()) <= allowed
            if agrees or not bool(expected.isfinite().all()):
                planned.append(layer)
            elif layer.route == "vmap":
                planned.append(replace(layer, route="loop"))
            else:
                planned += [general_layer(self.model, name, "vmap") for name in layer.parameters]
        if planned != self.layers:
            self.layers = planned
            if self._hooks:
                self._uninstall()
                self._install()
            self._check_routes(items, role)

    def _as_matrix(self, layer: Layer, parameter: str, gradient: Tensor) -> Tensor:
        """A parameter's gradient (batch, *its shape) as its columns of the layer's matrix."""
        if layer.hooked:
            return RULES[layer.route].as_matrix(parameter.rpartition(".")[2], gradient)
        return gradient.reshape(len(gradient), 1, -1)

    def _pick_general_route(self, wrapper: LossModule, state: State, batch: Any, n: int) -> None:
        names = [layer.parameters[0] for layer in self.layers if layer.route == "vmap"]
        if not names:
            return
        try:
            vmap_gradients(wrapper, state, names, batch, n)
        except Exception:  # vmap refuses in many types; the loop then raises whatever is really wrong
            self.layers = [replace(layer, route="loop") if layer.route == "vmap" else layer for layer in self.layers]

    def _singles(self, items: list[Any]) -> list[Any]:
        """Each example as a batch of its own."""
        return [self._cast(self.task.collate([item])) for item in items]

    def _widen(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _cast(self, tree: Any) -> Any:
        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

        return map_tensors(tree, cast)


def _usable(device: str | torch.device) -> torch.device:
    """The device, if a tensor can be put there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the second
        reason = str(error).splitlines()[0]
        raise ArgumentError(
            f"device is {str(device)!r}, but it cannot be used here ({reason}). Choose another."
        ) from None
