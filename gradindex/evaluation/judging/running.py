"""Making retrainings: here or in several processes, those that are missing, with progress and time left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import overload

import numpy as np
import torch

from ...errors import ArgumentError, TaskError, WorkerError, as_whole
from ...forking import one_thread_in_children
from ...progress import progress
from ...store import Part, check_part
from ...task import Task
from .measures import Array
from .retrainings import BATCH_SIZE, Job, Retrainings
from .subsets import Subsets
from .truth import GroundTruth

Seeds = int | Sequence[int]
_Made = tuple[Array, float] | None

# How often a process looks whether the one that started it is there.
_WATCH_S = 0.5


@overload
def retrain(
    task: Task,
    out: str | os.PathLike[str],
    subsets: Subsets,
    *,
    seeds: Seeds = 2,
    processes: int = 1,
    part: None = None,
    batch_size: int = BATCH_SIZE,
) -> GroundTruth: ...


@overload
def retrain(
    task: Task,
    out: str | os.PathLike[str],
    subsets: Subsets,
    *,
    seeds: Seeds = 2,
    processes: int = 1,
    part: Part | None,
    batch_size: int = BATCH_SIZE,
) -> GroundTruth | None: ...


def retrain(
    task: Task,
    out: str | os.PathLike[str],
    subsets: Subsets,
    *,
    seeds: Seeds = 2,
    processes: int = 1,
    part: Part | None = None,
    batch_size: int = BATCH_SIZE,
) -> GroundTruth | None:
    """Train a model on each subset with each seed, and keep the losses of the task's queries; call again to resume.

    What is done lies in ``out`` and is not done again, for whichever scores it was. Several processes, also on other
    machines, may work in the same folder: each takes trainings that nobody is at.

    Args:
        task: with ``train_model`` and queries.
        out: a new or empty folder, or one with retrainings of this task.
        subsets: (m, n) bool over the task's ``train_ids``, see :func:`random_subsets` and :func:`all_but`.
        seeds: different numbers that go to ``train_model``, or how many: 0, 1 and so on.
        processes: how many train at a time, each with one thread; forks of this one.
        part: (i, n), only every n-th training, from the i-th on.
        batch_size: queries of a pass; 1 where losses mix the examples of a batch.

    Returns:
        The losses; ``None`` for a part.

    Raises:
        TaskError: there is no ``train_model``, or it returned another model, or ignores the ids.
        UserCodeError: ``train_model`` failed; names the subset and the seed.
        LossError: a loss is not finite; names the query.
        MismatchError, StoreError: the folder cannot be used.
        ArgumentError: a number is out of range.
    """
    check_part(part)
    if subsets.ndim != 2 or subsets.shape[1] != len(task.train_ids) or subsets.dtype != np.bool_:
        raise ArgumentError(
            f"subsets have shape {subsets.shape} and type {subsets.dtype}, but must be bool of shape "
            f"(m, {len(task.train_ids)}), a place for each of the task's training ids."
        )
    retrainings = Retrainings(task, out, batch_size)
    jobs = retrainings.jobs(subsets, seeds if isinstance(seeds, Sequence) else range(as_whole("seeds", seeds)))
    mine = jobs if part is None else jobs[part[0] - 1 :: part[1]]
    done = completed(retrainings, mine, processes, jobs)
    if part is not None:
        return None
    losses = np.stack([done[job.name][0] for job in jobs]).reshape(-1, len(subsets), task.n_query)
    return GroundTruth(task.train_ids, subsets, losses, sum(seconds for _, seconds in done.values()))


def completed(
    retrainings: Retrainings, jobs: Sequence[Job], processes: int = 1, known: Sequence[Job] = ()
) -> dict[str, tuple[Array, float]]:
    """The losses (n_query,) of all jobs by name, and the seconds that each training took; what is missing is made.

    Args:
        retrainings: the folder.
        jobs: which.
        processes: as for :func:`retrain`.
        known: further ones, whose results are compared with the others where they are there.

    Raises:
        ArgumentError: there cannot be so many processes here.
    """
    if as_whole("processes", processes) < 1:
        raise ArgumentError(f"processes is {processes}, but must be at least 1.")
    if processes > 1 and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        raise ArgumentError(
            f"processes is {processes}, but this process uses CUDA, which a fork cannot. Start several commands with "
            "--part I/N."
        )
    done = dict[str, tuple[Array, float]]()
    check = _Differences(retrainings)
    for job in [*jobs, *known]:
        if job.name not in done and (found := retrainings.known(job)) is not None:
            check.add(job, found[0])
            done[job.name] = found
    missing = list({job.name: job for job in jobs if job.name not in done}.values())
    if missing:
        made = _made(retrainings, missing, min(processes, len(missing)))
        with closing(made), progress("retrain", len(jobs), "trainings", len(jobs) - len(missing)) as advance:
            for job, found in made:
                check.add(job, found[0])
                done[job.name] = found
                advance(1)
    return done


class _Differences:
    """Refuses two trainings with one seed on different subsets whose losses are the same in every bit."""

    def __init__(self, retrainings: Retrainings) -> None:
        self._retrainings, self._first = retrainings, dict[tuple[int, bytes], Job]()

    def add(self, job: Job, losses: Array) -> None:
        """Compare a training with those before.

        Raises:
            TaskError: it is the same; both results are deleted.
        """
        first = self._first.setdefault((job.seed, losses.tobytes()), job)
        if first.name != job.name:
            self._retrainings.forget(first, job)
            raise TaskError(
                f"train_model ignores its ids, or trains nothing: all losses after training on {first} and on {job} "
                "are the same in every bit. Train on the examples of ids alone."
            )


def _made(
    retrainings: Retrainings, jobs: Sequence[Job], processes: int
) -> Generator[tuple[Job, tuple[Array, float]], None, None]:
    """Trainings as they end; those that another command is at come last."""
    if processes == 1:
        ended: Iterator[tuple[Job, _Made]] = ((job, retrainings.make(job)) for job in jobs)
    else:
        ended = _in_processes(retrainings, jobs, processes)
    others = []
    for job, found in ended:
        if found is None:
            others.append(job)
        else:
            yield job, found
    for job in others:
        found = retrainings.make(job, wait=True)
        assert found is not None  # it waited
        yield job, found


# What forked processes work on: handed on by the fork, for functions of a task's file may not be pickled.
_shared: tuple[Retrainings, Sequence[Job]] | None = None


def _in_processes(retrainings: Retrainings, jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, _Made]]:
    one_thread_in_children("torch", torch.set_num_threads)
    fork = multiprocessing.get_context("fork")
    with _sharing(retrainings, jobs), ProcessPoolExecutor(processes, fork, _end_with, (os.getpid(),)) as pool:
        try:
            with warnings.catch_warnings():
                # Of threads at a fork: children compute with one thread, see gradindex/forking.py.
                warnings.simplefilter("ignore", DeprecationWarning)
                futures: dict[Future[_Made], Job] = {pool.submit(_make, n): job for n, job in enumerate(jobs)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise WorkerError(
                "A process that trains died; what was finished is kept. If memory ran out, use fewer processes."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _sharing(retrainings: Retrainings, jobs: Sequence[Job]) -> Iterator[None]:
    global _shared
    _shared = retrainings, jobs
    try:
        yield
    finally:
        _shared = None


def _end_with(parent: int) -> None:
    """Have this process end at once where its parent is interrupted or dies: what is half trained is of no use."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make(number: int) -> _Made:
    assert _shared is not None  # in a fork
    retrainings, jobs = _shared
    return retrainings.make(jobs[number])
