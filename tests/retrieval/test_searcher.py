"""The seam for search: queries travel as arrays, searchers answer for their own rows, answers are merged."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import toys

import gradindex
from gradindex.errors import ArgumentError
from gradindex.retrieval.filters import allow
from gradindex.retrieval.hits import Stage
from gradindex.retrieval.question import Question
from gradindex.retrieval.ranking import ranked
from gradindex.retrieval.searcher import LocalSearcher, Proposed, Searcher
from gradindex.retrieval.stages import Answer, Search, merged

N = 60


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searcher")
    task = toys.make_task(folder, n_train=N)
    gradindex.build(task, folder / "store", factors="float32", projection=gradindex.projection.Projection(dim=64))
    return gradindex.load(task, folder / "store")


def part_of(retriever, queries, ids):
    """A searcher of some of a store's rows alone."""
    store, candidates = retriever._now()
    allowed = allow(store, Question(ids=ids), {}, len(queries))
    return LocalSearcher(store, candidates, retriever._computing, queries, allowed, retriever.inner_product)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["proponents", "opponents", "absolute"])
@pytest.mark.parametrize("options", [{"k": 7}, {"k": 7, "rerank": "rows"}, {"at_least": 0.05}])
def test_merged_answers_of_parts_are_the_answer_of_the_whole(retriever, kind, options):
    queries, question = retriever.prepare([0, 2, 3]), Question(kind=kind, **options)
    whole = retriever.answer(queries, question)
    order = np.random.default_rng(0).permutation(N)
    answers = []
    for ids in (order[:20], order[20:21], order[21:]):
        searcher = part_of(retriever, queries, ids)
        answers += Search(searcher, queries.vectors, question, [kind]).answers()
    answer = merged(kind, answers, question.k, question.at_least)
    for query in range(3):
        np.testing.assert_array_equal(answer.found[query][0], whole.of(query)[0])
        np.testing.assert_array_equal(answer.found[query][1], whole.of(query)[1])
    assert sum(stage.rows for stage in answer.stages if stage.name == "rows") in (0, N)


def test_equal_scores_at_the_edge_of_a_merged_answer_go_by_their_ids():
    one = Answer([(np.array([5, 1]), np.array([2.0, 1.0]))], (Stage("rows", 2),), "rows")
    other = Answer([(np.array([0, 3]), np.array([1.0, 1.0]))], (Stage("rows", 3),), "rows")
    answer = merged("proponents", [one, other], 2)
    assert answer.found[0][0].tolist() == [5, 0] and answer.stages == (Stage("rows", 5),)
    with pytest.raises(ArgumentError, match="Answers by exact and rows cannot be merged"):
        merged("proponents", [one, replace(other, last="exact")], 2)


class Elsewhere:
    """A searcher that got its queries as bytes and knows neither store nor model: rows and scores in an array."""

    exact_from, exhaustive, wide, calibrated = "elsewhere", False, False, True

    def __init__(self, rows):
        self.rows, self.n_train = rows, len(rows)

    def propose(self, vectors, kinds, k, *, last, at_least=None, candidates=None):
        ids, scores = np.arange(self.n_train), pickle.loads(pickle.dumps(vectors)).rows @ self.rows.T
        best = {kind: [ranked(kind, ids, each, candidates or k, at_least) for each in scores] for kind in kinds}
        return Proposed(best, (Stage("rows", self.n_train),), "rows", candidates or k)

    def products(self, vectors, query, ids):
        return self.rows[ids] @ vectors.rows[query]

    def score(self, vectors, lists):
        return [2 * self.rows[ids] @ row for ids, row in zip(lists, vectors.rows, strict=True)]

    def estimate(self, vectors, lists):
        raise NotImplementedError

    def score_all(self, vectors):
        raise NotImplementedError


def test_another_searcher_answers_the_same_questions(retriever):
    store, queries = retriever.store, retriever.prepare([0, 2])
    searcher: Searcher = Elsewhere(store.rows(store.ids))
    (by_rows,) = Search(searcher, queries.vectors, Question(k=5, rerank="rows"), ["proponents"]).answers()
    np.testing.assert_array_equal(
        [ids for ids, _ in by_rows.found], retriever.proponents(queries, 5, rerank="rows").ids
    )
    (exact,) = Search(searcher, queries.vectors, Question(k=5, candidates=20), ["opponents"]).answers()
    expected = retriever.opponents(queries, 5, rerank="rows")
    np.testing.assert_array_equal([ids for ids, _ in exact.found], expected.ids)
    np.testing.assert_allclose([scores for _, scores in exact.found], 2 * expected.scores, rtol=1e-5)
    assert exact.stages == (Stage("rows", N), Stage("elsewhere", 20))


def test_vectors_travel_without_model_or_examples(retriever):
    vectors = retriever.prepare([0, 2]).vectors
    again = pickle.loads(pickle.dumps(vectors))
    np.testing.assert_array_equal(again.rows, vectors.rows)
    assert again.fingerprint == retriever.store.manifest.fingerprint and set(again.factors) == set(vectors.factors)
    assert len(pickle.dumps(vectors)) < 200_000
