"""Kinds of indexes: one class and one registration each."""

import json

import numpy as np
import pytest
import toys

import gradindex
from gradindex import evaluation
from gradindex.choices import INDEX_KINDS
from gradindex.errors import ArgumentError, IndexFileError
from gradindex.evaluation import efforts, tuning
from gradindex.index import INDEXES, IndexMethod, LeftOut, Shape, checked
from gradindex.index.library import load_faiss
from gradindex.projection import Projection
from gradindex.retrieval.candidates import Candidates


@pytest.fixture
def floats():
    @INDEXES.register("floats")
    class Floats(IndexMethod):
        """All rows are compared, four bytes a number."""

        def make(self, rows):
            faiss = load_faiss()
            codes = faiss.IndexIDMap2(faiss.IndexFlatIP(self.dim))
            for ids, block in rows.blocks():
                codes.add_with_ids(block, ids)
            return codes

        @property
        def code_bytes(self):
            return 4 * self.dim

    yield "floats"
    del INDEXES._implementations["floats"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    task = toys.make_task(folder, n_train=300)
    return gradindex.build(task, folder / "store", projection=Projection("none"), batch_size=50).folder, task


@pytest.fixture
def store(built, monkeypatch):
    """A store, its task, and times that do not depend on the machine; no index is left there."""
    monkeypatch.setattr(
        efforts, "milliseconds", lambda s, search, truth, effort, *_: 1e6 if effort is None else effort.proposals
    )
    yield built
    tuning.drop(built[0])


def test_every_kind_that_may_be_chosen_is_registered():
    assert tuple(INDEXES) == INDEX_KINDS


def test_a_toy_kind_is_made_saved_loaded_and_searched(store, floats):
    folder, task = store
    made = evaluation.index(folder, recall=0.9, k=10, n_query=60, kind=floats, dim=30)
    assert made.how.startswith("index floats of 30 numbers, recall@10 at least ")
    assert json.loads((folder / "index" / "manifest.json").read_text())["shape"] == {
        "kind": "floats", "dim": 30, "lists": 0,
    }  # fmt: skip
    assert toys.call("verify", folder).exit_code == 0
    loaded = Candidates(gradindex.GradientStore(folder))
    rows = gradindex.GradientStore(folder).rows(np.arange(300))
    found = loaded.search(rows[:20], 10)[1]
    assert toys.share(found, np.argsort(-rows[:20] @ rows.T, axis=1)[:, :10]) > 0.95
    retriever = gradindex.load(task, folder)
    assert "floats" in retriever.search_note
    exact = gradindex.load(task, folder, use_index=False).proponents([0, 1], 5)
    np.testing.assert_array_equal(retriever.proponents([0, 1], 5).ids, exact.ids)


def test_a_toy_kind_leaves_out_removed_rows(store, floats):
    folder, _ = store
    evaluation.index(folder, recall=0.9, k=10, n_query=60, kind=floats, dim=30)
    search = Candidates(gradindex.GradientStore(folder)).index
    rows = gradindex.GradientStore(folder).rows(np.arange(300))
    best = search.search(rows[:1], 5)[1][0]
    assert not np.isin(search.search(rows[:1], 5, removed=LeftOut(np.sort(best)))[1][0], best).any()


def test_a_kind_that_is_gone_is_told_from_damage(store, floats):
    folder, _ = store
    evaluation.index(folder, recall=0.9, k=10, n_query=60, kind=floats, dim=30)
    taken = INDEXES._implementations.pop(floats)
    try:
        with pytest.raises(IndexFileError, match='shape.kind is "floats", but must be one of "flat", "ivf", "pq"'):
            checked(folder / "index")
        with pytest.raises(ArgumentError, match="kind is 'floats', but must be one of: flat, ivf, pq"):
            evaluation.index(folder, kind=floats)
    finally:
        INDEXES._implementations[floats] = taken


def test_a_toy_kind_is_tried_only_where_it_is_asked_for(store, floats):
    opened = gradindex.GradientStore(store[0])
    assert {shape.kind for shape in tuning._shapes(opened, None, None)} == {"flat"}
    assert tuning._shapes(opened, floats, None) == [Shape(floats, dim) for dim in (16, 32, 64, 128)]


def test_what_making_takes_follows_from_the_codes(floats):
    assert Shape(floats, 16).bytes_for(100) == 2 * 100 * (64 + 8)
    assert Shape("flat", 16).bytes_for(100) == 2 * 100 * (16 + 8)
    assert Shape("pq", 16).bytes_for(100) == 2 * 100 * (4 + 8)


def test_a_shape_of_an_unknown_kind_is_refused():
    with pytest.raises(ArgumentError, match="kind is 'hnsw', but must be one of: flat, ivf, pq"):
        Shape("hnsw", 16)


@pytest.mark.parametrize(
    ("shape", "text", "probes"),
    [
        (Shape("flat", 40), "flat of 40 numbers", [1]),
        (Shape("ivf", 40, 32), "ivf of 40 numbers, 32 lists", [1, 2, 4, 8, 16, 32]),
        (Shape("pq", 40), "pq of 40 numbers", [1]),
    ],
)
def test_a_shape_says_what_it_is_and_how_many_lists_may_be_looked_into(shape, text, probes):
    assert str(shape) == text and shape.method.probes == probes
