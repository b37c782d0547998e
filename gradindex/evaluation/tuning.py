"""An index whose recall is a promise: the cheapest that keeps it, found with some queries and measured with others."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..candidates import INDEX_FOLDER, Candidates, Effort
from ..errors import ArgumentError, RecallError, check_k
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
# One-sided 95% of a normal distribution, which the mean of many recalls nearly has.
_NORMAL_95 = 1.645


@dataclass(frozen=True)
class Truth:
    """What an index is judged by.

    Args:
        rows: (n_query, dim) float32 rows of the queries.
        best: for both signs (1 and -1), (n_query, m) ids whose true score is at least the k-th largest; -1 elsewhere.
        k: how many are the top.
        against: what the scores are, for people.
    """

    rows: NDArray[np.float32]
    best: dict[int, NDArray[np.int64]]
    k: int
    against: str

    def half(self, which: int) -> Truth:
        """Every other query, from 0 or 1 on."""
        best = {sign: ids[which::2] for sign, ids in self.best.items()}
        return Truth(self.rows[which::2], best, self.k, self.against)

    def recalls(self, sign: int, proposed: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n_query,) shares of the true top-k that (n_query, m) proposed ids hold; -1 is no id."""
        pairs = zip(self.best[sign], proposed, strict=True)
        found = [np.isin(mine[mine >= 0], true[true >= 0]).sum() for true, mine in pairs]
        return np.minimum(found, self.k) / self.k


def _truth(
    rows: NDArray[np.float32],
    scored: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]],
    own: NDArray[np.int64],
    k: int,
    against: str,
) -> Truth:
    """From ids (m,) and true scores (n_query, m), piece by piece; ``own`` is what does not count for each query."""
    width = 2 * k  # room for equal scores at the k-th place
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
    top = {}
    for sign, (kept, names) in best.items():
        kth = np.partition(kept, -k, axis=1)[:, -k]
        top[sign] = np.where(kept >= kth[:, None], names, -1)
    return Truth(rows, top, k, against)


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
    exact = store.manifest["factors"] == "float32" and not store.manifest["map"]["unit_norm"]
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
    return _truth(rows, scored(), chosen, k, f"against {kind}, training examples as queries")


def real(retriever: Retriever, n_query: int, k: int) -> Truth:
    """The task's own queries, with exact scores.

    Args:
        retriever: open, of a task with query data.
        n_query: how many, at most, from the first on.
        k: how many are the top.

    Raises:
        ArgumentError: the task has no query data.
    """
    if retriever.task.n_query == 0:
        raise ArgumentError("The task has no query data. Give Task(query=...), or leave the task out.")
    queries = range(min(n_query, retriever.task.n_query))
    rows = retriever.query_rows(queries)
    scored = [(retriever.store.ids, retriever.exact_scores(queries).astype(np.float32))]
    return _truth(rows, scored, np.full(len(rows), -1), k, "against exact scores, the task's queries")


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


def measure(index: CompactIndex, truth: Truth, effort: Effort) -> Measured:
    """How many of the true top-k are among the rows that an index proposes."""
    return _measured(truth, {sign: index.search(sign * truth.rows, effort.proposals, probes=effort.probes)[1]
                             for sign in (1, -1)})  # fmt: skip


def measure_all_rows(store: GradientStore, truth: Truth, candidates: int) -> Measured:
    """The same of the best rows of all."""
    everything = Candidates(store, use_index=False)
    count = min(candidates, store.n_train)
    return _measured(truth, {sign: everything.search(sign * truth.rows, count)[1] for sign in (1, -1)})


def _measured(truth: Truth, proposed: dict[int, NDArray[np.int64]]) -> Measured:
    means, least = [], []
    for sign in (1, -1):
        recalls = truth.recalls(sign, proposed[sign])
        error = recalls.std(ddof=1) / len(recalls) ** 0.5 if len(recalls) > 1 else 0.0
        means.append(float(recalls.mean()))
        least.append(float(recalls.mean() - _NORMAL_95 * error))
    return Measured(means[0], means[1], least[0], least[1])


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
        ArgumentError: ``recall`` or ``k`` is out of range, or there are fewer than 4 queries.
        RecallError: no index reaches the recall; says how close one came. What was there stays.
        StoreError: the store is damaged, or the index cannot be written.
    """
    if not 0 < recall < 1:
        raise ArgumentError(f"recall is {recall}, but must be between 0 and 1.")
    with changing(folder) as store:
        check_k(k, store.n_train)
        truth = held_out(store, n_query, k, seed) if retriever is None else real(retriever, n_query, k)
        if len(truth.rows) < 4:
            raise ArgumentError(f"There are {len(truth.rows)} queries, but at least 4 are needed. Give more.")
        choices, closest = _choices(store, truth.half(0), recall, seed)
        all_rows = _milliseconds(Candidates(store, use_index=False), truth, None, k)
        for milliseconds, found, effort in sorted(choices, key=lambda choice: choice[0]):
            if milliseconds >= all_rows:
                break
            measured = measure(found, truth.half(1), effort)
            if measured.at_least < recall:
                closest = max(closest, measured.at_least)
                continue
            about = {
                "map": store.manifest["fingerprint"],
                "ids": store.id_runs.tolist(),
                "effort": asdict(effort),
                "recall": {"target": recall, "k": k, "against": truth.against, "queries": len(truth.half(1).rows)}
                | asdict(measured),
                "milliseconds": {"index": milliseconds, "all_rows": all_rows},
                "curve": [
                    {"shape": made.about["shape"], "effort": asdict(e), "milliseconds": ms} for ms, made, e in choices
                ],
            }
            found.save(store.folder / INDEX_FOLDER, about)
            return Candidates(store)
        if choices and min(choice[0] for choice in choices) >= all_rows:
            shutil.rmtree(store.folder / INDEX_FOLDER, ignore_errors=True)  # of another time, or damaged
            return Candidates(store, use_index=False)
        raise RecallError(
            f"No index of {store.folder} holds {recall:.4g} of the true top-{k} {truth.against}: the best reaches "
            f"{max(closest, 0):.4f}. Ask for less, or search all rows, as before."
        )


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
    truth = held_out(store, n_query, k, seed) if retriever is None else real(retriever, n_query, k)
    candidates, found = Candidates(store), {}
    if candidates.index is not None:
        effort = candidates.effort(k)
        found[f"index, {effort.proposals:,} proposals"] = measure(candidates.index, truth, effort)
    for count in (k, 10 * k):
        found[f"best {min(count, store.n_train):,} of all rows"] = measure_all_rows(store, truth, count)
    return truth.against, found


def _choices(
    store: GradientStore, truth: Truth, recall: float, seed: int
) -> tuple[list[tuple[float, CompactIndex, Effort]], float]:
    """Indexes that reach the recall with these queries, and the milliseconds that a query takes; the best recall."""
    count = min(store.n_train, _SAMPLE_ROWS, max(1000, _SAMPLE_BYTES // (4 * store.dim)))
    sample = store.rows(np.sort(np.random.default_rng(seed).choice(store.ids, count, replace=False)))
    choices, best = [], 0.0
    shapes = list(_shapes(store, len(sample)))
    with progress("indexes", len(shapes), "indexes") as advance:
        for shape in shapes:
            made = CompactIndex.build(shape, sample, store.blocks, seed)
            for probes in [1] if shape.kind == "flat" else [2**i for i in range(shape.lists.bit_length() - 1)]:
                effort, reached = _fewest_proposals(made, truth, recall, probes, store.n_train)
                best = max(best, reached)
                if effort is not None:
                    choices.append((_milliseconds(Candidates(store, made), truth, effort, truth.k), made, effort))
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
    found = {sign: made.search(sign * truth.rows, counts[-1], probes=probes)[1] for sign in (1, -1)}
    reached = 0.0
    for count in counts:
        reached = _measured(truth, {sign: ids[:, :count] for sign, ids in found.items()}).at_least
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
