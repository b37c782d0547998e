"""Whitened queries: against a naive float64 reference, in every kind of question, refused where they mean nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toys

import gradindex
from gradindex.errors import ArgumentError, MismatchError, StoreError
from gradindex.growth import add
from gradindex.projection import Projection
from gradindex.retrieval.whitening import DEFAULT_DAMPING, Whitening
from gradindex.store import Moments, remove, second_moments


@pytest.fixture
def task(tmp_path):
    return toys.make_task(tmp_path, toys.mlp(), n_train=60)


@pytest.fixture
def store(task, tmp_path):
    built = gradindex.build(task, tmp_path / "store", projection=Projection(dim=16), factors=None)
    second_moments(built.folder)
    return built


def reference(rows, queries, n_checkpoints, damping=DEFAULT_DAMPING):
    """(n_query, n_train, C) scores by the formula, in float64, one block after the other."""
    rows, queries = (np.asarray(x, np.float64).reshape(len(x), n_checkpoints, -1) for x in (rows, queries))
    scores = np.empty((len(queries), len(rows), n_checkpoints))
    for c in range(n_checkpoints):
        r, q = rows[:, c], queries[:, c]
        lengths = np.linalg.norm(r, axis=1)
        moment = sum(np.outer(x, x) * lengths.mean() / n for x, n in zip(r, lengths, strict=True) if n > 0) / len(r)
        turned = np.linalg.solve(moment + damping * np.trace(moment) * np.eye(len(moment)), q.T)
        products = r @ turned
        scores[:, :, c] = (products / products.std(0)).T
    return scores


def plain(task, store, count=4):
    return gradindex.load(task, store.folder).query_rows(range(count))


@pytest.mark.parametrize("damping", [DEFAULT_DAMPING, 0.1])
def test_scores_are_those_of_a_naive_reference(task, store, damping):
    true = reference(store.rows(store.ids), plain(task, store), 3, damping)
    retriever = gradindex.load(task, store.folder, geometry="whitened", damping=damping)
    np.testing.assert_allclose(retriever.exact_scores(range(4)), true.sum(2), rtol=1e-3, atol=1e-4)
    explained = retriever.explain(range(4), store.ids)
    np.testing.assert_allclose(explained.scores[..., 0], true, rtol=1e-3, atol=1e-4)
    assert explained.layers == ("all layers",) and "whitened" in explained.note
    for kind, sign in (("proponents", 1), ("opponents", -1)):
        hits = retriever.search(range(4), 5, kind=kind)
        best = np.sort(sign * true.sum(2), axis=1)[:, ::-1][:, :5]
        np.testing.assert_allclose(sign * hits.scores, best, rtol=1e-3, atol=1e-4)
        assert hits.scored == "projected" and "whitened" in hits.note and "unit" in hits.note


def test_plain_scores_stay_the_default(task, store):
    scores = gradindex.load(task, store.folder).search([0], 3)
    assert "whitened" not in scores.note and scores.scored == "exact"


def test_filters_thresholds_and_both_signs(task, store):
    retriever = gradindex.load(task, store.folder, geometry="whitened")
    scores = retriever.exact_scores([0])[0]
    some = retriever.search([0], 3, ids=[1, 5, 9, 33])
    assert some.ids[0].tolist() == sorted([1, 5, 9, 33], key=lambda i: -scores[i])[:3]
    strong = retriever.search([0], at_least=1.0)
    assert set(strong.of(0)[0].tolist()) == set(np.flatnonzero(scores >= 1.0).tolist())
    large = retriever.search([0], 4, kind="absolute")
    assert large.ids[0].tolist() == np.argsort(-np.abs(scores))[:4].tolist()


def test_a_group_adds_up_its_members(task, store):
    retriever = gradindex.load(task, store.folder, geometry="whitened")
    each = retriever.exact_scores(range(4))
    np.testing.assert_allclose(retriever.exact_scores(retriever.prepare(range(4), aggregate="mean"))[0], each.mean(0),
                               rtol=1e-3, atol=1e-4)  # fmt: skip


def test_stored_factors_and_rows_in_int8_are_no_obstacle(task, tmp_path):
    last = replace(task, layers="2")
    store = gradindex.build(last, tmp_path / "last", projection=Projection("fitted", 9), row_type="int8",
                            factors="float32")  # fmt: skip
    second_moments(store.folder)
    true = reference(store.rows(store.ids), gradindex.load(last, store.folder).query_rows([0]), 3).sum(2)
    retriever = gradindex.load(last, store.folder, geometry="whitened")
    np.testing.assert_allclose(retriever.exact_scores([0]), true, rtol=1e-2, atol=1e-3)
    hits = retriever.search([0], 3)
    assert [stage.name for stage in hits.stages] == ["rows"]
    np.testing.assert_allclose(hits.scores[0], np.sort(true[0])[::-1][:3], rtol=1e-2, atol=1e-3)


def test_changes_of_the_store_are_followed_and_queries_prepared_before_refused(task, store):
    retriever = gradindex.load(task, store.folder, geometry="whitened")
    asked = retriever.prepare([0])
    remove(store.folder, [3, 8])
    with pytest.raises(ArgumentError, match="Prepare them again"):
        retriever.search(asked, 3)
    now = retriever.store
    true = reference(now.rows(now.ids), gradindex.load(task, store.folder).query_rows([0]), 3).sum(2)
    np.testing.assert_allclose(retriever.exact_scores([0]), true, rtol=1e-3, atol=1e-4)
    add(task, store.folder)


def test_queries_of_one_geometry_are_refused_by_another(task, store):
    plain_ = gradindex.load(task, store.folder)
    whitened = gradindex.load(task, store.folder, geometry="whitened")
    for one, other in ((plain_, whitened), (whitened, plain_)):
        with pytest.raises(ArgumentError, match="geometry"):
            one.search(other.prepare([0]), 3)


def test_what_means_nothing_is_refused(task, store, tmp_path):
    folder = store.folder
    with pytest.raises(ArgumentError, match="damping decides nothing"):
        gradindex.load(task, folder, damping=1e-3)
    for damping in (0, -1, float("nan")):
        with pytest.raises(ArgumentError, match="damping is"):
            gradindex.load(task, folder, geometry="whitened", damping=damping)
    with pytest.raises(ArgumentError, match="geometry"):
        gradindex.load(task, folder, geometry="white")
    retriever = gradindex.load(task, folder, geometry="whitened")
    with pytest.raises(ArgumentError, match="candidates decides nothing"):
        retriever.search([0], 3, candidates=9)
    with pytest.raises(ArgumentError, match="Wide rows"):
        retriever.search([0], 3, rerank="wide")
    unit = gradindex.build(task, tmp_path / "unit", projection=Projection(dim=16), unit_norm=True)
    with pytest.raises(MismatchError, match="unit norm"):
        gradindex.load(task, unit.folder, geometry="whitened")
    bare = gradindex.build(task, tmp_path / "bare", projection=Projection(dim=16))
    with pytest.raises(StoreError, match="gradindex whiten"):
        gradindex.load(task, bare.folder, geometry="whitened")


def test_a_block_of_zeros_and_more_numbers_than_rows():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((5, 2, 12)).astype(np.float32)
    rows[:, 1] = 0
    moments = Moments.none(2, 12).plus(rows.reshape(5, -1))
    queries = torch.from_numpy(generator.standard_normal((3, 24)).astype(np.float32))
    turned = Whitening(moments).of(queries)
    assert turned.isfinite().all() and not turned[:, 12:].any()
    products = rows.reshape(5, -1) @ turned.numpy().T
    np.testing.assert_allclose(products.std(0), 1, rtol=1e-4)
