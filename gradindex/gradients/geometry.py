"""Geometries: by which inner product gradients are compared, and what is done to either side for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint import Loaded
from ..errors import CheckpointError
from ..factors import Formed, Gradients, Layer
from ..registry import Registry
from ..task import GEOMETRIES as NAMED
from .functional import as_real
from .layers import as_matrix

_ADAM_EPSILON = 1e-8


class Geometry(Protocol):
    """An inner product of gradients, as linear maps of either side.

        score(z, q) = sum_c <A_c s_c g_c(z), B_c s_c g_c(q)>

    over checkpoints c, with g_c(z) = grad l(w_c; z), s_c what :meth:`scales` gives each parameter, A_c the map of
    training gradients (:meth:`train`) and B_c that of queries' (:meth:`query`). Whoever computes gradients has s_c in
    them already. Three things are made of them:

    - rows: P_c A_c s_c g_c(z) with the projection P_c, all checkpoints side by side, then :meth:`train_rows`; of a
      query P_c B_c s_c g_c(q), then :meth:`query_rows`. Inner products of rows estimate scores.
    - squared norms ||A_c s_c g_c(z)||^2, which stand beside the rows, and ||B_c s_c g_c(q)||^2.
    - exact scores through the model: <s_c g_c(z), A_c^T B_c s_c g_c(q)>, with A_c^T done by :meth:`exact`, so that
      training gradients stay factors that nobody forms. :meth:`scores` makes of these what the store measures.

    A map of queries alone leaves training gradients, rows and norms as those of :class:`TracIn`. It is :meth:`query`;
    or, where rows have a map of their own (:meth:`query_rows`), :meth:`exact`, which then is more than A_c^T.

    An object belongs to one engine, which calls :meth:`read` with every checkpoint. Checkpoints are numbered as the
    engine's. Maps of gradients leave what they are given as it is, and return it where they do nothing.

    Attributes:
        method: what to call it, such as ``"TracInCP"``.
        measure: what to call its scores.
        by_factors: whether <A_c s_c g_c(z), B_c s_c g_c(q)> are exact, so that stored factors give exact scores.
    """

    method: str
    measure: str
    by_factors: bool

    def scales(self, rates: Mapping[str, float]) -> dict[str, float]:
        """s_c: what gradients of each parameter are multiplied by on both sides, from learning rates eta_c."""

    def read(self, loaded: Loaded, parameters: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Take what is needed of the next checkpoint.

        Args:
            loaded: the checkpoint, its tensors still there.
            parameters: the model's, of what is tracked.
            rates: eta_c by parameter.

        Raises:
            CheckpointError: the checkpoint lacks something.
        """

    def train(self, checkpoint: int, layer: Layer, gradients: Gradients) -> Gradients:
        """A_c of one layer's gradients of a batch of training examples."""

    def query(self, checkpoint: int, layer: Layer, gradients: Gradients) -> Gradients:
        """B_c of one layer's gradients of a batch of queries."""

    def exact(self, checkpoint: int, layer: Layer, gradients: Gradients) -> Gradients:
        """A_c^T of what :meth:`query` made: what plain training gradients are compared with; linear."""

    def train_rows(self, rows: Tensor, squares: Tensor) -> Tensor:
        """Rows as they are stored.

        Args:
            rows: (b, dim) in the engine's type, a block for each checkpoint, side by side.
            squares: (b, C) float64, the squared norms of the gradients.
        """

    def query_rows(self, rows: Tensor, squares: Tensor) -> Tensor:
        """Queries' rows as they are searched with; arguments as for :meth:`train_rows`."""

    def joined_rows(
        self,
        rows: NDArray[np.float32],
        squares: NDArray[np.float64],
        later: NDArray[np.float32],
        later_squares: NDArray[np.float64],
    ) -> NDArray[np.float32]:
        """(b, dim + dim') as :meth:`train_rows` would make them of all checkpoints at once.

        Args:
            rows: (b, dim) as they are stored.
            squares: (b, C) the squared norms of their gradients.
            later: (b, dim') of later checkpoints, before :meth:`train_rows`.
            later_squares: (b, C') the squared norms of their gradients.
        """

    def lengths(self, norms: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) what queries' gradients are divided by before they are added up; of norms (n,) over all checkpoints."""

    def scores(
        self, products: NDArray[np.float64], norms: NDArray[np.float64], squares: Callable[[], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Exact scores, of the shape of ``products``.

        Args:
            products: (n_query, m, ...) exact inner products, or shares of them.
            norms: (n_query,) of queries' gradients over all checkpoints.
            squares: reads (m, C), the squared norms of training gradients; called only where they matter.
        """


# By what ``Task(preconditioner=...)`` says.
GEOMETRIES: Registry[Callable[[], Geometry]] = NAMED


class TracIn:
    """TracInCP: sum_c eta_c <g_c(z), g_c(q)>, for plain gradient descent. A_c and B_c do nothing.

    Source: Pruthi et al. 2020 (arXiv:2002.08484), section 3.3.
    """

    method = "TracInCP"
    measure = "TracInCP scores"
    by_factors = True

    def scales(self, rates: Mapping[str, float]) -> dict[str, float]:
        """sqrt(eta_c) on each side. See :class:`Geometry`."""
        return {name: eta**0.5 for name, eta in rates.items()}

    def read(self, loaded: Loaded, parameters: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Nothing. See :class:`Geometry`."""

    def train(self, checkpoint: int, layer: Layer, gradients: Gradients) -> Gradients:
        """See :class:`Geometry`."""
        return gradients

    def query(self, checkpoint: int, layer: Layer, gradients: Gradients) -> Gradients:
        """See :class:`Geometry`."""
        return gradients

    def exact(self, checkpoint: int, layer: Layer, gradients: Gradients) -> Gradients:
        """See :class:`Geometry`."""
        return gradients

    def train_rows(self, rows: Tensor, squares: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        return rows

    def query_rows(self, rows: Tensor, squares: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        return rows

    def joined_rows(
        self,
        rows: NDArray[np.float32],
        squares: NDArray[np.float64],
        later: NDArray[np.float32],
        later_squares: NDArray[np.float64],
    ) -> NDArray[np.float32]:
        """See :class:`Geometry`."""
        return np.concatenate([rows, later], 1)

    def lengths(self, norms: NDArray[np.float64]) -> NDArray[np.float64]:
        """See :class:`Geometry`."""
        return np.ones_like(norms)

    def scores(
        self, products: NDArray[np.float64], norms: NDArray[np.float64], squares: Callable[[], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """See :class:`Geometry`."""
        return products


@GEOMETRIES.register("adam")
class AdamDiagonal(TracIn):
    """Adam's second moments v_c as a fixed diagonal: A_c = B_c = D_c^(1/2) with D_c = 1 / (sqrt(v_c) + 1e-8).

        score(z, q) = sum_c eta_c g_c(z)^T D_c g_c(q)

    Every number has a weight of its own, so what is mapped must be formed; exact scores form queries' gradients alone.

    Source: Pruthi et al. 2020 (arXiv:2002.08484), remark 3.4.
    """

    def __init__(self) -> None:
        self._moments: list[dict[str, Tensor]] = []
        self._roots: dict[tuple[int, Layer], Tensor] = {}

    def read(self, loaded: Loaded, parameters: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """The second moments; a parameter that took no step may lack them. See :class:`Geometry`."""
        moments = loaded.second_moments()
        untrained = [name for name in parameters if name not in moments and rates[name] == 0]
        moments |= {name: torch.ones_like(parameters[name], device="cpu") for name in untrained}
        missing = [name for name in parameters if name not in moments]
        if missing:
            raise CheckpointError(
                f"{loaded.checkpoint.path} has no second moments for {missing[0]} ({len(missing)} parameters in all). "
                "Leave out what was not trained, with layers=."
            )
        self._moments.append(moments)

    def train(self, checkpoint: int, layer: Layer, gradients: Gradients) -> Gradients:
        """See :class:`Geometry`."""
        return self._weighted(checkpoint, layer, gradients)

    def query(self, checkpoint: int, layer: Layer, gradients: Gradients) -> Gradients:
        """See :class:`Geometry`."""
        return self._weighted(checkpoint, layer, gradients)

    def exact(self, checkpoint: int, layer: Layer, gradients: Gradients) -> Gradients:
        """See :class:`Geometry`."""
        return self._weighted(checkpoint, layer, gradients)

    def _weighted(self, checkpoint: int, layer: Layer, gradients: Gradients) -> Gradients:
        """D^(1/2) g."""
        formed = gradients.gradient
        root = self._roots.get((checkpoint, layer))
        if root is None or root.dtype != formed.dtype:
            moments = {name: as_real(self._moments[checkpoint][name]) for name in layer.parameters}
            roots = {name: (squares.sqrt() + _ADAM_EPSILON).rsqrt()[None] for name, squares in moments.items()}
            root = self._roots[checkpoint, layer] = as_matrix(layer, roots).to(formed.device, formed.dtype)
        return Formed(formed * root)


class Cosine:
    """Cosines of the gradients that another geometry compares, over all checkpoints at once.

        score(z, q) / (||phi(z)|| ||phi(q)||), with ||phi(z)||^2 = sum_c ||A_c s_c g_c(z)||^2

    Rows have the norm 1 before they are projected. A zero gradient has no direction: its cosines are 0.

    Args:
        inner: the other one.
    """

    def __init__(self, inner: Geometry) -> None:
        self._inner = inner
        self.method, self.measure = inner.method, f"cosines of the gradients behind {inner.method}"
        self.by_factors = inner.by_factors
        self.scales, self.read = inner.scales, inner.read
        self.train, self.query, self.exact = inner.train, inner.query, inner.exact

    def train_rows(self, rows: Tensor, squares: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        return self._of_unit_norm(self._inner.train_rows(rows, squares), squares)

    def query_rows(self, rows: Tensor, squares: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        return self._of_unit_norm(self._inner.query_rows(rows, squares), squares)

    @staticmethod
    def _of_unit_norm(rows: Tensor, squares: Tensor) -> Tensor:
        norms = squares.sum(1).sqrt()
        return rows / norms.where(norms > 0, 1.0)[:, None]

    def joined_rows(
        self,
        rows: NDArray[np.float32],
        squares: NDArray[np.float64],
        later: NDArray[np.float32],
        later_squares: NDArray[np.float64],
    ) -> NDArray[np.float32]:
        """See :class:`Geometry`."""
        whole = _nonzero(np.concatenate([squares, later_squares], 1).sum(1))
        rows = rows * np.sqrt(squares.sum(1) / whole).astype(np.float32)[:, None]
        later = later / np.sqrt(whole).astype(np.float32)[:, None]
        return np.concatenate([rows, later], 1)

    def lengths(self, norms: NDArray[np.float64]) -> NDArray[np.float64]:
        """See :class:`Geometry`."""
        return _nonzero(norms)

    def scores(
        self, products: NDArray[np.float64], norms: NDArray[np.float64], squares: Callable[[], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """See :class:`Geometry`."""
        products = self._inner.scores(products, norms, squares)
        both = _nonzero(np.outer(norms, np.sqrt(squares().sum(1))))
        return products / both.reshape(*both.shape, *(1,) * (products.ndim - 2))


def _nonzero(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Norms to divide by."""
    return np.where(norms > 0, norms, 1.0)


def geometry_of(preconditioner: str | None) -> Geometry:
    """A new geometry by what ``Task(preconditioner=...)`` says, for one engine."""
    return TracIn() if preconditioner is None else GEOMETRIES[preconditioner]()


def with_unit_norm(geometry: Geometry, unit_norm: bool) -> Geometry:
    """The geometry of a store: with cosines where its rows have unit norm."""
    return Cosine(geometry) if unit_norm else geometry
