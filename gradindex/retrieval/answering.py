"""What was found as hits: ids and scores side by side, with columns and what the task shows of each example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..choices import AnswerKind
from ..gaps import with_gaps
from ..store import GradientStore
from ..task import Task
from .asking import Queries
from .hits import Hits, LookedUp
from .ranking import Ranked
from .scoring import scored_as
from .stages import Answer

# What scores are called that are not exact, by the stage that they come from.
_ESTIMATED: Mapping[str, str] = {"wide": "wide-estimated", "rows": "projected", "index": "index-estimated"}
# Hits from which on columns are looked up when they are asked for, and not kept.
_KEPT_COLUMNS = 1 << 18


def hits_of(task: Task, store: GradientStore, queries: Queries, kind: AnswerKind, answer: Answer, measure: str) -> Hits:
    """An answer as hits.

    Args:
        task: says what to show of an example.
        store: where columns are looked up.
        queries: that were answered.
        kind: of the answer.
        answer: what was found; each list of it is let go.
        measure: what the scores are.
    """
    show, group = task.show, queries.weights is not None
    ids, scores = _rectangular(answer.found)
    return Hits(
        ids=ids,
        scores=scores,
        kind=kind,
        scored=scored_as(store) if answer.last == "exact" else _ESTIMATED[answer.last],
        queries=queries.names,
        stages=answer.stages,
        measure=measure,
        columns=_columns(store, ids),
        query_columns={} if group else {name: with_gaps(v) for name, v in queries.examples.columns.items()},
        show_train=None if show is None else lambda i: task.shown(task.examples([i])[0], f"id {i}"),
        show_query=None
        if show is None or group
        else lambda row: task.shown(queries.examples.items[row], queries.names[row]),
    )


def _rectangular(found: list[Ranked]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Ids and scores as wide as the longest answer: -1 and NaN behind shorter ones. Each one given is let go."""
    width = max(len(ids) for ids, _ in found)
    ids = np.empty((len(found), width), dtype=np.int64)
    scores = np.empty((len(found), width), dtype=np.result_type(*(scores for _, scores in found)))
    for row in range(len(found)):
        query_ids, query_scores = found[row]
        count = len(query_ids)
        ids[row, :count], scores[row, :count] = query_ids, query_scores
        ids[row, count:], scores[row, count:] = -1, np.nan
        found[row] = query_ids[:0], query_scores[:0]
    return ids, scores


def _columns(store: GradientStore, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
    """Columns of hits, looked up now; of very many when they are asked for."""
    later = LookedUp(store.columns, store.column, ids)
    return later if ids.size > _KEPT_COLUMNS else dict(later)
