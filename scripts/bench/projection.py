"""MNIST task: which projection keeps the true top-100 (exact TracInCP over all 235,146 parameters), at which size.

python scripts/bench/projection.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace

import numpy as np
from harness import Bench
from torch.utils.data import Subset

import gradindex
from gradindex.evaluation import recall_at_k
from gradindex.projection import Projection

# Kind, numbers per checkpoint (of five), and the bars for the true top-100 among the best 500 and 1,000.
CASES = (
    ("fitted", 672, 0.99, 0.999),
    ("tensorsketch", 1024, 0.99, 0.999),
    ("fitted", 192, None, None),
    ("tensorsketch", 128, None, None),
    ("kronecker", 1024, None, None),
    ("kronecker", 128, None, None),
)


def main() -> None:
    """Measure and print."""
    bench = Bench("MNIST task: projections", __doc__)
    import mnist

    task = mnist.task()
    queries = range(10 if bench.quick else task.n_query)
    items = [task.query[i] for i in queries]
    task = replace(task, query=Subset(task.query, queries), query_columns={})
    if bench.quick:
        task = replace(task, train=Subset(task.train, range(400)), columns={}, checkpoints=task.checkpoints[-2:])
    truth = gradindex.exact_scores(task, items)
    pairs = np.random.default_rng(0).permutation(truth.size)[:100_000]
    for kind, dim, among_500, among_1000 in CASES[:2] if bench.quick else CASES:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            store = gradindex.build(task, folder, projection=Projection(kind, dim))
            taken = time.perf_counter() - started
            hits = gradindex.load(task, folder).proponents(queries, k=task.n_train, rerank="rows")
            estimates = np.empty_like(truth)
            np.put_along_axis(estimates, hits.ids, hits.scores, 1)
            name = f"{kind}, {store.dim:,} numbers a row"
            print(f"{name}: built in {taken:.0f} s")
        bench.figure(f"{name}: Pearson", np.corrcoef(truth.ravel()[pairs], estimates.ravel()[pairs])[0, 1], "")
        bench.figure(f"{name}: recall@100", recall_at_k(truth, hits.ids[:, :100], 100).mean(), "share")
        for k, target in ((500, among_500), (1000, among_1000)):
            value = recall_at_k(truth, hits.ids[:, :k], 100).mean()
            label = f"{name}: true top-100 among the best {k:,}"
            bench.figure(label, value, "share") if target is None else bench.bar(label, value, "share", target)
    bench.finish()


if __name__ == "__main__":
    main()
