"""Whitened gradients: queries turned, block by block, so that inner products with stored rows predict retraining."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..choices import QUERY_GEOMETRIES, QueryGeometry
from ..errors import ArgumentError, MismatchError, check_choice
from ..gradients import Geometry
from ..store import GradientStore, Moments, moments_of

# What is added to the second moment, as a share of its trace: near the best for all that was tried
# (docs/results/quality).
DEFAULT_DAMPING = 3e-4


class Whitening:
    """The map of queries' rows, for each checkpoint's block c of d numbers.

        q_c -> (M_c + lambda_c I)^-1 q_c / std_r <r_c, (M_c + lambda_c I)^-1 q_c>

    with M_c the mean over all rows r of r_c r_c^T mean(||r_c||) / ||r_c||, and lambda_c = damping trace(M_c). The
    weights 1 / ||r|| stand for 1 / (1 - p) of a classifier; the standard deviation over the rows gives checkpoints, and
    queries, equal weight, whatever they have learnt already. A block in which all scores are equal becomes zero.

    Source: TRAK's kernel (Park et al. 2023, arXiv:2303.14186, equation 15) on stored rows, with other weights.

    Args:
        moments: of all rows.
        damping: see above; positive, by default ``DEFAULT_DAMPING``.

    Raises:
        ArgumentError: ``damping`` is not positive.
    """

    def __init__(self, moments: Moments, damping: float | None = None) -> None:
        self.damping = damping = checked_damping(damping)
        self.shape = moments.sums.shape
        # Sums that differ are of other rows.
        self.stamp = f" whitened {hashlib.sha256(moments.sums.tobytes()).hexdigest()} {damping!r}"
        self._factors, self._covariances = list[Tensor](), list[Tensor]()
        self._ridges = list[float]()
        for weighted, plain, sums in zip(moments.weighted, moments.plain, moments.sums, strict=True):
            mean_length = np.trace(weighted) / moments.count
            moment = torch.from_numpy(weighted * (mean_length / moments.count))
            ridge = damping * float(moment.trace()) or 1.0  # a block of zeros: any map gives zero
            self._ridges.append(ridge)
            self._factors.append(torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=moment.dtype)))
            mean = sums / moments.count
            self._covariances.append(torch.from_numpy(plain / moments.count - np.outer(mean, mean)))

    def directions(self, dim: int) -> NDArray[np.float32]:
        """(C d, dim) orthonormal directions that tell most of whitened scores, for an index; the leading ones first.

        Eigenvectors of each M_c by mu / (mu + lambda_c): what is left of an eigenvalue mu in the products of rows and
        whitened queries.
        """
        n_checkpoints, d = self.shape
        left, vectors = self._eigenvectors
        found = np.zeros((n_checkpoints, d, dim), dtype=np.float32)
        for column, place in enumerate(np.argsort(-left, kind="stable")[:dim].tolist()):
            checkpoint, which = divmod(place, d)
            found[checkpoint, :, column] = vectors[checkpoint][:, which]
        return found.reshape(n_checkpoints * d, dim)

    @cached_property
    def _eigenvectors(self) -> tuple[NDArray[np.float64], list[NDArray[np.float32]]]:
        """(C d,) what is left of each eigenvalue, and the eigenvectors of each checkpoint, (d, d)."""
        left, vectors = [], []
        for factor, ridge in zip(self._factors, self._ridges, strict=True):
            values, of_block = torch.linalg.eigh(factor @ factor.T)
            left.append((1 - ridge / values).numpy())
            vectors.append(of_block.float().numpy())
        return np.concatenate(left), vectors

    def of(self, rows: Tensor) -> Tensor:
        """Queries' rows (b, C d) as they are searched with, in their type."""
        blocks = rows.detach().cpu().double().reshape(len(rows), *self.shape)
        turned = torch.empty_like(blocks)
        for checkpoint, (factor, covariance) in enumerate(zip(self._factors, self._covariances, strict=True)):
            block = torch.cholesky_solve(blocks[:, checkpoint].T, factor).T
            variances = ((block @ covariance) * block).sum(1)
            # What rounding leaves of a variance of zero is no scale.
            least = torch.finfo(torch.float64).eps * covariance.trace() * block.square().sum(1)
            scales = torch.where(variances > least, variances.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
            turned[:, checkpoint] = block * scales[:, None]
        return turned.reshape(rows.shape).to(rows)


def searched_as(geometry: QueryGeometry) -> QueryGeometry:
    """The geometry that an index is tuned for: exact whitened scores settle the order of what whitened rows propose."""
    return "tracin" if geometry == "tracin" else "whitened"


def checked_damping(damping: float | None) -> float:
    """What is added to a second moment, as a share of its trace; by default ``DEFAULT_DAMPING``.

    Raises:
        ArgumentError: it is not positive.
    """
    damping = DEFAULT_DAMPING if damping is None else damping
    if not damping > 0:
        raise ArgumentError(f"damping is {damping}, but must be a positive number, such as {DEFAULT_DAMPING:g}.")
    return damping


def check_asked(geometry: str, damping: float | None) -> None:
    """Refuse a geometry that there is none of, and damping that is no use.

    Raises:
        ArgumentError: says what can be asked for.
    """
    check_choice("geometry", geometry, QUERY_GEOMETRIES)
    if damping is not None and geometry == "tracin":
        raise ArgumentError("damping decides nothing with geometry='tracin'. Leave it out, or ask for 'whitened'.")


def whitened(own: Geometry, store: GradientStore, damping: float | None, by_factors: bool = False) -> Whitened:
    """A store's geometry, its queries whitened.

    Args:
        own: the store's.
        store: an open one.
        damping: see :class:`Whitening`; by default ``DEFAULT_DAMPING``.
        by_factors: see :class:`Whitened`.

    Raises:
        ArgumentError: ``damping`` is not positive.
        MismatchError: the store's rows have unit norm.
        StoreError: it has no second moments of its rows.
    """
    if store.manifest.map.unit_norm:
        raise MismatchError(
            f"The rows of {store.folder} have unit norm, and a whitened geometry needs the lengths of gradients. Build "
            "a store without unit_norm, or ask with geometry='tracin'."
        )
    return Whitened(own, Whitening(moments_of(store), damping), by_factors)


class Whitened:
    """Another geometry's rows, compared with whitened queries; see :class:`Whitening` and :class:`Geometry`.

    Rows and norms of training examples stay as they are, so inner products with all rows are its exact scores. They
    have no unit of loss.

    Args:
        inner: the geometry of the store.
        whitening: the map of queries.
        by_factors: whether queries' factors are made beside their rows, of gradients as they are.

    Attributes:
        stamp: which rows' moments, and which damping, queries are whitened by.
    """

    def __init__(self, inner: Geometry, whitening: Whitening, by_factors: bool = False) -> None:
        self.by_factors = by_factors and inner.by_factors
        self._inner, self.whitening, self.stamp = inner, whitening, whitening.stamp
        self.method = f"whitened {inner.method}"
        self.measure = f"{self.method} scores (no unit of loss)"
        self.scales, self.read = inner.scales, inner.read
        self.train, self.query, self.exact = inner.train, inner.query, inner.exact
        self.train_rows, self.joined_rows, self.lengths = inner.train_rows, inner.joined_rows, inner.lengths

    def query_rows(self, rows: Tensor, squares: Tensor) -> Tensor:
        """See :class:`Geometry`."""
        return self.whitening.of(self._inner.query_rows(rows, squares))

    def scores(
        self, products: NDArray[np.float64], norms: NDArray[np.float64], squares: Callable[[], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """See :class:`Geometry`: what is compared are rows."""
        return products
