"""What spot checks while building cost: builds of the CIFAR-10 task's network with and without them, in turn.

The pictures and the weights are random: the time depends on neither. One small shard is built; the usual shard of 8,192
rows or more has as many checks, so that their share of it follows. Times are those of the processor, which others on
the machine change less.

    python scripts/bench/checking.py [--quick] [--json] [--save FILE]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import Bench

import gradindex
from gradindex.spotcheck import SpotCheck

# Rows of a shard that a build makes unasked, at least.
SHARD = 8192


def make_task(folder: Path, rows: int, epochs: int) -> gradindex.Task:
    """ResNet-9 with its last layer tracked, at ``epochs`` checkpoints."""
    import cifar10

    torch.manual_seed(0)
    for step in range(epochs):
        torch.save(cifar10.make_model(cifar10.width()).state_dict(), folder / f"step_{step + 1}.pt")
    data = torch.utils.data.TensorDataset(torch.randn(rows, 3, 32, 32), torch.randint(10, (rows,)))
    checkpoints = gradindex.find_checkpoints(folder, learning_rate=0.1)
    return gradindex.Task(cifar10.make_model(cifar10.width()), cifar10.loss, data, checkpoints, layers="8")


class Clock:
    """Adds up the time that goes into spot checks."""

    def __init__(self) -> None:
        self.seconds, self._check = 0.0, SpotCheck.check

    def timed(self, check: SpotCheck, *args: Any) -> None:
        """In place of ``SpotCheck.check``."""
        started = time.process_time()
        self._check(check, *args)
        self.seconds += time.process_time() - started


def main() -> None:
    """Measure and print."""
    bench = Bench("Spot checks while building", __doc__)
    rows, epochs, rounds = (128, 2, 1) if bench.quick else (2048, 6, 5)
    clock = Clock()
    contestants = {"with": lambda check, *args: clock.timed(check, *args), "without": lambda *_: None}
    ratios, shares = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = make_task(folder, rows, epochs)
        gradindex.build(task, folder / "warm", batch_size=128)
        for number in range(rounds):
            seconds = {}
            for contestant in sorted(contestants, reverse=bool(number % 2)):
                SpotCheck.check, clock.seconds = contestants[contestant], 0.0  # type: ignore[method-assign]
                started = time.process_time()
                gradindex.build(task, folder / f"{contestant}-{number}", batch_size=128)
                seconds[contestant] = time.process_time() - started
                if contestant == "with":
                    rest = (seconds[contestant] - clock.seconds) * SHARD / rows
                    shares.append(clock.seconds / (clock.seconds + rest))
            ratios.append(seconds["with"] / seconds["without"])
    bench.figure("rows of the shard", rows, "rows")
    bench.bar(f"spot checks, of a shard of {SHARD:,} rows", statistics.median(shares), "share", 0.03, at_most=True)
    for name, value in (("median", statistics.median(ratios)), ("smallest", min(ratios)), ("largest", max(ratios))):
        bench.figure(f"a build of the small shard with spot checks / without, {name}", value, "x")
    bench.finish()


if __name__ == "__main__":
    main()
