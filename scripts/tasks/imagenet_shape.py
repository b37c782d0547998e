r"""The last layer of an ImageNet network, in shape: 1,281,167 rows, 2,048 features and a bias, 1,000 classes.

No pictures: the features are drawn, each example's from its position, and kept nowhere, so that a store is all that
takes room on the disk. They are positive and heavy-tailed, as means over the places of a picture after a ReLU are;
classes stand in a tree, and an example lies between its own class and a near one, so that most of the probability is
shared by a few classes. The three checkpoints see different features, whose classes come apart as training goes on;
the layer is trained on a part of the rows, with momentum SGD, and gets about 78% of the queries right at the last. 5%
of the labels are wrong. How it differs from real layers, and where that flatters: docs/results/shape.md.

    gradindex build scripts/tasks/imagenet_shape.py:task --out /tmp/shape --projection fitted --dim 1000 \
        --row-type int8 --factors float32
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from reference import cache_folder, flip_labels, once, quick
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from gradindex import Recorder, Task, find_checkpoints

VERSION = "imagenet-shape-1"  # raise it when anything below changes features or weights
SEED, WRONG, BLOCK = 11, 0.05, 64
# Of each checkpoint: how far apart the classes' features are.
STRENGTHS = (0.45, 0.62, 0.8)
# How much of the means, and of the noise, all checkpoints have in common.
COMMON_MEANS, COMMON_NOISE = 0.7, 0.5
# Shares of the tree's levels in a class's mean, from the root; how far an example may lie from its own class.
LEVELS, MOST_BLEND = (0.4, 0.35, 0.25), 0.62
# A feature is SCALE exp(SPREAD z): positive, for it is a mean over a picture's places, and heavy-tailed.
SCALE, SPREAD = 0.35, 0.8
RATE, BATCH = 0.1, 256


@dataclass(frozen=True)
class Sizes:
    """How large the task is.

    Args:
        train: rows.
        query: examples of the test set.
        tree: branches of each level; their product is the number of classes.
        features: inputs of the layer.
        trained: rows that the layer is trained on for each checkpoint.
    """

    train: int
    query: int
    tree: tuple[int, int, int]
    features: int
    trained: int

    @property
    def classes(self) -> int:
        """How many."""
        return int(np.prod(self.tree))


FULL = Sizes(1_281_167, 20_000, (10, 10, 10), 2048, 65_536)
QUICK = Sizes(4000, 400, (4, 4, 3), 64, 4000)


def sizes() -> Sizes:
    """Those of the full form, or of the quick one."""
    return QUICK if quick() else FULL


class Drawn(Dataset[tuple[Tensor, Tensor]]):
    """Examples ((3, features) float32, label), drawn from their positions.

    Args:
        n: how many.
        stream: which of many such sets.
        wrong: the share of wrong labels.
    """

    def __init__(self, n: int, stream: int, wrong: float) -> None:
        self._n, self._stream = n, stream
        generator = np.random.default_rng((SEED, stream))
        classes = sizes().classes
        self.classes = generator.integers(0, classes, n)
        self.labels, self.wrong = flip_labels(self.classes, wrong, classes, SEED + stream)
        self._near = _near(self.classes, generator)
        self._blend = (MOST_BLEND * generator.random(n)).astype(np.float32)
        self._block = lru_cache(4)(self._drawn)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        features = self._block(position // BLOCK)[position % BLOCK]
        return torch.from_numpy(features), torch.tensor(self.labels[position])

    def _drawn(self, block: int) -> NDArray[np.float32]:
        """(at most BLOCK, 3, features): the features of neighbours."""
        which = slice(block * BLOCK, min((block + 1) * BLOCK, self._n))
        means, blend = class_means(), self._blend[which, None, None]
        mine = means[self.classes[which]]
        mine += blend * (means[self._near[which]] - mine)
        generator = np.random.default_rng((SEED, self._stream, 1, block))
        own = generator.standard_normal(mine.shape, dtype=np.float32)
        common = generator.standard_normal((len(mine), 1, mine.shape[2]), dtype=np.float32)
        mine += np.float32((1 - COMMON_NOISE) ** 0.5) * own + np.float32(COMMON_NOISE**0.5) * common
        mine *= SPREAD
        np.exp(mine, out=mine)
        mine *= SCALE
        return mine


@lru_cache(1)
def class_means() -> NDArray[np.float32]:
    """(classes, 3, features): before noise."""
    generator, shape = np.random.default_rng(SEED), sizes()
    parts = [np.zeros((shape.classes, features), dtype=np.float32) for features in (4 * [shape.features])]
    for level, share in enumerate(LEVELS):
        each = int(np.prod(shape.tree[level + 1 :]))
        for part in parts:
            codes = generator.standard_normal((shape.classes // each, shape.features), dtype=np.float32)
            part += np.float32(share**0.5) * codes.repeat(each, 0)
    common, *own = parts
    return np.stack(
        [strength * (COMMON_MEANS**0.5 * common + (1 - COMMON_MEANS) ** 0.5 * mine)
         for strength, mine in zip(STRENGTHS, own, strict=True)], 1
    ).astype(np.float32)  # fmt: skip


def _near(classes: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Another class for each: of its own branch most often, else of its limb, else any."""
    _, limbs, leaves = sizes().tree
    n, total = len(classes), sizes().classes
    spans = np.choose(generator.choice(3, n, p=(0.6, 0.3, 0.1)), (leaves, limbs * leaves, total))
    start = classes // spans * spans
    return start + (classes - start + generator.integers(1, spans)) % spans


class Head(nn.Module):
    """The layer, on the features of its own checkpoint."""

    at: Tensor

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.register_buffer("at", torch.tensor([at]))
        self.layer = nn.Linear(sizes().features, sizes().classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.layer(features.index_select(1, self.at)[:, 0])
        return logits


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each example."""
    features, labels = batch
    return functional.cross_entropy(model(features), labels, reduction="none")


def task() -> Task:
    """The layer at its three checkpoints, trained once (some minutes) and cached."""
    train = Drawn(sizes().train, 0, WRONG)
    query = Drawn(sizes().query, 1, 0)
    folder = once(cache_folder() / "checkpoints" / VERSION, lambda folder: _train(train, query, folder))
    return Task(
        name="ImageNet's shape",
        model=Head(),
        loss=loss,
        train=train,
        query=query,
        checkpoints=find_checkpoints(folder / "*.pt"),
        layers="layer",
        columns={"label": train.labels, "wrong": train.wrong},
        query_columns={"label": query.labels},
    )


def _train(train: Drawn, query: Drawn, folder: Path) -> None:
    """Momentum SGD, its rate lower for each checkpoint, whose features the layer gets from then on."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        head = Head()
        optimizer = torch.optim.SGD(head.parameters(), lr=RATE, momentum=0.9)
        recorder = Recorder(head, optimizer, folder)
        start = 0
        for at in range(len(STRENGTHS)):
            head.at.fill_(at)
            for group in optimizer.param_groups:
                group["lr"] = RATE / 3**at
            for _ in range(-(-sizes().trained // BATCH)):
                batch = [train[position % len(train)] for position in range(start, start + BATCH)]
                start += BATCH
                features, labels = (torch.stack(part) for part in zip(*batch, strict=True))
                optimizer.zero_grad()
                functional.cross_entropy(head(features), labels).backward()
                optimizer.step()
            recorder.save()
            print(f"checkpoint {at + 1}: {accuracy(head, query):.1%} of queries right", file=sys.stderr, flush=True)


@torch.no_grad()
def accuracy(head: nn.Module, examples: Drawn, most: int = 4000) -> float:
    """Share of the first examples that a layer gets right."""
    items = [examples[position] for position in range(min(most, len(examples)))]
    features, labels = (torch.stack(part) for part in zip(*items, strict=True))
    return float((head(features).argmax(1) == labels).float().mean())
