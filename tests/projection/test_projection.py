"""The random maps: unbiased, the same everywhere, and the same number on both ways of computing them."""

import re

import numpy as np
import pytest
import torch
import toys

import gradindex
from gradindex.errors import ArgumentError, StoreError
from gradindex.factors import Factors, Formed, Layer, Lookups, Sum
from gradindex.projection import PROJECTIONS, Projection, SubspaceFit, dense
from gradindex.projection.fitted import best_size, rooms
from gradindex.projection.hashing import buckets_and_signs, gaussians, hash64, key, rademachers
from gradindex.projection.kronecker import sizes

GOLDEN_BUCKETS = [1, 5, 2, 12, 9, 4]
GOLDEN_SIGNS = [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0]
GOLDEN_SKETCH = [1.0, 1.0, -12.0, -0.5, 0.0, 11.0, -1.0, -1.0]
GOLDEN_GAUSSIANS = [-1.364681096, -1.059208023, 0.076259723, 0.2795695, 1.365271357, -0.507539402]
GOLDEN_RADEMACHERS = [1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0, 1.0]
GOLDEN_BLOCKS = {
    "kronecker": [-6.030222686, -2.402130767, 8.33158523, 4.094026866, 1.630849872, -5.656463376],
    "gaussian": [9.101550559, -4.735706593, 1.602170494, 17.138709748, -2.182257157, -5.383982407],
    "rademacher": [5.511351921, 16.942304054, -4.69485534, 4.69485534, -4.28660705, -6.736096793],
}
LAYER = Layer("l", ("l.weight",), 4, 6, "linear")


def project(factors, kind="tensorsketch", seed=0, dim=16, checkpoint=0, layer=LAYER):
    projection = Projection(kind, dim, seed)
    block = torch.zeros(2 if len(factors.gradient) == 2 else 1, projection.block_dim([layer]), dtype=torch.float64)
    projection.for_checkpoint(checkpoint, [layer], block).add(block, 0, factors)
    return block


def random_factors(positions=1):
    torch.manual_seed(0)
    return Factors(torch.randn(2, positions, 6).double(), torch.randn(2, positions, 4).double())


def test_hashes_are_the_published_generator_and_never_change():
    assert hash64(0, 3).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # SplitMix64, seed 0
    buckets, signs = buckets_and_signs(key(0, 1, "layer", "activations"), 6, 16)
    assert buckets.tolist() == GOLDEN_BUCKETS
    assert signs.tolist() == GOLDEN_SIGNS
    assert rademachers(key(0, 1, "layer"), 8).tolist() == GOLDEN_RADEMACHERS
    np.testing.assert_allclose(gaussians(key(0, 1, "layer"), 6), GOLDEN_GAUSSIANS, atol=1e-9)


def known_factors():
    return Factors(
        torch.arange(1.0, 7.0).double()[None, None], torch.tensor([1.0, -1.0, 2.0, 0.5]).double()[None, None]
    )


def test_sketch_of_a_known_gradient_never_changes():
    np.testing.assert_allclose(project(known_factors(), dim=8)[0].numpy(), GOLDEN_SKETCH, atol=1e-12)


@pytest.mark.parametrize("kind", GOLDEN_BLOCKS)
def test_other_maps_of_a_known_gradient_never_change(kind):
    # The sides of a Kronecker map are float32.
    np.testing.assert_allclose(project(known_factors(), kind, dim=6)[0].numpy(), GOLDEN_BLOCKS[kind], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensorsketch", "kronecker", "gaussian", "rademacher"])
@pytest.mark.parametrize("positions", [1, 3, 40])
def test_random_maps_are_unbiased(kind, positions):
    factors = random_factors(positions)
    products = [float(block[0] @ block[1]) for block in (project(factors, kind, seed) for seed in range(400))]
    truth = float(factors.products(factors)[0, 1])
    assert abs(np.mean(products) - truth) < 3 * np.std(products) / 20
    assert np.std(products) > 0


@pytest.mark.parametrize("kind", ["tensorsketch", "kronecker", "gaussian", "rademacher", "none"])
def test_factors_and_formed_gradients_give_the_same_block(kind):
    for positions in (1, 40):  # the sketch convolves the first and adds up the second
        factors = random_factors(positions)
        torch.testing.assert_close(project(factors, kind), project(Formed(factors.gradient), kind))


@pytest.mark.parametrize("kind", ["tensorsketch", "kronecker", "gaussian", "rademacher", "none"])
def test_looked_up_columns_give_the_same_block(kind):
    torch.manual_seed(0)
    lookups = Lookups(torch.tensor([[0, 5, 5], [5, 1, 0]]), torch.randn(2, 3, 4).double(), 6)
    torch.testing.assert_close(project(lookups, kind), project(Formed(lookups.gradient), kind))
    formed = Formed(lookups.gradient)
    torch.testing.assert_close(lookups.squared_norms(), formed.squared_norms())
    torch.testing.assert_close(lookups.products(lookups), formed.products(formed))
    weights = torch.tensor([0.5, 2.0]).double()
    for side, n in ((0, 4), (1, 6)):
        start = torch.randn(n, 3).double()
        torch.testing.assert_close(lookups.sided(start, side, weights), formed.sided(start, side, weights))


@pytest.mark.parametrize("positions", [1, 3])
def test_sums_of_forms_have_the_cross_terms(positions):
    torch.manual_seed(0)
    lookups = Lookups(torch.tensor([[0, 5, 5], [5, 1, 0]]), torch.randn(2, 3, 4).double(), 6)
    both = Sum([lookups, random_factors(positions)])
    formed = Formed(lookups.gradient + random_factors(positions).gradient)
    torch.testing.assert_close(both.gradient, formed.gradient)
    torch.testing.assert_close(both.squared_norms(), formed.squared_norms())
    left, right, weights = torch.randn(4, 2).double(), torch.randn(6, 3).double(), torch.tensor([0.5, 2.0]).double()
    torch.testing.assert_close(both.two_sided(left, right), formed.two_sided(left, right))
    torch.testing.assert_close(both.sided(left, 0, weights), formed.sided(left, 0, weights))
    torch.testing.assert_close(both.sided(right, 1, weights), formed.sided(right, 1, weights))
    for other in (both, lookups, random_factors(2), formed):
        expected = formed.products(Formed(other.gradient))
        torch.testing.assert_close(both.products(other), expected)
        torch.testing.assert_close(other.products(both), expected.T)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_a_dense_matrix_is_never_whole(monkeypatch, kind):
    layer = Layer("l", ("l",), 1, 1000, "vmap")  # a single row, as on the general routes
    gradients = Formed(torch.randn(2, 1, 1000).double())
    whole = project(gradients, kind, layer=layer)
    sizes, draw = [], PROJECTIONS[kind].draw

    def spy(stream, n, start):
        sizes.append(n)
        return draw(stream, n, start)

    monkeypatch.setattr(PROJECTIONS[kind], "draw", staticmethod(spy))
    monkeypatch.setattr(dense, "_ENTRIES", 480)
    torch.testing.assert_close(project(gradients, kind, layer=layer), whole)
    assert sizes == [480] * 33 + [160]


@pytest.mark.parametrize("kind", ["tensorsketch", "kronecker", "gaussian", "rademacher"])
def test_maps_differ_between_checkpoints_layers_and_seeds(kind):
    factors, other = random_factors(), Layer("m", ("m.weight",), 4, 6, "linear")
    changes = ({}, {"checkpoint": 1}, {"layer": other}, {"seed": 1})
    blocks = [project(factors, kind, **change) for change in changes]
    for number, block in enumerate(blocks):
        assert not any(torch.allclose(block, later) for later in blocks[number + 1 :])
    torch.testing.assert_close(project(factors, kind), blocks[0])


def test_a_side_that_keeps_its_size_is_not_randomised():
    factors = random_factors()
    torch.testing.assert_close(project(factors, "kronecker", dim=24), project(factors, "none"))


@pytest.mark.parametrize(
    ("dim", "expected"), [(24, [(4, 6)]), (16, [(4, 4)]), (5, [(2, 2)]), (1, [(1, 1)]), (999, [(4, 6)])]
)
def test_sides_take_what_the_dimension_allows(dim, expected):
    assert sizes([LAYER], dim) == expected


def test_layers_share_the_dimension_and_long_ones_use_it():
    bias = Layer("bias", ("bias",), 1, 500, "vmap")
    assert sizes([LAYER, bias], 40) == [(4, 5), (1, 20)]


def test_gaussians_are_standard_normal_and_start_anywhere():
    numbers = gaussians(7, 100_000)
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.std() - 1) < 0.01
    assert abs((numbers**4).mean() - 3) < 0.1
    np.testing.assert_array_equal(gaussians(7, 10, 90), numbers[90:100])
    np.testing.assert_array_equal(rademachers(7, 10, 90), rademachers(7, 100)[90:])


def low_rank(n, noise):
    """Gradients of rank two in common subspaces, a tenth of them a hundred times as heavy and elsewhere."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right, core = draw(12, 2), draw(20, 2), draw(n, 2, 2)
    gradients = left @ core @ right.T + noise * draw(n, 12, 20)
    gradients[: n // 10] = 100 * draw(n // 10, 12, 20)
    return gradients, torch.linalg.qr(left)[0], torch.linalg.qr(right)[0]


def test_fitted_sides_find_the_common_subspace_despite_heavy_examples():
    gradients, left, right = low_rank(400, 0.01)
    fit = SubspaceFit([Layer("l", ("l.weight",), 12, 20, "linear")], 4, 5, torch.zeros((), dtype=torch.float64))
    for _ in range(SubspaceFit.PASSES):
        for part in gradients.split(150):
            fit.add([fit.share(0, Formed(part))])
        fit.end_pass()
    ((found_left, found_right),) = fit.sides()
    assert (found_left.shape, found_right.shape) == ((12, 2), (20, 2))
    for found, true in ((found_left, left), (found_right, right)):
        found = torch.from_numpy(found).double()
        torch.testing.assert_close(found.T @ found, torch.eye(2).double(), atol=1e-5, rtol=0)
        assert float((true.T @ found).square().sum()) > 1.99  # of 2, for the same subspace


def test_fitted_sides_are_as_long_as_each_needs():
    """A classification layer: one direction of activations, as many of output gradients as classes."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.05 * torch.randn(500, 1, 30, generator=generator, dtype=torch.float64)
    delta = torch.eye(40, dtype=torch.float64)[torch.arange(500) % 40][:, None]
    fit = SubspaceFit([Layer("l", ("l.weight",), 40, 30, "linear")], 40, 5, torch.zeros((), dtype=torch.float64))
    for _ in range(SubspaceFit.PASSES):
        fit.add([fit.share(0, Factors(x, delta))])
        fit.end_pass()
    ((left, right),) = fit.sides()
    assert (left.shape, right.shape) == ((40, 40), (30, 1))
    true = (delta[:, 0] @ delta[:, 0].T) * (x[:, 0] @ x[:, 0].T)
    rows = torch.einsum("nr,ra,nc,cb->nab", delta[:, 0], torch.from_numpy(left).double(), x[:, 0],
                        torch.from_numpy(right).double()).flatten(1)  # fmt: skip
    assert float((rows @ rows.T - true).square().sum() / true.square().sum()) < 0.01  # 6 x 6 keep a sixth


def test_the_size_that_keeps_most_is_found():
    generator = np.random.default_rng(0)
    for _ in range(20):
        left, right = (np.sort(generator.exponential(size=n) ** 3)[::-1] for n in (7, 12))
        for room in (1, 2, 5, 13, 40, 200):
            a, b = best_size(left, right, room)
            kept = {
                (i, j): left[:i].sum() * right[:j].sum() for i in range(1, 8) for j in range(1, 13) if i * j <= room
            }
            assert kept[a, b] == pytest.approx(max(kept.values()))


def test_rows_of_fitted_maps_have_room_for_each_layer():
    layers = [Layer("a", ("a.weight",), 4, 6, "linear"), LAYER, Layer("c", ("c.bias",), 3, 1, "linear")]
    assert rooms(layers, 21) == [7, 7, 3]
    assert Projection("fitted", 21).block_dim(layers) == 17
    bases = {(0, n): (np.eye(x.d_out, dtype=np.float32)[:, :1], np.eye(x.d_in, dtype=np.float32)[:, :1])
             for n, x in enumerate(layers)}  # fmt: skip
    block = torch.zeros(2, 17, dtype=torch.float64)
    block_map = Projection("fitted", 21).for_checkpoint(0, layers, block, bases)
    factors = random_factors()
    block_map.add(block, 1, factors)
    torch.testing.assert_close(block[:, 7], factors.gradient[:, 0, 0])
    assert block.count_nonzero() == 2


@pytest.mark.slow
def test_a_fitted_estimate_is_never_too_large(tmp_path):
    task = toys.make_task(tmp_path)
    exact = gradindex.build(task, tmp_path / "exact", projection=Projection("none"))
    norms = np.square(exact.rows(np.arange(12))).sum(1)
    previous = np.zeros(12)
    for dim in (2, 8, 20, 53):
        store = gradindex.build(task, tmp_path / f"fitted{dim}", projection=Projection("fitted", dim))
        found = np.square(store.rows(np.arange(12))).sum(1)
        assert np.all(found <= norms * (1 + 1e-4))
        assert found.sum() > previous.sum()
        previous = found
    assert previous.sum() > 0.9 * norms.sum()


def test_fitted_bases_stay_with_the_store(tmp_path):
    task = toys.make_task(tmp_path)
    options = {"projection": Projection("fitted", 20), "batch_size": 4, "shard_rows": 4}
    store = gradindex.build(task, tmp_path / "store", **options)
    assert store.verify() == []
    hits = gradindex.load(task, store.folder).proponents(range(12), k=12, source="train", rerank="none")
    rows = store.rows(np.arange(12))
    np.testing.assert_allclose(hits.scores, -np.sort(-rows @ rows.T, 1), rtol=1e-3, atol=1e-5)
    (path,) = store.folder.glob("bases-*.h5")
    path.write_bytes(path.read_bytes()[:-1])
    assert re.search(r"bases-\w+\.h5 is damaged \(.* bytes instead of", store.verify()[0])
    with pytest.raises(StoreError, match=r"bases-.*rows mean nothing without it"):
        gradindex.load(task, store.folder)


def test_fitting_is_repeatable(tmp_path):
    task = toys.make_task(tmp_path)
    stores = [gradindex.build(task, tmp_path / name, projection=Projection("fitted", 20)) for name in "ab"]
    np.testing.assert_array_equal(*[store.rows(np.arange(12)) for store in stores])


def test_squared_norms_and_products_equal_the_formed_gradients():
    for positions in (1, 2, 40):
        factors = random_factors(positions)
        whole = Factors(factors.activations, factors.output_gradients).gradient.flatten(1)
        torch.testing.assert_close(factors.squared_norms(), whole.square().sum(1))
        torch.testing.assert_close(factors.products(factors), whole @ whole.T)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kind": "gauss"}, "projection is 'gauss', but must be one of: tensorsketch, fitted"), ({"dim": 0}, "dim is 0")],
)
def test_impossible_projections_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        Projection(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "dim"),
    [({"row_dim": 100}, 33), ({"row_bytes": 400}, 33), ({"row_bytes": 12}, 1), ({"dim": 7}, 7), ({}, 1024)],
)
def test_a_size_can_be_that_of_a_row(tmp_path, size, dim):
    store = gradindex.build(toys.make_task(tmp_path), tmp_path / "store", projection=Projection(**size))
    assert store.manifest.map.projection.to_json() == {"kind": "tensorsketch", "dim": dim, "seed": 0}
    assert store.dim == 3 * dim
    assert store.dim <= size.get("row_dim", store.dim)
    assert store.rows(np.array([0])).nbytes <= size.get("row_bytes", 1 << 20)


def test_a_row_too_small_for_its_checkpoints_is_refused(tmp_path):
    task = toys.make_task(tmp_path)
    for size, message in (
        ({"row_dim": 2}, "row_dim is 2, but must be at least 3, for one number at each of 3 checkpoints"),
        ({"row_bytes": 11}, "row_bytes is 11, but must be at least 12"),
        ({"row_dim": 0}, "row_dim is 0, but must be at least 3"),
    ):
        with pytest.raises(ArgumentError, match=message):
            gradindex.build(task, tmp_path / "store", projection=Projection(**size))
    with pytest.raises(ArgumentError, match="Give one of dim, row_dim and row_bytes"):
        Projection(dim=7, row_dim=9)
