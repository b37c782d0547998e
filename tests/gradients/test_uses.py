"""Parameters that no module rule knows, by the functions that use them, in float64 against autograd."""

import numpy as np
import pytest
import torch
import toys
from reference import check_against_autograd
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import gradindex
from gradindex.errors import TaskError
from gradindex.factors import Formed, Layer
from gradindex.projection import Projection

SHAPE = (4, 6)


class Using(nn.Module):
    """Applies ``use(x, p)`` to (batch, 4, 6) and classifies what comes out."""

    def __init__(self, use, shape, features=24):
        super().__init__()
        self.p, self.head, self.use = nn.Parameter(torch.ones(shape)), nn.Linear(features, 3), use

    def forward(self, x):
        return self.head(torch.tanh(self.use(x, self.p)).flatten(1))


def tokens(x, p):
    return torch.cat([p.expand(len(x), -1, -1), x], 1)


def norm(x, p):
    return p * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


FUNCTION = {
    "scale": (lambda x, p: x * p, 6),
    "scale on the left": (lambda x, p: p * x, 6),
    "scalar": (lambda x, p: x * p, ()),
    "per position": (lambda x, p: x + p, (4, 1)),
    "positions": (lambda x, p: x + p, (1, 4, 6)),
    "difference": (lambda x, p: p - x, 6),
    "quotient": (lambda x, p: x / p, 6),
    "reciprocal": (lambda x, p: x.exp() / (3 + p.expand_as(x)), 6),
    "in place": (lambda x, p: x.clone().mul_(p), 6),
    "used twice": (lambda x, p: x * p + p, 6),
    "root mean square norm": (norm, 6),
    "first positions": (lambda x, p: x + p[:, : x.shape[1]], (1, 9, 6)),
    "by unsqueeze": (lambda x, p: x * p.unsqueeze(-1), 4),
    "by view": (lambda x, p: x * p.view(1, 4, 1), 4),
    "by index": (lambda x, p: x * p[None, :, None], 4),
    "transposed view": (lambda x, p: x * p.transpose(0, 1), (6, 4)),
    "broadcast": (lambda x, p: x * torch.broadcast_to(p, x.shape), 6),
    "matrix on the right": (lambda x, p: x @ p, (6, 6)),
    "linear": (functional.linear, (6, 6)),
    "linear with a slice": (lambda x, p: functional.linear(x, p[2:8]), (9, 6)),
    "product and scale": (lambda x, p: (x @ p) + p[:4], (6, 6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FUNCTION)
def test_parameters_are_found_in_the_functions_that_use_them(tmp_path, case):
    use, shape = FUNCTION[case]
    routes = check_against_autograd(toys.make_task(tmp_path, Using(use, shape), shape=SHAPE))
    assert routes == {"p": "function", "head": "linear"}


def test_a_class_token_is_found_where_it_is_expanded(tmp_path):
    routes = check_against_autograd(toys.make_task(tmp_path, Using(tokens, (1, 1, 6), 30), shape=SHAPE))
    assert routes["p"] == "function"


UNKNOWN = {
    "a function of its own": (lambda x, p: x * p.sigmoid(), 6),
    "on the left of a product": (lambda x, p: p @ x, (4, 4)),
    "one use unknown": (lambda x, p: x * p + torch.exp(p), 6),
    "computed with first": (lambda x, p: x * (p * 2), 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", UNKNOWN)
def test_uses_that_are_unknown_leave_to_the_general_route(tmp_path, case):
    use, shape = UNKNOWN[case]
    assert check_against_autograd(toys.make_task(tmp_path, Using(use, shape), shape=SHAPE))["p"] == "vmap"


class Moody(nn.Module):
    """Another use of its scale for one example among many."""

    def __init__(self):
        super().__init__()
        self.p, self.head = nn.Parameter(torch.ones(6)), nn.Linear(24, 3)

    def forward(self, x):
        assert self.p.shape == (6,)
        x = x * self.p + torch.zeros_like(self.p)
        return self.head((x * self.p.sigmoid() if bool((x > 100).any()) else x).flatten(1))


def test_a_use_that_the_check_did_not_see_stops_the_build(tmp_path):
    task = toys.make_task(tmp_path, Moody(), shape=SHAPE)
    expected = gradindex.exact_scores(task, list(task.query), precision="float64")
    task.train.tensors[0][5] = 1e4
    with pytest.raises(
        TaskError, match=r"The model uses p in sigmoid\(\) on this batch, as it did not on the examples"
    ):
        gradindex.exact_scores(task, list(task.query))
    some = gradindex.exact_scores(task, list(task.query), np.array([0, 1, 2, 3, 4]), precision="float64")
    np.testing.assert_allclose(some, expected[:, :5])  # in float32, batches of another size are rounded otherwise


class Gated(Moody):
    """With a gate that queries alone go through, in a way that hooks do not know."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(3))


def test_what_the_check_of_queries_changes_leaves_the_check_of_training_examples_standing(tmp_path):
    def loss(model, batch):
        return toys.cross_entropy(model, batch) + torch.ones_like(model.p).sum()

    def query_loss(model, batch):
        return toys.cross_entropy(lambda x: model(x) * model.gate.sigmoid(), batch)

    task = toys.make_task(tmp_path, Gated(), shape=SHAPE, loss=loss, query_loss=query_loss)
    assert check_against_autograd(task) == {"p": "function", "gate": "loop", "head": "linear"}


class TiedWords(nn.Module):
    """An embedding that is the output layer as well; with ``bias``, the output has one of its own."""

    def __init__(self, padding=None, width=5):
        super().__init__()
        self.words, self.out = nn.Embedding(9, width, padding_idx=padding), nn.Linear(width, 9)
        self.out.weight = self.words.weight

    def forward(self, words):
        return self.out(torch.tanh(self.words(words).cumsum(1)))


def next_word(model, batch):
    logits = model(batch[0])[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), batch[0][:, 1:], reduction="none").mean(1)


def sentences(n, low=0):
    return TensorDataset(torch.randint(low, 9, (n, 6)))


@pytest.mark.slow
@pytest.mark.parametrize("model", [TiedWords(), TiedWords(padding=2), TiedWords(width=9)])
def test_tied_embeddings_are_never_formed_and_equal_autograd(tmp_path, model):
    torch.manual_seed(3)
    task = toys.make_task(tmp_path, model, loss=next_word, train=sentences(12), query=sentences(4))
    routes = check_against_autograd(task)
    assert routes == {"words.weight": "function^T", "out": "linear"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "tensorsketch", "kronecker", "gaussian"])
def test_tied_embeddings_make_the_rows_of_their_formed_gradients(tmp_path, kind):
    torch.manual_seed(3)
    task = toys.make_task(
        tmp_path, TiedWords(), loss=next_word, train=sentences(12), query=sentences(4), layers="words.weight"
    )
    whole = gradindex.build(task, tmp_path / "whole", projection=Projection("none"), precision="float64")
    np.testing.assert_allclose(
        whole.self_influence().sum(1), np.diag(gradindex.exact_scores(task, list(task.train), role="train")), rtol=1e-4
    )
    store = gradindex.build(task, tmp_path / "store", projection=Projection(kind, 45), precision="float64")
    formed = torch.from_numpy(whole.rows(np.arange(12))).double().reshape(12, 3, 5, 9)
    layer = Layer("words.weight", ("words.weight",), 5, 9, "function^T")
    for checkpoint in range(3):
        block = torch.zeros(12, store.dim // 3, dtype=torch.float64)
        Projection(kind, 45).for_checkpoint(checkpoint, [layer], block).add(block, 0, Formed(formed[:, checkpoint]))
        found = store.rows(np.arange(12)).reshape(12, 3, -1)[:, checkpoint]
        np.testing.assert_allclose(found, block, rtol=1e-4, atol=1e-5)


class SharedPositions(nn.Module):
    """Positions looked up once for all examples, and a linear layer that sees them alone."""

    def __init__(self):
        super().__init__()
        self.where, self.mix, self.norm, self.head = (
            nn.Embedding(9, 6),
            nn.Linear(6, 6),
            nn.LayerNorm(6),
            nn.Linear(24, 3),
        )

    def forward(self, x):
        positions = self.norm(self.mix(self.where(torch.arange(x.shape[1])[None])))
        return self.head(torch.tanh(x + positions).flatten(1))


def test_what_all_examples_share_stays_on_the_hooks(tmp_path):
    routes = check_against_autograd(toys.make_task(tmp_path, SharedPositions(), shape=SHAPE))
    assert routes["where"] == "embedding"
    assert "vmap" not in routes.values()


class SharedShape(SharedPositions):
    """Fails where what is shared gets a batch axis."""

    def forward(self, x):
        (positions,) = self.mix(self.where(torch.arange(x.shape[1])[None]))
        return self.head(torch.tanh(x + self.norm(positions)).flatten(1))


@pytest.mark.slow
def test_a_model_that_needs_the_shared_axis_gets_it_back(tmp_path):
    routes = check_against_autograd(toys.make_task(tmp_path, SharedShape(), shape=SHAPE))
    assert routes["head"] == "linear"
    assert routes["where.weight"] in ("vmap", "loop")
