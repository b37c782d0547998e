"""Exact products of layers on general routes: which way is taken, and that each equals autograd."""

import numpy as np
import pytest
import reference
import torch
import toys
from torch import nn
from torch.utils.data import TensorDataset

import gradindex
from gradindex.gradients import Engine, Products


class Recurrent(nn.Module):
    """A sequence to a class."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.head = getattr(nn, kind)(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(x)[0][:, -1])


class Attentive(nn.Module):
    """One layer of a transformer, with its packed weights."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.inner(x).mean(1))


class _Once(torch.autograd.Function):
    """x^3, of which torch knows a first derivative and nothing more."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, delta):
        (x,) = ctx.saved_tensors
        return delta * 3 * x**2


class _Twice(torch.autograd.Function):
    """x^3 without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, delta):
        (x,) = ctx.saved_tensors
        return delta * 3 * x**2


class Cubic(nn.Module):
    """A parameter that no hook knows, and a cube."""

    def __init__(self, cube):
        super().__init__()
        self.p, self.head, self.cube = nn.Parameter(torch.ones(6)), nn.Linear(24, 3), cube

    def forward(self, x):
        return self.head(self.cube(x * self.p.sigmoid()).flatten(1))


def truth_of(task, count):
    queries = reference.gradients(task, [task.query[i] for i in range(count)], "query")
    return reference.scores(task, queries, reference.gradients(task, task.train), toys.RATES)


CASES = {
    "GRU": (lambda: Recurrent("GRU"), "forward mode"),
    "LSTM": (lambda: Recurrent("LSTM"), "forward mode"),
    "attention": (Attentive, "forward mode"),
    "a cube": (lambda: Cubic(lambda x: x**3), "forward mode"),
    "no forward rule": (lambda: Cubic(_Twice.apply), "double backward"),
    "no second derivative": (lambda: Cubic(_Once.apply), "gradients"),
}


@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("case", CASES)
def test_each_way_equals_autograd(tmp_path, case, count):
    make, route = CASES[case]
    task = toys.make_task(tmp_path, make(), shape=(4, 6), n_query=20)
    found = gradindex.exact_scores(task, [task.query[i] for i in range(count)], precision="float64")
    truth, scale = truth_of(task, count)
    assert np.all(np.abs(found - truth) <= 1e-10 * scale)
    with Engine(task, "float64") as engine:
        engine.check_routes()
        assert Products(engine, [task.query[i] for i in range(count)], "query").route == (
            "gradients" if count == 20 else route
        )


def test_an_lstm_in_float32_takes_the_second_way(tmp_path):
    # Its fused kernel, for float32 alone, has no forward-mode rule.
    task = toys.make_task(tmp_path, Recurrent("LSTM"), shape=(4, 6))
    with Engine(task) as engine:
        engine.check_routes()
        products = Products(engine, [task.query[0]], "query")
        (found,) = products.of(list(task.train))
    truth, scale = truth_of(task, 1)
    assert np.all(np.abs(found.numpy() - truth) <= 1e-5 * scale)
    assert products.route == "double backward"


def test_no_example_has_a_gradient_of_its_own_for_a_few_queries(tmp_path, monkeypatch):
    task = toys.make_task(tmp_path, Recurrent("GRU"), shape=(4, 6))
    with Engine(task, "float64") as engine:
        engine.check_routes()
        products = Products(engine, [task.query[0]], "query")
        for name in ("vmap_gradients", "loop_gradients"):
            monkeypatch.setattr(f"gradindex.gradients.engine.{name}", None)
        (found,) = products.of(list(task.train))
    truth, scale = truth_of(task, 1)
    assert np.all(np.abs(found.numpy() - truth) <= 1e-10 * scale)


def test_several_queries_share_one_pass_over_the_data(tmp_path):
    reads = []

    class Counting(TensorDataset):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)

    task = toys.make_task(tmp_path, Recurrent("GRU"), shape=(4, 6))
    task = gradindex.Task(task.model, task.loss, Counting(*task.train.tensors), task.checkpoints)
    items = [task.train[i] for i in range(3)]
    counts = []
    for some in (items[:1], items):
        reads.clear()
        gradindex.exact_scores(task, some, np.arange(1, 11), batch_size=4)
        assert reads[-10:] == list(range(1, 11))  # after the checks
        counts.append(len(reads))
    assert counts[0] == counts[1]
