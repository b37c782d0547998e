"""ResNet-9 on CIFAR-10 shapes: rows and exact products against a forward pass and a training step's gradient.

Every round times each contestant once, in turn; a figure is the median over rounds of the ratio within a round.
Weights are random: nothing here depends on their values. Ours runs as it does by default, which for this network is
with the channels last in memory; bars compare with the layout that torch has by default, figures also with our own.
Texts are those of AG News through a small transformer (texts.py). The quick form has a sixteenth of the width, batches
of 4 (of texts 8) and one round.

    python scripts/bench/extraction.py [--parts float32 memory] [--quick] [--json] [--save FILE]
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import texts
import torch
from harness import Bench

import gradindex
from gradindex.allocating import memory_kept
from gradindex.choices import Precision
from gradindex.factors import Formed, Gradients
from gradindex.gradients import Engine, check_routes
from gradindex.projection import Projection
from gradindex.projection.kronecker import sizes
from gradindex.rows import RowMaker

BATCH, QUICK_BATCH = 64, 4
PARTS = (
    "float32",
    "bfloat16",
    "memory",
    "allocator",
    "texts",
)  # bfloat16 takes an hour on processors without instructions for it


def make_task(folder: Path, layers: str, batch: int) -> gradindex.Task:
    """One batch of random pictures and one checkpoint."""
    import cifar10

    torch.manual_seed(0)
    model = cifar10.make_model(cifar10.width())
    torch.save(model.state_dict(), folder / "step_1.pt")
    data = torch.utils.data.TensorDataset(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))
    checkpoints = gradindex.find_checkpoints(folder, learning_rate=0.1)
    return gradindex.Task(model, cifar10.loss, data, checkpoints, layers=layers)


class Contestants:
    """What is timed, each on the same batch, which is on the device, as the weights are."""

    def __init__(self, folder: Path, precision: Precision, batch: int, device: str = "cpu") -> None:
        self.precision, self.device = precision, device
        self.whole, self.last = (make_task(folder, layers, batch) for layers in ("*", "8"))
        self.examples = self.whole.read(range(batch))
        self.batch = [tensor.to(device) for tensor in self.whole.collate(self.examples.items)]
        for task in (self.whole, self.last):
            task.model.to(device)
        # By whether the channels come last.
        self.models = {False: copy.deepcopy(self.whole.model), True: copy.deepcopy(self.whole.model)}
        self.models[True].to(memory_format=torch.channels_last)

    def _loss(self, model: torch.nn.Module, channels_last: bool) -> torch.Tensor:
        pictures, labels = self.batch
        if channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        half = self.precision in ("bfloat16", "float16")
        with torch.autocast(self.device, getattr(torch, self.precision) if half else torch.bfloat16, enabled=half):
            return self.whole.loss(model, (pictures, labels)).mean()

    def forward(self, channels_last: bool = False) -> None:
        """A bare forward pass."""
        with torch.no_grad():
            self._loss(self.models[channels_last].eval(), channels_last)

    def step(self, channels_last: bool = False) -> None:
        """Forward and backward, as training does."""
        model = self.models[channels_last].train()
        model.zero_grad()
        self._loss(model, channels_last).backward()

    def rows(self, task: gradindex.Task, projection: Projection, norms: Any) -> Callable[[], Any]:
        """Rows of the batch; a fitted projection gets random orthonormal bases."""
        engine = Engine(task, self.precision)
        check_routes(engine.__enter__())
        generator = np.random.default_rng(0)
        bases = {
            (0, number): tuple(
                np.linalg.qr(generator.standard_normal((n, k)))[0].astype(np.float32)
                for n, k in ((layer.d_out, size[0]), (layer.d_in, size[1]))
            )
            for number, (layer, size) in enumerate(
                zip(engine.layers, sizes(engine.layers, projection.dim), strict=True)
            )
        }
        maker = RowMaker(engine, projection, bases, norms)
        return lambda: maker.rows(self.examples)

    def products(self) -> Callable[[], Any]:
        """Exact scores of the batch against one query whose gradients are there."""
        engine = Engine(self.whole, self.precision)
        check_routes(engine.__enter__())
        query = [Formed(torch.randn(1, layer.d_out, layer.d_in, device=self.device)) for layer in engine.layers]

        def run() -> torch.Tensor:
            scores = torch.zeros(len(self.examples), device=self.device)

            def consume(number: int, gradients: Gradients) -> None:
                for part, piece in gradients.parts():
                    scores[part] += piece.products(query[number])[:, 0]

            engine.run(0, self.examples, consume)
            return scores

        return run


def timed(action: Callable[[], Any]) -> float:
    """Seconds of one call, until a GPU has done what it was given."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(precision: Precision, rounds: int, batch: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each contestant in each round."""
    with tempfile.TemporaryDirectory() as folder:
        contestants = Contestants(Path(folder), precision, batch, device)
        fitted = Projection("fitted", 256 * 17)
        actions = {
            "forward": contestants.forward,
            "step": contestants.step,
            "forward, channels last": partial(contestants.forward, True),
            "step, channels last": partial(contestants.step, True),
            "last layer rows": contestants.rows(contestants.last, Projection(), "exact"),
            "fitted rows": contestants.rows(contestants.whole, fitted, "projected"),
            "fitted rows, exact norms": contestants.rows(contestants.whole, fitted, "exact"),
            "sketch rows": contestants.rows(contestants.whole, Projection(), "exact"),
            "sketch rows, projected norms": contestants.rows(contestants.whole, Projection(), "projected"),
            "exact products": contestants.products(),
        }
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for number in range(rounds + 1):
            for name, action in actions.items():
                taken = timed(action)
                if number:  # the first round warms up
                    seconds[name].append(taken)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def peak_bytes(what: str, batch: int) -> int:
    """Peak memory of a process that does one thing, above what it had before."""
    with tempfile.TemporaryDirectory() as folder:
        contestants = Contestants(Path(folder), "float32", batch)
        action = contestants.step if what == "step" else contestants.rows(contestants.whole, Projection(), "exact")
        before = peak_resident_bytes()
        action()
        return peak_resident_bytes() - before


def peak_resident_bytes() -> int:
    """The most that this process had in memory so far (Linux)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def memory(bench: Bench, batch: int) -> None:
    """The most that a process has in memory for a training step, and for rows."""
    peaks = {what: bench.in_a_process(peak_bytes, what, batch) for what in ("step", "rows")}
    bench.figure("peak memory of a step", peaks["step"] / 2**20, "MiB")
    bench.bar("peak memory, sketch rows of all layers / step", peaks["rows"] / peaks["step"], "x", 1.3, at_most=True)


def allocator(bench: Bench, rounds: int, batch: int) -> None:
    """Rows with freed memory kept, as in a build, against the same with what glibc does by itself, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        contestants = Contestants(Path(folder), "float32", batch)
        actions = {
            "last layer rows": contestants.rows(contestants.last, Projection(), "exact"),
            "fitted rows": contestants.rows(contestants.whole, Projection("fitted", 256 * 17), "projected"),
            "sketch rows": contestants.rows(contestants.whole, Projection(), "exact"),
        }
        for name, action in actions.items():
            seconds: dict[str, list[float]] = {"kept": [], "returned": []}
            for _ in range(rounds):
                action()
                seconds["returned"].append(timed(action))
                with memory_kept():
                    action()
                    seconds["kept"].append(timed(action))
            bench.figure(f"float32: {name}, memory returned / kept", ratio(seconds, "returned", "kept"), "x")


def main() -> None:
    """Measure and print."""
    bench = Bench("Extraction: ResNet-9, batches of 64", __doc__, parts={"parts": PARTS})
    rounds, batch = (1, QUICK_BATCH) if bench.quick else (15, BATCH)
    if "memory" in bench.options.parts:  # before this process takes memory, which a fork of it may use again
        memory(bench, batch)
    if "allocator" in bench.options.parts:
        allocator(bench, rounds, batch)
    if "texts" in bench.options.parts:
        texts.measure(bench, timed, ratio)
    for precision in [part for part in bench.options.parts if part in ("float32", "bfloat16")]:
        seconds = measure(precision, rounds, batch)
        over = partial(ratio, seconds)
        for name in ("forward", "step", "forward, channels last", "step, channels last"):
            bench.figure(f"{precision}: {name}", statistics.median(seconds[name]) / batch * 1e3, "ms an example")
        bench.bar(
            f"{precision}: last layer rows / forward", over("last layer rows", "forward"), "x", 1.10, at_most=True
        )
        bench.bar(f"{precision}: fitted rows / step", over("fitted rows", "step"), "x", 0.95, at_most=True)
        bench.figure(f"{precision}: fitted rows, exact norms / step", over("fitted rows, exact norms", "step"), "x")
        if precision == "float32":
            bench.bar("float32: sketch rows / step", over("sketch rows", "step"), "x", 2.0, at_most=True)
        else:
            bench.figure("bfloat16: sketch rows / step", over("sketch rows", "step"), "x")
        name = "sketch rows, projected norms"
        bench.figure(f"{precision}: {name} / step", over(name, "step"), "x")
        bench.bar(f"{precision}: exact products / step", over("exact products", "step"), "x", 1.3, at_most=True)
        for name, base in (
            ("last layer rows", "forward"),
            ("fitted rows", "step"),
            ("sketch rows", "step"),
            ("exact products", "step"),
        ):
            own = f"{base}, channels last"
            bench.figure(f"{precision}: {name} / {own}", over(name, own), "x")
    bench.finish()


if __name__ == "__main__":
    main()
