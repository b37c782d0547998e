"""Exact inner products of the gradients of many examples with those of a few, which alone are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import GradIndexError
from ..examples import Examples, Role
from ..factors import Factors, Formed, Gradients
from ..memory import LARGEST_TRIED, available_bytes, batch_size_for
from ..stacks import Stacks
from ..task import spread
from ..tree import preserved_random_state
from .check import COMPARED, TOLERANCE, TRIED
from .engine import Engine
from .functional import LossModule, State, as_direction, as_real
from .passes import alone_gradients, in_batches

# With more queries than this, the per-example gradients of the layers on general routes cost less than
# a pass for each query; a loop over examples is dearer.
_FEW = {"vmap": 3, "loop": 16}

# Queries that go through the model together.
_AT_ONCE = 64

Along = Callable[[LossModule, State, Mapping[str, Tensor], Any, int], Tensor]


class Products:
    """Exact inner products of training examples with queries, over all tracked parameters and checkpoints.

    Training gradients stay as they are; queries' are mapped as the engine's geometry says, see there.

    Hooked layers compare factors. For the others, the derivative of the losses along a query's
    gradient is its inner product with each example's gradient: by forward mode, by a double
    backward pass where an operation has no forward rule, and from per-example gradients as the
    last resort or where there are many queries.

    Args:
        engine: entered, its routes checked.
        items: the queries, uncollated; their gradients stay in memory at all checkpoints.
        role: ``"train"`` or ``"query"``, which chooses their loss.
        weights: (len(items),) of queries that are one question: their weighted sum, whose gradient
            alone stays in memory. By default each query is one of its own.

    Attributes:
        route: how layers on general routes are compared: ``"forward mode"``,
            ``"double backward"`` or ``"gradients"``; the first two in full precision, whatever
            the engine's.

    Raises:
        OutOfMemoryError: one query alone does not fit.
    """

    def __init__(
        self, engine: Engine, items: Sequence[Any], role: Role, weights: NDArray[np.float64] | None = None
    ) -> None:
        self._engine, self._count = engine, len(items) if weights is None else 1
        # Parts of the queries: which ones, and by checkpoint and layer their gradients.
        self._parts: list[tuple[slice, list[dict[int, Gradients]]]] = []
        total: list[dict[int, Gradients]] = [{} for _ in range(engine.n_checkpoints)]
        action = self._gradients_of if weights is None else partial(self._sum_of, weights)
        for start in range(0, len(items), _AT_ONCE):
            numbers = np.arange(start, min(start + _AT_ONCE, len(items)))
            names = [f"Query {i} of {len(items)}" for i in numbers]
            queries = Examples(numbers, [items[int(i)] for i in numbers], names, role)
            for count, gradients in in_batches(engine, action, queries):
                if weights is None:
                    self._parts.append((slice(start, start + count), gradients))
                else:
                    _add_up(total, gradients)
                start += count
        if weights is not None:
            self._parts.append((slice(0, 1), total))
        general = [layer.route for layer in engine.layers if not layer.hooked]
        few = general and self._count <= max(_FEW[route] for route in general)
        self.route = self._pick_route() if few else "gradients"

    def _gradients_of(self, queries: Examples) -> list[tuple[int, list[dict[int, Gradients]]]]:
        """Each query's gradients."""
        return [(len(queries), self._run(queries, _smaller))]

    def _sum_of(self, weights: NDArray[np.float64], queries: Examples) -> list[tuple[int, list[dict[int, Gradients]]]]:
        """The weighted sum of the queries' gradients, as that of one query."""
        engine = self._engine
        own = torch.from_numpy(weights[queries.ids]).to(engine.device, engine.dtype)

        def summed(gradients: Gradients) -> Gradients:
            shares = [piece.total(own[part]) for part, piece in gradients.parts()]
            return Formed(torch.stack(shares).sum(0, keepdim=True))

        return [(len(queries), self._run(queries, summed))]

    def _run(self, queries: Examples, kept_as: Callable[[Gradients], Gradients]) -> list[dict[int, Gradients]]:
        """The queries' gradients, by checkpoint and layer, in the form in which they stay in memory."""
        engine, geometry, checkpoints = self._engine, self._engine.geometry, []
        for checkpoint in range(engine.n_checkpoints):
            for loss_scale in engine.loss_scales:
                by_layer: dict[int, Gradients] = {}

                def keep(
                    number: int,
                    gradients: Gradients,
                    checkpoint: int = checkpoint,
                    by_layer: dict[int, Gradients] = by_layer,
                ) -> None:
                    by_layer[number] = kept_as(geometry.query(checkpoint, engine.layers[number], gradients))

                engine.run(checkpoint, queries, keep, loss_scale=loss_scale)
                if loss_scale == 1 or all(bool(g.squared_norms().isfinite().all()) for g in by_layer.values()):
                    break
            checkpoints.append({
                number: geometry.exact(checkpoint, engine.layers[number], gradients)
                for number, gradients in by_layer.items()
            })  # fmt: skip
        return checkpoints

    def of(self, examples: Examples) -> Tensor:
        """(n_query, n) of n training examples, which go through the engine as :func:`in_batches` says."""
        return torch.cat(in_batches(self._engine, self._of, examples), 1)

    def _of(self, examples: Examples) -> list[Tensor]:
        return [torch.stack([shares.sum(0) for shares in self._by_checkpoint(examples, split=False)]).sum(0)]

    def at(self, checkpoint: int, examples: Examples) -> Tensor:
        """The share of one checkpoint in :meth:`of`."""
        return torch.cat(in_batches(self._engine, partial(self._at, checkpoint), examples), 1)

    def _at(self, checkpoint: int, examples: Examples) -> list[Tensor]:
        return [self._shares(checkpoint, examples, split=False).sum(0)]

    def split(self, examples: Examples) -> Tensor:
        """The same by checkpoint and layer: (n, n_query, C, L) float64.

        The sum over both is what :meth:`of` gives, up to rounding. Layers that are compared by directions take a
        pass for each query and layer, with the directions of all other layers zero.
        """
        return torch.cat(in_batches(self._engine, self._split, examples))

    def _split(self, examples: Examples) -> list[Tensor]:
        shares = torch.stack([share.double() for share in self._by_checkpoint(examples, split=True)])
        return [shares.permute(3, 2, 0, 1)]

    def _by_checkpoint(self, examples: Examples, split: bool) -> Iterator[Tensor]:
        """For each checkpoint (L, n_query, n), or (1, n_query, n) of all layers together."""
        return (self._shares(checkpoint, examples, split) for checkpoint in range(self._engine.n_checkpoints))

    def _shares(self, checkpoint: int, examples: Examples, split: bool) -> Tensor:
        for loss_scale in self._engine.loss_scales:
            shares = self._at_checkpoint(checkpoint, examples, loss_scale, split)
            if bool(shares.isfinite().all()):
                break
        if self.route != "gradients":
            general = [number for number, layer in enumerate(self._engine.layers) if not layer.hooked]
            for together in [[number] for number in general] if split else [general]:
                for query, row in enumerate(self._along(checkpoint, examples, together)):
                    shares[together[0] if split else 0, query] += row
        return shares

    def finite(self, query: int) -> bool:
        """Whether the gradient of a query is, and not a training example's is to blame for a score that is not."""
        for rows, checkpoints in self._parts:
            if rows.start <= query < rows.stop:
                squares = [g.squared_norms()[query - rows.start] for layers in checkpoints for g in layers.values()]
                return all(bool(square.isfinite()) for square in squares)
        return True

    def pick_batch_size(self, n: int) -> int:
        """How many of ``n`` training examples :meth:`of` can take at once in the memory that may be used unasked."""
        engine = self._engine
        if n <= LARGEST_TRIED:  # as many as would be measured
            return max(1, n)
        examples = engine.task.read(engine.task.train_ids[:LARGEST_TRIED])
        action = partial(in_batches, engine, self._of)
        return batch_size_for(action, examples, available_bytes(engine.device), engine.device)

    def _at_checkpoint(self, checkpoint: int, examples: Examples, loss_scale: float, split: bool) -> Tensor:
        """The shares of the layers whose gradients are compared: as :meth:`_by_checkpoint`."""
        engine = self._engine
        shape = (len(engine.layers) if split else 1, self._count, len(examples))
        scores = torch.zeros(shape, dtype=engine.dtype, device=engine.device)

        def consume(number: int, gradients: Gradients) -> None:
            for part, piece in gradients.parts():
                for rows, queries in self._parts:
                    if number in queries[checkpoint]:
                        products = piece.products(queries[checkpoint][number]).T
                        scores[number if split else 0, rows, part] += products

        general = self.route == "gradients"
        engine.run(checkpoint, examples, consume, general=general, loss_scale=loss_scale)
        return scores

    def _along(self, checkpoint: int, examples: Examples, numbers: Sequence[int]) -> Iterator[Tensor]:
        """The share of some of the general layers, query by query."""
        engine, state = self._engine, self._engine.states[checkpoint]
        wrapper = engine.wrapper("train", exact=True)
        general = {number: engine.layers[number].parameters[0] for number in numbers}
        engine.hooks.at = f"the {self.route} of {', '.join(general.values())}"
        for rows, queries in self._parts:
            for query in range(rows.stop - rows.start):
                directions = {}
                for number, name in general.items():
                    value, gradients = state[f"model.{name}"], queries[checkpoint][number]
                    direction = gradients.gradient[query] * engine.scales[checkpoint][name]
                    directions[f"model.{name}"] = as_direction(direction, value)
                along = ROUTES[self.route](wrapper, state, directions, engine.batch(examples), len(examples))
                yield along.to(engine.dtype)

    def _pick_route(self) -> str:
        """The first that agrees with autograd on examples that have a gradient, along the sum of their directions.

        A derivative along a direction does not see what only changes gradients: values taken under ``no_grad``, hooks,
        a backward pass of one's own. Where a gradient is zero or nothing is cut off, all routes agree.
        """
        engine = self._engine
        wrapper, state = engine.wrapper("train", exact=True), engine.states[-1]
        names = [layer.parameters[0] for layer in engine.layers if not layer.hooked]
        with preserved_random_state():
            examples, rows = self._with_gradients(names)
            if not len(examples):
                return "gradients"
            norms = rows.norm(dim=1)
            direction = (rows / norms[:, None]).sum(0)
            sizes = [state[f"model.{name}"].numel() * (1 + state[f"model.{name}"].is_complex()) for name in names]
            directions = {
                f"model.{name}": as_direction(part.to(engine.dtype), state[f"model.{name}"])
                for name, part in zip(names, direction.split(sizes), strict=True)
            }
            expected, allowed = rows @ direction, TOLERANCE[engine.dtype] * norms * direction.norm()
            groups = list(examples) if engine.alone else [examples]
            for route, along in ROUTES.items():
                try:
                    derivatives = [along(wrapper, state, directions, engine.batch(g), len(g)) for g in groups]
                except Exception:  # an operation without the derivative; torch raises many types
                    continue
                if bool(((torch.cat(derivatives) - expected).abs() <= allowed).all()):
                    return route
        return "gradients"

    def _with_gradients(self, names: Sequence[str]) -> tuple[Examples, Tensor]:
        """Up to 8 training examples whose gradients are not zero, and these (m, numbers) in float64."""
        engine, ids, items, rows = self._engine, [], [], []
        tried = spread(engine.task.train_ids, TRIED)
        for i in np.random.default_rng(0).permutation(tried):  # neighbours are often alike
            try:
                example = engine.task.read([i])
                gradients = alone_gradients(engine, example, names)
            except GradIndexError:  # an example that nobody may have asked for
                continue
            row = torch.cat([gradient.reshape(-1) for gradient in gradients]).double()
            if bool(row.any()) and bool(row.isfinite().all()):
                ids += [i]
                items += example.items
                rows.append(row)
            if len(rows) == COMPARED:
                break
        return Examples.training(ids, items), torch.stack(rows) if rows else torch.empty(0)


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

        def derivative(losses: Tensor) -> Tensor:
            u = torch.ones_like(losses, requires_grad=True)
            gradients = torch.autograd.grad((u * losses).sum(), list(tracked.values()), create_graph=True)
            products = [(as_real(g) * as_real(v)).sum() for g, v in zip(gradients, directions.values(), strict=True)]
            return torch.autograd.grad(torch.stack(products).sum(), u)[0]

        return wrapper.through({**state, **tracked}, batch, n, derivative)


# In the order in which they are tried.
ROUTES: Mapping[str, Along] = {"forward mode": _forward_mode, "double backward": _double_backward}


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


def _add_up(total: list[dict[int, Gradients]], gradients: list[dict[int, Gradients]]) -> None:
    for sums, layers in zip(total, gradients, strict=True):
        for number, share in layers.items():
            sums[number] = Formed(sums[number].gradient + share.gradient) if number in sums else share


def _smaller(gradients: Gradients) -> Gradients:
    """A query's gradients in the smaller of the two forms."""
    if isinstance(gradients, Factors) and not gradients.rank_one:
        positions, d_in = gradients.activations.shape[1:]
        d_out = gradients.output_gradients.shape[2]
        if positions * (d_out + d_in) > d_out * d_in:
            return Formed(torch.cat([piece.gradient for _, piece in gradients.parts()]))
    if isinstance(gradients, Stacks):
        formed = gradients.n * gradients.output_gradients.shape[1] * gradients.n_blocks * gradients.width
        if gradients.numbers > formed:
            return Formed(gradients.gradient)
    return gradients
