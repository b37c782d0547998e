"""Softmax layers with many outputs, for shape.py: that of ImageNet's shape, and real ones on data that are at hand.

Real ones: each class of MNIST or CIFAR-10 split into clusters, on features of a network for the ten classes; and the
next word of news, on the last state of a small transformer.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import augmented
import cifar10
import imagenet_shape
import mnist
import numpy as np
import torch
from numpy.typing import NDArray
from reference import data_file, flip_labels, image_archive
from torch import Tensor, nn
from torch.nn import functional

from gradindex import Task

SEED, WRONG, BATCH = 3, 0.05, 250
# The rate of a head's first checkpoint times the mean ||x||^2; as in imagenet_shape.py, a third of it at the next.
RATE = 60.0
MLP_CHECKPOINTS = (1, 2, 4)
NET_BATCH, NET_RATE, CHANNELS = 128, 0.1, (32, 64, 128, 512)
WIDTH, ATTENTION, LAYERS, LENGTH, TEXTS_BATCH, TEXTS_RATE = 128, 4, 2, 32, 32, 3e-3


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Args:
        rows: that are looked at.
        queries: that are looked at.
        trained: rows of MNIST and CIFAR-10 that heads are trained on.
        classes: clusters of MNIST and CIFAR-10.
        words: outputs of the language model.
        epochs: of a head at each of its checkpoints.
        net_steps: of the convolutional network until each of its checkpoints.
        text_steps: of the language model until each of its checkpoints.
    """

    rows: int
    queries: int
    trained: int
    classes: int
    words: int
    epochs: int
    net_steps: int
    text_steps: int


FULL = Sizes(20_000, 2000, 60_000, 1000, 4000, 4, 150, 200)
QUICK = Sizes(1000, 200, 1000, 50, 256, 3, 2, 3)


@dataclass(frozen=True)
class Seen:
    """What a layer sees at one checkpoint, and its weights.

    Args:
        features: (n, d) float32 of the rows.
        query_features: (m, d) float32.
        weight: (classes, d).
        bias: (classes,).
    """

    features: Tensor
    query_features: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Head:
    """A layer at three checkpoints.

    Args:
        name: for people.
        labels: (n,) of the rows, as trained.
        query_labels: (m,).
        rates: learning rates of the checkpoints.
        seen: of each checkpoint, loaded when it is called.
    """

    name: str
    labels: Tensor
    query_labels: Tensor
    rates: Sequence[float]
    seen: Sequence[Callable[[], Seen]]


def of_imagenet_shape(sizes: Sizes) -> Head:
    """The first rows of scripts/tasks/imagenet_shape.py, which are in no order."""
    return _of_task("ImageNet's shape", imagenet_shape.task(), imagenet_shape.Head(), np.arange(sizes.rows), sizes)


def of_pseudo_classes(sizes: Sizes) -> Head:
    """Rows of augmented.py's clusters.

    Raises:
        FileNotFoundError: the ResNet-9's features are not there, which take more than an hour.
    """
    folder = augmented.features_folder()
    if not (folder / "queries.npy").exists():
        raise FileNotFoundError(f"{folder} has no features of the ResNet-9. Run scripts/tasks/augmented.py.")
    task = augmented.pseudo_classes()
    rows = np.sort(np.random.default_rng(SEED).permutation(task.n_train)[: sizes.rows])
    return _of_task("CIFAR-10, ResNet-9", task, augmented.Head(augmented.sizes().classes), rows, sizes)


def _of_task(name: str, task: Task, model: nn.Module, rows: NDArray[np.int64], sizes: Sizes) -> Head:
    """The head of a task of examples (features (3, d), label) whose model has a ``layer`` and says which features."""
    sides = [(task.train, rows), (task.query, range(min(sizes.queries, task.n_query)))]
    (features, labels), (queries, query_labels) = (
        [torch.stack(part) for part in zip(*(data[int(i)] for i in which), strict=True)] for data, which in sides
    )

    def seen(number: int) -> Seen:
        weights = task.checkpoints[number].load(model)
        at = int(weights["at"])
        return Seen(features[:, at], queries[:, at], weights["layer.weight"], weights["layer.bias"])

    rates = [point.learning_rates(["layer.weight"])["layer.weight"] for point in task.checkpoints]
    return Head(name, labels, query_labels, rates, [lambda at=at: seen(at) for at in range(len(rates))])


def of_mnist(sizes: Sizes) -> Head:
    """Clusters of the digits, on the last hidden layer of the reference MLP."""
    archive, task = image_archive("mnist"), mnist.task()
    order = np.random.default_rng(SEED).permutation(len(archive["train_labels"]))[: sizes.trained]
    sides = []
    for part, which in (("train", order), ("test", slice(None))):
        images = torch.from_numpy((archive[f"{part}_images"][which].astype(np.float32) / 255 - mnist.MEAN) / mnist.STD)
        found = []
        for number in MLP_CHECKPOINTS:
            model = mnist.make_model()
            model.load_state_dict(task.checkpoints[number].load(model))
            found.append(_in_parts(model.eval()[:-1], images))  # type: ignore[index]  # an nn.Sequential
        sides.append((found, np.asarray(archive[f"{part}_labels"][which])))
    return _of_clusters("MNIST, MLP", *sides, sizes)


def of_cifar10(sizes: Sizes) -> Head:
    """Clusters of the pictures, on the means over places of a small convolutional network that is trained here."""
    archive = image_archive("cifar10")
    order = np.random.default_rng(SEED).permutation(len(archive["train_labels"]))[: sizes.trained]
    labels, query_labels = np.asarray(archive["train_labels"])[order], np.asarray(archive["test_labels"])
    images, query_images = (
        cifar10.normalise(torch.from_numpy(np.array(pictures)))
        for pictures in (archive["train_images"][order], archive["test_images"])
    )
    channels = (3, *CHANNELS)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        blocks: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise(channels)):
            size, stride = (3, 2) if number < len(CHANNELS) - 1 else (1, 1)
            convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
            blocks += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=NET_RATE, momentum=0.9, weight_decay=5e-4)
        targets = torch.from_numpy(labels)
        found: list[Tensor] = []
        query_found: list[Tensor] = []
        for number in range(3):
            for group in optimizer.param_groups:
                group["lr"] = NET_RATE / 3**number
            net.train()
            for _ in range(sizes.net_steps):
                some = torch.randint(len(images), (NET_BATCH,))
                optimizer.zero_grad()
                functional.cross_entropy(net(images[some]), targets[some]).backward()
                optimizer.step()
            net.eval()
            found.append(_in_parts(net[:-1], images))
            query_found.append(_in_parts(net[:-1], query_images))
    name = "CIFAR-10, small network"
    return _of_clusters(name, (found, labels), (query_found, query_labels), sizes)


@torch.no_grad()
def _in_parts(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(part) for part in inputs.split(100)])


Side = tuple[Sequence[Tensor], NDArray[np.int64]]


def _of_clusters(name: str, train: Side, query: Side, sizes: Sizes) -> Head:
    """A head for the clusters of each class, trained at each checkpoint on its features.

    Args:
        name: for people.
        train: features (n, d) of each checkpoint, and classes (n,); in no order.
        query: features (m, d) and classes (m,).
        sizes: how many clusters, and how long it is trained.
    """
    features, query_features = train[0], query[0]
    clusters, query_clusters = _clusters(train, query, sizes.classes // 10)
    labels, _ = flip_labels(clusters, WRONG, sizes.classes, SEED)
    targets = torch.from_numpy(labels)
    rows = slice(0, sizes.rows)
    some = torch.from_numpy(np.random.default_rng(SEED).permutation(len(query_clusters))[: sizes.queries])
    rates, seen = [], []
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        layer = nn.Linear(features[0].shape[1], sizes.classes)
        optimizer = torch.optim.SGD(layer.parameters(), lr=RATE, momentum=0.9)
        for number, x in enumerate(features):
            rates.append(RATE / 3**number / float((x**2).sum(1).mean()))
            for group in optimizer.param_groups:
                group["lr"] = rates[-1]
            for _ in range(sizes.epochs):
                for batch in torch.randperm(len(x)).split(BATCH):
                    optimizer.zero_grad()
                    functional.cross_entropy(layer(x[batch]), targets[batch]).backward()
                    optimizer.step()
            weight, bias = (part.detach().clone() for part in (layer.weight, layer.bias))
            seen.append(lambda s=Seen(x[rows], query_features[number][some], weight, bias): s)
    return Head(name, targets[rows], torch.from_numpy(query_clusters)[some], rates, seen)


def _clusters(train: Side, query: Side, each: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each class, ``each`` clusters of the last features by k-means, and the nearest one of each query."""
    import faiss

    found = tuple(np.empty(len(classes), dtype=np.int64) for _, classes in (train, query))
    for label in range(10):
        mine, theirs = (np.flatnonzero(classes == label) for _, classes in (train, query))
        features, queries = train[0][-1][mine].numpy(), query[0][-1][theirs].numpy()
        points = {"min_points_per_centroid": 1, "max_points_per_centroid": 1000}
        means = faiss.Kmeans(features.shape[1], each, niter=15, seed=SEED, **points)
        means.train(features)
        found[0][mine], found[1][theirs] = (
            label * each + means.index.search(side, 1)[1][:, 0] for side in (features, queries)
        )
    return found[0], found[1]


class Words(nn.Module):
    """A transformer that says the next word."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, ATTENTION, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, words)

    def states(self, ids: Tensor) -> Tensor:
        """(b, t, WIDTH), what the head sees."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        states: Tensor = self.layers(self.words(ids) + self.places.weight[: ids.shape[1]], mask, is_causal=True)
        return states


def of_news(sizes: Sizes) -> Head:
    """The next word in AG News, a row for each place; a tenth of the texts are for queries.

    Raises:
        FileNotFoundError: the texts are not there.
    """
    texts = torch.from_numpy(_texts(sizes.words))
    held = len(texts) // 10
    query_texts, texts = texts[:held], texts[held:]
    generator = np.random.default_rng(SEED)
    # Places whose next word is among the outputs' own; 0 is any other word.
    chosen = []
    for part, count in ((texts, sizes.rows), (query_texts, sizes.queries)):
        places = np.argwhere(part[:, 1:].numpy() > 0)
        chosen.append(torch.from_numpy(generator.permutation(places)[:count]))
    labels, query_labels = (
        part[places[:, 0], places[:, 1] + 1] for part, places in zip((texts, query_texts), chosen, strict=True)
    )
    seen = []
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = Words(sizes.words)
        optimizer = torch.optim.AdamW(model.parameters(), lr=TEXTS_RATE)
        for _ in range(3):
            for _ in range(sizes.text_steps):
                some = texts[torch.randint(len(texts), (TEXTS_BATCH,))]
                optimizer.zero_grad()
                logits = model.head(model.states(some[:, :-1]))
                targets = some[:, 1:]
                functional.cross_entropy(logits[targets > 0], targets[targets > 0]).backward()
                optimizer.step()
            with torch.no_grad():
                found = [
                    torch.cat([model.states(batch[:, :-1]) for batch in part.split(200)])[places[:, 0], places[:, 1]]
                    for part, places in zip((texts, query_texts), chosen, strict=True)
                ]
            weight, bias = (part.detach().clone() for part in (model.head.weight, model.head.bias))
            seen.append(lambda s=Seen(found[0], found[1], weight, bias): s)
    # Adam's rate is no step size of TracIn's; the checkpoints count alike.
    return Head("AG News, next word", labels, query_labels, [1.0] * 3, seen)


def _texts(words: int) -> NDArray[np.int64]:
    """(n, LENGTH + 1) the first words of each text that has as many, as numbers; in no order."""
    with data_file("ag_news_7600.csv").open(newline="", encoding="utf-8") as file:
        said = [re.findall(r"\w+|[^\w\s]", " ".join(line[1:]).lower()) for line in list(csv.reader(file))[1:]]
    counts = Counter(word for text in said for word in text)
    numbers = {word: 1 + number for number, (word, _) in enumerate(counts.most_common(words - 1))}
    length = min(LENGTH, max(map(len, said)) - 1) + 1
    kept = [[numbers.get(word, 0) for word in text[:length]] for text in said if len(text) >= length]
    return np.random.default_rng(SEED).permutation(np.array(kept, dtype=np.int64))


HEADS: dict[str, Callable[[Sizes], Head]] = {
    "imagenet_shape": of_imagenet_shape,
    "mnist": of_mnist,
    "cifar10": of_cifar10,
    "pseudo_classes": of_pseudo_classes,
    "news": of_news,
}
