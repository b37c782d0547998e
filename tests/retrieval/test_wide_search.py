"""Wide rows settle the order among candidates, so that the model is asked for few of them or for none."""

import numpy as np
import pytest
import toys
from questions import COLUMNS, M, N, agree, make, ordered, save_index

import gradindex
from gradindex.errors import ArgumentError
from gradindex.retrieval.filters import allow
from gradindex.retrieval.hits import Stage
from gradindex.retrieval.question import Question
from gradindex.retrieval.searcher import LocalSearcher
from gradindex.retrieval.stages import Search, _may_enter, merged

KINDS = ["proponents", "opponents", "absolute"]
# More candidates than the best rows give: all of them.
ALL = {"candidates": N}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make(tmp_path_factory.mktemp("wide"), wide=2048)


@pytest.fixture(scope="module")
def exact(wide):
    return wide.exact_scores(range(M)).astype(np.float64)


@pytest.fixture(scope="module")
def queries(wide):
    return wide.prepare(range(M))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_exact_answers_are_those_of_all_candidates_and_the_model_scores_few(wide, exact, queries, kind):
    hits = wide.search(queries, 10, kind=kind, **ALL)
    agree(hits, kind, exact, k=10)
    assert hits.scored == "exact"
    *_, by_wide, by_model = hits.stages
    assert by_wide == Stage("wide", N) and by_model.name == "model" and by_model.share == 0.99
    assert 10 <= by_model.rows < 60
    assert f"wide 300, model {by_model.rows} (at least 99.0% of the candidates' top-k expected)" in hits.note
    assert hits.to_dict()["stages"][kind][-2:] == [{"name": "wide", "rows": N}, by_model.to_dict()]


@pytest.mark.parametrize("kind", KINDS)
def test_wide_rows_alone_answer_without_the_model(wide, exact, queries, kind, monkeypatch):
    monkeypatch.setattr("gradindex.retrieval.searcher.through_model", None)
    hits = wide.search(queries, 10, kind=kind, rerank="wide", **ALL)
    rows, by_wide = hits.stages
    assert hits.scored == "wide-estimated" and rows == Stage("rows", N) and (by_wide.name, by_wide.rows) == ("wide", N)
    assert f"wide 300 ({by_wide.share:.1%} of the candidates' top-k expected)" in hits.note
    true = [ordered(kind, scores, k=10) for scores in exact]
    measured = toys.share(hits.ids, np.array(true))
    assert measured > 0.85 and abs(measured - by_wide.share) < 0.1
    np.testing.assert_allclose(hits.scores, np.take_along_axis(exact, hits.ids, 1), atol=0.05 * np.abs(exact).max())
    strengths = {"proponents": hits.scores, "opponents": -hits.scores, "absolute": np.abs(hits.scores)}[kind]
    assert (np.diff(strengths, axis=1) <= 0).all()
    rows = wide.search(queries, 10, kind=kind, rerank="rows")
    assert toys.share(rows.ids, np.array(true)) < measured


def test_both_a_group_a_filter_and_a_threshold_work_with_wide_rows(wide, exact, queries):
    up, down = wide.both(queries, 5, rerank="wide", candidates=40)
    assert [[(stage.name, stage.rows) for stage in hits.stages] for hits in (up, down)] == [
        [("rows", N), ("wide", 40)]
    ] * 2
    group = wide.proponents(range(M), 10, aggregate="mean", rerank="wide", **ALL)
    assert toys.share(group.ids, [ordered("proponents", exact.mean(0), k=10)]) >= 0.8
    np.testing.assert_allclose(group.scores[0], exact.mean(0)[group.ids[0]], atol=0.05 * np.abs(exact).max())
    cats = wide.proponents(queries, 5, rerank="wide", where={"label": "cat"})
    assert (cats.columns["label"] == "cat").all() and len(COLUMNS["label"]) == N
    least = float(np.sort(exact[0])[-20])
    strong = wide.proponents(queries, at_least=least, rerank="wide", candidates=20)
    assert (strong.of(0)[1] >= least).all() and len(strong.of(0)[0]) > 5
    assert wide.proponents(queries, N, rerank="wide").ids.shape == (M, N)


def test_an_index_proposes_as_many_as_wide_rows_can_settle(tmp_path, exact):
    indexed = make(tmp_path, wide=2048)
    save_index(indexed.store, proposals=12)
    indexed = gradindex.load(indexed.task, indexed.store.folder)
    hits = indexed.proponents(range(M), 5, rerank="wide")
    assert [(stage.name, stage.rows) for stage in hits.stages] == [("index", 50), ("wide", 50)]
    true = [ordered("proponents", scores, k=5) for scores in exact]
    few, enough = (indexed.proponents(range(M), 5, **options) for options in ({"candidates": 12}, {}))
    assert toys.share(few.ids, true) < toys.share(enough.ids, true)
    assert indexed.proponents(range(M), 5, candidates=8).stages[-2] == Stage("wide", 8)


@pytest.mark.slow
def test_merged_answers_of_parts_are_the_answer_of_the_whole(wide, queries):
    question = Question(k=7, rerank="wide", candidates=N)
    whole, (store, candidates) = wide.answer(queries, question), wide._now()
    answers = []
    for ids in np.split(np.random.default_rng(0).permutation(N), [50, 170]):
        allowed = allow(store, Question(ids=ids), {}, M)
        searcher = LocalSearcher(store, candidates, wide._computing, queries, allowed, wide.inner_product)
        answers += Search(searcher, queries.vectors, question, ["proponents"]).answers()
    answer = merged("proponents", answers, 7)
    np.testing.assert_array_equal([ids for ids, _ in answer.found], whole.ids)
    np.testing.assert_array_equal([scores for _, scores in answer.found], whole.scores)
    assert answer.stages[-1].rows == N and answer.stages[-1].share == min(each.stages[-1].share for each in answers)


def test_a_store_without_wide_rows_says_how_to_get_them(plain):
    with pytest.raises(ArgumentError, match="rerank is 'wide', but the store has no wide rows. Build it .* wide=16384"):
        plain.proponents(0, 3, rerank="wide")
    with pytest.raises(ArgumentError, match="candidates needs rerank='exact' or 'wide', but rerank is 'rows'"):
        Question(rerank="rows", candidates=20)


def test_queries_that_were_prepared_without_wide_rows_are_prepared_again(wide, plain):
    with pytest.raises(ArgumentError, match="Prepare them again"):
        wide.proponents(plain.prepare([0]), 3)


def test_nothing_is_expected_of_wide_rows_in_half_precision_whose_error_is_not_known(tmp_path):
    retriever = make(tmp_path, wide=64, precision="bfloat16")
    hits = retriever.proponents([0, 1], 5, rerank="wide", candidates=20)
    assert hits.stages[-1] == Stage("wide", 20) and hits.note.endswith("wide 20")


def test_the_search_is_told_in_words(wide, plain):
    told = "; wide rows of 2,048 numbers a checkpoint settle the order of candidates"
    assert wide.search_note.endswith(told) and told not in plain.search_note


def test_only_those_may_enter_whose_chances_add_up_to_more_than_a_hundredth_of_the_best():
    errors, exact, known = np.ones(6), np.array([10.0, 9.0]), np.array([0, 1])
    # Against 9: chances of 0.16, 0.023, 0.0013 and 3e-5; those of the last two add up to less than 0.02.
    estimates = np.array([10.0, 9.0, 8.0, 7.0, 6.0, 5.0])
    assert _may_enter(estimates, errors, exact, known, 2).tolist() == [False, False, True, True, False, False]
    assert _may_enter(estimates, 0 * errors, exact, known, 2).tolist() == [False] * 6
    assert _may_enter(estimates, 0 * errors, exact - 3, known, 2).tolist() == [False, False, True, True, False, False]
    assert _may_enter(estimates, errors, exact[:1], known[:1], 2).tolist() == [False] + [True] * 5
    assert gradindex.Question(rerank="wide").to_dict() == {"rerank": "wide"}
