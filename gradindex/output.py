"""What a person or another program gets: tables, strict JSON, cells of CSV, names of columns, files of their own."""

from __future__ import annotations

import datetime
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from .errors import DependencyError, StoreError

# Keys of every table and record. A column of such a name is shown under another one.
_OURS = frozenset(("query", "kind", "rank", "id", "score", "self_influence", "losses", "row", "shown"))
_NUMBERED = re.compile(r"(self_influence|loss)_\d+")
_PREFIX = "columns."

# Categories of characters that move the cursor, colour what follows, turn its direction or break the line. Joiners,
# which scripts and emoji need, are left.
_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_JOINERS = "\u200c\u200d"

# What makes a spreadsheet take a cell for a formula.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|infinity|nan)", re.ASCII | re.IGNORECASE)

# Records of a table that are kept; of more only the widths are, and they are made once more.
_KEPT = 10_000

# How much of a file is looked at to tell whose it is.
_HEAD_BYTES = 1024


def shown_as(column: str) -> str:
    """What a column is called beside an answer's own keys: ``columns.id`` for ``id``, as in Parquet; most as they are.

    Filters take the column's real name.
    """
    taken = column in _OURS or column.startswith(_PREFIX) or _NUMBERED.fullmatch(column)
    return f"{_PREFIX}{column}" if taken else column


def printable(text: str) -> str:
    """The text with control characters, marks of direction and line breaks written as their escape sequences."""
    if text.isprintable():
        return text
    return "".join(
        character
        if unicodedata.category(character) not in _UNSEEN or character in _JOINERS
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def date_text(date: datetime.date) -> str:
    """A date in ISO 8601, as short as it can be: ``2024-01-31`` (also for midnight), ``2024-01-31T08:30:00.25``."""
    if not isinstance(date, datetime.datetime):
        return date.isoformat()
    text = date.replace(tzinfo=None).isoformat()
    text = text.rstrip("0") if "." in text else text
    return text.removesuffix("T00:00:00") if date.tzinfo is None else f"{text}{date.isoformat()[-len('+00:00') :]}"


def plain(value: Any) -> Any:
    """A value as a cell shows it: dates as text, what is missing as nothing."""
    if isinstance(value, datetime.date):
        return date_text(value)
    return "" if value is None or value != value else value


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Records of the same keys as an aligned text table: numbers to the right, texts to the left."""
    return "\n".join(table_lines(lambda: records))


def table_lines(records: Callable[[], Iterable[Mapping[str, Any]]]) -> Iterator[str]:
    """The lines of :func:`table` for records that may be too many for the memory.

    Args:
        records: makes them; called a second time where there are many, once their widths are known.
    """
    kept: list[list[str]] = []
    widths: list[int] = []
    left: list[bool] = []
    count = 0
    for count, record in enumerate(records(), 1):
        if count == 1:
            kept = [[printable(name) for name in record]]
            widths, left = [len(name) for name in kept[0]], [_to_left(value) for value in record.values()]
        cells = _cells(record)
        widths = [width if width > len(cell) else len(cell) for width, cell in zip(widths, cells, strict=True)]
        if count <= _KEPT:
            kept.append(cells)
    if not count:
        yield "(nothing)"
    elif count > _KEPT:
        yield _aligned(kept[0], widths, left)
        for record in records():
            yield _aligned(_cells(record), widths, left)
    else:
        for cells in kept:
            yield _aligned(cells, widths, left)


def data_frame(columns: Mapping[str, Any], index: tuple[str, Any] | None = None) -> Any:
    """A pandas ``DataFrame``.

    Args:
        columns: values by name, all of one length.
        index: a name and values.

    Raises:
        DependencyError: pandas is missing.
    """
    try:
        import pandas
    except ImportError:
        raise DependencyError("to_pandas() needs the package pandas. Install it: pip install pandas.") from None
    rows = None if index is None else pandas.Index(index[1], name=index[0])
    return pandas.DataFrame(dict(columns), index=rows)


def as_html(facts: Mapping[str, str]) -> str:
    """Names and what there is to say of them, as a small table for a notebook."""
    cells = "".join(
        f'<tr><th style="text-align: left">{escape(printable(name))}</th>'
        f'<td style="text-align: left">{escape(printable(text))}</td></tr>'
        for name, text in facts.items()
    )
    return f"<table>{cells}</table>"


def _to_left(value: Any) -> bool:
    return value is None or isinstance(value, (str, datetime.date))


def _cells(record: Mapping[str, Any]) -> list[str]:
    """As text; what is missing is left blank."""
    return [
        printable(str(plain(value))) if not isinstance(value, float) else f"{value:.5g}" if value == value else ""
        for value in record.values()
    ]


def _aligned(line: list[str], widths: list[int], left: list[bool]) -> str:
    cells = zip(line, widths, left, strict=True)
    return "  ".join(cell.ljust(width) if to_left else cell.rjust(width) for cell, width, to_left in cells).rstrip()


def to_json(value: Any) -> str:
    """Strict JSON, in ASCII: NaN and infinity, which JSON lacks, as ``null``; dates as text."""
    try:
        return json.dumps(value, allow_nan=False, default=_date)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, default=_date)


def _date(value: Any) -> str:
    if isinstance(value, datetime.date):
        return date_text(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_cell(value: Any) -> Any:
    """:func:`plain`, that no spreadsheet runs: a text that begins as a formula gets ``'`` first, unless a number."""
    value = plain(value)
    if isinstance(value, str) and value.startswith(_FORMULA) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def check_file(path: Path, ours: bytes | None = None) -> None:
    """Refuse to write where something is that a user would miss.

    Args:
        path: a file to be written.
        ours: what a file that gradindex wrote for the same purpose has in its first 1,024 bytes; such a file may be
            replaced. By default nothing may.

    Raises:
        StoreError: something is there: a device, a pipe, a folder, a link, or another file.
    """
    if path.is_symlink():
        raise StoreError(f"{path} is a link. Give the file that it points to, or choose another name.")
    if not path.exists():
        return
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise StoreError(f"{path} is {what}, but must be the name of a file. Choose another name.")
    if ours is None:
        raise StoreError(f"{path} exists. Choose another name.")
    with path.open("rb") as file:
        if ours not in file.read(_HEAD_BYTES):
            raise StoreError(f"{path} exists and was not written by gradindex for this. Choose another name.")


@contextmanager
def new_file(path: Path, ours: bytes | None = None) -> Iterator[Path]:
    """As :func:`gradindex.files.replacing`, but what a user would miss is never replaced; see :func:`check_file`.

    Raises:
        StoreError: something is there, before the block or after it.
        OSError: the file cannot be written.
    """
    from .files import replacing  # late, so that --help answers at once

    check_file(path, ours)
    with replacing(path) as temporary:
        yield temporary
        check_file(path, ours)  # the block may take long
