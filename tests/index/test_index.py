"""The index: exact inner products, both signs, a fixed order of ties, and nothing damaged is read."""

import sys

import numpy as np
import pytest
import toys

import gradindex
from gradindex.errors import ArgumentError, DependencyError, DimensionMismatchError
from gradindex.index import SearchIndex, require

ROWS = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
QUERY = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)


def make(rows=ROWS):
    ids = np.arange(len(rows))
    return SearchIndex(rows.shape[1], len(rows), lambda: [(ids[:7], rows[:7]), (ids[7:], rows[7:])])


def test_search_returns_the_largest_inner_products():
    scores, ids = make().search(QUERY, 5)
    truth = QUERY @ ROWS.T
    np.testing.assert_array_equal(ids, np.argsort(-truth, 1)[:, :5])
    np.testing.assert_allclose(scores, np.take_along_axis(truth, ids, 1), rtol=1e-5)
    assert ids.dtype == np.int64


def test_the_negated_query_finds_the_smallest():
    scores, ids = make().search(-QUERY, 5)
    truth = QUERY @ ROWS.T
    np.testing.assert_array_equal(ids, np.argsort(truth, 1)[:, :5])
    np.testing.assert_allclose(-scores, np.take_along_axis(truth, ids, 1), rtol=1e-5)


def test_equal_scores_come_in_the_order_of_ids():
    rows = np.ones((9, 2), dtype=np.float32)
    rows[4] = 2
    assert make(rows).search(np.ones((1, 2), dtype=np.float32), 9)[1].tolist() == [[4, 0, 1, 2, 3, 5, 6, 7, 8]]


@pytest.mark.parametrize("k", [60, 100, 501, 600, 1024])
def test_equal_scores_at_the_last_place_go_to_the_lowest_ids(k):
    """FAISS keeps any of equal scores where it cuts."""
    values = np.random.default_rng(2).permutation(np.repeat(np.arange(4), 500)).astype(np.float32)
    rows, ids = np.stack([values, np.ones(2000, np.float32)], 1), np.arange(2000)
    index = SearchIndex(2, 2000, lambda: [(ids[s : s + 1500], rows[s : s + 1500]) for s in (0, 1500)])
    for sign in (1, -1):
        query = np.array([[sign, 0], [2 * sign, 1]], dtype=np.float32)
        found = index.search(query, k)[1]
        np.testing.assert_array_equal(found, np.tile(np.lexsort((ids, -sign * values))[:k], (2, 1)))


REFUSED = {
    "another dimension": (
        QUERY[:, :5],
        3,
        DimensionMismatchError,
        r"shape \(3, 5\), but the index needs \(n_query, 6\)",
    ),
    "one axis": (QUERY[0], 3, DimensionMismatchError, r"shape \(6,\)"),
    "NaN": (QUERY * np.nan, 3, ArgumentError, "NaN or infinite"),
    "k of 0": (QUERY, 0, ArgumentError, "k is 0, but must be between 1 and the number of training examples, 20"),
    "k above n": (QUERY, 21, ArgumentError, "k is 21"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_searches_are_refused(case):
    query, k, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make().search(query, k)


def test_blocks_of_any_size_and_ids_with_gaps_give_the_same_answer():
    ids = np.arange(0, 200, 10)
    pieces = [(ids[:1], ROWS[:1]), (ids[1:1], ROWS[1:1]), (ids[1:15], ROWS[1:15]), (ids[15:], ROWS[15:])]
    scores, found = SearchIndex(6, 20, lambda: pieces).search(QUERY, 7)
    expected, places = make().search(QUERY, 7)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    np.testing.assert_array_equal(found, ids[places])


def test_missing_faiss_names_both_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DependencyError, match=r"pip install 'gradindex\[cpu\]' or 'gradindex\[gpu\]'"):
        require()


def test_a_build_without_faiss_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DependencyError, match="FAISS cannot be imported"):
        gradindex.build(toys.make_task(tmp_path), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_faiss_gpu_without_its_cuda_wheels_is_explained(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "faiss":
                raise RuntimeError("libcublas.so.12 is missing")

    monkeypatch.delitem(sys.modules, "faiss")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(DependencyError, match=r"libcublas.so.12 is missing.*gradindex\[cpu\]"):
        require()


def installed(folder, name, module):
    """A package as pip leaves it."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text(f"{module}\n")


def test_two_faiss_packages_are_refused(tmp_path, monkeypatch):
    installed(tmp_path, "faiss-gpu-cu99", "faiss")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match="faiss-[cg]pu.* and faiss-gpu-cu99 are both installed"):
        require()


@pytest.mark.slow
def test_packages_that_only_sound_like_faiss_are_no_second_one(tmp_path, monkeypatch):
    installed(tmp_path, "faiss-helpers", "helpers_of_faiss")
    monkeypatch.syspath_prepend(tmp_path)
    require()
