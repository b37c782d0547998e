"""Routes are checked, not trusted: pairs of examples against autograd on each alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import LossError
from ..factors import Gradients, Layer
from ..tree import preserved_random_state
from . import uses
from .functional import LossModule, State, loop_gradients, vmap_gradients
from .layers import general_layer

if TYPE_CHECKING:
    from .engine import Engine

# How far a fast route may be from autograd on one example alone, relative to the norms.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-8}

# Examples that are looked through for gradients of every parameter.
_TRIED = 32


def check_routes(engine: Engine) -> None:
    """Compare every route with autograd; move layers that disagree to the next slower one.

    Catches layers whose first axis is not the example, weights used in ways that no rule knows,
    and whatever else hooks cannot see. Runs in full precision, whatever the engine's. Takes the
    first and the last example; where these give a parameter no gradient (a margin that is kept, an
    expert that is not asked), more of them, up to 32.

    Args:
        engine: entered.

    Raises:
        LossError: the loss is not one number per example, or an example's loss depends on
            the others of its batch.
    """
    task = engine.task
    _check(engine, task.examples, task.train_ids, "train")
    if task.query_loss is not None:
        query = task.query
        if query is None:
            _check(engine, task.examples, task.train_ids, "query")
        else:
            _check(engine, lambda chosen: [query[int(i)] for i in chosen], np.arange(task.n_query), "query")


def _check(engine: Engine, read: Callable[[NDArray[np.int64]], list[Any]], ids: NDArray[np.int64], role: str) -> None:
    wrapper, state = LossModule(engine.model, engine.task.loss_for(role)), engine.states[-1]
    unseen = list(engine.parameters)
    with preserved_random_state():
        for pair in _pairs(len(ids)):
            items = read(ids[list(pair)])
            singles = engine.singles(items)
            gradients = loop_gradients(wrapper, state, unseen, singles)
            seen = {x for x, g in zip(unseen, gradients, strict=True) if bool(g.isfinite().all()) and bool(g.any())}
            if seen or pair[0] == 0:
                _check_pair(engine, wrapper, items, singles)
            unseen = [name for name in unseen if name not in seen]
            if not unseen:
                break


def _pairs(n: int) -> list[tuple[int, int]]:
    """The first and the last position, then evenly spaced ones."""
    others = np.unique(np.linspace(0, n - 1, min(_TRIED, n)).astype(np.int64))[1:-1].tolist()
    return [(0, n - 1), *zip(others[::2], [*others[1::2], n - 1], strict=False)]


def _check_pair(engine: Engine, wrapper: LossModule, items: list[Any], singles: list[Any]) -> None:
    state, batch = engine.states[-1], engine.cast(engine.task.collate(items))
    truth = dict(zip(engine.parameters, loop_gradients(wrapper, state, engine.parameters, singles), strict=True))
    _check_that_examples_do_not_mix(wrapper, state, batch, singles, TOLERANCE[engine.dtype])
    while True:
        planned, shares = _pick_general_route(engine, wrapper, state, batch, len(items)), engine.hooks.shares
        if planned != engine.layers:
            engine.replan(planned, shares)
        planned, shares = _replanned(engine, wrapper, items, truth)
        if planned == engine.layers and shares == engine.hooks.shares:
            return
        engine.replan(planned, shares)


def _check_that_examples_do_not_mix(
    wrapper: LossModule, state: State, batch: Any, singles: list[Any], tolerance: float
) -> None:
    with torch.no_grad():
        alone = torch.cat([wrapper.losses(state, single, 1) for single in singles])
        together = wrapper.losses(state, batch, len(singles))
    if not torch.allclose(alone, together, rtol=tolerance, atol=tolerance * float(alone.abs().max()), equal_nan=True):
        raise LossError(
            f"The loss of an example depends on the others of its batch ({float(alone[0]):.6g} alone, "
            f"{float(together[0]):.6g} in a batch of {len(singles)}), so it has no gradient of its own. "
            "Use a per-example loss, normalisation with running statistics, and a mask where padding is seen."
        )


def _replanned(
    engine: Engine, wrapper: LossModule, items: list[Any], truth: dict[str, Tensor]
) -> tuple[list[Layer], bool]:
    """The layers as they should go on, and whether outputs that all examples share may still be expanded."""
    # Unscaled, so that a layer whose eta is 0 at this checkpoint is checked as well.
    unscaled, found = dict.fromkeys(engine.parameters, 1.0), dict[int, Tensor]()

    def keep(number: int, gradients: Gradients) -> None:
        found[number] = gradients.gradient.flatten(1)

    try:
        engine.run_hooked(-1, items, keep, wrapper, unscaled, lenient=True)
    except Exception:  # an expanded output or a watched use that the model cannot go on with
        used = any(layer.route in uses.ROUTES for layer in engine.layers)
        if not engine.hooks.shares and not used:
            raise
        return [_slower(engine, x)[0] if x.route in uses.ROUTES else x for x in engine.layers], False
    engine.run_general(-1, items, keep, wrapper, unscaled)
    tolerance = TOLERANCE[engine.dtype]
    total = sum(float(gradient.double().square().sum()) for gradient in truth.values()) ** 0.5
    planned: list[Layer] = []
    for number, layer in enumerate(engine.layers):
        expected = engine.as_matrix(layer, truth).flatten(1)
        got = found.get(number, torch.zeros_like(expected))
        allowed = tolerance * float(expected.norm()) + 1e-3 * tolerance * total
        agrees = got.shape == expected.shape and float((got - expected).norm()) <= allowed
        planned += [layer] if agrees or not bool(expected.isfinite().all()) else _slower(engine, layer)
    return planned, engine.hooks.shares


def _slower(engine: Engine, layer: Layer) -> list[Layer]:
    """What to try next for a layer."""
    if layer.route == "vmap":
        return [replace(layer, route="loop")]
    if layer.route in uses.ROUTES:
        return [general_layer(engine.model, layer.parameters[0], "vmap")]
    return [uses.used_layer(engine.model, name) for name in layer.parameters]


def _pick_general_route(engine: Engine, wrapper: LossModule, state: State, batch: Any, n: int) -> list[Layer]:
    names = [layer.parameters[0] for layer in engine.layers if layer.route == "vmap"]
    if names:
        try:
            vmap_gradients(wrapper, state, names, batch, n)
        except Exception:  # vmap refuses in many types; the loop then raises whatever is really wrong
            return [replace(layer, route="loop") if layer.route == "vmap" else layer for layer in engine.layers]
    return engine.layers
