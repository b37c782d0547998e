"""A store's scores beside baselines: how well each predicts what retrained models do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...choices import QueryGeometry
from ...errors import ArgumentError, DimensionMismatchError, MismatchError
from ...output import data_frame, table
from ...retrieval.retriever import Retriever, load
from ...store import GradientStore, Part
from ...task import Task
from .measures import LDS, Array, lds_of_sums
from .retrainings import BATCH_SIZE
from .running import Seeds, retrain
from .subsets import random_subsets
from .truth import GroundTruth

# Examples whose random scores are drawn at once.
_AT_ONCE = 4096

# Sums of scores (n_query, m) of each subset, and of absolute scores (n_query,).
Sums = tuple[Array, Array]


@dataclass(frozen=True, eq=False)
class Judged:
    """How well one kind of scores predicts retrained models.

    Args:
        name: of the scores.
        of_mean: their LDS against the mean loss of all seeds.
        of_one: against one seed's losses, mean over seeds.
        seconds: that the scores of all queries took.
    """

    name: str
    of_mean: LDS
    of_one: LDS
    seconds: float


@dataclass(frozen=True, eq=False)
class Judgement:
    """Scores beside each other; prints as a table.

    Args:
        truth: what they were compared with.
        rows: of each kind of scores.
    """

    truth: GroundTruth
    rows: tuple[Judged, ...] = field(default=())

    def __getitem__(self, name: str) -> Judged:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def records(self) -> list[dict[str, Any]]:
        """A row for each kind of scores. With one seed there is one LDS, else one against the mean and one of one."""
        several = self.truth.n_seeds > 1
        return [
            {"scores": row.name, "LDS": row.of_mean.mean, "+-": row.of_mean.standard_error}
            | ({"LDS of one seed": row.of_one.mean, "+- ": row.of_one.standard_error} if several else {})
            | {"queries": row.of_mean.counted, "left out": row.of_mean.left_out, "seconds": row.seconds}
            for row in self.rows
        ]

    @property
    def notes(self) -> list[str]:
        """What the numbers mean, and how high they can be."""
        truth, ceiling = self.truth, self.truth.ceiling
        trainings = len(truth.subsets) * truth.n_seeds
        sizes = np.unique(truth.subsets.sum(1))
        size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        took = f", {truth.seconds:,.0f} s of training" if truth.seconds == truth.seconds else ""
        said = [
            f"{trainings:,} retrainings: {len(truth.subsets):,} subsets of {size} of {len(truth.ids):,} training "
            f"examples, {truth.n_seeds} seed{'s' * (truth.n_seeds != 1)}{took}",
            "LDS: Spearman correlation over subsets between minus the loss and the summed scores, mean over queries; "
            "+-: standard error over queries",
        ]
        if ceiling is None:
            said.append("ceiling: unknown with one seed")
        else:
            said.append(
                f"ceiling: two seeds correlate {ceiling.correlation:.3g}, so a perfect predictor has an LDS of "
                f"{ceiling.of_mean:.3g}, and {ceiling.of_one:.3g} of one seed"
            )
        return said

    def __str__(self) -> str:
        return "\n".join([table(self.records()), *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        truth, ceiling = self.truth, self.truth.ceiling
        limits = None
        if ceiling is not None:
            limits = {"correlation": ceiling.correlation, "standard_error": ceiling.standard_error}
            limits |= {"of_one_seed": ceiling.of_one, "of_mean": ceiling.of_mean}
        return {
            "n_subsets": len(truth.subsets),
            "n_seeds": truth.n_seeds,
            "n_train": len(truth.ids),
            "n_query": truth.n_query,
            "training_seconds": truth.seconds,
            "ceiling": limits,
            "records": [
                {
                    "scores": row.name,
                    "lds": row.of_mean.mean,
                    "standard_error": row.of_mean.standard_error,
                    "lds_of_one_seed": row.of_one.mean,
                    "standard_error_of_one_seed": row.of_one.standard_error,
                    "queries": row.of_mean.counted,
                    "left_out": row.of_mean.left_out,
                    "seconds": row.seconds,
                }
                for row in self.rows
            ],
        }

    def to_pandas(self) -> Any:
        """The records of :meth:`to_dict` as a ``DataFrame``."""
        rows = self.to_dict()["records"]
        return data_frame({name: [row[name] for row in rows] for name in rows[0]})


def judge(
    task: Task,
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    retrainings: int = 100,
    share: float = 0.5,
    seeds: Seeds = 2,
    processes: int = 1,
    truth: GroundTruth | None = None,
    scores: Mapping[str, NDArray[Any]] | None = None,
    geometries: Sequence[QueryGeometry] = ("tracin",),
    damping: float | None = None,
    iterations: int | None = None,
    device: str | None = None,
    seed: int = 0,
) -> Judgement:
    """Judge a store's scores by what models do that are retrained on random subsets of the training examples.

    Trainings that are missing in ``out`` are made; what is there is used, whichever scores it was made for.

    Args:
        task: that the store was built from, with queries and, unless there is ``truth``, ``train_model``.
        folder: of the store.
        out: of the retrainings, see :func:`retrain`; needed without ``truth``.
        retrainings: how many random subsets.
        share: of the training examples that each holds.
        seeds: of the trainings, as for :func:`retrain`. Two tell the ceiling.
        processes: how many train at a time.
        truth: ground truth that was made elsewhere, or on subsets of your own.
        scores: further scores to judge, by name (n_query, n) of ``task.train_ids``, or the ids of ``truth``.
        geometries: in which the store's scores are judged, side by side, see :func:`gradindex.load`.
        damping: of whitened ones, see there.
        iterations: of ``"whitened-exact"``, see there.
        device: where to compute scores.
        seed: of the subsets.

    Returns:
        A table of the store's scores in each geometry, those of ``scores``, and two baselines: each training example's
        own loss at the last checkpoint, and random numbers.

    Raises:
        ArgumentError: neither ``out`` nor ``truth`` is given, or a number is out of range.
        MismatchError: the truth is of other queries, or of training examples that the store has no row of.
        GradIndexError: as for :func:`gradindex.load` and :func:`retrain`.
    """
    if (out is None) == (truth is None):
        raise ArgumentError("judge needs either out, a folder for retrainings, or truth that was made elsewhere.")
    if not geometries or len(set(geometries)) < len(geometries):
        raise ArgumentError(f"geometries are {list(geometries)}, but must be different ones, at least one.")
    turned = any(geometry != "tracin" for geometry in geometries)  # else load says that damping decides nothing
    retrievers = {
        geometry: load(
            task, folder, device=device, use_index=False, geometry=geometry,
            damping=None if turned and geometry == "tracin" else damping,
            iterations=None if geometry != "whitened-exact" and "whitened-exact" in geometries else iterations,
        )
        for geometry in geometries
    }  # fmt: skip
    retriever = retrievers[geometries[0]]
    if truth is None:
        assert out is not None
        _check_rows(retriever, task.train_ids)
        truth = halves(
            task, folder, out, retrainings=retrainings, share=share, seeds=seeds, processes=processes, seed=seed
        )
        assert truth is not None  # of no part
    if truth.n_query != task.n_query:
        raise MismatchError(f"The ground truth is of {truth.n_query} queries, but the task has {task.n_query}.")
    _check_rows(retriever, truth.ids)
    ways: dict[str, Callable[[], Sums]] = {
        geometry: partial(_of_store, opened, truth) for geometry, opened in retrievers.items()
    }
    for name, given in (scores or {}).items():
        ways[name] = partial(_of_array, name, given, truth)
    ways |= {"loss": partial(_of_losses, retriever, truth), "random": partial(_of_chance, truth, seed)}
    return Judgement(truth, tuple(_judged(name, way, truth) for name, way in ways.items()))


def halves(
    task: Task,
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    retrainings: int = 100,
    share: float = 0.5,
    seeds: Seeds = 2,
    processes: int = 1,
    seed: int = 0,
    part: Part | None = None,
) -> GroundTruth | None:
    """The retrainings that :func:`judge` compares a store's scores with, or a part of them, see :func:`retrain`."""
    subsets = random_subsets(len(task.train_ids), retrainings, share, seed)
    alone = GradientStore(folder).manifest.batch_size == 1
    batch_size = 1 if alone else BATCH_SIZE
    return retrain(task, out, subsets, seeds=seeds, processes=processes, part=part, batch_size=batch_size)


def _judged(name: str, way: Callable[[], Sums], truth: GroundTruth) -> Judged:
    started = time.perf_counter()
    sums, scale = way()
    seconds = time.perf_counter() - started
    singly = [lds_of_sums(sums, losses, scale).correlations for losses in truth.losses]
    of_mean = lds_of_sums(sums, truth.mean_losses, scale)
    return Judged(name, of_mean, LDS(np.mean(singly, axis=0)), round(seconds, 3))


def _check_rows(retriever: Retriever, ids: NDArray[np.int64]) -> None:
    missing = np.setdiff1d(ids, retriever.store.ids)
    if len(missing):
        raise MismatchError(
            f"{retriever.store.folder} has no row of {len(missing):,} of the {len(ids):,} training examples that are "
            f"trained on (such as {missing[0]}), so their scores are unknown. Add them with gradindex add, or skip "
            "them in the task."
        )


def _of_store(retriever: Retriever, truth: GroundTruth) -> Sums:
    sums, scale = np.zeros((truth.n_query, len(truth.subsets))), np.zeros(truth.n_query)
    for which, ids, scores in retriever.exact_pieces(retriever.prepare(range(truth.n_query))):
        meant = np.isin(ids, truth.ids)
        found = np.asarray(scores, dtype=np.float64)[:, meant]
        sums[which] += found @ truth.subsets[:, np.searchsorted(truth.ids, ids[meant])].T.astype(np.float64)
        scale[which] += np.abs(found).sum(1)
    return sums, scale


def _of_array(name: str, scores: NDArray[Any], truth: GroundTruth) -> Sums:
    if scores.shape != (truth.n_query, len(truth.ids)):
        raise DimensionMismatchError(
            f"The scores {name!r} have shape {scores.shape}, but must be of shape ({truth.n_query}, {len(truth.ids)}): "
            "of each query and training example."
        )
    values = scores.astype(np.float64)
    if not np.isfinite(values).all():
        raise ArgumentError(f"The scores {name!r} have a NaN or infinite value. Give finite scores.")
    return values @ truth.subsets.T.astype(np.float64), np.abs(values).sum(1)


def _of_losses(retriever: Retriever, truth: GroundTruth) -> Sums:
    losses = retriever.store.losses(truth.ids)[:, -1]
    sums = truth.subsets.astype(np.float64) @ losses
    return np.broadcast_to(sums, (truth.n_query, len(sums))), np.full(truth.n_query, np.abs(losses).sum())


def _of_chance(truth: GroundTruth, seed: int) -> Sums:
    generator = np.random.default_rng([seed, 1])
    sums, scale = np.zeros((truth.n_query, len(truth.subsets))), np.zeros(truth.n_query)
    for start in range(0, len(truth.ids), _AT_ONCE):
        piece = truth.subsets[:, start : start + _AT_ONCE].T.astype(np.float64)
        draws = generator.standard_normal((truth.n_query, len(piece)))
        sums, scale = sums + draws @ piece, scale + np.abs(draws).sum(1)
    return sums, scale
