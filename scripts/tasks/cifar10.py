"""Reference task CIFAR-10 ResNet-9: 2,440,266 parameters, 50,000 rows with 10% flipped labels.

SGD with Nesterov momentum 0.9, weight decay 5e-4, batch 256, one-cycle to 0.4 (peak at 25%), 6 epochs,
random horizontal flips, bfloat16 autocast; a checkpoint after each epoch. Tracked: the last layer with
its bias (``task``) or every parameter (``all_layers``). Trained once (about 20 minutes on 2 cores) and cached.

    gradindex build scripts/tasks/cifar10.py:task --out /tmp/cifar10
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import cache_folder, flip_labels, image_archive, once
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from gradindex import Recorder, Task, find_checkpoints

N_QUERY, EPOCHS, BATCH, PEAK_LEARNING_RATE, SEED = 500, 6, 256, 0.4, 0
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
VERSION = "cifar10-resnet9-1"  # raise it when anything below changes what is trained


def _block(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + super().forward(x)


def make_model() -> nn.Sequential:
    """The network, in PyTorch's default initialisation."""
    return nn.Sequential(
        _block(3, 64),
        _block(64, 128, pool=True),
        Residual(_block(128, 128), _block(128, 128)),
        _block(128, 256, pool=True),
        _block(256, 256, pool=True),
        Residual(_block(256, 256), _block(256, 256)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each example."""
    images, labels = batch
    return functional.cross_entropy(model(images).to(images.dtype), labels, reduction="none")


class Images(Dataset[tuple[Tensor, Tensor]]):
    """uint8 pictures (n, 32, 32, 3), normalised when they are read."""

    def __init__(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        return normalise(torch.from_numpy(np.array(self.images[position]))), torch.tensor(self.labels[position])


def normalise(images: Tensor) -> Tensor:
    """uint8 (..., h, w, 3) to float32 (..., 3, h, w)."""
    return ((images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).movedim(-1, -3)


def data() -> dict[str, np.ndarray[Any, Any]]:
    """``images``, ``labels`` as trained, ``flipped``, and the test set in a fixed shuffle as ``query_*``."""
    archive = image_archive("cifar10")
    queries = np.random.default_rng(SEED + 1).permutation(len(archive["test_labels"]))
    labels, flipped = flip_labels(np.asarray(archive["train_labels"]), 0.1, 10, SEED + 2)
    return {
        "images": archive["train_images"],
        "labels": labels,
        "flipped": flipped,
        "query_images": archive["test_images"][queries],
        "query_labels": np.asarray(archive["test_labels"][queries]),
        "classes": np.asarray(archive["classes"]),
    }


def train(folder: Path) -> None:
    """Train and write the checkpoints into ``folder``."""
    arrays = data()
    images = normalise(torch.from_numpy(np.array(arrays["images"]))).to(torch.bfloat16)
    labels = torch.from_numpy(arrays["labels"])
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = make_model().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = EPOCHS * -(-len(images) // BATCH)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.25, cycle_momentum=False
        )
        recorder = Recorder(model, optimizer, folder)
        for epoch in range(1, EPOCHS + 1):
            started = time.perf_counter()
            total = 0.0
            for rows in torch.randperm(len(images)).split(BATCH):
                batch = images[rows].float()
                batch = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, batch.flip(-1), batch)
                batch = batch.contiguous(memory_format=torch.channels_last)
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    mean_loss = loss(model, (batch, labels[rows])).mean()
                mean_loss.backward()
                optimizer.step()
                scheduler.step()
                total += float(mean_loss.detach()) * len(rows)
            recorder.save()
            taken = time.perf_counter() - started
            print(
                f"epoch {epoch}/{EPOCHS}: training loss {total / len(images):.3f}, {taken:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tests = normalise(torch.from_numpy(np.array(arrays["query_images"])))
        predicted = torch.cat([model(part).argmax(1) for part in tests.split(500)]).numpy()
    print(
        f"trained CIFAR-10 ResNet-9: test accuracy {np.mean(predicted == arrays['query_labels']):.4f}", file=sys.stderr
    )


def task() -> Task:
    """The task with the last layer tracked, trained if it is not cached yet."""
    arrays = data()
    checkpoints = once(cache_folder() / "checkpoints" / VERSION, train)
    query_labels = arrays["query_labels"][:N_QUERY]
    return Task(
        name="CIFAR-10 ResNet-9",
        model=make_model(),
        loss=loss,
        train=Images(arrays["images"], arrays["labels"]),
        query=Images(arrays["query_images"][:N_QUERY], query_labels),
        checkpoints=find_checkpoints(checkpoints / "*.pt"),
        layers="8",
        columns={"label": arrays["classes"][arrays["labels"]], "flipped": arrays["flipped"]},
        query_columns={"label": arrays["classes"][query_labels]},
        show=lambda item: (
            ((item[0].movedim(0, -1) * torch.tensor(STD) + torch.tensor(MEAN)).clamp(0, 1) * 255).byte().numpy()
        ),
    )


def all_layers() -> Task:
    """The same with every parameter tracked."""
    return replace(task(), layers="*", name="CIFAR-10 ResNet-9, all layers")
