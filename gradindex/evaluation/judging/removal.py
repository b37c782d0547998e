"""What happens to queries' losses when a ranking's first examples are left out, beside random ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArgumentError, as_whole
from ...output import data_frame, table
from ...task import Task
from .measures import Array, Interval, bootstrap
from .retrainings import BATCH_SIZE, Job, Retrainings
from .running import completed
from .subsets import all_but

RANDOM = "random"


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """Changes of queries' losses without the first k of each ranking; positive: the loss rose.

    Args:
        ks: how many were left out.
        changes: by ranking (len(ks), s, n_query) float64, of each seed and query: the loss without them less the loss
            of a training on all with the same seed; under ``"random"`` without as many at random, others for each seed.
    """

    ks: tuple[int, ...]
    changes: Mapping[str, Array]

    def change(self, ranking: str, k: int) -> Interval:
        """The mean change, with its 95% interval: a bootstrap over queries and seeds, see :func:`bootstrap`."""
        return bootstrap(self.changes[ranking][self.ks.index(k)])

    def beyond_random(self, ranking: str, k: int) -> Interval:
        """The same of what it exceeds random removals by, paired by query and seed."""
        place = self.ks.index(k)
        return bootstrap(self.changes[ranking][place] - self.changes[RANDOM][place])

    def records(self) -> list[dict[str, Any]]:
        """A row for each ranking and k."""
        rows = []
        for name in self.changes:
            for k in self.ks:
                change, beyond = self.change(name, k), self.beyond_random(name, k)
                rows.append(
                    {"without": name, "k": k, "change of loss": change.mean, "from": change.low, "to": change.high}
                    | (
                        {"beyond random": beyond.mean, "from ": beyond.low, "to ": beyond.high}
                        if name != RANDOM
                        else dict.fromkeys(("beyond random", "from ", "to "), float("nan"))
                    )
                )
        return rows

    def __str__(self) -> str:
        n_seeds, n_query = next(iter(self.changes.values())).shape[1:]
        return (
            f"{table(self.records())}\nMean over {n_query} queries and {n_seeds} seeds; from and to: 95% intervals, by "
            "a bootstrap over queries and seeds."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ks": list(self.ks), "records": self.records()}

    def to_pandas(self) -> Any:
        """:meth:`records` as a ``DataFrame``."""
        rows = self.records()
        return data_frame({name: [row[name] for row in rows] for name in rows[0]})


def removal_curve(
    task: Task,
    out: str | os.PathLike[str],
    rankings: Mapping[str, Any],
    queries: Sequence[int],
    ks: Sequence[int],
    *,
    seeds: int = 5,
    processes: int = 1,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> RemovalCurve:
    """Retrain without the first k examples of rankings, and without k random ones.

    Args:
        task: with ``train_model`` and queries.
        out: a folder of retrainings, as for :func:`retrain`; what is there is not trained again.
        rankings: by name, training ids, the first to be left out first, such as
            ``retriever.proponents(queries, k=50, aggregate="mean").ids[0]``, or the nearest by other features.
        queries: positions of those whose losses are compared, which all are left out for jointly.
        ks: how many are left out.
        seeds: trainings of each; their seeds are 0, 1 and so on.
        processes: as for :func:`retrain`.
        seed: of the random removals.
        batch_size: as for :func:`retrain`.

    Raises:
        ArgumentError: a ranking is too short or has an unknown id, or a number is out of range.
        GradIndexError: as for :func:`retrain`.
    """
    counts = tuple(as_whole("ks", k) for k in ks)
    if not counts or not 0 < min(counts) <= max(counts) < len(task.train_ids) or len(set(counts)) < len(counts):
        raise ArgumentError(
            f"ks are {list(counts)}, but must be different numbers from 1 to {len(task.train_ids) - 1}: of training "
            "examples that are left out."
        )
    places = np.array([as_whole("queries", query) for query in queries], dtype=np.int64)
    if not len(places) or places.min() < 0 or places.max() >= task.n_query:
        raise ArgumentError(f"queries are {places.tolist()}, but must be positions from 0 to {task.n_query - 1}.")
    if as_whole("seeds", seeds) < 1:
        raise ArgumentError(f"seeds is {seeds}, but must be at least 1.")
    if RANDOM in rankings:
        raise ArgumentError(f"A ranking is called {RANDOM!r}, as the removals that are drawn here. Rename it.")
    ids = task.train_ids
    for name, ranking in rankings.items():
        if len(ranking) < max(counts):
            raise ArgumentError(f"The ranking {name!r} has {len(ranking)} ids, but max(ks) is {max(counts)}.")
    retrainings = Retrainings(task, out, batch_size)
    whole = np.ones((1, len(ids)), dtype=bool)
    chosen = {name: all_but(ids, [list(ranking)[:k] for k in counts]) for name, ranking in rankings.items()}
    jobs: dict[str, list[list[Job]]] = {name: [] for name in ("", *rankings, RANDOM)}
    for of_seed in range(seeds):
        subsets = {"": whole, **chosen, RANDOM: all_but(ids, _drawn(ids, counts, seed, of_seed))}
        for name, one in subsets.items():
            jobs[name].append(retrainings.jobs(one, [of_seed]))
    done = completed(retrainings, [job for lists in jobs.values() for one in lists for job in one], processes)
    losses = {
        name: np.stack([[done[job.name][0][places] for job in one] for one in lists], 1) for name, lists in jobs.items()
    }
    base = losses.pop("")
    return RemovalCurve(counts, {name: of_ranking - base for name, of_ranking in losses.items()})


def _drawn(ids: NDArray[np.int64], counts: Sequence[int], seed: int, of_seed: int) -> list[NDArray[np.int64]]:
    """Random removals, the smaller among the larger ones."""
    draws = np.random.default_rng([as_whole("seed", seed), of_seed]).random(len(ids))
    order = ids[np.argsort(draws, kind="stable")]
    return [order[:k] for k in counts]
