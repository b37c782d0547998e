"""Answers: which training examples, with which scores."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DependencyError
from ..output import data_frame, plain, printable, shown_as, table_lines, to_json
from ..report import Card, Section, Tile, cards_html, write_page

SIGN = (
    "positive score = training on this example lowered the loss on the query (proponent); "
    "negative = raised it (opponent)"
)

# What a notebook shows of a large answer; ids and scores hold the rest.
_NOTEBOOK_QUERIES, _NOTEBOOK_HITS = 5, 10
_SHOWN_CHARACTERS = 60

# Hits whose columns are looked up, and made text, together.
AT_ONCE = 10_000

# What is shown where there is no hit.
NOTHING = "no training example qualifies"


@dataclass(frozen=True)
class Stage:
    """One step of a search, and the most training examples that got a score there for one query.

    For ``"absolute"`` an index is asked for each sign; it, and the rows that it proposes, are counted for one of them.

    Args:
        name: ``"index"``: by the index's estimates, of which these are the best; ``"rows"``: by their full rows;
            ``"largest entries"``: by those of their packed factors; ``"wide"``: by wide rows; ``"stored factors"`` or
            ``"model"``: by exact scores from there.
        rows: how many.
        share: of the candidates' top-k, what is expected in the answer, by the errors of wide rows, where these decide:
            at least, where exact scores went to those alone that have a chance of a place in it. Not said of estimates
            from gradients of half precision or rows in int4, whose errors are not known.
    """

    name: str
    rows: int
    share: float | None = None

    def __str__(self) -> str:
        least = "" if self.name == "wide" else "at least "
        share = "" if self.share is None else f" ({least}{self.share:.1%} of the candidates' top-k expected)"
        return f"{self.name} {self.rows:,}{share}"

    def with_more(self, other: Stage | None) -> Stage:
        """The same stage of two searches, each of its own rows."""
        if other is None:
            return self
        shares = [stage.share for stage in (self, other) if stage.share is not None]
        return Stage(self.name, self.rows + other.rows, min(shares, default=None))

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without what is not said."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Hits:
    """The best training examples of each query; prints as a table, and with pictures in a notebook.

    Queries can have different numbers of hits, because a filter or a threshold may leave fewer than k. ``ids`` and
    ``scores`` are as wide as the longest answer, w; shorter ones are padded with ids of -1 and scores of NaN, which
    never appear in tables, records or pages. :meth:`of` gives one query's hits without padding.

    Args:
        ids: (n_query, w) int64.
        scores: (n_query, w), signed; positive = proponent.
        kind: ``"proponents"``, ``"opponents"`` or ``"absolute"``: by score descending, ascending, or by magnitude
            descending; ties by ascending id.
        scored: where the scores come from: ``"exact"`` gradients, ``"projected"`` rows, the ``"wide-estimated"`` or
            the ``"index-estimated"`` ones, or ``"float16-factor"`` and ``"bfloat16-factor"``.
        measure: what the scores are, ``"TracInCP scores"`` or cosines of the gradients behind them.
        queries: what to call each query.
        stages: the stages of the search, in order.
        columns: by name (n_query, w), of the training examples; padded with 0, NaT or empty text. In tables, records
            and pages, a column with the name of one of an answer's own keys, such as ``id``, is called
            ``columns.id``. Dates are ``datetime64[us]``, in records ``datetime.datetime``.
        query_columns: by name (n_query,), of the queries.
        show_train: how to display a training id, if the task says so.
        show_query: the same for the position of a query in this answer.
    """

    ids: NDArray[np.int64]
    scores: NDArray[Any]
    kind: str
    scored: str
    queries: tuple[str, ...]
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    query_columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    measure: str = "TracInCP scores"
    stages: tuple[Stage, ...] = ()
    show_train: Callable[[int], Any] | None = field(default=None, repr=False)
    show_query: Callable[[int], Any] | None = field(default=None, repr=False)

    @property
    def counts(self) -> NDArray[np.int64]:
        """(n_query,) how many hits each query has."""
        return np.asarray((self.ids >= 0).sum(1), dtype=np.int64)

    def of(self, query: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Ids and scores of one query's hits, by its place in :attr:`queries`: as many as there are, no padding."""
        count = int((self.ids[query] >= 0).sum())
        return self.ids[query, :count], self.scores[query, :count]

    def records(self) -> list[dict[str, Any]]:
        """One mapping for each hit: query, kind, rank, id, score and the columns."""
        return list(self.each_record())

    def each_record(self) -> Iterator[dict[str, Any]]:
        """The same one by one, for answers too large for memory."""
        for row, query in enumerate(self.queries):
            for record in self._ranked(row):
                yield {"query": query, "kind": self.kind, **record}

    def _ranked(self, row: int) -> Iterator[dict[str, Any]]:
        """A query's hits: rank, id, score and columns."""
        ids, scores = self.of(row)
        names = {name: shown_as(name) for name in self.columns}
        for start in range(0, len(ids), AT_ONCE):
            part = slice(start, min(start + AT_ONCE, len(ids)))
            columns = [_part(self.columns, name, row, part).tolist() for name in names]
            some = zip(ids[part].tolist(), scores[part].tolist(), *columns, strict=True)
            for rank, (i, score, *values) in enumerate(some, start + 1):
                yield {"rank": rank, "id": i, "score": score, **dict(zip(names.values(), values, strict=True))}

    def first(self, queries: int, k: int) -> Hits:
        """The same answer, cut to its first queries and the first k hits of each."""
        return replace(
            self,
            ids=self.ids[:queries, :k],
            scores=self.scores[:queries, :k],
            queries=self.queries[:queries],
            columns={name: _cut(self.columns, name, queries, k) for name in self.columns},
            query_columns={name: values[:queries] for name, values in self.query_columns.items()},
        )

    def to_dict(self, *others: Hits) -> dict[str, Any]:
        """What ``gradindex query --json`` prints, as JSON takes it: dates are text, NaN and infinity are ``None``.

        Args:
            others: answers to the same queries, such as the opponents.

        Returns:
            ``note``, ``scored``, ``stages`` by kind, and ``records``, those of :meth:`records`.
        """
        answers = [self, *others]
        records = [record for answer in answers for record in answer.each_record()]
        as_json: dict[str, Any] = json.loads(to_json({**summary(answers), "records": records}))
        return as_json

    def to_pandas(self) -> Any:
        """A DataFrame of :meth:`records`.

        Raises:
            DependencyError: pandas is missing.
        """
        return _frame([self])

    @property
    def note(self) -> str:
        """One line: how the scores were computed, what their sign means, and the stages of the search."""
        return note([self])

    def __repr__(self) -> str:
        shape = f"{len(self.queries):,} x {self.ids.shape[1]:,}"
        return f"<Hits: {self.kind} ({shape}) by {self.scored} {self.measure}; print them for a table>"

    def __str__(self) -> str:
        return as_text([self])

    def _repr_html_(self) -> str:
        return _notebook([self])

    def save_html(self, path: str | os.PathLike[str], *others: Hits) -> None:
        """Write a self-contained HTML page that shows queries and hits as ``Task.show`` displays them.

        Args:
            path: the file.
            others: answers to the same queries, such as the opponents, shown next to these.

        Raises:
            DependencyError: the extra ``demo`` is not installed.
            StoreError: the file cannot be written.
        """
        section = Section("Queries", cards=make_cards([self, *others]))
        write_page(Path(path), "Training examples behind the predictions", note([self, *others]), [section])


class Both(NamedTuple):
    """Proponents and opponents of the same queries; a notebook shows them together.

    Args:
        proponents: by score descending.
        opponents: by score ascending.
    """

    proponents: Hits
    opponents: Hits

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return _notebook(self)

    def to_pandas(self) -> Any:
        """A DataFrame of the proponents' records and below them the opponents'.

        Raises:
            DependencyError: pandas is missing.
        """
        return _frame(self)


def _frame(answers: Sequence[Hits]) -> Any:
    names = ("query", "kind", "rank", "id", "score", *map(shown_as, answers[0].columns))
    records = [record for answer in answers for record in answer.each_record()]
    return data_frame({name: [record[name] for record in records] for name in names})


def _notebook(answers: Sequence[Hits]) -> str:
    """Answers to the same queries as HTML: with pictures where the task shows examples, else as text."""
    first = answers[0]
    if first.show_train is None:
        return f"<pre>{escape(as_text(answers))}</pre>"
    try:
        shown = cards_html(make_cards([answer.first(_NOTEBOOK_QUERIES, _NOTEBOOK_HITS) for answer in answers]))
    except DependencyError as error:
        return f"<pre>{escape(as_text(answers))}\n{escape(str(error))}</pre>"
    longest = max(answer.ids.shape[1] for answer in answers)
    more = len(first.queries) > _NOTEBOOK_QUERIES or longest > _NOTEBOOK_HITS
    rest = f"<p>The first {_NOTEBOOK_QUERIES} queries and {_NOTEBOOK_HITS} hits.</p>" if more else ""
    return f"{shown}{rest}<p>{escape(note(answers))}</p>"


class LookedUp(Mapping[str, NDArray[Any]]):
    """Columns of very many hits, read from the store when they are asked for and not kept.

    Args:
        names: of the columns.
        look_up: gives the values of a column for ids (m,).
        ids: (n_query, w), -1 behind a short answer.
    """

    def __init__(
        self, names: Sequence[str], look_up: Callable[[str, NDArray[np.int64]], NDArray[Any]], ids: NDArray[np.int64]
    ) -> None:
        self._names, self._look_up, self._ids = tuple(names), look_up, ids

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        return placed(self._look_up(name, self._ids[self._ids >= 0]), self._ids >= 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def part(self, name: str, row: int, part: slice) -> NDArray[Any]:
        """The values of some of a query's hits."""
        return self._look_up(name, self._ids[row, part])

    def cut(self, name: str, queries: int, k: int) -> NDArray[Any]:
        """The values of the first hits of the first queries."""
        return LookedUp((name,), self._look_up, self._ids[:queries, :k])[name]


def placed(values: NDArray[Any], there: NDArray[np.bool_]) -> NDArray[Any]:
    """Values (m,) where ``there`` (n_query, w) is true, in the order of rows; 0, NaT or empty elsewhere."""
    whole = np.zeros(there.shape, dtype=values.dtype)
    if values.dtype.kind == "M":
        whole[:] = np.datetime64("NaT", "us")
    if values.dtype.kind == "O":
        whole[:] = ""
    whole[there] = values
    return whole


def _part(columns: Mapping[str, NDArray[Any]], name: str, row: int, part: slice) -> NDArray[Any]:
    return columns.part(name, row, part) if isinstance(columns, LookedUp) else columns[name][row, part]


def _cut(columns: Mapping[str, NDArray[Any]], name: str, queries: int, k: int) -> NDArray[Any]:
    return columns.cut(name, queries, k) if isinstance(columns, LookedUp) else columns[name][:queries, :k]


def summary(answers: Sequence[Hits]) -> dict[str, Any]:
    """What answers to the same queries say besides their hits: the note, where scores come from, stages by kind."""
    stages = {answer.kind: [stage.to_dict() for stage in answer.stages] for answer in answers}
    return {"note": note(answers), "scored": answers[0].scored, "stages": stages}


def note(answers: Sequence[Hits]) -> str:
    """One line about answers to the same queries: the scores, their sign, and the stages, by kind where they differ."""
    ways = {f"stages of {answer.kind}": answer.stages for answer in answers}
    if len(set(ways.values())) == 1:
        ways = {"stages": answers[0].stages}
    told = [f"; {name}: {', '.join(map(str, stages))}" for name, stages in ways.items() if stages]
    return f"{answers[0].scored} {answers[0].measure}; {SIGN}{''.join(told)}"


def as_text(answers: Sequence[Hits]) -> str:
    """Answers to the same queries as text: query by query a table for each answer, and what the sign means."""
    return "\n".join(text_lines(answers))


def text_lines(answers: Sequence[Hits]) -> Iterator[str]:
    """The lines of :func:`as_text`, as they are made."""
    first = answers[0]
    for row, query in enumerate(first.queries):
        about = [
            f"{name} {_shown(values[row])}" for name, values in first.query_columns.items() if _is_there(values[row])
        ]
        about += [f'"{text}"' for text in [_in_words(first.show_query, row)] if text]
        heading = printable(f"{query} ({', '.join(about)})" if about else query)
        for answer in answers:
            yield f"{heading}: {answer.kind}"
            if len(answer.of(row)[0]):
                yield from table_lines(_with_words(answer, row))
            else:
                yield f"({NOTHING})"
            yield ""
    yield note(answers)


def _with_words(answer: Hits, row: int) -> Callable[[], Iterator[dict[str, Any]]]:
    """A query's hits for a table, with what the task shows of them where that is text."""
    first = answer.of(row)[0][:AT_ONCE].tolist()
    words = [_in_words(answer.show_train, i) for i in first]
    if not all(words):
        return lambda: answer._ranked(row)

    def records() -> Iterator[dict[str, Any]]:
        for number, record in enumerate(answer._ranked(row)):
            text = words[number] if number < len(words) else _in_words(answer.show_train, record["id"])
            yield record | {"shown": text or ""}

    return records


def _pairs(hits: Hits, query: int) -> Iterator[tuple[int, float]]:
    ids, scores = hits.of(query)
    return zip(ids.tolist(), scores.tolist(), strict=True)


def _in_words(show: Callable[[int], Any] | None, which: int) -> str | None:
    """What a task shows of an example, in one short line; ``None`` where that is a picture or nothing."""
    shown = None if show is None else show(which)
    if isinstance(shown, Mapping):
        shown = ", ".join(f"{name} {value}" for name, value in shown.items())
    short = textwrap.shorten(shown, _SHOWN_CHARACTERS, placeholder=" ...") if isinstance(shown, str) else None
    return None if short is None else printable(short)


def make_cards(answers: Sequence[Hits]) -> list[Card]:
    """Answers to the same queries as cards, one for each query."""
    first = answers[0]
    cards = []
    for row, name in enumerate(first.queries):
        query = _tile(name, {n: v[row] for n, v in first.query_columns.items()}, None, first.show_query, row)
        rows = {
            answer.kind: [
                _tile(f"id {i}", _beside(answer, row, r), float(score), answer.show_train, i)
                for r, (i, score) in enumerate(_pairs(answer, row))
            ]
            or [Tile(None, NOTHING)]
            for answer in answers
        }
        cards.append(Card(query, rows))
    return cards


def _beside(answer: Hits, row: int, rank: int) -> dict[str, Any]:
    return {shown_as(name): values[row, rank] for name, values in answer.columns.items()}


def _tile(
    title: str, values: Mapping[str, Any], score: float | None, show: Callable[[int], Any] | None, which: int
) -> Tile:
    flags = [name for name, value in values.items() if isinstance(value, np.bool_) and value]
    lines = [
        f"{name} {_shown(value)}"
        for name, value in values.items()
        if not isinstance(value, np.bool_) and _is_there(value)
    ]
    return Tile(None if show is None else show(which), title, lines, flags, score)


def _shown(value: Any) -> Any:
    return plain(value.item()) if isinstance(value, np.datetime64) else value


def _is_there(value: Any) -> bool:
    """Whether a column has a value: neither missing nor the empty text."""
    return bool(value == value) and not (isinstance(value, str) and not value)
