"""Trainings by which attribution is judged in the literature, as tasks: dattri's MNIST with an MLP and with regression.

The first 5,000 training and 500 test digits, normalised by 0.1307 and 0.3081, in batches of 64, by SGD with a rate of
0.01. The MLP, 784-128-64-10 with ReLU and dropout of 0.1 after both hidden layers, trains for 50 epochs with a momentum
of 0.9, logistic regression for 20. What is explained is the test loss. Each retraining begins from an initialisation of
its own, and so does each run whose checkpoints are recorded. Source: dattri (Deng et al. 2024, arXiv:2410.04555), its
modules benchmark/datasets/mnist and benchmark/models.

dattri's regression has no momentum. After its 800 small steps the initialisation is still there: a perfect predictor
would reach 0.74, less than what is published, so that something else must have differed too. With momentum it is 0.87.

    gradindex build scripts/quality/protocols.py:mnist_mlp --out /tmp/mlp
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tasks"))

from reference import cache_folder, data_folder, image_archive, once, quick

from gradindex import Recorder, Task, find_checkpoints

MEAN, STD, BATCH, LEARNING_RATE = 0.1307, 0.3081, 64, 0.01
VERSION = 1  # raise it when anything below changes what is trained

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Protocol:
    """How models are trained, and which of a run's epochs are recorded.

    Args:
        name: for people and folders.
        make_model: the network, untrained: linear layers, and between them ReLU and dropout.
        epochs: of a training.
        momentum: of SGD.
        dropout: after each hidden layer.
        recorded: epochs of a run after which there is a checkpoint, early and middle ones.
        n_train: digits to train on.
        n_query: digits to ask about.
    """

    name: str
    make_model: Callable[[], nn.Module]
    epochs: int
    momentum: float
    dropout: float
    recorded: tuple[int, ...]
    n_train: int = 5000
    n_query: int = 500

    @property
    def small(self) -> Protocol:
        """What a quick form takes."""
        return replace(self, epochs=3, recorded=(1, 2), n_train=300, n_query=20)

    @property
    def folder(self) -> Path:
        """Where its trainings are kept."""
        return cache_folder() / "quality" / f"{self.name}-{VERSION}"


def make_mlp() -> nn.Module:
    """784-128-64-10, in PyTorch's default initialisation."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(64, 10),
    )  # fmt: skip


def make_regression() -> nn.Module:
    """784-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


MLP = Protocol("mnist-mlp", make_mlp, 50, 0.9, 0.1, (1, 2, 3, 4, 6, 8, 11, 15, 20))
REGRESSION = Protocol("mnist-lr", make_regression, 20, 0.9, 0.0, (1, 3, 6, 10, 15))
PROTOCOLS = {protocol.name: protocol for protocol in (MLP, REGRESSION)}


def loss(model: nn.Module, batch: Images) -> Tensor:
    """Cross-entropy of each example."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels, reduction="none")


def train(
    protocol: Protocol,
    images: Tensor,
    labels: Tensor,
    seed: int,
    *,
    epochs: int | None = None,
    watch: Callable[[nn.Module, torch.optim.Optimizer], Callable[[int], None]] | None = None,
) -> nn.Module:
    """Train a new model; the global random state stays as it is.

    Batches are rows of tensors and gradients are written out, without autograd: twice as fast on a core.

    Args:
        protocol: how.
        images: (n, 28, 28) normalised.
        labels: (n,).
        seed: of the initialisation, the order and the dropout.
        epochs: other ones than the protocol's.
        watch: called with the model and its optimizer before the first step; what it returns, after each epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = protocol.make_model()
    generator = torch.Generator().manual_seed(seed)
    layers = [module for module in model if isinstance(module, nn.Linear)]  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, protocol.momentum, foreach=True)
    after = (lambda epoch: None) if watch is None else watch(model, optimizer)
    inputs = images.flatten(1)
    with torch.no_grad():
        for epoch in range(1, (epochs or protocol.epochs) + 1):
            for rows in torch.randperm(len(inputs), generator=generator).split(BATCH):
                masks = [
                    torch.empty(len(rows), layer.out_features).bernoulli_(1 - protocol.dropout, generator=generator)
                    / (1 - protocol.dropout)
                    for layer in layers[:-1]
                ]
                write_gradients(layers, inputs[rows], labels[rows], masks)
                optimizer.step()
            after(epoch)
    return model.eval()


def write_gradients(layers: Sequence[nn.Linear], inputs: Tensor, labels: Tensor, masks: Sequence[Tensor]) -> None:
    """Put the gradients of a batch's mean cross-entropy into the layers, by the chain rule.

    Args:
        layers: with ReLU, then a mask, between them.
        inputs: (b, d).
        labels: (b,).
        masks: of each hidden layer (b, d_out), what its activations are multiplied by.
    """
    activations = [inputs]
    for layer, mask in zip(layers, masks, strict=False):
        hidden = torch.addmm(layer.bias, activations[-1], layer.weight.t()).relu_()
        activations.append(hidden.mul_(mask))
    last = layers[-1]
    delta = torch.addmm(last.bias, activations[-1], last.weight.t()).softmax(1)
    delta[torch.arange(len(labels)), labels] -= 1
    delta /= len(labels)
    for place in reversed(range(len(layers))):
        layer, inner = layers[place], activations[place]
        layer.weight.grad, layer.bias.grad = delta.t() @ inner, delta.sum(0)
        if place:  # a masked activation is zero where ReLU or the mask is, so that its gradient is zero as well
            delta = (delta @ layer.weight).mul_(masks[place - 1]).mul_(inner > 0)


def seed_of(*parts: Any) -> int:
    """A seed that depends on all parts: each subset has an initialisation of its own."""
    text = b"\0".join(part.tobytes() if isinstance(part, np.ndarray) else str(part).encode() for part in parts)
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def digits(protocol: Protocol) -> tuple[Images, Images]:
    """(images, labels) to train on and to ask about: the first of MNIST's own order; in a quick form random ones."""
    archive = image_archive("mnist")

    def chosen(part: str, n: int) -> Images:
        labels = archive[f"{part}_labels"]
        order = np.random.default_rng(0).permutation(len(labels)) if quick() else np.argsort(original_places()[part])
        pixels = archive[f"{part}_images"][order[:n]].astype(np.float32) / 255
        return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)), torch.from_numpy(labels[order[:n]])

    return chosen("train", protocol.n_train), chosen("test", protocol.n_query)


def original_places() -> dict[str, NDArray[np.int64]]:
    """Where the archive's pictures stood in MNIST's files, which is what theirs are named by; read once and kept."""

    def read(folder: Path) -> None:
        import tarfile

        with tarfile.open(data_folder() / "mnist.tar.xz") as tar:
            names = sorted(member.name.removeprefix("./") for member in tar if member.isfile())
        for part in ("train", "test"):
            numbers = [int(Path(name).stem) for name in names if name.startswith(f"{part}/")]
            np.save(folder / f"{part}.npy", np.array(numbers, dtype=np.int64))

    folder = once(cache_folder() / "data" / "mnist-places", read)
    return {part: np.load(folder / f"{part}.npy") for part in ("train", "test")}


def recorded(protocol: Protocol, run: int, images: Tensor, labels: Tensor) -> Path:
    """The folder with the checkpoints of a run on all digits, which is made once."""
    epochs = "-".join(map(str, protocol.recorded))

    def make(folder: Path) -> None:
        def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[int], None]:
            recorder = Recorder(model, optimizer, folder, overwrite=True)
            return lambda epoch: recorder.save() if epoch in protocol.recorded else None

        train(protocol, images, labels, seed_of("run", run), epochs=max(protocol.recorded), watch=watch)

    return once(protocol.folder / f"run-{run}-epochs-{epochs}", make)


def task(protocol: Protocol, runs: Sequence[int] = (0,)) -> Task:
    """The task, with checkpoints of one run or several, one after another.

    Args:
        protocol: how it is trained.
        runs: which, by their seeds.
    """
    protocol = protocol.small if quick() else protocol
    (images, labels), (query_images, query_labels) = digits(protocol)

    def train_model(ids: NDArray[np.int64], seed: int) -> nn.Module:
        rows = torch.from_numpy(ids)
        return train(protocol, images[rows], labels[rows], seed_of("subset", ids, seed))

    folders = [recorded(protocol, run, images, labels) for run in runs]
    return Task(
        name=protocol.name,
        model=protocol.make_model(),
        loss=loss,
        train=TensorDataset(images, labels),
        query=TensorDataset(query_images, query_labels),
        checkpoints=[checkpoint for folder in folders for checkpoint in find_checkpoints(folder / "*.pt")],
        columns={"label": labels.numpy()},
        query_columns={"label": query_labels.numpy()},
        show=lambda item: (item[0] * STD + MEAN).numpy(),
        train_model=train_model,
    )


mnist_mlp, mnist_lr = partial(task, MLP), partial(task, REGRESSION)
