"""Which checkpoints, how many numbers and which damping predict retraining best, and what removing the top 1% does.

On dattri's MNIST-MLP (protocols.py), rows of int8. Settings are compared by the linear datamodeling score against the
first seed of the trainings that lds.py reports with all of its seeds. Removals: without the 50 training digits that are
the strongest proponents of 20 test digits together, by whitened scores, by TracIn's, and 50 random ones; five trainings
of each. What is trained is kept in GRADINDEX_CACHE/quality.

    python scripts/quality/settings.py [--quick] [--json] [--data DIR] [--save FILE] [--parts settings tracin removal]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import numpy as np
from harness import Bench
from numpy.typing import NDArray

import gradindex
from gradindex import evaluation
from gradindex.projection import Projection
from gradindex.retrieval.scoring import row_shares
from gradindex.retrieval.whitening import DEFAULT_DAMPING
from gradindex.store import second_moments

DIMS, DIM, QUICK_DIM = (256, 512, 1024, 2048), 1024, 32
DAMPINGS = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2)
# Of the nine recorded ones, by their places.
CHECKPOINTS = {"1": [0], "3": [2], "11": [6], "20": [8], "1, 2, 3": [0, 1, 2], "11, 15, 20": [6, 7, 8],
               "1, 4, 11": [0, 3, 6], "1, 3, 6, 11, 20": [0, 2, 4, 6, 8]}  # fmt: skip
ASKED, TOP, QUICK_TOP = 20, 50, 10


def main() -> None:
    """Measure and print."""
    from protocols import MLP, task

    bench = Bench("Settings of whitened scores", __doc__, parts={"parts": ("settings", "tracin", "removal")})
    one = task(MLP)
    if "settings" in bench.options.parts:
        settings(bench, one, MLP.folder)
    if "tracin" in bench.options.parts:
        tracin(bench, one, MLP.folder)
    if "removal" in bench.options.parts:
        removal(bench, one, MLP.folder)
    bench.finish()


def whitened_store(bench: Bench, one: gradindex.Task, folder: Path, dim: int) -> Path:
    """A store of all recorded checkpoints, with its second moments."""
    store = gradindex.build(one, folder / f"settings-{dim}", projection=Projection(dim=dim), row_type="int8")
    second_moments(store.folder)
    return store.folder


def settings(bench: Bench, one: gradindex.Task, folder: Path) -> None:
    """Numbers, checkpoints and damping."""
    judged = judging(bench, one, folder)
    every = len(one.checkpoints)
    for dim in (QUICK_DIM,) if bench.quick else DIMS:
        shares = shares_of(one, whitened_store(bench, one, folder, dim))
        chosen = {"all": list(range(every))} | ({"first": [0]} if bench.quick else CHECKPOINTS)
        for name, places in chosen.items():
            bench.row(
                "numbers and checkpoints",
                {"numbers a checkpoint": dim, "after epochs": name, "bytes a row": len(places) * (dim + 4)}
                | judged(shares[:, :, places].sum(2)),
            )
    dim = QUICK_DIM if bench.quick else DIM
    for damping in (DAMPINGS[2],) if bench.quick else DAMPINGS:
        scores = shares_of(one, folder / f"settings-{dim}", damping).sum(2)
        bench.row("damping", {"damping": damping, "numbers a checkpoint": dim} | judged(scores))


def judging(bench: Bench, one: gradindex.Task, folder: Path) -> Callable[[NDArray[Any]], dict[str, float]]:
    """What gives the LDS of scores (n_query, n_train) against the first seed of the trainings."""
    subsets = evaluation.random_subsets(one.n_train, 6 if bench.quick else 100)
    truth = evaluation.retrain(one, folder / "retrainings", subsets, seeds=1)

    def judged(scores: NDArray[Any]) -> dict[str, float]:
        found = evaluation.lds(scores, truth.subsets, truth.losses[0])
        return {"LDS of one seed": found.mean, "standard error": found.standard_error}

    return judged


def tracin(bench: Bench, one: gradindex.Task, folder: Path) -> None:
    """TracIn by whole gradients, beside whitened rows of the same checkpoints."""
    judged = judging(bench, one, folder)
    store = whitened_store(bench, one, folder, QUICK_DIM if bench.quick else DIM)
    for geometry in ("tracin", "whitened"):
        retriever = gradindex.load(one, store, geometry=geometry, use_index=False)
        bench.row("geometries", {"geometry": geometry} | judged(retriever.exact_scores(range(one.n_query))))


def shares_of(one: gradindex.Task, folder: Path, damping: float = DEFAULT_DAMPING) -> NDArray[np.float64]:
    """(n_query, n_train, C) whitened scores by checkpoint."""
    retriever = gradindex.load(one, folder, geometry="whitened", damping=damping, use_index=False)
    rows = retriever.query_rows(range(one.n_query))
    return row_shares(retriever.store, rows, retriever.store.ids)[..., 0]


def removal(bench: Bench, one: gradindex.Task, folder: Path) -> None:
    """Losses of some queries without their strongest proponents."""
    store = whitened_store(bench, one, folder, QUICK_DIM if bench.quick else DIM)
    top, seeds = (QUICK_TOP, 2) if bench.quick else (TOP, 5)
    queries = np.random.default_rng(3).choice(one.n_query, ASKED, replace=False).tolist()
    rankings = {}
    for geometry in ("whitened", "tracin"):
        retriever = gradindex.load(one, store, geometry=geometry, use_index=False)
        rankings[geometry] = retriever.proponents(queries, k=top, aggregate="mean").ids[0]
    curve = evaluation.removal_curve(one, folder / "retrainings", rankings, queries, [top], seeds=seeds)
    for row in curve.records():
        bench.row("removal of the top 1%", row)
    less = curve.changes["whitened"][0] - curve.changes["tracin"][0]
    found = evaluation.bootstrap(less)
    bench.bar("loss without whitened's top 1%, above that without TracIn's, 95% from", found.low, "nats", 0)
    bench.figure("the same, mean", found.mean, "nats")
    bench.figure("the same, 95% to", found.high, "nats")


if __name__ == "__main__":
    main()
