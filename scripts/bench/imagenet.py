"""ResNet-50 at 224 pixels: last-layer rows against a bare forward pass, and what ImageNet would take.

A step is a batch of 4 random pictures at one checkpoint; every step times each contestant once, in turn, and a figure
is the median over steps. Weights are random: nothing here depends on their values. The forward pass is that of
pictures which are normalised already; rows begin with bytes. Bars compare with the layout that torch has by default,
figures also with the channels last in memory, which rows take. The quick form takes pictures of 64 pixels.

What a GPU would take is an estimate from operations alone, not measured, and so labelled.

    python scripts/bench/imagenet.py [--quick] [--json] [--save FILE]
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import TOP, Bench
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import gradindex
from gradindex.gradients import Engine, check_routes
from gradindex.projection import Projection
from gradindex.rows import RowMaker

sys.path.insert(0, str(TOP / "scripts" / "imagenet"))
from build import PAPERS_DIM
from imagenet_task import CrossEntropy, normalised
from pictures import Preparation
from resnet import resnet50

BATCH, PIXELS, QUICK_PIXELS = 4, 224, 64
PICTURES, CHECKPOINTS = 1_281_167, 3
# Dense bfloat16 operations a second by the makers' data sheets, and the share of them that is taken for reached.
PEAKS, SHARES = {"A100": 312e12, "H100": 989e12}, (0.4, 0.1)


def contestants(folder: Path, pixels: int) -> dict[str, Callable[[], Any]]:
    """What is timed, each on the same batch."""
    torch.manual_seed(0)
    model = resnet50()
    torch.save(model.state_dict(), folder / "step_1.pt")
    pictures = torch.randint(256, (BATCH, 3, pixels, pixels), dtype=torch.uint8)
    task = gradindex.Task(
        model,
        CrossEntropy(1000),
        TensorDataset(pictures, torch.randint(1000, (BATCH,))),
        gradindex.find_checkpoints(folder, learning_rate=0.1),
        layers="fc",
    )
    engine = Engine(task)
    check_routes(engine.__enter__())
    maker, examples = RowMaker(engine, Projection(dim=PAPERS_DIM)), task.read(range(BATCH))
    batch = normalised(pictures, model)
    last = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    batch_last = batch.contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(model).eval()

    def forward(network: nn.Module, x: torch.Tensor) -> None:
        with torch.no_grad():
            network(x)

    return {
        "forward": lambda: forward(plain, batch),
        "forward, channels last": lambda: forward(last, batch_last),
        "rows": lambda: maker.rows(examples),
    }


def measure(steps: int, pixels: int) -> dict[str, list[float]]:
    """Seconds a picture of each contestant in each step."""
    with tempfile.TemporaryDirectory() as folder:
        actions = contestants(Path(folder), pixels)
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for number in range(steps + 2):
            for name, action in actions.items():
                started = time.perf_counter()
                action()
                if number >= 2:  # the first ones warm up
                    seconds[name].append((time.perf_counter() - started) / BATCH)
    return seconds


def reading(count: int) -> tuple[float, float]:
    """Seconds to read and prepare a picture of ImageNet's usual size (500 x 375), and its bytes."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((500, 375))
    noise = generator.integers(0, 24, (375, 500, 3))
    image = Image.fromarray((np.asarray(coarse) * 0.9 + noise).astype(np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.JPEG"
        image.save(path, quality=92)
        prepare, seconds = Preparation(), []
        for _ in range(count):
            started = time.perf_counter()
            prepare(path)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds), path.stat().st_size


def operations() -> float:
    """Floating-point operations of a forward pass of one picture: a multiplication and an addition are two."""
    # On no device: they are counted, not computed.
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        resnet50().eval()(torch.zeros(1, 3, PIXELS, PIXELS))
    return float(counter.get_total_flops())


def main() -> None:
    """Measure and print."""
    bench = Bench("ImageNet: ResNet-50 at 224 pixels, last layer", __doc__)
    seconds = measure(*((1, QUICK_PIXELS) if bench.quick else (100, PIXELS)))
    row_s = statistics.median(seconds["rows"])
    for name in ("forward", "forward, channels last"):
        ratio = statistics.median(a / b for a, b in zip(seconds["rows"], seconds[name], strict=True))
        if name == "forward":
            bench.bar("rows / forward", ratio, "x", 1.10, at_most=True)
        else:
            bench.figure(f"rows / {name}", ratio, "x")
        bench.figure(name, statistics.median(seconds[name]) * 1e3, "ms a picture")
    bench.figure("rows of one checkpoint", 1 / row_s, "rows/s")
    hours = PICTURES * CHECKPOINTS * row_s / 3600
    bench.figure(f"projected for this machine: {PICTURES:,} pictures, {CHECKPOINTS} checkpoints", hours, "hours")
    read_s, size = reading(5 if bench.quick else 50)
    bench.figure(f"reading and preparing a JPEG of 500 x 375 pixels and {size / 1e3:.0f} kB", read_s * 1e3, "ms")
    bench.figure(f"projected: reading {PICTURES:,} of them, one process", PICTURES * read_s / 3600, "hours")
    each = operations()
    bench.figure("operations of a forward pass", each / 1e9, "GFLOP a picture")
    for name, peak in PEAKS.items():
        for share in SHARES:
            taken = PICTURES * CHECKPOINTS * each / (peak * share)
            label = f"estimated, not measured: one {name} at {share:.0%} of {peak / 1e12:.0f} TFLOP/s (bfloat16)"
            bench.figure(label, taken / 60, "minutes")
            bench.figure(f"reading as fast, {name} at {share:.0%}", PICTURES * read_s / taken, "processes")
    bench.finish()


if __name__ == "__main__":
    main()
