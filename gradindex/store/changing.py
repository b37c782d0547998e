"""Being the only one that changes a complete store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StoreError
from .claiming import claimed, clean
from .documents import PENDING
from .job import Job
from .reader import GradientStore


@contextmanager
def changing(folder: str | os.PathLike[str], kind: str = "") -> Iterator[GradientStore]:
    """A complete store that no other process changes, and whose unfinished job, if any, is a ``kind``.

    Raises:
        StoreError: there is no store, another process has it, or another job is unfinished.
    """
    GradientStore(folder)  # before anything is written into a folder that may be another's
    with claimed(Path(folder)):
        store = GradientStore(folder)
        job = Job.pending(store.folder)
        if job is not None and job.kind != kind:
            raise StoreError(
                f"{store.folder} has an unfinished `{job.kind}`. Rerun the same command to finish it, or delete "
                f"{store.folder / PENDING} to abandon it."
            )
        if job is None:
            clean(store.folder)
        yield store
