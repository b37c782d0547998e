"""Mislabelled data (figure 1): how soon an inspector who follows a ranking meets the wrong labels.

MNIST (all parameters) and CIFAR-10 (last layer), a tenth of the labels made wrong in two ways, three seeds each:

- **relabelled**, the paper's protocol: a network is trained on the true labels, chosen examples get the wrong class
  that it thinks the likeliest, and another network is trained on that;
- **uniform**: chosen examples get any other class.

Rankings: self-influence by TracInCP, weighted by learning rate, by integrated learning rate and unweighted, the last
also over the later half of the checkpoints; of projected rows; of the last checkpoint alone; the loss, at the last
checkpoint and summed over all; influence functions and representer points of the last layer; chance. Captum's
ArnoldiInfluenceFunction stands beside our influence functions and needs an environment with scripts/bench/peers.txt;
``--baselines exact`` does without. The quick form takes a part of MNIST, and no Captum where it is not installed.

Then what is wrong among the first fifth is put right, and the network trained again.

Trainings and rankings are cached: an interrupted run goes on where it was, and several at a time share the work.

python scripts/paper/mislabelled.py [--quick] [--json] [--data DIR] [--save FILE]
    [--sets mnist cifar10] [--baselines exact captum]
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Experiment, rounded
from laboratory import CAPTUM, KINDS, VERSION, WEIGHTINGS, DataSet, Laboratory
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradindex.evaluation import share_found

SEEDS, INSPECTED, GRID = (0, 1, 2), (0.1, 0.2, 0.3), np.linspace(0, 1, 101)


def main() -> None:
    """Train, rank, repair, tell."""
    experiment = Experiment(
        "Mislabelled data: found by share inspected",
        __doc__,
        parts={"sets": ("mnist", "cifar10"), "baselines": ("exact", "captum")},
    )
    with_captum = "captum" in experiment.options.baselines and bool(experiment.installed(["captum"]))
    with contextlib.ExitStack() as stack:
        if experiment.quick:
            folder, seeds = Path(stack.enter_context(tempfile.TemporaryDirectory())), SEEDS[:1]
            few = {"arnoldi_dim": 10, "projection_dim": 5}
            laboratories = [Laboratory(DataSet.mnist(quick=True), folder / "mnist", captum_sizes=few)]
        else:
            from reference import cache_folder

            folder, seeds = cache_folder() / "paper" / VERSION, SEEDS
            makers = {"mnist": partial(DataSet.mnist, quick=False), "cifar10": DataSet.cifar10}
            laboratories = [Laboratory(makers[name](), folder / name) for name in experiment.options.sets]
        share_the_work(laboratories, seeds, with_captum)
        curves = {}
        for laboratory in laboratories:
            curves |= tell(experiment, laboratory, seeds, with_captum)
    experiment.draw(drawn(curves))
    experiment.finish()


def share_the_work(laboratories: Sequence[Laboratory], seeds: Sequence[int], with_captum: bool) -> None:
    """Make everything; first what no other process makes just now."""
    from reference import BusyError

    for wait in (False, True):
        for laboratory in laboratories:
            laboratory.wait = wait
            for action in actions(laboratory, seeds, with_captum):
                with contextlib.suppress(BusyError):
                    action()


def actions(laboratory: Laboratory, seeds: Sequence[int], with_captum: bool) -> Iterable[Callable[[], Any]]:
    """What there is to make of one data set."""
    yield partial(laboratory.trained, "clean", 0)
    for seed in seeds:
        for make in (laboratory.trained, laboratory.rankings, *([laboratory.captum] if with_captum else [])):
            for kind in KINDS:
                yield partial(make, kind, seed)
        yield partial(laboratory.trained, "fixed", seed)


def tell(
    experiment: Experiment, laboratory: Laboratory, seeds: Sequence[int], with_captum: bool
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Figures, tables and bars of one data set; by its name and kind, curves (seeds, len(GRID)) by ranking."""
    name, curves = laboratory.data.name, {}
    for kind in KINDS:
        title = f"{name}, {kind}"
        found: dict[str, list[NDArray[np.float64]]] = {}
        for seed in seeds:
            _, wrong = laboratory.labels(kind, seed)
            rankings = laboratory.rankings(kind, seed)
            if with_captum:
                rankings = rankings | {CAPTUM: laboratory.captum(kind, seed)}
            for ranking, suspicion in rankings.items():
                found.setdefault(ranking, []).append(share_found(suspicion, wrong, GRID.tolist()))
        curves[title] = {ranking: np.array(shares) for ranking, shares in found.items()}
        for ranking, shares in curves[title].items():
            at = {f"at {share:.0%}": shares[:, np.searchsorted(GRID, share - 1e-9)] for share in INSPECTED}
            spreads = {f"{place}: lowest, highest": f"{v.min():.3f}, {v.max():.3f}" for place, v in at.items()}
            experiment.row(title, {"ranking": ranking, **{p: float(v.mean()) for p, v in at.items()}, **spreads})
            experiment.keep(f"{title}, {ranking}: found at 0%, 1%, ... inspected, each seed", rounded(shares))
    best = max(curves[f"{name}, {KINDS[0]}"][ranking][:, 20].mean() for ranking in WEIGHTINGS)
    target = {"mnist": 0.95, "cifar10": 0.8}[name]
    what = f"{name}, relabelled: found at 20% by the best weighting of TracInCP"
    if experiment.quick:
        experiment.figure(what, best, "share")
    else:
        experiment.bar(what, best, "share", target)
    reached = {kind: np.array([laboratory.accuracy(kind, seed) for seed in seeds]) for kind in (*KINDS, "fixed")}
    reached["clean"] = np.array([laboratory.accuracy("clean", 0)])
    reached["gained by fixing"] = reached["fixed"] - reached["relabelled"]
    for kind, values in reached.items():
        spread = {"lowest": values.min(), "highest": values.max()}
        experiment.row(f"{name}, test accuracy", {"trained with": kind, "mean": float(values.mean()), **spread})
    return curves


def drawn(curves: dict[str, dict[str, NDArray[np.float64]]]) -> Figure:
    """Found against inspected, a panel for each data set and kind; bands from the lowest to the highest seed."""
    columns = len(KINDS)
    rows = len(curves) // columns
    picture = Figure(figsize=(5.4 * columns, 4.2 * rows + 0.9), layout="constrained")
    panels = picture.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (title, found) in zip(panels.flat, curves.items(), strict=True):
        for number, (ranking, shares) in enumerate(found.items()):
            ours = ranking in WEIGHTINGS
            style = {"color": f"C{number % 10}", "linestyle": "-" if ours else ("--", ":")[number // 10]}
            axes.plot(GRID, shares.mean(0), label=ranking, linewidth=2 if ours else 1.2, **style)
            axes.fill_between(GRID, shares.min(0), shares.max(0), color=style["color"], alpha=0.15, linewidth=0)
        axes.set(title=title, xlim=(0, 0.5), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("share of the training data inspected")
    for axes in panels[:, 0]:
        axes.set_ylabel("share of the wrong labels found")
    handles, names = panels.flat[0].get_legend_handles_labels()
    picture.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return picture


if __name__ == "__main__":
    main()
