"""MNIST task: how many of the true top-100 the index proposes, and how many flipped labels are found.

python scripts/bench/mnist.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import tempfile
from dataclasses import replace

import numpy as np
from harness import Bench
from stores import part_of
from torch.utils.data import Subset

import gradindex
from gradindex.evaluation import recall_at_k, share_found


def main() -> None:
    """Measure and print."""
    bench = Bench("MNIST task: recall and flipped labels", __doc__)
    import mnist

    task = mnist.task()
    if bench.quick:
        task = replace(part_of(task, range(2500)), query=Subset(task.query, range(20)), query_columns={})
    queries = range(task.n_query)
    with tempfile.TemporaryDirectory() as folder:
        store = gradindex.build(task, folder)
        retriever = gradindex.load(task, folder)
        truth = gradindex.exact_scores(task, [task.query[i] for i in queries])
        self_influence, flipped = store.self_influence().sum(1), store.column("flipped")
        by_norm = np.tile(np.argsort(-self_influence)[:1000], (len(queries), 1))
        for kind, signed in (("proponents", truth), ("opponents", -truth)):
            ask = getattr(retriever, kind)
            proposed = ask(queries, k=1000, rerank="rows").ids
            settled = ask(queries, k=100, candidates=1000)
            exact = np.take_along_axis(truth, settled.ids, 1)
            name = f"{kind}: true top-100 among the best 1,000"
            bench.bar(f"{name} of the index", recall_at_k(signed, proposed, 100).mean(), "share", 0.97)
            bench.figure(f"{name} by row norm alone", recall_at_k(signed, by_norm, 100).mean(), "share")
            bench.bar(
                f"{kind}: recall@100 after exact re-scoring",
                recall_at_k(signed, settled.ids, 100).mean(),
                "share",
                0.97,
            )
            error = np.abs(settled.scores - exact).max() / np.abs(truth).max()
            bench.bar(f"{kind}: largest error of a score, of the largest score", error, "share", 1e-5, at_most=True)
    for share, target in ((0.1, 0.85), (0.2, 0.99)):
        found = share_found(self_influence, flipped, [share])[0]
        bench.bar(f"flipped labels found at {share:.0%} inspected", found, "share", target)
    bench.finish()


if __name__ == "__main__":
    main()
