"""Kinds of projections: one class and one registration each."""

import numpy as np
import pytest
import reference
import toys

import gradindex
from gradindex.building import estimate
from gradindex.choices import PROJECTION_KINDS
from gradindex.errors import ArgumentError, StoreError
from gradindex.projection import PROJECTIONS, BlockMap, Projection
from gradindex.projection.sides import TwoSided


@pytest.fixture
def sums():
    @PROJECTIONS.register("sums")
    class Sums(BlockMap):
        """The sum of the first row of each layer's gradient."""

        @classmethod
        def block_dim(cls, layers, dim):
            return len(layers)

        def add(self, block, number, gradients):
            block[:, number] += gradients.gradient[:, 0].sum(1)

    yield "sums"
    del PROJECTIONS._implementations["sums"]


@pytest.fixture
def means():
    class Mean:
        """Sides of one column each: the mean activation and the mean output gradient, in one pass."""

        PASSES = 1

        def __init__(self, layers, dim, stream, like):
            self.totals = [[like.new_zeros(layer.d_out, 1), like.new_zeros(layer.d_in, 1)] for layer in layers]

        def share(self, number, gradients):
            return number, [gradients.gradient.sum((0, 2))[:, None], gradients.gradient.sum((0, 1))[:, None]]

        def add(self, shares):
            for number, sides in shares:
                for total, side in zip(self.totals[number], sides, strict=True):
                    total += side

        def end_pass(self):
            pass

        def sides(self):
            return [tuple(total.float().numpy() for total in totals) for totals in self.totals]

    @PROJECTIONS.register("means")
    class Means(TwoSided):
        fit, stand_in = Mean, "kronecker"

        def __init__(self, spec):
            super().__init__(spec.sides, spec.like)

        @classmethod
        def block_dim(cls, layers, dim):
            return len(layers)

    yield "means"
    del PROJECTIONS._implementations["means"]


def test_every_kind_that_may_be_chosen_is_registered():
    assert tuple(PROJECTIONS) == PROJECTION_KINDS


def test_a_toy_kind_makes_a_store_that_answers(tmp_path, sums):
    task = toys.make_task(tmp_path)
    store = gradindex.build(task, tmp_path / "store", projection=Projection(sums), precision="float64")
    inner, outer = (reference.gradients(task, task.train, prefixes=(name,)) for name in ("0.", "2."))
    rows = inner[:, :, [*range(6), 30]].sum(2), outer[:, :, [*range(5), 15]].sum(2)  # the last of each is the bias
    expected = np.stack(rows, 2) * np.sqrt(toys.RATES)[:, None]
    np.testing.assert_allclose(store.rows(np.arange(12)), expected.reshape(12, 6), rtol=1e-5)
    retriever = gradindex.load(task, tmp_path / "store")
    hits = retriever.proponents([0, 3], 5, rerank="rows")
    products = retriever.query_rows([0, 3]) @ store.rows(np.arange(12)).T
    for ids, scores, row in zip(hits.ids, hits.scores, products, strict=True):
        assert list(ids) == list(np.argsort(-row, kind="stable")[:5])
        np.testing.assert_allclose(scores, np.sort(row)[::-1][:5], rtol=1e-5)
    assert toys.call("verify", tmp_path / "store").exit_code == 0
    assert "projection sums, 1024 a checkpoint, seed 0" in toys.call("info", tmp_path / "store").stdout


def test_a_toy_kind_that_is_fitted_keeps_its_bases_in_the_store(tmp_path, means):
    task, projection = toys.make_task(tmp_path), Projection(means)
    assert estimate(task, tmp_path / "store", projection=projection).fitting_rows == 12
    store = gradindex.build(task, tmp_path / "store", projection=projection, precision="float64")
    total = reference.gradients(task, task.train, prefixes=("0.weight",))[:, 0].sum(0).numpy().reshape(5, 6)
    np.testing.assert_allclose(store.bases()[0, 0][1][:6, 0], np.sqrt(toys.RATES[0]) * total.sum(0), rtol=1e-4)
    assert gradindex.load(task, tmp_path / "store").proponents(0, 3).ids.shape == (1, 3)


def test_a_kind_that_is_gone_is_refused(tmp_path, sums):
    gradindex.build(toys.make_task(tmp_path), tmp_path / "store", projection=Projection(sums))
    taken = PROJECTIONS._implementations.pop(sums)
    try:
        with pytest.raises((ArgumentError, StoreError), match="projection is 'sums', but must be one of: tensorsketch"):
            gradindex.load(toys.make_task(tmp_path), tmp_path / "store")
    finally:
        PROJECTIONS._implementations[sums] = taken


def test_only_a_fitted_kind_begins_a_fit():
    with pytest.raises(ArgumentError, match="projection is 'none', which is not fitted to data"):
        Projection("none").fit(0, [], None)
    assert Projection("fitted").passes == 2 and Projection("none").passes == 0
    assert Projection("fitted", 8).unfitted == Projection("kronecker", 8) and Projection("none").unfitted.kind == "none"
