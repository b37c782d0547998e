"""How far a search must go: from the fewest lists on, whatever more lists do to the recall."""

import numpy as np
import pytest

from gradindex.evaluation import efforts
from gradindex.evaluation.truth import Truth

N_QUERY, K, EVERY = 40, 10, [1, 2, 3, 4, 6, 8, 12, 16]
TRUTH = Truth(np.zeros((N_QUERY, 4), np.float32), {1: np.tile(np.arange(K), (N_QUERY, 1))}, np.full(N_QUERY, -1), K, "")


class Proposing:
    """Finds so many of the true ten as a table says for its lists."""

    def __init__(self, found):
        self.n_train, self.index, self.asked, self._found = 1000, self, [], found

    def search(self, rows, count, probes):
        self.asked.append(probes)
        ids = np.full((len(rows), count), 999)
        ids[:, : self._found[probes]] = np.arange(self._found[probes])
        return None, ids


@pytest.mark.parametrize(
    ("found", "place", "asked"),
    [
        ((2, 4, 10, 10, 10, 10, 10, 10), 2, 3),  # more lists are not even tried
        ((2, 4, 6, 8, 10, 9, 8, 7), 4, 5),  # more lists are worse, all of them would not do
        ((2, 4, 6, 8, 9, 8, 7, 6), None, 7),  # falls twice in a row
        ((2, 4, 3, 8, 7, 9, 10, 10), 6, 7),
    ],
)
def test_the_fewest_lists_are_found_though_more_may_be_worse(found, place, asked):
    search = Proposing(dict(zip(EVERY, found, strict=True)))
    first, best = efforts._first(search, TRUTH, 0.97, EVERY, 1)
    assert (first, len(search.asked)) == (place, asked)
    at_best = max(found[:asked])
    assert abs(best - (at_best / K - (1 / K if at_best < K else 0) / N_QUERY)) < 0.03


def test_counts_are_of_the_store():
    assert efforts.counts(25, 10) == [10, 15, 20, 24]
    assert efforts.counts(10**6, 100)[-1] == 4000
