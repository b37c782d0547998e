"""How ImageNet's shape is compared with real layers: the statistics of gradients, against NumPy by hand."""

import importlib
import itertools
import sys

import numpy as np
import pytest
import torch
import toys
from places import TOP

from gradindex.retrieval.leading import leading

OURS = {path.stem for folder in ("bench", "tasks") for path in (TOP / "scripts" / folder).glob("*.py")}


@pytest.fixture
def shape(monkeypatch):
    for folder in ("tasks", "bench"):
        monkeypatch.syspath_prepend(str(TOP / "scripts" / folder))
    monkeypatch.setattr(sys, "path", list(sys.path))  # harness adds to it
    had = {name: sys.modules.pop(name) for name in OURS & set(sys.modules)}  # the tests have a "reference" of their own
    yield importlib.import_module("shape")
    for name in OURS & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(had)


def test_statistics_of_gradients_made_by_hand(shape):
    delta = np.zeros((4, 100), np.float32)
    delta[:, 0], delta[:, 1:4], delta[:, 4:24] = -0.8, 0.2, 0.01 - 1e-4
    delta[3] *= 10
    x = np.array([[3, 4], [0, 5], [4, 3], [0, 5]], np.float32)
    found = shape.statistics(shape.Sides(x, delta), np.array([7, 7, 2, 2]))
    square = 0.64 + 3 * 0.04 + 20 * 0.0099**2
    assert found["entries above 0.01"] == (3 * 4 + 24) / 4
    assert found["entries above 0.05"] == (3 * 4 + 24) / 4
    assert found["in the largest 4"] == pytest.approx(0.76 / square)
    assert found["in the largest 16"] == pytest.approx((0.76 + 12 * 0.0099**2) / square)
    assert found["in the largest 64"] == pytest.approx(1)
    assert found["needed for 1e-6"] == pytest.approx(0.24)
    norms = np.array([1, 1, 1, 10])
    assert found["norm, 90th percentile"] == pytest.approx(np.percentile(norms, 90))
    assert found["norm, 99th percentile"] == pytest.approx(np.percentile(norms, 99))
    assert found["cosine of x, same class"] == pytest.approx((0.8 + 0.6) / 2)
    assert found["cosine of x, other classes"] == pytest.approx((24 / 25 + 0.8 + 0.6 + 1) / 4)


def test_entries_below_a_millionth_need_not_stay(shape):
    delta = np.array([[1, -1, 1e-7, 1e-7], [1, -1, 1e-5, 1e-7]], np.float32)
    found = shape.statistics(shape.Sides(np.ones((2, 3), np.float32), delta), np.array([0, 1]))
    assert found["needed for 1e-6"] == (2 / 4 + 3 / 4) / 2
    assert np.isnan(found["cosine of x, same class"])


def test_cosines_and_correlations_are_means_over_pairs_and_rows(shape):
    generator = np.random.default_rng(0)
    x, labels = generator.standard_normal((30, 5)).astype(np.float32), generator.integers(0, 4, 30)
    units = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    pairs = [(units[i] @ units[j], labels[i] == labels[j]) for i, j in itertools.combinations(range(30), 2)]
    wanted = [np.mean([cosine for cosine, same in pairs if same == which]) for which in (True, False)]
    assert shape.cosines(x, labels) == pytest.approx(wanted)
    delta, before = (generator.standard_normal((6, 40)) for _ in range(2))
    delta, before = (part - part.mean(1, keepdims=True) for part in (delta, delta + before))
    wanted = np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(delta, before, strict=True)])
    assert shape.correlation(delta.astype(np.float32), before.astype(np.float32)) == pytest.approx(wanted, abs=1e-6)


def test_factors_are_those_of_autograd_and_the_estimate_is_exact_where_x_are_parallel(shape):
    generator = torch.Generator().manual_seed(0)
    layer, labels = torch.nn.Linear(5, 8), torch.tensor([2, 0, 7])
    features = torch.randn(3, 5, generator=generator)
    sides = shape.Sides.of(features, labels, layer.weight.detach(), layer.bias.detach())
    for row in range(3):
        layer.zero_grad()
        torch.nn.functional.cross_entropy(layer(features[row : row + 1]), labels[row : row + 1]).backward()
        whole = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).numpy()
        assert np.allclose(np.outer(sides.delta[row], sides.x[row]), whole, atol=1e-6)
        assert sides.norms[row] == pytest.approx(np.linalg.norm(whole), rel=1e-5)
    parallel = shape.Sides(np.outer([1, 2, 3], [1, 1, 2]).astype(np.float32), sides.delta)
    exact = (parallel.delta @ parallel.delta.T) * (parallel.x @ parallel.x.T)
    assert np.allclose(shape.estimated(parallel, parallel, 8), exact, rtol=1e-5)
    by_one = shape.estimated(parallel, parallel, 1)  # one entry, made as long as all
    row = int(np.abs(sides.delta[1]).argmax())
    longer = np.sign(sides.delta[1, row]) * np.linalg.norm(sides.delta[1])
    assert by_one[2, 1] == pytest.approx(sides.delta[2, row] * longer * (3 * 6**0.5) * (2 * 6**0.5), rel=1e-5)


def test_the_recall_is_the_share_of_the_true_top_among_the_best_estimates(shape):
    scores = np.array([[9, 8, 7, 0, 0, 1], [1, 2, 3, 4, 5, 6]], np.float32)
    estimates = np.array([[9, 0, 8, 7, 1, 2], [0, 0, 0, 1, 2, 3]], np.float32)
    assert shape.recall(scores, estimates, 2, 3) == (0.5 + 1) / 2


def test_a_layer_is_judged_by_what_makes_the_work_easier(shape):
    names = [name.format(best=30) for name, _, _ in shape.READINGS]
    real = [dict.fromkeys(names, 0.4), dict.fromkeys(names, 0.6)]
    verdicts = {
        value: {
            row["figure"]: row["ImageNet's shape is"] for row in shape.compare(dict.fromkeys(names, value), real, 30)
        }
        for value in (0.5, 0.9)
    }
    assert set(verdicts[0.5].values()) == {"among the real ones"}
    assert verdicts[0.9]["in the largest 4"] == "easier than every real one"
    assert verdicts[0.9]["entries above 0.01"] == "harder than every real one"


def test_what_is_absent_is_left_out_and_said(shape, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("GRADINDEX_QUICK", "put back afterwards")
    monkeypatch.setenv("GRADINDEX_QUICK_SHARED", str(tmp_path))
    script = str(TOP / "scripts" / "bench" / "shape.py")
    monkeypatch.setattr(sys, "argv", [script, "--quick", "--tasks", "pseudo_classes"])
    shape.main()
    printed = capsys.readouterr()
    assert {line.split(";")[0] for line in printed.out.splitlines()} == {"What these figures leave open"}
    assert printed.err.startswith(
        f"pseudo_classes: left out, for {tmp_path}/augmented-1 has no features of the ResNet-9"
    )


@pytest.mark.slow
def test_the_estimate_is_that_of_a_store(shape, tmp_path):
    task = toys.sharp_task(tmp_path)
    store = toys.with_factors(tmp_path, task, "store")
    factors, (_, packing) = store.factors(store.ids), store.manifest.packing[0]
    asked = [np.array([0, 7, 31])] * 2
    found = leading(store, store.factors(asked[0]), [store.ids] * 3)
    rows = [shape.Sides(*factors[checkpoint, 0]) for checkpoint in range(2)]
    queries = [shape.Sides(*(side[which] for side in sides)) for sides, which in zip(rows, asked, strict=True)]
    ours = sum(shape.estimated(*pair, packing.kept) for pair in zip(rows, queries, strict=True))
    np.testing.assert_allclose(ours, found, rtol=1e-3, atol=1e-5 * np.abs(found).max())
