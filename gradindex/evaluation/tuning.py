"""An index whose recall is a promise: the cheapest that keeps it, found with some queries and measured with others."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..candidates import INDEX_FOLDER, Candidates, Effort
from ..errors import ArgumentError, RecallError, check_k
from ..index import CompactIndex, Shape
from ..progress import progress
from ..retrieval import Retriever
from ..store import GradientStore, changing
from .truth import Truth, held_out, lower_bound, real

# Rows that directions, lists and codes are fitted to.
_SAMPLE_BYTES, _SAMPLE_ROWS = 256 << 20, 65_536
_DIMS = (16, 32, 64, 128, 256)
# With fewer rows than this, lists cost more recall than they save time.
_LISTS_FROM = 100_000
_PROPOSALS = (1, 2, 3, 5, 8, 12, 20, 40)  # times k
_TIMED = 40


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
