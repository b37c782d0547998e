"""An index whose recall is a promise: the cheapest that keeps it, found with some queries and measured with others."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..choices import IndexKind
from ..errors import ArgumentError, OutOfMemoryError, RecallError, check_k
from ..index import INDEXES, CompactIndex, Shape, devices
from ..memory import available_bytes
from ..progress import progress
from ..retrieval.candidates import INDEX_FOLDER, Candidates, Effort, candidates_for
from ..retrieval.retriever import Retriever
from ..retrieval.scoring import of_candidates
from ..store import GradientStore, changing
from .measuring import Measured, handed_on, measure, measured_of
from .truth import Truth, held_out, real

# Rows that directions, lists and codes are fitted to.
_SAMPLE_BYTES, _SAMPLE_ROWS = 256 << 20, 32_768
# With fewer rows than this, all of them are compared unasked: that takes a millisecond and is exact.
_SMALL = 2_000
_PROPOSALS = (1, 2, 3, 4, 5, 6, 8, 12, 20, 40)  # times k
_TIMED = 40
# As many queries tell whether lists are worth more than a glance: whether all of them, and what this mean may be wrong
# by, reach the recall.
_GLANCED, _GLANCE = 50, 0.02
# Tuned for a little more than is asked for, where there is a choice: what just reaches it with some queries fails with
# others half of the time.
_MARGIN = 0.25
# How many are measured with the other half of the queries, fastest first; more tries make each less sure.
_TRIES = 6
# Steps that go further than what is fastest.
_FURTHER = 2
# An index with more numbers that is slower than this many times the fastest ends the search: still more cost more.
_HOPELESS = 1.5


def index(
    folder: str | os.PathLike[str],
    *,
    recall: float = 0.99,
    k: int = 100,
    n_query: int = 500,
    retriever: Retriever | None = None,
    seed: int = 0,
    kind: IndexKind | None = None,
    dim: int | None = None,
    device: str | None = None,
) -> Candidates:
    """Make the fastest index of a store that holds the true top-k of proponents and of opponents.

    Below 2,000 rows none is made, unless ``kind`` or ``dim`` is given: comparing all takes a millisecond. Else, of half
    of the queries it is found how few proposals each index needs; of the other half, recall is measured, and the lower
    end of its one-sided 95% interval must reach ``recall``. Where comparing all rows is as fast, no index is made.

    Args:
        folder: of the store.
        recall: the share of the true top-k that must be among the proposals, which exact scores then settle.
        k: how many are the top.
        n_query: queries to tune and measure with.
        retriever: of the store, to take the task's own queries and exact scores; by default training examples.
        seed: of what is random.
        kind: ``"flat"``, ``"ivf"`` or ``"pq"``, see :class:`Shape`; by default the fastest of ``"flat"`` (from
            100,000 rows on ``"ivf"``) and, up to 500,000 rows, ``"pq"``.
        dim: numbers of a row in the index, by default those that answer fastest.
        device: where to make and to measure it, such as ``"cuda"``; by default the CPU.

    Returns:
        The search, with the index or, where there is no faster one, without.

    Raises:
        ArgumentError: an option is out of range, or there are fewer than 20 queries.
        OutOfMemoryError: making the index would take more memory than is free; says how much, and what fits.
        RecallError: no index reaches the recall; says how close one came. What was there stays.
        StoreError: the store is damaged, or the index cannot be written.
    """
    if not 0 < recall < 1:
        raise ArgumentError(f"recall is {recall}, but must be between 0 and 1.")
    try:
        torch.device(device or "cpu")
    except RuntimeError:
        raise ArgumentError(f"device is {device!r}, but must be a device that PyTorch knows, such as cuda.") from None
    with changing(folder) as store:
        check_k(k, store.n_train)
        if store.n_train < _SMALL and kind is None and dim is None:
            CompactIndex.remove(store.folder / INDEX_FOLDER)  # of another time
            return Candidates(store, device=device)
        truth = held_out(store, n_query, k, seed) if retriever is None else real(retriever, n_query, k, seed)
        sample = _sample(store, seed)
        shapes = _shapes(store, kind, dim)
        choices, best, built = _choices(store, sample, shapes, truth.part(0), recall, seed, device)
        all_rows = _milliseconds(store, Candidates(store, use_index=False, device=device), truth, None, k)
        quicker = [each for each in choices if each.milliseconds < all_rows]
        if choices and not quicker:
            CompactIndex.remove(store.folder / INDEX_FOLDER)  # of another time, or damaged
            return Candidates(store, device=device)
        reached, tries = [], _tries(quicker)
        for choice in tries:
            if built is None or built.shape != choice.shape:
                built = CompactIndex.build(choice.shape, sample, store.blocks, seed, devices(device))
            searched, effort = Candidates(store, built, device=device), choice.effort
            count = handed_on(store, effort, k)
            measured = measure(searched, truth.part(1), count, effort, tries=len(tries))
            if measured.at_least >= recall:
                built.save(
                    store.folder / INDEX_FOLDER, _about(store, choice, choices, measured, truth, recall, all_rows)
                )
                return Candidates(store, device=device)
            reached.append(measured.at_least)
        raise RecallError(
            f"No index of {store.folder} reaches recall {recall:.4g} of the true top-{k} {truth.against}: the best "
            f"reaches at least {max(reached or [best]):.4f}. Lower the recall, give more queries, or keep scanning all "
            "rows."
        )


def drop(folder: str | os.PathLike[str]) -> Candidates:
    """Take away a store's index: all rows are compared from then on.

    Raises:
        StoreError: there is no store, or another process changes it.
    """
    with changing(folder) as store:
        CompactIndex.remove(store.folder / INDEX_FOLDER)
        return Candidates(store)


def _about(
    store: GradientStore, chosen: Choice, choices: Sequence[Choice], measured: Measured, truth: Truth, recall: float,
    all_rows: float,
) -> dict[str, Any]:  # fmt: skip
    """What the manifest of an index says of how it came about."""
    against = {"target": recall, "k": truth.k, "against": truth.against, "queries": len(truth.part(1).rows)}
    return {
        "map": store.manifest.fingerprint,
        "ids": store.id_runs.tolist(),
        "covers": store.origins,
        "effort": asdict(chosen.effort),
        "recall": against | asdict(measured),
        "milliseconds": {"index": chosen.milliseconds, "all_rows": all_rows},
        "curve": [asdict(choice) for choice in choices],
    }


def _sample(store: GradientStore, seed: int) -> NDArray[np.float32]:
    count = min(store.n_train, _SAMPLE_ROWS, max(1000, _SAMPLE_BYTES // (4 * store.dim)))
    return store.rows(np.sort(np.random.default_rng(seed).choice(store.ids, count, replace=False)))


@dataclass(frozen=True)
class Choice:
    """An index that reached the recall with the queries that it was tuned with, how much, and what a query takes."""

    shape: Shape
    effort: Effort
    milliseconds: float
    at_least: float


def _tries(choices: Sequence[Choice]) -> list[Choice]:
    """The fastest few, and last the one that reached most, for when all that are just enough fail."""
    order = sorted(choices, key=lambda each: each.milliseconds)
    fastest, rest = order[: _TRIES - 1], order[_TRIES - 1 :]
    return fastest + ([max(rest, key=lambda each: each.at_least)] if rest else [])


def _choices(
    store: GradientStore,
    sample: NDArray[np.float32],
    shapes: Sequence[Shape],
    truth: Truth,
    recall: float,
    seed: int,
    device: str | None,
) -> tuple[list[Choice], float, CompactIndex | None]:
    """Indexes that reach the recall with these queries; the best recall of any; and the index that answers fastest.

    No more than two are in memory at once.
    """
    choices: list[Choice] = []
    best, fastest, least = 0.0, None, np.inf
    ended: set[IndexKind] = set()
    with progress("indexes", len(shapes), "indexes") as advance:
        for shape in shapes:
            advance(1)
            if shape.kind in ended:
                continue
            built = CompactIndex.build(shape, sample, store.blocks, seed, devices(device))
            search = Candidates(store, built, device=device)
            efforts, reached = _efforts(store, search, shape, truth, recall + _MARGIN * (1 - recall))
            if not efforts and reached >= recall:
                efforts, _ = _efforts(store, search, shape, truth, recall)
            best, choices = max(best, reached), choices + efforts
            if efforts and efforts[0].milliseconds < least:
                fastest, least = built, efforts[0].milliseconds
            elif efforts and efforts[0].milliseconds > _HOPELESS * least:
                ended.add(shape.kind)
            del built, search  # before the next is made
    return choices, best, fastest


def _efforts(
    store: GradientStore, search: Candidates, shape: Shape, truth: Truth, recall: float
) -> tuple[list[Choice], float]:
    """What answers fastest, few lists and many proposals or many lists and few proposals; and the best recall of any.

    After the fastest come two that go further, for when the fastest does not hold with other queries.
    """
    fastest, best, all_probes = None, 0.0, shape.method.probes
    if len(all_probes) > 1:
        glance = _with_all_lists(search, shape, truth)
        if min(glance.proponents, glance.opponents) + _GLANCE < recall:
            return [], glance.at_least
    for probes in all_probes:
        proposals, reached = _fewest_proposals(search, truth, recall, probes)
        best = max(best, reached)
        if proposals is None:
            continue
        if fastest is not None and proposals >= fastest.effort.proposals:
            break  # more lists only take longer
        effort = Effort(probes, proposals)
        choice = Choice(shape, effort, _milliseconds(store, search, truth, effort, truth.k), reached)
        if fastest is not None and choice.milliseconds > fastest.milliseconds:
            break
        fastest = choice
    if fastest is None:
        return [], best
    further, effort = [fastest], fastest.effort
    for _ in range(_FURTHER):
        more = [count for count in _counts(search, truth.k) if count > effort.proposals]
        effort = Effort(min(2 * effort.probes, all_probes[-1]), (more or [effort.proposals])[0])
        taken = _milliseconds(store, search, truth, effort, truth.k)
        proposed = _proposed(search, truth, effort.proposals + 1, effort.probes)
        further.append(Choice(shape, effort, taken, measured_of(truth, proposed, effort.proposals).at_least))
    return further, best


def _with_all_lists(search: Candidates, shape: Shape, truth: Truth) -> Measured:
    """What some of the queries reach with all lists and as many proposals as there may be."""
    glanced = truth.part(0, max(1, len(truth.rows) // _GLANCED))
    most = _counts(search, truth.k)[-1]
    return measured_of(glanced, _proposed(search, glanced, most + 1, shape.method.probes[-1]), most)


def _counts(search: Candidates, k: int) -> list[int]:
    return sorted({min(times * k, search.n_train) for times in _PROPOSALS})


def _shapes(store: GradientStore, kind: IndexKind | None, dim: int | None) -> list[Shape]:
    """What may be made, with few numbers first, and fits the memory."""
    if kind is not None:
        INDEXES.check(kind)
    if dim is not None and not 1 <= dim <= store.dim:
        raise ArgumentError(f"dim is {dim}, but must be from 1 to the numbers in a row, {store.dim}.")
    shapes: list[Shape] = []
    for name, method in INDEXES.items():
        if name == kind or (kind is None and method.tried_unasked(store.n_train, dim)):
            dims = [dim] if dim else method.dims(store.dim, asked=kind is not None)
            lists = method.lists_for(store.n_train)
            shapes += [Shape(name, size, lists) for size in dims]  # type: ignore[arg-type]  # a registered kind
    budget = 2 * available_bytes(torch.device("cpu"))  # half of what is free
    fitting = [shape for shape in shapes if shape.bytes_for(store.n_train) <= budget]
    if not fitting:
        needed = shapes[0].bytes_for(store.n_train)
        # The numbers that fit, as bytes_for counts; a little less, for people like round numbers.
        most = int(shapes[0].dim * budget / needed * 0.9) // 8 * 8
        smaller = f"Use fewer numbers: --dim {most}." if most > 0 else "Use a machine with more memory."
        raise OutOfMemoryError(
            f"An index of {store.n_train:,} rows with {shapes[0].dim} numbers each takes {needed / 2**30:.3g} GiB to "
            f"build, but at most {budget / 2**30:.3g} GiB, half of the free memory, may be used. {smaller}"
        )
    return fitting


def _proposed(search: Candidates, truth: Truth, most: int, probes: int) -> dict[int, NDArray[np.int64]]:
    """By sign, the ids that the index proposes; one more than count, for it may be the query itself."""
    assert search.index is not None
    most = min(most, search.n_train)
    return {sign: search.index.search(sign * truth.rows, most, probes=probes)[1] for sign in (1, -1)}


def _fewest_proposals(search: Candidates, truth: Truth, recall: float, probes: int) -> tuple[int | None, float]:
    counts = _counts(search, truth.k)
    proposed = _proposed(search, truth, counts[-1] + 1, probes)
    reached = 0.0
    for count in counts:
        reached = measured_of(truth, proposed, count).at_least
        if reached >= recall:
            return count, reached
    return None, reached


def _milliseconds(store: GradientStore, search: Candidates, truth: Truth, effort: Effort | None, k: int) -> float:
    """What a query asked alone takes to find its candidates, and to score or read them: the median of some.

    Each is asked twice, for the first time also verifies blocks and brings them to memory.
    """
    seconds, count = [], _TIMED if effort else _TIMED // 8  # comparing all rows takes long, and about as long each time
    for place, row in zip(store.spread_ids(count), truth.rows[:: max(1, len(truth.rows) // count)], strict=False):
        # Whose factors are compared makes no difference in time.
        asked = None if store.manifest.factors is None else store.factors(np.array([place]))
        for _ in range(2):
            started = time.perf_counter()
            if effort is None:
                ids = search.search(row[None], min(candidates_for(k), store.n_train))[1][0]
            else:
                ids = search.propose(row[None], effort.proposals, effort)[1][0]
            if asked is None:
                store.rows(np.sort(ids))
            else:
                of_candidates(store, asked, [np.sort(ids)])
            taken = time.perf_counter() - started
        seconds.append(taken)
    return 1000 * float(np.median(seconds))
