"""How soon a person who inspects the most suspicious examples first meets the mislabelled ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, DimensionMismatchError
from .judging.measures import average_ranks


def share_found(
    suspicion: NDArray[Any], mislabelled: NDArray[np.bool_], inspected: Sequence[float]
) -> NDArray[np.float64]:
    """Share of the mislabelled examples among the most suspicious ones.

    Source: Pruthi et al. 2020 (arXiv:2002.08484), section 4.1: the fraction of mislabelled
    examples recovered against the fraction of the training data inspected, by self-influence.

    Args:
        suspicion: (n_train,) larger is inspected earlier; equal values in the order of ids.
        mislabelled: (n_train,) bool, which labels are wrong.
        inspected: shares of the training data between 0 and 1; the count is rounded down.

    Returns:
        (len(inspected),) shares between 0 and 1.

    Raises:
        DimensionMismatchError: the two arrays have another length.
        ArgumentError: nothing is mislabelled, or a share is not between 0 and 1.
    """
    _check(suspicion, mislabelled)
    if not all(0 <= share <= 1 for share in inspected):
        raise ArgumentError(f"inspected is {list(inspected)}, but shares must be between 0 and 1.")
    order = np.argsort(-suspicion, kind="stable")
    found = np.concatenate([[0], np.cumsum(mislabelled[order])])
    # The tiny addend keeps 0.3 * 10 from becoming 2.
    counts = [int(share * len(suspicion) + 1e-9) for share in inspected]
    return np.asarray(found[counts] / found[-1], dtype=np.float64)


def roc_auc(suspicion: NDArray[Any], mislabelled: NDArray[np.bool_]) -> float:
    """The area under the ROC curve: how often a mislabelled example is more suspicious than another; ties count half.

    1 is perfect, 0.5 is chance. By ranks (Mann and Whitney 1947).

    Args:
        suspicion: (n_train,) larger is more suspicious.
        mislabelled: (n_train,) bool, which labels are wrong.

    Raises:
        DimensionMismatchError: the two arrays have another length.
        ArgumentError: none or all are mislabelled, or a value is NaN.
    """
    _check(suspicion, mislabelled)
    if mislabelled.all():
        raise ArgumentError("mislabelled has no false value, so there is nothing to tell apart.")
    if np.isnan(suspicion).any():
        raise ArgumentError("suspicion has a NaN, which has no place in an order. Give numbers.")
    n_wrong, n_right = int(mislabelled.sum()), int((~mislabelled).sum())
    above = average_ranks(suspicion)[mislabelled].sum() - n_wrong * (n_wrong + 1) / 2
    return float(above / (n_wrong * n_right))


def _check(suspicion: NDArray[Any], mislabelled: NDArray[np.bool_]) -> None:
    if suspicion.shape != mislabelled.shape or suspicion.ndim != 1:
        raise DimensionMismatchError(
            f"suspicion has shape {suspicion.shape}, but mislabelled {mislabelled.shape}. Give one value an example."
        )
    if not mislabelled.any():
        raise ArgumentError("mislabelled has no true value, so there is no share to find.")
