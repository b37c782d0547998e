"""Reading a whole store to see whether it is undamaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StoreChangedError, StoreError
from ..progress import progress
from .layout import Expected
from .manifest import Manifest, ShardEntry
from .moments import problem_of_moments
from .shards import check_unchanged, problem_of

if TYPE_CHECKING:
    from .reader import GradientStore


def damaged(folder: Path, entries: Sequence[ShardEntry], manifest: Manifest) -> Iterator[tuple[int, str]]:
    """Numbers of the damaged shards, and for each a sentence that names the file and the ids in it."""
    expected = Expected(manifest)
    with progress("verifying", sum(entry.rows for entry in entries), "rows") as advance:
        for number, entry in enumerate(entries):
            problem = problem_of(folder, entry, expected)
            if problem:
                yield number, problem
            advance(entry.rows)


def problems_of(store: GradientStore) -> list[str]:
    """See :meth:`GradientStore.verify`."""
    problems = [problem for _, problem in store.damaged()]
    try:
        store.bases()
    except StoreChangedError:
        raise
    except StoreError as error:
        problems.append(str(error))
    if wrong := problem_of_moments(store):
        problems.append(wrong)
    if problems:
        check_unchanged(store.folder, store.manifest)
    return problems
