"""A question that nobody asked: libraries set up much at their first, which is then no user's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from ..choices import AnswerKind
from ..errors import GradIndexError, StoreError
from ..gradients import Engine, Geometry
from ..store import GradientStore
from ..task import Task
from .answering import hits_of
from .asking import Queries
from .candidates import Candidates
from .question import Question
from .scoring import through_model
from .searcher import LocalSearcher
from .stages import Search


def rehearsal(
    task: Task,
    store: GradientStore,
    geometry: Geometry,
    prepared: Callable[[], Queries],
    computing: Callable[[], AbstractContextManager[Engine]],
) -> tuple[Callable[[GradientStore, Candidates], None] | None, str]:
    """Compute a query's gradients, and those of a training example where exact scores go through the model.

    Both run code of the user's, and so in this thread.

    Args:
        task: says what to show of an example.
        store: a complete one.
        geometry: of the store.
        prepared: prepares a query.
        computing: locks the model.

    Returns:
        The rest of the question, which takes arrays alone and can be asked in any thread; or ``None`` and a sentence
        that says why there is none.

    Raises:
        StoreError: the store is damaged.
    """
    try:
        queries = prepared()
        if not store.has_factors:
            with computing() as engine:  # another query, for this one would keep its whole gradients
                for _ in through_model(engine, prepared(), store.spread_ids(1), store.manifest.batch_size):
                    pass
    except StoreError:
        raise
    except GradIndexError as error:
        return None, f"no question could be tried ({error})"
    return partial(_asked, task, geometry, queries, computing), ""


def _asked(
    task: Task,
    geometry: Geometry,
    queries: Queries,
    computing: Callable[[], AbstractContextManager[Engine]],
    store: GradientStore,
    candidates: Candidates,
) -> None:
    """From the query's row to hits, both kinds, as far as it takes no model."""
    kinds: list[AnswerKind] = ["proponents", "opponents"]
    question = Question(rerank="rows" if queries.factors is None else "exact")
    searcher = LocalSearcher(store, candidates, computing, queries, None, geometry)
    for kind, answer in zip(kinds, Search(searcher, queries.vectors, question, kinds).answers(), strict=True):
        hits_of(task, store, queries, kind, answer, geometry.measure)
