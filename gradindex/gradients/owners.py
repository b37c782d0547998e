"""Layers whose rows are not the examples, one to one: which example each row belongs to, measured in every batch.

Flattened tokens, the tokens that a router sends to an expert, sequences with time as the first axis. Whatever the
model did with them, the gradient of a row's output comes from the loss of the example that the row belongs to. So
losses that are multiplied by powers of two, each example's by its own, multiply it by that power, exactly: powers of
two change no rounding. Backward passes of such losses tell rows apart, for any model and without a look at its
functions. A row whose gradient comes from several examples has no such power, and is found as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..factors import Layer
from ..memory import InseparableError
from ..stacks import Rows

# Added to a route's name.
BY_ROWS = " by rows"

# (rows, features) of a call's output, or of its gradient.
Lay = Callable[[Tensor], Tensor]

# How many examples a pass tells apart, and below which norm a row has no digits left that could: gradients go through
# float16 under its autocast, which has no room above the scaled losses and little below.
_POWERS, _NOTHING = 64, 1e-30
_HALF_POWERS, _HALF_NOTHING = 4, 2.0**-14
# Numbers that stand for a row, and how far they may be from a power of two.
_SKETCH, _TOLERANCE, _HALF_TOLERANCE = 4, 1e-2, 0.2


def by_rows(layer: Layer) -> bool:
    """Whether the rows of a layer's output belong to examples as each batch says."""
    return layer.route.endswith(BY_ROWS)


def basic_route(layer: Layer) -> str:
    """The route without what says by rows."""
    return layer.route.removesuffix(BY_ROWS)


def last_axis(output: Tensor) -> Tensor:
    """Every position of all axes but the last is a row."""
    return output.reshape(-1, output.shape[-1])


class Weights:
    """What losses are multiplied by to tell the rows of n examples apart.

    Args:
        n: examples in the batch.
        half: the type of autocast, whose range is the narrowest that gradients go through.
        device: where the losses are.
    """

    def __init__(self, n: int, half: torch.dtype | None, device: torch.device) -> None:
        narrow = half == torch.float16
        self.n, self._base = n, _HALF_POWERS if narrow else _POWERS
        self._nothing, self._tolerance = (_HALF_NOTHING, _HALF_TOLERANCE) if narrow else (_NOTHING, _TOLERANCE)
        # From the highest power down to 1, or in float16 from 1 down.
        self._highest = 0 if narrow else min(self._base, n) - 1
        # Each pass tells a digit of an example's position, the last digit first.
        self._digits: list[Tensor] = []
        remaining = torch.arange(n, device=device)
        while n > 1:
            self._digits.append(remaining % self._base)
            remaining, n = remaining // self._base, -(-n // self._base)

    def passes(self) -> list[Tensor]:
        """(n,) of each pass; none for a single example."""
        return [torch.exp2(self._highest - digits.double()) for digits in self._digits]

    def owners(self, tagged: list[Tensor], plain: Tensor) -> Tensor:
        """The example of each row: (rows,), -1 for a row that has no gradient.

        Args:
            tagged: of each pass, sketches of the rows' gradients (rows, k) float64.
            plain: those without weights.

        Raises:
            InseparableError: a row's gradient comes from several examples, or is not finite.
        """
        if len(tagged) != len(self._digits):
            raise InseparableError("A row's gradient was not there in each pass.")
        owners, place = plain.new_zeros(len(plain), dtype=torch.int64), 1
        squares = plain.square().sum(1)
        known, nothing = plain.isfinite().all(1), squares <= self._nothing**2
        for sketch in tagged:
            ratios = (sketch * plain).sum(1) / squares
            powers = ratios.clamp_min(torch.finfo(torch.float64).tiny).log2().round()
            off = (sketch - torch.exp2(powers)[:, None] * plain).square().sum(1)
            digits = self._highest - powers
            known &= off <= self._tolerance**2 * sketch.square().sum(1)
            known &= (digits >= 0) & (digits < self._base)
            owners += place * digits.nan_to_num(0, 0, 0).long()
            place *= self._base
        known &= owners < self.n
        if bool((~known & ~nothing).any()):
            raise InseparableError("A row's gradient does not come from the loss of one example alone.")
        return owners.where(known & ~nothing, -1)


class Call:
    """One call of a layer, whose rows' gradients are noted in each pass.

    Args:
        lay: lays the output's gradient out as rows.
    """

    def __init__(self, lay: Lay) -> None:
        self._lay = lay
        self._sketches: list[Tensor] = []

    def note(self, delta: Tensor) -> None:
        """The output's gradient in a pass, the plain one last."""
        rows = self._lay(delta).flatten(1)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self._sketches.append((rows @ _directions(rows.shape[1]).to(rows)).double())

    def rows(self, weights: Weights) -> Rows:
        """The owners of the rows, once all passes are through.

        Raises:
            InseparableError: see :meth:`Weights.owners`.
        """
        *tagged, plain = self._sketches
        if weights.n == 1:
            return Rows(torch.zeros(len(plain), dtype=torch.int64, device=plain.device), 1)
        return Rows(weights.owners(tagged, plain), weights.n)


@lru_cache(maxsize=64)
def _directions(features: int) -> Tensor:
    """(features, k) fixed random directions."""
    return torch.randn(features, _SKETCH, generator=torch.Generator().manual_seed(features))
