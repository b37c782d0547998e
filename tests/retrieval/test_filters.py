"""Which training examples may answer."""

import numpy as np
import pytest
from questions import COLUMNS, KINDS, QUERY_COLUMNS, M, N, agree, way

from gradindex.errors import ArgumentError
from gradindex.retrieval import candidates
from gradindex.retrieval.hits import NOTHING

LABEL = np.array(COLUMNS["label"])

FILTERS = {
    "one value": ({"where": {"label": "cat"}}, LABEL == "cat"),
    "several values": ({"where": {"label": ["cat", "emu"]}}, LABEL != "dog"),
    "several columns": ({"where": {"label": "dog", "number": 3, "flipped": False}},
                        (LABEL == "dog") & (COLUMNS["number"] == 3) & ~COLUMNS["flipped"]),
    "true": ({"where": {"flipped": True}}, COLUMNS["flipped"]),
    "NumPy values": ({"where": {"number": np.arange(3), "flipped": np.True_}},
                     (COLUMNS["number"] < 3) & COLUMNS["flipped"]),
    "a float that float32 rounds": ({"where": {"rate": 0.1}}, np.arange(N) % 4 == 1),
    "a number that no example can have": ({"where": {"number": [2**40, 5]}}, COLUMNS["number"] == 5),
    "ids": ({"ids": [250, 3, 77, 3]}, np.isin(np.arange(N), [3, 77, 250])),
    "ids and a value": ({"ids": range(100), "where": {"label": "cat"}}, (LABEL == "cat") & (np.arange(N) < 100)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FILTERS)
def test_filters_leave_the_best_of_what_they_allow(indexed, estimates, truth, case, kind):
    options, allowed = FILTERS[case]
    hits = indexed.search(range(M), 6, kind=kind, rerank="rows", **options)
    agree(hits, kind, estimates, allowed=allowed, k=6)
    assert way(hits) == [("rows", allowed.sum())]  # no index
    exact = indexed.search(range(M), 6, kind=kind, candidates=N, **options)
    agree(exact, kind, truth, allowed=allowed, k=6)
    every = indexed.search(range(M), kind=kind, at_least=0.0, **options)
    agree(every, kind, truth, allowed=allowed, at_least=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_examples_that_differ_from_the_query(indexed, estimates, truth, kind):
    allowed = LABEL[None] != np.array(QUERY_COLUMNS["label"])[:, None]
    for options, scores in (({"rerank": "rows"}, estimates), ({"candidates": N}, truth)):
        agree(indexed.search(range(M), 6, kind=kind, differs="label", **options), kind, scores, allowed=allowed, k=6)
    hits = indexed.search(range(M), kind=kind, differs="label", where={"number": 2}, at_least=0.0)
    agree(hits, kind, truth, allowed=allowed & (COLUMNS["number"] == 2), at_least=0.0)
    own = indexed.proponents([4, 9], 5, source="train", differs="label")
    assert (own.columns["label"] != LABEL[[4, 9]][:, None]).all()


def test_a_filter_through_the_model_settles_the_allowed_alone(plain, truth):
    allowed = LABEL == "cat"
    hits = plain.proponents(range(M), 5, where={"label": "cat"}, candidates=N)
    agree(hits, "proponents", truth, allowed=allowed, k=5)
    assert way(hits) == [("rows", allowed.sum()), ("model", allowed.sum())]
    hits = plain.proponents(range(M), where={"label": "cat"}, at_least=-1e9)
    agree(hits, "proponents", truth, allowed=allowed)


@pytest.mark.parametrize("few", [0.0, 1.0])
def test_gathered_and_streamed_rows_give_the_same_answer(indexed, few, estimates, monkeypatch):
    monkeypatch.setattr(candidates, "_FEW", few)
    monkeypatch.setattr(candidates, "_SCORES", 70)
    hits = indexed.opponents(range(M), 9, where={"number": [1, 2]}, rerank="rows")
    agree(hits, "opponents", estimates, allowed=np.isin(COLUMNS["number"], [1, 2]), k=9)


@pytest.mark.parametrize("kept", ["factors", "plain"])
@pytest.mark.parametrize("options", [{}, {"rerank": "rows"}, {"at_least": 0.0}], ids=str)
def test_a_filter_that_matches_nothing_says_so(request, kept, options, tmp_path):
    hits = request.getfixturevalue(kept).search([0, 1], where={"label": "yak"}, **options)
    assert hits.ids.shape == (2, 0)
    assert (hits.records(), hits.counts.tolist()) == ([], [0, 0])
    assert str(hits).count(f"({NOTHING})") == 2
    hits.save_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count(NOTHING) == 2


def test_items_have_no_columns_to_differ_from(factors):
    with pytest.raises(ArgumentError, match="items passed directly have no columns"):
        factors.search([factors.task.query[0]], differs="label")
