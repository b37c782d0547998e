"""The random maps: unbiased, the same everywhere, and the same number on both ways of computing them."""

import numpy as np
import pytest
import torch

from gradindex.errors import ArgumentError
from gradindex.factors import Factors, Layer
from gradindex.projection import Projection
from gradindex.projection.hashing import buckets_and_signs, hash64, key

GOLDEN_BUCKETS = [1, 5, 2, 12, 9, 4]
GOLDEN_SIGNS = [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0]
GOLDEN_SKETCH = [1.0, 1.0, -12.0, -0.5, 0.0, 11.0, -1.0, -1.0]
LAYER = Layer("l", ("l.weight",), 4, 6, "linear")


def sketch(factors, seed=0, dim=16, checkpoint=0, layer=LAYER):
    block = torch.zeros(len(factors.activations), dim, dtype=torch.float64)
    Projection("tensorsketch", dim, seed).for_checkpoint(checkpoint, [layer], block).add(block, 0, factors)
    return block


def random_factors(positions=1):
    torch.manual_seed(0)
    return Factors(torch.randn(2, positions, 6).double(), torch.randn(2, positions, 4).double())


def test_hashes_are_the_published_generator_and_never_change():
    assert hash64(0, 3).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # SplitMix64, seed 0
    buckets, signs = buckets_and_signs(key(0, 1, "layer", "activations"), 6, 16)
    assert buckets.tolist() == GOLDEN_BUCKETS
    assert signs.tolist() == GOLDEN_SIGNS


def test_sketch_of_a_known_gradient_never_changes():
    activations = torch.arange(1.0, 7.0).double()[None, None]
    deltas = torch.tensor([1.0, -1.0, 2.0, 0.5]).double()[None, None]
    np.testing.assert_allclose(sketch(Factors(activations, deltas), dim=8)[0].numpy(), GOLDEN_SKETCH, atol=1e-12)


@pytest.mark.parametrize("positions", [1, 3])
def test_sketch_is_unbiased(positions):
    factors = random_factors(positions)
    products = [float(block[0] @ block[1]) for block in (sketch(factors, seed) for seed in range(400))]
    truth = float(factors.products(factors)[0, 1])
    assert abs(np.mean(products) - truth) < 3 * np.std(products) / 20


def test_the_two_ways_of_sketching_agree():
    factors = random_factors()
    halves = Factors(factors.activations.repeat(1, 2, 1), factors.output_gradients.repeat(1, 2, 1) / 2)
    torch.testing.assert_close(sketch(factors), sketch(halves))


def test_maps_differ_between_checkpoints_layers_and_seeds():
    factors, other = random_factors(), Layer("m", ("m.weight",), 4, 6, "linear")
    blocks = [sketch(factors), sketch(factors, checkpoint=1), sketch(factors, layer=other), sketch(factors, seed=1)]
    for number, block in enumerate(blocks):
        assert not any(torch.allclose(block, later) for later in blocks[number + 1 :])


def test_squared_norms_and_products_equal_the_formed_gradients():
    for positions in (1, 2, 40):
        factors = random_factors(positions)
        whole = Factors(factors.activations, factors.output_gradients).gradient.flatten(1)
        torch.testing.assert_close(factors.squared_norms(), whole.square().sum(1))
        torch.testing.assert_close(factors.products(factors), whole @ whole.T)


@pytest.mark.parametrize(
    ("options", "message"), [({"kind": "gauss"}, "projection is 'gauss'"), ({"dim": 0}, "dim is 0")]
)
def test_impossible_projections_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        Projection(**options)
