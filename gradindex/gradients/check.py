"""Routes are checked, not trusted: pairs of examples against autograd on each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ArgumentError, TaskError, UserCodeError, user_code
from ..examples import Examples, Role
from ..factors import Gradients, Layer
from ..task import spread
from ..tree import extent, preserved_random_state, shapes
from . import uses
from .engine import Engine
from .functional import BACKWARD, vmap_gradients
from .layers import as_matrix, general_layer
from .losses import answerable, check_examples, refuse_non_finite
from .owners import BY_ROWS, by_rows
from .passes import alone_gradients, blamed
from .reentrant import refuse_reentrant
from .rules import RULES

# How far a fast route may be from autograd on one example alone, relative to the norms.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-8}

# Examples that are looked at for differences in shape and length, and that are compared.
_LOOKED_AT, COMPARED = 64, 8
# Examples that are looked through for gradients of every parameter.
TRIED = 32

Read = Callable[[NDArray[np.int64]], Examples]


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
    _check(engine, task.read, ids)
    if callable(task.query_loss):
        query = task.query
        if query is None:
            _check(engine, lambda chosen: replace(task.read(chosen), role="query"), ids)
        else:
            _check(
                engine,
                lambda chosen: Examples(
                    chosen, [query[int(i)] for i in chosen], [f"Query {i}" for i in chosen], "query"
                ),
                np.arange(task.n_query),
            )


def check_queries(engine: Engine, items: Sequence[Any], names: Sequence[str], role: Role = "query") -> None:
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

    def read(places: NDArray[np.int64]) -> Examples:
        return Examples(places, [items[int(i)] for i in places], [names[int(i)] for i in places], role)

    with preserved_random_state():
        places, _ = _chosen(engine, read, np.arange(len(items)))
    queries = read(places)
    with blamed(engine, queries):
        check_examples(engine, queries)


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
    for example in engine.task.first_and_last():
        engine.losses(-1, example)


def _check(engine: Engine, read: Read, ids: NDArray[np.int64]) -> None:
    unseen = list(engine.parameters)
    with preserved_random_state():
        chosen, alike = _chosen(engine, read, ids)
        examples = read(chosen)
        if examples.role == "query":
            examples = answerable(engine, examples)
        with blamed(engine, examples):
            check_examples(engine, examples)
            wrapper = engine.wrapper(examples.role, exact=True)
            refuse_reentrant(wrapper, engine.states[-1], engine.parameters, engine.batch(examples[:1]))
            _refuse_detached(engine, examples)
            must = 2 if alike else len(examples)  # where all are of one shape, one pair tells of all
            for first in range(0, len(examples), 2):
                if first >= must and not unseen:
                    return
                unseen = _check_pair(engine, examples[first : first + 2], unseen, first < must)
        others = np.setdiff1d(spread(ids, TRIED), chosen)
        for first in range(0, len(others), 2):
            if not unseen:
                return
            pair = read(others[first : first + 2])
            with blamed(engine, pair):
                unseen = _check_pair(engine, pair, unseen, must=False)


def _chosen(engine: Engine, read: Read, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], bool]:
    """Up to 8 examples that stand for all, the smallest and the largest first; and whether all are of one shape."""
    looked_at = spread(ids, _LOOKED_AT)
    shapes_seen = [_shapes(engine, read(looked_at[place : place + 1])) for place in range(len(looked_at))]
    last = len(shapes_seen) - 1
    by_size = sorted(range(last + 1), key=lambda place: extent(shapes_seen[place]))
    firsts = list({shape: place for place, shape in reversed(list(enumerate(shapes_seen)))}.values())  # of each shape
    order = [by_size[0], by_size[-1], 0, last] if len(firsts) > 1 else [0, last]
    order += [*firsts[: COMPARED // 2], *spread(np.arange(last + 1), COMPARED).tolist()]
    return looked_at[list(dict.fromkeys(order))[:COMPARED]], len(firsts) == 1


def _shapes(engine: Engine, example: Examples) -> tuple[Any, ...]:
    """Of what collate makes of one example, for a position or a text says nothing of its size; else of the example."""
    try:
        return shapes(engine.batch(example))
    except UserCodeError:  # told later, at which example
        return shapes(example.items[0])


def _refuse_detached(engine: Engine, examples: Examples) -> None:
    """Refuse a loss that no tracked parameter is connected with: all rows would be zeros."""
    wrapper = engine.wrapper(examples.role, exact=True)
    state, names = engine.states[-1], [f"model.{name}" for name in engine.parameters]
    tracked = {name: state[name].detach().requires_grad_() for name in names}

    def connected(losses: Tensor) -> bool:
        if not losses.requires_grad:
            return False
        with user_code(BACKWARD):
            gradients = torch.autograd.grad(losses.sum(), list(tracked.values()), allow_unused=True)
        return any(gradient is not None for gradient in gradients)

    with torch.enable_grad():
        for single in engine.singles(examples):
            if wrapper.through({**state, **tracked}, single, 1, connected):
                return
    raise TaskError(
        f"The {'query ' * (examples.role == 'query')}loss of {len(examples)} examples tried depends on none of the "
        "tracked parameters (is it computed under no_grad, from detached values, or with another model than it is "
        "given?), so there is nothing to trace. Track other layers, with layers=, or let gradients through."
    )


def _check_pair(engine: Engine, pair: Examples, unseen: list[str], must: bool) -> list[str]:
    """Compare the routes on two examples, if they must be or give gradients to unseen parameters.

    Returns:
        The parameters that are still unseen.
    """

    def check(examples: Examples) -> list[str]:
        gradients = alone_gradients(engine, examples, unseen) if unseen else []
        seen = [name for name, gradient in zip(unseen, gradients, strict=True) if bool(gradient.any())]
        if must or seen:
            _compare(engine, examples)
        return seen

    seen = engine.in_halves(check, pair)
    return [name for name in unseen if name not in seen]


def _compare(engine: Engine, examples: Examples) -> None:
    """Give the engine routes that agree with autograd on each example alone."""
    gradients = alone_gradients(engine, examples, engine.parameters)
    finite = torch.stack([gradient.reshape(len(gradient), -1).isfinite().all(1) for gradient in gradients]).all(0)
    if examples.role == "train":
        refuse_non_finite(engine, examples, finite.tolist())
    truth = dict(zip(engine.parameters, gradients, strict=True))
    while True:
        planned, shares = _pick_general_route(engine, examples), engine.hooks.shares
        if planned != engine.layers:
            engine.replan(planned, shares)
        planned, shares = _replanned(engine, examples, truth)
        if planned == engine.layers and shares == engine.hooks.shares:
            return
        engine.replan(planned, shares)


def _replanned(engine: Engine, examples: Examples, truth: dict[str, Tensor]) -> tuple[list[Layer], bool]:
    """The layers as they should go on, and whether outputs that all examples share may still be expanded."""
    # Unscaled, so that a layer whose eta is 0 at this checkpoint is checked as well.
    unscaled, by_route = dict.fromkeys(engine.parameters, 1.0), dict[int, Tensor]()
    wrapper = engine.wrapper(examples.role, exact=True)

    def keep(number: int, gradients: Gradients) -> None:
        by_route[number] = gradients.gradient.flatten(1)

    try:
        engine.run_hooked(-1, examples, keep, wrapper, unscaled, lenient=True)
    except Exception:  # an expanded output or a watched use that the model cannot go on with
        if engine.hooks.shares:
            return engine.layers, False
        if any(uses.is_used(layer) for layer in engine.layers):
            return [_slower(engine, x)[0] if uses.is_used(x) else x for x in engine.layers], False
        if not any(layer.hooked for layer in engine.layers):
            raise
        # Hooks cannot go through this model at all; the general routes then raise whatever is really wrong.
        return [x for layer in engine.layers for x in (_general(engine, layer) if layer.hooked else [layer])], False
    engine.run_general(-1, examples, keep, wrapper, unscaled)
    tolerance = TOLERANCE[engine.dtype]
    total = sum(float(gradient.double().square().sum()) for gradient in truth.values()) ** 0.5
    planned: list[Layer] = []
    for number, layer in enumerate(engine.layers):
        expected = as_matrix(layer, truth).flatten(1)
        got = by_route.get(number, torch.zeros_like(expected))
        allowed = tolerance * float(expected.norm()) + 1e-3 * tolerance * total
        agrees = got.shape == expected.shape and float((got - expected).norm()) <= allowed
        planned += [layer] if agrees or not bool(expected.isfinite().all()) else _slower(engine, layer)
    return _alike(engine, planned), engine.hooks.shares


def _alike(engine: Engine, planned: list[Layer]) -> list[Layer]:
    """The same, with layers that differ from one by rows in their places in lists of modules alone by rows as well.

    Of many experts, one may have had a row of each example in the check, or none, and another number later.
    """
    moved = {_kind(engine, layer.name) for layer in planned if by_rows(layer)}
    alike = []
    for layer in planned:
        moves = moved and layer in engine.layers and layer.hooked and not by_rows(layer)
        alike += _slower(engine, layer) if moves and _kind(engine, layer.name) in moved else [layer]
    return alike


def _kind(engine: Engine, name: str) -> str:
    """A layer's name without its places in lists."""
    parts = name.split(".")
    for place in range(len(parts)):
        parent = engine.model.get_submodule(".".join(name.split(".")[:place]))
        if isinstance(parent, (nn.ModuleList, nn.ModuleDict, nn.ParameterList)):
            parts[place] = "*"
    return ".".join(parts)


def _slower(engine: Engine, layer: Layer) -> list[Layer]:
    """What to try next for a layer."""
    if layer.route == "vmap":
        return [replace(layer, route="loop")]
    if layer.route == "loop":
        raise TaskError(
            f"The gradient of {layer.name} is another one when it is computed without those of other parameters (does "
            "a function of the model change what it computes by what requires a gradient?). Leave it out, with layers=."
        )
    if uses.is_used(layer):
        if by_rows(layer):
            return _general(engine, layer)
        return [uses.used_layer(engine.model, name, rows=True) for name in layer.parameters]
    if not by_rows(layer) and _knows_rows(engine, layer):
        return [replace(layer, route=layer.route + BY_ROWS)]
    return [uses.used_layer(engine.model, name) for name in layer.parameters]


def _knows_rows(engine: Engine, layer: Layer) -> bool:
    module = engine.model.get_submodule(layer.parameters[0].rpartition(".")[0])
    return RULES[layer.route]().row_axes(module) is not None


def _general(engine: Engine, layer: Layer) -> list[Layer]:
    return [general_layer(engine.model, name, "vmap") for name in layer.parameters]


def _pick_general_route(engine: Engine, examples: Examples) -> list[Layer]:
    names = [layer.parameters[0] for layer in engine.layers if layer.route == "vmap"]
    if names:
        wrapper, batch = engine.wrapper(examples.role, exact=True), engine.sliceable(examples)
        try:
            fits = batch is not None and bool(vmap_gradients(wrapper, engine.states[-1], names, batch, len(examples)))
        except Exception:  # vmap refuses in many types; the loop then raises whatever is really wrong
            fits = False
        if not fits:
            return [replace(layer, route="loop") if layer.route == "vmap" else layer for layer in engine.layers]
    return engine.layers
