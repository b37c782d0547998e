"""What gradients produce and projection consumes: a layer, and its per-example gradients in the form it offers.

The forms have the same methods: :class:`Factors` (sums of outer products, never formed unless
that is cheaper), :class:`Lookups` (columns of an embedding), :class:`Formed` (the gradient itself)
and :class:`Sum` (of several of these); in ``stacks``, ``Stacks`` (of a stack of matrices).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import ClassVar, Protocol

import torch
from torch import Tensor

_GPU_PART_BYTES = 1 << 30


@dataclass(frozen=True)
class Layer:
    """One block of tracked parameters, whose gradient is a matrix of shape ``(d_out, d_in)``.

    Args:
        name: the module's or, on the general routes, the parameter's name.
        parameters: names of the tracked parameters in it; a weight before its bias.
        d_out: output features (1 on the general routes).
        d_in: input features, the bias as the last one (the number of elements on the
            general routes).
        route: how its gradients are computed: a hook's rule such as ``"linear"``, ``"vmap"``
            or ``"loop"``.
    """

    name: str
    parameters: tuple[str, ...]
    d_out: int
    d_in: int
    route: str

    @property
    def size(self) -> int:
        """The number of tracked elements."""
        return self.d_out * self.d_in

    @property
    def hooked(self) -> bool:
        """Whether a hook computes it, in the one backward pass of the batch."""
        return self.route not in ("vmap", "loop")


class Gradients(Protocol):
    """Per-example gradients G_z (d_out, d_in) of one layer for a batch."""

    def parts(self) -> Iterator[tuple[slice, Gradients]]:
        """The batch in parts, each with its place in the batch: what fits the processor's cache, or much on a GPU."""

    @property
    def gradient(self) -> Tensor:
        """G: (batch, d_out, d_in), formed."""

    def squared_norms(self) -> Tensor:
        """||G_z||^2, exact: (batch,) float64."""

    def products(self, other: Gradients) -> Tensor:
        """<G_z, G'_z'> for every pair: (batch, other batch), exact."""

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """left^T G_z right: (batch, a, b) for ``left`` (d_out, a) and ``right`` (d_in, b)."""

    def sided(self, start: Tensor, side: int, weights: Tensor) -> Tensor:
        """sum_z weights_z G_z G_z^T start for side 0, G_z^T G_z start for side 1: of the shape of ``start``."""

    def total(self, weights: Tensor) -> Tensor:
        """sum_z weights_z G_z: (d_out, d_in)."""


def part_bytes(device: torch.device, cached: int) -> int:
    """How much of a batch to lay out at once: ``cached`` on the CPU, to stay in its cache; far more on a GPU.

    A GPU has bandwidth for whatever fits its memory, and each call takes longer to start than a small part to compute.
    """
    return _GPU_PART_BYTES if device.type == "cuda" else cached


class Whole:
    """Forms that are small enough to be used at once."""

    # Whether it compares itself with a formed gradient by a better way than forming itself.
    compares: ClassVar[bool] = False

    def parts(self: Gradients) -> Iterator[tuple[slice, Gradients]]:
        """See :class:`Gradients`."""
        yield slice(None), self


class Formed(Whole):
    """Gradients that are given as they are.

    Args:
        gradient: (batch, d_out, d_in).
    """

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def squared_norms(self) -> Tensor:
        """See :class:`Gradients`."""
        return _squares(self.gradient)

    def products(self, other: Gradients) -> Tensor:
        """See :class:`Gradients`."""
        return _formed_products(self, other)

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        two_sided: Tensor = left.T @ (self.gradient @ right)
        return two_sided

    def sided(self, start: Tensor, side: int, weights: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        return _sided(self.gradient, start, side, weights)

    def total(self, weights: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        return torch.einsum("b,brc->rc", weights, self.gradient)


class Factors(Whole):
    """Per-example gradients as sums of outer products over positions.

    G_z = sum_p output_gradients[z, p] activations[z, p]^T, never summed over z. A linear
    layer without positions has one, so G_z has rank one (Pruthi et al. 2020, section 4.4).

    Args:
        activations: (batch, positions, d_in).
        output_gradients: (batch, positions, d_out).
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
        positions, d_in = self.activations.shape[1:]
        d_out = self.output_gradients.shape[2]
        if "gradient" not in self.__dict__ and positions * (d_out + d_in) < d_out * d_in:
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
        if isinstance(other, Factors) and self._pairs_are_cheaper(other):
            return _pairwise(other, lambda x, d: (self.activations @ x.T) * (self.output_gradients @ d.T))
        return _formed_products(self, other)

    def _pairs_are_cheaper(self, other: Factors) -> bool:
        """Whether comparing all pairs of positions takes fewer multiplications than forming the gradients."""
        (batch, positions, d_in), d_out = self.activations.shape, self.output_gradients.shape[2]
        count, others = other.activations.shape[:2]
        formed = (batch * positions + count * others + batch * count) * d_out * d_in
        return batch * count * positions * others * (d_out + d_in) < formed

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """Each side on its own, G is not formed. See :class:`Gradients`."""
        return torch.bmm((self.output_gradients @ left).transpose(1, 2), self.activations @ right)

    def sided(self, start: Tensor, side: int, weights: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        ours, other = (self.output_gradients, self.activations)[:: 1 if side == 0 else -1]
        turned, (positions, width), columns = ours @ start, other.shape[1:], start.shape[1]
        # G^T start, then G times that, each through the positions; or through the products of positions, which are few.
        if positions * (width + columns) < width * columns:
            inner = torch.bmm(torch.bmm(other, other.transpose(1, 2)), turned)
        else:
            inner = torch.bmm(other, torch.bmm(other.transpose(1, 2), turned))
        inner *= weights[:, None, None]
        return ours.flatten(0, 1).T @ inner.flatten(0, 1)

    def total(self, weights: Tensor) -> Tensor:
        """Over examples and positions at once. See :class:`Gradients`."""
        deltas = self.output_gradients * weights[:, None, None]
        return deltas.flatten(0, 1).T @ self.activations.flatten(0, 1)


class Lookups(Whole):
    """Per-example gradients of an embedding: column ``indices[z, p]`` of G_z gets ``output_gradients[z, p]``.

    Args:
        indices: (batch, positions) int64, the columns; a position with a zero gradient counts nothing.
        output_gradients: (batch, positions, d_out).
        d_in: how many there are.
    """

    compares = True

    def __init__(self, indices: Tensor, output_gradients: Tensor, d_in: int) -> None:
        self.indices = indices
        self.output_gradients = output_gradients
        self.d_in = d_in

    @property
    def gradient(self) -> Tensor:
        """See :class:`Gradients`."""
        batch, _, d_out = self.output_gradients.shape
        formed = self.output_gradients.new_zeros(batch, self.d_in, d_out)
        formed.scatter_add_(1, self.indices[:, :, None].expand_as(self.output_gradients), self.output_gradients)
        return formed.transpose(1, 2)

    def squared_norms(self) -> Tensor:
        """By the Gram matrix of the positions that share a column. See :class:`Gradients`."""
        grams = torch.bmm(self.output_gradients, self.output_gradients.transpose(1, 2))
        same = self.indices[:, :, None] == self.indices[:, None, :]
        return (grams * same).double().sum((1, 2)).clamp_min(0)

    def products(self, other: Gradients) -> Tensor:
        """From what the others have in the columns that were looked up. See :class:`Gradients`."""
        deltas = self.output_gradients
        if isinstance(other, Lookups):
            pairs = zip(other.indices, other.output_gradients, strict=True)
            return _stacked((self.indices[:, :, None] == i) * (deltas @ d.T) for i, d in pairs)
        if isinstance(other, Factors):  # its column i is the sum over its positions q of delta'_q x'_q[i]
            return _pairwise(other, lambda x, d: x.T[self.indices] * (deltas @ d.T))
        if isinstance(other, Formed):
            return _stacked(gradient.T[self.indices] * deltas for gradient in other.gradient)
        return _formed_products(self, other)

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        return torch.bmm((self.output_gradients @ left).transpose(1, 2), right[self.indices])

    def sided(self, start: Tensor, side: int, weights: Tensor) -> Tensor:
        """Through the positions, those that share a column added up. See :class:`Gradients`."""
        deltas, weights = self.output_gradients, weights[:, None, None]
        if side == 0:
            same = (self.indices[:, :, None] == self.indices[:, None, :]).to(deltas)
            return torch.einsum("bpn,bpk->nk", deltas, torch.bmm(same, deltas @ start) * weights)
        inner = torch.bmm(deltas.transpose(1, 2), start[self.indices]) * weights
        return torch.zeros_like(start).index_add_(0, self.indices.flatten(), torch.bmm(deltas, inner).flatten(0, 1))

    def total(self, weights: Tensor) -> Tensor:
        """Into the columns that were looked up. See :class:`Gradients`."""
        deltas = (self.output_gradients * weights[:, None, None]).flatten(0, 1)
        return deltas.new_zeros(self.d_in, deltas.shape[1]).index_add_(0, self.indices.flatten(), deltas).T


class Sum(Whole):
    """The sum of several forms, such as of an embedding that is also the output layer.

    Args:
        terms: gradients of the same batch and layer.
    """

    compares = True

    def __init__(self, terms: Sequence[Gradients]) -> None:
        self.terms = terms

    @property
    def gradient(self) -> Tensor:
        """See :class:`Gradients`."""
        first, *others = (term.gradient for term in self.terms)
        return sum(others, first)

    def squared_norms(self) -> Tensor:
        """With the cross terms. See :class:`Gradients`."""
        squares = torch.stack([term.squared_norms() for term in self.terms]).sum(0)
        for one, other in combinations(self.terms, 2):
            squares = squares + 2 * _inner(one, other)
        return squares.clamp_min(0)

    def products(self, other: Gradients) -> Tensor:
        """See :class:`Gradients`."""
        return torch.stack([term.products(other) for term in self.terms]).sum(0)

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        return torch.stack([term.two_sided(left, right) for term in self.terms]).sum(0)

    def sided(self, start: Tensor, side: int, weights: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        return _sided(self.gradient, start, side, weights)

    def total(self, weights: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        return torch.stack([term.total(weights) for term in self.terms]).sum(0)


def _pairwise(others: Factors, terms: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sums of ``terms(activations, output_gradients)`` of each of the others: (batch, other batch)."""
    return _stacked(terms(x, d) for x, d in zip(others.activations, others.output_gradients, strict=True))


def _stacked(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack([term.sum((1, 2)) for term in terms], 1)


def _formed_products(one: Gradients, other: Gradients) -> Tensor:
    if isinstance(other, Whole) and other.compares:
        return other.products(one).T
    return one.gradient.flatten(1) @ other.gradient.flatten(1).T


def _inner(one: Gradients, other: Gradients) -> Tensor:
    """<G_z, G'_z> of each example: (batch,) float64."""
    if isinstance(one, Factors) and isinstance(other, Lookups):
        seen = one.activations.gather(2, other.indices[:, None].expand(-1, one.activations.shape[1], -1))
        deltas = torch.bmm(one.output_gradients, other.output_gradients.transpose(1, 2))
        return (seen * deltas).double().sum((1, 2))
    return (one.gradient * other.gradient).double().sum((1, 2))


def _sided(gradient: Tensor, start: Tensor, side: int, weights: Tensor) -> Tensor:
    gradient = gradient if side == 0 else gradient.transpose(1, 2)
    inner = (gradient.transpose(1, 2) @ start) * weights[:, None, None]
    return (gradient @ inner).sum(0)


def _squares(tensor: Tensor) -> Tensor:
    """Sum of squares of each example: (batch,) float64."""
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1)
    return norms.double().square()
