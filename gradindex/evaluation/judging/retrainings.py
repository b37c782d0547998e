"""Models trained anew on subsets, as jobs: of each only the losses of all queries are kept, in a file of its own."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...digests import digest
from ...errors import ArgumentError, LossError, MismatchError, StoreError, TaskError, UserCodeError, as_whole, user_code
from ...files import discard, locked, read_checked, storing, write_checked
from ...gradients import QueryLosses
from ...task import Task, spread
from ...tree import preserved_random_state
from .measures import Array
from .subsets import Subsets

# What a folder of retrainings is known by, and its version.
_DOCUMENT, _KIND, _VERSION = "retrainings.json", "gradindex retrainings", 1
# Locks of those who train just now.
_CLAIMS = "claims"
# Queries of a pass.
BATCH_SIZE = 256
# Examples and queries whose values stand for all.
_SAMPLED = 64
# By key of the document, what people call it.
_TOLD = {
    "ids": "which training examples there are",
    "train": "training examples",
    "n_query": "number of queries",
    "query": "queries",
    "model": "parameters of the model",
}


@dataclass(frozen=True, eq=False)
class Job:
    """One training.

    Args:
        number: of the subset.
        subset: (n,) bool.
        seed: of the training.
        name: of the file with its result: a digest of the ids, and the seed.
    """

    number: int
    subset: NDArray[np.bool_]
    seed: int
    name: str

    def __str__(self) -> str:
        return f"subset {self.number} ({int(self.subset.sum()):,} examples), seed {self.seed}"


class Retrainings:
    """A folder of retrainings of one task, which processes, methods and geometries share.

    A result depends on the ids that were trained on, the seed, the task's data, its queries and its model's shape, and
    on the code of ``train_model`` and of the losses: where the code changes, take another folder.

    Args:
        task: with ``train_model`` and queries.
        folder: a new or empty one, or one that holds retrainings of this task.
        batch_size: queries of a pass; 1 where losses mix the examples of a batch.

    Raises:
        TaskError: the task has no ``train_model`` or no queries.
        MismatchError: the folder's retrainings are of other data or another model; says what differs.
        StoreError: the folder holds something else, or cannot be written.
    """

    def __init__(self, task: Task, folder: str | os.PathLike[str], batch_size: int = BATCH_SIZE) -> None:
        if task.train_model is None:
            raise TaskError(
                "The task has no train_model, so nothing can be retrained. Give Task(train_model=...), a function "
                "(ids, seed) -> model, or ground truth that was made elsewhere."
            )
        self._task, self._train = task, task.train_model
        self._losses = QueryLosses(task, batch_size)
        self.folder = Path(folder)
        self._begin()

    @property
    def ids(self) -> NDArray[np.int64]:
        """(n,) int64, the training examples that subsets are drawn from."""
        return self._task.train_ids

    def jobs(self, subsets: Subsets, seeds: Sequence[int]) -> list[Job]:
        """All trainings, the first seed's first.

        Raises:
            ArgumentError: a seed repeats or is negative, there is none, or a subset is empty.
        """
        whole = [as_whole("seed", seed) for seed in seeds]
        if not whole or len(set(whole)) < len(whole) or min(whole) < 0:
            raise ArgumentError(
                f"seeds are {whole}, but must be different numbers from 0 on, at least one. A seed that repeats would "
                "give the same model."
            )
        if not subsets.any(1).all():
            raise ArgumentError(f"Subset {int(np.argmin(subsets.any(1)))} is empty. Give at least one training id.")
        names = [hashlib.sha256(self.ids[subset].astype("<i8").tobytes()).hexdigest()[:24] for subset in subsets]
        return [
            Job(number, subset, seed, f"{name}-{seed}.json")
            for seed in whole
            for number, (subset, name) in enumerate(zip(subsets, names, strict=True))
        ]

    def known(self, job: Job) -> tuple[Array, float] | None:
        """The losses (n_query,) of a training that was made, and the seconds it took; ``None`` if it was not.

        Raises:
            StoreError: the file is damaged.
        """
        path = self.folder / job.name
        try:
            found = read_checked(path)
            losses = np.array(found["losses"], dtype=np.float64)
            if losses.shape != (self._task.n_query,) or found["seed"] != job.seed:
                raise ValueError("it is of another training")
            return losses, float(found["seconds"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged ({error}). Delete it, and it will be made again.") from None

    def make(self, job: Job, wait: bool = False) -> tuple[Array, float] | None:
        """Train, unless that was done, and keep the losses.

        Args:
            job: which.
            wait: for another process that is at it.

        Returns:
            As :meth:`known`; ``None`` where another process is at it.

        Raises:
            UserCodeError: ``train_model`` or the loss failed; names the subset and the seed.
            TaskError: ``train_model`` returned no such model.
            LossError: a loss is not finite; names the query.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / _CLAIMS / job.name, wait=wait))
            except StoreError:
                if wait:
                    raise
                return None
            if (found := self.known(job)) is not None:
                return found
            started = time.perf_counter()
            losses = self._losses_of(self._trained(job), job)
            seconds = time.perf_counter() - started
            with storing(self.folder):
                value = {"seed": job.seed, "examples": int(job.subset.sum()), "seconds": round(seconds, 3)}
                write_checked(self.folder / job.name, {**value, "losses": losses.tolist()})
            return losses, seconds

    def forget(self, *jobs: Job) -> None:
        """Delete results that cannot be right."""
        discard(*(self.folder / job.name for job in jobs))

    def _trained(self, job: Job) -> nn.Module:
        with preserved_random_state():
            # A function that draws without seeding trains by its seed as well.
            torch.manual_seed(job.seed)
            np.random.seed(job.seed % 2**32)
            random.seed(job.seed)
            with torch.enable_grad(), user_code(f"train_model ({job})"):
                model = self._train(self.ids[job.subset], job.seed)
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"train_model ({job}) returned a {type(model).__name__}, but must return the trained torch.nn.Module."
            )
        if model is self._task.model:
            raise TaskError(
                f"train_model ({job}) returned the task's own model, so that each training would go on from the one "
                "before. Create a new model in each call."
            )
        return model

    def _losses_of(self, model: nn.Module, job: Job) -> Array:
        try:
            losses = self._losses.of(model)
        except UserCodeError:
            raise
        except TaskError as error:
            raise TaskError(f"What train_model ({job}) returned does not fit: {error}") from None
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            more = f" ({len(bad)} queries have no finite loss)" if len(bad) > 1 else ""
            raise LossError(
                f"The loss of query {bad[0]} is {losses[bad[0]]} under the model of train_model ({job}){more}. Lower "
                "the learning rate if the training diverged, or leave the query out."
            )
        return losses

    def _begin(self) -> None:
        document = self._document()
        path = self.folder / _DOCUMENT
        with storing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                others = [one for one in sorted(self.folder.iterdir()) if not one.name.startswith(f"{_DOCUMENT}.tmp-")]
                if others and not path.exists():
                    raise StoreError(
                        f"{self.folder} holds other files, such as {others[0].name}. Choose a new folder for "
                        "retrainings."
                    )
                write_checked(path, document)
            (self.folder / _CLAIMS).mkdir(exist_ok=True)
        try:
            found = read_checked(path)
        except ValueError as error:
            raise StoreError(f"{path} is damaged ({error}). Choose another folder.") from None
        if (found.get("kind"), found.get("version")) != (_KIND, _VERSION):
            raise StoreError(f"{path} is no document of retrainings that this version reads. Choose another folder.")
        differing = [told for key, told in _TOLD.items() if found.get(key) != document[key]]
        if differing:
            raise MismatchError(
                f"{self.folder} holds retrainings of another task: {'; '.join(differing)} differ. "
                "Choose another folder."
            )

    def _document(self) -> dict[str, Any]:
        task = self._task
        shapes = [(name, tuple(parameter.shape)) for name, parameter in task.model.named_parameters()]
        with preserved_random_state():
            some = spread(self.ids, _SAMPLED)
            examples = digest(list(zip(some.tolist(), task.examples(some), strict=True)), task.data_sets)
            places = spread(np.arange(task.n_query), _SAMPLED)
            queries = digest([task.query[int(place)] for place in places], task.data_sets)  # type: ignore[index]
        return {
            "kind": _KIND,
            "version": _VERSION,
            "ids": hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest(),
            "train": examples.hex(),
            "n_query": task.n_query,
            "query": queries.hex(),
            "model": digest(shapes).hex(),
        }
