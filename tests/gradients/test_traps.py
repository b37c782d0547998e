"""The traps of published implementations, each one sprung: docs/architecture.md says how they are avoided."""

import numpy as np
import pytest
import reference
import torch
import toys
from reference import check_against_autograd
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from toys import PerToken, TimeMajor, Towers

import gradindex
from gradindex.errors import GradIndexError, LossError, NonFiniteGradientError, TaskError
from gradindex.projection import Projection


class Flattened(PerToken):
    """``inner`` sees the tokens of all examples in one long axis."""

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x.flatten(0, 1))).unflatten(0, x.shape[:2]).mean(1))


class Tied(nn.Module):
    """One weight in two layers, one of them transposed."""

    def __init__(self):
        super().__init__()
        self.down, self.head = nn.Linear(6, 4, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(functional.linear(torch.tanh(self.down(x)), self.down.weight.T))


class TwoNames(nn.Module):
    """One parameter under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(torch.tanh(self.a(x))))


class Recurrent(nn.Module):
    """Parameters that no hook knows."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head, self.gain = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.gain * self.head(self.rnn(x)[0][:, -1])


def test_positions_are_summed_before_the_product_not_after(tmp_path):
    routes = check_against_autograd(toys.make_task(tmp_path, PerToken(), shape=(7, 6)))
    assert routes == {"inner": "linear", "outer": "linear"}


@pytest.mark.slow
@pytest.mark.parametrize("model", [TimeMajor, Flattened])
def test_a_layer_whose_first_axis_is_not_the_example_is_taken_by_rows(tmp_path, model):
    routes = check_against_autograd(toys.make_task(tmp_path, model(), shape=(2, 6)))  # as many positions as examples
    assert routes["inner"] == "linear by rows"
    assert routes["outer"] == "linear"


@pytest.mark.slow
@pytest.mark.parametrize(("model", "shape"), [(Tied, (6,)), (TwoNames, (6,)), (Towers, (6,)), (Recurrent, (4, 6))])
def test_shared_parallel_and_unknown_parameters_equal_autograd(tmp_path, model, shape):
    check_against_autograd(toys.make_task(tmp_path, model(), shape=shape))


@pytest.mark.slow
@pytest.mark.parametrize("make", [toys.mlp, toys.used_twice])
def test_self_influence_is_the_squared_norm_with_one_eta_and_cross_terms(tmp_path, make):
    task = toys.make_task(tmp_path, make())
    store = gradindex.build(task, tmp_path / "store", projection=Projection("none"))
    squared = reference.gradients(task, task.train).square().sum(2).numpy()
    np.testing.assert_allclose(store.self_influence(), np.array(toys.RATES) * squared, rtol=1e-4)
    rows = store.rows(np.arange(12)).reshape(12, 3, -1)
    np.testing.assert_allclose(np.square(rows).sum(2), np.array(toys.RATES) * squared, rtol=1e-4)


def test_each_parameter_group_has_its_own_learning_rate(tmp_path):
    rates = [{"0.*": 0.3, "2.weight": 0.05, "2.bias": 0.0}, {"*": 0.1}, {"0.*": 0.0, "2.*": 0.2}]
    task = toys.make_task(tmp_path, rates=rates)
    sizes = [(35, "0.*"), (15, "2.weight"), (3, "2.bias")]  # the mlp's parameters in order
    etas = [[0.3, 0.05, 0.0], [0.1, 0.1, 0.1], [0.0, 0.2, 0.2]]
    per_parameter = [[eta for eta, (size, _) in zip(row, sizes, strict=True) for _ in range(size)] for row in etas]
    check_against_autograd(task, per_parameter)


@pytest.mark.slow
def test_the_bias_belongs_to_its_layer_and_can_be_left_out(tmp_path):
    for layers, prefixes in (
        ("2", ("2.",)),
        ("2.weight", ("2.weight",)),
        ("2.bias", ("2.bias",)),
        (["0", "2.bias"], ("0.", "2.bias")),
    ):
        check_against_autograd(toys.make_task(tmp_path, layers=layers), prefixes=prefixes)


def margin(model, batch):
    logits = model(batch[0])
    return -logits.gather(1, batch[1][:, None]).squeeze(1)


@pytest.mark.slow
def test_queries_have_a_loss_of_their_own(tmp_path):
    task = toys.make_task(tmp_path, query_loss=margin)
    check_against_autograd(task)
    gradindex.build(task, tmp_path / "store", projection=Projection("none"))
    retriever = gradindex.load(task, tmp_path / "store")
    exact = gradindex.exact_scores(task, list(task.query))
    np.testing.assert_array_equal(retriever.proponents(range(4), k=12).ids, np.argsort(-exact, 1))
    # A training example as the query is explained by the query loss as well.
    exact = gradindex.exact_scores(task, [task.train[3]])
    np.testing.assert_allclose(retriever.proponents(3, k=12, source="train").scores, -np.sort(-exact, 1), rtol=1e-5)


def test_dropout_and_batch_statistics_are_off_and_the_model_comes_back_as_it_was(tmp_path):
    model = toys.convolutional()
    task = toys.make_task(tmp_path, model, shape=(2, 8, 8))
    model.train()
    model[1].eval()  # each module's own mode counts
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    first = gradindex.exact_scores(task, list(task.query))
    np.testing.assert_array_equal(first, gradindex.exact_scores(task, list(task.query)))
    assert [m.training for m in model] == [True, False, True, True, True, True, True]
    assert identities == [id(p) for p in model.parameters()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_module_under_two_names_gets_its_own_weights_back(tmp_path):
    task = toys.make_task(tmp_path, toys.used_twice())
    before = [(id(p), p.clone()) for p in task.model.parameters()]
    gradindex.exact_scores(task, list(task.query))
    assert all(id(p) == i and torch.equal(p, v) for p, (i, v) in zip(task.model.parameters(), before, strict=True))


def test_the_model_comes_back_after_an_exception_and_random_states_are_untouched(tmp_path):
    def fails(model, batch):
        if len(batch[0]) > 2:
            raise RuntimeError("from the user's loss")
        np.random.rand(), torch.rand(1)
        return toys.cross_entropy(model, batch)

    task = toys.make_task(tmp_path, loss=fails)
    task.model.train()
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    with pytest.raises(RuntimeError, match="from the user's loss"):
        gradindex.exact_scores(task, list(task.query))
    assert task.model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.model.modules())
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])


WRONG_LOSSES = {
    "mean": (lambda m, b: toys.cross_entropy(m, b).mean(), "per example"),
    "per class": (lambda m, b: m(b[0]), "per example"),
    "a float": (lambda m, b: 0.5, "returned a float"),
    "divided by the batch": (lambda m, b: toys.cross_entropy(m, b) / len(b[0]), "others of its batch"),
    "batch statistics": (lambda m, b: (m(b[0]) - m(b[0]).mean(0)).square().sum(1), "others of its batch"),
}


@pytest.mark.parametrize("case", WRONG_LOSSES)
def test_a_loss_that_is_not_per_example_is_refused(tmp_path, case):
    loss, message = WRONG_LOSSES[case]
    with pytest.raises(LossError, match=message):
        gradindex.build(toys.make_task(tmp_path, loss=loss), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_shuffling_loader_is_refused(tmp_path):
    data = TensorDataset(torch.randn(4, 6), torch.randint(3, (4,)))
    with pytest.raises(TaskError, match=r"train is a DataLoader.*train=loader\.dataset"):
        toys.make_task(tmp_path, train=DataLoader(data, shuffle=True))


def test_random_augmentation_is_refused(tmp_path):
    class Augmented(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn_like(x), y

    task = toys.make_task(tmp_path, train=Augmented(torch.randn(12, 6), torch.randint(3, (12,))))
    with pytest.raises(TaskError, match=r"differs between two reads.*augmented"):
        gradindex.build(task, tmp_path / "store")


@pytest.mark.slow
def test_a_zero_gradient_scores_zero(tmp_path):
    def loss(model, batch):
        return toys.cross_entropy(model, batch) * (batch[0][:, 0] > -100)

    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    x[4] = -1000.0
    task = toys.make_task(tmp_path, loss=loss, train=TensorDataset(x, y))
    store = gradindex.build(task, tmp_path / "store")
    assert store.self_influence()[4].tolist() == [0, 0, 0]
    fitted = gradindex.build(task, tmp_path / "fitted", projection=Projection("fitted", 20))
    assert not fitted.rows(np.array([4])).any()
    assert fitted.rows(np.array([5])).any()
    scores = gradindex.exact_scores(task, list(task.query))
    assert scores[:, 4].tolist() == [0] * 4
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_names_its_example_and_checkpoint(tmp_path, bad):
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    x[7] = bad
    task = toys.make_task(tmp_path, train=TensorDataset(x, y))
    with pytest.raises(NonFiniteGradientError, match=r"Training example 7 .* checkpoint 0 \(.*w_0\.pt\)"):
        gradindex.build(task, tmp_path / "store", batch_size=4)
    with pytest.raises(NonFiniteGradientError, match=r"Training example 7 .* checkpoint 0 \(.*w_0\.pt\)"):
        gradindex.build(task, tmp_path / "fitted", projection=Projection("fitted", 20))
    with pytest.raises(NonFiniteGradientError, match="Training example 7 "):
        gradindex.exact_scores(task, list(task.query))
    with pytest.raises(NonFiniteGradientError, match="Query 0 of 1"):
        gradindex.exact_scores(task, [task.train[7]], np.array([0, 1]))


def test_a_pattern_that_matches_nothing_lists_close_names(tmp_path):
    with pytest.raises(TaskError, match=r"'outter' matches nothing.*Close names: outer"):
        gradindex.build(toys.make_task(tmp_path, PerToken(), shape=(7, 6), layers="outter"), tmp_path / "store")


def test_a_model_without_parameters_is_refused(tmp_path):
    with pytest.raises(GradIndexError, match="no parameters"):
        gradindex.build(toys.make_task(tmp_path, nn.Sequential(nn.Flatten())), tmp_path / "store")


@pytest.mark.slow
def test_batch_size_and_order_do_not_change_rows(tmp_path):
    task = toys.make_task(tmp_path, toys.convolutional(), shape=(2, 8, 8))
    stores = [gradindex.build(task, tmp_path / f"store{size}", batch_size=size) for size in (1, 5, 12)]
    rows = [store.rows(np.arange(12)) for store in stores]
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-5)
    np.testing.assert_allclose(rows[2], rows[0], atol=1e-5)
    ids = np.array([7, 2, 11])
    scores = gradindex.exact_scores(task, list(task.query), precision="float64")
    some = gradindex.exact_scores(task, list(task.query)[::-1], ids, precision="float64", batch_size=2)
    np.testing.assert_allclose(some, scores[::-1][:, ids], rtol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("make", "shape"), [(toys.convolutional, (2, 8, 8)), (Recurrent, (4, 6))])
def test_a_cuda_model_gives_the_same_scores(tmp_path, make, shape):
    task = toys.make_task(tmp_path, make(), shape=shape)
    expected = gradindex.exact_scores(task, list(task.query))
    task.model.cuda()
    np.testing.assert_allclose(gradindex.exact_scores(task, list(task.query)), expected, rtol=1e-3, atol=1e-5)
    gradindex.build(task, tmp_path / "store")
    hits = gradindex.load(task, tmp_path / "store").proponents(range(4), k=12)
    np.testing.assert_array_equal(hits.ids, np.argsort(-expected, 1))
