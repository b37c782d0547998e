"""An index whose recall is a promise: the cheapest that keeps it, found with some queries and measured with others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..choices import IndexKind, QueryGeometry
from ..errors import ArgumentError, OutOfMemoryError, RecallError, check_k
from ..index import INDEXES, CompactIndex, Shape
from ..memory import available_bytes
from ..retrieval.candidates import Candidates, Effort, index_folders
from ..retrieval.leading import leads
from ..retrieval.retriever import Retriever
from ..store import GradientStore, changing, runs
from . import efforts
from .efforts import Choice
from .measuring import Measured, measure
from .trials import Maker, Trials
from .truth import Truth, asked_geometry, truth_of, whitening_of

# Rows that directions, lists and codes are fitted to.
_SAMPLE_BYTES, _SAMPLE_ROWS = 256 << 20, 32_768
# With fewer rows than this, all of them are compared unasked: that takes a millisecond and is exact.
_SMALL = 2_000
# How many are measured with the other half of the queries, fastest first; more tries make each less sure.
_TRIES = 6


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
    copies: int | None = None,
    budget: float | None = None,
    device: str | None = None,
    geometry: QueryGeometry | None = None,
    damping: float | None = None,
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
        kind: ``"flat"``, ``"ivf"``, ``"pq"`` or ``"spill"``, see :class:`Shape`; by default the fastest of ``"flat"``
            (from 100,000 rows on ``"ivf"`` and ``"spill"``) and, up to 500,000 rows, ``"pq"``.
        dim: numbers of a row in the index, by default those that answer fastest.
        copies: lists that a row stands in, for ``"spill"``; by default those that answer fastest.
        budget: seconds after which no further index is begun; by default what may be faster is tried.
        device: where to make and to measure it, such as ``"cuda"``; by default the CPU.
        geometry: of the queries that it is for; by default the retriever's, or ``"tracin"``. What holds for one does
            not hold for another. Where the store's index reaches the recall with whitened queries too, it serves both;
            else they get one of their own beside it, whose directions are chosen for them.
        damping: of a whitened geometry, see :func:`gradindex.load`.

    Returns:
        The search, with the index or, where there is no faster one, without.

    Raises:
        ArgumentError: an option is out of range, the budget is over before an index is begun, or there are fewer than
            20 queries.
        OutOfMemoryError: making the index would take more memory than is free; says how much, and what fits.
        RecallError: no index reaches the recall; says how close one came. What was there stays.
        StoreError: the store is damaged, or the index cannot be written.
    """
    if not 0 < recall < 1:
        raise ArgumentError(f"recall is {recall}, but must be between 0 and 1.")
    if budget is not None and not budget > 0:
        raise ArgumentError(f"budget is {budget}, but must be a positive number of seconds.")
    if copies is not None and copies < 1:
        raise ArgumentError(f"copies is {copies}, but must be at least 1.")
    try:
        torch.device(device or "cpu")
    except RuntimeError:
        raise ArgumentError(f"device is {device!r}, but must be a device that PyTorch knows, such as cuda.") from None
    _check_tunable(geometry if retriever is None else retriever.geometry)
    geometry = asked_geometry(geometry, damping, retriever)
    started = time.monotonic()
    with changing(folder) as store:
        check_k(k, store.n_train)
        whitening = whitening_of(store, geometry, damping, retriever)
        home = index_folders(store.folder, geometry)[0]
        by = None if whitening is None else whitening.damping
        searched = partial(Candidates, device=device, geometry=geometry, damping=by)
        if store.n_train < _SMALL and kind is None and dim is None:
            CompactIndex.remove(home)  # of another time
            return searched(store)
        shapes = _shapes(store, kind, dim, copies, few_parts=leads(store))
        truth = truth_of(store, retriever, n_query, k, seed, whitening)
        all_rows = efforts.milliseconds(store, searched(store, use_index=False), truth, None, k)
        _refuse_over(budget, time.monotonic() - started)
        if geometry != "tracin" and kind is None and dim is None and copies is None:
            shared = _shared(store, searched, truth, recall, all_rows, geometry, by)
            if shared is not None:
                CompactIndex.remove(home)
                return shared
        until = np.inf if budget is None else started + budget
        maker = Maker(store, _sample(store, seed), seed, device, geometry, whitening)
        trials = Trials(maker, truth.part(0), recall, until)
        trials.run(shapes, other_copies=copies is None)
        quicker = [each for each in trials.choices if each.milliseconds < all_rows]
        if trials.choices and not quicker:
            CompactIndex.remove(home)  # of another time, or damaged
            return searched(store)
        reached, tries, built = [], _tries(quicker), trials.built
        for choice in tries:
            if built is None or built.shape != choice.shape:
                built = maker.build(choice.shape)
            measured = measure(maker.searched(built), truth.part(1), efforts=choice.efforts, tries=len(tries))
            if measured.at_least >= recall:
                tuned = _tuned(choice, trials.choices, measured, truth, recall, all_rows)
                if geometry != "tracin":
                    tuned = {**tuned, "geometries": {geometry: {**tuned, "damping": by}}}
                built.save(home, _of_rows(store) | tuned)
                return searched(store)
            reached.append(measured.at_least)
        if not trials.tried:
            raise RecallError(
                f"No index of {store.folder} can reach recall {recall:.4g} of the true top-{k} {truth.against}: all "
                f"rows compared by {trials.widest} numbers each reach about {trials.best:.4f}. Lower the recall, give "
                "more numbers, or keep scanning all rows."
            )
        over = f" The budget of {budget:g} s ended before all were tried." if time.monotonic() > until else ""
        raise RecallError(
            f"No index of {store.folder} reaches recall {recall:.4g} of the true top-{k} {truth.against}: the best "
            f"reaches at least {max(reached or [trials.best]):.4f}.{over} Lower the recall, give more queries, or keep "
            "scanning all rows."
        )


def _refuse_over(budget: float | None, taken: float) -> None:
    if budget is not None and taken >= budget:
        raise ArgumentError(
            f"budget is {budget:g} s, but to find the true top-k of the queries took {taken:.0f} s, and no index is "
            f"begun yet. Give more seconds, {3 * taken:.0f} at least, or fewer queries."
        )


def _shared(
    store: GradientStore, searched: Callable[..., Candidates], truth: Truth, recall: float, all_rows: float,
    geometry: QueryGeometry, damping: float | None,
) -> Candidates | None:  # fmt: skip
    """The search with the index of plain queries, tuned with these as well, where it reaches the recall and is fast."""
    plain = Candidates(store)
    if plain.index is None or plain.newer or runs.count(runs.without(plain.index.about["ids"], store.id_runs)):
        return None
    index = plain.index
    found, _ = efforts.choices(store, searched(store, index), index.shape, truth.part(0), recall)
    quicker = [each for each in found if each.milliseconds < all_rows]
    for choice in (tries := _tries(quicker)):
        measured = measure(searched(store, index), truth.part(1), efforts=choice.efforts, tries=len(tries))
        if measured.at_least >= recall:
            tunings = dict(index.about.get("geometries", {"tracin": _only_tuned(index.about)}))
            tunings[geometry] = _tuned(choice, found, measured, truth, recall, all_rows) | {"damping": damping}
            index.save(plain.folder, {**index.about, "geometries": tunings})
            return searched(store)
    return None


def drop(folder: str | os.PathLike[str], geometry: QueryGeometry = "tracin") -> Candidates:
    """Take away a store's index: all rows are compared from then on.

    Args:
        folder: of the store.
        geometry: of queries that have an index of their own; what is shared goes with that of ``"tracin"``.

    Raises:
        ArgumentError: queries of this geometry have no index of their own.
        StoreError: there is no store, or another process changes it.
    """
    _check_tunable(geometry)
    with changing(folder) as store:
        CompactIndex.remove(index_folders(store.folder, geometry)[0])
        return Candidates(store, geometry=geometry)


def _check_tunable(geometry: QueryGeometry | None) -> None:
    if geometry == "whitened-exact":
        raise ArgumentError(
            "An index serves exact whitened scores by what whitened rows propose. Ask with geometry='whitened'."
        )


def _of_rows(store: GradientStore) -> dict[str, Any]:
    """Of which rows an index is, as its manifest says."""
    return {"map": store.manifest.fingerprint, "ids": store.id_runs.tolist(), "covers": store.origins}


def _tuned(
    chosen: Choice, choices: Sequence[Choice], measured: Measured, truth: Truth, recall: float, all_rows: float
) -> dict[str, Any]:
    """What a manifest says of how far a search goes, and what was measured."""
    against = {"target": recall, "k": truth.k, "against": truth.against, "queries": len(truth.part(1).rows)}
    return {
        # Of versions that know one effort for both kinds.
        "effort": {
            name: max(getattr(effort, name) for effort in chosen.efforts.values()) for name in ("probes", "proposals")
        },
        "efforts": {kind: _told(effort) for kind, effort in chosen.efforts.items()},
        "recall": against | asdict(measured),
        "milliseconds": {"index": chosen.milliseconds, "all_rows": all_rows},
        "curve": [asdict(choice) for choice in choices],
    }


def _only_tuned(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: about[name] for name in ("effort", "efforts", "recall", "milliseconds", "curve") if name in about}


def _told(effort: Effort) -> dict[str, int]:
    return {name: value for name, value in asdict(effort).items() if value is not None}


def _sample(store: GradientStore, seed: int) -> NDArray[np.float32]:
    count = min(store.n_train, _SAMPLE_ROWS, max(1000, _SAMPLE_BYTES // (4 * store.dim)))
    return store.rows(np.sort(np.random.default_rng(seed).choice(store.ids, count, replace=False)))


def _tries(choices: Sequence[Choice]) -> list[Choice]:
    """The fastest few, and last the one that reached most, for when all that are just enough fail."""
    order = sorted(choices, key=lambda each: each.milliseconds)
    fastest, rest = order[: _TRIES - 1], order[_TRIES - 1 :]
    return fastest + ([max(rest, key=lambda each: each.at_least)] if rest else [])


def _shapes(
    store: GradientStore, kind: IndexKind | None, dim: int | None, copies: int | None = None, few_parts: bool = False
) -> list[Shape]:
    """What may be made and fits the memory, the likeliest kind first, with few numbers first.

    ``few_parts``: rows have a few large parts, as where gradients have a few large entries.
    """
    if kind is not None:
        INDEXES.check(kind)
    if dim is not None and not 1 <= dim <= store.dim:
        raise ArgumentError(f"dim is {dim}, but must be from 1 to the numbers in a row, {store.dim}.")
    shapes: list[Shape] = []
    kinds = list(INDEXES.items())
    if few_parts:
        kinds.sort(key=lambda each: len(each[1].copies_tried) == 1)
    for name, method in kinds:
        several = copies is None or len(method.copies_tried) > 1
        if name == kind or (kind is None and several and method.tried_unasked(store.n_train, dim)):
            dims = [dim] if dim else method.dims(store.dim, asked=kind is not None)
            lists = method.lists_for(store.n_train)
            in_lists = copies or method.copies_tried[0]
            shapes += [Shape(name, size, lists, in_lists) for size in dims]  # type: ignore[arg-type]  # a registered kind
    free = 2 * available_bytes(torch.device("cpu"))  # half of what is free
    fitting = [shape for shape in shapes if shape.bytes_for(store.n_train) <= free]
    if not fitting:
        needed = shapes[0].bytes_for(store.n_train)
        # The numbers that fit, as bytes_for counts; a little less, for people like round numbers.
        most = int(shapes[0].dim * free / needed * 0.9) // 8 * 8
        fewer = [f"fewer numbers: --dim {most}"] if most > 0 else []
        fewer += [f"fewer copies: --copies {shapes[0].copies - 1}"] if shapes[0].copies > 1 else []
        smaller = f"Use {' or '.join(fewer)}." if fewer else "Use a machine with more memory."
        raise OutOfMemoryError(
            f"An index of {store.n_train:,} rows with {shapes[0].dim} numbers each takes {needed / 2**30:.3g} GiB to "
            f"build, but at most {free / 2**30:.3g} GiB, half of the free memory, may be used. {smaller}"
        )
    return fitting
