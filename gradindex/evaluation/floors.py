"""What no index of so few numbers can do better: how many rows it must propose, estimated before one is made."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..choices import AnswerKind
from ..retrieval.candidates import pieces
from ..retrieval.scoring import of_candidates
from ..store import GradientStore
from .efforts import SIGNS
from .truth import Truth

# Queries and rows of the sample that tell; an estimate's recall may be wrong by so much.
_QUERIES, _ROWS, _SLACK = 100, 16_384, 0.02
# Candidates whose scoring is timed, and how often.
_SCORED, _TIMES = (100, 1000), 5


class Floors:
    """The fewest proposals of indexes by their numbers, were all rows compared, uncoded, by these numbers.

    The rank of a true one of the top-k among all rows is estimated from a sample of them.

    Args:
        store: a complete one.
        sample: (m, n) rows of it.
        truth: of queries to tune with.
        dims: how many numbers are asked for, ascending.
        directions: (n, dims[-1]) that they are of, the leading ones first.
    """

    def __init__(
        self,
        store: GradientStore,
        sample: NDArray[np.float32],
        truth: Truth,
        dims: Sequence[int],
        directions: NDArray[np.float32],
    ) -> None:
        self._k, self._dims = truth.k, dims
        some = truth.part(0, max(1, len(truth.rows) // _QUERIES))
        others = sample[:: -(-len(sample) // _ROWS)]  # of the whole store, which may be in the order of its classes
        turned, queries = others @ directions, some.rows @ directions
        times, spans = store.n_train / len(others), list(zip([0, *self._dims], self._dims, strict=False))
        # By numbers and kind, for each query the ranks of its true ones.
        self._ranks: dict[int, dict[AnswerKind, list[NDArray[np.float64]]]] = {
            dim: {kind: [] for kind in SIGNS} for dim in self._dims
        }
        for number, query in enumerate(queries):
            best = {kind: some.best[sign][number] for kind, sign in SIGNS.items()}
            names = np.unique(np.concatenate([ids[ids >= 0] for ids in best.values()]))
            top = np.concatenate([store.rows(piece) @ directions for piece in pieces(names, _ROWS)])
            of_others, of_top = np.zeros(len(others)), np.zeros(len(names))
            for start, stop in spans:
                of_others += turned[:, start:stop] @ query[start:stop]
                of_top += top[:, start:stop] @ query[start:stop]
                for kind, sign in SIGNS.items():
                    ranked = np.sort(-sign * of_others)
                    mine = -sign * of_top[np.searchsorted(names, best[kind][best[kind] >= 0])]
                    before = times * np.searchsorted(ranked, mine)
                    self._ranks[stop][kind].append(np.maximum(before, np.argsort(np.argsort(mine))))

    def recall(self, dim: int, kind: AnswerKind, proposals: int) -> float:
        """The mean recall of so many proposals of an index of ``dim`` numbers, were its codes exact."""
        shares = [np.minimum((ranks < proposals).sum(), self._k) / self._k for ranks in self._ranks[dim][kind]]
        return float(np.mean(shares))

    def proposals(self, dim: int, recall: float, counts: Sequence[int]) -> dict[AnswerKind, int] | None:
        """The fewest of ``counts`` for each kind, or ``None`` where none reaches the recall."""
        fewest = {}
        for kind in SIGNS:
            enough = [count for count in counts if self.recall(dim, kind, count) + _SLACK >= recall]
            if not enough:
                return None
            fewest[kind] = enough[0]
        return fewest


class ScoringTime:
    """Milliseconds that exact scores, or full rows, of so many candidates take at least."""

    def __init__(self, store: GradientStore, truth: Truth, seed: int) -> None:
        generator, taken = np.random.default_rng(seed), []
        sizes = [min(size, store.n_train) for size in _SCORED]
        asked = None if truth.factors is None else store.factors(store.spread_ids(1))
        for size in sizes:
            ids = np.sort(generator.choice(store.ids, size, replace=False))
            seconds = []
            for _ in range(_TIMES):
                started = time.perf_counter()
                if asked is None:
                    store.rows(ids)
                else:
                    of_candidates(store, asked, [ids])
                seconds.append(time.perf_counter() - started)
            taken.append(1000 * min(seconds))
        self._sizes, self._taken = sizes, taken

    def of(self, count: float) -> float:
        """By a line through what was measured."""
        (few, many), (first, last) = self._sizes, self._taken
        return first if many <= few else max(0.0, first + (count - few) * (last - first) / (many - few))
