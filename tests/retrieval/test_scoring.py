"""Exact scores from stored factors: of each query's own candidates, where they lie, and the same whatever was asked."""

import numpy as np
import pytest
import toys

import gradindex
from gradindex import index
from gradindex.errors import ArgumentError, StoreError
from gradindex.projection import Projection
from gradindex.retrieval import scoring
from gradindex.store.layout import factor_name

N, M = 300, 6


@pytest.fixture(scope="module", params=["float32", "float16"])
def retriever(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    task = toys.make_task(folder, n_train=N, n_query=M)
    options = {"projection": Projection(dim=24), "batch_size": 32, "shard_rows": 70, "factors": request.param}
    gradindex.build(task, folder / "store", **options)
    return gradindex.load(task, folder / "store")


def naive(store, factors, query, ids):
    """Float64, one training example after the other."""
    total = np.zeros(len(ids))
    for (checkpoint, layer), (x, delta) in factors.items():
        for place, i in enumerate(ids):
            theirs = [side[0].astype(np.float64) for side in store.factors(np.array([i]))[checkpoint, layer]]
            total[place] += (x[query].astype(float) @ theirs[0]) * (delta[query].astype(float) @ theirs[1])
    return total


@pytest.mark.slow
def test_each_query_is_compared_with_its_own_candidates_in_their_order(retriever, monkeypatch):
    monkeypatch.setattr(scoring, "_PAIRS", 13)
    store, asked = retriever.store, retriever.prepare(range(M))
    generator = np.random.default_rng(0)
    lists = [generator.choice(N, size, replace=False) for size in (40, 1, 0, 75, 3, 20)]
    found = scoring.of_candidates(store, asked.factors, lists)
    assert [len(some) for some in found] == [40, 1, 0, 75, 3, 20]
    for query, (ids, scores) in enumerate(zip(lists, found, strict=True)):
        np.testing.assert_allclose(scores, naive(store, asked.factors, query, ids), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_pair_has_one_score_whatever_is_asked(retriever):
    asked = retriever.prepare(range(M))
    first = retriever.search(asked, 20)
    union = retriever.search(asked, 5, ids=np.unique(first.ids))
    np.testing.assert_array_equal(union.scores, first.scores[:, :5])
    np.testing.assert_array_equal(retriever.both(asked, N)[1].scores[:, ::-1][:, :20], first.scores)
    for query in range(M):
        least = float(first.scores[query, 9])
        strong = retriever.search(asked, at_least=least)
        assert strong.counts[query] == 10  # the tenth reaches its own score
        np.testing.assert_array_equal(strong.scores[query, :10], first.scores[query, :10])


def test_unknown_ids_and_a_store_without_factors_are_refused(retriever, tmp_path):
    with pytest.raises(ArgumentError, match="There is no training id 300; ids go from 0 to 299"):
        next(retriever.store.factors_in_place(np.array([0, 300])))
    task = toys.make_task(tmp_path, n_train=20)
    store = gradindex.build(task, tmp_path / "store", projection=Projection(dim=8))
    with pytest.raises(ArgumentError, match="has no factors"):
        next(store.factors_in_place(np.array([0])))


def test_damage_is_met_before_a_score_is_made_of_it(tmp_path):
    task = toys.make_task(tmp_path, n_train=N, n_query=2)
    store = gradindex.build(task, tmp_path / "store", projection=Projection(dim=24), factors="float32")
    seal = store._shards[0].seal  # where the file keeps the first layer's inputs
    place = seal["arrays"][factor_name(0, 0, "activations")]
    path = next((tmp_path / "store").rglob("*.h5"))
    content = bytearray(path.read_bytes())
    content[place["offset"] + 40] ^= 1
    path.write_bytes(content)
    damaged = gradindex.GradientStore(tmp_path / "store")
    with pytest.raises(StoreError, match=r"is damaged \(block \d+, in factors/0/0/activations"):
        next(damaged.factors_in_place(np.array([0, 7])))


@pytest.mark.parametrize("count", [0, 1, 500])
@pytest.mark.parametrize("threads_from", [0, 1 << 40])
def test_paired_products_are_those_of_the_pairs(count, threads_from, monkeypatch):
    monkeypatch.setattr(index.library, "_WORTH_THREADS", threads_from)
    before = index.library.load_faiss().omp_get_max_threads()
    generator = np.random.default_rng(1)
    sides = [
        (generator.normal(size=(4, dim)).astype(np.float32), generator.normal(size=(30, dim)).astype(np.float32))
        for dim in (1, 7, 64)
    ]
    at, other_at = generator.integers(0, 4, count), generator.integers(0, 30, count)
    found = index.paired_products(at, other_at, sides)
    for (one, other), products in zip(sides, found, strict=True):
        expected = (one[at].astype(float) * other[other_at]).sum(1)
        np.testing.assert_allclose(products, expected, rtol=1e-5, atol=1e-5)
    assert index.library.load_faiss().omp_get_max_threads() == before
