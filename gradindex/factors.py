"""What gradients produce and projection consumes: a layer, and its per-example gradients in the form it offers.

Three forms have the same methods: :class:`Factors` (sums of outer products, never formed unless
that is cheaper), :class:`Lookups` (rows of an embedding) and :class:`Formed` (the gradient itself).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One block of tracked parameters, whose gradient is a matrix of shape ``(rows, columns)``.

    Args:
        name: the module's or, on the general routes, the parameter's name.
        parameters: names of the tracked parameters in it; a weight before its bias.
        rows: output features (1 on the general routes).
        columns: input features, the bias as the last one (the number of elements on the
            general routes).
        route: how its gradients are computed: a hook's rule such as ``"linear"``, ``"vmap"``
            or ``"loop"``.
    """

    name: str
    parameters: tuple[str, ...]
    rows: int
    columns: int
    route: str

    @property
    def size(self) -> int:
        """The number of tracked elements."""
        return self.rows * self.columns

    @property
    def hooked(self) -> bool:
        """Whether a hook computes it, in the one backward pass of the batch."""
        return self.route not in ("vmap", "loop")


class Gradients(Protocol):
    """Per-example gradients G_z (rows, columns) of one layer for a batch."""

    def parts(self) -> Iterator[tuple[slice, Gradients]]:
        """The batch in parts that fit the processor's cache, each with its place in the batch."""

    @property
    def gradient(self) -> Tensor:
        """G: (batch, rows, columns), formed."""

    def squared_norms(self) -> Tensor:
        """||G_z||^2, exact: (batch,) float64."""

    def products(self, other: Gradients) -> Tensor:
        """<G_z, G'_z'> for every pair: (batch, other batch), exact."""

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """left^T G_z right: (batch, a, b) for ``left`` (rows, a) and ``right`` (columns, b)."""

    def sided(self, start: Tensor, side: int, weights: Tensor) -> Tensor:
        """sum_z weights_z G_z G_z^T start for side 0, G_z^T G_z start for side 1: of the shape of ``start``."""


class _Whole:
    """Forms that are small enough to be used at once."""

    def parts(self: Gradients) -> Iterator[tuple[slice, Gradients]]:
        """See :class:`Gradients`."""
        yield slice(None), self


class Formed(_Whole):
    """Gradients that are given as they are.

    Args:
        gradient: (batch, rows, columns).
    """

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def squared_norms(self) -> Tensor:
        """See :class:`Gradients`."""
        return _squares(self.gradient)

    def products(self, other: Gradients) -> Tensor:
        """See :class:`Gradients`."""
        return self.gradient.flatten(1) @ other.gradient.flatten(1).T

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        two_sided: Tensor = left.T @ (self.gradient @ right)
        return two_sided

    def sided(self, start: Tensor, side: int, weights: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        return _sided(self.gradient, start, side, weights)


class Factors(_Whole):
    """Per-example gradients as sums of outer products over positions.

    G_z = sum_p output_gradients[z, p] activations[z, p]^T, never summed over z. A linear
    layer without positions has one, so G_z has rank one (Pruthi et al. 2020, section 4.4).

    Args:
        activations: (batch, positions, columns).
        output_gradients: (batch, positions, rows).
    """

    def __init__(self, activations: Tensor, output_gradients: Tensor) -> None:
        self.activations = activations
        self.output_gradients = output_gradients

    @property
    def rank_one(self) -> bool:
        """Whether there is a single position."""
        return self.activations.shape[1] == 1

    @cached_property
    def gradient(self) -> Tensor:
        """See :class:`Gradients`."""
        return torch.bmm(self.output_gradients.transpose(1, 2), self.activations)

    def squared_norms(self) -> Tensor:
        """By closed form, position Gram or forming, whichever is cheapest. See :class:`Gradients`."""
        if self.rank_one:
            return _squares(self.activations) * _squares(self.output_gradients)
        positions, columns = self.activations.shape[1:]
        rows = self.output_gradients.shape[2]
        if "gradient" not in self.__dict__ and positions * (rows + columns) < rows * columns:
            # ||sum_p d_p x_p^T||^2 = sum_pq (d_p . d_q)(x_p . x_q): the cross terms belong to it.
            grams = torch.bmm(self.activations, self.activations.transpose(1, 2))
            grams *= torch.bmm(self.output_gradients, self.output_gradients.transpose(1, 2))
            return grams.double().sum((1, 2)).clamp_min(0)
        return _squares(self.gradient)

    def products(self, other: Gradients) -> Tensor:
        """Sum over positions of (delta . delta')(x . x'), never the product of two sums. See :class:`Gradients`."""
        if isinstance(other, Factors) and self.rank_one and other.rank_one:
            left = self.output_gradients[:, 0] @ other.output_gradients[:, 0].T
            return left * (self.activations[:, 0] @ other.activations[:, 0].T)
        return self.gradient.flatten(1) @ other.gradient.flatten(1).T

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """Each side on its own, G is not formed. See :class:`Gradients`."""
        return torch.bmm((self.output_gradients @ left).transpose(1, 2), self.activations @ right)

    def sided(self, start: Tensor, side: int, weights: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        ours, other = (self.output_gradients, self.activations)[:: 1 if side == 0 else -1]
        # G^T start, then G times that, each through the positions.
        inner = torch.bmm(other.transpose(1, 2), ours @ start) * weights[:, None, None]
        return torch.einsum("bpn,bpk->nk", ours, torch.bmm(other, inner))


class Lookups(_Whole):
    """Per-example gradients of an embedding: column ``indices[z, p]`` of G_z gets ``output_gradients[z, p]``.

    Args:
        indices: (batch, positions) int64, the columns; a position with a zero gradient counts nothing.
        output_gradients: (batch, positions, rows).
        columns: how many there are.
    """

    def __init__(self, indices: Tensor, output_gradients: Tensor, columns: int) -> None:
        self.indices = indices
        self.output_gradients = output_gradients
        self.columns = columns

    @property
    def gradient(self) -> Tensor:
        """See :class:`Gradients`."""
        batch, _, rows = self.output_gradients.shape
        formed = self.output_gradients.new_zeros(batch, self.columns, rows)
        formed.scatter_add_(1, self.indices[:, :, None].expand_as(self.output_gradients), self.output_gradients)
        return formed.transpose(1, 2)

    def squared_norms(self) -> Tensor:
        """By the Gram matrix of the positions that share a column. See :class:`Gradients`."""
        grams = torch.bmm(self.output_gradients, self.output_gradients.transpose(1, 2))
        same = self.indices[:, :, None] == self.indices[:, None, :]
        return (grams * same).double().sum((1, 2)).clamp_min(0)

    def products(self, other: Gradients) -> Tensor:
        """Pair by pair of positions that share a column. See :class:`Gradients`."""
        if not isinstance(other, Lookups):
            return self.gradient.flatten(1) @ other.gradient.flatten(1).T
        rows = []
        for indices, deltas in zip(self.indices, self.output_gradients, strict=True):
            same = indices[None, :, None] == other.indices[:, None, :]  # (other batch, positions, other positions)
            rows.append(((deltas @ other.output_gradients.transpose(1, 2)) * same).sum((1, 2)))
        return torch.stack(rows)

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        return torch.bmm((self.output_gradients @ left).transpose(1, 2), right[self.indices])

    def sided(self, start: Tensor, side: int, weights: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        return _sided(self.gradient, start, side, weights)


def concatenated(parts: Sequence[Gradients]) -> Gradients:
    """The sum over several calls of one layer in one forward pass."""
    if len(parts) == 1:
        return parts[0]
    factors = [part for part in parts if isinstance(part, Factors)]
    if len(factors) == len(parts):
        return Factors(
            torch.cat([part.activations for part in factors], 1),
            torch.cat([part.output_gradients for part in factors], 1),
        )
    lookups = [part for part in parts if isinstance(part, Lookups)]
    if len(lookups) == len(parts):
        return Lookups(
            torch.cat([part.indices for part in lookups], 1),
            torch.cat([part.output_gradients for part in lookups], 1),
            lookups[0].columns,
        )
    return Formed(torch.stack([part.gradient for part in parts]).sum(0))


def _sided(gradient: Tensor, start: Tensor, side: int, weights: Tensor) -> Tensor:
    gradient = gradient if side == 0 else gradient.transpose(1, 2)
    inner = (gradient.transpose(1, 2) @ start) * weights[:, None, None]
    return (gradient @ inner).sum(0)


def _squares(tensor: Tensor) -> Tensor:
    """Sum of squares of each example: (batch,) float64."""
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1)
    return norms.double().square()
