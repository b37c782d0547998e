"""What a build will take, from its plan and a few timed batches."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from .rows import RowMaker
from .task import Task

# Batches are timed until they have taken as long, in twice the size each time: a whole one where that is quick.
_TIMED_S = 8.0
_FIRST_SIZE = 4
# From so many checkpoints, and numbers of each, scores predict retraining well (docs/quality.md).
_CHECKPOINTS, _NUMBERS = 5, 1024


@dataclass(frozen=True)
class Estimate:
    """What a build will take, see :func:`gradindex.building.estimate`; prints as a table.

    Args:
        rows: how many there are to make, in all or in a part.
        rows_done: how many of these are made already.
        dim: numbers in a row.
        row_bytes: on disk, of a row with all that stands beside it.
        factor_bytes: of these, exact factors.
        wide_bytes: of these, wide rows.
        n_checkpoints: how many blocks a row has.
        disk_bytes: of the whole store.
        disk_left_bytes: of these, what is still to be written.
        free_bytes: on the disk of the store.
        weight_bytes: of the model at all checkpoints, on the device.
        pass_bytes: of a batch, beside these.
        batch_size: examples per pass.
        workers: processes that read.
        read_s: seconds to read a row's example, by one process.
        compute_s: seconds to compute a row.
        fitting_rows: how many rows are computed to fit the projection before.
    """

    rows: int
    rows_done: int
    dim: int
    row_bytes: int
    factor_bytes: int
    disk_bytes: int
    disk_left_bytes: int
    free_bytes: int
    weight_bytes: int
    pass_bytes: int
    batch_size: int
    workers: int
    read_s: float
    compute_s: float
    fitting_rows: int = 0
    wide_bytes: int = 0
    n_checkpoints: int = 1

    @property
    def row_s(self) -> float:
        """Seconds a row: reading and computing in turn, or the slower of both where workers read."""
        return max(self.compute_s, self.read_s / self.workers) if self.workers else self.read_s + self.compute_s

    @property
    def seconds(self) -> float:
        """Seconds for what is still to be done, writing not included."""
        return self.row_s * (self.rows - self.rows_done) + (self.read_s + self.compute_s) * self.fitting_rows

    @property
    def fits(self) -> bool:
        """Whether the disk has room for what is still to be written."""
        return self.disk_left_bytes <= self.free_bytes

    def __str__(self) -> str:
        done = f", {self.rows_done:,} of them done" if self.rows_done else ""
        factors = f", {_size(self.factor_bytes)} of it exact factors" if self.factor_bytes else ""
        factors += f", {_size(self.wide_bytes)} of it wide rows" if self.wide_bytes else ""
        readers = {0: "the same process", 1: "1 process"}.get(self.workers, f"{self.workers} processes")
        lines = (
            f"rows    {self.rows:,} of {self.dim:,} numbers{done}",
            f"disk    {_size(self.disk_bytes)} in all ({_size(self.row_bytes)} a row{factors}), "
            f"{_size(self.disk_left_bytes)} still to write; {_size(self.free_bytes)} free"
            + ("" if self.fits else ": NOT ENOUGH"),
            f"memory  {_size(self.weight_bytes)} for weights, {_size(self.pass_bytes)} for a batch of "
            f"{self.batch_size}, beside Python and PyTorch",
            f"time    about {_duration(self.seconds)}, {1 / self.row_s:,.3g} rows/s (computing "
            f"{self.compute_s * 1e3:.3g} ms a row, reading {self.read_s * 1e3:.3g} ms a row in {readers})",
            f"aims    {self._aims}",
        )
        return "\n".join(lines)

    @property
    def _aims(self) -> str:
        """Whether checkpoints and numbers suit what scores are for; measured, see docs/quality.md."""
        each = self.dim // self.n_checkpoints
        few = self.n_checkpoints < _CHECKPOINTS
        checkpoints = f"{self.n_checkpoints} checkpoint{'s' * (self.n_checkpoints != 1)} of {each:,} numbers"
        if not few and each >= _NUMBERS:
            return f"{checkpoints} suit scores that predict retraining (geometry whitened), if most are early ones"
        lacking = " and ".join(
            [f"{_CHECKPOINTS} checkpoints or more, most of them early"] * few
            + [f"{_NUMBERS:,} numbers of each"] * (each < _NUMBERS)
        )
        return f"{checkpoints}; scores that predict retraining (geometry whitened) want {lacking}"


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            break
        n /= 1000
    return f"{n:,.3g} {unit}"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:,.2g} seconds"


def timed(maker: RowMaker, task: Task, batch_size: int) -> tuple[float, float]:
    """Seconds to read an example and to compute its row, measured on batches drawn at random.

    The first batch only warms up. Reading is timed in this process.
    """
    generator, ids = np.random.default_rng(0), task.train_ids
    spent, size, seconds = 0.0, min(_FIRST_SIZE, batch_size), (0.0, 0.0)
    # Where the weights of one checkpoint are held at a time, all examples are read once for each.
    n_checkpoints = maker.engine.n_checkpoints
    turn, passes = ([0], n_checkpoints) if maker.engine.states.one_at_a_time else (range(n_checkpoints), 1)
    warm = False
    while True:
        chosen = np.sort(generator.choice(ids, min(size, len(ids)), replace=False))
        started = time.perf_counter()
        examples = task.read(chosen)
        read = time.perf_counter()
        maker.blocks(examples, turn)
        ended = time.perf_counter()
        spent += ended - started
        seconds = passes * (read - started) / len(examples), passes * (ended - read) / len(examples)
        if warm and (size >= min(batch_size, len(ids)) or 2 * (ended - started) + spent > _TIMED_S):
            return seconds
        size = min(2 * size, batch_size) if warm else size
        warm = True
