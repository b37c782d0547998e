"""The store at 1.28 million rows of 512 float16: writing, opening, gathering, memory, a full disk; rows of other types.

Makes its store in --folder (1.4 GB twice, for compaction writes a second one before it drops the first), which needs
no data; the recall of float16, bfloat16 and int8 rows is measured on the MNIST task.

    python scripts/bench/store.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from harness import Anonymous, Bench, timed
from numbers_task import make_task
from torch.utils.data import Subset

import gradindex
import gradindex.store.layout
from gradindex.choices import ROW_TYPES
from gradindex.errors import StoreError
from gradindex.evaluation import recall_at_k
from gradindex.projection import Projection
from gradindex.store import second_moments
from gradindex.store.container import writing

DIM, GATHERED = 512, 1000
ANONYMOUS_LIMIT_GB = 1.2


def main() -> None:
    """Measure and print."""
    bench = Bench("The store", __doc__)
    n = 5000 if bench.quick else 1_281_167
    place = os.environ.get("GRADINDEX_CACHE")
    if place:
        Path(place).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gradindex-store-", dir=place) as name:
        folder = Path(name)
        write_speed(bench, folder, 2 if bench.quick else 64)
        jobs(bench, folder / "store", n)
        opening_and_gathering(bench, folder / "store")
        moments(bench, folder / "store")
        layouts(bench, folder, 5000 if bench.quick else 200_000)
        full_disk(bench, 1 if bench.quick else 20)
        row_types(bench, folder)
    bench.finish()


def write_speed(bench: Bench, folder: Path, shards: int) -> None:
    """Shards of 16 MiB as a build writes them, each flushed and sealed, against the same bytes in a plain file."""
    rows = np.random.default_rng(0).standard_normal((8192, DIM)).astype(np.float32)
    content = rows.tobytes()
    seconds: dict[str, list[float]] = {"plain": [], "flushed": [], "store": []}

    def plain(path: Path, every: int) -> None:
        with path.open("wb", buffering=0) as file:
            for number in range(shards):
                file.write(content)
                if (number + 1) % every == 0:
                    os.fsync(file.fileno())

    def store(part: Path) -> None:
        for number in range(shards):
            with writing(part / f"{number}.h5", {"rows": (rows.shape, "<f4")}, {}, {}) as writer:
                for start in range(0, len(rows), 256):
                    writer.put("rows", start, rows[start : start + 256])

    for _ in range(3):  # in turns, on a machine that is shared
        for kind in seconds:
            part = folder / kind
            part.mkdir()
            started = time.perf_counter()
            if kind == "store":
                store(part)
            else:
                plain(part / "plain", shards if kind == "plain" else 1)
            seconds[kind].append(time.perf_counter() - started)
            shutil.rmtree(part)
    medians = {kind: float(np.median(values)) for kind, values in seconds.items()}
    size = shards * len(content)
    bench.figure(f"plain writing of {size >> 20:,} MiB, flushed at the end", size / medians["plain"] / 1e6, "MB/s")
    bench.figure("plain writing, flushed every 16 MiB", size / medians["flushed"] / 1e6, "MB/s")
    bench.bar("writing shards, of plain writing flushed at the end", medians["plain"] / medians["store"], "x", 0.7)
    bench.figure("writing shards, of plain writing flushed every 16 MiB", medians["flushed"] / medians["store"], "x")


STEPS = ("build", "verify", "search 10 queries", "self-influence ranking", "remove 1%", "compact")


def jobs(bench: Bench, folder: Path, n: int) -> None:
    """Build, verify, search, rank, remove and compact, each in a process of its own."""
    found = {name: bench.in_a_process(job, name, folder, n) for name in STEPS}
    for name, (taken, anonymous) in found.items():
        bench.figure(f"{name}, {n:,} rows", taken, "s")
        if name == "self-influence ranking":
            bench.figure(f"{name}: anonymous memory", anonymous, "GB")
        else:
            bench.bar(f"{name}: anonymous memory", anonymous, "GB", ANONYMOUS_LIMIT_GB, at_most=True)
    rows = gradindex.GradientStore(folder).n_train
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    bench.figure("bytes on disk a row, beyond its 1,024", size / rows - 2 * DIM, "bytes")


def job(name: str, folder: Path, n: int) -> tuple[float, float]:
    """Seconds and anonymous gigabytes of a step."""
    task = make_task(n, folder.parent)
    options: dict[str, Any] = {"projection": Projection("none"), "row_type": "float16", "batch_size": 256}
    dropped = np.random.default_rng(0).choice(n, n // 100, replace=False)
    steps: dict[str, Callable[[], Any]] = {
        "build": lambda: gradindex.build(task, folder, **options),
        "verify": lambda: gradindex.GradientStore(folder).verify(),
        "search 10 queries": lambda: gradindex.load(task, folder).proponents(range(10), k=100, rerank="rows"),
        "self-influence ranking": lambda: gradindex.GradientStore(folder).top_self_influence(1000),
        "remove 1%": lambda: gradindex.store.remove(folder, dropped),
        "compact": lambda: gradindex.store.compact(folder),
    }
    with Anonymous() as memory:
        started = time.perf_counter()
        answer = steps[name]()
        taken = time.perf_counter() - started
    if name == "verify" and answer:
        raise SystemExit(f"The store is damaged: {answer}")
    return taken, memory.peak_gb


def opening_and_gathering(bench: Bench, folder: Path) -> None:
    """Files are warm: they were just written."""
    generator = np.random.default_rng(1)
    bench.bar("opening", timed(lambda: gradindex.GradientStore(folder), 20), "ms", 50, at_most=True)
    store = gradindex.GradientStore(folder)
    ids = store.ids

    def gather() -> None:
        store.rows(generator.choice(ids, GATHERED))

    started = time.perf_counter()
    gather()
    bench.figure("the first 1,000 random rows, every seal read", 1000 * (time.perf_counter() - started), "ms")
    bench.bar("1,000 random rows, most blocks met for the first time", timed(gather, 20), "ms", 20, at_most=True)
    for _ in store.blocks():
        pass
    bench.bar("1,000 random rows, all blocks verified before", timed(gather, 100), "ms", 20, at_most=True)


def moments(bench: Bench, folder: Path) -> None:
    """The pass for second moments, against one that only reads the rows; files warm."""
    store = gradindex.GradientStore(folder)

    def read() -> None:
        for _, rows in store.blocks():
            rows.sum()

    read()
    reading = timed(read, 3)
    with Anonymous() as memory:
        started = time.perf_counter()
        second_moments(folder)
        taken = 1000 * (time.perf_counter() - started)
    each = store.dim // store.n_checkpoints
    what = f"second moments of {store.n_train:,} rows of {store.n_checkpoints} x {each} numbers"
    bench.figure(what, taken / 1000, "s")
    bench.bar(f"{what}, against reading the rows", taken / reading, "x", 2, at_most=True)
    bench.figure(f"{what}: anonymous memory", memory.peak_gb, "GB")


def layouts(bench: Bench, folder: Path, n: int) -> None:
    """The same rows in HDF5's own ways: 1,000 at random, warm."""
    rows = np.random.default_rng(2).standard_normal((n, DIM)).astype(np.float16)
    kinds: dict[str, dict[str, Any]] = {
        "HDF5 contiguous, no checksum": {},
        "HDF5 chunks of 16 rows, Fletcher-32": {"chunks": (16, DIM), "fletcher32": True},
        "HDF5 chunks of 256 rows, Fletcher-32": {"chunks": (256, DIM), "fletcher32": True},
    }
    generator = np.random.default_rng(3)
    for name, options in kinds.items():
        with h5py.File(folder / "layout.h5", "w") as file:
            file.create_dataset("rows", data=rows, **options)
        with h5py.File(folder / "layout.h5", "r") as file:
            data = file["rows"]
            taken = timed(lambda: data[np.unique(generator.integers(0, n, GATHERED))], 5)  # noqa: B023  # used at once
        bench.figure(f"1,000 of {n:,} rows, {name}", taken, "ms")
    (folder / "layout.h5").unlink()


def toy(folder: Path, task_folder: Path) -> str | None:
    """Build a small store, on a disk that is said to have room: what the error says, or ``None``."""
    gradindex.store.layout.free_bytes = lambda folder: 1 << 40  # the room was there when the build began
    options: dict[str, Any] = {"projection": Projection("none"), "batch_size": 100, "shard_rows": 400}
    try:
        gradindex.build(make_task(8000, task_folder), folder, **options)
    except StoreError as error:
        return str(error)
    return None


def full_disk(bench: Bench, times: int) -> None:
    """Builds on a small memory disk that is full at a random point; then it gets room, and the build goes on."""
    with tempfile.TemporaryDirectory(prefix="gradindex-disk-") as name:
        folder = Path(name) / "disk"
        folder.mkdir()
        generator, clean = np.random.default_rng(4), 0
        whole = None
        for number in range(times + 1):
            size = "64m" if number == 0 else f"{int(generator.integers(64, 16_000))}k"
            mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
            if subprocess.run(mounted, stderr=subprocess.DEVNULL, check=False).returncode:
                print("full disk: left out, for mounting a memory disk needs the rights of root")
                return
            try:
                first = bench.in_a_process(toy, folder / "store", Path(name))
                if number == 0:
                    whole = contents(folder / "store")
                    continue
                said = first and "cannot be written: No space left on device. Finished work is kept." in first
                subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
                again = bench.in_a_process(toy, folder / "store", Path(name))
                clean += bool(said) and again is None and contents(folder / "store") == whole
            finally:
                subprocess.run(["umount", str(folder)], check=True)
        bench.bar(
            f"full disk at {times} random points: a clean error, and the build goes on", clean / times, "share", 1
        )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that lasts."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "log.jsonl"
    }


def row_types(bench: Bench, folder: Path) -> None:
    """MNIST task: what the rows' type costs in recall, by the rows alone and after re-scoring."""
    import mnist

    task = mnist.task()
    queries = range(20 if bench.quick else task.n_query)
    task = replace(task, query=Subset(task.query, queries), query_columns={})
    if bench.quick:
        task = replace(task, train=Subset(task.train, range(400)), columns={}, checkpoints=task.checkpoints[-2:])
    truth = gradindex.exact_scores(task, [task.query[i] for i in queries])
    for row_type in ROW_TYPES:
        store = gradindex.build(task, folder / row_type, row_type=row_type)
        retriever = gradindex.load(task, store.folder)
        size = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
        bench.figure(f"MNIST, {row_type}: bytes on disk a row", size / store.n_train, "bytes")
        proposed = retriever.proponents(queries, k=100, rerank="rows").ids
        settled = retriever.proponents(queries, k=100, candidates=1000).ids
        bench.figure(f"MNIST, {row_type}: recall@100 of the rows alone", recall_at_k(truth, proposed, 100).mean(), "")
        value, label = recall_at_k(truth, settled, 100).mean(), f"MNIST, {row_type}: recall@100 after re-scoring"
        bench.bar(label, value, "", 0.98) if row_type == "int8" else bench.figure(label, value, "")
        shutil.rmtree(store.folder)


if __name__ == "__main__":
    main()
