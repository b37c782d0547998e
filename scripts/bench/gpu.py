"""What a CUDA device gives: extraction, rows against the CPU's, and search, each against what it replaces.

ResNet-9 as in extraction.py, in batches of 256; ResNet-50 on random pictures of ImageNet's size, rows of its last
layer against a bare forward pass, both collated on the host and copied over; rows and exact scores of ResNet-9 on the
device against float64 on the CPU; and an index of a million made rows, where FAISS has its GPU part. It needs no data.
The quick form has less of everything.

    python scripts/bench/gpu.py [--parts rows extraction resnet50 index] [--quick] [--json] [--save FILE]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import extraction
import numpy as np
import torch
from extraction import ratio, timed
from harness import TOP, Bench
from numpy.typing import NDArray

import gradindex
from gradindex.choices import Precision
from gradindex.gradients import Engine, check_routes
from gradindex.gradients.precision import full_float32
from gradindex.index import CompactIndex, Shape
from gradindex.index.gpu import devices
from gradindex.projection import Projection
from gradindex.rows import RowMaker

PARTS = ("rows", "extraction", "resnet50", "index")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
DIM, CLUSTERS, QUERIES, K = 64, 1000, 1000, 500


def rows(bench: Bench) -> None:
    """Rows and exact scores on the device against float64 on the CPU, relative to the largest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = extraction.make_task(folder, "*", 32)
        options: dict[str, Any] = {"projection": Projection(dim=256 * 17), "batch_size": 16}
        reference = gradindex.build(task, folder / "reference", precision="float64", **options).rows(range(32))
        queries = list(range(32))
        scores = gradindex.exact_scores(task, queries, precision="float64", role="train")
        for precision in PRECISIONS:
            store = gradindex.build(task, folder / precision, precision=precision, device="cuda", **options)
            apart = np.linalg.norm(store.rows(range(32)) - reference, axis=1) / np.linalg.norm(reference, axis=1)
            bench.bar(
                f"{precision}: rows, largest relative difference",
                apart.max(),
                "",
                1e-3 if precision == "float32" else 0.05,
                at_most=True,
            )
            found = gradindex.exact_scores(task, queries, precision=precision, device="cuda", role="train")
            own = np.diag(scores)
            apart = np.abs(found - scores) / np.sqrt(np.outer(own[queries], own))
            bench.figure(f"{precision}: exact scores, largest difference / product of the norms", apart.max(), "")


def extract(bench: Bench) -> None:
    """ResNet-9: rows and products against a forward pass and a training step."""
    batch, rounds = (64, 2) if bench.quick else (256, 10)
    for precision in PRECISIONS:
        seconds = extraction.measure(precision, rounds, batch, "cuda")
        values: dict[str, Any] = {"precision": precision}
        for name in ("forward, channels last", "step, channels last", "fitted rows", "sketch rows", "exact products"):
            values[f"{name}, examples/s"] = round(batch / float(np.median(seconds[name])))
        bench.row("ResNet-9", values)
        for name, base in (
            ("last layer rows", "forward"),
            ("fitted rows", "step"),
            ("sketch rows", "step"),
            ("exact products", "step"),
        ):
            value = ratio(seconds, name, f"{base}, channels last")
            bench.figure(f"{precision}: {name} / {base}, channels last", value, "x")


def resnet50(bench: Bench) -> None:
    """ImageNet's shape: rows of the last layer against a bare forward pass, both from single pictures on the host."""
    sys.path.insert(0, str(TOP / "scripts" / "imagenet"))
    from resnet import resnet50 as make

    batch, rounds = (8, 2) if bench.quick else (256, 6)
    torch.manual_seed(0)
    model = make().cuda()
    pictures, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "step_1.pt")
        checkpoints = gradindex.find_checkpoints(folder, learning_rate=0.1)
        data = torch.utils.data.TensorDataset(pictures, labels)
        task = gradindex.Task(model, loss, data, checkpoints, layers="fc")
        examples = task.read(range(batch))
        for precision in PRECISIONS[:2]:
            engine = Engine(task, precision)
            check_routes(engine.__enter__())
            maker = RowMaker(engine, Projection(dim=1024), {}, "exact")
            plain = make().cuda().eval().to(memory_format=torch.channels_last)

            def forward(plain: Any = plain, precision: str = precision) -> None:
                pictures, labels = (tensor.cuda() for tensor in task.collate(examples.items))
                with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                    loss(plain, (pictures.contiguous(memory_format=torch.channels_last), labels))

            def make_rows(maker: RowMaker = maker) -> None:
                maker.rows(examples)

            seconds: dict[str, list[float]] = {"forward": [], "rows": []}
            for number in range(rounds + 1):
                for name, action in (("forward", forward), ("rows", make_rows)):
                    taken = timed(action)
                    if number:
                        seconds[name].append(taken)
            speed = batch / float(np.median(seconds["rows"]))
            bench.figure(f"ResNet-50, {precision}: rows of the last layer", speed, "examples/s")
            bench.figure(
                f"ResNet-50, {precision}: ImageNet's 1,281,167 at one checkpoint", 1_281_167 / speed / 60, "min"
            )
            value = ratio(seconds, "rows", "forward")
            bench.bar(f"ResNet-50, {precision}: rows of the last layer / forward", value, "x", 1.1, at_most=True)
            engine.__exit__(None, None, None)


def made_rows(count: int) -> NDArray[np.float32]:
    """(count, DIM) rows near the directions of many clusters, each of a length of its own."""
    generator = np.random.default_rng(0)
    middles = generator.standard_normal((CLUSTERS, DIM), dtype=np.float32)
    found = middles[generator.integers(CLUSTERS, size=count)]
    found += 0.5 * generator.standard_normal((count, DIM), dtype=np.float32)
    found *= generator.lognormal(0, 0.5, (count, 1)).astype(np.float32)
    return found


def index(bench: Bench) -> None:
    """A compact index of each kind on the device against the same on the CPU with all its threads."""
    gpus = devices("cuda")
    if not gpus:
        print("index: left out, for FAISS sees no CUDA device (faiss-gpu is not installed)", flush=True)
        return
    count = 20_000 if bench.quick else 1_000_000
    stored, queries = made_rows(count), made_rows(count + QUERIES)[-QUERIES:]
    ids = np.arange(count)
    sample = stored[:: max(1, count // 50_000)]

    def blocks() -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        for start in range(0, count, 65_536):
            yield ids[start : start + 65_536], stored[start : start + 65_536]

    truth = np.argsort(-(queries[:100] @ stored.T), axis=1)[:, :100]
    for shape, probes in ((Shape("flat", DIM), 1), (Shape("ivf", DIM, 1024 if count > 100_000 else 64), 32)):
        for place, used in (("CPU", ()), ("GPU", gpus)):
            started = time.perf_counter()
            made = CompactIndex.build(shape, sample, blocks, 0, used)
            built = time.perf_counter() - started
            search = partial(made.search, k=K, probes=probes)
            found = search(queries[:100])[1]
            share = np.mean([np.isin(best, row).mean() for best, row in zip(truth, found, strict=True)])
            one = [timed(partial(search, query)) for query in np.split(queries[:100], 100)]
            batch = min(timed(partial(search, queries)) for _ in range(3))
            bench.row(
                f"{count:,} rows of {DIM}, best {K}",
                {
                    "index": shape.kind,
                    "on": place,
                    "build s": round(built, 1),
                    "one query ms": float(np.median(one)) * 1e3,
                    f"{QUERIES} queries, ms each": batch / QUERIES * 1e3,
                    "true top-100 held": float(share),
                },
            )


def main() -> None:
    """Measure and print."""
    bench = Bench("On a CUDA device", __doc__, parts={"parts": PARTS})
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here, so there is nothing to measure.")
    actions = {"rows": rows, "extraction": extract, "resnet50": resnet50, "index": index}
    with full_float32():  # what ours is compared with as well
        for part in bench.options.parts:
            actions[part](bench)
    bench.finish()


if __name__ == "__main__":
    main()
