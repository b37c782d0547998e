"""EK-FAC's scores, against the formula with every matrix formed."""

import numpy as np
import pytest
import toys

import gradindex
from gradindex.errors import ArgumentError, StoreError
from gradindex.evaluation import ekfac_scores
from gradindex.projection import Projection


@pytest.fixture
def task(tmp_path):
    return toys.make_task(tmp_path, n_train=40)


@pytest.fixture
def retriever(task, tmp_path):
    folder = tmp_path / "store"
    gradindex.build(task, folder, projection=Projection(dim=16), factors="float32", shard_rows=17)
    return gradindex.load(task, folder)


def reference(store, queries, damping):
    """(n_query, n_train) in float64."""
    factors, scores = store.factors(store.ids), 0.0
    for key, sides in factors.items():
        (x, delta), (query_x, query_delta) = ([np.float64(side) for side in pair] for pair in (sides, queries[key]))
        a, b = (np.linalg.eigh(side.T @ side / len(side))[1] for side in (x, delta))
        values = np.square(delta @ b).T @ np.square(x @ a) / len(x)
        bases = np.kron(b, a)
        curvature = bases @ np.diag(values.ravel() + damping * values.mean()) @ bases.T
        g, q = (np.einsum("mo,mi->moi", d, i).reshape(len(d), -1) for d, i in ((delta, x), (query_delta, query_x)))
        scores = scores + np.linalg.solve(curvature, q.T).T @ g.T
    return scores


@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_scores_are_those_of_the_formula(retriever, damping, monkeypatch):
    monkeypatch.setattr("gradindex.evaluation.ekfac._TOGETHER", 3)  # of four queries
    true = reference(retriever.store, retriever.prepare(range(4)).factors, damping)
    found = ekfac_scores(retriever, range(4), damping=damping)
    np.testing.assert_allclose(found, true, rtol=1e-3, atol=1e-3 * np.abs(true).max())
    np.testing.assert_array_equal(ekfac_scores(retriever, retriever.prepare(range(4)), damping=damping), found)


def test_strong_damping_leaves_what_layers_and_checkpoints_weigh(retriever):
    """Without curvature, each layer's product is divided by its damping alone."""
    store, asked = retriever.store, retriever.prepare([0])
    shares = retriever.explain(asked, store.ids).scores[0]
    damping = 1e6
    for (c, layer), (x, delta) in store.factors(store.ids).items():
        trace = (np.square(x).sum(1) * np.square(delta).sum(1)).mean()
        shares[:, c, layer] /= damping * trace / (x.shape[1] * delta.shape[1])
    np.testing.assert_allclose(ekfac_scores(retriever, asked, damping=damping)[0], shares.sum((1, 2)), rtol=1e-3,
                               atol=1e-3 * np.abs(shares.sum((1, 2))).max())  # fmt: skip


def test_what_means_nothing_is_refused(retriever, task, tmp_path):
    for damping in (0, -1, float("nan")):
        with pytest.raises(ArgumentError, match="damping is"):
            ekfac_scores(retriever, [0], damping=damping)
    with pytest.raises(ArgumentError, match="a group"):
        ekfac_scores(retriever, retriever.prepare([0, 1], aggregate="sum"))
    bare = gradindex.build(task, tmp_path / "bare", projection=Projection(dim=16), factors=None)
    with pytest.raises(StoreError, match="no factors"):
        ekfac_scores(gradindex.load(task, bare.folder), [0])
