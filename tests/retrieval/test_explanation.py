"""Scores by checkpoint and layer: equal to plain autograd on every route, and shown as tables and pictures."""

import re

import numpy as np
import pytest
import reference
import torch
import toys
from torch import nn
from toys import Attentive, Cubic, Once, Recurrent, Twice

import gradindex
from gradindex.errors import ArgumentError
from gradindex.gradients import Engine, Products, check_routes
from gradindex.projection import Projection


class Tied(nn.Module):
    """An embedding that is the output layer as well, a scale of its own, and tokens."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Embedding(7, 4), nn.Parameter(torch.ones(4))

    def forward(self, tokens):
        return (self.table(tokens) * self.scale).mean(1) @ self.table.weight.T


def token_task(folder):
    task = toys.make_task(folder, Tied())
    generator = torch.Generator().manual_seed(0)

    def data(n):
        tokens = torch.randint(7, (n, 5), generator=generator)
        return torch.utils.data.TensorDataset(tokens, torch.randint(7, (n,), generator=generator))

    return gradindex.Task(task.model, task.loss, data(12), task.checkpoints, query=data(4))


MODELS = {
    "MLP": lambda folder: toys.make_task(folder),
    "convolutions": lambda folder: toys.make_task(folder, toys.convolutional(), shape=(2, 8, 8)),
    "a layer used twice": lambda folder: toys.make_task(folder, toys.used_twice()),
    "shared weights": token_task,
    "forward mode": lambda folder: toys.make_task(folder, Recurrent("GRU"), shape=(4, 6)),
    "packed weights": lambda folder: toys.make_task(folder, Attentive(), shape=(4, 6)),
    "double backward": lambda folder: toys.make_task(folder, Cubic(Twice.apply), shape=(4, 6)),
    "gradients": lambda folder: toys.make_task(folder, Cubic(Once.apply), shape=(4, 6)),
}


def by_layer(task, layers, queries, ids):
    """(n_query, n_ids, C, L) in float64 from plain autograd, a parameter at a time."""
    sizes = {name: p.numel() for name, p in task.model.named_parameters()}
    starts = dict(zip(sizes, np.cumsum([0, *list(sizes.values())[:-1]]).tolist(), strict=True))
    mine = reference.gradients(task, [task.query[q] for q in queries], "query").numpy()
    theirs = reference.gradients(task, [task.train[i] for i in ids]).numpy()
    parts = []
    for layer in layers:
        some = np.concatenate([np.arange(starts[n], starts[n] + sizes[n]) for n in layer.parameters])
        parts.append(np.einsum("qcp,ncp,c->qnc", mine[:, :, some], theirs[:, :, some], np.array(toys.RATES)))
    return np.stack(parts, 3)


@pytest.fixture(scope="module", params=MODELS)
def opened(request, tmp_path_factory):
    """A task of each model, and its store opened."""
    folder = tmp_path_factory.mktemp("opened")
    task = MODELS[request.param](folder)
    gradindex.build(task, folder / "store", projection=Projection(dim=16), precision="float64", batch_size=12)
    return task, gradindex.load(task, folder / "store")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_split_equals_autograd_layer_by_layer_and_adds_up(opened, count):
    task, retriever = opened
    ids = [5, 0, 11, 5]
    split = retriever.explain(range(count), ids)
    layers = retriever.store.manifest.map.layers
    assert split.scores.shape == (count, 4, 3, len(layers)) and split.scores.dtype == np.float64
    exact = gradindex.exact_scores(task, [task.query[q] for q in range(count)], np.array(ids), precision="float64")
    np.testing.assert_allclose(split.scores.sum((2, 3)), exact, atol=1e-9 * np.abs(exact).max())
    truth = by_layer(task, layers, range(count), ids)
    np.testing.assert_allclose(split.scores, truth, atol=1e-9 * np.abs(truth).max())
    assert split.layers == tuple(layer.name for layer in layers)
    assert split.checkpoints == tuple(f"{n} w_{n}.pt" for n in range(3))


@pytest.mark.slow
def test_a_group_on_every_route_has_the_weighted_sum_of_its_queries(opened, monkeypatch):
    task, retriever = opened
    each = by_layer(task, retriever.store.manifest.map.layers, range(4), [5, 0, 11]).mean(0)
    monkeypatch.setattr(gradindex.gradients.products, "_AT_ONCE", 3)
    split = retriever.explain(range(4), [5, 0, 11], aggregate="mean")
    np.testing.assert_allclose(split.scores[0], each, atol=1e-9 * np.abs(each).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "route"), [("forward mode", "forward mode"), ("double backward", "double backward"),
                        ("gradients", "gradients")],
)  # fmt: skip
def test_the_routes_above_are_those_that_they_are_named_for(tmp_path, case, route):
    task = MODELS[case](tmp_path)
    with Engine(task, "float64") as engine:
        check_routes(engine)
        assert Products(engine, [task.query[0]], "query").route == route
        assert any(not layer.hooked for layer in engine.layers)


def test_stored_factors_give_the_split_without_the_model(tmp_path, monkeypatch):
    task = toys.make_task(tmp_path)
    store = gradindex.build(task, tmp_path / "store", factors="float32")
    retriever = gradindex.load(task, tmp_path / "store")
    asked = retriever.prepare([0, 3])
    monkeypatch.setattr(Engine, "__enter__", lambda self: pytest.fail("the model was used"))
    split = retriever.explain(asked, [2, 7, 1])
    monkeypatch.undo()
    truth = by_layer(task, store.manifest.map.layers, [0, 3], [2, 7, 1])
    np.testing.assert_allclose(split.scores, truth, atol=1e-5 * np.abs(truth).max())


@pytest.mark.slow
@pytest.mark.parametrize("factors", [None, "float32"])
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_a_split_of_a_group_is_that_of_its_queries_together(tmp_path, factors, aggregate):
    task = toys.make_task(tmp_path)
    gradindex.build(task, tmp_path / "store", factors=factors)
    retriever = gradindex.load(task, tmp_path / "store")
    each = getattr(np, aggregate)(retriever.explain(range(4), [0, 8]).scores, axis=0)
    split = retriever.explain(range(4), [0, 8], aggregate=aggregate)
    np.testing.assert_allclose(split.scores[0], each, atol=1e-5 * np.abs(each).max())
    assert split.queries == (f"{aggregate} of 4 queries",)


@pytest.mark.slow
@pytest.mark.parametrize("factors", [None, "float32"])
def test_parts_of_cosines_add_up_to_the_cosine(tmp_path, factors):
    task = toys.make_task(tmp_path)
    gradindex.build(task, tmp_path / "store", unit_norm=True, factors=factors)
    retriever = gradindex.load(task, tmp_path / "store")
    split = retriever.explain([0, 1], np.arange(12))
    np.testing.assert_allclose(split.scores.sum((2, 3)), retriever.exact_scores([0, 1]), atol=1e-5)
    assert np.abs(split.scores.sum((2, 3))).max() <= 1 + 1e-5
    assert "cosines" in split.note


@pytest.fixture
def split(tmp_path):
    task = toys.make_task(tmp_path)
    gradindex.build(task, tmp_path / "store")
    return gradindex.load(task, tmp_path / "store").explain([1, 2], [3, 9])


def test_a_split_prints_as_tables_with_sums(split):
    blocks = str(split).split("\n\n")
    assert [block.splitlines()[0] for block in blocks[:4]] == [
        f"query {q}, id {i}: score {split.scores[q - 1, n].sum():.5g}" for q in (1, 2) for n, i in enumerate((3, 9))
    ]
    lines = [re.split(r"\s{2,}", line.strip()) for line in blocks[0].splitlines()[1:]]
    assert lines[0] == ["at checkpoint", "0", "2", "all layers"]
    part = split.scores[0, 0]
    for line, row in zip(lines[1:4], part, strict=True):
        assert line[1:] == [f"{v:.5g}" for v in [*row, row.sum()]]
    assert lines[4] == ["all checkpoints", *[f"{v:.5g}" for v in [*part.sum(0), part.sum()]]]
    assert blocks[4] == split.note and "which add up; positive score" in split.note


def test_records_of_a_split_name_every_part(split):
    records = split.records()
    assert len(records) == 2 * 2 * 3 * 2
    assert records[3] == {
        "query": "query 1", "id": 3, "checkpoint": "1 w_1.pt", "layer": "2", "score": split.scores[0, 0, 1, 1],
    }  # fmt: skip


@pytest.mark.slow
def test_a_page_of_a_split_has_a_heat_map_for_each_pair(split, tmp_path):
    split.save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "Score of training example 9 for query 2 by checkpoint (down) and layer (across)" in page


def test_what_cannot_be_split_is_refused(tmp_path):
    task = toys.make_task(tmp_path)
    gradindex.build(task, tmp_path / "store")
    retriever = gradindex.load(task, tmp_path / "store")
    for ids, message in (([12], "There is no training id 12"), ([], "at least one training id"),
                         ([[1]], r"shape \(1, 1\)"), ([0.5], "must be integers")):  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            retriever.explain(0, ids)
