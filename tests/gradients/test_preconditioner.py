"""Adam's second moments as a fixed diagonal, D^(1/2) on both sides, against the formula."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import toys

import gradindex
from gradindex.errors import CheckpointError, MismatchError, TaskError
from gradindex.gradients import AdamDiagonal, Engine, Products, check_routes
from gradindex.projection import Projection


@pytest.fixture(params=["mlp", "convolutional"])
def task(request, tmp_path):
    """A network trained with Adam for a few steps, recorded twice."""
    shape = (2, 8, 8) if request.param == "convolutional" else (6,)
    task = toys.make_task(tmp_path, getattr(toys, request.param)(), shape=shape)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=0.01)
    recorder = gradindex.Recorder(task.model, optimizer, tmp_path / "recorded", second_moments=True)
    x, y = task.train.tensors
    for _ in range(2):
        for _ in range(3):
            optimizer.zero_grad()
            toys.cross_entropy(task.model, (x.float(), y)).mean().backward()
            optimizer.step()
        recorder.save()
    return replace(task, checkpoints=gradindex.find_checkpoints(tmp_path / "recorded"), preconditioner="adam")


@pytest.mark.slow
def test_scores_are_the_preconditioned_inner_products(task):
    train, queries = (reference.gradients(task, data) for data in (task.train, task.query))
    rates = []
    for checkpoint in task.checkpoints:
        moments = checkpoint.second_moments()
        weights = [0.01 / (moments[name].double().sqrt() + 1e-8).flatten() for name, _ in task.model.named_parameters()]
        rates.append(torch.cat(weights))
    truth, scale = reference.scores(task, queries, train, torch.stack(rates))
    found = gradindex.exact_scores(task, list(task.query), precision="float64")
    assert np.all(np.abs(found - truth) <= 1e-6 * scale)  # v itself was saved in float32
    plain = gradindex.exact_scores(replace(task, preconditioner=None), list(task.query), precision="float64")
    assert not np.allclose(found / np.abs(found).max(), plain / np.abs(plain).max(), atol=0.05)


@pytest.mark.slow
def test_rows_and_self_influence_stay_consistent(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", projection=Projection("none"))
    rows = store.rows(np.arange(12))
    np.testing.assert_allclose(store.self_influence().sum(1), np.square(rows).sum(1), rtol=1e-4)
    own = np.diag(gradindex.exact_scores(task, list(task.train)))
    np.testing.assert_allclose(store.self_influence().sum(1), own, rtol=1e-3)
    with pytest.raises(MismatchError, match="preconditioner differ"):
        gradindex.load(replace(task, preconditioner=None), store.folder)


def test_exact_products_form_the_gradients_of_queries_alone(task, monkeypatch):
    expected = gradindex.exact_scores(task, list(task.query), precision="float64")
    with Engine(task, "float64") as engine:
        check_routes(engine)
        products = Products(engine, list(task.query), "query")
        monkeypatch.setattr(AdamDiagonal, "train", None)
        found = products.of(task.read(task.train_ids))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_moments_must_have_been_recorded(tmp_path):
    with pytest.raises(CheckpointError, match=r"w_0\.pt has no recorded second moments. Train with gradindex.Recorder"):
        gradindex.exact_scores(toys.make_task(tmp_path, preconditioner="adam"), [(torch.zeros(6), torch.tensor(0))])


def test_only_adam_is_known(tmp_path):
    with pytest.raises(TaskError, match="preconditioner is 'sgd', but must be 'adam' or None"):
        toys.make_task(tmp_path, preconditioner="sgd")


@pytest.mark.slow
def test_shares_of_layers_and_groups_have_the_preconditioner_as_well(task, tmp_path):
    gradindex.build(task, tmp_path / "store", precision="float64")
    retriever = gradindex.load(task, tmp_path / "store")
    exact = retriever.exact_scores(range(4))
    close = {"atol": 1e-9 * np.abs(exact).max()}
    np.testing.assert_allclose(retriever.explain(range(4), np.arange(12)).scores.sum((2, 3)), exact, **close)
    group = retriever.exact_scores(retriever.prepare(range(4), aggregate="sum"))
    np.testing.assert_allclose(group, exact.sum(0, keepdims=True), **close)
