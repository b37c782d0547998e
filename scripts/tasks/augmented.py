"""1,281,167 rows as ImageNet has: CIFAR-10 with flips, shifts and brightness changes, no two the same.

Pictures go once through the trained ResNet-9 of ``cifar10.py`` (bfloat16, as it was trained) at three of its
checkpoints; the 256 features of each are kept in float16, and the tracked last layer is a task on them. The labels are
those that it was trained with, 10% of them flipped. The harder ``pseudo_classes`` splits each class of 250,000 of the
rows into 100 clusters and trains a layer for these 1,000 anew, for rows of ten classes have few directions. In the
quick form of a script, 4,000 rows of 1,000 coloured digits, and 50 clusters.

    python scripts/tasks/augmented.py --part 1/2     # features; both halves side by side take 45 minutes on 2 cores
    gradindex build scripts/tasks/augmented.py:ten_classes --out /tmp/augmented --projection fitted --dim 128
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cifar10
import numpy as np
import torch
from numpy.typing import NDArray
from reference import cache_folder, once, quick
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import Dataset

from gradindex import Checkpoint, Recorder, Task, find_checkpoints

VERSION = "augmented-1"  # raise it when anything below changes the features
AFTER_EPOCHS = (2, 4, 5)  # the learning rate has all but ended at the sixth
SHIFT, BRIGHTNESS, SEED, BATCH = 4, 0.3, 7, 50
PSEUDO_EPOCHS, PSEUDO_RATE, PSEUDO_BATCH = 6, 0.5, 500


@dataclass(frozen=True)
class Sizes:
    """How large the tasks are.

    Args:
        pictures: that a round goes through.
        train: rows of :func:`ten_classes`, by default.
        pseudo: rows of :func:`pseudo_classes`.
        classes: of :func:`pseudo_classes`.
    """

    pictures: int
    train: int
    pseudo: int
    classes: int


FULL, QUICK = Sizes(50_000, 1_281_167, 250_000, 1000), Sizes(1000, 4000, 4000, 50)


def sizes() -> Sizes:
    """Those of the full form, or of the quick one."""
    return QUICK if quick() else FULL


def augment(images: NDArray[np.uint8], which: NDArray[np.int64], brightness: NDArray[Any]) -> NDArray[np.uint8]:
    """Pictures (n, 32, 32, 3), each shifted and flipped as a number below 2 (2 SHIFT + 1)^2 says, and made brighter."""
    side = 2 * SHIFT + 1
    flip, down, across = which // side**2, which // side % side, which % side
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="reflect")
    rows = (down[:, None] + np.arange(32))[:, :, None]
    columns = (across[:, None] + np.arange(32))[:, None, :]
    moved = padded[np.arange(len(images))[:, None, None], rows, columns]
    moved = np.where(flip[:, None, None, None] == 1, moved[:, :, ::-1], moved)
    return np.clip(np.rint(moved * brightness[:, None, None, None]), 0, 255).astype(np.uint8)


def variants(round_: int, n: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """What is done to each of ``n`` pictures in a round: nothing in the first, never the same again in another."""
    side = 2 * SHIFT + 1
    unchanged = (side**2) // 2
    if round_ == 0:
        return np.full(n, unchanged), np.ones(n)
    order = np.argsort(np.random.default_rng(SEED).random((n, 2 * side**2 - 1)), axis=1)
    which = order[:, round_ - 1]
    return which + (which >= unchanged), np.random.default_rng((SEED, round_)).uniform(
        1 - BRIGHTNESS, 1 + BRIGHTNESS, n
    )


def _backbones() -> list[nn.Module]:
    """The network without its last layer at the three checkpoints, batch norms folded in."""
    saved = cifar10.task().checkpoints
    found = []
    for epoch in AFTER_EPOCHS:
        model = cifar10.make_model(cifar10.width())
        model.load_state_dict(saved[epoch - 1].load(model))
        model.eval()
        for block in [part for part in model.modules() if isinstance(part, nn.Sequential)]:
            if len(block) > 1 and isinstance(block[1], nn.BatchNorm2d):
                block[0], block[1] = fuse_conv_bn_eval(block[0], block[1]), nn.Identity()
        found.append(model[:-1].to(cifar10.precision()).to(memory_format=torch.channels_last))
    return found


def _n_features() -> int:
    return 4 * cifar10.width()


@torch.no_grad()
def _features(backbones: list[nn.Module], images: NDArray[np.uint8]) -> NDArray[np.float16]:
    """(n, 3, 256) of pictures."""
    found = np.empty((len(images), len(backbones), _n_features()), dtype=np.float16)
    for start in range(0, len(images), BATCH):
        batch = cifar10.normalise(torch.from_numpy(images[start : start + BATCH])).to(cifar10.precision())
        batch = batch.contiguous(memory_format=torch.channels_last)
        for number, backbone in enumerate(backbones):
            found[start : start + BATCH, number] = backbone(batch).float().numpy()
    return found


def features_folder() -> Path:
    """Where features are kept: ``round_NN.npy`` (50,000, 3, 256) float16 each, and ``queries.npy``."""
    return cache_folder() / VERSION


def rounds(n_train: int | None = None) -> int:
    """How many times all pictures are gone through, by default for all rows."""
    return -(-(n_train or sizes().train) // sizes().pictures)


def make_features(part: int = 0, parts: int = 1) -> None:
    """Compute what is missing of a part of the features; an interrupted one goes on with the next round."""
    folder = features_folder()
    folder.mkdir(parents=True, exist_ok=True)
    arrays, backbones = cifar10.data(), None
    for number in range(part, rounds() + 1, parts):
        last = number == rounds()
        path = folder / ("queries.npy" if last else f"round_{number:02d}.npy")
        if path.exists():
            continue
        backbones = backbones or _backbones()
        started = time.perf_counter()
        if last:
            images = np.asarray(arrays["query_images"])
        else:
            images = augment(np.asarray(arrays["images"]), *variants(number, len(arrays["images"])))
        found = _features(backbones, images)
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as file:
            np.save(file, found)
        temporary.rename(path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


class Head(nn.Module):
    """The last layer on the features (n, 3, 256) of its own checkpoint."""

    at: Tensor

    def __init__(self, classes: int, at: int = 0) -> None:
        super().__init__()
        self.register_buffer("at", torch.tensor([at]))
        self.layer = nn.Linear(_n_features(), classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.layer(features.index_select(1, self.at)[:, 0])
        return logits


class Features(Dataset[tuple[Tensor, Tensor]]):
    """Features of rounds of pictures, mapped, with a label each."""

    def __init__(self, arrays: list[NDArray[np.float16]], labels: NDArray[np.int64]) -> None:
        self.arrays, self.labels, self.each = arrays, labels, len(arrays[0])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        features = self.arrays[position // self.each][position % self.each]
        return torch.from_numpy(features.astype(np.float32)), torch.tensor(self.labels[position])


@cache
def _arrays(n_train: int) -> tuple[list[NDArray[np.float16]], NDArray[np.float16]]:
    folder = features_folder()
    needed = [folder / f"round_{number:02d}.npy" for number in range(rounds(n_train))] + [folder / "queries.npy"]
    if quick():
        make_features()
    missing = [path.name for path in needed if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} files, the first is {missing[0]}. "
            "Run `python scripts/tasks/augmented.py`, about 80 minutes on one core of two."
        )
    *train, queries = [np.load(path, mmap_mode="r") for path in needed]
    return train, queries


def ten_classes(n_train: int | None = None) -> Task:
    """The last layer of the reference network with its bias, at three checkpoints; by default all rows."""
    n_train = n_train or sizes().train
    train, queries = _arrays(n_train)
    arrays = cifar10.data()
    classes, query_labels = arrays["classes"], arrays["query_labels"]

    def fill(folder: Path) -> None:
        for number, checkpoint in enumerate(cifar10.task().checkpoints[epoch - 1] for epoch in AFTER_EPOCHS):
            model, head = cifar10.make_model(cifar10.width()), Head(10, number)
            weights = checkpoint.load(model)
            head.layer.load_state_dict({"weight": weights["8.weight"], "bias": weights["8.bias"]})
            rate = checkpoint.learning_rates(["8.weight"])["8.weight"]
            torch.save({"model": head.state_dict(), "rate": rate}, folder / f"{number}.pt")

    folder = once(cache_folder() / "checkpoints" / f"{VERSION}-ten", fill)
    paths = sorted(folder.glob("*.pt"))
    rates = [torch.load(path, weights_only=True)["rate"] for path in paths]
    copies = rounds(n_train)
    return Task(
        name="augmented CIFAR-10",
        model=Head(10),
        loss=cifar10.loss,
        train=Features(train, np.tile(arrays["labels"], copies)[:n_train]),
        query=Features([queries], query_labels),
        checkpoints=[Checkpoint(path, rate, step=n) for n, (path, rate) in enumerate(zip(paths, rates, strict=True))],
        layers="layer",
        columns={
            "label": np.tile(classes[arrays["labels"]], copies)[:n_train],
            "flipped": np.tile(arrays["flipped"], copies)[:n_train],
        },
        query_columns={"label": classes[query_labels]},
    )


def small() -> Task:
    """The first 100,000 rows of :func:`ten_classes`."""
    return ten_classes(100_000)


def _clusters(features: NDArray[Any], each: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Assignments (n,) and centroids of k-means (k-means++ is not needed for what this is for)."""
    import faiss

    means = faiss.Kmeans(features.shape[1], each, niter=15, seed=SEED, max_points_per_centroid=1000)
    means.train(features)
    return means.index.search(features, 1)[1][:, 0], means.centroids


def pseudo_classes(n_train: int | None = None) -> Task:
    """1,000 classes on the features of the last of the three checkpoints.

    Args:
        n_train: how many rows; by default 250,000.
    """
    n_train, classes = n_train or sizes().pseudo, sizes().classes
    train, queries = _arrays(n_train)
    arrays = cifar10.data()
    coarse = np.tile(arrays["labels"], rounds(n_train))[:n_train]
    each = classes // 10

    def fill(folder: Path) -> None:
        features = np.concatenate([part[:, -1] for part in train])[:n_train].astype(np.float32)
        asked = np.asarray(queries[:, -1], dtype=np.float32)
        labels, query_labels = np.empty(n_train, dtype=np.int64), np.empty(len(asked), dtype=np.int64)
        for label in range(10):
            mine = np.flatnonzero(coarse == label)
            found, centroids = _clusters(features[mine], each)
            labels[mine] = label * each + found
            those = np.flatnonzero(arrays["query_labels"] == label)
            distances = ((asked[those][:, None] - centroids[None]) ** 2).sum(2)
            query_labels[those] = label * each + distances.argmin(1)
        np.save(folder / "labels.npy", labels)
        np.save(folder / "query_labels.npy", query_labels)
        _train_head(features, labels, classes, folder)

    folder = once(cache_folder() / "checkpoints" / f"{VERSION}-pseudo{_other(n_train)}", fill)
    labels, query_labels = np.load(folder / "labels.npy"), np.load(folder / "query_labels.npy")
    return Task(
        name="augmented CIFAR-10 in 1,000 clusters",
        model=Head(classes, len(AFTER_EPOCHS) - 1),
        loss=cifar10.loss,
        train=Features(train, labels),
        query=Features([queries], query_labels),
        checkpoints=find_checkpoints(folder / "*.pt")[1::2],
        layers="layer",
        columns={"label": labels, "flipped": np.tile(arrays["flipped"], rounds(n_train))[:n_train]},
        query_columns={"label": query_labels},
    )


def _other(n_train: int) -> str:
    """What tells the heads of other numbers of rows apart."""
    return "" if n_train == sizes().pseudo else f"-{n_train}"


def _train_head(features: NDArray[Any], labels: NDArray[np.int64], classes: int, folder: Path) -> None:
    """Momentum SGD with a cosine schedule on the layer alone; a checkpoint after each epoch."""
    rows, targets = torch.from_numpy(features), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        head = Head(classes, len(AFTER_EPOCHS) - 1)
        optimizer = torch.optim.SGD(head.parameters(), lr=PSEUDO_RATE, momentum=0.9)
        steps = PSEUDO_EPOCHS * -(-len(rows) // PSEUDO_BATCH)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=PSEUDO_RATE / 20)
        recorder = Recorder(head, optimizer, folder)
        for epoch in range(PSEUDO_EPOCHS):
            total = 0.0
            for batch in torch.randperm(len(rows)).split(PSEUDO_BATCH):
                optimizer.zero_grad()
                mean_loss = nn.functional.cross_entropy(head.layer(rows[batch]), targets[batch])
                mean_loss.backward()
                optimizer.step()
                scheduler.step()
                total += float(mean_loss.detach()) * len(batch)
            recorder.save()
            print(f"epoch {epoch + 1}/{PSEUDO_EPOCHS}: training loss {total / len(rows):.3f}", file=sys.stderr)


def main() -> None:
    """Compute features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="1/1", help="the I-th of N parts, beside others, one thread each")
    parser.add_argument("--quick", action="store_true", help="alone: features of some digits, in a folder that goes")
    options = parser.parse_args()
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["GRADINDEX_QUICK"] = os.environ.get("GRADINDEX_QUICK_SHARED", folder)
            make_features()
            task = ten_classes()
            print(f"{task.name}: {task.n_train:,} rows, {task.n_query:,} queries")
        return
    part, parts = (int(number) for number in options.part.split("/"))
    torch.set_num_threads(1 if parts > 1 else torch.get_num_threads())
    make_features(part - 1, parts)


if __name__ == "__main__":
    main()
