"""What the approximations cost (figure 2 of the paper): checkpoints instead of steps, and projections.

The truth is per-step TracIn of the reference training on MNIST (scripts/tasks/mnist.py), for each training
example z and each of 100 test points z':

    sum over the steps t that used z of eta / b <grad l(w_t; z), grad l(w_t; z')>

(Pruthi et al. 2020, minibatch form). It is computed once, with exact_scores at the weights before each step, and
cached beside a checkpoint of each epoch. TracInCP over chosen checkpoints, and its projected forms, are then
correlated with it over the training examples, for each test point.

python scripts/paper/approximations.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import NEUTRAL, OPPONENT, PROPONENT, Experiment, pearson, quietly, rounded
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.utils.data import Subset

import gradindex
from gradindex import Checkpoint, Recorder, Task, exact_scores, find_checkpoints
from gradindex.checkpoint import by_loss_drop, evenly
from gradindex.projection import Projection

N_QUERY, N_PROJECTED, SEED = 100, 2000, 0
VERSION = "mnist-per-step-1"  # raise it when the truth changes
COUNTS = (1, 2, 3, 5, 10, 20)
KINDS = ("fitted", "tensorsketch", "gaussian", "kronecker")
DIMS = (16, 64, 256, 1024)
SLOW_DIM = 64  # a dense map takes time in proportion to its size: 235,146 numbers for each one of it

Scores = NDArray[Any]


def main() -> None:
    """Measure and print."""
    experiment = Experiment("MNIST: correlation with per-step TracIn", __doc__)
    import mnist
    import reference

    quick = experiment.quick
    epochs, n_train, n_query = (4, 1000, 20) if quick else (mnist.EPOCHS, mnist.N_TRAIN, N_QUERY)
    task = mnist.task()
    task = replace(
        task,
        train=Subset(task.train, range(n_train)),
        query=Subset(task.query, range(n_query)),
        columns={},
        query_columns={},
    )
    fill = partial(trace, task, epochs)
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder))
            measure(experiment, task, Path(folder))
    else:
        measure(experiment, task, reference.once(reference.cache_folder() / "paper" / VERSION, fill))
    experiment.finish()


def trace(task: Task, epochs: int, folder: Path) -> None:
    """Train; write per-step TracIn as ``truth.npy`` (n_query, n_train), and a checkpoint with its loss each epoch."""
    import mnist

    items = [task.query[i] for i in range(task.n_query)]
    pictures, labels = (torch.stack(parts) for parts in zip(*(task.train[i] for i in range(task.n_train)), strict=True))
    training = mnist.Training(pictures, labels)
    recorder = Recorder(training.model, training.optimizer, folder)
    truth = np.zeros((task.n_query, task.n_train))
    for epoch in range(1, epochs + 1):
        started, losses = time.perf_counter(), []
        for rows, batch_losses in training.epoch():
            with quietly():
                truth[:, rows.numpy()] += scores_at(
                    training.model, task, items, rows.numpy(), mnist.LEARNING_RATE / len(rows)
                )
            losses.append(batch_losses.mean())
        recorder.save(float(torch.stack(losses).mean()))
        taken = time.perf_counter() - started
        print(f"per-step TracIn: epoch {epoch} of {epochs}, {taken:.0f} s", file=sys.stderr, flush=True)
    np.save(folder / "truth.npy", truth.astype(np.float32))


def scores_at(
    model: torch.nn.Module, task: Task, items: Sequence[Any], rows: NDArray[np.int64], weight: float
) -> Scores:
    """(n_query, rows) exact scores at the present weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(model.state_dict(), path)
        return exact_scores(replace(task, checkpoints=[Checkpoint(path, learning_rate=weight)]), items, rows)


def measure(experiment: Experiment, task: Task, folder: Path) -> None:
    """Correlate with the truth of ``folder``."""
    truth, checkpoints = np.load(folder / "truth.npy"), find_checkpoints(folder)
    items = [task.query[i] for i in range(task.n_query)]
    # TracInCP is a sum over checkpoints, so each is computed once and any choice of them is a sum.
    at = {item.step: exact_scores(replace(task, checkpoints=[item]), items) for item in checkpoints}
    experiment.keep("training loss of each epoch", rounded([item.loss() for item in checkpoints]))

    def agreement(chosen: Sequence[Checkpoint]) -> float:
        return float(pearson(sum(at[item.step] for item in chosen), truth).mean())

    n = len(checkpoints)
    counts = [count for count in COUNTS if count <= n]
    ways: dict[str, Callable[[list[Checkpoint], int], list[Checkpoint]]] = {
        "middles of equal spans (evenly)": evenly,
        "ends of equal spans": lambda found, count: [found[k * n // count - 1] for k in range(1, count + 1)],
        "largest loss drops (by_loss_drop)": by_loss_drop,
        "first": lambda found, count: found[:count],
        "middle": lambda found, count: found[(n - count) // 2 :][:count],
        "last": lambda found, count: found[n - count :],
    }
    by_way = {name: [agreement(choose(checkpoints, count)) for count in counts] for name, choose in ways.items()}
    for name, values in by_way.items():
        for count, value in zip(counts, values, strict=True):
            experiment.figure(f"{count} checkpoints, {name}: mean Pearson", value, "")
    experiment.keep("mean Pearson by choice and count", {"counts": counts} | {k: rounded(v) for k, v in by_way.items()})
    alone = [agreement([item]) for item in checkpoints]
    experiment.keep("mean Pearson of each epoch's checkpoint alone", rounded(alone))
    experiment.figure(f"all {n} checkpoints, one an epoch: mean Pearson", agreement(checkpoints), "")

    chosen = evenly(checkpoints, min(5, n))
    some = np.sort(np.random.default_rng(SEED).permutation(task.n_train)[: 200 if experiment.quick else N_PROJECTED])
    small = replace(task, train=Subset(task.train, some.tolist()), checkpoints=chosen)
    exact = sum(at[item.step] for item in chosen)[:, some]
    limit = float(pearson(exact, truth[:, some]).mean())
    experiment.figure(f"projections: {len(chosen)} checkpoints, nothing projected: mean Pearson", limit, "")
    by_kind: dict[str, dict[int, float]] = {}
    for kind in KINDS:
        dims = DIMS[:2] if experiment.quick else [dim for dim in DIMS if kind != "gaussian" or dim <= SLOW_DIM]
        for dim in dims if not (experiment.quick and kind == "gaussian") else ():
            started = time.perf_counter()
            size, scores = projected(small, Projection(kind, dim))
            value = float(pearson(scores, truth[:, some]).mean())
            by_kind.setdefault(kind, {})[size] = value
            print(f"{kind}, {dim} numbers a checkpoint: {time.perf_counter() - started:.0f} s", file=sys.stderr)
            experiment.figure(f"{kind}, {size:,} numbers a row: mean Pearson", value, "")
            experiment.figure(
                f"{kind}, {size:,} numbers a row: with unprojected TracInCP", float(pearson(scores, exact).mean()), ""
            )
    experiment.keep("mean Pearson by projection and numbers a row", by_kind)
    experiment.draw(drawn(counts, by_way, alone, by_kind, limit))


def projected(task: Task, projection: Projection) -> tuple[int, Scores]:
    """The length of a row, and (n_query, n_train) inner products of the rows."""
    with tempfile.TemporaryDirectory() as folder:
        store = gradindex.build(task, folder, projection=projection, self_influence="projected")
        rows = gradindex.load(task, folder).query_rows(range(task.n_query))
        return store.dim, rows @ store.rows(store.ids).T


def drawn(
    counts: list[int],
    by_way: dict[str, list[float]],
    alone: list[float],
    by_kind: dict[str, dict[int, float]],
    limit: float,
) -> Figure:
    """The three panels: number and choice of checkpoints, each epoch alone, projections."""
    picture = Figure(figsize=(13, 4), layout="constrained")
    choice, epoch, projection = picture.subplots(1, 3)
    colours = (PROPONENT, "#7fb2e5", "#3a9a5b", "#c9a227", NEUTRAL, OPPONENT)
    for (name, values), colour in zip(by_way.items(), colours, strict=True):
        choice.plot(counts, values, "o-", color=colour, label=name)
    choice.set(
        xscale="log", xlabel="checkpoints", ylabel="mean Pearson with per-step TracIn", title="Which checkpoints"
    )
    choice.set_xticks(counts, [str(count) for count in counts])
    choice.minorticks_off()
    epoch.plot(range(1, len(alone) + 1), alone, "o-", color=PROPONENT)
    epoch.xaxis.get_major_locator().set_params(integer=True)
    epoch.set(xlabel="epoch", title="One checkpoint alone")
    for (kind, values), colour in zip(by_kind.items(), (PROPONENT, "#3a9a5b", "#c9a227", OPPONENT), strict=False):
        projection.plot(list(values), list(values.values()), "o-", color=colour, label=kind)
    projection.axhline(limit, color=NEUTRAL, linestyle="--", label="nothing projected")
    projection.set(xscale="log", xlabel="numbers a row", title="Which projection (5 checkpoints)")
    for axes in (choice, epoch, projection):
        axes.grid(alpha=0.3)
    for axes in (choice, projection):
        axes.legend(frameon=False)
    lowest = min(alone + [value for values in by_way.values() for value in values])
    for axes, low in ((choice, lowest - 0.2), (epoch, lowest - 0.2), (projection, 0)):
        axes.set_ylim(low, 1)
    return picture


if __name__ == "__main__":
    main()
