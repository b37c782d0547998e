"""Columns: one value for each example, taken by its place, whatever holds the values and whatever labels it has.

A column is stored as numbers, dates (:mod:`gradindex.dates`) or text. What is missing becomes NaN among numbers, NaT
among dates and a character of its own among texts, read again as NaN (:mod:`gradindex.gaps`).
"""

from __future__ import annotations

import datetime
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Set, ValuesView
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .dates import DATES, NotKeptError, as_dates
from .errors import ArgumentError, TaskError, user_code
from .gaps import MISSING_TEXT
from .output import date_text

# Values that are looked at together: a list of long texts never becomes one array.
_PIECE = 8192
# Bytes of a text in UTF-8: a shard gives every text the room of its longest.
_LONGEST_TEXT = 1 << 16
# Whole numbers up to here are the same as float64.
_EXACT = 1 << 53

# Families of values; what is missing ("-") goes with each, whole numbers go with fractions, and nothing else mixes.
_WORDS = {"b": "booleans", "i": "integers", "f": "floats", "U": "strings", "D": "dates"}
_NEEDS = "a column must hold numbers, booleans, strings or dates, one for each example."


class Column:
    """The values of a column by place, all of one type.

    Args:
        name: what to call it in errors, such as ``"columns['label']"``.
        values: anything with one value for each place: a list, an array, a tensor, a pandas Series.
        n: how many there must be.
        data: what they stand beside, for the error.

    Raises:
        TaskError: another number of values, or values that cannot be stored; says which.
    """

    def __init__(self, name: str, values: Any, n: int, data: str) -> None:
        self._name = name
        self._values: Any = _by_place(name, values)
        self._is_array = isinstance(self._values, np.ndarray)
        if len(self._values) != n:
            raise TaskError(f"{name} has {len(self._values)} values, but {data} has {n} examples. Give one for each.")
        # The type in NumPy's notation, little-endian; "U" for text, DATES for dates.
        self.kind = self._kind_of_array() if self._is_array else self._kind_of_objects()

    def take(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """The values at positions (m,), as ``str_``, numbers or ``datetime64[us]``."""
        if not self._is_array:
            return self._converted(self._objects(positions))
        taken: NDArray[Any] = self._values[positions]
        if self.kind == DATES:
            return as_dates(taken)
        return taken if self.kind == "U" else taken.astype(self.kind, copy=False)

    def _pieces(self) -> Iterator[NDArray[np.int64]]:
        for start in range(0, len(self._values), _PIECE):
            yield np.arange(start, min(start + _PIECE, len(self._values)))

    def _kind_of_array(self) -> str:
        dtype = self._values.dtype
        if dtype.kind in "UM":
            for places in self._pieces():
                if dtype.kind == "M":
                    self._check_dates(self._values[places], places)
                else:
                    self._check_texts(self._values[places].tolist(), places)
            return "U" if dtype.kind == "U" else DATES
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            raise TaskError(f"{self._name} holds values of type {dtype}, but {_NEEDS}")
        kind: str = dtype.newbyteorder("<").str
        return kind

    def _objects(self, positions: NDArray[np.int64]) -> list[Any]:
        """Values of a sequence, with ``None`` for all that is missing."""
        with user_code(f"Reading {self._name}"):
            found = [self._values[int(i)] for i in positions]
        kinds = set(map(type, found))
        if kinds <= {str} or kinds <= {int} or kinds <= {bool}:
            return found
        if any(issubclass(kind, (Tensor, np.ndarray)) for kind in kinds):
            found = [
                value.item() if isinstance(value, (Tensor, np.ndarray)) and not value.ndim else value for value in found
            ]
        return [None if is_missing(value) else value for value in found]

    def _kind_of_objects(self) -> str:
        """Looks at all values: which families there are, and the type that holds them."""
        first: dict[str, int] = {}  # of a family, a place
        dtypes, zones, gaps, largest = set[np.dtype[Any]](), set[bool](), False, 0
        for places in self._pieces():
            objects = self._objects(places)
            kinds = {kind: _family(kind) for kind in set(map(type, objects))}
            for kind, family in kinds.items():
                place = int(places[[type(value) is kind for value in objects].index(True)])
                if family == "?":
                    raise TaskError(
                        f"{self._name} holds a {kind.__name__} (at place {place}), but {_NEEDS}{_hint(kind)}"
                    )
                first[family] = min(place, first.get(family, place))
            gaps = gaps or type(None) in kinds
            self._check_one_family(first)
            present = [(place, value) for place, value in zip(places, objects, strict=True) if value is not None]
            if "U" in kinds.values():
                self._check_texts([as_text(value) for _, value in present], [place for place, _ in present])
            elif "D" in kinds.values():
                zones |= {_has_zone(value) for _, value in present}
                self._check_dates(objects, places)
            elif present:
                array = np.asarray([value for _, value in present])
                if array.dtype.kind == "O":
                    raise TaskError(f"{self._name} holds integers beyond 64 bits. Give them as text.")
                dtypes.add(array.dtype)
                whole = (
                    [int(value) for _, value in present if kinds[type(value)] == "i"] if "i" in kinds.values() else []
                )
                largest = max(largest, *map(abs, whole)) if whole else largest
        return self._joined(first, dtypes, zones, gaps, largest)

    def _check_one_family(self, first: Mapping[str, int]) -> None:
        families = set(first) - {"-"}
        if len(families) > 1 and families != {"i", "f"}:
            told = " and ".join(
                f"{_WORDS[name]} (at place {first[name]})" for name in sorted(families, key=first.__getitem__)
            )
            raise TaskError(f"{self._name} mixes {told}, but a column holds values of one kind. Convert them to one.")

    def _joined(
        self, first: Mapping[str, int], dtypes: set[np.dtype[Any]], zones: set[bool], gaps: bool, largest: int
    ) -> str:
        if len(zones) > 1:
            raise TaskError(f"{self._name} mixes dates with and without a time zone. Give all of them one, or none.")
        if "U" in first or "D" in first:
            return "U" if "U" in first else DATES
        if "b" in first:
            return "<f8" if gaps else "|b1"
        joined = np.result_type(*dtypes) if dtypes else np.dtype(float)
        if joined.kind != "f" and gaps:
            joined = np.dtype(float)
        if joined.kind == "f" and largest > _EXACT:
            why = "missing values" if gaps else "other numbers"
            raise TaskError(
                f"{self._name} mixes the integer {largest} with {why}, and float64 cannot represent it exactly. "
                "Give the numbers as text."
            )
        return joined.newbyteorder("<").str

    def _converted(self, objects: list[Any]) -> NDArray[Any]:
        if self.kind == "U":
            return np.asarray([as_text(value) for value in objects], dtype=np.str_)
        if self.kind == DATES:
            return as_dates(objects)
        return np.asarray([np.nan if value is None else value for value in objects], dtype=self.kind)

    def _check_dates(self, dates: NDArray[np.datetime64] | Sequence[Any], places: NDArray[np.int64]) -> None:
        try:
            as_dates(dates)
        except NotKeptError as error:
            raise TaskError(f"{self._name}, at place {places[error.place]}, holds {error}. {error.way_out}") from None

    def _check_texts(self, texts: list[str], places: Iterable[Any]) -> None:
        for place, text in zip(places, texts, strict=True):
            try:
                size = len(text) if text.isascii() else len(text.encode())
            except UnicodeEncodeError as error:
                raise TaskError(
                    f"{self._name} holds text that is not Unicode ({error.reason}; at place {place}). Replace it."
                ) from None
            if size > _LONGEST_TEXT:
                raise TaskError(
                    f"{self._name} holds a text of {size:,} bytes (at place {place}), but at most {_LONGEST_TEXT:,} "
                    "are stored. Shorten it: Task(show=...) shows whole examples without storing them."
                )
            if text == MISSING_TEXT:
                raise TaskError(
                    f"{self._name} holds the text {text!a} (at place {place}), which marks a missing value in the "
                    "store. Use None."
                )
            if text.endswith("\0"):
                raise TaskError(
                    f"{self._name} holds a text that ends in a NUL character (at place {place}), which pads text in "
                    "the store. Strip it."
                )


def columns_by_name(role: str, values: Any, data: str, n: int) -> dict[str, Column]:
    """The columns of a mapping.

    Args:
        role: what to call it in errors, such as ``"columns"``.
        values: by name, one value for each of ``n`` examples.
        data: what they stand beside, for errors.
        n: how many.

    Raises:
        TaskError: it is no mapping, a name cannot be one of a column, or a column's values cannot be stored.
    """
    if not (hasattr(values, "keys") and hasattr(values, "__getitem__")):
        raise TaskError(
            f"{role} is a {type(values).__name__}, but must be a mapping from names to values, such as "
            "{'label': labels}."
        )
    made = {}
    for name in values:
        if not isinstance(name, str):
            raise TaskError(f"{role} has a column {name!r}, but a name must be a string. Rename it.")
        if not name or "/" in name or name == ".":
            raise TaskError(
                f"{role} has a column {name!r}, but a name must not be empty or contain a slash. Rename it."
            )
        if "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
            raise TaskError(f"{role} has a column {name!a}, but a name must be Unicode without NUL. Rename it.")
        made[name] = Column(f"{role}[{name!r}]", values[name], n, data)
    return made


def _by_place(name: str, values: Any) -> Any:
    """Values as an array of numbers, texts or dates, or something to be asked for places; labels are left behind.

    Raises:
        TaskError: they have no places.
    """
    what = f"{name} is a {type(values).__name__}"
    if isinstance(values, (str, bytes)):
        raise TaskError(f"{what}, a single text, but needs one value for each example. Give a list.")
    if isinstance(values, (Set, Mapping)) and not isinstance(values, (KeysView, ItemsView)):
        raise TaskError(f"{what}, which has no order. Give a list with one value for each example.")
    if isinstance(values, (KeysView, ItemsView, ValuesView)):
        values = list(values)
    if isinstance(values, Sequence):
        return values
    with user_code(f"Reading {name}"):
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            wide = values.dtype in (torch.float16, torch.float32, torch.float64)
            values = (values.float() if values.is_floating_point() and not wide else values).numpy()
        elif isinstance(values, np.ma.MaskedArray):
            # With None where it is masked, or NaT: dates that are masked would become numbers.
            values = values.filled(np.datetime64("NaT", "us")) if values.dtype.kind == "M" else values.tolist()
        elif hasattr(values, "__array__"):
            values = np.asarray(values)
        elif hasattr(values, "to_numpy"):
            values = np.asarray(values.to_numpy())
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise TaskError(f"{name} has {values.ndim} axes (its shape is {values.shape}), but {_NEEDS}")
        return values if values.dtype.kind != "O" else values.tolist()
    if not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
        way = "list(...)" if hasattr(values, "__next__") else "a list"
        raise TaskError(f"{what}, which cannot be indexed, but needs one value for each example. Give {way}.")
    return values


def _family(kind: type) -> str:
    """What values of a type are to a column: a key of ``_WORDS``."""
    if kind is type(None):
        return "-"
    if issubclass(kind, (bool, np.bool_)):
        return "b"
    if issubclass(kind, str):
        return "U"
    if issubclass(kind, (datetime.date, np.datetime64)):
        return "D"
    if issubclass(kind, np.timedelta64):  # which NumPy counts among integers
        return "?"
    if issubclass(kind, (int, np.integer)):
        return "i"
    narrow = issubclass(kind, float) or (issubclass(kind, np.floating) and np.dtype(kind).itemsize <= 8)
    return "f" if narrow else "?"


def _has_zone(date: Any) -> bool:
    return isinstance(date, datetime.datetime) and date.utcoffset() is not None


def _hint(kind: type) -> str:
    if issubclass(kind, bytes):
        return " Decode them, with .decode() or, of h5py, with dataset.asstr()[:]."
    if issubclass(kind, (datetime.timedelta, np.timedelta64)):
        return " Give durations as numbers, such as seconds."
    if issubclass(kind, (Tensor, np.ndarray, list, tuple, dict)):
        return " Split it into several columns."
    return " Convert it, for example with str or float."


def is_missing(value: Any) -> bool:
    """Whether a value says that there is none: ``None``, NaN, pandas' ``NA`` and ``NaT``, NumPy's ``NaT``."""
    if value is None or type(value).__name__ == "NAType":
        return True
    return isinstance(value, (float, np.floating, np.datetime64, datetime.date)) and bool(value != value)


def values_of(given: Any) -> list[Any]:
    """One value or several, in whatever holds them, as a list of Python's and NumPy's scalars."""
    if isinstance(given, Tensor):
        return list(np.ravel(given.detach().cpu().numpy())) if given.ndim < 2 else [given]
    if isinstance(given, (str, bytes, np.generic)):
        return [given]
    if hasattr(given, "__array__"):
        array = np.asarray(given)
        return list(np.ravel(array)) if array.ndim < 2 else [given]
    return list(given) if isinstance(given, Iterable) and not isinstance(given, Mapping) else [given]


def is_whole(value: Any) -> bool:
    """Whether a value is one whole number; a boolean is none."""
    if isinstance(value, (Tensor, np.ndarray)):
        return not value.ndim and is_whole(value.item())
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))


def positions_of(name: str, given: Any, n: int, data: str) -> NDArray[np.int64]:
    """Positions as whole numbers, or as a mask with a boolean for each of the ``n`` examples of ``data``.

    Raises:
        ArgumentError: they are neither, or one is out of range.
    """
    values = values_of(given)
    if values and all(isinstance(value, (bool, np.bool_)) for value in values):
        if len(values) != n:
            raise ArgumentError(
                f"{name} is a mask of {len(values)} values, but {data} has {n} examples. Give positions, or one value "
                "for each example."
            )
        return np.flatnonzero(np.asarray(values))
    for value in values:
        if not is_whole(value):
            raise ArgumentError(
                f"{name} holds {_short(value)}, a {type(value).__name__}, but positions are integers from 0 to {n - 1}."
            )
        if not 0 <= value < n:
            raise ArgumentError(f"{name} holds {int(value)}, but positions in {data} go from 0 to {n - 1}.")
    return np.array([int(value) for value in values], dtype=np.int64)


def _short(value: Any) -> str:
    return " ".join(repr(value).split())[:80]


def as_text(value: Any) -> str:
    """A text, a date (see :func:`date_text`) or ``None`` as a column of texts has it."""
    if isinstance(value, (np.datetime64, datetime.datetime)):
        aware = _has_zone(value)
        moment: datetime.datetime = as_dates([value])[0].item()
        return date_text(moment.replace(tzinfo=datetime.timezone.utc) if aware else moment)
    if isinstance(value, datetime.date):
        return date_text(value)
    return MISSING_TEXT if value is None else str.__str__(value)
