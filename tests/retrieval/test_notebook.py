"""Notebook manners: short reprs, tables and pictures as HTML, data frames, progress."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import toys

import gradindex
from gradindex.errors import DependencyError
from gradindex.progress import progress
from gradindex.projection import Projection

WORDS = [f"w{i}" if i % 3 else None for i in range(12)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    columns = {"word": WORDS, "loss_1": np.arange(12), "id": np.arange(12) * 2}
    task = toys.make_task(folder, columns=columns)
    gradindex.build(task, folder / "store", projection=Projection(dim=8), shard_rows=5)
    return gradindex.load(task, folder / "store")


def test_reprs_are_one_short_line(opened):
    hits = opened.both(0, k=2)
    for thing in (opened.task, opened.store, opened, hits.proponents, opened.explain(0, [1])):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 600
    assert "12 rows of 24 numbers in float32; 3 checkpoints; projection tensorsketch" in repr(opened.store)
    assert "columns word, loss_1, id" in repr(opened)


def test_a_store_has_a_length(opened):
    assert len(opened.store) == opened.store.n_train == 12


def test_stores_retrievers_and_explanations_are_html(opened):
    assert "<td" in opened.store._repr_html_()
    assert "12 rows of 24 numbers" in opened.store._repr_html_()
    html = opened._repr_html_()
    assert opened.search_note in html
    assert "Sequential with 53 parameters" in html
    page = opened.explain([0, 1], range(4))._repr_html_()
    assert page.count("<img") == 6
    assert "The first 6 of 8." in page
    assert "query 0, id 0: score" in page


def test_names_in_html_are_escaped(opened):
    store = gradindex.GradientStore(opened.store.folder)
    store.folder = Path("<b>")
    assert "&lt;b&gt;" in store._repr_html_()
    assert "<b>" not in store._repr_html_()


def test_an_explanation_without_the_extra_says_what_to_install(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    assert "pip install &#x27;gradindex[demo]&#x27;" in opened.explain(0, [1])._repr_html_()


def test_both_unpack_and_show_together(opened):
    answers = opened.both([0, 1], k=3)
    up, down = answers
    assert answers.proponents is up
    assert (up.kind, down.kind) == ("proponents", "opponents")
    html = answers._repr_html_()
    assert "query 0: proponents" in html
    assert "query 1: opponents" in html
    frame = answers.to_pandas()
    assert frame["kind"].tolist() == ["proponents"] * 6 + ["opponents"] * 6
    assert frame.index.tolist() == list(range(12))


def test_hits_and_explanations_become_data_frames(opened):
    hits = opened.proponents([0, 1], k=3)
    frame = hits.to_pandas()
    assert list(frame.columns) == ["query", "kind", "rank", "id", "score", "word", "columns.loss_1", "columns.id"]
    assert frame.to_dict("list")["id"] == hits.ids.ravel().tolist()
    np.testing.assert_array_equal(frame["score"], hits.scores.ravel())
    assert opened.proponents(0, k=2, at_least=1e9).to_pandas().shape == (0, 8)
    explanation = opened.explain([0, 1], [3, 5, 7])
    frame = explanation.to_pandas()
    assert frame.to_dict("records") == explanation.records()
    np.testing.assert_allclose(
        frame.groupby(["query", "id"])["score"].sum().to_numpy().reshape(2, 3), explanation.scores.sum((2, 3))
    )


def test_a_store_becomes_a_flat_data_frame(opened):
    store = opened.store
    frame = store.to_pandas()
    names = ["word", "columns.loss_1", "columns.id", "self_influence"]
    names += [f"{name}_{checkpoint}" for name in ("self_influence", "loss") for checkpoint in range(3)]
    assert list(frame.columns) == names
    assert frame.index.name == "id"
    assert frame["word"].isna().tolist() == [word is None for word in WORDS]
    np.testing.assert_array_equal(frame["self_influence"], store.self_influence().sum(1))
    np.testing.assert_array_equal(frame["loss_1"], store.losses()[:, 1])
    some = store.to_pandas([7, 2])
    assert some.index.tolist() == [7, 2]
    assert some["columns.id"].tolist() == [14, 4]


def test_data_frames_without_pandas_are_explained(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for call in (opened.store.to_pandas, opened.proponents(0, k=1).to_pandas, opened.explain(0, [1]).to_pandas):
        with pytest.raises(DependencyError, match=r"to_pandas\(\) needs the package pandas\. Install it: pip install"):
            call()


def test_a_notebook_has_the_bar_of_tqdm(monkeypatch, capsys):
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    with progress("gradients", 10, "rows", 2) as advance:
        advance(8)
    assert "gradients: 100%" in capsys.readouterr().err.split("\r")[-1]
    del shell.kernel  # a terminal's IPython
    with progress("gradients", 10, "rows") as advance:
        advance(10)
    assert "100%" not in capsys.readouterr().err


def test_a_notebook_without_tqdm_goes_on(monkeypatch):
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with progress("gradients", 3, "rows") as advance:
        advance(3)
