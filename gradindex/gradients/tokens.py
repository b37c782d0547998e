"""Shares of single tokens in exact products: derivatives of each token's loss along the other side's gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import LossError, TaskError
from ..examples import Examples, Role
from ..factors import Formed, Gradients, Layer
from ..losses import name_of
from .check import TOLERANCE
from .engine import Engine
from .functional import LossModule, State, as_direction, as_real
from .layers import as_matrix
from .losses import non_finite
from .passes import alone_gradients, blamed
from .products import ROUTES

# What the user's code is called when it fails.
TOKENS = "tokens of the loss"

_Map = Callable[[int, Layer, Gradients], Gradients]
_Result = TypeVar("_Result")


class _TokenModule(LossModule):
    """The losses of each token (n, p) as a function of weights, in place of one for each example."""

    def through(self, state: State, batch: Any, n: int, then: Callable[[Tensor], _Result]) -> _Result:
        def checked(losses: Any) -> _Result:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            if not isinstance(losses, Tensor) or losses.ndim != 2 or len(losses) != n:
                raise LossError(f"tokens of the loss gave {shape}, but must give a tensor of shape ({n}, positions).")
            return then(losses)

        return self.within(state, batch, checked)


@dataclass(frozen=True)
class Side:
    """One example at one checkpoint, as one side of a product.

    Args:
        example: the example alone.
        batch: makes it a batch.
        mapped: of each layer, A s g of a training example or B s g of a query (:class:`Geometry`).
        direction: by parameter, what the derivative of the other side's losses goes along.
    """

    example: Examples
    mapped: list[Tensor]
    direction: dict[str, Tensor]


class TokenProducts:
    """Exact products <A s g(z), B s g(q)> at one checkpoint, split by the tokens of either side.

    The gradient of a loss that is a sum over tokens is one too, so its product with a vector v is the sum of the
    derivatives of the tokens' losses along v: all of them come from one pass, by forward mode, by a double backward
    pass where an operation has no forward rule, and else by a backward pass for each token. What comes out must add up
    to the product of the gradients, which are computed by plain autograd; otherwise the next way is taken.

    Args:
        engine: entered, its routes checked.

    Raises:
        TaskError: neither the training loss nor that of queries is a sum over tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ways = [*ROUTES.values(), _token_by_token]
        if not (self.splits("query") or self.splits("train")):
            raise TaskError(
                f"The loss {name_of(engine.task.loss)} does not tell the shares of tokens. Use losses.causal_lm(), "
                "masked_lm() or token_classification(), or give it tokens(model, batch) -> (n, positions), which add "
                "up to the loss, and token_ids(batch)."
            )

    def splits(self, role: Role) -> bool:
        """Whether the loss of a side is a sum over tokens."""
        return all(callable(getattr(self._loss(role), name, None)) for name in ("tokens", "token_ids"))

    def _loss(self, role: Role) -> Any:
        return self._engine.task.loss_for(role)

    def token_names(self, example: Examples) -> tuple[str, ...]:
        """What an example's tokens are called; none where its loss has none."""
        if not self.splits(example.role):
            return ()
        ids = self._loss(example.role).token_ids(self._engine.batch(example))
        return tuple(self._engine.task.token_names(ids[0].tolist()))

    def side(self, checkpoint: int, example: Examples) -> Side:
        """An example as one side.

        Raises:
            NonFiniteGradientError: names it.
        """
        engine, geometry = self._engine, self._engine.geometry
        applied, other = (geometry.train, geometry.query)[:: 1 if example.role == "train" else -1]
        with blamed(engine, example):
            gradients = alone_gradients(engine, example, engine.parameters, checkpoint)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise non_finite(engine, checkpoint, example.names)
        by_name = dict(zip(engine.parameters, gradients, strict=True))
        mapped = [self._mapped(checkpoint, layer, by_name, applied) for layer in engine.layers]
        return Side(example, mapped, self._direction(checkpoint, mapped, other))

    def _mapped(self, checkpoint: int, layer: Layer, gradients: Mapping[str, Tensor], applied: _Map) -> Tensor:
        """(1, d_out, d_in) the map of a layer's scaled gradient."""
        scales = self._engine.scales[checkpoint]
        scaled = {name: gradients[name] * scales[name] for name in layer.parameters}
        return applied(checkpoint, layer, Formed(as_matrix(layer, scaled))).gradient

    def _direction(self, checkpoint: int, mapped: Sequence[Tensor], other: _Map) -> dict[str, Tensor]:
        """By parameter what <mapped, other(s g)> is the product of g with: autograd transposes the linear map."""
        state, found = self._engine.states[checkpoint], {}
        for layer, target in zip(self._engine.layers, mapped, strict=True):
            values = {name: state[f"model.{name}"] for name in layer.parameters}
            with torch.enable_grad():
                zeros = {
                    name: torch.zeros_like(as_real(value))[None].requires_grad_() for name, value in values.items()
                }
                product = (self._mapped(checkpoint, layer, zeros, other) * target).sum()
                leaves = list(zeros.values())
                moved = torch.autograd.grad(product, leaves, materialize_grads=True)
            for (name, value), direction in zip(values.items(), moved, strict=True):
                found[f"model.{name}"] = as_direction(direction[0], value)
        return found

    def split(self, checkpoint: int, side: Side, other: Side) -> Tensor:
        """(p,) float64, the share of each token of ``side`` in its product with ``other``.

        Raises:
            LossError: the tokens' losses do not add up to the loss.
        """
        engine, loss = self._engine, self._loss(side.example.role)
        pairs = [(a.double(), b.double()) for a, b in zip(side.mapped, other.mapped, strict=True)]
        product = torch.stack([(a * b).sum() for a, b in pairs]).sum()
        norms = [torch.stack([part.norm() for part in parts]).norm() for parts in zip(*pairs, strict=True)]
        allowed = TOLERANCE[engine.dtype] * norms[0] * norms[1]
        wrapper = _TokenModule(engine.model, loss.tokens, None, TOKENS)
        for way in list(self._ways):
            last = way is self._ways[-1]
            try:
                batch = engine.batch(side.example)
                with blamed(engine, side.example):
                    found = way(wrapper, engine.states[checkpoint], other.direction, batch, 1)[0].double()
            except Exception:  # an operation without the derivative; torch raises many types
                if last:
                    raise
            else:
                if bool((found.sum() - product).abs() <= allowed):
                    return found
            if not last:
                self._ways.remove(way)
        raise LossError(
            f"The shares of tokens add up to {float(found.sum()):.6g}, but the product of the gradients is "
            f"{float(product):.6g}: tokens(model, batch) of {name_of(loss)} must be (n, positions) numbers whose sums "
            "over positions are the losses."
        )


def _token_by_token(wrapper: LossModule, state: State, directions: Mapping[str, Tensor], batch: Any, n: int) -> Tensor:
    """(1, p) <grad loss_t, v>, by a backward pass for each token."""
    tracked = {name: state[name].detach().requires_grad_() for name in directions}
    leaves, along = list(tracked.values()), list(directions.values())

    def derivatives(losses: Tensor) -> Tensor:
        shares = []
        for loss in losses[0]:
            gradients = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
            shares.append(
                sum((as_real(g) * as_real(v)).sum() for g, v in zip(gradients, along, strict=True)) + loss.new_zeros(())
            )
        return torch.stack(shares)[None]

    with torch.enable_grad():
        return wrapper.through({**state, **tracked}, batch, n, derivatives).detach()
