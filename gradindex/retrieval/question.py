"""What can be asked of a store: each option written once with its default and its help, and once for type checkers."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from ..choices import AGGREGATES, ANSWER_KINDS, RERANKS, SOURCES, Aggregate, AnswerKind, Rerank, Source
from ..errors import ArgumentError, as_whole, check_choice, check_k
from ..options import option

DEFAULT_K = 10
# How far scores may differ that were summed in another order, as a share.
_ROUNDING = 1e-4


class QuestionKeywords(TypedDict, total=False):
    """The fields of :class:`Question` as keywords, but for ``kind`` and ``k``."""

    at_least: float | None
    rerank: Rerank
    candidates: int | None
    ids: Any
    where: Mapping[str, Any] | None
    differs: str | None
    source: Source
    aggregate: Aggregate | None


class SearchKeywords(QuestionKeywords, total=False):
    """The same with ``kind``."""

    kind: AnswerKind


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to ask about queries: which training examples, how many, and how they are scored.

    With ``at_least`` the answer is exhaustive over all rows (``rerank="rows"`` and ``"none"``) or, with stored
    factors, over all exact scores. With exact scores through the model it is a heuristic: candidates are doubled until
    a doubling adds no hit. A filter or ``at_least`` bypasses the index, except for that heuristic, because the
    index's recall was measured without them.

    Args:
        kind: ``"proponents"``, the highest scores; ``"opponents"``, the lowest; ``"absolute"``, the largest
            magnitudes, whose scores keep their sign.
        k: most hits per query, from 1 to n_train; by default 10 (or all, if there are fewer), with ``at_least`` all.
        at_least: for proponents only scores >= this, for opponents only scores <= its negative, for ``"absolute"``
            only magnitudes >= this.
        rerank: the last stage: ``"exact"``; ``"wide"`` for estimates from wide rows; ``"rows"`` for the inner products
            with the full rows; ``"none"`` for the index's estimates (without an index all rows are scanned, as with
            ``"rows"``).
        candidates: how many rows to re-rank by exact score or by wide rows, by default 10 k, or as the index was
            tuned; with ``at_least``, how many to start with.
        ids: only these training ids.
        where: only training examples whose columns have these values: ``{"label": "cat"}``, or a list to match any of
            its values; several columns must all match.
        differs: only training examples whose value in this column differs from the query's.
        source: where positions are looked up, in ``task.query`` or among training ids; the query loss is explained
            either way.
        aggregate: ``"sum"`` or ``"mean"`` combines all queries into one, see :meth:`Retriever.prepare`.

    Raises:
        ArgumentError: one of them is out of range or of the wrong type, or they conflict.
    """

    kind: AnswerKind = option("proponents", "proponents: highest scores; opponents: lowest; absolute: largest.")
    k: int | None = option(None, "Most hits per query; by default 10, or with --at-least all.", type=int, flags="-k")
    at_least: float | None = option(
        None,
        "Only scores >= X; for opponents, scores <= -X; for absolute, magnitudes >= X.",
        type=float,
        metavar="X",
    )
    rerank: Rerank = option(
        "exact",
        "Last stage: exact scores, estimates from wide rows, inner products of the rows, or the index's estimates.",
        choices=RERANKS,
    )
    candidates: int | None = option(
        None, "Candidates to re-rank by exact score; by default 10 k, or as the index was tuned.", type=int
    )
    ids: Any = None  # from a file on the command line
    where: Mapping[str, Any] | None = None  # as column=value on the command line
    differs: str | None = option(
        None, "Only training examples whose value in COLUMN differs from the query's.", type=str, metavar="COLUMN"
    )
    source: Source = "query"  # by -q and --train-id on the command line
    aggregate: Aggregate | None = option(
        None, "Combine all queries into one: what helps them together.", choices=AGGREGATES
    )

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ANSWER_KINDS, "For both, call both().")
        check_choice("rerank", self.rerank, RERANKS)
        for name in ("k", "candidates"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_whole(name, getattr(self, name)))
        if self.at_least is not None:
            try:
                object.__setattr__(self, "at_least", float(self.at_least))
            except (TypeError, ValueError):
                raise ArgumentError(f"at_least is a {type(self.at_least).__name__}, but must be a number.") from None
            if math.isnan(self.at_least):
                raise ArgumentError("at_least is NaN, but must be a number.")
        if self.candidates is not None and self.rerank not in ("exact", "wide"):
            raise ArgumentError(
                f"candidates needs rerank='exact' or 'wide', but rerank is {self.rerank!r}. Drop one of them."
            )
        if self.source not in SOURCES:
            raise ArgumentError(f"source is {self.source!r}, but must be 'query' or 'train'.")
        if self.aggregate is not None and self.aggregate not in AGGREGATES:
            raise ArgumentError(f"aggregate is {self.aggregate!r}, but must be 'sum', 'mean' or None.")

    def by_rows(self) -> Question:
        """The same where inner products of rows are what is asked for, as in a whitened geometry.

        Raises:
            ArgumentError: an option decides nothing, or asks for estimates of something else.
        """
        if self.candidates is not None:
            raise ArgumentError("candidates decides nothing in a whitened geometry, whose rows are scored. Drop it.")
        self.refuse_wide()
        return replace(self, rerank="rows") if self.rerank == "exact" else self

    def refuse_wide(self) -> None:
        """Refuse wide rows in a whitened geometry.

        Raises:
            ArgumentError: they are asked for.
        """
        if self.rerank == "wide":
            raise ArgumentError("Wide rows estimate TracIn's scores, and no whitened ones. Drop rerank='wide'.")

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Question:
        """From what :meth:`to_dict` made, or a person wrote as JSON.

        Raises:
            ArgumentError: it is no mapping, has a key that no question has, or a value that is out of range.
        """
        if not isinstance(value, Mapping):
            raise ArgumentError(f"A question is a {type(value).__name__}, but must be a mapping, such as {{'k': 10}}.")
        known = [each.name for each in fields(cls)]
        unknown = [str(name) for name in value if name not in known]
        if unknown:
            raise ArgumentError(f"A question has no field {unknown[0]!r}. It has: {', '.join(known)}.")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON takes it: ids as a list, dates as text."""
        defaults = Question()
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: _as_json(value)
            for name, value in said.items()
            if not (name not in ("ids", "where") and value == getattr(defaults, name)) and value is not None
        }

    def check_wide(self, wide: bool) -> None:
        """Refuse ``rerank="wide"`` where there are no wide rows.

        Raises:
            ArgumentError: says how to get them.
        """
        if self.rerank == "wide" and not wide:
            raise ArgumentError(
                "rerank is 'wide', but the store has no wide rows. Build it again with wide=16384, or another even "
                "number, or ask with rerank='exact' or 'rows'."
            )

    @property
    def filtered(self) -> bool:
        """Whether not all training examples may answer."""
        everywhere = self.where is None or (isinstance(self.where, Mapping) and not self.where)
        return self.ids is not None or not everywhere or self.differs is not None

    @property
    def a_little_less(self) -> float | None:
        """``at_least``, less what scores differ by that were summed in another order."""
        return None if self.at_least is None else self.at_least - _ROUNDING * abs(self.at_least)

    def most(self, n_train: int) -> int | None:
        """How many hits a query of a store of so many rows has at most; ``None`` for all that reach the threshold.

        Raises:
            ArgumentError: ``k`` is below 1 or above ``n_train``, or ``candidates`` below it.
        """
        if self.k is not None:
            check_k(self.k, n_train)
        most = min(DEFAULT_K, n_train) if self.k is None and self.at_least is None else self.k
        if self.candidates is not None and self.candidates < (most or 1):
            raise ArgumentError(f"candidates is {self.candidates}, but must be at least k, {most or 1}.")
        return most

    def of(self, kind: AnswerKind) -> Question:
        """The same question for another kind of answer."""
        return replace(self, kind=kind)


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _as_json(each) for name, each in value.items()}
    if isinstance(value, datetime.date):
        return value.isoformat()
    if getattr(getattr(value, "dtype", None), "kind", "") == "M":
        return _as_json(value.astype(str).tolist())
    if hasattr(value, "tolist"):  # arrays, tensors, Series, NumPy's numbers
        return _as_json(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [_as_json(each) for each in value]
    return value
