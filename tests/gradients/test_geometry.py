"""Geometries: one class and one registration each, against inner products computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import toys

import gradindex
from gradindex.errors import MismatchError, TaskError
from gradindex.factors import Factors, Formed
from gradindex.gradients import GEOMETRIES, AdamDiagonal, Cosine, Geometry, TracIn
from gradindex.projection import Projection

LAYERS = {"0": (5, 6), "2": (3, 5)}
RATES = torch.tensor(toys.RATES, dtype=torch.float64)[:, None]


def matrix(n):
    """The Hilbert matrix (n, n)."""
    places = torch.arange(n, dtype=torch.float64)
    return 1 / (1 + places[:, None] + places)


@pytest.fixture
def hilbert():
    @GEOMETRIES.register("hilbert")
    class Hilbert(TracIn):
        """Queries' gradients times a matrix from the left; training gradients as they are."""

        def query(self, checkpoint, layer, gradients):
            return Formed(matrix(layer.d_out).to(gradients.gradient) @ gradients.gradient)

    yield "hilbert"
    del GEOMETRIES._implementations["hilbert"]


@pytest.fixture
def doubled():
    @GEOMETRIES.register("doubled")
    class Doubled(TracIn):
        """The first layer counts twice: in the row of a query, and in its gradient for exact scores."""

        measure = "scores with a first layer that counts twice"
        by_factors = False  # of what exact() does, factors know nothing

        def query_rows(self, rows, squares):
            blocks = rows.reshape(*squares.shape, -1).clone()
            blocks[:, :, : 5 * 7] *= 2
            return blocks.flatten(1)

        def exact(self, checkpoint, layer, gradients):
            return Formed(gradients.gradient * (2 if layer.name == "0" else 1))

    yield "doubled"
    del GEOMETRIES._implementations["doubled"]


@pytest.fixture
def halved():
    @GEOMETRIES.register("halved")
    class Halved(TracIn):
        """The first layer of queries counts half."""

        def query(self, checkpoint, layer, gradients):
            weight = 0.5 if layer.name == "0" else 1
            return Factors(gradients.activations, gradients.output_gradients * weight)

    yield "halved"
    del GEOMETRIES._implementations["halved"]


def mapped_by_hilbert(gradients):
    """(n, checkpoints, parameters), weights and biases of each layer times the matrix of its outputs."""
    parts, start = [], 0
    for d_out, d_in in LAYERS.values():
        weight = gradients[..., start : start + d_out * d_in].reshape(*gradients.shape[:2], d_out, d_in)
        bias = gradients[..., start + d_out * d_in : start + d_out * (d_in + 1)]
        parts += [(matrix(d_out) @ weight).flatten(2), bias @ matrix(d_out)]
        start += d_out * (d_in + 1)
    return torch.cat(parts, 2)


def scaled(gradients, factor):
    """With the first layer times a factor."""
    return torch.cat([factor * gradients[..., :35], gradients[..., 35:]], 2)


@pytest.mark.slow
@pytest.mark.parametrize("unit_norm", [False, True])
def test_a_toy_geometry_works_from_the_task_to_the_answer(hilbert, tmp_path, unit_norm):
    task = toys.make_task(tmp_path, preconditioner=hilbert)
    store = gradindex.build(task, tmp_path / "store", projection=Projection("none"), unit_norm=unit_norm)
    retriever = gradindex.load(task, store.folder)
    train, queries = (reference.gradients(task, data) for data in (task.train, task.query))
    queries = mapped_by_hilbert(queries)
    truth, norms = reference.scores(task, queries, train, toys.RATES)
    truth = truth / norms if unit_norm else truth
    np.testing.assert_allclose(store.self_influence(), (RATES * train.square()).sum(2), rtol=1e-4)
    for rerank in ("exact", "rows"):
        hits = retriever.proponents(range(4), 12, rerank=rerank)
        np.testing.assert_allclose(hits.scores, -np.sort(-truth), atol=1e-5 * np.abs(truth).max())
        np.testing.assert_array_equal(hits.ids, np.argsort(-truth))
    assert hits.measure == ("cosines of the gradients behind TracInCP" if unit_norm else "TracInCP scores")
    shares = retriever.explain(range(4), range(12)).scores
    np.testing.assert_allclose(shares.sum((2, 3)), truth, atol=1e-5 * np.abs(truth).max())
    weights = 1 / np.sqrt((RATES * queries.square()).sum((1, 2)).numpy()) if unit_norm else np.ones(4)
    group = retriever.exact_scores(retriever.prepare(range(4), aggregate="sum"))
    train_norms = np.sqrt((RATES * train.square()).sum((1, 2)).numpy()) if unit_norm else 1
    summed = reference.scores(task, queries, train, toys.RATES)[0] * weights[:, None] / train_norms
    np.testing.assert_allclose(group[0], summed.sum(0), atol=1e-5 * np.abs(summed).max())


def test_stored_factors_answer_where_a_map_of_queries_keeps_outer_products(halved, tmp_path):
    task = toys.make_task(tmp_path, preconditioner=halved)
    store = gradindex.build(task, tmp_path / "store", factors="float32")
    exact = gradindex.load(task, store.folder).exact_scores(range(4))
    train, queries = (reference.gradients(task, data) for data in (task.train, task.query))
    truth, _ = reference.scores(task, scaled(queries, 0.5), train, toys.RATES)
    np.testing.assert_allclose(exact, truth, atol=1e-5 * np.abs(truth).max())


@pytest.mark.slow
def test_a_map_of_queries_rows_leaves_training_rows_as_they_are(doubled, tmp_path):
    plain = toys.make_task(tmp_path)
    task = replace(plain, preconditioner=doubled)
    stores = [
        gradindex.build(one, tmp_path / name, projection=Projection("none"))
        for one, name in ((task, "doubled"), (plain, "plain"))
    ]
    np.testing.assert_array_equal(*(store.rows(np.arange(12)) for store in stores))
    np.testing.assert_array_equal(*(store.self_influence() for store in stores))
    train, queries = (reference.gradients(task, data) for data in (task.train, task.query))
    truth, _ = reference.scores(task, scaled(queries, 2), train, toys.RATES)
    retriever = gradindex.load(task, stores[0].folder)
    for rerank in ("exact", "rows"):
        hits = retriever.proponents(range(4), 12, rerank=rerank)
        np.testing.assert_allclose(hits.scores, -np.sort(-truth), atol=1e-5 * np.abs(truth).max())
    assert hits.measure == "scores with a first layer that counts twice"
    with pytest.raises(MismatchError, match="preconditioner differ"):
        gradindex.load(plain, stores[0].folder)
    with pytest.raises(TaskError, match="Stored factors give no exact scores with preconditioner 'doubled'"):
        gradindex.build(task, tmp_path / "factors", factors="float32")


def test_a_name_that_no_geometry_is_registered_under_is_refused_with_those_there_are(hilbert, tmp_path):
    with pytest.raises(TaskError, match="preconditioner is 'gilbert', but must be 'adam', 'hilbert' or None"):
        toys.make_task(tmp_path, preconditioner="gilbert")


def test_every_geometry_has_all_that_the_protocol_asks_for():
    names = [name for name in vars(Geometry) if not name.startswith("_")] + ["method", "measure", "by_factors"]
    for geometry in (TracIn(), AdamDiagonal(), Cosine(AdamDiagonal())):
        assert all(hasattr(geometry, name) for name in names)
