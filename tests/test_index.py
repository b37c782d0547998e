"""The index: exact inner products, both signs, a fixed order of ties, and nothing damaged is read."""

import importlib.metadata
import json
import sys

import faiss
import numpy as np
import pytest
import toys

import gradindex
from gradindex.errors import ArgumentError, DependencyError, DimensionMismatchError, IndexFileError
from gradindex.index import SearchIndex

ROWS = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
QUERY = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)


def make(rows=ROWS):
    ids = np.arange(len(rows))
    return SearchIndex.build(rows.shape[1], [(ids[:7], rows[:7]), (ids[7:], rows[7:])])


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


def test_rows_must_come_in_the_order_of_their_ids():
    with pytest.raises(ArgumentError, match="8 came at 7"):
        SearchIndex.build(6, [(np.arange(7), ROWS[:7]), (np.arange(8, 20), ROWS[8:])])


def test_a_saved_index_answers_as_before(tmp_path):
    index = make()
    index.save(tmp_path / "index", "rows of A")
    loaded = SearchIndex.load(tmp_path / "index", "rows of A")
    for mine, theirs in zip(index.search(QUERY, 20), loaded.search(QUERY, 20), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "one bit": (flip, "is damaged: it has another size or checksum"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "is damaged"),
    "gone": (lambda path: path.unlink(), "is missing"),
    "seal gone": (lambda path: path.with_name("index.json").unlink(), "is missing"),
    "seal damaged": (lambda path: path.with_name("index.json").write_text("{"), "is missing"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_before_faiss_reads_the_file(tmp_path, monkeypatch, case):
    make().save(tmp_path, "rows of A")
    harm, message = DAMAGES[case]
    harm(tmp_path / "flat.faiss")
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("was read"))
    with pytest.raises(IndexFileError, match=f"{message}.*Run the same `gradindex build` again"):
        SearchIndex.load(tmp_path, "rows of A")


def test_an_index_of_other_rows_is_refused(tmp_path):
    make().save(tmp_path, "rows of A")
    with pytest.raises(IndexFileError, match="belongs to other rows"):
        SearchIndex.load(tmp_path, "rows of B")


def test_an_index_with_another_metric_is_refused(tmp_path):
    l2 = faiss.IndexFlatL2(6)
    l2.add(ROWS)
    SearchIndex(l2).save(tmp_path, "rows of A")
    with pytest.raises(IndexFileError, match="does not search by inner product"):
        SearchIndex.load(tmp_path, "rows of A")


def test_a_folder_that_cannot_be_written_keeps_the_old_index(tmp_path):
    make().save(tmp_path, "rows of A")
    seal = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "a file").write_text("")
    with pytest.raises(IndexFileError, match="cannot be written"):
        make().save(tmp_path / "a file", "rows of A")
    assert json.loads((tmp_path / "index.json").read_text()) == seal


def test_missing_faiss_names_both_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DependencyError, match=r"pip install 'gradindex\[cpu\]' or 'gradindex\[gpu\]'"):
        make()


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
        make()


def test_two_faiss_packages_are_refused(monkeypatch):
    both = {"faiss": ["faiss-gpu", "faiss-cpu", "faiss-cpu"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: both)
    with pytest.raises(DependencyError, match="faiss-cpu and faiss-gpu are both installed"):
        make()
