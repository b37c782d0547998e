"""Exact inner products of the gradients of many examples with those of a few, which alone are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..factors import Factors, Formed, Gradients
from ..memory import LARGEST_TRIED, available_bytes, batch_size_for, in_halves
from ..tree import preserved_random_state
from .check import TOLERANCE
from .engine import Engine
from .functional import LossModule, State, loop_gradients

# With more queries than this, the per-example gradients of the layers on general routes cost less than
# a pass for each query; a loop over examples is dearer.
_FEW = {"vmap": 3, "loop": 16}

# Queries that go through the model together.
_AT_ONCE = 64

Along = Callable[[LossModule, State, Mapping[str, Tensor], Any, int], Tensor]


class Products:
    """<phi(z), phi(z')> of training examples z with queries z', over all tracked parameters and checkpoints.

    Hooked layers compare factors. For the others, the derivative of the losses along a query's
    gradient is its inner product with each example's gradient: by forward mode, by a double
    backward pass where an operation has no forward rule, and from per-example gradients as the
    last resort or where there are many queries.

    Args:
        engine: entered, its routes checked.
        items: the queries, uncollated; their gradients stay in memory at all checkpoints.
        role: ``"train"`` or ``"query"``, which chooses their loss.

    Attributes:
        route: how layers on general routes are compared: ``"forward mode"``,
            ``"double backward"`` or ``"gradients"``; the first two in full precision, whatever
            the engine's.

    Raises:
        OutOfMemoryError: one query alone does not fit.
    """

    def __init__(self, engine: Engine, items: list[Any], role: str) -> None:
        self._engine, self._count = engine, len(items)
        names = [f"Query {i} of {len(items)}" for i in range(len(items))]
        # Parts of the queries: which ones, and by checkpoint and layer their gradients.
        self._parts: list[tuple[slice, list[dict[int, Gradients]]]] = []
        for start in range(0, len(items), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            action = partial(self._gradients_of, role)
            for count, found in in_halves(action, items[some], names[some], lambda: engine.at):
                self._parts.append((slice(start, start + count), found))
                start += count
        general = [layer.route for layer in engine.layers if not layer.hooked]
        few = general and len(items) <= max(_FEW[route] for route in general)
        self.route = self._pick_route() if few else "gradients"

    def _gradients_of(self, role: str, items: list[Any]) -> list[tuple[int, list[dict[int, Gradients]]]]:
        checkpoints = []
        for checkpoint in range(self._engine.n_checkpoints):
            for loss_scale in self._engine.loss_scales:
                found: dict[int, Gradients] = {}
                self._engine.run(checkpoint, items, partial(_keep, found), role, loss_scale=loss_scale)
                if loss_scale == 1 or all(bool(g.squared_norms().isfinite().all()) for g in found.values()):
                    break
            # The preconditioner goes to this side again, so that the other side needs no forming.
            checkpoints.append({n: self._weighted(checkpoint, n, gradients) for n, gradients in found.items()})
        return [(len(items), checkpoints)]

    def _weighted(self, checkpoint: int, number: int, gradients: Gradients) -> Gradients:
        if self._engine.task.preconditioner is None:
            return gradients
        return Formed(gradients.gradient * self._engine.root_weights(checkpoint, number))

    def of(self, items: list[Any]) -> list[Tensor]:
        """[(n_query, len(items))] for training examples: a list, to be joined with others along the last axis."""
        scores = torch.zeros(self._count, len(items), dtype=self._engine.dtype, device=self._engine.device)
        for checkpoint in range(self._engine.n_checkpoints):
            for loss_scale in self._engine.loss_scales:
                found = self._at_checkpoint(checkpoint, items, loss_scale)
                if bool(found.isfinite().all()):
                    break
            scores += found
            if self.route != "gradients":
                for number, row in enumerate(self._along(checkpoint, items)):
                    scores[number] += row
        return [scores]

    def pick_batch_size(self, n: int) -> int:
        """How many of ``n`` training examples :meth:`of` can take at once in the memory that may be used unasked."""
        engine = self._engine
        if n <= LARGEST_TRIED:  # as many as would be measured
            return max(1, n)
        items = engine.task.examples(engine.task.train_ids[:LARGEST_TRIED])
        names = [f"Training example {i}" for i in range(len(items))]

        def action(some: list[Any]) -> None:
            in_halves(self.of, some, names, lambda: engine.at)

        return batch_size_for(action, items, available_bytes(engine.device), engine.device)

    def _at_checkpoint(self, checkpoint: int, items: list[Any], loss_scale: float) -> Tensor:
        """The share of the layers whose gradients are compared: (n_query, len(items))."""
        scores = torch.zeros(self._count, len(items), dtype=self._engine.dtype, device=self._engine.device)

        def consume(number: int, gradients: Gradients) -> None:
            for part, some in gradients.parts():
                for rows, queries in self._parts:
                    if number in queries[checkpoint]:
                        scores[rows, part] += some.products(queries[checkpoint][number]).T

        general = self.route == "gradients"
        self._engine.run(checkpoint, items, consume, general=general, weighted=False, loss_scale=loss_scale)
        return scores

    def _along(self, checkpoint: int, items: list[Any]) -> Iterator[Tensor]:
        """The general layers' share, query by query."""
        engine, state = self._engine, self._engine.states[checkpoint]
        batch, wrapper = (
            engine.cast(engine.task.collate(items)),
            LossModule(engine.model, engine.task.loss_for("train")),
        )
        general = {number: layer.parameters[0] for number, layer in enumerate(engine.layers) if not layer.hooked}
        engine.hooks.at = f"the {self.route} of {', '.join(general.values())}"
        for rows, queries in self._parts:
            for query in range(rows.stop - rows.start):
                directions = {}
                for number, name in general.items():
                    value, gradients = state[f"model.{name}"], queries[checkpoint][number]
                    directions[f"model.{name}"] = gradients.gradient[query].reshape(value.shape) * engine.scale(
                        checkpoint, name
                    )
                yield _ROUTES[self.route](wrapper, state, directions, batch, len(items)).to(engine.dtype)

    def _pick_route(self) -> str:
        """The first that agrees with autograd on two examples, along the gradient of the first."""
        engine, items = self._engine, self._engine.task.first_and_last()
        wrapper, state = LossModule(engine.model, engine.task.loss_for("train")), engine.states[-1]
        names = [layer.parameters[0] for layer in engine.layers if not layer.hooked]
        with preserved_random_state():
            truth = loop_gradients(wrapper, state, names, engine.singles(items))
            directions = {f"model.{name}": gradient[0] for name, gradient in zip(names, truth, strict=True)}
            rows = torch.cat([gradient.flatten(1) for gradient in truth], 1).double()
            expected, norms = rows @ rows[0], rows.square().sum(1)
            allowed = TOLERANCE[engine.dtype] * (norms * norms[0]).sqrt()
            batch = engine.cast(engine.task.collate(items))
            for route, along in _ROUTES.items():
                try:
                    found = along(wrapper, state, directions, batch, len(items))
                except Exception:  # an operation without the derivative; torch raises many types
                    continue
                if bool(((found - expected).abs() <= allowed).all()):
                    return route
        return "gradients"


def _forward_mode(wrapper: LossModule, state: State, directions: Mapping[str, Tensor], batch: Any, n: int) -> Tensor:
    """(n,) <grad l_z, v>: the derivative of each loss along v, without any gradient."""
    with _plain_kernels(), torch.no_grad(), forward_ad.dual_level():
        moved = {name: _dual(state[name], v) for name, v in directions.items()}
        losses = wrapper.losses({**state, **moved}, batch, n)
        tangent: Tensor | None = forward_ad.unpack_dual(losses).tangent  # type: ignore[no-untyped-call]  # as below
        return torch.zeros_like(losses) if tangent is None else tangent.clone()


def _dual(value: Tensor, direction: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(value, direction.to(value))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return dual


def _double_backward(wrapper: LossModule, state: State, directions: Mapping[str, Tensor], batch: Any, n: int) -> Tensor:
    """The same as d/du <grad of sum_z u_z l_z, v>."""
    with _plain_kernels(), torch.enable_grad():
        tracked = {name: state[name].detach().requires_grad_() for name in directions}
        losses = wrapper.losses({**state, **tracked}, batch, n)
        u = torch.ones_like(losses, requires_grad=True)
        gradients = torch.autograd.grad((u * losses).sum(), list(tracked.values()), create_graph=True)
        products = [(g * v).sum() for g, v in zip(gradients, directions.values(), strict=True)]
        return torch.autograd.grad(torch.stack(products).sum(), u)[0]


# In the order in which they are tried.
_ROUTES: Mapping[str, Along] = {"forward mode": _forward_mode, "double backward": _double_backward}


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Without the fused attention kernels, which have neither of the two derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _keep(found: dict[int, Gradients], number: int, gradients: Gradients) -> None:
    """Keep a query's gradients in the smaller of the two forms."""
    if isinstance(gradients, Factors) and not gradients.rank_one:
        positions, columns = gradients.activations.shape[1:]
        rows = gradients.output_gradients.shape[2]
        if positions * (rows + columns) > rows * columns:
            gradients = Formed(torch.cat([some.gradient for _, some in gradients.parts()]))
    found[number] = gradients
