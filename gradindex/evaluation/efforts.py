"""How far a search with an index must go for a recall, for proponents and for opponents each, and what that takes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..choices import AnswerKind
from ..index import Shape
from ..retrieval.candidates import Candidates, Effort, candidates_for
from ..retrieval.leading import leads, narrowed
from ..retrieval.scoring import of_candidates
from ..store import GradientStore
from .truth import Truth, lower_bound

Efforts: TypeAlias = Mapping[AnswerKind, Effort]

# Opponents are searched with the negated query.
SIGNS: Mapping[AnswerKind, int] = {"proponents": 1, "opponents": -1}
_PROPOSALS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 28, 40)  # times k
# Of these, how many get exact scores where they can be narrowed; times k.
_EXACT = (1, 1.1, 1.2, 1.35, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8)
_TIMED = 40
# Comparing all rows is timed once where it takes so many seconds.
_LONG = 5.0
# Steps that go further than what is fastest.
_FURTHER = 2
# More lists are given up once the recall has fallen so many times in a row.
_FALLS = 2


@dataclass(frozen=True)
class Choice:
    """An index that reached the recall with the queries that it was tuned with.

    Args:
        shape: of the index.
        efforts: how far a search goes.
        milliseconds: what a query takes, the mean over both kinds.
        at_least: the lower bound of the recall of the worse kind.
    """

    shape: Shape
    efforts: Efforts
    milliseconds: float
    at_least: float


@dataclass(frozen=True)
class _Step:
    effort: Effort
    milliseconds: float
    at_least: float


def choices(
    store: GradientStore, search: Candidates, shape: Shape, truth: Truth, recall: float
) -> tuple[list[Choice], float]:
    """What answers fastest, few lists and many proposals or many lists and few proposals; and the best recall of any.

    After the fastest come two that go further, for when the fastest does not hold with other queries.
    """
    steps, best = {}, 1.0
    for kind in SIGNS:
        steps[kind], reached = _steps(store, search, shape, truth, recall, kind)
        best = min(best, reached)
    if not all(steps.values()):
        return [], best
    found = []
    for each in zip(*steps.values(), strict=True):
        efforts = {kind: step.effort for kind, step in zip(steps, each, strict=True)}
        taken = float(np.mean([step.milliseconds for step in each]))
        found.append(Choice(shape, efforts, taken, min(step.at_least for step in each)))
    return found, best


def _steps(
    store: GradientStore, search: Candidates, shape: Shape, truth: Truth, recall: float, kind: AnswerKind
) -> tuple[list[_Step], float]:
    """Of one kind, the fastest and what goes further; none where no effort reaches the recall."""
    every, sign = shape.method.probes, SIGNS[kind]
    first, best = _first(search, truth, recall, every, sign)
    if first is None:
        return [], best
    fastest: _Step | None = None
    for probes in every[first:]:
        proposals, reached = fewest_proposals(search, truth, recall, probes, sign)
        best = max(best, reached)
        if proposals is None:
            break  # lost among the others of so many lists
        if fastest is not None and proposals >= fastest.effort.proposals:
            break  # more lists only take longer
        efforts = [Effort(probes, proposals), *_narrower(store, search, truth, recall, probes, proposals, sign)]
        timed = [(milliseconds(store, search, truth, effort, truth.k, sign), effort) for effort in efforts]
        taken, effort = min(timed, key=lambda each: each[0])
        step = _Step(effort, taken, reached)
        if fastest is not None and step.milliseconds > fastest.milliseconds:
            break
        fastest = step
    if fastest is None:
        return [], best
    found, effort = [fastest], fastest.effort
    for _ in range(_FURTHER):
        lists = [probes for probes in every if probes > effort.probes]
        more = [count for count in counts(search.n_train, truth.k) if count > effort.proposals]
        exact = None
        if effort.exact is not None:
            exact = next((count for count in _times(_EXACT, truth.k) if count > effort.exact), effort.exact)
        effort = Effort((lists or [effort.probes])[0], (more or [effort.proposals])[0], exact)
        taken = milliseconds(store, search, truth, effort, truth.k, sign)
        reached = lower_bound(truth.recalls(sign, *handed(store, search, truth, effort, sign)), truth.k)
        found.append(_Step(effort, taken, reached))
    return found, best


def _narrower(
    store: GradientStore, search: Candidates, truth: Truth, recall: float, probes: int, proposals: int, sign: int
) -> list[Effort]:
    """Efforts that score fewer exactly: the fewest of these proposals, and of more, that reach the recall."""
    if truth.factors is None or not narrowing(store, truth):
        return []
    tried = [count for count in counts(search.n_train, truth.k) if count >= proposals][: 1 + _FURTHER]
    ordered = _proposed(search, truth, tried[-1] + 1, probes, sign)
    found = []
    for count in tried:
        best = narrowed(store, truth.factors, sign, ordered[:, : count + 1], _times(_EXACT, truth.k)[-1] + 1)
        for exact in _times(_EXACT, truth.k):
            if exact >= count:
                break
            if lower_bound(truth.recalls(sign, best, exact), truth.k) >= recall:
                found.append(Effort(probes, count, exact))
                break
    return found


def narrowing(store: GradientStore, truth: Truth) -> bool:
    """Whether the largest entries of packed factors can tell which proposals get exact scores."""
    return truth.factors is not None and leads(store)


def handed(
    store: GradientStore, search: Candidates, truth: Truth, effort: Effort, sign: int
) -> tuple[NDArray[np.int64], int]:
    """What is handed on to exact scores, the best first, and how many that are; one more, for the query itself."""
    proposed = _proposed(search, truth, effort.proposals + 1, effort.probes, sign)
    if effort.exact is None or truth.factors is None:
        return proposed, effort.proposals
    return narrowed(store, truth.factors, sign, proposed, effort.exact + 1), effort.exact


def _first(search: Candidates, truth: Truth, recall: float, every: list[int], sign: int) -> tuple[int | None, float]:
    """The place of the fewest lists that reach the recall with as many proposals as there may be; and the best recall.

    From the fewest lists on, for more hold more of the true ones but also more others, among which a short code may
    lose them: the recall of so many proposals rises, and then it may fall.
    """
    most, best, falls = counts(search.n_train, truth.k)[-1], 0.0, 0
    for place, probes in enumerate(every):
        proposed = _proposed(search, truth, most + 1, probes, sign)
        reached = lower_bound(truth.recalls(sign, proposed, most), truth.k)
        if reached >= recall:
            return place, reached
        falls = falls + 1 if reached < best else 0
        best = max(best, reached)
        if falls == _FALLS:
            break
    return None, best


def counts(n_train: int, k: int) -> list[int]:
    """How many proposals are tried: never all rows, of which no index is asked."""
    return sorted({min(count, max(1, n_train - 1)) for count in _times(_PROPOSALS, k)})


def _times(shares: Sequence[float], k: int) -> list[int]:
    return sorted({math.ceil(times * k) for times in shares})


def _proposed(search: Candidates, truth: Truth, most: int, probes: int, sign: int) -> NDArray[np.int64]:
    """The ids that the index proposes; one more than count, for it may be the query itself."""
    assert search.index is not None
    return search.index.search(sign * truth.rows, min(most, search.n_train), probes=probes)[1]


def fewest_proposals(
    search: Candidates, truth: Truth, recall: float, probes: int, sign: int
) -> tuple[int | None, float]:
    """How many reach the recall with so many lists, or ``None``; and the recall that was reached."""
    tried = counts(search.n_train, truth.k)
    proposed = _proposed(search, truth, tried[-1] + 1, probes, sign)
    reached = 0.0
    for count in tried:
        reached = lower_bound(truth.recalls(sign, proposed, count), truth.k)
        if reached >= recall:
            return count, reached
    return None, reached


def milliseconds(
    store: GradientStore, search: Candidates, truth: Truth, effort: Effort | None, k: int, sign: int = 1
) -> float:
    """What a query asked alone takes to find its candidates, and to score or read them: the median of some.

    Each is asked twice, for the first time also verifies blocks and brings them to memory.
    """
    seconds, count = [], _TIMED if effort else _TIMED // 8  # comparing all rows takes long, and about as long each time
    for place, row in zip(store.spread_ids(count), truth.rows[:: max(1, len(truth.rows) // count)], strict=False):
        # Whose factors are compared makes no difference in time.
        asked = None if truth.factors is None else store.factors(np.array([place]))
        for _ in range(2):
            started = time.perf_counter()
            if effort is None:
                ids = search.search(row[None], min(candidates_for(k), store.n_train))[1][0]
            else:
                ids = search.propose(sign * row[None], effort.proposals, effort, k)[1]
                if effort.exact is not None and asked is not None:
                    ids = narrowed(store, asked, sign, ids, effort.exact)
                ids = ids[0]
            ids = np.sort(ids[ids >= 0])
            if asked is None:
                store.rows(ids)
            else:
                of_candidates(store, asked, [ids])
            taken = time.perf_counter() - started
            if effort is None and taken > _LONG:
                return 1000 * taken  # no index is slower, whatever the next would take
        seconds.append(taken)
    return 1000 * float(np.median(seconds))
