"""What a JSON value must be: checks that are put together, and say where a value is not what it must be."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Raises Wrong where a value is not what it must be.
Check = Callable[[Any], None]

# The most that NumPy's int64 and the system's file offsets hold.
LARGEST = (1 << 63) - 1
_SHOWN = 40


class Wrong(ValueError):  # noqa: N818  # "Error" says nothing more
    """A value is not what it must be.

    Args:
        said: the rest of the sentence that its place begins.
        at: its place, such as ``shards[2].rows``; found on the way back, so that what is right costs nothing.
    """

    def __init__(self, said: str, at: str = "") -> None:
        super().__init__(f"{at.removeprefix('.') or 'it'} {said}")
        self.said, self.at = said, at

    def inside(self, place: str) -> Wrong:
        """The same, seen from what holds the value."""
        return Wrong(self.said, place + self.at)


def not_as(value: Any, needed: str) -> Wrong:
    """The error for a value that should be something else."""
    containers: dict[Any, str] = {dict: "an object", list: "a list"}
    shown = containers.get(type(value)) or json.dumps(value, default=repr)
    return Wrong(f"is {shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + '...'}, but must be {needed}")


def whole(least: int = 0, most: int = LARGEST) -> Check:
    """A whole number, its bounds included; true and 1.0 are none."""

    def check(value: Any) -> None:
        if type(value) is not int or not least <= value <= most:
            raise not_as(value, f"an integer from {least} to {most}")

    return check


def number(least: float = -sys.float_info.max, most: float = sys.float_info.max) -> Check:
    """A finite number, its bounds included."""

    def check(value: Any) -> None:
        if type(value) not in (int, float) or not least <= value <= most:
            raise not_as(value, f"a number from {least:.6g} to {most:.6g}")

    return check


def text(pattern: str | None = None, what: str = "a text") -> Check:
    """A text without half characters, which no file or terminal takes; of this pattern, called ``what``."""
    matches = re.compile(pattern or ".*", re.DOTALL).fullmatch

    def check(value: Any) -> None:
        if type(value) is not str or not matches(value):
            raise not_as(value, what)
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise not_as(value, "valid Unicode text") from None

    return check


def boolean(value: Any) -> None:
    """True or false."""
    if type(value) is not bool:
        raise not_as(value, "true or false")


def anything(value: Any) -> None:
    """Whatever there is."""


def one_of(*values: str | None) -> Check:
    """One of some texts, or null."""

    def check(value: Any) -> None:
        if not isinstance(value, (str, type(None))) or value not in values:
            raise not_as(value, f"one of {', '.join(json.dumps(each) for each in values)}")

    return check


def nullable(inner: Check) -> Check:
    """Null, or something else."""

    def check(value: Any) -> None:
        if value is not None:
            inner(value)

    return check


def list_of(inner: Check, least: int = 0, most: int = LARGEST) -> Check:
    """A list of such values, with so many at least and at most."""

    def check(value: Any) -> None:
        if type(value) is not list:
            raise not_as(value, "a list")
        if not least <= len(value) <= most:
            raise Wrong(f"has {len(value)} items, but must have {'at least' if len(value) < least else 'at most'} "
                        f"{least if len(value) < least else most}")  # fmt: skip
        place = 0
        try:
            for item in value:
                inner(item)
                place += 1
        except Wrong as error:
            raise error.inside(f"[{place}]") from None

    return check


def tuple_of(*inner: Check) -> Check:
    """A list of exactly such values."""

    def check(value: Any) -> None:
        if type(value) is not list or len(value) != len(inner):
            raise not_as(value, f"a list of {len(inner)}")
        for place, each in enumerate(inner):
            try:
                each(value[place])
            except Wrong as error:
                raise error.inside(f"[{place}]") from None

    return check


def map_of(key: Check, inner: Check) -> Check:
    """An object of such keys and such values."""

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise not_as(value, "an object")
        for name, item in value.items():
            try:
                key(name)
            except Wrong as error:
                raise Wrong(f"has a key that {error.said}") from None
            try:
                inner(item)
            except Wrong as error:
                raise error.inside(f".{json.dumps(name)[1:-1][:_SHOWN]}") from None

    return check


def record(needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with such keys; others are a later version's, and passed over."""
    known = [*needed.items(), *(optional or {}).items()]

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise not_as(value, "an object")
        for name, inner in known:
            if name in value:
                try:
                    inner(value[name])
                except Wrong as error:
                    raise error.inside(f".{name}") from None
            elif name in needed:
                raise Wrong("is missing", f".{name}")

    return check


def runs(value: Any) -> None:
    """A set of ids as ``[[start, stop], ...]``, ascending and apart."""
    needed = "runs of ids, [[start, stop], ...], ascending and apart"
    if type(value) is not list:
        raise not_as(value, needed)
    if not value:
        return
    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError):
        raise not_as(value, needed) from None
    if array.dtype != np.int64 or array.ndim != 2 or array.shape[1] != 2:
        raise not_as(value, needed)
    edges = array.ravel()
    if edges[0] < 0 or (edges[1::2] <= edges[::2]).any() or (edges[2::2] < edges[1:-1:2]).any():
        raise not_as(value, needed)
