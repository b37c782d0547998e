"""Recall and mislabel curves, against counts made by hand."""

import numpy as np
import pytest

from gradindex.errors import ArgumentError, DimensionMismatchError
from gradindex.evaluation import recall_at_k, share_found

TRUTH = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 0.0, 1.0, -3.0]])


@pytest.mark.parametrize(
    ("ids", "k", "expected"),
    [
        ([[0, 1], [0, 1]], 2, [1.0, 1.0]),
        ([[1, 0], [3, 1]], 2, [1.0, 1.0]),  # order is no matter; of three equal scores any two will do
        ([[0, 4], [2, 0]], 2, [0.5, 0.5]),
        ([[3, 4], [2, 4]], 2, [0.0, 0.0]),
        ([[4, 2, 0], [0, 1, 3]], 2, [0.5, 1.0]),  # more were found than count
        ([[0], [0]], 2, [0.5, 0.5]),
    ],
)
def test_recall_counts_the_true_top_k_that_were_found(ids, k, expected):
    assert recall_at_k(TRUTH, np.array(ids), k).tolist() == expected


def test_recall_refuses_what_would_count_wrongly():
    with pytest.raises(ArgumentError, match="an id twice"):
        recall_at_k(TRUTH, np.array([[0, 0], [0, 1]]), 2)
    with pytest.raises(ArgumentError, match="k is 6"):
        recall_at_k(TRUTH, np.array([[0], [0]]), 6)
    with pytest.raises(DimensionMismatchError, match="truth has 2 queries, but ids has 1"):
        recall_at_k(TRUTH, np.array([[0]]), 1)


def test_share_found_inspects_the_most_suspicious_first():
    suspicion = np.array([0.1, 9.0, 3.0, 5.0, 0.0, 4.0, 1.0, 2.0, 0.5, 0.2])
    mislabelled = np.isin(np.arange(10), [1, 5, 4])
    found = share_found(suspicion, mislabelled, [0, 0.1, 0.25, 0.3, 0.9, 1])
    np.testing.assert_allclose(found, [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])


def test_equal_suspicion_is_inspected_in_the_order_of_ids():
    assert share_found(np.zeros(4), np.array([False, True, False, False]), [0.25, 0.5]).tolist() == [0, 1]


def test_share_found_refuses_what_has_no_answer():
    with pytest.raises(ArgumentError, match="no true value"):
        share_found(np.zeros(3), np.zeros(3, dtype=bool), [0.1])
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        share_found(np.zeros(3), np.ones(3, dtype=bool), [10])
    with pytest.raises(DimensionMismatchError, match=r"\(3,\).*\(4,\)"):
        share_found(np.zeros(3), np.ones(4, dtype=bool), [0.1])
