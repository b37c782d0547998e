"""Retrieval at 1.28 million rows, and at 10,000 to 250,000: recall of the answers, time, size, memory.

Truth is exact TracInCP of the tracked parameters. Each store's index is tuned with queries of the test set, and judged
with others. A query's own gradient is not timed. The features that the stores are made of take an hour to compute
(scripts/tasks/augmented.py) and are kept, like the stores, outside the checkout (GRADINDEX_CACHE); the quick form makes
4,000 small ones, and takes three of the parts unless it is told which.

    python scripts/bench/scale.py [--parts augmented pseudo_classes ...] [--quick] [--save FILE]
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from harness import Anonymous, Bench, timed
from numpy.typing import NDArray
from stores import store_of, task_of
from torch.utils.data import Subset

import gradindex
from gradindex import evaluation
from gradindex.evaluation.truth import Truth, lower_bound, truth_from
from gradindex.index.shapes import fitted_directions
from gradindex.projection import Projection
from gradindex.retrieval.candidates import Candidates
from gradindex.store import wide_bytes

K, TUNED, QUICK_TUNED, JUDGED, BATCH = 100, 1000, 40, 500, 100
PARTS = (
    "augmented", "pseudo_classes", "cifar10", "float16", "mnist", "growth", "all_layers", "first_query", "imagenet",
    "imagenet_growth", "pseudo_classes_full",
)  # fmt: skip
QUICK_PARTS = ("augmented", "growth", "all_layers", "first_query", "imagenet")  # the others take the same way
# Rows of ImageNet's shape by which growth is measured; the last is all of it.
SHAPE_ROWS = (10_000, 100_000, None)
# Of the index of ImageNet's shape: fewer numbers than there are classes lose whole classes.
COPIES, DIM = 4, 1000
# Rows of ImageNet's shape for the first query, and how many are asked.
FIRST_ROWS, FIRST_QUERIES = 131_072, 100
# Numbers a checkpoint of the wide rows beside those of all layers, which want gradients in float32: those in bfloat16
# are off by more than wide rows.
WIDE, QUICK_WIDE = 16_384, 4096
# What a row of the store may take, in KiB.
ROOM = {"augmented": 3.5, "float16": 1.8, "imagenet": 27}
# What the index may take, in bytes a row; minutes and gigabytes of anonymous memory that it is made in.
INDEX_BYTES, MAKING = {"augmented": 200, "imagenet": 500}, {"augmented": (5, 1), "imagenet": (25, 2.5)}


def main() -> None:
    """Measure and print."""
    bench = Bench("Retrieval at scale", __doc__, parts={"parts": PARTS})
    parts = bench.options.parts
    if bench.quick and parts == list(PARTS):
        parts = QUICK_PARTS
        print(f"quick: {', '.join(parts)}; others with --parts", flush=True)
    for part in parts:
        if part in OTHERS:
            OTHERS[part](bench)
        else:
            judge(bench, Case(part, bench.quick))
        bench.write()
    bench.finish()


class Case:
    """A store, its task with the queries to tune with, and others to judge with.

    Args:
        name: of the part.
        quick: a small store instead.
    """

    # Recall, milliseconds (median, 99th percentile, each of a batch).
    BARS: dict[str, tuple[float, float | None, float | None, float | None]] = {
        "augmented": (0.99, 3, 10, 1.5),
        "pseudo_classes": (0.99, 2.5, 20, 3),
        "pseudo_classes_full": (0.99, 4, 20, 3),
        "imagenet": (0.99, 4, 12, 2),
        "cifar10": (0.995, 1.5, None, None),
        "float16": (0.99, None, None, None),
        "mnist": (0.995, 1.5, None, None),
    }

    def __init__(self, name: str, quick: bool = False) -> None:
        import augmented

        sizes = augmented.sizes()
        self.name, self.quick = name, quick
        n = {"augmented": sizes.train, "cifar10": sizes.pictures, "float16": sizes.pictures}.get(name)
        source = "augmented" if n else {"imagenet": "imagenet_shape"}.get(name, name)
        if name == "pseudo_classes_full":
            source, n = "pseudo_classes", sizes.train
        task = task_of(source, n)
        # 9 x 5 numbers a checkpoint leave the room for factors in float16.
        small = {"projection": Projection("fitted", 45), "factors": "float16"} if name == "float16" else {}
        self.store = store_of(source, n, **small)
        half = task.n_query // 2
        self.tuning, self.judging = (_with_queries(task, range(start, start + half)) for start in (0, half))
        self.judged = min(24 if quick else JUDGED, half)
        self.recall, *self.limits = self.BARS[name]
        self.promised = self.limits[1] is not None


def tuned(quick: bool) -> int:
    """How many queries an index is tuned with."""
    return QUICK_TUNED if quick else TUNED


def _with_queries(task: gradindex.Task, positions: range) -> gradindex.Task:
    columns = {name: np.asarray(values)[positions] for name, values in task.query_columns.items()}
    return replace(task, query=Subset(task.query, positions), query_columns=columns)


def judge(bench: Bench, case: Case) -> None:
    """Make the index, then measure answers, times and sizes."""
    name, store, n = f"{case.name}, {case.store.n_train:,} rows", case.store, case.store.n_train
    taken, anonymous = made(bench, case)
    if case.name in MAKING:
        minutes, gigabytes = MAKING[case.name]
        bench.bar(f"{name}: index built, tuned and measured in", taken / 60, "minutes", minutes, at_most=True)
        bench.bar(f"{name}: anonymous memory meanwhile", anonymous, "GB", gigabytes, at_most=True)
    else:
        bench.figure(f"{name}: index built, tuned and measured in", taken, "s")
    cold(bench, name, case)
    started = time.perf_counter()
    retriever = gradindex.load(case.judging, store.folder)
    bench.figure(f"{name}: retriever opened, routes and task checked", time.perf_counter() - started, "s")
    print(retriever.search_note, flush=True)
    started = time.perf_counter()
    searched = Candidates(store)
    bench.bar(f"{name}: index opened, its checksum compared", time.perf_counter() - started, "s", 1, at_most=True)
    sizes(bench, name, store)

    chosen = np.random.default_rng(5).choice(case.judging.n_query, case.judged, replace=False).tolist()
    asked = retriever.prepare(chosen)
    truth = truth_from(asked.rows, retriever.exact_pieces(asked), np.full(len(asked), -1), K, "exact", seed=0)
    singles = [retriever.prepare([position]) for position in chosen]
    for sign, kind in ((1, "proponents"), (-1, "opponents")):
        answer = retriever.search(asked, K, kind=kind)
        recalls = answered(truth, asked.rows, answer.ids, sign)
        mean, least = float(recalls.mean()), lower_bound(recalls, K)
        if case.promised:
            bench.figure(f"{name}: recall@{K} of {kind}", mean, "share")
            bench.bar(f"{name}: its lower 95% bound", least, "share", case.recall)
        else:
            bench.bar(f"{name}: recall@{K} of {kind}", mean, "share", case.recall)
            bench.figure(f"{name}: its lower 95% bound", least, "share")
    for kind in ("proponents", "opponents"):
        seconds = []
        for single in singles:
            started = time.perf_counter()
            retriever.search(single, K, kind=kind)
            seconds.append(time.perf_counter() - started)
        limit, worst, _ = case.limits
        milliseconds(bench, f"{name}: a query, {kind}, median", 1000 * float(np.median(seconds)), limit)
        milliseconds(
            bench, f"{name}: a query, {kind}, 99th percentile", 1000 * float(np.quantile(seconds, 0.99)), worst
        )
    batch = retriever.prepare(chosen[:BATCH])
    each = timed(lambda: retriever.search(batch, K), 5) / len(batch)
    milliseconds(bench, f"{name}: each of a batch of {len(batch)}", each, case.limits[2])
    if searched.index is not None:
        index_alone(bench, name, store, searched, asked.rows[:50], n >= 1_000_000)
    if case.name == "imagenet":
        against_all_rows(bench, name, retriever, singles)


def against_all_rows(bench: Bench, name: str, retriever: gradindex.Retriever, singles: list[Any]) -> None:
    """A query with re-scoring against one for which all rows are compared, side by side."""
    plain = gradindex.load(retriever.task, retriever.store.folder, use_index=False)
    ratios = []
    for single in singles[:5]:
        compared = timed(partial(plain.search, single, K), 1)
        ratios.append(compared / timed(partial(retriever.search, single, K), 3))
    bench.bar(f"{name}: all rows compared, against a query", float(np.median(ratios)), "x", 60)


def milliseconds(bench: Bench, name: str, value: float, limit: float | None) -> None:
    """A bar where there is a limit, else a figure."""
    if limit is None:
        bench.figure(name, value, "ms")
    else:
        bench.bar(name, value, "ms", limit, at_most=True)


def cold(bench: Bench, name: str, case: Case) -> None:
    """The first queries after opening, whose blocks are verified; files read from the disk, then from memory.

    Before anything else maps the files: what is mapped stays in memory.
    """
    evict(case.store.folder)
    for where in ("on disk", "in memory"):
        retriever = gradindex.load(case.judging, case.store.folder)
        seconds = []
        for position in range(20):
            asked = retriever.prepare([position])
            started = time.perf_counter()
            retriever.search(asked, K)
            seconds.append(time.perf_counter() - started)
        bench.figure(f"{name}: first query after opening, files {where}", 1000 * seconds[0], "ms")
        bench.figure(f"{name}: next 19 queries, files {where}, median", 1000 * float(np.median(seconds[1:])), "ms")
        del retriever


def evict(folder: Path) -> None:
    """Have the system forget a store's files, as far as nobody maps them."""
    for path in folder.rglob("*.*"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_query(bench: Bench) -> None:
    """The first query of a process, its gradient included, against the median: as it comes, and after warming."""
    n = None if bench.quick else FIRST_ROWS
    store = store_of("imagenet_shape", n)
    if not bench.quick and not (store.folder / "index").exists():
        evaluation.index(store.folder, recall=0.95, k=K, n_query=tuned(bench.quick))
    name = f"ImageNet's shape, {store.n_train:,} rows"
    ratios = []
    for _ in range(1 if bench.quick else 3):
        evict(store.folder)
        ready, meanwhile, asked = bench.in_a_process(first_queries_here, n, True)
        ratios.append(asked[0] / np.median(asked))
    bench.bar(f"{name}: first query after load(warm=True), against the median", float(np.median(ratios)), "x", 2, True)
    bench.figure(f"{name}: first query after load(warm=True)", 1000 * asked[0], "ms")
    bench.figure(f"{name}: the next {len(asked) - 1} queries, median", 1000 * float(np.median(asked)), "ms")
    bench.figure(f"{name}: warm after, files on disk, with a query a second", ready, "s")
    bench.figure(f"{name}: a query meanwhile, median of {len(meanwhile)}", 1000 * float(np.median(meanwhile)), "ms")
    for where in ("on disk", "in memory"):
        if where == "on disk":
            evict(store.folder)
        _, _, asked = bench.in_a_process(first_queries_here, n, False)
        bench.figure(f"{name}: first query without warm, files {where}", 1000 * asked[0], "ms")
        bench.figure(f"{name}: the next {len(asked) - 1}, files {where}, median", 1000 * float(np.median(asked)), "ms")


def first_queries_here(n: int | None, warm: bool) -> tuple[float, list[float], list[float]]:
    """Seconds until all is warm, and of queries: meanwhile, and afterwards one after another, from the first on."""
    task = task_of("imagenet_shape", n)
    retriever = gradindex.load(task, store_of("imagenet_shape", n).folder, warm=warm)
    loaded, meanwhile = time.perf_counter(), []

    def ask(position: int) -> float:
        started = time.perf_counter()
        retriever.search([position], K)
        return time.perf_counter() - started

    while retriever.warmth is not None and not retriever.warmth.over:
        meanwhile.append(ask(len(meanwhile)))
        time.sleep(0.01 if n is None else 1)
    if warm:
        assert retriever.warm(wait=True).ready
    ready = time.perf_counter() - loaded
    rest = range(task.n_query // 2, task.n_query // 2 + FIRST_QUERIES)
    return ready, meanwhile, [ask(position) for position in rest]


def answered(truth: Truth, rows: NDArray[np.float32], ids: NDArray[np.int64], sign: int) -> NDArray[np.float64]:
    """Recall of answers to queries in their own order; truth has left some out, and another order."""
    places = [int(np.flatnonzero((rows == row).all(1))[0]) for row in truth.rows]
    return truth.recalls(sign, ids[places], K)


def made(bench: Bench, case: Case) -> tuple[float, float]:
    """Make the index in a process of its own: seconds, and its peak of anonymous gigabytes."""
    taken, peak_gb = bench.in_a_process(made_here, case.name, case.quick)
    return taken, peak_gb


def made_here(name: str, quick: bool) -> tuple[float, float]:
    """The same in this process."""
    case = Case(name, quick)
    with Anonymous() as memory:
        taken = index_of(case)
    return taken, memory.peak_gb


def index_of(case: Case) -> float:
    """Make the index, and say in how many seconds."""
    started = time.perf_counter()
    retriever = gradindex.load(case.tuning, case.store.folder, use_index=False)
    n_query = tuned(case.quick)
    options = {"copies": COPIES, "dim": DIM} if case.name == "imagenet" and not case.quick else {}
    evaluation.index(case.store.folder, recall=case.recall, k=K, n_query=n_query, retriever=retriever, **options)
    return time.perf_counter() - started


def sizes(bench: Bench, name: str, store: gradindex.GradientStore) -> None:
    """Bytes on disk."""
    index = store.folder / "index"
    of_index = sum(path.stat().st_size for path in index.rglob("*")) if index.exists() else 0
    whole = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
    each = (whole - of_index) / store.n_train
    part, factors = name.partition(",")[0], store.manifest.factors
    what = f"{name}: store with {factors} factors"
    if part in ROOM:
        bench.bar(what, each / 1024, "KiB a row", ROOM[part], at_most=True)
    else:
        bench.figure(what, each / 1024, "KiB a row")
    if part in INDEX_BYTES:
        bench.bar(f"{name}: index", of_index / store.n_train, "bytes a row", INDEX_BYTES[part], at_most=True)
    else:
        bench.figure(f"{name}: index", of_index / store.n_train, "bytes a row")


def index_alone(
    bench: Bench, name: str, store: gradindex.GradientStore, searched: Any, rows: NDArray[np.float32], large: bool
) -> None:
    """The first stage against flat float32 search over as many numbers, and over whole rows."""
    effort, dim = searched.effort(K), searched.index.about["shape"]["dim"]
    found = effort.proposals
    alone = timed_each(lambda row: searched.propose(row, found, effort), rows)
    sample = store.rows(store.spread_ids(20_000))
    directions = fitted_directions(sample, dim)
    flat = faiss.IndexFlatIP(dim)
    for _, block in store.blocks():
        flat.add(np.ascontiguousarray(block @ directions))
    turned = np.ascontiguousarray(rows @ directions)
    of_flat = timed_each(partial(flat.search, k=found), turned)
    del flat
    whole = Candidates(store, use_index=False)
    of_rows = timed_each(lambda row: whole.search(row, found), rows[:10])
    bench.figure(f"{name}: index alone, {found:,} proposals", alone, "ms")
    if large:
        bench.bar(f"{name}: flat float32 search of {dim} numbers, against it", of_flat / alone, "x", 20)
    else:
        bench.figure(f"{name}: flat float32 search of {dim} numbers, against it", of_flat / alone, "x")
    bench.figure(f"{name}: all {store.dim} numbers of the store's rows compared, against it", of_rows / alone, "x")


def growth(bench: Bench, name: str = "augmented") -> None:
    """Time of a query against the number of rows, each store with its own index, and the exponent."""
    counts: Sequence[int | None] = [1000, 4000] if bench.quick else [10_000, 100_000, 1_000_000]
    if name == "imagenet_shape" and not bench.quick:
        counts = SHAPE_ROWS
    medians, rows = [], []
    for n in counts:
        store, task = store_of(name, n), task_of(name, n)
        rows.append(store.n_train)
        half = task.n_query // 2
        tuning = gradindex.load(_with_queries(task, range(half)), store.folder, use_index=False)
        evaluation.index(store.folder, recall=0.99, k=K, n_query=tuned(bench.quick), retriever=tuning)
        retriever = gradindex.load(_with_queries(task, range(half, 2 * half)), store.folder)
        singles = [retriever.prepare([position]) for position in range(20 if bench.quick else 100)]
        medians.append(np.median([timed(partial(retriever.search, asked, K), 1) for asked in singles]))
        bench.figure(f"{rows[-1]:,} rows: a query, median ({retriever.search_note})", float(medians[-1]), "ms")
    exponent = float(np.polyfit(np.log(rows), np.log(medians), 1)[0])
    if name == "imagenet_shape":
        bench.bar(
            "ImageNet's shape: time of a query against the rows, fitted exponent", exponent, "", 0.4, at_most=True
        )
    else:
        bench.figure("time of a query against the number of rows, fitted exponent", exponent, "")


def all_layers(bench: Bench) -> None:
    """No exact factors: index and wide rows against exact products, and what answers from them and the model take."""
    task, store = (
        task_of("all_layers"),
        store_of("all_layers", precision="float32", wide=QUICK_WIDE if bench.quick else WIDE),
    )
    name = f"all layers of ResNet-9, {store.n_train:,} rows"
    evaluation.index(store.folder, recall=0.99, k=K, n_query=QUICK_TUNED if bench.quick else JUDGED)
    retriever = gradindex.load(task, store.folder)
    print(retriever.search_note, flush=True)
    asked = retriever.prepare(range(20 if bench.quick else 200))
    for kind in ("proponents", "opponents"):
        found = retriever.search(asked, K, kind=kind, rerank="rows").ids
        true = gradindex.load(task, store.folder, use_index=False).search(asked, K, kind=kind, rerank="rows").ids
        recalls = np.array([np.isin(a, b).mean() for a, b in zip(found, true, strict=True)])
        bench.bar(f"{name}: recall@{K} of {kind} against all rows", float(recalls.mean()), "share", 0.99)
    items, n_query = [task.query[i] for i in range(20)], 20  # type: ignore[index]  # the task has queries
    sample = np.sort(np.random.default_rng(0).choice(store.ids, store.n_train // 5, replace=False))
    started = time.perf_counter()
    exact = gradindex.exact_scores(task, items, sample)
    taken = time.perf_counter() - started
    bench.figure(f"{name}: exact products, each of {n_query} queries with each row", 1e6 * taken / exact.size, "us")
    estimates = retriever.prepare(range(n_query)).rows @ store.rows(sample).T
    for sign, kind in ((1, "proponents"), (-1, "opponents")):
        best = np.argsort(-sign * estimates, axis=1)
        for found in (20, 60, 200):  # of a fifth of the rows: as the top-100 of all among the best 100, 300, 1,000
            share = evaluation.recall_at_k(sign * exact, best[:, :found], 20).mean()
            what = f"true top-20 of {len(sample):,} rows among the best {found} by rows"
            bench.figure(f"{name}: {what}, {kind}", float(share), "share")
    by_wide_rows(bench, name, retriever, sample, exact)
    single = retriever.prepare([0])
    for k, candidates in ((K, K), (K, 3 * K), (10, K)):
        search = partial(retriever.search, single, k, candidates=min(candidates, store.n_train))
        scored = search().stages[-1].rows
        what = f"the exact top-{k} of {candidates} candidates, {scored} of them through the model"
        bench.figure(f"{name}: {what}", timed(search, 1) / 1000, "s")


def by_wide_rows(
    bench: Bench, name: str, retriever: gradindex.Retriever, sample: NDArray[np.int64], exact: NDArray[Any]
) -> None:
    """Answers from wide rows alone: recall within a sample whose exact scores are known, and time among all rows."""
    n_query, store = len(exact), retriever.store
    asked = retriever.prepare(range(n_query))
    bench.figure(f"{name}: wide rows", wide_bytes(store.manifest, 1) / 1024, "KiB a row")
    for sign, kind in ((1, "proponents"), (-1, "opponents")):
        # Of a fifth of the rows: as the top-100 and the top-500 of all.
        for k in sorted({min(k, len(sample) // 2) for k in (K // 5, K)}):
            hits = retriever.search(asked, k, kind=kind, rerank="wide", ids=sample)
            share = evaluation.recall_at_k(sign * exact, np.searchsorted(sample, hits.ids), k).mean()
            what = f"recall@{k} of {kind} by wide rows, {n_query} queries, {len(sample):,} rows"
            bench.bar(f"{name}: {what}", float(share), "share", 0.98)
    scanning = gradindex.load(retriever.task, store.folder, use_index=False)
    for kind in ("proponents", "opponents"):
        found, all_rows = (each.search(asked, K, kind=kind, rerank="wide").ids for each in (retriever, scanning))
        share = np.mean([np.isin(a, b).mean() for a, b in zip(found, all_rows, strict=True)])
        bench.bar(
            f"{name}: {kind} by index and wide rows, of those by a scan and wide rows", float(share), "share", 0.99
        )
    singles = [retriever.prepare([position]) for position in range(n_query)]
    search = partial(retriever.search, k=K, rerank="wide")
    first, again = (np.median([timed(partial(search, single), 1) for single in singles]) / 1000 for _ in range(2))
    bench.figure(f"{name}: a query by wide rows, blocks met for the first time verified, median", float(first), "s")
    bench.bar(f"{name}: a query by wide rows, median", float(again), "s", 1.5, at_most=True)
    each = timed(partial(search, asked), 3) / n_query
    bench.bar(f"{name}: each of {n_query} at once by wide rows", each, "ms", 300, at_most=True)


OTHERS: dict[str, Callable[[Bench], None]] = {
    "imagenet_growth": partial(growth, name="imagenet_shape"),
    "growth": growth,
    "all_layers": all_layers,
    "first_query": first_query,
}


def timed_each(action: Callable[[NDArray[np.float32]], Any], rows: NDArray[np.float32]) -> float:
    """Median milliseconds of one row after another."""
    return float(np.median([timed(lambda row=row: action(row[None]), 1) for row in rows]))


if __name__ == "__main__":
    main()
