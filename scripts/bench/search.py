"""Inner-product search on gradient rows: recall against time of our index and of stock FAISS indexes.

Every index holds the same vectors: the store's rows turned to their fitted directions. Queries are training examples,
half of them with a flipped label, each without itself; a true hit is one of the 100 largest (for opponents: smallest)
exact TracInCP scores. Recall is the share of these among the best 500, which exact scores then settle. One query at a
time. Indexes are kept in GRADINDEX_CACHE/search, for a graph of 1.28 million rows takes a quarter of an hour. The quick
form makes small tasks of its own, at most 5,000 rows.

    python scripts/bench/search.py [--sets mnist cifar10 pseudo_classes augmented] [--quick] [--json] [--save FILE]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from harness import Bench
from numpy.typing import NDArray
from reference import cache_folder
from stores import store_of

import gradindex
from gradindex.evaluation.truth import Truth, truth_from
from gradindex.index import CompactIndex, Shape
from gradindex.index.shapes import fitted_directions
from gradindex.retrieval.scoring import by_factors

K, FOUND, QUERIES, SAMPLE = 100, 500, 200, 50_000
# Task and its rows, how many directions and lists.
SETS: dict[str, tuple[str, int | None, int, int]] = {
    "mnist": ("mnist", None, 128, 128),
    "cifar10": ("augmented", 50_000, 64, 256),
    "pseudo_classes": ("pseudo_classes", None, 1024, 1024),
    "augmented": ("augmented", 1_281_167, 64, 1024),
}
TITLES = {
    "mnist": "MNIST, all layers",
    "cifar10": "CIFAR-10, last layer",
    "pseudo_classes": "1,000 clusters, last layer",
    "augmented": "CIFAR-10 augmented, last layer",
}
Search = Callable[[NDArray[np.float32], int], NDArray[np.int64]]


def main() -> None:
    """Measure, print, draw."""
    bench = Bench("Search on gradient rows", __doc__, ["matplotlib"], parts={"sets": list(SETS)})
    curves = dict(measure_set(bench, name) for name in bench.options.sets)
    if bench.options.save:
        draw(curves, bench.options.save.with_suffix(".png"))
    bench.finish()


def measure_set(bench: Bench, name: str) -> tuple[str, list[dict[str, Any]]]:
    """A title; for each index and effort recall of both kinds, of clean and of flipped queries, and time."""
    import augmented

    source, n_train, dim, lists = SETS[name]
    if bench.quick:
        dim, lists = min(dim, 64), lists // 8
        n_train = augmented.sizes().pictures if name == "cifar10" else None
    store = store_of(source, n_train)
    title = f"{TITLES[name]}, {store.n_train:,} rows"
    truth, flipped = queries_of(store, 24 if bench.quick else QUERIES)
    sample = store.rows(np.sort(np.random.default_rng(0).choice(store.ids, min(SAMPLE, store.n_train), replace=False)))
    norms = np.sqrt(store.self_influence().sum(1))
    spread = np.quantile(norms, [0.9, 0.99]) / np.median(norms)
    bench.figure(f"{title}: norm of a gradient, 90th percentile against the median", spread[0], "x")
    bench.figure(f"{title}: norm of a gradient, 99th percentile against the median", spread[1], "x")
    directions = fitted_directions(sample, dim)
    asked = np.ascontiguousarray(truth.rows @ directions)
    points = []
    folder = cache_folder() / "search" / f"{name}-{store.n_train}"
    folder.mkdir(parents=True, exist_ok=True)
    for label, effort, search, rows in searches(store, sample, directions, lists, folder):
        taken, found = [], {}
        for sign in (1, -1):
            parts = []
            for row, turned in zip(truth.rows, asked, strict=True):
                query = row if rows else turned
                started = time.perf_counter()
                parts.append(search(sign * query[None], FOUND + 1))
                taken.append(time.perf_counter() - started)
            found[sign] = np.concatenate(parts)
        recalls = {sign: truth.recalls(sign, found[sign], FOUND) for sign in (1, -1)}
        point = {
            "index": label, "effort": effort, "milliseconds": 1000 * float(np.median(taken)),
            **{f"{kind}, {which}": float(recalls[sign][mask].mean())
               for sign, kind in ((1, "proponents"), (-1, "opponents"))
               for which, mask in (("clean", ~flipped), ("flipped", flipped))},
        }  # fmt: skip
        points.append(point)
        bench.row(title, point)
    return title, points


def queries_of(store: gradindex.GradientStore, count: int) -> tuple[Truth, NDArray[np.bool_]]:
    """What is true of training examples as queries, and which of them are flipped: half."""
    flipped = store.column("flipped")
    generator, halves = np.random.default_rng(1), []
    for which in (False, True):
        halves.append(generator.choice(store.ids[flipped == which], count // 2, replace=False))
    ids = np.sort(np.concatenate(halves))
    truth = truth_from(
        store.rows(ids), by_factors(store, store.factors(ids), len(ids), store.ids), ids, K, "exact scores", seed=0
    )
    return truth, store.column("flipped", truth.own)


def searches(
    store: gradindex.GradientStore,
    sample: NDArray[np.float32],
    directions: NDArray[np.float32],
    lists: int,
    folder: Path,
) -> Iterator[tuple[str, int, Search, bool]]:
    """Name, effort, search, and whether it takes whole rows, for every index and effort."""
    dim = directions.shape[1]
    turned_sample = np.ascontiguousarray(sample @ directions)

    ours = CompactIndex.build(Shape("ivf", dim, lists), sample, store.blocks)
    for probes in efforts(lists):
        yield "norm-aware IVF, SQ8 (ours)", probes, _ours(ours, probes), True
    ours = CompactIndex.build(Shape("flat", dim), sample, store.blocks)
    yield "flat, SQ8 (ours)", 1, _ours(ours, 1), True
    ours = CompactIndex.build(Shape("pq", dim), sample, store.blocks)
    yield "flat, two bits a number (ours)", 1, _ours(ours, 1), True
    for factory, setting, values in (
        ("Flat", None, [1]),
        (f"IVF{lists},Flat", "nprobe", efforts(lists)),
        (f"IVF{lists},SQ8", "nprobe", efforts(lists)),
        ("HNSW32", "efSearch", [512, 1024, 2048, 4096]),
        (f"PQ{dim // 4}np", None, [1]),
        ("RaBitQ", None, [1]),
        (f"IVF{lists},RaBitQ", "nprobe", efforts(lists)),
    ):
        index = stock(factory, dim, turned_sample, store, directions, folder)
        for value in values:
            if setting == "nprobe":
                index.nprobe = value
            elif setting == "efSearch":
                faiss.downcast_index(index).hnsw.efSearch = value
            yield factory, value, _stock(index), False


def efforts(lists: int) -> list[int]:
    """Lists that are looked into: powers of two, up to half."""
    return [1 << i for i in range(1, lists.bit_length() - 1)]


def _ours(index: CompactIndex, probes: int) -> Search:
    return lambda query, k: index.search(query, k, probes=probes)[1]


def _stock(index: Any) -> Search:
    return lambda query, k: index.search(query, k)[1]


def stock(
    factory: str,
    dim: int,
    sample: NDArray[np.float32],
    store: gradindex.GradientStore,
    directions: NDArray[np.float32],
    folder: Path,
) -> Any:
    """A stock index of all rows, turned; ids are positions, which here are the store's ids."""
    path = folder / f"{factory.replace(',', '-')}-{dim}.faiss"
    if not path.exists():
        started = time.perf_counter()
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        assert index.metric_type == faiss.METRIC_INNER_PRODUCT
        index.train(sample)
        for _, rows in store.blocks():
            index.add(np.ascontiguousarray(rows @ directions))
        faiss.write_index(index, str(path))
        print(f"{factory}: built in {time.perf_counter() - started:.0f} s", flush=True)
    return faiss.read_index(str(path))


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Recall against time: a row of panels for proponents, one for opponents; clean and flipped queries together."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(curves), figsize=(4.6 * len(curves), 7.6), squeeze=False, sharey=True)
    for column, (title, points) in enumerate(curves.items()):
        labels = list(dict.fromkeys(_generic(point["index"]) for point in points))
        for row, kind in enumerate(("proponents", "opponents")):
            axis = axes[row, column]
            for number, label in enumerate(labels):
                mine = [point for point in points if _generic(point["index"]) == label]
                ours = "ours" in label
                axis.plot(
                    [point["milliseconds"] for point in mine],
                    [(point[f"{kind}, clean"] + point[f"{kind}, flipped"]) / 2 for point in mine],
                    marker="o" if len(mine) > 1 else "D", markersize=4 if len(mine) > 1 else 7,
                    linewidth=2.5 if ours else 1, color=f"C{number}", zorder=3 if ours else 2, label=label,
                )  # fmt: skip
            axis.set_xscale("log")
            axis.set_ylim(0, 1.03)
            axis.axhline(0.99, color="0.6", linewidth=0.8, linestyle=":")
            axis.grid(True, alpha=0.3)
            axis.set_title(f"{title}\n{kind}" if row == 0 else kind, fontsize=9)
            axis.set_xlabel("milliseconds a query")
        axes[0, column].tick_params(labelbottom=True)
    for row in (0, 1):
        axes[row, 0].set_ylabel(f"true top-{K} among the best {FOUND}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = min(5, 2 * len(curves))
    figure.legend(handles, labels, loc="lower center", ncols=columns, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.03 * -(-len(labels) // columns), 1, 1))
    figure.savefig(path, dpi=110)


def _generic(label: str) -> str:
    """Without the numbers that differ between sets."""
    kind, _, rest = label.partition(",")
    kind = "IVF" if kind.startswith("IVF") else "PQ" if kind.startswith("PQ") else kind
    return f"{kind},{rest}" if rest else kind


if __name__ == "__main__":
    main()
