"""How well scores predict what retrained models do: correlations over subsets, their ceiling, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArgumentError, DimensionMismatchError

Array = NDArray[np.float64]

# Sums of subsets that differ by no more than rounding does, relative to the sum of absolute scores, are one value.
_ROUNDING = 1e-13
# Resamples of a bootstrap, and how many are made at once.
_RESAMPLES, _AT_ONCE = 2000, 250


@dataclass(frozen=True, eq=False)
class LDS:
    """A linear datamodeling score.

    Args:
        correlations: (n_query,) float64, Spearman's, between minus the loss under each retrained model and the summed
            scores of what it was trained on; NaN for queries whose losses, or summed scores, are all equal.
    """

    correlations: Array

    @property
    def counted(self) -> int:
        """How many queries have a correlation."""
        return int(np.isfinite(self.correlations).sum())

    @property
    def left_out(self) -> int:
        """How many have none, because their losses or their scores are all equal."""
        return len(self.correlations) - self.counted

    @property
    def mean(self) -> float:
        """Over the queries that have a correlation; NaN where none has."""
        return float(np.nanmean(self.correlations)) if self.counted else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean, over queries; NaN below two."""
        if self.counted < 2:
            return math.nan
        return float(np.nanstd(self.correlations, ddof=1) / math.sqrt(self.counted))


@dataclass(frozen=True)
class Ceiling:
    """How far losses of retrained models repeat, which bounds what any score can predict of them.

    Two seeds of the same subsets are the same expected loss with independent noise, so that a perfect predictor of the
    expected loss correlates by the square root of the seeds' own correlation with one seed (attenuation: Spearman
    1904), and with the mean of s seeds by the square root of s r / (1 + (s - 1) r) (Spearman-Brown).

    Args:
        correlation: r, Spearman's over subsets, between seeds; mean over queries and pairs of seeds.
        standard_error: of it, over queries.
        n_seeds: s.
    """

    correlation: float
    standard_error: float
    n_seeds: int

    @property
    def of_one(self) -> float:
        """The LDS of a perfect predictor against one seed."""
        return math.sqrt(max(0.0, self.correlation))

    @property
    def of_mean(self) -> float:
        """The same against the mean of all seeds."""
        r = max(0.0, self.correlation)
        return math.sqrt(self.n_seeds * r / (1 + (self.n_seeds - 1) * r))


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float


def average_ranks(values: NDArray[Any]) -> Array:
    """(..., m) float64 ranks along the last axis, from 1; equal values share the mean of theirs."""
    flat = np.asarray(values).reshape(-1, values.shape[-1])
    order = np.argsort(flat, axis=1, kind="stable")
    ordered = np.take_along_axis(flat, order, 1)
    begins = np.ones(flat.shape, dtype=bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = np.cumsum(begins) - 1  # of equal values; each row begins one
    places = np.broadcast_to(np.arange(1, flat.shape[1] + 1), flat.shape).ravel()
    means = np.bincount(run, places) / np.bincount(run)
    ranks = np.empty(flat.shape)
    np.put_along_axis(ranks, order, means[run].reshape(flat.shape), 1)
    return ranks.reshape(values.shape)


def spearman(one: NDArray[Any], other: NDArray[Any]) -> Array:
    """(...) float64 Spearman correlations along the last axis of (..., m), with average ranks for equal values.

    NaN where all values of a side are equal, or there are fewer than two.
    """
    centred = [ranks - ranks.mean(-1, keepdims=True) for ranks in (average_ranks(one), average_ranks(other))]
    norms = np.sqrt(np.square(centred[0]).sum(-1) * np.square(centred[1]).sum(-1))
    products = (centred[0] * centred[1]).sum(-1)
    return np.where(norms > 0, products / np.where(norms > 0, norms, 1), math.nan)


def lds(scores: NDArray[Any], subsets: NDArray[np.bool_], losses: NDArray[Any]) -> LDS:
    """The linear datamodeling score: how well sums of scores rank retrained models by a query's loss.

        LDS(z') = Spearman over subsets S of ( -loss(z'; trained on S), sum of scores(z, z') over z in S )

    Source: Park et al. 2023 (arXiv:2303.14186), definition 2.4.

    Args:
        scores: (n_query, n) of all examples that subsets are drawn from; larger lowers the loss more.
        subsets: (m, n) bool, what each model was trained on.
        losses: (m, n_query) of the queries under each model.

    Raises:
        DimensionMismatchError: the shapes do not fit together.
        ArgumentError: there are fewer than two subsets, or a number is not finite.
    """
    if scores.ndim != 2 or subsets.ndim != 2 or scores.shape[1] != subsets.shape[1]:
        raise DimensionMismatchError(
            f"scores have shape {scores.shape} and subsets {subsets.shape}, but must be (n_query, n) and (m, n). "
            "Give a score for each example that subsets are drawn from."
        )
    scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        raise ArgumentError("scores have a NaN or infinite value. Give finite scores.")
    return lds_of_sums(scores @ subsets.T.astype(np.float64), losses, np.abs(scores).sum(1))


def lds_of_sums(sums: Array, losses: NDArray[Any], scale: Array) -> LDS:
    """The same from the sums of scores alone.

    Args:
        sums: (n_query, m) of each subset.
        losses: (m, n_query).
        scale: (n_query,) sums of absolute scores, by which it is told whether sums differ by more than rounding.

    Raises:
        DimensionMismatchError: the shapes do not fit together.
        ArgumentError: there are fewer than two subsets, or a loss is not finite.
    """
    if losses.shape != sums.shape[::-1]:
        raise DimensionMismatchError(
            f"losses have shape {losses.shape}, but with {sums.shape[1]} subsets and {sums.shape[0]} queries they must "
            f"be of shape {sums.shape[::-1]}: a row for each subset."
        )
    if len(losses) < 2:
        raise ArgumentError(f"There are {len(losses)} subsets, but a correlation needs at least 2. Retrain more.")
    check_finite(losses)
    differ = np.ptp(sums, axis=1) > _ROUNDING * scale
    return LDS(np.where(differ, spearman(sums, -losses.T), math.nan))


def ceiling(losses: NDArray[Any]) -> Ceiling:
    """How well a perfect predictor would do, from several retrainings of each subset.

    Args:
        losses: (s, m, n_query) of s seeds of the same m subsets.

    Raises:
        ArgumentError: there are fewer than two seeds or subsets, or a loss is not finite.
    """
    if losses.ndim != 3 or losses.shape[0] < 2 or losses.shape[1] < 2:
        raise ArgumentError(
            f"losses have shape {losses.shape}, but a ceiling needs (seeds, subsets, n_query) with at least 2 seeds "
            "and 2 subsets. Retrain with more seeds."
        )
    for of_seed in losses:
        check_finite(of_seed)
    pairs = [spearman(losses[a].T, losses[b].T) for a, b in combinations(range(len(losses)), 2)]
    between = LDS(np.mean(pairs, axis=0))
    return Ceiling(between.mean, between.standard_error, len(losses))


def bootstrap(changes: NDArray[Any], seed: int = 0) -> Interval:
    """The mean of (s, n_query) values and its 95% interval: seeds and queries are drawn with replacement, both anew.

    The 2.5th and 97.5th percentile of 2,000 resamples. With one seed, only queries are resampled.

    Args:
        changes: of each seed and query.
        seed: of the resampling.
    """
    values = np.asarray(changes, dtype=np.float64)
    n_seeds, n_query = values.shape
    generator = np.random.default_rng(seed)

    def drawn(count: int, n: int) -> Array:
        """(count, n) how often each is in a resample, over n."""
        places = generator.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        return np.bincount(places.ravel(), minlength=count * n).reshape(count, n) / n

    means = [
        ((drawn(_AT_ONCE, n_seeds) @ values) * drawn(_AT_ONCE, n_query)).sum(1) for _ in range(_RESAMPLES // _AT_ONCE)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def check_finite(losses: NDArray[Any], name: Callable[[int], str] = "query {}".format) -> None:
    """Refuse losses (m, n_query) that are not finite.

    Raises:
        ArgumentError: names the first subset and query.
    """
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
        subset, query = map(int, bad[0])
        raise ArgumentError(
            f"The loss of {name(query)} under subset {subset} is {losses[subset, query]}. Give finite losses, or leave "
            "the query out."
        )
