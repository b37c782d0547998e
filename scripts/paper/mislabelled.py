"""Mislabelled data (figure 1): how soon an inspector who follows a ranking meets the wrong labels.

MNIST (all parameters) and CIFAR-10 (last layer), a tenth of the labels made wrong in two ways, three seeds each:

- **relabelled**, the paper's protocol: a network is trained on the true labels, chosen examples get the wrong class
  that it thinks the likeliest, and another network is trained on that;
- **uniform**: chosen examples get any other class.

Rankings: self-influence by TracInCP, weighted by learning rate, by integrated learning rate and unweighted, the last
also over the later half of the checkpoints; of projected rows; of the last checkpoint alone; the loss, at the last
checkpoint and summed over all; influence functions and representer points of the last layer; chance. Captum's
ArnoldiInfluenceFunction stands beside our influence functions and needs an environment with scripts/bench/peers.txt;
``--baselines exact`` does without.

Then what is wrong among the first fifth is put right, and the network trained again (one seed).

Trainings and rankings are cached: an interrupted run goes on where it was, and several at a time share the work.

python scripts/paper/mislabelled.py [--quick] [--json] [--data DIR] [--save FILE]
    [--sets mnist cifar10] [--baselines exact captum]
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Experiment, Loss, rounded
from last_layer import LastLayer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import gradindex
from gradindex import Task, find_checkpoints
from gradindex.evaluation import share_found
from gradindex.gradients import Precision
from gradindex.projection import Projection

VERSION = "mislabelled-1"  # raise it when anything below changes what is trained or ranked
SHARE, SEEDS, KINDS = 0.1, (0, 1, 2), ("relabelled", "uniform")
WIDTH = 32  # of the ResNet-9, half that of the reference task: eleven trainings take an hour
INSPECTED, GRID = (0.1, 0.2, 0.3), np.linspace(0, 1, 101)
WEIGHTINGS = (
    "TracInCP, learning rate",
    "TracInCP, integrated",
    "TracInCP, unweighted",
    "TracInCP, unweighted, later half",
)
FOLLOWED, REPAIRED_TO = WEIGHTINGS[3], 0.2  # the ranking that the repair follows, and how far
DAMPINGS = (0.1, 1.0, 10.0)  # multiples of the Hessian's mean eigenvalue
CAPTUM = "influence functions, Captum"

Rankings = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class DataSet:
    """Images with their true labels, and the network that learns them.

    Args:
        name: of the reference task.
        images: (n, ...) as the network takes them.
        labels: (n,) true.
        test_images: (m, ...).
        test_labels: (m,).
        make_model: the network, untrained.
        train: ``train(folder, images, labels, seed=...)`` saves checkpoints and returns the model.
        accuracy: ``accuracy(model, images, labels)``.
        loss: of each example.
        layers: which are tracked.
        precision: of the gradients: what the network was trained in.
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    make_model: Callable[[], nn.Module]
    train: Callable[..., nn.Module]
    accuracy: Callable[[nn.Module, Tensor, Tensor], float]
    loss: Loss
    layers: str
    precision: Precision

    @classmethod
    def mnist(cls, quick: bool) -> DataSet:
        """The rows of the reference task."""
        import mnist
        from reference import image_archive

        data = {name: torch.from_numpy(values) for name, values in mnist.data().items()}
        every = image_archive("mnist")["train_labels"]
        true = torch.from_numpy(np.asarray(every[mnist.chosen_rows()]))
        n = slice(0, len(true), 8 if quick else 1)
        train = partial(mnist.train, epochs=10 if quick else mnist.EPOCHS)
        images, tests = data["images"][n], (data["query_images"], data["query_labels"])
        return cls(
            "mnist", images, true[n], *tests, mnist.make_model, train, mnist.accuracy, mnist.loss, "*", "float32"
        )

    @classmethod
    def cifar10(cls) -> DataSet:
        """All 50,000."""
        import cifar10
        from reference import image_archive

        data = {
            name: torch.from_numpy(np.array(values))
            for name, values in image_archive("cifar10").items()
            if name != "classes"
        }
        images, tests = (cifar10.normalise(data[f"{part}_images"]) for part in ("train", "test"))
        make, train = partial(cifar10.make_model, WIDTH), partial(cifar10.train, width=WIDTH)
        return cls(
            "cifar10", images, data["train_labels"], tests, data["test_labels"],
            make, train, cifar10.accuracy, cifar10.loss, "8", "bfloat16",
        )  # fmt: skip


class Laboratory:
    """Trainings and rankings of one data set, each made once and kept.

    Args:
        data: the data set.
        folder: where they are kept.
        wait: for what another process makes just now; else ``BusyError``.
    """

    def __init__(self, data: DataSet, folder: Path, wait: bool = True) -> None:
        self.data, self.folder, self.wait = data, folder, wait

    def labels(self, kind: str, seed: int) -> tuple[Tensor, NDArray[np.bool_]]:
        """(n,) labels to train with, and which are wrong."""
        from reference import flip_labels

        true = self.data.labels
        uniform, wrong = flip_labels(true.numpy(), SHARE, int(true.max()) + 1, seed)
        if kind == "uniform":
            return torch.from_numpy(uniform), wrong
        model, chosen, labels = self._model("clean", 0), torch.from_numpy(wrong), true.clone()
        with torch.no_grad():
            answers = torch.cat([model(part) for part in self.data.images[chosen].split(500)])
        answers[torch.arange(len(answers)), true[chosen]] = -torch.inf
        labels[chosen] = answers.argmax(1)
        return labels, wrong

    def trained(self, kind: str, seed: int) -> Path:
        """The checkpoints, and ``accuracy.npy`` on the test images."""

        def fill(folder: Path) -> None:
            labels = self.data.labels
            if kind in KINDS:
                labels, _ = self.labels(kind, seed)
            elif kind == "fixed":
                labels = self._repaired(seed)
            model = self.data.train(folder, self.data.images, labels, seed=seed)
            np.save(folder / "accuracy.npy", self.data.accuracy(model, self.data.test_images, self.data.test_labels))

        return self._kept(f"{kind}-{seed}", fill)

    def accuracy(self, kind: str, seed: int) -> float:
        """Of the trained network on the test images."""
        return float(np.load(self.trained(kind, seed) / "accuracy.npy"))

    def rankings(self, kind: str, seed: int) -> Rankings:
        """By name, (n,) how suspicious each example is."""
        labels, _ = self.labels(kind, seed)
        found = self._kept(f"{kind}-{seed}-measured", partial(self._measure, self.trained(kind, seed), labels))
        with np.load(found / "measured.npz") as saved:
            rates, integrated, squared, losses = (saved[name] for name in ("rates", "integrated", "squared", "losses"))
            late = squared.shape[1] // 2
            return {
                WEIGHTINGS[0]: squared @ rates,
                WEIGHTINGS[1]: squared @ integrated,
                WEIGHTINGS[2]: squared.sum(1),
                WEIGHTINGS[3]: squared[:, late:].sum(1),
                "TracInCP, learning rate, projected": saved["projected"],
                "last checkpoint": squared[:, -1],
                "loss": losses[:, -1],
                "loss, all checkpoints": losses.sum(1),
                **{name: saved[name] for name in saved if name.startswith(("influence", "representer"))},
                "chance": np.random.default_rng(len(labels)).random(len(labels)),
            }

    def captum(self, kind: str, seed: int) -> NDArray[np.float64]:
        """(n,) self-influence by Captum's influence functions, of the last layer alone."""
        self.rankings(kind, seed)

        def fill(folder: Path) -> None:
            inputs, labels = torch.load(self.folder / f"{kind}-{seed}-measured" / "last_layer.pt")
            model = self._model(kind, seed)
            assert isinstance(model, nn.Sequential)
            np.save(folder / "captum.npy", captum_self_influence(model[-1], inputs[:, :-1], labels))

        found: NDArray[np.float64] = np.load(self._kept(f"{kind}-{seed}-captum", fill) / "captum.npy")
        return found

    def _repaired(self, seed: int) -> Tensor:
        """Labels after a person has put right what is wrong among the most suspicious examples."""
        labels, wrong = self.labels("relabelled", seed)
        order = np.argsort(-self.rankings("relabelled", seed)[FOLLOWED], kind="stable")
        inspected = np.zeros(len(order), dtype=bool)
        inspected[order[: int(REPAIRED_TO * len(order))]] = True
        return torch.where(torch.from_numpy(inspected & wrong), self.data.labels, labels)

    def _measure(self, checkpoints: Path, labels: Tensor, folder: Path) -> None:
        data = self.data
        task = Task(
            data.make_model(), data.loss, TensorDataset(data.images, labels),
            find_checkpoints(checkpoints / "*.pt"), layers=data.layers, name=f"{data.name}, mislabelled",
        )  # fmt: skip
        parameters = [name for name, _ in task.model.named_parameters()]
        rates, integrated = (
            np.array([replace(c, weighting=how).learning_rates(parameters)[parameters[-1]] for c in task.checkpoints])
            for how in ("learning_rate", "integrated")
        )
        place, sketch = folder / "store", Projection("tensorsketch", dim=64)  # an interrupted build goes on
        store = gradindex.build(task, place, projection=sketch, factors="float32", precision=data.precision)
        squared, losses, ids = store.self_influence() / rates, store.losses(), store.ids
        projected = np.concatenate([np.square(rows, dtype=np.float64).sum(1) for _, rows in store.blocks()])
        last = [store.factors(part) for part in np.array_split(ids, 20)]
        shutil.rmtree(place)
        key = max(last[0])
        inputs, deltas = (torch.from_numpy(np.concatenate([part[key][side] for part in last])) for side in (0, 1))
        inputs = inputs / inputs[:, -1:]  # the factor of the bias is sqrt(eta)
        layer = LastLayer(inputs, deltas + functional.one_hot(labels, deltas.shape[1]), labels)
        torch.save((layer.inputs, layer.labels), folder / "last_layer.pt")
        found = {"rates": rates, "integrated": integrated, "squared": squared, "losses": losses, "projected": projected}
        found["representer points"] = layer.representer_values()
        hessian = layer.hessian()
        for damping in DAMPINGS:
            squares = layer.whitened(hessian, damping).square().sum(0)
            found[f"influence functions, damped {damping:g}"] = squares.double().numpy()
        np.savez(folder / "measured.npz", **found)

    def _model(self, kind: str, seed: int) -> nn.Module:
        model = self.data.make_model()
        last = find_checkpoints(self.trained(kind, seed) / "*.pt")[-1]
        model.load_state_dict(last.load(model))
        return model.eval()

    def _kept(self, name: str, fill: Callable[[Path], None]) -> Path:
        from reference import resumable

        return resumable(self.folder / name, fill, self.wait)


def captum_self_influence(layer: nn.Module, inputs: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """(n,) by ArnoldiInfluenceFunction, whose settings but the sizes of batches are its own."""
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    torch.manual_seed(0)
    influence = ArnoldiInfluenceFunction(
        nn.Sequential(layer),
        TensorDataset(inputs, labels),
        checkpoint="",
        checkpoints_load_func=lambda model, path: 1.0,  # the layer has its weights
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        sample_wise_grads_per_batch=True,
        batch_size=2500,
    )
    return np.asarray(influence.self_influence().double().numpy(), dtype=np.float64)


def main() -> None:
    """Train, rank, repair, tell."""
    experiment = Experiment(
        "Mislabelled data: found by share inspected",
        __doc__,
        parts={"sets": ("mnist", "cifar10"), "baselines": ("exact", "captum")},
    )
    with_captum = "captum" in experiment.options.baselines
    if with_captum and importlib.util.find_spec("captum") is None:
        raise SystemExit(
            "captum is not installed. Run this with an environment that has scripts/bench/peers.txt, or without it: "
            "--baselines exact."
        )
    with contextlib.ExitStack() as stack:
        if experiment.quick:
            folder, seeds = Path(stack.enter_context(tempfile.TemporaryDirectory())), SEEDS[:1]
            laboratories = [Laboratory(DataSet.mnist(quick=True), folder / "mnist")]
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
    yield partial(laboratory.trained, "fixed", seeds[0])


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
    reached = {kind: [laboratory.accuracy(kind, seed) for seed in seeds] for kind in KINDS}
    reached |= {kind: [laboratory.accuracy(kind, seeds[0])] for kind in ("clean", "fixed")}
    for kind, values in reached.items():
        spread = {"lowest": min(values), "highest": max(values)}
        experiment.row(f"{name}, test accuracy", {"trained with": kind, "mean": float(np.mean(values)), **spread})
    gain = reached["fixed"][0] - reached["relabelled"][0]
    experiment.figure(f"{name}: accuracy gained by fixing, one seed", gain, "share")
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
