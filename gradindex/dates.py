"""Dates as columns keep them, in microseconds of the calendar, made of whatever people have.

A date without a time is its midnight. Of a date with a time zone the moment is kept, as UTC and without a zone.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The type of a column of dates; a shard has the same 8 bytes as whole numbers, for HDF5 has no dates.
DATES, STORED_DATES = "<M8[us]", "<i8"

_EPOCH_YEAR, _FIRST_YEAR, _LAST_YEAR = 1970, datetime.MINYEAR, datetime.MAXYEAR
_TEXT = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?:(:\d\d)(?:\.(\d{1,6})0*)?)?(Z|[+-]\d\d:\d\d)?)?", re.ASCII)


class NotKeptError(ValueError):
    """A date that cannot be kept to the digit.

    Args:
        place: of the date, among those given.
        said: what the date is, and what can be kept.
        way_out: what to do.
    """

    def __init__(self, place: int, said: str, way_out: str) -> None:
        super().__init__(said)
        self.place, self.way_out = place, way_out


def as_dates(values: NDArray[np.datetime64] | Sequence[Any]) -> NDArray[np.datetime64]:
    """Dates as microseconds, NaT where there is none.

    Args:
        values: (m,) ``datetime64`` of any unit, or a sequence of ``datetime.date``, ``datetime.datetime``, pandas'
            ``Timestamp``, ``datetime64`` and ``None``.

    Returns:
        (m,) ``datetime64[us]``.

    Raises:
        NotKeptError: one is finer than a microsecond, or no year from 1 to 9999 has it.
    """
    if isinstance(values, np.ndarray):
        return _of_array(values)
    made = np.empty(len(values), dtype=DATES)
    for place, value in enumerate(values):
        made[place] = _of_value(value, place)
    return made


def read_date(text: str) -> np.datetime64:
    """A date in ISO 8601, such as ``2024-01-31``, ``2024-01-31T08:30:00.25`` or ``2024-01-31 08:30+01:00``.

    Raises:
        ValueError: the text is none.
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no date")
    day, minutes, seconds, fraction, zone = found.groups()
    zone = "+00:00" if zone == "Z" else zone or ""
    moment = f"{day}T{minutes or '00:00'}{seconds or ':00'}.{fraction or '':0<6}{zone}"
    return _of_value(datetime.datetime.fromisoformat(moment), 0)


def _of_array(dates: NDArray[np.datetime64]) -> NDArray[np.datetime64]:
    there = ~np.isnat(dates)
    # Days around 1970 are all that 64 bits hold of these units; NumPy does not turn them into years.
    tiny = np.datetime_data(dates.dtype)[0] in ("ps", "fs", "as")
    years = (np.zeros_like(dates, "M8[Y]") if tiny else dates.astype("M8[Y]")).astype(np.int64) + _EPOCH_YEAR
    outside = there & ((years < _FIRST_YEAR) | (years > _LAST_YEAR))
    if outside.any():
        place = int(outside.argmax())
        raise _outside(place, f"the year {years[place]}")
    kept = dates.astype(DATES)
    finer = there & (kept.astype(dates.dtype) != dates)
    if finer.any():
        place = int(finer.argmax())
        raise _finer(place, str(dates[place]))
    return kept


def _of_value(value: Any, place: int) -> np.datetime64:
    if value is None:
        return np.datetime64("NaT", "us")
    if isinstance(value, np.datetime64):
        try:
            kept: np.datetime64 = _of_array(np.asarray([value]))[0]
        except NotKeptError as error:
            raise NotKeptError(place, str(error), error.way_out) from None
        return kept
    if not isinstance(value, datetime.datetime):
        return np.datetime64(value, "us")
    if type(value) is not datetime.datetime:  # pandas' Timestamp: it may be finer, and of any year
        if getattr(value, "nanosecond", 0):
            raise _finer(place, str(value))
        parts = value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond
        try:
            value = datetime.datetime(*parts, tzinfo=value.tzinfo, fold=value.fold)
        except ValueError:
            raise _outside(place, f"the year {value.year}") from None
    if value.utcoffset() is not None:
        try:
            value = value.astimezone(datetime.timezone.utc)
        except OverflowError:
            raise _outside(place, f"{value}, in UTC") from None
    return np.datetime64(value.replace(tzinfo=None), "us")


def _finer(place: int, shown: str) -> NotKeptError:
    return NotKeptError(
        place,
        f"the date {shown}, but dates are kept to the microsecond",
        'Round it, as with .astype("datetime64[us]") or Series.dt.round("us"), or give text.',
    )


def _outside(place: int, shown: str) -> NotKeptError:
    return NotKeptError(
        place, f"a date of {shown}, but dates are kept of the years {_FIRST_YEAR} to {_LAST_YEAR}", "Give it as text."
    )
