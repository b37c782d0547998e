"""An index is tuned for each geometry apart; one serves both where it holds for both."""

import numpy as np
import pytest
from click.testing import CliRunner

import gradindex
from gradindex import evaluation
from gradindex.cli import main
from gradindex.errors import ArgumentError, RecallError, StoreError
from gradindex.evaluation import efforts, tuning
from gradindex.retrieval.candidates import Candidates
from gradindex.store import GradientStore, second_moments


@pytest.fixture
def whitened(store, quick, monkeypatch):
    """The store with second moments; every index counts as faster than comparing all rows."""
    task, folder = store
    second_moments(folder)
    took = efforts.milliseconds
    monkeypatch.setattr(efforts, "milliseconds", lambda *args: 1e6 if args[3] is None else took(*args))
    return task, folder


def test_an_index_of_its_own_keeps_its_promise_and_leaves_the_other_alone(whitened):
    task, folder = whitened
    options = {"recall": 0.9, "k": 10, "n_query": 200, "kind": "flat", "dim": 32}
    plain = evaluation.index(folder, **options)
    own = evaluation.index(folder, geometry="whitened", **options)
    assert own.index.about["recall"]["against"] == "against whitened scores of all rows, training examples as queries"
    assert own.folder.name == "index-whitened" and plain.folder.name == "index"
    assert Candidates(GradientStore(folder)).index.about["file"] == plain.index.about["file"]
    retriever = gradindex.load(task, folder, geometry="whitened")
    true = retriever.exact_scores(range(40))
    for kind, sign in (("proponents", 1), ("opponents", -1)):
        hits = retriever.search(range(40), 10, kind=kind)
        assert [stage.name for stage in hits.stages] == ["index", "rows"]
        best = retriever.store.ids[np.argsort(-sign * true, 1)[:, :10]]
        assert np.mean([np.isin(*pair).mean() for pair in zip(hits.ids, best, strict=True)]) >= 0.85
        own_scores = np.take_along_axis(true, np.searchsorted(retriever.store.ids, hits.ids), 1)
        np.testing.assert_allclose(hits.scores, own_scores, rtol=1e-4, atol=1e-4)
    assert "whitened" in retriever.search_note
    other = gradindex.load(task, folder, geometry="whitened", damping=0.1)
    assert other.search([0], 5).stages[0].name == "rows" and "or damping" in other.search_note
    tuning.drop(folder, "whitened")
    assert "another geometry" in gradindex.load(task, folder, geometry="whitened").search_note
    assert gradindex.load(task, folder).search(range(2), 5).stages[0].name == "index"


def test_an_index_that_holds_for_both_is_shared(whitened):
    task, folder = whitened
    evaluation.index(folder, recall=0.9, k=10, n_query=200, kind="flat", dim=60)
    file = Candidates(GradientStore(folder)).index.about["file"]
    shared = evaluation.index(folder, recall=0.6, k=10, n_query=200, geometry="whitened")
    assert shared.folder.name == "index" and shared.index.about["file"] == file
    assert set(shared.index.about["geometries"]) == {"tracin", "whitened"}
    assert gradindex.load(task, folder, geometry="whitened").search([0], 5).stages[0].name == "index"
    assert gradindex.load(task, folder).search([0], 5).stages[0].name == "index"
    assert GradientStore(folder).verify() == []


def test_the_queries_of_a_retriever_say_the_geometry(whitened):
    task, folder = whitened
    retriever = gradindex.load(task, folder, geometry="whitened", use_index=False)
    found = evaluation.index(folder, recall=0.6, k=10, n_query=40, retriever=retriever, kind="flat", dim=32)
    assert found.index.about["recall"]["against"] == "against whitened scores of all rows, the task's queries"
    with pytest.raises(ArgumentError, match="retriever asks by geometry='whitened'"):
        evaluation.index(folder, k=10, n_query=40, retriever=retriever, geometry="tracin")
    against, measured = evaluation.evaluate(folder, k=10, n_query=40, retriever=retriever)
    assert "whitened" in against and len(measured) == 3


def test_without_moments_the_command_that_makes_them_is_named(store, quick):
    with pytest.raises(StoreError, match="gradindex whiten"):
        evaluation.index(store[1], k=10, n_query=40, geometry="whitened", kind="flat")


def test_a_recall_that_is_not_reached_leaves_all_as_it_was(whitened):
    _, folder = whitened
    with pytest.raises(RecallError):
        evaluation.index(folder, recall=0.999, k=10, n_query=100, geometry="whitened", kind="flat", dim=2)
    assert Candidates(GradientStore(folder), geometry="whitened").index is None


def test_commands(whitened):
    _, folder = whitened

    def run(*arguments):
        return CliRunner().invoke(main, [str(each) for each in arguments])

    made = run("whiten", folder)
    assert made.exit_code == 0 and "second moments of" in made.output
    assert "search: exact over all rows; whitened queries: exact over all rows\n" in run("info", folder).output
    wrong = run("index", folder, "--damping", "0.1")
    assert wrong.exit_code == 1 and "damping decides nothing" in wrong.output
    measured = run("evaluate", folder, "-k", 5, "--queries", 40, "--geometry", "whitened")
    assert measured.exit_code == 0 and "whitened scores of all rows" in measured.output
