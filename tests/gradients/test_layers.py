"""Every kind of layer against autograd in float64, and the route that it takes."""

import pytest
import torch
import toys
from reference import check_against_autograd
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from gradindex.factors import Formed
from gradindex.gradients import Engine
from gradindex.gradients.rules import convolutions


def after(*layers, features):
    """The layers, then everything flattened into a small classifier."""
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3))


IMAGE = (2, 6, 6)
LAYERS = {
    "conv1d": (after(nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2), features=12), (2, 5), "convolution"),
    "conv2d strides": (after(nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0)), features=45), IMAGE, "convolution"),
    "conv2d same": (after(nn.Conv2d(2, 3, 5, padding="same"), features=108), IMAGE, "convolution"),
    "conv2d circular": (
        after(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), features=108), IMAGE, "convolution",
    ),
    "conv2d dilated": (after(nn.Conv2d(2, 3, 3, dilation=2, bias=False), features=12), IMAGE, "convolution"),
    "conv2d groups": (after(nn.Conv2d(2, 4, 3, groups=2), features=64), IMAGE, "convolution"),
    "conv2d depthwise": (after(nn.Conv2d(2, 2, 3, groups=2, bias=False), features=32), IMAGE, "convolution"),
    "conv3d": (
        after(nn.Conv3d(1, 2, 2, stride=(1, 2, 1), dilation=(1, 1, 2)), features=16), (1, 3, 4, 4), "convolution",
    ),
    "transposed 1d": (after(nn.ConvTranspose1d(2, 3, 3, 2, 1, output_padding=1), features=24), (2, 4), "convolution^T"),
    "transposed 2d": (after(nn.ConvTranspose2d(2, 3, 3, 2, dilation=2), features=675), IMAGE, "convolution^T"),
    "transposed 3d": (after(nn.ConvTranspose3d(1, 2, 2, (1, 2, 1)), features=192), (1, 2, 4, 3), "convolution^T"),
    "transposed groups": (after(nn.ConvTranspose2d(2, 4, 2, groups=2), features=196), IMAGE, "convolution^T"),
    "batch norm 1d": (after(nn.Linear(6, 4), nn.BatchNorm1d(4), features=4), (6,), "linear"),
    "batch norm": (after(nn.BatchNorm2d(2), features=72), IMAGE, "normalisation"),
    "batch norm 3d": (after(nn.BatchNorm3d(2), features=16), (2, 2, 2, 2), "normalisation"),
    "group norm": (after(nn.GroupNorm(2, 4), features=36), (4, 3, 3), "normalisation"),
    "instance norm": (after(nn.InstanceNorm2d(2, affine=True), features=72), IMAGE, "normalisation"),
    "instance norm, running": (
        after(nn.InstanceNorm2d(2, affine=True, track_running_stats=True), features=72), IMAGE, "normalisation",
    ),
    "layer norm": (after(nn.LayerNorm(6), features=6), (6,), "normalisation"),
    "layer norm, positions": (after(nn.LayerNorm([3, 6]), features=36), (2, 3, 6), "normalisation"),
    "layer norm, no bias": (after(nn.LayerNorm(6, bias=False), features=12), (2, 6), "normalisation"),
    "rms norm": (after(nn.RMSNorm(6), features=12), (2, 6), "normalisation"),
    "prelu": (after(nn.PReLU(2), features=72), IMAGE, "vmap"),
    "weight norm": (
        after(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4, bias=False)), features=4), (6,), "vmap",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYERS)
def test_layers_equal_autograd(tmp_path, case):
    model, shape, route = LAYERS[case]
    routes = check_against_autograd(toys.make_task(tmp_path, model, shape=shape))
    assert next(iter(routes.values())) == route


WINDOWS = [case for case, (_, _, route) in LAYERS.items() if route == "convolution"]


@pytest.mark.parametrize("case", [case for case in WINDOWS if case not in ("conv2d groups", "conv2d depthwise")])
def test_windows_that_are_never_laid_out_give_the_same_numbers(tmp_path, monkeypatch, case):
    model, shape, _ = LAYERS[case]
    task = toys.make_task(tmp_path, model, shape=shape, rates=[{"*.weight": 0.3, "*.bias": 0.7}])
    kept = {}
    with Engine(task, "float64") as engine:
        engine.run(0, task.read(task.train_ids), kept.__setitem__)
    windows = kept[0]
    formed = Formed(windows.gradient)
    rows, columns = windows.gradient.shape[1:]
    left, right = torch.randn(rows, 2).double(), torch.randn(columns, 3).double()
    torch.testing.assert_close(windows.two_sided(left, right), formed.two_sided(left, right))
    for count in (1, 3, 4):
        some = Formed(formed.gradient[:count])
        torch.testing.assert_close(windows.products(some), formed.products(some))
    for side, n in ((0, rows), (1, columns)):
        start, weights = torch.randn(n, 2).double(), torch.rand(12).double()
        torch.testing.assert_close(windows.sided(start, side, weights), formed.sided(start, side, weights))
    monkeypatch.setattr(convolutions, "_PART_BYTES", 1)
    parts = [(part, some.gradient) for part, some in windows.parts()]
    assert len(parts) > 1
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), formed.gradient)


class Bag(nn.Module):
    """Words to a class."""

    def __init__(self, first, features=5):
        super().__init__()
        self.words, self.head = first, nn.Linear(features, 3)

    def forward(self, words):
        hidden = self.words(words)
        return self.head(torch.tanh(hidden if hidden.ndim == 2 else hidden.mean(1)))


class Offsets(Bag):
    """The bags of all examples in one list of words."""

    def forward(self, words):
        lengths = (words != 0).sum(1)
        hidden = self.words(words[words != 0], lengths.cumsum(0) - lengths)
        return self.head(torch.tanh(hidden))


class Bags(nn.Module):
    """Bags of all examples in one list; ``call(words, weights, indices, offsets)`` makes a vector of each."""

    def __init__(self, call, **options):
        super().__init__()
        self.words, self.head, self.call = nn.EmbeddingBag(9, 5, **options), nn.Linear(5, 3), call

    def forward(self, batch):
        indices, offsets, weights = batch
        return self.head(torch.tanh(self.call(self.words, indices, offsets, weights)))


def by_words(words, indices, offsets, weights):
    return words(indices, offsets)


def weighted(words, indices, offsets, weights):
    return words(indices, offsets=offsets, per_sample_weights=weights)


def to_the_end(words, indices, offsets, weights):
    return words(input=indices, offsets=torch.cat([offsets, offsets.new_tensor([len(indices)])]))


def functionally(words, indices, offsets, weights):
    return functional.embedding_bag(indices, words.weight, offsets, mode="sum")


def in_halves(words, indices, offsets, weights):
    """Two bags for each example, the second one empty."""
    return words(indices, torch.stack([offsets, offsets], 1).flatten()).unflatten(0, (-1, 2)).sum(1)


BAGS = {
    "sums": (by_words, {"mode": "sum"}, "embedding bag"),
    "means": (by_words, {}, "embedding bag"),
    "means with padding": (by_words, {"padding_idx": -3}, "embedding bag"),
    "sums with padding, sparse": (by_words, {"mode": "sum", "padding_idx": 2, "sparse": True}, "embedding bag"),
    "weighted sums": (weighted, {"mode": "sum"}, "embedding bag"),
    "last offset": (to_the_end, {"mode": "mean", "include_last_offset": True}, "embedding bag"),
    "maxima": (by_words, {"mode": "max"}, "loop"),
    "functional": (functionally, {}, "loop"),
    "two bags each": (in_halves, {"mode": "sum"}, "loop"),
}


def in_one_list(items):
    bags = [words for words, _, _ in items]
    ends = torch.tensor([len(words) for words in bags]).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
    weights = torch.cat([weight for _, weight, _ in items])
    return (torch.cat(bags), offsets, weights), torch.tensor([label for _, _, label in items])


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[1] * 3 + [4, 0, 1, 2, 1, 0, 1, 1, 1], [3, 2, 0, 1, 5, 4, 2, 2, 3, 3, 2, 3]])
@pytest.mark.parametrize("case", BAGS)
def test_bags_by_offsets_equal_autograd(tmp_path, case, lengths):
    call, options, route = BAGS[case]
    generator = torch.Generator().manual_seed(4)
    items = [
        (torch.randint(9, (n,), generator=generator), torch.rand(n, generator=generator).double(), i % 3)
        for i, n in enumerate(lengths)
    ]
    task = toys.make_task(tmp_path, Bags(call, **options), train=items, query=items[:4], collate=in_one_list)
    assert next(iter(check_against_autograd(task).values())) == route


EMBEDDINGS = {
    "embedding": (Bag(nn.Embedding(9, 5)), "embedding"),
    "padding": (Bag(nn.Embedding(9, 5, padding_idx=0)), "embedding"),
    "sparse": (Bag(nn.Embedding(9, 5, sparse=True)), "embedding"),
    "sparse bag": (Bag(nn.EmbeddingBag(9, 5, mode="sum", sparse=True)), "embedding bag"),
    "bag of means": (Bag(nn.EmbeddingBag(9, 5, padding_idx=0)), "embedding bag"),
    "bag of sums": (Bag(nn.EmbeddingBag(9, 5, mode="sum")), "embedding bag"),
    "bag of maxima": (Bag(nn.EmbeddingBag(9, 5, mode="max")), "loop"),
    "bags by offsets": (Offsets(nn.EmbeddingBag(9, 5, mode="sum")), "embedding bag"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embeddings_equal_autograd(tmp_path, case):
    model, route = EMBEDDINGS[case]
    torch.manual_seed(1)
    data = [TensorDataset(torch.randint(9, (n, 6)), torch.randint(3, (n,))) for n in (12, 4)]  # words come twice
    routes = check_against_autograd(toys.make_task(tmp_path, model, train=data[0], query=data[1]))
    assert next(iter(routes.values())) == route
