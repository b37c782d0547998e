"""MNIST task: how many of the true top-100 the index proposes, and flipped labels found.

python scripts/bench/mnist.py [--quick] [--json] [--data DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tasks"))


def recall(found: np.ndarray[Any, Any], truth: np.ndarray[Any, Any], k: int) -> float:
    """Share of the k best that were found; a hit is a row whose true score is at least the k-th."""
    kth = np.partition(truth, -k, axis=1)[:, -k]
    hits = (np.take_along_axis(truth, found, 1) >= kth[:, None]).sum(1)
    return float(np.minimum(hits, k).mean() / k)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder with mnist.tar.xz")
    parser.add_argument("--quick", action="store_true", help="50 queries instead of 500")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.data:
        os.environ["GRADINDEX_DATA"] = options.data
    import mnist

    import gradindex

    task = mnist.task()
    if options.quick:
        labels = task.query_columns["label"][:50]
        task = replace(task, query=Subset(task.query, range(50)), query_columns={"label": labels})  # type: ignore[arg-type]
    bars: list[dict[str, Any]] = []

    def bar(name: str, value: float, target: float) -> None:
        bars.append({"name": name, "value": value, "unit": "share", "target": target, "holds": value >= target})

    with tempfile.TemporaryDirectory() as folder:
        store = gradindex.build(task, folder)
        retriever = gradindex.load(folder, task)
        queries = range(task.n_query)
        truth = gradindex.exact_scores(task, [task.query[i] for i in queries])  # type: ignore[index]
        norms = store.self_influence().sum(1)
        by_norm = np.tile(np.argsort(-norms)[:1000], (task.n_query, 1))
        for kind, sign in (("proponents", 1), ("opponents", -1)):
            ask = getattr(retriever, kind)
            among = ask(queries, k=1000, rerank="none")
            bar(f"{kind}: true top-100 among the index's best 1,000", recall(among.ids, sign * truth, 100), 0.97)
            print(f"{kind}: true top-100 among the best 1,000 by norm alone: {recall(by_norm, sign * truth, 100):.4f}")
            exact = ask(queries, k=100, candidates=1000)
            bar(f"{kind}: recall@100 after exact re-scoring", recall(exact.ids, sign * truth, 100), 0.97)
            error = np.abs(exact.scores - np.take_along_axis(truth, exact.ids, 1)).max() / np.abs(truth).max()
            print(f"{kind}: largest difference from the exact scores, relative to the largest score: {error:.1e}")
        flipped = np.asarray(task.columns["flipped"])[np.argsort(-norms)]
    for share, target in ((0.1, 0.85), (0.2, 0.99)):
        found = float(flipped[: int(share * len(flipped))].sum() / flipped.sum())
        bar(f"flipped labels found at {share:.0%} inspected", found, target)
    for item in bars:
        print(f"{item['name']}: {item['value']:.4f} (target {item['target']}) {'holds' if item['holds'] else 'MISSED'}")
    if options.json:
        print(json.dumps({"bars": bars}))


if __name__ == "__main__":
    main()
