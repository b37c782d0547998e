"""Linear datamodeling scores by dattri's protocols (protocols.py): 100 random halves, five trainings of each.

Stores have rows of int8, 1,024 numbers a checkpoint, and factors; of one run and of three. Trainings and checkpoints
are kept in GRADINDEX_CACHE/quality; what is there is not made again, so that this can be interrupted. ``--do
trainings`` makes the trainings alone.

python scripts/quality/lds.py [--quick] [--json] [--data DIR] [--save FILE] [--protocol mnist-mlp mnist-lr]
                              [--do trainings scores]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from harness import Bench

import gradindex
from gradindex import evaluation
from gradindex.choices import QUERY_GEOMETRIES
from gradindex.evaluation import GroundTruth
from gradindex.projection import Projection
from gradindex.store import second_moments

SUBSETS, SEEDS, DIM = 100, 5, 1024
QUICK_SUBSETS, QUICK_SEEDS, QUICK_DIM = 6, 2, 32
# Against one seed at a time.
BARS = {
    ("mnist-mlp", "whitened", "one run"): 0.45,
    ("mnist-mlp", "whitened-exact", "one run"): 0.51,
    ("mnist-mlp", "whitened-exact", "three runs"): 0.54,
    ("mnist-lr", "whitened", "one run"): 0.73,
    ("mnist-lr", "whitened-exact", "one run"): 0.78,
}
RUNS = {"one run": (0,), "three runs": (0, 1, 2)}


def main() -> None:
    """Measure and print."""
    names = ("mnist-mlp", "mnist-lr")
    bench = Bench("Linear datamodeling scores", __doc__, parts={"protocol": names, "do": ("trainings", "scores")})
    for name in bench.options.protocol:
        judge(bench, name)
    bench.finish()


def judge(bench: Bench, name: str) -> None:
    """The trainings of a protocol, and what stores of its runs predict of them."""
    from protocols import PROTOCOLS, task

    protocol = PROTOCOLS[name]
    count, seeds = (QUICK_SUBSETS, QUICK_SEEDS) if bench.quick else (SUBSETS, SEEDS)
    one = task(protocol)
    truth = evaluation.retrain(
        one, protocol.folder / "retrainings", evaluation.random_subsets(one.n_train, count), seeds=seeds
    )
    say_truth(bench, name, truth)
    if "scores" not in bench.options.do:
        return
    for which, runs in RUNS.items():
        of_runs = one if runs == (0,) else task(protocol, runs)
        folder = protocol.folder / f"store-{'-'.join(map(str, runs))}-{len(of_runs.checkpoints)}-factors"
        dim = QUICK_DIM if bench.quick else DIM
        store = gradindex.build(of_runs, folder, projection=Projection(dim=dim), row_type="int8", factors="float32")
        second_moments(store.folder)
        plain = gradindex.load(of_runs, store.folder, use_index=False)
        ekfac = evaluation.ekfac_scores(plain, range(of_runs.n_query))
        judged = evaluation.judge(
            of_runs, store.folder, truth=truth, geometries=QUERY_GEOMETRIES, scores={"ekfac": ekfac}
        )
        for row in judged.rows:
            of_store = row.name in (*QUERY_GEOMETRIES, "ekfac")
            if which != "one run" and not of_store:
                continue
            bar = BARS.get((name, row.name, which))
            if bar is not None:
                bench.bar(f"{name}: {row.name}, {which}, LDS of one seed", row.of_one.mean, "", bar)
            bench.row(
                f"{name}: LDS",
                {
                    "scores": f"{row.name}, {which}" if of_store else row.name,
                    "LDS of one seed": row.of_one.mean,
                    "standard error": row.of_one.standard_error,
                    f"LDS of the mean of {truth.n_seeds}": row.of_mean.mean,
                    "standard error ": row.of_mean.standard_error,
                    "queries": row.of_mean.counted,
                    "seconds": row.seconds,
                },
            )


def say_truth(bench: Bench, name: str, truth: GroundTruth) -> None:
    """How far the trainings repeat."""
    ceiling = truth.ceiling
    assert ceiling is not None  # of several seeds
    bench.figure(f"{name}: correlation of two seeds", ceiling.correlation, "")
    bench.figure(f"{name}: ceiling of one seed", ceiling.of_one, "")
    bench.figure(f"{name}: ceiling of the mean of {truth.n_seeds}", ceiling.of_mean, "")
    bench.figure(f"{name}: seconds of a training", truth.seconds / truth.losses[:, :, 0].size, "s")


if __name__ == "__main__":
    main()
