"""Reference task CIFAR-10 ResNet-9: 2,440,266 parameters, 50,000 rows with 10% flipped labels.

SGD with Nesterov momentum 0.9, weight decay 5e-4, batch 256, one-cycle to 0.4 (peak at 25%), 6 epochs,
random horizontal flips, bfloat16 autocast; a checkpoint after each epoch. Tracked: the last layer with
its bias (``task``) or every parameter (``all_layers``). Trained once (about 20 minutes on 2 cores) and cached. In the
quick form of a script, a network of a sixteenth of the width on 1,000 coloured digits.

    gradindex build scripts/tasks/cifar10.py:task --out /tmp/cifar10
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import cache_folder, flip_labels, image_archive, quick, resumable
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from gradindex import Recorder, Task, find_checkpoints

N_QUERY, EPOCHS, BATCH, PEAK_LEARNING_RATE, WIDTH, SEED = 500, 6, 256, 0.4, 64, 0
QUICK_WIDTH, QUICK_BATCH, QUICK_PEAK = 4, 50, 0.05
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


def make_model(width: int = WIDTH) -> nn.Sequential:
    """The network, in PyTorch's default initialisation; ``width`` is the number of its first channels."""
    double, fourfold = 2 * width, 4 * width
    return nn.Sequential(
        _block(3, width),
        _block(width, double, pool=True),
        Residual(_block(double, double), _block(double, double)),
        _block(double, fourfold, pool=True),
        _block(fourfold, fourfold, pool=True),
        Residual(_block(fourfold, fourfold), _block(fourfold, fourfold)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(fourfold, 10),
    )


def width() -> int:
    """Of the task's network."""
    return QUICK_WIDTH if quick() else WIDTH


def precision() -> torch.dtype:
    """What the task's network computes in; bfloat16 is slow on processors without it, and the quick form is quick."""
    return torch.float32 if quick() else torch.bfloat16


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=not quick())


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


def shifted(images: Tensor, most: int) -> Tensor:
    """Pictures (n, c, h, w), each moved by up to ``most`` pixels either way; what comes in is mirrored at the edge."""
    n, _, height, width = images.shape
    padded = functional.pad(images, (most,) * 4, mode="reflect")
    down, across = torch.randint(2 * most + 1, (2, n, 1))
    rows, columns = down + torch.arange(height), across + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def train(
    folder: Path,
    images: Tensor,
    labels: Tensor,
    *,
    make_model: Callable[[], nn.Sequential] = make_model,
    epochs: int = EPOCHS,
    shift: int = 0,
    seed: int = SEED,
) -> nn.Sequential:
    """Train, with a checkpoint after each epoch; goes on after the last epoch that ``folder`` has.

    Args:
        folder: where checkpoints go, and ``resume.pt`` while the training lasts.
        images: (n, 3, 32, 32) normalised.
        labels: (n,).
        make_model: the network, untrained.
        epochs: how many.
        shift: by how many pixels each picture is moved at most, at random.
        seed: of the initialisation, the order, the flips and the shifts.

    Returns:
        The trained model.
    """
    resume = folder / "resume.pt"
    images = images.to(precision())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_model().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        batch_size, peak = (QUICK_BATCH, QUICK_PEAK) if quick() else (BATCH, PEAK_LEARNING_RATE)
        an_epoch = -(-len(images) // batch_size)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peak, total_steps=epochs * an_epoch, pct_start=0.25, cycle_momentum=False
        )
        done, parts = 0, {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        if resume.exists():
            saved = torch.load(resume)
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            torch.set_rng_state(saved["random"])
            done = saved["epochs"]
        recorder = Recorder(model, optimizer, folder, first_step=done * an_epoch, overwrite=True)
        for epoch in range(done + 1, epochs + 1):
            started = time.perf_counter()
            total = 0.0
            for rows in torch.randperm(len(images)).split(batch_size):
                batch = images[rows].float()
                batch = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, batch.flip(-1), batch)
                if shift:
                    batch = shifted(batch, shift)
                batch = batch.contiguous(memory_format=torch.channels_last)
                optimizer.zero_grad()
                with _autocast():
                    mean_loss = loss(model, (batch, labels[rows])).mean()
                mean_loss.backward()
                optimizer.step()
                scheduler.step()
                total += float(mean_loss.detach()) * len(rows)
            recorder.save(total / len(images))
            state = {name: part.state_dict() for name, part in parts.items()}
            temporary = resume.with_suffix(".new")
            torch.save(state | {"random": torch.get_rng_state(), "epochs": epoch}, temporary)
            temporary.replace(resume)
            taken = time.perf_counter() - started
            print(
                f"{folder.name}: epoch {epoch}/{epochs}, training loss {total / len(images):.3f}, {taken:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    resume.unlink(missing_ok=True)
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the model classifies well."""
    with torch.no_grad(), _autocast():
        predicted = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return float((predicted == labels).float().mean())


def _train_reference(folder: Path) -> None:
    arrays = data()
    images, tests = (normalise(torch.from_numpy(np.array(arrays[name]))) for name in ("images", "query_images"))
    model = train(folder, images, torch.from_numpy(arrays["labels"]), make_model=partial(make_model, width()))
    reached = accuracy(model, tests, torch.from_numpy(arrays["query_labels"]))
    print(f"trained CIFAR-10 ResNet-9: test accuracy {reached:.4f}", file=sys.stderr)


def task() -> Task:
    """The task with the last layer tracked, trained if it is not cached yet."""
    arrays = data()
    checkpoints = resumable(cache_folder() / "checkpoints" / VERSION, _train_reference)
    query_labels = arrays["query_labels"][:N_QUERY]
    return Task(
        name="CIFAR-10 ResNet-9",
        model=make_model(width()),
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
