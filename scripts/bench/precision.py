"""What bfloat16 costs in accuracy: rows in bfloat16 and float32 of the same map, against exact float32 scores.

Rows of all layers of the MNIST task, of the last layer of the CIFAR-10 task, and of all its layers; of the second and
third a part of the training set alone, for time. Queries are in float32 either way, as they are in use. Trains the
CIFAR-10 task first if it is not in the cache (half an hour); the quick form has small tasks of its own.

    python scripts/bench/precision.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import tempfile
from dataclasses import replace

import numpy as np
from harness import Bench
from torch.utils.data import Subset

import gradindex
from gradindex.evaluation import recall_at_k
from gradindex.projection import Projection


def part_of(task: gradindex.Task, n: int, queries: int) -> gradindex.Task:
    """The first examples and queries of a task."""
    return replace(
        task,
        train=Subset(task.train, range(n)),
        query=Subset(task.query, range(queries)),
        columns={},
        query_columns={},
    )


def compare(bench: Bench, name: str, task: gradindex.Task, projection: Projection) -> None:
    """Pearson and recall of both precisions."""
    name = f"{name} ({task.n_train:,} examples, {task.n_query} queries)"
    batch_size = 50 if bench.quick else None  # measuring how large it may be takes longer than the quick form's rows
    truth = gradindex.exact_scores(task, [task.query[i] for i in range(task.n_query)])
    estimates, rows = {}, {}
    for precision in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            store = gradindex.build(task, folder, projection=projection, precision=precision, batch_size=batch_size)
            rows[precision] = store.rows(np.arange(min(task.n_train, 2000)))
            hits = gradindex.load(task, folder).proponents(range(task.n_query), k=task.n_train, rerank="rows")
            estimates[precision] = np.empty_like(truth)
            np.put_along_axis(estimates[precision], hits.ids, hits.scores, 1)
            for k in (100, 500):
                recall = recall_at_k(truth, hits.ids[:, :k], 100).mean()
                bench.figure(f"{name}, {precision}: true top-100 among the best {k}", recall, "share")
    pearson = np.corrcoef(estimates["float32"].ravel(), estimates["bfloat16"].ravel())[0, 1]
    bench.figure(f"{name}: Pearson of scores from bfloat16 and float32 rows", pearson, "")
    norms = [np.linalg.norm(r, axis=1) for r in rows.values()]
    known = norms[0] > 0
    cosines = np.einsum("ij,ij->i", *rows.values())[known] / (norms[0] * norms[1])[known]
    bench.figure(f"{name}: median cosine of bfloat16 and float32 rows", np.median(cosines), "")
    bench.figure(f"{name}: cosine that 99% of the rows exceed", np.quantile(cosines, 0.01), "")


def main() -> None:
    """Measure and print."""
    bench = Bench("Precision: bfloat16 rows against float32", __doc__)
    import cifar10
    import mnist

    def some(task: gradindex.Task) -> gradindex.Task:
        """Two checkpoints are enough for the quick form, where bfloat16 may take long."""
        return replace(task, checkpoints=task.checkpoints[2:4]) if bench.quick else task

    n, queries = (200, 10) if bench.quick else (20_000, 100)
    compare(bench, "MNIST, all layers", some(part_of(mnist.task(), n, queries)), Projection())
    n = 150 if bench.quick else 10_000
    compare(bench, "CIFAR-10, last layer", some(part_of(cifar10.task(), n, queries)), Projection("none"))
    n, queries = (110, 2) if bench.quick else (2000, 20)
    compare(bench, "CIFAR-10, all layers", some(part_of(cifar10.all_layers(), n, queries)), Projection())
    bench.finish()


if __name__ == "__main__":
    main()
