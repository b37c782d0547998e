"""What an index is judged by: the true top-k, and how sure a measured recall is."""

import numpy as np
import pytest

from gradindex.errors import ArgumentError
from gradindex.evaluation import truth as truth_of
from gradindex.store import GradientStore


def test_truth_counts_equal_scores_and_not_the_query_itself(store):
    _, folder = store
    opened = GradientStore(folder)
    truth = truth_of.held_out(opened, 30, 10)
    ids = opened.ids
    chosen = truth.own.tolist()
    np.testing.assert_array_equal(opened.rows(truth.own), truth.rows)
    rows = opened.rows(ids).astype(np.float64)
    for sign in (1, -1):
        scores = sign * rows[chosen] @ rows.T
        scores[np.arange(30), chosen] = -np.inf
        for query in range(30):
            best = truth.best[sign][query]
            assert set(best[best >= 0]) == set(np.argsort(-scores[query])[:10])
    assert truth.recalls(1, np.where(truth.best[1] >= 0, truth.best[1], 0), 99).min() == 1
    assert truth.recalls(1, np.full((30, 5), -1), 99).max() == 0
    first = np.concatenate([truth.own[:, None], truth.best[1]], 1)  # the query itself takes no place
    assert truth.recalls(1, first, first.shape[1] - 1).min() == 1


def test_queries_whose_top_is_not_clear_are_left_out():
    rows = np.eye(30, 40, dtype=np.float32)
    scores = np.random.default_rng(0).standard_normal((30, 50)).astype(np.float32)
    scores[:5] = 1  # all equal
    scores[5, :4] = 9  # four equal at the top, of which any three are the top-3
    truth = truth_of.truth_from(rows, [(slice(0, 30), np.arange(50), scores)], np.full(30, -1), 3, "", 0)
    assert len(truth.rows) == 25
    (place,) = np.flatnonzero(truth.rows[:, 5])
    assert set(truth.best[1][place]) - {-1} == {0, 1, 2, 3}
    assert sorted(truth.rows.argmax(1)) == list(range(5, 30))
    assert truth.rows.argmax(1).tolist() != list(range(5, 30))  # in no order, so that halves are not alike
    scores[:] = 1
    with pytest.raises(
        ArgumentError, match="Only 0 of 30 queries have a top-3 without ties, but at least 20 are needed"
    ):
        truth_of.truth_from(rows, [(slice(0, 30), np.arange(50), scores)], np.full(30, -1), 3, "", 0)


def test_the_lower_bound_holds_as_often_as_it_says_and_is_never_certain():
    generator, missed = np.random.default_rng(0), 0
    for _ in range(2000):
        values = 1 - generator.integers(0, 3, 40) * (generator.random(40) < 0.3) / 10
        missed += truth_of.lower_bound(values, 10) > 1 - 0.3 / 10
    assert missed / 2000 < 0.06
    assert 0.95 < truth_of.lower_bound(np.ones(20), 10) < 0.995
    assert 0.999 < truth_of.lower_bound(np.ones(250), 100) < 1
    assert truth_of.lower_bound(np.ones(20), 10, tries=5) < truth_of.lower_bound(np.ones(20), 10)
    # Student's t with 10 degrees of freedom has 1.8125 at 95%.
    values = np.array([0.9, 1.0] * 5)
    with_one = np.append(values, 0.8)
    expected = with_one.mean() - 1.8125 * with_one.std(ddof=1) / 11**0.5
    assert truth_of.lower_bound(values, 10) == pytest.approx(expected, abs=2e-4)


def test_truth_comes_in_pieces_of_queries_and_of_rows():
    generator = np.random.default_rng(0)
    rows, scores = np.eye(30, 40, dtype=np.float32), generator.standard_normal((30, 50)).astype(np.float32)
    pieces = [
        (slice(q, q + 15), np.arange(i, i + 5), scores[q : q + 15, i : i + 5]) for q in (0, 15) for i in range(0, 50, 5)
    ]
    truth = truth_of.truth_from(rows, pieces, np.full(30, 7), 3, "", 0)
    scores[:, 7] = np.nan
    for row, best in zip(truth.rows, truth.best[-1], strict=True):
        assert set(best) - {-1} == set(np.argsort(scores[row.argmax()])[:3])
