"""What gradients produce and projection consumes: a layer, and its per-example gradients as factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Route = Literal["linear", "conv2d", "vmap", "loop"]


@dataclass(frozen=True)
class Layer:
    """One block of tracked parameters, whose gradient is a matrix of shape ``(rows, columns)``.

    Args:
        name: the module's or, on the general routes, the parameter's name.
        parameters: names of the tracked parameters in it; a weight before its bias.
        rows: output features (1 on the general routes).
        columns: input features, the bias as the last one (the number of elements on the
            general routes).
        route: how its gradients are computed.
    """

    name: str
    parameters: tuple[str, ...]
    rows: int
    columns: int
    route: Route

    @property
    def size(self) -> int:
        """The number of tracked elements."""
        return self.rows * self.columns


class Factors:
    """Per-example gradients of one layer as sums of outer products over positions.

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
        """G: (batch, rows, columns)."""
        return torch.bmm(self.output_gradients.transpose(1, 2), self.activations)

    def squared_norms(self) -> Tensor:
        """||G_z||^2 exactly: (batch,) float64, by closed form, position Gram or forming, whichever is cheapest."""
        positions = self.activations.shape[1]
        rows, columns = self.output_gradients.shape[2], self.activations.shape[2]
        if positions == 1:
            left = self.activations[:, 0].double().square().sum(1)
            return left * self.output_gradients[:, 0].double().square().sum(1)
        if "gradient" not in self.__dict__ and positions * (rows + columns) < rows * columns:
            # ||sum_p d_p x_p^T||^2 = sum_pq (d_p . d_q)(x_p . x_q): the cross terms belong to it.
            grams = torch.bmm(self.activations, self.activations.transpose(1, 2))
            grams *= torch.bmm(self.output_gradients, self.output_gradients.transpose(1, 2))
            return grams.double().sum((1, 2)).clamp_min(0)
        return self.gradient.double().square().sum((1, 2))

    def products(self, other: Factors) -> Tensor:
        """<G_z, G'_z'> for every pair: (batch, other batch).

        sum over positions of (delta . delta')(x . x'), never the product of the two sums.
        """
        if self.rank_one and other.rank_one:
            left = self.output_gradients[:, 0] @ other.output_gradients[:, 0].T
            return left * (self.activations[:, 0] @ other.activations[:, 0].T)
        return self.gradient.flatten(1) @ other.gradient.flatten(1).T

    @staticmethod
    def concatenated(parts: list[Factors]) -> Factors:
        """Several calls of one layer in one forward pass: their positions side by side."""
        if len(parts) == 1:
            return parts[0]
        return Factors(
            torch.cat([part.activations for part in parts], 1), torch.cat([part.output_gradients for part in parts], 1)
        )
