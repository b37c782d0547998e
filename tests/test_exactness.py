"""Scores against a naive float64 reference: autograd on one example at a time."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import gradindex
from gradindex.errors import ArgumentError, LossError, MismatchError, TaskError
from gradindex.projection import Projection

RATES = (0.3, 0.1, 0.02)


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def squared_error(model, batch):
    return (model(batch[0]).squeeze(1) - batch[1]).square()


def models():
    yield "mlp", nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (6,), cross_entropy
    yield "tanh last", nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Tanh()), (6,), cross_entropy
    conv = [nn.Conv2d(2, 4, 3, 2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)]
    yield "conv", nn.Sequential(*conv, nn.Flatten(), nn.Linear(16, 3)), (2, 8, 8), cross_entropy
    yield "regression", nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)), (6,), squared_error
    shared = nn.Linear(6, 6)
    yield "module used twice", nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(6, 3)), (6,), cross_entropy


def make_task(folder, model, shape, loss, layers="*"):
    torch.manual_seed(0)
    model = copy.deepcopy(model)  # cases are shared between tests
    checkpoints = []
    for number, rate in enumerate(RATES):
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.4
                tensor.copy_(noise)
        path = folder / f"w_{number}.pt"
        torch.save(model.state_dict(), path)
        checkpoints.append(gradindex.Checkpoint(path, learning_rate=rate, step=number))

    def data(n):
        target = torch.randn(n, dtype=torch.float64) if loss is squared_error else torch.randint(3, (n,))
        return TensorDataset(torch.randn(n, *shape, dtype=torch.float64), target)

    return gradindex.Task(model=model, loss=loss, train=data(12), query=data(4), checkpoints=checkpoints, layers=layers)


def reference(task, items, names):
    """(n, checkpoints, parameters) gradients by plain autograd."""
    model, rows = task.model.double(), []
    training = model.training
    model.eval()
    for item in items:
        per_checkpoint = []
        for checkpoint in task.checkpoints:
            model.load_state_dict(torch.load(checkpoint.path))
            model.zero_grad()
            task.loss(model, task.collate([item])).sum().backward()
            chosen = [p.grad.flatten() for n, p in model.named_parameters() if any(n.startswith(x) for x in names)]
            per_checkpoint.append(torch.cat(chosen))
        rows.append(torch.stack(per_checkpoint))
    model.train(training)
    return torch.stack(rows)


@pytest.mark.parametrize("case", list(models()), ids=lambda case: case[0])
@pytest.mark.parametrize("layers,names", [("*", ("",)), ("0", ("0.",))], ids=["all", "first"])
def test_exact_scores_equal_autograd(tmp_path, case, layers, names):
    task = make_task(tmp_path, *case[1:], layers)
    train, query = (reference(task, list(data), names) for data in (task.train, task.query))
    eta = torch.tensor(RATES, dtype=torch.float64)
    truth = torch.einsum("c,qcp,ncp->qn", eta, query, train).numpy()
    norms = [(eta[:, None] * g.square()).sum((1, 2)).sqrt().numpy() for g in (query, train)]
    found = gradindex.exact_scores(task, list(task.query), precision="float64")
    assert np.all(np.abs(found - truth) <= 1e-10 * np.outer(*norms))


def test_build_and_query_give_the_true_order_for_both_signs(tmp_path):
    task = make_task(tmp_path, *next(models())[1:])
    store = gradindex.build(task, tmp_path / "store", projection=Projection("none"), batch_size=5, shard_rows=5)
    truth = gradindex.exact_scores(task, list(task.query))
    np.testing.assert_allclose(
        store.self_influence().sum(1), np.diag(gradindex.exact_scores(task, list(task.train))), rtol=1e-4
    )
    retriever = gradindex.load(tmp_path / "store", task)
    assert np.array_equal(retriever.proponents(range(4), k=3).ids, np.argsort(-truth, 1)[:, :3])
    assert np.array_equal(retriever.opponents(range(4), k=3, rerank="none").ids, np.argsort(truth, 1)[:, :3])
    assert store.verify() == []
    with pytest.raises(ArgumentError, match="k is 13"):
        retriever.proponents(0, k=13)
    with pytest.raises(MismatchError, match="layers"):
        gradindex.load(tmp_path / "store", replace(task, layers="0"))


def test_sketch_is_unbiased_and_equal_on_both_routes():
    from gradindex.factors import Factors, Layer
    from gradindex.projection.hashing import hash64

    assert hash64(0, 1)[0] == 0xE220A8397B1DCDAF  # SplitMix64's published first output for seed 0
    torch.manual_seed(0)
    layer, x, d = (
        Layer("l", ("l.weight",), 4, 6, "linear"),
        torch.randn(2, 1, 6).double(),
        torch.randn(2, 1, 4).double(),
    )
    positions = Factors(torch.cat([x, 0 * x], 1), torch.cat([d, d], 1))
    products = []
    for seed in range(400):
        sketch = Projection("tensorsketch", 16, seed).for_checkpoint(0, [layer], x)
        block, other = torch.zeros(2, 16).double(), torch.zeros(2, 16).double()
        sketch.add(block, 0, Factors(x, d))
        sketch.add(other, 0, positions)
        torch.testing.assert_close(block, other)
        products.append(float(block[0] @ block[1]))
    truth = float(Factors(x, d).products(Factors(x, d))[0, 1])
    assert abs(np.mean(products) - truth) < 3 * np.std(products) / 20


def test_a_mean_loss_and_an_augmented_data_set_are_refused(tmp_path):
    task = make_task(tmp_path, *next(models())[1:])
    with pytest.raises(LossError, match="per example"):
        gradindex.build(replace(task, loss=lambda m, b: cross_entropy(m, b).mean()), tmp_path / "a")

    class Augmented(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn_like(x), y

    with pytest.raises(TaskError, match="augmented"):
        gradindex.build(replace(task, train=Augmented(*task.train.tensors)), tmp_path / "b")


def test_a_module_under_two_names_gets_its_own_weights_back(tmp_path):
    task = make_task(tmp_path, *list(models())[4][1:])
    before = [(id(p), p.clone()) for p in task.model.parameters()]
    gradindex.exact_scores(task, list(task.query))
    assert all(
        id(p) == i and torch.equal(p, value) for p, (i, value) in zip(task.model.parameters(), before, strict=True)
    )


def test_mode_weights_hooks_and_random_state_are_untouched(tmp_path):
    task = make_task(tmp_path, *next(models())[1:])
    task.model.train()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    gradindex.build(task, tmp_path / "store")
    assert task.model.training and not any(m._forward_hooks for m in task.model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())
    assert torch.equal(random_state, torch.random.get_rng_state())
