"""The best of what an index finds: by score, then id, copies of a row once, and what is none last."""

import numpy as np
import pytest

from gradindex.index.exact import ranked


@pytest.mark.parametrize("shift", [0, 1 << 32, (1 << 62)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_ties_copies_and_none_against_a_sorted_set(shift, scale):
    generator = np.random.default_rng(0)
    for _ in range(50):
        m = int(generator.integers(1, 60))
        of_id = (generator.integers(-3, 4, (2, 40)) * scale).astype(np.float32)  # many ties
        places = np.stack([generator.permutation(40)] * 2)[:, generator.integers(0, 40, m)]
        scores, ids = np.take_along_axis(of_id, places, 1), places.astype(np.int64) + shift
        none = generator.random(ids.shape) < 0.2
        ids[none], scores[none] = -1, 7.0  # FAISS pads with a score like any other
        k = int(generator.integers(1, m + 1))
        best, names = ranked(scores, ids, k)
        assert best.dtype == np.float32 and names.dtype == np.int64 and best.shape == names.shape == (2, k)
        for row in range(2):
            pairs = zip(scores[row].tolist(), ids[row].tolist(), strict=True)
            true = sorted({(-score, i) for score, i in pairs if i >= 0})[:k]
            assert names[row].tolist() == [i for _, i in true] + [-1] * (k - len(true))
            assert best[row].tolist() == [-score for score, _ in true] + [-np.inf] * (k - len(true))


def test_minus_zero_is_zero():
    scores = np.array([[0.0, -0.0, 0.0]], dtype=np.float32)
    assert ranked(scores, np.array([[5, 3, 4]]), 3)[1].tolist() == [[3, 4, 5]]
