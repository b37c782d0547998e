"""Which training examples may answer: by id, by the values of columns, by what differs from the query."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..columns import as_text, is_missing, values_of
from ..dates import NotKeptError, as_dates, read_date
from ..errors import ArgumentError
from ..gaps import MISSING_TEXT
from ..store import GradientStore, runs
from .question import Question

# Values of a column that are looked at together.
_AT_ONCE = 1 << 16
_WORDS = {"U": "text", "b": "true or false", "i": "integers", "u": "integers", "f": "numbers"}
_WORDS["M"] = "dates, such as 2024-01-31 or 2024-01-31T08:30:00"

# By column a value or several, any of which will do.
Where = Mapping[str, Any]


@dataclass(frozen=True)
class Allowed:
    """A filter applied to a store and some queries.

    Args:
        ids: ascending, or ``None`` for all.
        store: where the column is looked up.
        differs: the column whose values must differ, if any.
        values: (n_query,) of the queries in that column.
    """

    ids: NDArray[np.int64] | None
    store: GradientStore
    differs: str | None
    values: NDArray[Any]

    def mask(self, ids: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """(n_query, len(ids)): which of these ids, all of them in :attr:`ids`, may answer; ``None`` for all."""
        if self.differs is None:
            return None
        column, values = self.store.column_as_stored(self.differs, ids)[None], self.values[:, None]
        mask: NDArray[np.bool_] = column != values
        if column.dtype.kind in "fM" and values.dtype.kind in "fM":
            mask &= ~(np.isnan(column) & np.isnan(values))  # what is missing differs from every value, not from itself
        return mask


def allow(store: GradientStore, question: Question, query_columns: Mapping[str, NDArray[Any]], n_query: int) -> Allowed:
    """Apply a question's filter; columns are read in pieces.

    Args:
        store: a complete one.
        question: its ``ids``, ``where`` and ``differs``, all of which must hold.
        query_columns: by name (m,), of the m examples that are asked about.
        n_query: m, or 1 where these are one question.

    Raises:
        ArgumentError: an id or column that is not there, a value of another type than the column, or queries without
            a value to differ from.
    """
    ids = None
    if question.ids is not None:
        ids = np.unique(runs.as_ids(question.ids).ravel())
        if len(ids):
            store.check_ids(ids)
    if question.where is not None:
        ids = matching(store, question.where, ids)
    values = np.empty(0)
    if question.differs is not None:
        values = _values_to_differ_from(store, question.differs, query_columns, n_query)
    return Allowed(ids, store, question.differs, values)


def matching(store: GradientStore, where: Where, ids: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """The ids, ascending, of training examples whose columns have the wanted values.

    Args:
        store: a complete one.
        where: by column a value or a list of values; several columns must all hold.
        ids: ascending, of these alone; by default of all.

    Raises:
        ArgumentError: a column that is not there, or a value of another type than the column.
    """
    if not isinstance(where, Mapping):
        raise ArgumentError(
            f"where is a {type(where).__name__}, but must be a mapping from columns to values, such as {{'label': 3}}."
        )
    wanted = {name: _of_type(name, _kind(store, name), values) for name, values in where.items()}
    found = [np.empty(0, dtype=np.int64)]
    for some in _pieces(store, ids):
        for name, values in wanted.items():
            column = store.column_as_stored(name, some)
            right = np.isin(column, values)
            some = some[right | np.isnan(column) if values.dtype.kind in "fM" and np.isnan(values).any() else right]
        found.append(some)
    return np.concatenate(found)


def parse_where(store: GradientStore, conditions: Sequence[tuple[str, str]]) -> dict[str, list[Any]]:
    """Conditions as text, such as ``("label", "3")``, as values of their columns' types.

    Args:
        store: a complete one.
        conditions: column and value; a column that comes several times may have any of the values.

    Raises:
        ArgumentError: a column that is not there, or a text that is no value of its type.
    """
    where: dict[str, list[Any]] = {}
    for name, text in conditions:
        kind = _kind(store, name).kind
        try:
            value = _READ.get(kind, str)(text)
        except (ValueError, KeyError):
            raise ArgumentError(f"The column {name} holds {_WORDS[kind]}, but got {text!r}.") from None
        where.setdefault(name, []).append(value)
        if value == "":  # no text at all asks for what is missing as well
            where[name].append(None)
    return where


def read_ids(path: Path) -> NDArray[np.int64]:
    """Training ids from a file: an array that NumPy saved (``.npy``), or text with one id a line.

    Raises:
        ArgumentError: there is no such file, or it holds something else.
    """
    if not path.exists():
        raise ArgumentError(f"{path} does not exist. Check the path.")
    try:
        if path.suffix == ".npy":
            return runs.as_ids(np.load(path, allow_pickle=False)).ravel()
        return np.array([int(line) for line in path.read_text().split()], dtype=np.int64)
    except (
        OSError,
        EOFError,
        ValueError,
        OverflowError,
    ) as error:  # ArgumentError is a ValueError and says what is wrong
        raise ArgumentError(
            f"{path} holds no ids ({str(error)[:100]}). Write one integer per line, or save an array as .npy."
        ) from None


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _fraction(text: str) -> float:
    return float(text) if text else float("nan")


def _moment(text: str) -> np.datetime64:
    return read_date(text) if text else np.datetime64("NaT", "us")


# By the kind of a column, how a text becomes a value; no text at all asks for what is missing.
_READ: Mapping[str, Callable[[str], Any]] = {"i": int, "u": int, "f": _fraction, "b": _boolean, "M": _moment}


def _pieces(store: GradientStore, ids: NDArray[np.int64] | None) -> Iterator[NDArray[np.int64]]:
    if ids is not None:
        yield from (ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE))
        return
    every = store.id_runs
    ends = np.cumsum(every[:, 1] - every[:, 0])
    for start in range(0, int(ends[-1]) if len(ends) else 0, _AT_ONCE):
        # Places in the order of ids, turned to ids by their runs: no array of all ids is made.
        places = np.arange(start, min(start + _AT_ONCE, int(ends[-1])), dtype=np.int64)
        mine = np.searchsorted(ends, places, side="right")
        yield every[mine, 1] - (ends[mine] - places)


def _kind(store: GradientStore, name: str) -> np.dtype[Any]:
    store.column(name, np.empty(0, dtype=np.int64))  # refuses what is not there
    kind: np.dtype[Any] = np.dtype(store.manifest.columns[name])
    return kind


def _of_type(name: str, kind: np.dtype[Any], given: Any) -> NDArray[Any]:
    """Values as an array of the column's type, by which equal means equal: 0.1 is not the nearest float32."""
    fitting: list[Any] = []
    for value in values_of(given):
        if is_missing(value):
            # A column of other kinds has none that is missing.
            if kind.kind in "UfM":
                fitting.append({"U": MISSING_TEXT, "f": np.nan, "M": np.datetime64("NaT", "us")}[kind.kind])
            continue
        if kind.kind == "M":
            with suppress(NotKeptError):  # no example can have it
                fitting.append(_date(name, value))
            continue
        if kind.kind == "U" and isinstance(value, (datetime.date, np.datetime64)):
            try:
                value = as_text(value)
            except NotKeptError:
                continue
        value = value.item() if isinstance(value, np.generic) else value
        boolean = isinstance(value, bool)
        right = {
            "U": isinstance(value, str),
            "b": boolean,
            "f": isinstance(value, (int, float)) and not boolean,
        }.get(kind.kind, isinstance(value, int) and not boolean)
        if not right:
            raise _not_of_type(name, kind.kind, value)
        if kind.kind in "iu" and not np.iinfo(kind).min <= value <= np.iinfo(kind).max:
            continue  # no example can have it
        fitting.append(value)
    return np.array(fitting, dtype=np.str_ if kind.kind == "U" else kind)


def _date(name: str, value: Any) -> np.datetime64:
    """A date, or its text, as a column of dates has it."""
    if isinstance(value, (datetime.date, np.datetime64)):
        date: np.datetime64 = as_dates([value])[0]
        return date
    if isinstance(value, str):
        with suppress(ValueError):
            return read_date(value)
    raise _not_of_type(name, "M", value)


def _not_of_type(name: str, kind: str, value: Any) -> ArgumentError:
    asked = " ".join(repr(value).split())[:80]
    return ArgumentError(
        f"The column {name} holds {_WORDS[kind]}, but where has {asked}, a {type(value).__name__}. "
        "Give a value, or a list of values, of the column's type."
    )


def _values_to_differ_from(
    store: GradientStore, name: str, query_columns: Mapping[str, NDArray[Any]], n_query: int
) -> NDArray[Any]:
    stored = _kind(store, name)
    kind = stored.kind
    if name not in query_columns:
        raise ArgumentError(
            f"The queries have no column {name!r} to differ from. They have: {', '.join(query_columns) or 'none'}. "
            "Give Task(query_columns=...) and query by position; items passed directly have no columns."
        )
    values = query_columns[name]
    if values.dtype.kind != kind and {values.dtype.kind, kind} & {"U", "M"}:
        raise ArgumentError(
            f"The column {name} holds {_WORDS[kind]} for training examples and {_WORDS[values.dtype.kind]} for "
            "queries, so every value would differ. Give both the same type."
        )
    if kind == "f":
        values = values.astype(stored)  # by which equal means equal
    if n_query == 1 and len(values) > 1:
        if len(np.unique(values)) > 1:
            raise ArgumentError(
                f"The queries of this group have several values in {name}, so there is no single value to differ from. "
                "Group queries that share a value, or ask about each query alone."
            )
        values = values[:1]
    return values
