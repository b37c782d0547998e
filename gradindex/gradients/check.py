"""Routes are checked, not trusted: pairs of examples against autograd on each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ArgumentError, TaskError, UserCodeError, training_names, user_code
from ..factors import Gradients, Layer
from ..memory import in_halves
from ..task import spread
from ..tree import extent, preserved_random_state, shapes
from . import uses
from .engine import Engine
from .examples import answerable, blamed, check_examples, refuse_non_finite
from .functional import BACKWARD, LossModule, loop_gradients, vmap_gradients
from .layers import as_matrix, general_layer
from .reentrant import refuse_reentrant

# How far a fast route may be from autograd on one example alone, relative to the norms.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-8}

# Examples that are looked at for differences in shape and length, and that are compared.
_LOOKED_AT, COMPARED = 64, 8
# Examples that are looked through for gradients of every parameter.
TRIED = 32

Read = Callable[[NDArray[np.int64]], list[Any]]


def check_routes(engine: Engine, ids: NDArray[np.int64] | None = None) -> None:
    """Check that examples have losses of their own, and compare every route with autograd on each alone.

    Catches layers whose first axis is not the example, weights used in ways that no rule knows,
    and whatever else hooks cannot see: such layers move to the next slower route. Runs in full precision,
    whatever the engine's. Takes examples that differ in shape and length: where these give a parameter no gradient (a
    margin that is kept, an expert that is not asked), more of them, up to 32.

    Args:
        engine: entered.
        ids: (m,) the training examples to choose from, by default all that the task does not skip.

    Raises:
        ArgumentError: the model does not run with ``channels_last``.
        LossError: the loss is not one number per example, is random, or an example's loss depends on
            the others of its batch.
        NonFiniteGradientError: an example has a NaN or infinite loss or gradient.
        UserCodeError: the loss or collate failed.
    """
    _settle_layout(engine)
    task = engine.task
    ids = task.train_ids if ids is None else ids
    _check(engine, task.examples, ids, training_names, "train")
    if task.query_loss is not None:
        query = task.query
        if query is None:
            _check(engine, task.examples, ids, training_names, "query")
        else:
            _check(
                engine,
                lambda chosen: [query[int(i)] for i in chosen],
                np.arange(task.n_query),
                lambda chosen: [f"Query {i}" for i in chosen],
                "query",
            )


def check_queries(engine: Engine, items: Sequence[Any], names: Sequence[str], role: str = "query") -> None:
    """Check that queries have losses of their own, where they would go through the model together.

    Args:
        engine: entered.
        items: the queries, of which some are tried.
        names: what to call each, for errors.
        role: ``"query"`` or ``"train"``, which chooses the loss.

    Raises:
        GradIndexError: as for :func:`check_routes`.
    """
    if len(items) < 2 or engine.alone:
        return
    with preserved_random_state():
        places, _ = _chosen(engine, lambda chosen: [items[int(i)] for i in chosen], np.arange(len(items)))
    chosen, names = [items[int(i)] for i in places], [names[int(i)] for i in places]
    with blamed(engine, chosen, names, role):
        check_examples(engine, chosen, names, role)


def _settle_layout(engine: Engine) -> None:
    """Give up channels last, unless asked for, where the model cannot have it: a view that flattens, for one."""
    if not engine.channels_last:
        return
    try:
        _try_layout(engine)
    except RuntimeError as error:
        engine.lay_out(channels_last=False)
        if engine.layout_is_free:
            return
        _try_layout(engine)  # which raises what is wrong, where that is not the layout
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ArgumentError(f"The model does not run with channels_last ({reason}). Leave it out.") from error


def _try_layout(engine: Engine) -> None:
    for item in engine.task.first_and_last():
        engine.losses(-1, [item])


def _check(
    engine: Engine, read: Read, ids: NDArray[np.int64], names_of: Callable[[Sequence[int]], list[str]], role: str
) -> None:
    wrapper = engine.wrapper(role, exact=True)
    unseen = list(engine.parameters)
    with preserved_random_state():
        chosen, alike = _chosen(engine, read, ids)
        items, names = read(chosen), names_of(chosen.tolist())
        if role == "query":
            items, names = answerable(engine, items, names)
        with blamed(engine, items, names, role):
            check_examples(engine, items, names, role)
            refuse_reentrant(wrapper, engine.states[-1], engine.parameters, engine.singles(items[:1])[0])
            _refuse_detached(engine, wrapper, items, role)
            must = 2 if alike else len(items)  # where all are of one shape, one pair tells of all
            for first in range(0, len(items), 2):
                if first >= must and not unseen:
                    return
                pair = slice(first, first + 2)
                unseen = _check_some(engine, wrapper, items[pair], names[pair], unseen, role, first < must)
        others = np.setdiff1d(spread(ids, TRIED), chosen)
        for first in range(0, len(others), 2):
            if not unseen:
                return
            two = others[first : first + 2]
            items, names = read(two), names_of(two.tolist())
            with blamed(engine, items, names, role):
                unseen = _check_some(engine, wrapper, items, names, unseen, role, False)


def _chosen(engine: Engine, read: Read, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], bool]:
    """Up to 8 examples that stand for all, the smallest and the largest first; and whether all are of one shape."""
    looked_at = spread(ids, _LOOKED_AT)
    found = [_shapes(engine, read(looked_at[place : place + 1])[0]) for place in range(len(looked_at))]
    by_size = sorted(range(len(found)), key=lambda place: extent(found[place]))
    firsts = list({shape: place for place, shape in reversed(list(enumerate(found)))}.values())  # one of each shape
    order = [by_size[0], by_size[-1], 0, len(found) - 1] if len(firsts) > 1 else [0, len(found) - 1]
    order += [*firsts[: COMPARED // 2], *spread(np.arange(len(found)), COMPARED).tolist()]
    return looked_at[list(dict.fromkeys(order))[:COMPARED]], len(firsts) == 1


def _shapes(engine: Engine, item: Any) -> tuple[Any, ...]:
    """Of what collate makes of one example, for a position or a text says nothing of its size; else of the example."""
    try:
        return shapes(engine.batch([item]))
    except UserCodeError:  # told later, at which example
        return shapes(item)


def _refuse_detached(engine: Engine, wrapper: LossModule, items: list[Any], role: str) -> None:
    """Refuse a loss that no tracked parameter is connected with: all rows would be zeros."""
    state, names = engine.states[-1], [f"model.{name}" for name in engine.parameters]
    tracked = {name: state[name].detach().requires_grad_() for name in names}

    def connected(losses: Tensor) -> bool:
        if not losses.requires_grad:
            return False
        with user_code(BACKWARD):
            found = torch.autograd.grad(losses.sum(), list(tracked.values()), allow_unused=True)
        return any(gradient is not None for gradient in found)

    with torch.enable_grad():
        for single in engine.singles(items):
            if wrapper.through({**state, **tracked}, single, 1, connected):
                return
    raise TaskError(
        f"The {'query ' * (role == 'query')}loss of {len(items)} examples tried depends on none of the tracked "
        "parameters (is it computed under no_grad, from detached values, or with another model than it is given?), so "
        "there is nothing to trace. Track other layers, with layers=, or let gradients through."
    )


def _check_some(
    engine: Engine, wrapper: LossModule, items: list[Any], names: list[str], unseen: list[str], role: str, must: bool
) -> list[str]:
    """Compare the routes on some examples, if they must be or give gradients to unseen parameters.

    Returns:
        The parameters that are still unseen.
    """

    def check(named: list[tuple[Any, str]]) -> list[str]:
        group, their_names = [item for item, _ in named], [name for _, name in named]
        gradients = loop_gradients(wrapper, engine.states[-1], unseen, engine.singles(group)) if unseen else []
        seen = [name for name, gradient in zip(unseen, gradients, strict=True) if bool(gradient.any())]
        if must or seen:
            _check_group(engine, wrapper, group, their_names, role)
        return seen

    named = list(zip(items, names, strict=True))
    seen = in_halves(check, named, names, lambda: engine.at, engine.alone)
    return [name for name in unseen if name not in seen]


def _check_group(engine: Engine, wrapper: LossModule, items: list[Any], names: list[str], role: str) -> None:
    parameters = engine.parameters
    gradients = loop_gradients(wrapper, engine.states[-1], parameters, engine.singles(items))
    finite = torch.stack([gradient.reshape(len(gradient), -1).isfinite().all(1) for gradient in gradients]).all(0)
    if role == "train":
        refuse_non_finite(engine, finite.tolist(), items, names, role)
    truth = dict(zip(parameters, gradients, strict=True))
    while True:
        planned, shares = _pick_general_route(engine, wrapper, items), engine.hooks.shares
        if planned != engine.layers:
            engine.replan(planned, shares)
        planned, shares = _replanned(engine, wrapper, items, truth)
        if planned == engine.layers and shares == engine.hooks.shares:
            return
        engine.replan(planned, shares)


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
        if engine.hooks.shares or used:
            return [_slower(engine, x)[0] if x.route in uses.ROUTES else x for x in engine.layers], False
        if not any(layer.hooked for layer in engine.layers):
            raise
        # Hooks cannot go through this model at all; the general routes then raise whatever is really wrong.
        return [x for layer in engine.layers for x in (_general(engine, layer) if layer.hooked else [layer])], False
    engine.run_general(-1, items, keep, wrapper, unscaled)
    tolerance = TOLERANCE[engine.dtype]
    total = sum(float(gradient.double().square().sum()) for gradient in truth.values()) ** 0.5
    planned: list[Layer] = []
    for number, layer in enumerate(engine.layers):
        expected = as_matrix(layer, truth).flatten(1)
        got = found.get(number, torch.zeros_like(expected))
        allowed = tolerance * float(expected.norm()) + 1e-3 * tolerance * total
        agrees = got.shape == expected.shape and float((got - expected).norm()) <= allowed
        planned += [layer] if agrees or not bool(expected.isfinite().all()) else _slower(engine, layer)
    return planned, engine.hooks.shares


def _slower(engine: Engine, layer: Layer) -> list[Layer]:
    """What to try next for a layer."""
    if layer.route == "vmap":
        return [replace(layer, route="loop")]
    if layer.route == "loop":
        raise TaskError(
            f"The gradient of {layer.name} is another one when it is computed without those of other parameters (does "
            "a function of the model change what it computes by what requires a gradient?). Leave it out, with layers=."
        )
    if layer.route in uses.ROUTES:
        return _general(engine, layer)
    return [uses.used_layer(engine.model, name) for name in layer.parameters]


def _general(engine: Engine, layer: Layer) -> list[Layer]:
    return [general_layer(engine.model, name, "vmap") for name in layer.parameters]


def _pick_general_route(engine: Engine, wrapper: LossModule, items: list[Any]) -> list[Layer]:
    names = [layer.parameters[0] for layer in engine.layers if layer.route == "vmap"]
    if names:
        batch = engine.sliceable(items)
        try:
            fits = batch is not None and bool(vmap_gradients(wrapper, engine.states[-1], names, batch, len(items)))
        except Exception:  # vmap refuses in many types; the loop then raises whatever is really wrong
            fits = False
        if not fits:
            return [replace(layer, route="loop") if layer.route == "vmap" else layer for layer in engine.layers]
    return engine.layers
