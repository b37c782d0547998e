"""An index whose recall is a promise: the cheapest that keeps it, found with some queries and measured with others."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..candidates import INDEX_FOLDER, Candidates, Effort
from ..errors import ArgumentError, RecallError, check_k
from ..gradients import HALF
from ..index import CompactIndex, Shape
from ..progress import progress
from ..retrieval import Retriever
from ..store import GradientStore, changing

# Rows that directions, lists and codes are fitted to.
_SAMPLE_BYTES, _SAMPLE_ROWS = 256 << 20, 65_536
_DIMS = (16, 32, 64, 128, 256)
# With fewer rows than this, lists cost more recall than they save time.
_LISTS_FROM = 100_000
_PROPOSALS = (1, 2, 3, 5, 8, 12, 20, 40)  # times k
_TIMED = 40
# Fewer queries say too little.
_LEAST_QUERIES = 20


@dataclass(frozen=True)
class Truth:
    """What an index is judged by.

    Args:
        rows: (n_query, dim) float32 rows of the queries, in random order.
        best: for both signs (1 and -1), (n_query, m) ids whose true score is at least the k-th largest; -1 elsewhere.
        own: (n_query,) the query's own id, which does not count; -1 where it has none.
        k: how many are the top.
        against: what the scores are, for people.
    """

    rows: NDArray[np.float32]
    best: dict[int, NDArray[np.int64]]
    own: NDArray[np.int64]
    k: int
    against: str

    def half(self, which: int) -> Truth:
        """Every other query, from 0 or 1 on."""
        best = {sign: ids[which::2] for sign, ids in self.best.items()}
        return Truth(self.rows[which::2], best, self.own[which::2], self.k, self.against)

    def recalls(self, sign: int, proposed: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        """(n_query,) shares of the true top-k among the first ``count`` of (n_query, m) ids but the query's own.

        An id of -1 is none.
        """
        found = []
        for true, mine, own in zip(self.best[sign], proposed, self.own, strict=True):
            others = mine[(mine != own) & (mine >= 0)][:count]
            found.append(np.isin(others, true[true >= 0]).sum())
        return np.minimum(found, self.k) / self.k


def _truth(
    rows: NDArray[np.float32],
    scored: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]],
    own: NDArray[np.int64],
    k: int,
    against: str,
    seed: int,
) -> Truth:
    """From ids (m,) and true scores (n_query, m), piece by piece.

    Queries with more equal scores at the k-th place than are kept cannot be judged and are left out.
    """
    width = 2 * k + 1
    best = {sign: (np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64)) for sign in (1, -1)}
    for ids, scores in scored:
        for sign, (kept, names) in best.items():
            signed = np.where(ids[None] == own[:, None], -np.inf, sign * scores).astype(np.float32)
            kept = np.concatenate([kept, signed], 1)
            names = np.concatenate([names, np.broadcast_to(ids, signed.shape)], 1)
            if kept.shape[1] > width:
                places = np.argpartition(-kept, width - 1, axis=1)[:, :width]
                kept, names = np.take_along_axis(kept, places, 1), np.take_along_axis(names, places, 1)
            best[sign] = kept, names
    clear, top = np.ones(len(rows), dtype=bool), {}
    for sign, (kept, names) in best.items():
        kth = np.partition(kept, -k, axis=1)[:, -k]
        top[sign] = np.where(kept >= kth[:, None], names, -1)
        clear &= (kept < kth[:, None]).any(1) | (kept.shape[1] < width)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(clear))  # halves must not be alike
    if len(order) < _LEAST_QUERIES:
        raise ArgumentError(
            f"There are {len(order)} queries whose top-{k} is clear, but at least {_LEAST_QUERIES} are needed. "
            "Give more, or another k where many scores are equal."
        )
    return Truth(rows[order], {sign: ids[order] for sign, ids in top.items()}, own[order], k, against)


def held_out(store: GradientStore, n_query: int, k: int, seed: int = 0) -> Truth:
    """Training examples as queries, each without itself; truth is exact where the store has exact factors.

    Args:
        store: a complete one.
        n_query: how many, at most.
        k: how many are the top.
        seed: which.
    """
    ids = store.ids
    chosen = np.sort(np.random.default_rng(seed).choice(ids, min(n_query, len(ids)), replace=False))
    described = store.manifest["map"]
    exact = store.manifest["factors"] == "float32" and not (described["unit_norm"] or described["precision"] in HALF)
    rows, mine = store.rows(chosen), store.factors(chosen) if exact else {}

    def scored() -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        with progress("true scores", len(ids), "rows") as advance:
            for some, block in store.blocks():
                scores = np.zeros((len(chosen), len(some)), dtype=np.float32) if exact else rows @ block.T
                for key, (activations, output_gradients) in (store.factors(some) if exact else {}).items():
                    scores += (mine[key][1] @ output_gradients.T) * (mine[key][0] @ activations.T)
                yield some, scores
                advance(len(some))

    kind = "exact scores" if exact else "scores of all rows"
    return _truth(rows, scored(), chosen, k, f"against {kind}, training examples as queries", seed)


def real(retriever: Retriever, n_query: int, k: int, seed: int = 0) -> Truth:
    """The task's own queries, drawn at random, with exact scores, (n_query, n_train) of which are in memory.

    Args:
        retriever: open, of a task with query data.
        n_query: how many, at most.
        k: how many are the top.
        seed: which.

    Raises:
        ArgumentError: the task has no query data, or too few queries.
    """
    n = retriever.task.n_query
    if n == 0:
        raise ArgumentError("The task has no query data. Give Task(query=...), or leave the task out.")
    queries = [int(q) for q in np.random.default_rng(seed).choice(n, min(n_query, n), replace=False)]
    rows = retriever.query_rows(queries)
    scored = [(retriever.store.ids, retriever.exact_scores(queries).astype(np.float32))]
    return _truth(rows, scored, np.full(len(rows), -1), k, "against exact scores, the task's queries", seed)


@dataclass(frozen=True)
class Measured:
    """Mean recall of both kinds of answers, and the lower ends of their one-sided 95% intervals over queries."""

    proponents: float
    opponents: float
    proponents_at_least: float
    opponents_at_least: float

    @property
    def at_least(self) -> float:
        """The lower end of the worse."""
        return min(self.proponents_at_least, self.opponents_at_least)


def measure(search: Candidates, truth: Truth, count: int, effort: Effort | None = None, tries: int = 1) -> Measured:
    """How many of the true top-k are among the rows that a search hands on to exact scores.

    Args:
        search: with an index or without.
        truth: see :class:`Truth`.
        count: rows that are handed on.
        effort: with an index, by default what it was tuned to.
        tries: among how many measurements this one may be the luckiest.
    """
    n = min(count + 1, search.n_train)  # one of them may be the query itself
    found = {sign: search.search(sign * truth.rows, n, effort)[1] for sign in (1, -1)}
    return _measured(truth, found, count, tries)


def _measured(truth: Truth, found: dict[int, NDArray[np.int64]], count: int, tries: int = 1) -> Measured:
    recalls = [truth.recalls(sign, found[sign], count) for sign in (1, -1)]
    least = [lower_bound(values, truth.k, tries) for values in recalls]
    return Measured(float(recalls[0].mean()), float(recalls[1].mean()), least[0], least[1])


def lower_bound(recalls: NDArray[np.float64], k: int, tries: int = 1) -> float:
    """The lower end of a one-sided 95% interval of the mean recall.

    By Student's t, with one query more that misses one of its top-k, so that equal recalls do not pretend to be
    certain; the 5% are shared out among ``tries`` measurements (Bonferroni).

    Args:
        recalls: (n,) of queries, drawn at random.
        k: how many are the top.
        tries: see :func:`measure`.
    """
    values = np.append(recalls, max(0.0, recalls.min() - 1 / k))
    free = len(values) - 1
    z = NormalDist().inv_cdf(1 - 0.05 / tries)
    # Quantile of Student's t from that of the normal distribution (Abramowitz and Stegun, 26.7.5).
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return max(0.0, float(values.mean() - t * values.std(ddof=1) / len(values) ** 0.5))


def index(
    folder: str | os.PathLike[str],
    *,
    recall: float = 0.99,
    k: int = 100,
    n_query: int = 500,
    retriever: Retriever | None = None,
    seed: int = 0,
) -> Candidates:
    """Make the fastest index of a store that holds the true top-k of proponents and of opponents.

    Of half of the queries it is found how few proposals each index needs; of the other half, recall is measured, and
    the lower end of its one-sided 95% interval must reach ``recall``. Where comparing all rows is as fast, no index is
    made.

    Args:
        folder: of the store.
        recall: the share of the true top-k that must be among the proposals, which exact scores then settle.
        k: how many are the top.
        n_query: queries to tune and measure with.
        retriever: of the store, to take the task's own queries and exact scores; by default training examples.
        seed: of what is random.

    Returns:
        The search, with the index or, where there is no faster one, without.

    Raises:
        ArgumentError: ``recall`` or ``k`` is out of range, or there are fewer than 20 queries.
        RecallError: no index reaches the recall; says how close one came. What was there stays.
        StoreError: the store is damaged, or the index cannot be written.
    """
    if not 0 < recall < 1:
        raise ArgumentError(f"recall is {recall}, but must be between 0 and 1.")
    with changing(folder) as store:
        check_k(k, store.n_train)
        truth = held_out(store, n_query, k, seed) if retriever is None else real(retriever, n_query, k, seed)
        sample = _sample(store, seed)
        choices, best = _choices(store, sample, truth.half(0), recall, seed)
        all_rows = _milliseconds(Candidates(store, use_index=False), truth, None, k)
        quicker = [choice for choice in choices if choice.milliseconds < all_rows]
        if choices and not quicker:
            drop(store.folder)  # of another time, or damaged
            return Candidates(store)
        reached = []
        for choice in sorted(quicker, key=lambda choice: choice.milliseconds):
            made = CompactIndex.build(choice.shape, sample, store.blocks, seed)
            searched, effort = Candidates(store, made), choice.effort
            measured = measure(searched, truth.half(1), effort.proposals, effort, tries=len(quicker))
            if measured.at_least >= recall:
                made.save(
                    store.folder / INDEX_FOLDER, _about(store, choice, choices, measured, truth, recall, all_rows)
                )
                return Candidates(store)
            reached.append(measured.at_least)
        raise RecallError(
            f"No index of {store.folder} is sure to hold {recall:.4g} of the true top-{k}, {truth.against}: the best "
            f"reaches at least {max(reached or [best]):.4f}. Ask for less, give more queries, or search all rows, as "
            "before."
        )


def drop(folder: str | os.PathLike[str]) -> None:
    """Take away a store's index: all rows are compared from then on."""
    shutil.rmtree(Path(folder) / INDEX_FOLDER, ignore_errors=True)


def _about(
    store: GradientStore, chosen: Choice, choices: Sequence[Choice], measured: Measured, truth: Truth, recall: float,
    all_rows: float,
) -> dict[str, Any]:  # fmt: skip
    """What the manifest of an index says of how it came about."""
    against = {"target": recall, "k": truth.k, "against": truth.against, "queries": len(truth.half(1).rows)}
    return {
        "map": store.manifest["fingerprint"],
        "ids": store.id_runs.tolist(),
        "effort": asdict(chosen.effort),
        "recall": against | asdict(measured),
        "milliseconds": {"index": chosen.milliseconds, "all_rows": all_rows},
        "curve": [asdict(choice) for choice in choices],
    }


def evaluate(
    folder: str | os.PathLike[str],
    *,
    k: int = 100,
    n_query: int = 500,
    retriever: Retriever | None = None,
    seed: int = 1,
) -> tuple[str, dict[str, Measured]]:
    """Measure again how much of the true top-k is found: by the store's index, and by its rows alone.

    Args:
        folder: of the store.
        k: how many are the top.
        n_query: how many queries.
        retriever: as for :func:`index`.
        seed: which training examples are queries.

    Returns:
        What truth is, and recall by what proposes: the index, and the best k and 10 k of all rows.

    Raises:
        ArgumentError: ``k`` is out of range.
        StoreError, IndexFileError: the store or its index is damaged.
    """
    store = GradientStore(folder)
    check_k(k, store.n_train)
    truth = held_out(store, n_query, k, seed) if retriever is None else real(retriever, n_query, k, seed)
    search, found = Candidates(store), {}
    if search.index is not None:
        effort = search.effort(k)
        found[f"index, {effort.proposals:,} proposals"] = measure(search, truth, effort.proposals, effort)
    everything = Candidates(store, use_index=False)
    for count in (k, 10 * k):
        found[f"best {min(count, store.n_train):,} of all rows"] = measure(everything, truth, count)
    return truth.against, found


def _sample(store: GradientStore, seed: int) -> NDArray[np.float32]:
    count = min(store.n_train, _SAMPLE_ROWS, max(1000, _SAMPLE_BYTES // (4 * store.dim)))
    return store.rows(np.sort(np.random.default_rng(seed).choice(store.ids, count, replace=False)))


@dataclass(frozen=True)
class Choice:
    """An index that reached the recall with the queries that it was tuned with, and what a query takes."""

    shape: Shape
    effort: Effort
    milliseconds: float


def _choices(
    store: GradientStore, sample: NDArray[np.float32], truth: Truth, recall: float, seed: int
) -> tuple[list[Choice], float]:
    """Indexes that reach the recall with these queries, one at a time in memory; and the best recall of any."""
    choices, best = [], 0.0
    shapes = list(_shapes(store, len(sample)))
    with progress("indexes", len(shapes), "indexes") as advance:
        for shape in shapes:
            made = CompactIndex.build(shape, sample, store.blocks, seed)
            for probes in [1] if shape.kind == "flat" else [2**i for i in range(shape.lists.bit_length())]:
                effort, reached = _fewest_proposals(made, truth, recall, probes, store.n_train)
                best = max(best, reached)
                if effort is not None:
                    milliseconds = _milliseconds(Candidates(store, made), truth, effort, truth.k)
                    choices.append(Choice(shape, effort, milliseconds))
                    break  # more lists only take longer
            advance(1)
    return choices, best


def _shapes(store: GradientStore, sampled: int) -> Iterator[Shape]:
    dims = [dim for dim in _DIMS if dim < store.dim] or [store.dim]
    if store.n_train < _LISTS_FROM:
        yield from (Shape("flat", dim) for dim in dims)
        return
    lists = 1 << (int(store.n_train**0.5).bit_length() - 1)
    yield from (Shape("ivf", dim, min(lists, sampled // 40)) for dim in dims)


def _fewest_proposals(
    made: CompactIndex, truth: Truth, recall: float, probes: int, n_train: int
) -> tuple[Effort | None, float]:
    counts = sorted({min(times * truth.k, n_train) for times in _PROPOSALS})
    found = {sign: made.search(sign * truth.rows, counts[-1] + 1, probes=probes)[1] for sign in (1, -1)}
    reached = 0.0
    for count in counts:
        reached = _measured(truth, found, count).at_least
        if reached >= recall:
            return Effort(probes, count), reached
    return None, reached


def _milliseconds(search: Candidates, truth: Truth, effort: Effort | None, k: int) -> float:
    """Median time of a single query."""
    seconds: list[float] = []
    for row in _spread(truth.rows):
        started = time.perf_counter()
        search.search(row[None], k, effort)
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def _spread(rows: NDArray[np.float32]) -> Sequence[NDArray[np.float32]]:
    return list(rows[:: max(1, len(rows) // _TIMED)])


def as_records(found: dict[str, Measured], k: int) -> list[dict[str, Any]]:
    """Results as rows of a table."""
    return [
        {"proposed by": name, f"recall@{k} proponents": m.proponents, "at least": m.proponents_at_least,
         f"recall@{k} opponents": m.opponents, "at least ": m.opponents_at_least}
        for name, m in found.items()
    ]  # fmt: skip
