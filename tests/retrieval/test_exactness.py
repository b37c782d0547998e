"""Scores against the naive float64 reference, and the order that comes out of a store."""

import numpy as np
import pytest
import reference
import toys

import gradindex
from gradindex.projection import Projection

CASES = {
    "mlp": (toys.mlp, {}),
    "tanh after the last layer": (toys.tanh_last, {}),
    "convolutions and batch norm": (toys.convolutional, {"shape": (2, 8, 8)}),
    "regression": (toys.regressor, {"loss": toys.squared_error}),
    "module used twice": (toys.used_twice, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "prefixes"), [("*", ("",)), ("0", ("0.",))], ids=["all layers", "first layer"])
@pytest.mark.parametrize("case", CASES)
def test_exact_scores_equal_autograd(tmp_path, case, layers, prefixes):
    make, options = CASES[case]
    task = toys.make_task(tmp_path, make(), layers=layers, **options)
    train, queries = (reference.gradients(task, data, prefixes=prefixes) for data in (task.train, task.query))
    truth, scale = reference.scores(task, queries, train, toys.RATES)
    found = gradindex.exact_scores(task, list(task.query), precision="float64")
    assert np.all(np.abs(found - truth) <= 1e-10 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_whole_rows_give_the_true_order_for_both_signs(tmp_path, case):
    make, options = CASES[case]
    task = toys.make_task(tmp_path, make(), **options)
    train, queries = (reference.gradients(task, data) for data in (task.train, task.query))
    truth, _ = reference.scores(task, queries, train, toys.RATES)
    store = gradindex.build(task, tmp_path / "store", projection=Projection("none"), precision="float64", batch_size=5)
    own, _ = reference.scores(task, train, train, toys.RATES)
    np.testing.assert_allclose(store.self_influence().sum(1), np.diag(own), rtol=1e-9)
    retriever = gradindex.load(task, tmp_path / "store")
    for rerank, rtol in (("exact", 1e-9), ("none", 1e-4)):
        up = retriever.proponents(range(4), k=3, rerank=rerank)
        down = retriever.opponents(range(4), k=3, rerank=rerank)
        assert np.array_equal(up.ids, np.argsort(-truth, 1)[:, :3])
        assert np.array_equal(down.ids, np.argsort(truth, 1)[:, :3])
        for hits in (up, down):
            np.testing.assert_allclose(hits.scores, np.take_along_axis(truth, hits.ids, 1), rtol=rtol)
