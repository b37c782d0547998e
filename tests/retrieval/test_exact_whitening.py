"""Queries whitened by whole gradients: against a dense solution in float64, in every kind of question."""

from dataclasses import replace

import numpy as np
import pytest
import toys

import gradindex
from gradindex import evaluation
from gradindex.errors import ArgumentError, MismatchError, OutOfMemoryError, StoreError
from gradindex.growth import add
from gradindex.projection import Projection
from gradindex.retrieval import curvature
from gradindex.retrieval.curvature import EigenBases, StoredGradients
from gradindex.retrieval.exactwhitening import ExactWhitening, conjugate_gradients
from gradindex.retrieval.whitening import DEFAULT_DAMPING
from gradindex.store import remove, second_moments

ENOUGH = 300  # iterations, until nothing is left but rounding


@pytest.fixture
def task(tmp_path):
    return toys.make_task(tmp_path, toys.mlp(), n_train=60)


@pytest.fixture(autouse=True)
def fewer_leading_directions_than_parameters(monkeypatch):
    """So that iterations are left to be made."""
    monkeypatch.setattr("gradindex.retrieval.exactwhitening._LEADING", 12)


@pytest.fixture
def store(task, tmp_path):
    built = gradindex.build(
        task, tmp_path / "store", projection=Projection(dim=16), factors="float32", shard_rows=17, batch_size=8
    )
    second_moments(built.folder)
    return built


def formed(factors, checkpoint):
    """(n, P) whole gradients at a checkpoint, in float64."""
    sides = [tuple(np.float64(side) for side in pair) for (c, _), pair in factors.items() if c == checkpoint]
    return np.concatenate([np.einsum("mo,mi->moi", delta, x).reshape(len(x), -1) for x, delta in sides], 1)


def block_diag(one, other):
    return np.block([
        [one, np.zeros((len(one), len(other)))],
        [np.zeros((len(other), len(one))), other],
    ])  # fmt: skip


def dense(store, queries, damping=DEFAULT_DAMPING):
    """(n_query, n_train, C) scores by the formula, every matrix formed."""
    scores = []
    for c in range(store.n_checkpoints):
        g, q = formed(store.factors(store.ids), c), formed(queries.factors, c)
        lengths = np.linalg.norm(g, axis=1)
        moment = (g / np.where(lengths > 0, lengths, 1)[:, None]).T @ g * lengths.mean() / len(g)
        ridge = damping * np.trace(moment) or 1.0
        products = g @ np.linalg.solve(moment + ridge * np.eye(len(moment)), q.T)
        spread = products.std(0)
        scores.append((products / np.where(spread > 0, spread, np.inf)).T)
    return np.stack(scores, 2)


def exact(task, store, **options):
    return gradindex.load(task, store.folder, geometry="whitened-exact", **{"iterations": ENOUGH} | options)


def plain(task, store, queries=range(4), **options):
    return gradindex.load(task, store.folder).prepare(queries, **options)


@pytest.mark.parametrize("damping", [DEFAULT_DAMPING, 0.1])
def test_scores_are_those_of_a_dense_solution(task, store, damping):
    true = dense(store, plain(task, store), damping)
    retriever = exact(task, store, damping=damping)
    whole = {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(retriever.exact_scores(range(4)), true.sum(2), **whole)
    explained = retriever.explain(range(4), store.ids)
    np.testing.assert_allclose(explained.scores.sum(3), true, **whole)
    assert (
        "relative residual" in explained.note
        and len(explained.layers) == 2
        and np.ptp(explained.scores, axis=3).max() > 0.1
    )
    for kind, sign in (("proponents", 1), ("opponents", -1)):
        hits = retriever.search(range(4), 5, kind=kind, candidates=60)
        np.testing.assert_allclose(sign * hits.scores, np.sort(sign * true.sum(2), 1)[:, ::-1][:, :5], **whole)
        assert [stage.name for stage in hits.stages] == ["rows", "stored factors"]
        assert hits.scored == "exact" and "no unit" in hits.note and "relative residual" in hits.note


def test_whitened_rows_propose_and_exact_scores_settle(task, store):
    retriever, rows = exact(task, store), gradindex.load(task, store.folder, geometry="whitened")
    scores = retriever.exact_scores([0])[0]
    hits, proposed = retriever.search([0], 5, candidates=8), rows.search([0], 8).ids[0]
    assert hits.ids[0].tolist() == proposed[np.argsort(-scores[proposed])][:5].tolist()
    by_rows = retriever.search([0], 8, rerank="rows")
    assert by_rows.ids[0].tolist() == proposed.tolist() and by_rows.scored == "projected"
    strong = retriever.search([0], at_least=1.0)
    assert set(strong.of(0)[0].tolist()) == set(np.flatnonzero(scores >= 1.0).tolist())
    some = retriever.search([0], 2, ids=[1, 5, 9, 33])
    assert some.ids[0].tolist() == sorted([1, 5, 9, 33], key=lambda i: -scores[i])[:2]
    large = retriever.search([0], 4, kind="absolute", candidates=60)
    assert large.ids[0].tolist() == np.argsort(-np.abs(scores))[:4].tolist()


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_a_group_adds_up_its_members(task, store, aggregate):
    retriever = exact(task, store)
    each = getattr(retriever.exact_scores(range(4)), aggregate)(0)
    group = retriever.prepare(range(4), aggregate=aggregate)
    np.testing.assert_allclose(retriever.exact_scores(group)[0], each, rtol=1e-3, atol=1e-3)
    hits = retriever.search(group, 3, candidates=60)
    assert hits.ids[0].tolist() == np.argsort(-each)[:3].tolist() and hits.queries == (f"{aggregate} of 4 queries",)
    rows = getattr(retriever.query_rows(range(4)), aggregate)(0)
    np.testing.assert_allclose(group.rows[0], rows, rtol=1e-4, atol=1e-4)


def test_more_directions_than_memory_holds_are_refused(task, store, monkeypatch):
    retriever = exact(task, store, iterations=2)
    numbers = 3 * (5 * 7 + 3 * 6)  # of a direction
    monkeypatch.setattr("gradindex.retrieval.exactwhitening.free_bytes", lambda: 4 * numbers * 3)
    with pytest.raises(OutOfMemoryError, match="directions of 4 queries"):
        retriever.prepare(range(4))
    assert len(retriever.prepare(range(4), aggregate="sum")) == 1 and len(retriever.prepare(range(3))) == 3


def test_residuals_and_cost_are_told_and_more_iterations_leave_less(task, store):
    left = []
    for iterations in (1, 5, 20):
        retriever = exact(task, store, iterations=iterations)
        solution = retriever.prepare(range(4)).solution
        assert solution.iterations == iterations and solution.passes == 3 * (iterations + 1)
        assert solution.residuals.shape == (4, 3) and solution.seconds > 0
        left.append(float(np.median(solution.residuals)))
    assert left[0] > 2 * left[1] > 4 * left[2] > 0
    retriever = exact(task, store, iterations=None)
    hits = retriever.search([0], 3)
    assert "5 iterations" in hits.note and "18 passes" in hits.note


def test_residuals_are_those_of_the_systems(task, store):
    asked, solved = plain(task, store), ExactWhitening(store, iterations=3).solved(plain(task, store))
    for c in range(3):
        g, q, v = (formed(store.factors(store.ids), c), formed(asked.factors, c),
                   np.concatenate([solved.factors[c, layer].reshape(4, -1) for layer in (0, 1)], 1))  # fmt: skip
        lengths = np.linalg.norm(g, axis=1)
        moment = (g / lengths[:, None]).T @ g * lengths.mean() / len(g)
        system = moment + DEFAULT_DAMPING * np.trace(moment) * np.eye(len(moment))
        products = v @ system  # v is the solution but for a factor, which the residual tells
        factor = (g @ v.T).std(0)
        np.testing.assert_allclose(factor, 1, rtol=1e-4)
        share = [np.linalg.norm(b - p * np.vdot(b, p) / np.vdot(p, p)) / np.linalg.norm(b)
                 for b, p in zip(q, products, strict=True)]  # fmt: skip
        assert (np.array(share) <= solved.solution.residuals[:, c] * (1 + 1e-3)).all()


def test_factors_stream_and_queries_share_passes(task, store, monkeypatch):
    whole = ExactWhitening(store, iterations=4).solved(plain(task, store))
    sizes, read = [], gradindex.GradientStore.factors
    monkeypatch.setattr(
        gradindex.GradientStore, "factors", lambda s, ids, *at: sizes.append(len(ids)) or read(s, ids, *at)
    )
    monkeypatch.setattr(curvature, "_BETWEEN", 100)
    monkeypatch.setattr("gradindex.retrieval.exactwhitening._TOGETHER", 3)
    parts = ExactWhitening(store, iterations=4).solved(plain(task, store))
    assert max(sizes) <= 20 and parts.solution.passes == 2 * whole.solution.passes
    for key, matrices in whole.factors.items():
        np.testing.assert_allclose(parts.factors[key], matrices, rtol=1e-3, atol=1e-3 * np.abs(matrices).max())


@pytest.mark.parametrize("leading", [0, 5])
def test_eigenbases_are_those_of_the_formula(task, store, leading):
    gradients = StoredGradients(store, 1)
    weights = np.random.default_rng(0).random(60)
    asked = gradients.of_queries(plain(task, store).factors, slice(0, 4))
    ridges = [0.01, 0.02]
    found = gradients.as_factors(EigenBases(gradients, weights, leading).inverse(ridges)(asked))
    stored, queries = store.factors(store.ids), plain(task, store).factors
    bases = []
    for layer in (0, 1):
        x, delta = (np.float64(side) for side in stored[1, layer])
        a, b = (np.linalg.eigh((side * weights[:, None]).T @ side)[1] for side in (x, delta))
        bases.append(np.kron(b, a))
    turned = formed(stored, 1) @ block_diag(*bases)
    moment = (turned * weights[:, None]).T @ turned
    curvature, best = np.diag(np.diag(moment)), np.argsort(-np.diag(moment))[:leading]
    curvature[np.ix_(best, best)] = moment[np.ix_(best, best)]
    curvature += np.diag(np.repeat(ridges, [35, 18]))
    true = np.linalg.solve(curvature, (formed(queries, 1) @ block_diag(*bases)).T).T @ block_diag(*bases).T
    flat = np.concatenate([found[1, layer].reshape(4, -1) for layer in (0, 1)], 1)
    np.testing.assert_allclose(flat, true, rtol=1e-3, atol=1e-3 * np.abs(true).max())
    assert leading == 0 or np.abs(moment[np.ix_(best, best)] - np.diag(moment[best, best])).max() > 0.01 * moment.max()


def test_a_side_too_wide_for_eigenvectors_keeps_its_axes(task, store, monkeypatch):
    monkeypatch.setattr(curvature, "WIDEST", 4)  # of sides of 7, 5, 6 and 3 numbers
    true = dense(store, plain(task, store)).sum(2)
    np.testing.assert_allclose(exact(task, store).exact_scores(range(4)), true, rtol=1e-3, atol=2e-3)


def test_what_preconditions_pays(task, store):
    gradients = StoredGradients(store, 0)
    lengths = gradients.lengths()
    np.testing.assert_allclose(lengths**2, store.self_influence()[:, 0], rtol=1e-4)
    weights, ridge = 1 / lengths, DEFAULT_DAMPING * lengths.sum()
    asked = gradients.of_queries(plain(task, store).factors, slice(0, 4))

    def product(vectors):
        return gradients.moment(vectors, weights) + np.float32(ridge) * vectors

    def left(precondition):
        solved, taken = conjugate_gradients(product, precondition, asked, 4)
        assert taken == 4
        return np.linalg.norm(asked - product(solved)) / np.linalg.norm(asked)

    none = left(lambda v: v)
    diagonal, some = (left(EigenBases(gradients, weights, leading).inverse([ridge] * 2)) for leading in (0, 30))
    assert some < 0.8 * diagonal < 0.8 * none


def test_a_query_of_zeros_and_a_checkpoint_of_equal_scores_count_nothing(task, tmp_path):
    still = replace(task, checkpoints=[*task.checkpoints[:2], replace(task.checkpoints[2], learning_rate=0.0)])
    store = gradindex.build(still, tmp_path / "still", projection=Projection(dim=16), factors="float32")
    second_moments(store.folder)
    asked = plain(still, store)
    for x, _ in asked.factors.values():
        x[1] = 0
    solved = ExactWhitening(store, iterations=ENOUGH).solved(asked)
    scores = sum(np.einsum("mo,qoi,mi->qm", delta, solved.factors[key], x)
                 for key, (x, delta) in store.factors(store.ids).items())  # fmt: skip
    assert np.isfinite(scores).all() and not scores[1].any() and (solved.solution.residuals[1] == 0).all()
    np.testing.assert_allclose(scores, dense(store, asked).sum(2), rtol=1e-3, atol=1e-3)


def test_changes_of_the_store_are_followed_and_queries_prepared_before_refused(task, store):
    retriever = exact(task, store)
    asked = retriever.prepare([0])
    remove(store.folder, [3, 8])
    with pytest.raises(ArgumentError, match="Prepare them again"):
        retriever.search(asked, 3)
    true = dense(retriever.store, plain(task, store, [0])).sum(2)
    np.testing.assert_allclose(retriever.exact_scores([0]), true, rtol=1e-3, atol=1e-3)
    add(task, store.folder)


def test_queries_of_other_geometries_and_iterations_are_refused(task, store):
    one = exact(task, store, iterations=2)
    for other in (exact(task, store, iterations=3), gradindex.load(task, store.folder),
                  gradindex.load(task, store.folder, geometry="whitened")):  # fmt: skip
        for asks, prepares in ((one, other), (other, one)):
            with pytest.raises(ArgumentError, match="geometry"):
                asks.search(prepares.prepare([0]), 3)


def test_warming_asks_a_question(task, store):
    for geometry in ("whitened", "whitened-exact"):
        assert gradindex.load(task, store.folder, geometry=geometry).warm(wait=True).ready


def test_recall_of_what_whitened_rows_propose_is_measured(tmp_path):
    task = toys.make_task(tmp_path, n_train=120, n_query=30)
    folder = gradindex.build(task, tmp_path / "store", projection=Projection(dim=8), factors="float32").folder
    second_moments(folder)
    against, found = evaluation.evaluate(
        folder, k=5, n_query=30, retriever=exact(task, gradindex.GradientStore(folder))
    )
    assert against == "against exact whitened scores, the task's queries"
    few, many = (found[name].proponents for name in ("best 5 of all rows", "best 50 of all rows"))
    assert 0.1 < few < many <= 1


def test_what_means_nothing_is_refused(task, store, tmp_path):
    folder = store.folder
    for iterations in (0, -3):
        with pytest.raises(ArgumentError, match=f"iterations is {iterations}, but must be at least 1"):
            exact(task, store, iterations=iterations)
    with pytest.raises(ArgumentError, match="iterations is 2.5, a float"):
        exact(task, store, iterations=2.5)
    for geometry in ("tracin", "whitened"):
        with pytest.raises(ArgumentError, match="iterations decides nothing"):
            gradindex.load(task, folder, geometry=geometry, iterations=3)
    with pytest.raises(ArgumentError, match="damping is 0"):
        exact(task, store, damping=0)
    retriever = exact(task, store)
    with pytest.raises(ArgumentError, match="Wide rows"):
        retriever.search([0], 3, rerank="wide")
    with pytest.raises(ArgumentError, match="geometry='tracin'"):
        retriever.explain_tokens([0], [1])
    for refused in (lambda: evaluation.index(folder, geometry="whitened-exact"),
                    lambda: evaluation.index(folder, retriever=retriever)):  # fmt: skip
        with pytest.raises(ArgumentError, match="Ask with geometry='whitened'"):
            refused()
    with pytest.raises(ArgumentError, match="Give the task"):
        evaluation.evaluate(folder, k=5, geometry="whitened-exact")
    bare = gradindex.build(task, tmp_path / "bare", projection=Projection(dim=16), factors=None)
    second_moments(bare.folder)
    with pytest.raises(StoreError, match="no factors.*factors='float32'"):
        gradindex.load(task, bare.folder, geometry="whitened-exact")
    unit = gradindex.build(task, tmp_path / "unit", projection=Projection(dim=16), unit_norm=True, factors="float32")
    with pytest.raises(MismatchError, match="unit norm"):
        gradindex.load(task, unit.folder, geometry="whitened-exact")
