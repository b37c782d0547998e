"""Frozen weights in half precision: held as they are, and cast where they are used."""

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.nn import functional
from torch.utils import checkpoint

import gradindex
from gradindex.errors import TaskError
from gradindex.gradients import Engine, engine
from gradindex.gradients.narrow import Narrow
from gradindex.projection import Projection

WEIGHT = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()


class Adapted(nn.Module):
    """Tokens through frozen bfloat16 matrices with trained float32 ones beside them, the embedding tied to the head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6, dtype=torch.bfloat16)
        self.base = nn.Linear(6, 6, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(6, dtype=torch.bfloat16)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        for parameter in (*self.embedding.parameters(), *self.base.parameters(), *self.norm.parameters()):
            parameter.requires_grad_(False)

    def forward(self, x):
        return self.rest(self.embedding(x))

    def rest(self, x):
        x = x + functional.linear(x, self.base.weight, self.base.bias) + self.up(self.down(x.to(self.up.weight.dtype)))
        x = torch.addmm(self.base.bias, self.norm(x).flatten(0, 1), self.base.weight).view_as(x)
        return (x @ self.embedding.weight.t()).mean(1)


@pytest.fixture
def task(tmp_path):
    torch.manual_seed(0)
    model = Adapted()
    data = torch.utils.data.TensorDataset(torch.randint(9, (12, 3)), torch.randint(9, (12,)))
    for step in (1, 2, 3):
        nn.init.normal_(model.up.weight)
        torch.save(model.state_dict(), tmp_path / f"step_{step}.pt")
    checkpoints = gradindex.find_checkpoints(tmp_path, learning_rate=0.1)
    return gradindex.Task(model, toys.cross_entropy, data, checkpoints, data)


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_scores_are_those_of_wide_weights(task, tmp_path, monkeypatch, precision):
    projection = Projection("none")
    narrow = gradindex.build(task, tmp_path / "narrow", projection=projection, precision=precision)
    scores = gradindex.exact_scores(task, [0, 1], precision=precision)
    monkeypatch.setattr(engine, "NARROW", ())
    wide = gradindex.build(task, tmp_path / "wide", projection=projection, precision=precision)
    rtol = 1e-2 if precision == "bfloat16" else 1e-5
    ids = np.arange(12)
    np.testing.assert_allclose(narrow.rows(ids), wide.rows(ids), rtol=rtol, atol=rtol * np.abs(wide.rows(ids)).max())
    expected = gradindex.exact_scores(task, [0, 1], precision=precision)
    np.testing.assert_allclose(scores, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_frozen_matrices_take_two_bytes_a_number_once_for_all_checkpoints(task):
    states = Engine(task).states
    first = states[0]
    assert isinstance(first["model.base.weight"], Narrow)
    assert not isinstance(first["model.up.weight"], Narrow)
    assert not isinstance(first["model.norm.weight"], Narrow)  # few numbers, of which much is made
    matrices, others = 9 * 6 + 6 * 6, 6 + 6 + 6
    assert states.nbytes == 2 * matrices + 4 * others + 4 * 12 + 3 * 4 * 12


class Checkpointed(Adapted):
    """The same, of which all but the embedding runs again on the way back."""

    def forward(self, x):
        return checkpoint.checkpoint(self.rest, self.embedding(x), use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_over_frozen_narrow_weights_is_refused(tmp_path):
    torch.manual_seed(0)
    model = Checkpointed()
    data = torch.utils.data.TensorDataset(torch.randint(9, (12, 3)), torch.randint(9, (12,)))
    torch.save(model.state_dict(), tmp_path / "step_1.pt")
    checkpoints = gradindex.find_checkpoints(tmp_path, learning_rate=0.1)
    task = gradindex.Task(model, toys.cross_entropy, data, checkpoints, data)
    with pytest.raises(TaskError, match="is run by torch.utils.checkpoint with use_reentrant=True"):
        gradindex.build(task, tmp_path / "store")


def test_an_operation_sees_the_wide_weight():
    weight = Narrow.of(WEIGHT, torch.float64)
    assert weight.dtype == torch.float64
    assert weight.shape == (5, 4)
    assert isinstance(weight[1], Narrow)
    assert isinstance(weight.t(), Narrow)
    torch.testing.assert_close(weight + 0, WEIGHT.double())
    torch.testing.assert_close(torch.cat([weight, weight]), torch.cat([WEIGHT.double()] * 2))
    assert (weight.widened(torch.float32) * 1).dtype == torch.float32
    assert weight.plain().data_ptr() == WEIGHT.data_ptr()
    indices = torch.tensor([[0, 3]])
    torch.testing.assert_close(functional.embedding(indices, weight), WEIGHT.double()[indices])


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_right_both_ways(shape, bias):
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    extra = [torch.randn(5, dtype=torch.float64, requires_grad=True)] if bias else []
    weight = Narrow.of(WEIGHT, torch.float64)
    assert torch.autograd.gradcheck(lambda x, *b: functional.linear(x, weight, *b), (inputs, *extra))
    assert torch.autograd.gradgradcheck(lambda x, *b: functional.linear(x, weight, *b).square(), (inputs, *extra))
    torch.testing.assert_close(
        functional.linear(inputs, weight, *extra), functional.linear(inputs, WEIGHT.double(), *extra)
    )


def test_a_linear_layer_keeps_the_narrow_weight():
    kept = []
    inputs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        functional.linear(inputs, Narrow.of(WEIGHT, torch.float64))
    assert kept == [torch.bfloat16]


def test_transforms_of_functions_take_the_wide_weight():
    weight = Narrow.of(WEIGHT, torch.float64)
    inputs = torch.randn(3, 4, dtype=torch.float64)

    def loss(x):
        return functional.linear(x, weight).square().sum()

    expected = 2 * functional.linear(inputs, WEIGHT.double()) @ WEIGHT.double()
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(inputs), expected)
    _, along = torch.func.jvp(loss, (inputs,), (torch.ones_like(inputs),))
    torch.testing.assert_close(along, expected.sum())
