"""Gradients of parameters that are stacks of matrices, such as a layer's experts; rows that belong to examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .factors import Factors, Formed, Gradients, Lookups, Sum, Whole


class Rows:
    """Which example each row of a tensor belongs to, for layers that see no axis of examples.

    Args:
        owners: (rows,) int64, the examples' places in the batch; -1 for a row that is left out.
        n: examples in the batch.
    """

    def __init__(self, owners: Tensor, n: int) -> None:
        self.owners, self.n = owners, n

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, int]:
        """The rows that are kept, where each goes in a padded batch, and how many rows each example has there."""
        order = self.owners.argsort(stable=True)
        order = order[self.owners[order] >= 0]
        owners = self.owners[order]
        counts = owners.bincount(minlength=self.n)
        most = max(1, int(counts.max()))
        nth = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[owners]
        return order, owners * most + nth, most

    def padded(self, rows: Tensor) -> Tensor:
        """(rows, ...) to (n, most rows of one example, ...), zero where an example has fewer."""
        order, places, most = self._places
        laid_out = rows.new_zeros(self.n * most, *rows.shape[1:])
        return laid_out.index_copy_(0, places, rows[order]).reshape(self.n, most, *rows.shape[1:])

    def summed(self, rows: Tensor) -> Tensor:
        """(rows, ...) to (n, ...)."""
        order = self._places[0]
        return rows.new_zeros(self.n, *rows.shape[1:]).index_add_(0, self.owners[order], rows[order])


class Stacks(Whole):
    """Per-example gradients of a stack of matrices, each of which sees some of the rows.

    G_z = sum over the rows r of z of output_gradients[r] (e_blocks[r] (x) activations[r])^T, with e the unit vectors:
    a row adds an outer product to the columns of its block. :class:`Lookups` is the case of blocks of one column,
    :class:`Factors` that of one block. The blocks have no columns in common, so norms and products are sums over blocks
    of what their factors give, and no block is formed that saw no row.

    Args:
        activations: (rows, width).
        output_gradients: (rows, d_out).
        owners: (rows,) int64, the example of each row, or -1.
        blocks: (rows,) int64.
        n: examples in the batch.
        n_blocks: matrices in the stack; d_in is their number times ``width``.
    """

    compares = True

    def __init__(
        self, activations: Tensor, output_gradients: Tensor, owners: Tensor, blocks: Tensor, n: int, n_blocks: int
    ) -> None:
        self.activations, self.output_gradients = activations, output_gradients
        self.owners, self.blocks, self.n, self.n_blocks = owners, blocks, n, n_blocks

    @classmethod
    def joined(cls, parts: Sequence[Stacks]) -> Stacks:
        """The sum of several of one batch and layer."""
        activations = torch.cat([part.activations for part in parts])
        output_gradients = torch.cat([part.output_gradients for part in parts])
        owners = torch.cat([part.owners for part in parts])
        blocks = torch.cat([part.blocks for part in parts])
        return cls(activations, output_gradients, owners, blocks, parts[0].n, parts[0].n_blocks)

    @property
    def width(self) -> int:
        """Columns of a block."""
        return self.activations.shape[1]

    def columns(self, block: int) -> slice:
        """Those of a block."""
        return slice(block * self.width, (block + 1) * self.width)

    @cached_property
    def by_block(self) -> list[tuple[int, Tensor, Factors]]:
        """Of each block that has rows: its number, the examples (g,) that they belong to, and factors of these."""
        parts, order = [], self.blocks.argsort(stable=True)
        order = order[self.owners[order] >= 0]
        counts = self.blocks[order].bincount(minlength=self.n_blocks).tolist()
        for block, chosen in enumerate(torch.split(order, counts)):
            if len(chosen):
                examples, owners = torch.unique(self.owners[chosen], return_inverse=True)
                rows = Rows(owners, len(examples))
                sides = (rows.padded(side[chosen]) for side in (self.activations, self.output_gradients))
                parts.append((block, examples, Factors(*sides)))
        return parts

    @property
    def gradient(self) -> Tensor:
        """See :class:`Gradients`."""
        d_out = self.output_gradients.shape[1]
        formed = self.activations.new_zeros(self.n, d_out, self.n_blocks * self.width)
        for block, examples, factors in self.by_block:
            formed[examples, :, self.columns(block)] = factors.gradient
        return formed

    def squared_norms(self) -> Tensor:
        """See :class:`Gradients`."""
        squares = torch.zeros(self.n, dtype=torch.float64, device=self.activations.device)
        for _, examples, factors in self.by_block:
            squares.index_add_(0, examples, factors.squared_norms())
        return squares

    def products(self, other: Gradients) -> Tensor:
        """See :class:`Gradients`."""
        if isinstance(other, Sum):
            return torch.stack([self.products(term) for term in other.terms]).sum(0)
        if not isinstance(other, Stacks):
            formed = other.gradient
            products = self.activations.new_zeros(self.n, len(formed))
            for block, examples, factors in self.by_block:
                products.index_add_(0, examples, factors.products(Formed(formed[:, :, self.columns(block)])))
            return products
        products = self.activations.new_zeros(self.n, other.n)
        theirs = {block: (examples, factors) for block, examples, factors in other.by_block}
        for block, examples, factors in self.by_block:
            if block in theirs:
                others, facing = theirs[block]
                products[examples[:, None], others] += factors.products(facing)
        return products

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        total = self.activations.new_zeros(self.n, left.shape[1], right.shape[1])
        for block, examples, factors in self.by_block:
            total.index_add_(0, examples, factors.two_sided(left, right[self.columns(block)]))
        return total

    def sided(self, start: Tensor, side: int, weights: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        if side == 0:  # G G^T is the sum over blocks: they have no columns in common
            shares = [factors.sided(start, 0, weights[examples]) for _, examples, factors in self.by_block]
            return torch.stack(shares).sum(0) if shares else torch.zeros_like(start)
        inner = start.new_zeros(self.n, self.output_gradients.shape[1], start.shape[1])
        for block, examples, factors in self.by_block:
            seen = factors.activations @ start[self.columns(block)]
            inner.index_add_(0, examples, torch.bmm(factors.output_gradients.transpose(1, 2), seen))
        inner *= weights[:, None, None]
        total = torch.zeros_like(start)
        for block, examples, factors in self.by_block:
            backward = torch.bmm(factors.output_gradients, inner[examples])
            total[self.columns(block)] = torch.einsum("bpn,bpk->nk", factors.activations, backward)
        return total

    def total(self, weights: Tensor) -> Tensor:
        """See :class:`Gradients`."""
        total = self.activations.new_zeros(self.output_gradients.shape[1], self.n_blocks * self.width)
        for block, examples, factors in self.by_block:
            total[:, self.columns(block)] = factors.total(weights[examples])
        return total

    @property
    def numbers(self) -> int:
        """How many the rows have."""
        return self.activations.numel() + self.output_gradients.numel()


def concatenated(parts: Sequence[Gradients]) -> Gradients:
    """The sum over several calls of one layer in one forward pass."""
    if len(parts) == 1:
        return parts[0]
    factors = [part for part in parts if isinstance(part, Factors)]
    lookups = [part for part in parts if isinstance(part, Lookups)]
    blocks = [part for part in parts if isinstance(part, Stacks)]
    others = [part.gradient for part in parts if not isinstance(part, (Factors, Lookups, Stacks))]
    terms: list[Gradients] = []
    if factors:
        terms.append(
            Factors(
                torch.cat([part.activations for part in factors], 1),
                torch.cat([part.output_gradients for part in factors], 1),
            )
        )
    if lookups:
        terms.append(
            Lookups(
                torch.cat([part.indices for part in lookups], 1),
                torch.cat([part.output_gradients for part in lookups], 1),
                lookups[0].d_in,
            )
        )
    if blocks:
        terms.append(Stacks.joined(blocks))
    if others:
        terms.append(Formed(torch.stack(others).sum(0)))
    return terms[0] if len(terms) == 1 else Sum(terms)
