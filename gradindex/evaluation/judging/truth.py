"""Ground truth: losses of queries under models that were trained on subsets, wherever these were trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...errors import ArgumentError, DimensionMismatchError, as_whole, check_choice
from .measures import Array, Ceiling, ceiling, check_finite
from .subsets import Subsets, of_lists

# What dattri's target values are.
TargetValues = Literal["minus losses", "losses", "margins"]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """What queries' losses are under models that were trained on subsets of the training examples.

    :func:`retrain` makes it, :meth:`of` takes arrays, :meth:`from_dattri` what dattri's benchmark publishes.

    Args:
        ids: (n,) int64 ascending, the training examples that subsets are drawn from.
        subsets: (m, n) bool, what each model was trained on.
        losses: (s, m, n_query) float64, of s seeds.
        seconds: that the trainings took; NaN where it is not known.
    """

    ids: NDArray[np.int64]
    subsets: Subsets
    losses: Array
    seconds: float = math.nan

    def __post_init__(self) -> None:
        if self.losses.ndim != 3 or self.losses.shape[1] != len(self.subsets):
            raise DimensionMismatchError(
                f"losses have shape {self.losses.shape}, but with {len(self.subsets)} subsets they must be of shape "
                f"({len(self.subsets)}, n_query), or (seeds, {len(self.subsets)}, n_query)."
            )
        if self.subsets.ndim != 2 or self.subsets.shape[1] != len(self.ids):
            raise DimensionMismatchError(
                f"subsets have shape {self.subsets.shape}, but with {len(self.ids)} training examples they must be of "
                f"shape (m, {len(self.ids)})."
            )
        if len(self.subsets) < 2:
            raise ArgumentError(f"There are {len(self.subsets)} subsets, but a correlation needs at least 2.")
        if not (self.n_query and len(self.losses)):
            raise ArgumentError(f"losses have shape {self.losses.shape}, so there are none. Give at least one query.")
        for of_seed in self.losses:
            check_finite(of_seed)

    def __repr__(self) -> str:
        return (
            f"<GroundTruth: {len(self.subsets):,} subsets of {len(self.ids):,} training examples, {self.n_seeds} "
            f"seed{'s' * (self.n_seeds != 1)}, {self.n_query:,} queries>"
        )

    @property
    def n_seeds(self) -> int:
        """How often each subset was trained on."""
        return len(self.losses)

    @property
    def n_query(self) -> int:
        """The number of queries."""
        return int(self.losses.shape[2])

    @property
    def mean_losses(self) -> Array:
        """(m, n_query) float64, over seeds."""
        return np.asarray(self.losses.mean(0))

    @property
    def ceiling(self) -> Ceiling | None:
        """See :func:`ceiling`; ``None`` with one seed."""
        return ceiling(self.losses) if self.n_seeds > 1 else None

    @classmethod
    def of(cls, subsets: Any, losses: Any, *, n_train: int | None = None, ids: Any = None) -> GroundTruth:
        """Ground truth that was made elsewhere.

        Args:
            subsets: (m, n) bool, or m lists of training ids.
            losses: (m, n_query), or (s, m, n_query) of s seeds.
            n_train: how many training examples there are; needed for lists where ``ids`` are not given.
            ids: (n,) those that subsets are drawn from, ascending; by default 0 to n - 1.

        Raises:
            DimensionMismatchError: the shapes do not fit together.
            ArgumentError: an id is unknown, a loss is not finite, or there are fewer than two subsets.
        """
        given = _as_array("losses", losses)
        mask = isinstance(subsets, np.ndarray) and subsets.dtype == np.bool_
        if ids is None:
            if n_train is None and not mask:
                raise ArgumentError("subsets are lists of ids, of how many training examples? Give n_train.")
            ids = np.arange(subsets.shape[-1] if n_train is None else as_whole("n_train", n_train))
        known = np.asarray(ids, dtype=np.int64)
        if known.ndim != 1 or (known[1:] <= known[:-1]).any():
            raise ArgumentError("ids must be one ascending list of different training ids.")
        if len(subsets) < 2:
            raise ArgumentError(f"There are {len(subsets)} subsets, but a correlation needs at least 2.")
        return cls(known, subsets if mask else of_lists(known, subsets), given[None] if given.ndim == 2 else given)

    @classmethod
    def from_dattri(
        cls, groundtruth: Sequence[Any], n_train: int, values: TargetValues = "minus losses"
    ) -> GroundTruth:
        """The ground truth that dattri's ``load_benchmark(..., metric="lds")`` returns beside the models.

        Args:
            groundtruth: target values (m, n_query) and indices (m, size), tensors or arrays: the i-th model was trained
                on the examples of the i-th row of indices.
            n_train: how many training examples the indices count through.
            values: what the target values are. ``dattri.metric.calculate_lds_ground_truth`` turns the sign of what its
                target function gives, so that larger is better: of losses these are ``"minus losses"``. ``"margins"``
                are larger where it is better as well; ``"losses"`` had their sign left.

        Raises:
            DimensionMismatchError: the shapes do not fit together.
            ArgumentError: an index is out of range, or the values cannot be what ``values`` says.
        """
        check_choice("values", values, get_args(TargetValues))
        if len(groundtruth) != 2:
            raise ArgumentError(f"groundtruth has {len(groundtruth)} parts, but must be (target values, indices).")
        targets, indices = _as_array("target values", groundtruth[0]), np.asarray(groundtruth[1])
        if targets.ndim != 2 or indices.ndim != 2 or len(targets) != len(indices):
            raise DimensionMismatchError(
                f"Target values have shape {targets.shape} and indices {indices.shape}, but must be (m, n_query) and "
                "(m, size), a row for each model."
            )
        if values == "minus losses" and (targets >= 0).all():
            raise ArgumentError(
                "No target value is negative, so they are no minus losses. Say values='losses', or values='margins'."
            )
        return cls.of(indices.astype(np.int64), targets if values == "losses" else -targets, n_train=n_train)


def _as_array(name: str, values: Any) -> Array:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DimensionMismatchError(
            f"{name} are no array of numbers. Give each subset as many, one a query."
        ) from None
