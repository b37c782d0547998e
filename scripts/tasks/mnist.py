"""Reference task MNIST MLP: 784-256-128-10, all 235,146 parameters, 20,000 rows with 10% flipped labels.

SGD with learning rate 0.1, batch 100, 20 epochs; checkpoints after epochs 4, 8, 12, 16 and 20;
queries are the first 500 test images. Trained once (about half a minute) and cached. In the quick form of a script,
5,000 rows and 10 epochs.

    gradindex build scripts/tasks/mnist.py:task --out /tmp/mnist
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import cache_folder, flip_labels, image_archive, once, quick
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from gradindex import Recorder, Task, find_checkpoints

N_TRAIN, N_QUERY, EPOCHS, BATCH, LEARNING_RATE, SEED = 20_000, 500, 20, 100, 0.1, 0
QUICK_N_TRAIN, QUICK_EPOCHS = 5000, 10
MEAN, STD = 0.1307, 0.3081  # of the MNIST training pixels
VERSION = "mnist-mlp-2"  # raise it when anything below changes what is trained


def make_model() -> nn.Module:
    """The network, in PyTorch's default initialisation."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each example."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels, reduction="none")


def chosen_rows() -> np.ndarray[Any, Any]:
    """(20,000,) which of MNIST's training images are the task's."""
    n = len(image_archive("mnist")["train_labels"])
    return np.sort(np.random.default_rng(SEED).permutation(n)[: QUICK_N_TRAIN if quick() else N_TRAIN])


def data() -> dict[str, np.ndarray[Any, Any]]:
    """The chosen rows: ``images``, ``labels`` as trained, ``flipped``; ``query_images``, ``query_labels``.

    Pixels are standardised.
    """
    archive = image_archive("mnist")
    rows = chosen_rows()
    # The archive is ordered by class, so the first 500 test images are taken from a fixed shuffle.
    queries = np.random.default_rng(SEED + 1).permutation(len(archive["test_labels"]))
    labels, flipped = flip_labels(np.asarray(archive["train_labels"][rows]), 0.1, 10, SEED + 2)
    return {
        "images": (archive["train_images"][rows].astype(np.float32) / 255 - MEAN) / STD,
        "labels": labels,
        "flipped": flipped,
        "query_images": (archive["test_images"][queries].astype(np.float32) / 255 - MEAN) / STD,
        "query_labels": np.asarray(archive["test_labels"][queries]),
    }


class Training:
    """The reference training, paused before each step.

    Args:
        images: (n, 28, 28) standardised.
        labels: (n,).
        learning_rate: another one than the reference's.
        seed: of the initialisation and the order.
    """

    def __init__(self, images: Tensor, labels: Tensor, learning_rate: float = LEARNING_RATE, seed: int = SEED) -> None:
        self.images, self.labels = images, labels
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = make_model()
            # Goes on where the initialisation ended, whatever else draws numbers meanwhile.
            self._order = torch.Generator()
            self._order.set_state(torch.get_rng_state())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=learning_rate)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(batch,) rows of each step and their losses, with the gradients computed and the step not yet taken."""
        for rows in torch.randperm(len(self.images), generator=self._order).split(BATCH):
            self.optimizer.zero_grad()
            losses = loss(self.model, (self.images[rows], self.labels[rows]))
            losses.mean().backward()
            yield rows, losses.detach()
            self.optimizer.step()


def train(folder: Path, images: Tensor, labels: Tensor, *, epochs: int = EPOCHS, seed: int = SEED) -> nn.Module:
    """Train, with a checkpoint after every fifth of the epochs, and return the model."""
    training = Training(images, labels, seed=seed)
    recorder = Recorder(training.model, training.optimizer, folder, overwrite=True)
    for epoch in range(1, epochs + 1):
        for _ in training.epoch():
            pass
        if epoch % (epochs // 5) == 0:
            recorder.save()
    return training.model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the model classifies well."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def _train_reference(folder: Path) -> None:
    arrays = {name: torch.from_numpy(values) for name, values in data().items()}
    epochs = QUICK_EPOCHS if quick() else EPOCHS
    model = train(folder, arrays["images"], arrays["labels"], epochs=epochs)
    reached = accuracy(model, arrays["query_images"], arrays["query_labels"])
    print(f"trained MNIST MLP: test accuracy {reached:.4f}", file=sys.stderr)


def task() -> Task:
    """The task, trained if it is not cached yet."""
    arrays = data()
    checkpoints = once(cache_folder() / "checkpoints" / VERSION, _train_reference)
    query_images, query_labels = arrays["query_images"][:N_QUERY], arrays["query_labels"][:N_QUERY]
    return Task(
        name="MNIST MLP",
        model=make_model(),
        loss=loss,
        train=TensorDataset(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])),
        query=TensorDataset(torch.from_numpy(query_images), torch.from_numpy(query_labels)),
        checkpoints=find_checkpoints(checkpoints / "*.pt"),
        columns={"label": arrays["labels"], "flipped": arrays["flipped"]},
        query_columns={"label": query_labels},
        show=lambda item: (item[0] * STD + MEAN).numpy(),
    )
