"""What the experiment on mislabelled data trains and ranks: made once, kept in the cache, shared by processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import Loss
from last_layer import LastLayer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import gradindex
from gradindex import Task, find_checkpoints
from gradindex.gradients import Precision
from gradindex.projection import Projection

VERSION = "mislabelled-2"  # raise it when anything below changes what is trained or ranked
SHARE, KINDS = 0.1, ("relabelled", "uniform")
EPOCHS, SHIFT = 10, 2  # of the CIFAR-10 network below
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
        n = slice(0, len(true), 2 if quick else 1)
        train = partial(mnist.train, epochs=10 if quick else mnist.EPOCHS)
        images, tests = data["images"][n], (data["query_images"], data["query_labels"])
        return cls(
            "mnist", images, true[n], *tests, mnist.make_model, train, mnist.accuracy, mnist.loss, "*", "float32"
        )

    @classmethod
    def cifar10(cls) -> DataSet:
        """All 50,000, for :func:`small_network`: ten trainings of the reference's network would take four hours."""
        import cifar10
        from reference import image_archive

        data = {
            name: torch.from_numpy(np.array(values))
            for name, values in image_archive("cifar10").items()
            if name != "classes"
        }
        images, tests = (cifar10.normalise(data[f"{part}_images"]) for part in ("train", "test"))
        train = partial(cifar10.train, make_model=small_network, epochs=EPOCHS, shift=SHIFT)
        last_layer = str(len(small_network()) - 1)
        return cls(
            "cifar10", images, data["train_labels"], tests, data["test_labels"],
            small_network, train, cifar10.accuracy, cifar10.loss, last_layer, "bfloat16",
        )  # fmt: skip


def small_network() -> nn.Sequential:
    """A network for CIFAR-10 that makes its maps small early.

    1,089,730 parameters; an epoch takes a quarter of the time of the reference ResNet-9's, and ten teach it more.
    """

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        first, second = (nn.Conv2d(n, outputs, 3, padding=1, bias=False) for n in (inputs, outputs))
        return [
            first, nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.ReLU(),
            second, nn.BatchNorm2d(outputs), nn.ReLU(),
        ]  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(3, 24, 2), nn.ReLU(), *stage(24, 32), *stage(32, 128), *stage(128, 256),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


class Laboratory:
    """Trainings and rankings of one data set, each made once and kept.

    Args:
        data: the data set.
        folder: where they are kept.
        wait: for what another process makes just now; else ``BusyError``.
        captum_sizes: of its Arnoldi iteration, where they are not its own.
    """

    def __init__(
        self, data: DataSet, folder: Path, wait: bool = True, captum_sizes: Mapping[str, int] | None = None
    ) -> None:
        self.data, self.folder, self.wait, self.captum_sizes = data, folder, wait, captum_sizes or {}

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
            np.save(
                folder / "captum.npy", captum_self_influence(model[-1], inputs[:, :-1], labels, **self.captum_sizes)
            )

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


def captum_self_influence(layer: nn.Module, inputs: Tensor, labels: Tensor, **sizes: int) -> NDArray[np.float64]:
    """(n,) by ArnoldiInfluenceFunction, whose settings but the sizes of batches, and these sizes, are its own."""
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
        **sizes,
    )
    return np.asarray(influence.self_influence().double().numpy(), dtype=np.float64)
