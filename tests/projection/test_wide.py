"""Wide rows: estimates of exact scores from a larger sketch of what rows leave out, in four bits a number."""

import numpy as np
import pytest
import torch
import toys

import gradindex
from gradindex.errors import ArgumentError, TaskError
from gradindex.factors import Formed, Layer
from gradindex.projection import Projection, WideMap
from gradindex.retrieval.scoring import by_wide_rows
from gradindex.rows import RowMaker
from gradindex.store import wide_encoded, wide_products

N, M, WIDE = 48, 6, 1024
KINDS = {"random": Projection(dim=16), "fitted": Projection("fitted", 48)}


@pytest.fixture(scope="module", params=KINDS)
def built(request, tmp_path_factory):
    """A task with convolutions, its store with wide rows, and exact scores of its queries."""
    folder = tmp_path_factory.mktemp("wide")
    task = toys.make_task(folder, toys.convolutional(), shape=(2, 8, 8), n_train=N, n_query=M)
    store = gradindex.build(task, folder / "store", projection=KINDS[request.param], wide=WIDE)
    return request.param, gradindex.load(task, store.folder), gradindex.exact_scores(task, range(M)).astype(np.float64)


def by_id(hits):
    """(n_query, n_train) scores in the order of ids."""
    return np.take_along_axis(hits.scores, np.argsort(hits.ids, 1), 1)


@pytest.mark.slow
def test_estimates_are_as_far_from_exact_scores_as_their_standard_errors_say(built):
    kind, retriever, exact = built
    queries = retriever.prepare(range(M))
    found = by_id(retriever.proponents(queries, N, rerank="wide", candidates=N))
    estimates = [by_wide_rows(retriever.store, queries.vectors, query, np.arange(N)) for query in range(M)]
    errors = np.stack([spreads for _, spreads in estimates])
    assert 0.7 < np.sqrt(np.mean(((found - exact) / errors) ** 2)) < 1.3
    whole = np.sqrt(queries.norms[:, None] ** 2 * retriever.store.self_influence().sum(1) / WIDE)
    if kind == "fitted":  # the rest is smaller than the gradient, and the error with it
        assert errors.mean() < 0.6 * whole.mean()


@pytest.mark.slow
def test_rows_of_a_fitted_projection_and_what_they_leave_out_add_up(tmp_path):
    """With many more numbers than the model has, the estimate is exact but for four bits, whatever rows leave out."""
    task = toys.make_task(tmp_path, n_train=12, n_query=2)
    exact = gradindex.exact_scores(task, range(2))
    for number, projection in enumerate((Projection("fitted", 8), Projection(dim=4))):
        store = gradindex.build(task, tmp_path / str(number), projection=projection, wide=1 << 12)
        hits = gradindex.load(task, store.folder).proponents(range(2), 12, rerank="wide", candidates=12)
        assert hits.scored == "wide-estimated" and hits.measure == "TracInCP scores"
        np.testing.assert_allclose(by_id(hits), exact, atol=0.02 * np.abs(exact).max())


def test_sparse_gradients_are_spread_before_they_are_coded():
    """The sketch of a few numbers is a few numbers, most of whose size codes of four bits would cut off."""
    layer = Layer("0", ("weight",), 8, 8, "linear")
    projection, like = Projection(dim=8), torch.zeros(())
    wide = WideMap(projection.for_checkpoint(0, [layer], like), 4096, 0, [layer], 0, like)
    gradient = torch.zeros(2, 8, 8)
    gradient[0, 0, 0] = gradient[1, 0, 0] = 1
    gradient[0, 1, 2], gradient[0, 4, 4] = -20, 5
    block = torch.zeros(2, 4096)
    wide.add(block, 0, Formed(gradient))
    assert int((block != 0).sum()) == 4
    turned = wide.finished(block, torch.zeros(2, 8)).numpy()
    np.testing.assert_allclose(turned @ turned.T, [[426, 1], [1, 1]], atol=1e-3)
    assert np.abs(turned).max() < 6 * np.sqrt(np.square(turned).mean(1)).max()
    products = wide_products(wide_encoded(turned, 1), turned[1])[:, 0]
    np.testing.assert_allclose(products, [1, 1], atol=0.1 * 426**0.5 / 64 * 4)


def test_codes_keep_products_of_normal_numbers():
    rng = np.random.default_rng(0)
    rows, query = rng.normal(size=(200, 3 * 512)).astype(np.float32), rng.normal(size=3 * 512).astype(np.float32)
    rows[0], rows[1] = 0, rows[2]
    coded = wide_encoded(rows, 3)
    products, exact = wide_products(coded, query).sum(1), rows @ query
    assert products[0] == 0 and products[1] == products[2]
    # Rounding to steps of 2.6 / 7 has 1.1% of the variance, cutting off included.
    assert np.std(products - exact) < 0.13 * np.std(exact)
    np.testing.assert_allclose(coded.norms, np.linalg.norm(rows.reshape(200, 3, -1), axis=2), rtol=1e-6)
    assert coded.codes.shape == (200, 3 * 256) and coded.codes.dtype == np.uint8


def test_wide_rows_that_would_decide_nothing_are_refused(tmp_path):
    task = toys.make_task(tmp_path)
    build = lambda **options: gradindex.build(task, tmp_path / "store", **options)  # noqa: E731  # short
    for wide in (0, 7, 2.5):
        with pytest.raises(ArgumentError, match=f"wide is {wide}, but must be an even number of at least 2"):
            build(wide=wide)
    with pytest.raises(ArgumentError, match="Stored factors give exact scores, so wide rows would decide nothing"):
        build(wide=64, factors="float32")
    with pytest.raises(ArgumentError, match="projection 'none' are whole gradients.* Leave wide out"):
        build(wide=64, projection=Projection("none"))
    with pytest.raises(ArgumentError, match="wide is 32, but must be more than the 32 numbers .* such as 512"):
        build(wide=32, projection=Projection(dim=32))
    assert not (tmp_path / "store").exists()


def test_a_geometry_whose_rows_have_a_map_of_their_own_has_no_wide_rows(tmp_path):
    engine = gradindex.gradients.Engine(toys.make_task(tmp_path))
    engine.geometry.by_factors = False
    with engine, pytest.raises(TaskError, match="Wide rows estimate no scores .* Build without wide"):
        RowMaker(engine, Projection(dim=8), wide=16)
