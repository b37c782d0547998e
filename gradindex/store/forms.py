"""What a store's JSON files must be (docs/format.md): a sound checksum alone does not make them a store's.

Whoever reads one of these files checks it here once, so that what comes after can rely on types, sizes and names: a
name never leads out of the folder, and a size is never more than the file that it speaks of.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np

from ..choices import FACTOR_TYPES, NORMS, ROW_TYPES
from ..dates import DATES
from ..schema import (
    LARGEST,
    anything,
    boolean,
    list_of,
    map_of,
    not_as,
    nullable,
    number,
    one_of,
    record,
    runs,
    text,
    tuple_of,
    whole,
)

_DIGEST = text("[0-9a-f]{64}", "a SHA-256 in hexadecimal")
_NAME = text(r"\d{4,9}-\d{5,9}", "the name of a shard, such as 0001-00000")
# Of NumPy; "U" stands for text in a manifest, which shards keep as bytes, and dates are numbers there.
_TYPE = text(r"[<>|=]?[biufcS]\d{1,9}", "a type in NumPy's notation")
_COLUMN_TYPE = text(rf"U|[<>|=]?[biufc]\d{{1,2}}|{re.escape(DATES)}", f"a type in NumPy's notation, {DATES} or U")
_SIZE = whole(0, 1 << 48)
# Bits of a number of packed factors; and what is in the name of an array of those that some rows have whole.
PACKED_BITS = (8, 12, 16, 24)
WHOLE = "/whole/"
# In "needs": a reader of before would take a column of dates for damaged.
DATES_NEED = "dates"
# Such a reader would add rows that lack their wide ones.
WIDE_NEED = "wide"
# Far more than a machine has, and few enough for it to refuse.
_MOST_ROWS = 1 << 40
_THREADS, _ROWS = whole(1, 4096), whole(1, _MOST_ROWS)
_of_entry = itemgetter("name", "first", "last", "rows", "data", "seal")
_DIGEST_DIGITS = 32


_any_text = text()


def _column(value: Any) -> None:
    _any_text(value)
    if not value or "\0" in value or value.startswith("/") or ".." in value.split("/"):
        raise not_as(value, "the name of a column, which is no path")


_NAMES, _DIGESTS = (re.compile(f"({one}\n)+").fullmatch for one in (r"\d{4,9}-\d{5,9}", "[0-9a-f]{64}"))


def _entries(value: Any) -> None:
    """The shards of a manifest: all at once, for every opening of a store waits for it; what is wrong, one by one."""
    try:
        names, first, last, rows, data, seals = zip(*map(_of_entry, value), strict=True)
        numbers = first + last + rows
        plain = set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < LARGEST
        named, digests = ("\n".join((*texts, "")) for texts in (names, data + seals))
        alone = named.count("\n") == len(names) and digests.count("\n") == 2 * len(names)
        plain = plain and type(value) is list and not any("origins" in entry for entry in value)
        if plain and alone and max(rows) <= _MOST_ROWS and _NAMES(named) and _DIGESTS(digests):
            return
    except (TypeError, KeyError, ValueError):
        pass
    list_of(_entry, 1)(value)


_step, _rates = nullable(number()), map_of(_any_text, number())
_entry = record(
    {"name": _NAME, "first": whole(), "last": whole(0, LARGEST - 1), "rows": _ROWS, "data": _DIGEST, "seal": _DIGEST},
    {"origins": list_of(tuple_of(_DIGEST, whole(), whole(0, LARGEST - 1)), 1)},
)
_layer = record(
    {"name": _any_text, "parameters": list_of(_any_text), "shape": tuple_of(_SIZE, _SIZE), "route": _any_text}
)
_map = record(
    {
        "model": list_of(tuple_of(_any_text, list_of(_SIZE))),
        "loss": _any_text,
        "layers": list_of(_layer, 1),
        "checkpoints": list_of(
            record(
                {
                    "sha256": _DIGEST,
                    "step": anything,
                    "weighting": _any_text,
                    "learning_rates": map_of(_any_text, number()),
                }
            ),
            1,
        ),
        "projection": record({"kind": _any_text, "dim": whole(1, 1 << 40), "seed": whole(-LARGEST)}),
        "precision": _any_text,
        "unit_norm": boolean,
        "bases": nullable(_DIGEST),
        "fitted_to": nullable(whole()),
    },
    {"preconditioner": nullable(_any_text)},
)
_counted = {"parameters": whole(), "numbers": whole()}
_summary = record({"why": _any_text, **_counted, "first": list_of(_any_text)})
_told = {
    "tracked": record(
        {
            "layers": nullable(list_of(_any_text)),
            **_counted,
            "left_out": list_of(_summary),
            "noted": list_of(_summary),
        }
    ),
    "sources": list_of(
        record(
            {
                "name": _any_text,
                "kind": _any_text,
                "from_model": record({"parameters": whole(), "first": list_of(_any_text)}),
            }
        )
    ),
}
_packing = map_of(text(r"\d{1,9}", "the number of a layer"), tuple_of(*2 * [tuple_of(whole(0, 1 << 16), whole(8, 24))]))
_described = {
    "task": _any_text,
    "map": _map,
    "dim": whole(1, 1 << 40),
    "row_type": one_of(*ROW_TYPES),
    "factors": one_of(None, *FACTOR_TYPES),
    "self_influence": one_of(*NORMS),
    "columns": map_of(_column, _COLUMN_TYPE),
    "next_id": whole(1),
    "removed": runs,
    "fingerprint": _DIGEST,
    "batch_size": _ROWS,
    "shard_rows": _ROWS,
    "threads": _THREADS,
    "generation": whole(1, 1 << 53),
}
_may_be = {"merged": list_of(_DIGEST), "packing": _packing, "wide": whole(2, 1 << 40), **_told}
_manifest = record({"needs": list_of(_any_text), **_described, "shards": _entries}, _may_be)
_planned = record(
    {"name": _NAME, "ids": runs},
    {
        "sources": list_of(tuple_of(_any_text, _NAME, whole(0, LARGEST - 1))),
        "origins": list_of(tuple_of(_DIGEST, whole(), whole(0, LARGEST - 1)), 1),
    },
)
_superseded = record({"shards": list_of(_NAME), "bases": nullable(_DIGEST)})
_pending = record(
    {
        "needs": list_of(_any_text),
        "job": text("[a-z-]{1,40}", "the name of a command"),
        "after": record({**_described, "data": anything}, _may_be),
        "plan": list_of(_planned),
        "keep": list_of(_entry),
    },
    {"supersedes": _superseded},
)
_container = {
    "bytes": whole(1),
    "block_bytes": whole(1 << 9, 1 << 26),
    "arrays": map_of(_any_text, record({"offset": whole(), "dtype": _TYPE, "shape": list_of(_SIZE, 1, 4)})),
    "blocks": text(f"([0-9a-f]{{{_DIGEST_DIGITS}}})*", "digests in hexadecimal"),
}
_sealed = record(_container)
_moments = record(
    {
        **_container,
        "map": _DIGEST,
        "ids": runs,
        "covers": list_of(tuple_of(_DIGEST, whole(), whole(0, LARGEST - 1))),
    }
)
_seal = record(
    {
        **_container,
        "map": _DIGEST,
        "ids": runs,
        "row_type": one_of(*ROW_TYPES),
        "samples": list_of(tuple_of(whole(0, LARGEST - 1), _any_text)),
    }
)


def needs_of(columns: Mapping[str, str], wide: int | None) -> list[str]:
    """What a reader must know to read a store of these columns and wide rows, besides version 1."""
    return ([DATES_NEED] if DATES in columns.values() else []) + ([] if wide is None else [WIDE_NEED])


def version_of(row_type: str, packed: bool) -> int:
    """The lowest version of the format that has what a store has: rows of a type, and whether factors are packed."""
    return 2 if packed or row_type == "int4" else 1


def check_manifest(value: Any) -> None:
    """Refuse what is no manifest.

    Raises:
        ValueError: says where it is not what it must be.
    """
    _manifest(value)
    _check_described(value, value["version"])
    _check_needs(value["needs"], value)
    last = -1
    for place, entry in enumerate(value["shards"]):
        at = f"shards[{place}]"
        _check_entry(entry, at)
        if entry["first"] <= last:
            raise ValueError(f"{at} begins with id {entry['first']}, but the one before ends with {last}")
        last = entry["last"]
    if last >= value["next_id"]:
        raise ValueError(f"next_id is {value['next_id']}, but there are ids up to {last}")
    _check_removed(value)


def check_pending(value: Any) -> None:
    """Refuse what is no plan.

    Raises:
        ValueError: says where it is not what it must be.
    """
    _pending(value)
    _check_described(value["after"], value["version"], "after.")
    _check_needs(value["needs"], value["after"])
    names = [planned["name"] for planned in value["plan"]] + [entry["name"] for entry in value["keep"]]
    if len(set(names)) < len(names):
        raise ValueError("a shard is planned twice")
    for place, planned in enumerate(value["plan"]):
        if not planned["ids"] or planned["ids"][-1][1] > value["after"]["next_id"]:
            raise ValueError(f"plan[{place}].ids has none, or some that are not below next_id")
    for place, entry in enumerate(value["keep"]):
        _check_entry(entry, f"keep[{place}]")


def check_unfinished(value: Any) -> None:
    """Refuse what is no list of unfinished shards.

    Raises:
        ValueError: says where it is not what it must be.
    """
    _superseded(value)


def check_moments(value: Any) -> None:
    """Refuse what is no seal of second moments.

    Raises:
        ValueError: says where it is not what it must be.
    """
    _moments(value)
    check_container(value, checked=True)
    shapes = {name: tuple(place["shape"]) for name, place in value["arrays"].items()}
    dims = [shape for name, shape in shapes.items() if name == "sums" and len(shape) == 2]
    count, dim = dims[0] if dims else (0, 0)
    triangle = count, dim * (dim + 1) // 2
    if shapes != {"weighted": triangle, "plain": triangle, "sums": (count, dim)}:
        raise ValueError(f"its arrays have shapes {shapes}, but must be two triangles and sums")
    if any(place["dtype"] != "<f8" for place in value["arrays"].values()):
        raise ValueError("its arrays are not of type <f8")


def check_seal(value: Any) -> None:
    """Refuse what is no seal of a shard.

    Raises:
        ValueError: says where it is not what it must be.
    """
    _seal(value)
    if not value["ids"]:
        raise ValueError("ids has none")
    check_container(value, checked=True)
    count = sum(stop - start for start, stop in value["ids"])
    for name, place in value["arrays"].items():
        rows = place["shape"][0]
        if rows > count if WHOLE in name else rows != count:
            raise ValueError(f"{name} has {rows} rows, but there are {count} ids")


def check_container(value: Any, checked: bool = False) -> None:
    """Refuse what is no seal of a file of arrays; ``checked`` where its types are known.

    Raises:
        ValueError: says where it is not what it must be.
    """
    if not checked:
        _sealed(value)
    size, blocks = value["bytes"], -(-value["bytes"] // value["block_bytes"])
    if len(value["blocks"]) != blocks * _DIGEST_DIGITS:
        raise ValueError(f"blocks has {len(value['blocks']) // _DIGEST_DIGITS} digests, but the file {blocks} blocks")
    for name, place in value["arrays"].items():
        needed = place["offset"] + math.prod(place["shape"]) * _item_bytes(place["dtype"])
        if needed > size:
            raise ValueError(f"{name} ends at byte {needed}, but the file has {size}")


@lru_cache(256)
def _item_bytes(kind: str) -> int:
    try:
        size = np.dtype(kind).itemsize
    except TypeError:
        size = 0
    if size == 0:
        raise ValueError(f"there is no type {kind!r}")
    return size


def _check_needs(needs: Sequence[str], described: Mapping[str, Any]) -> None:
    for feature in needs_of(described["columns"], described.get("wide")):
        if feature not in needs:
            raise ValueError(f"needs lacks {json.dumps(feature)}, but the store has some")


def _check_described(value: Mapping[str, Any], version: int, before: str = "") -> None:
    packing, layers = value.get("packing", {}), value["map"]["layers"]
    if version < (needed := version_of(value["row_type"], bool(packing))):
        raise ValueError(f"{before}row_type or packing needs version {needed}, not {version}")
    if packing and value["factors"] is None:
        raise ValueError(f"{before}packing is of factors, but there are none")
    for layer, sides in packing.items():
        if str(int(layer)) != layer or int(layer) >= len(layers):
            raise ValueError(f"{before}packing.{layer} is of no layer, there are {len(layers)}")
        for (kept, bits), size in zip(sides, reversed(layers[int(layer)]["shape"]), strict=True):
            if bits not in PACKED_BITS or kept > size:
                raise ValueError(f"{before}packing.{layer} has [{kept}, {bits}] for {size} numbers")
    checkpoints = len(value["map"]["checkpoints"])
    if value["dim"] % checkpoints:
        raise ValueError(f"{before}dim is {value['dim']}, but must be a multiple of the {checkpoints} checkpoints")
    if value.get("wide", 0) % 2:
        raise ValueError(f"{before}wide is {value['wide']}, but must be even")
    if value["removed"] and value["removed"][-1][1] > value["next_id"]:
        raise ValueError(f"{before}removed has ids that are not below next_id")


def _check_entry(entry: Mapping[str, Any], at: str) -> None:
    if not 1 <= entry["rows"] <= entry["last"] - entry["first"] + 1:
        raise ValueError(f"{at} has {entry['rows']} rows, but ids from {entry['first']} to {entry['last']}")
    last = entry["first"] - 1
    for _, begin, end in entry.get("origins", ()):
        if not last < begin <= end <= entry["last"]:
            raise ValueError(f"{at}.origins are not ascending and apart, or not of its ids")
        last = end


def _check_removed(value: Mapping[str, Any]) -> None:
    """Removed ids are ids of shards, as far as the manifest alone can tell, and not all of them."""
    if not value["removed"]:
        return
    removed = np.array(value["removed"], dtype=np.int64)
    edges = np.array([(entry["first"], entry["last"]) for entry in value["shards"]], dtype=np.int64)
    for places in (removed[:, 0], removed[:, 1] - 1):
        owner = np.searchsorted(edges[:, 0], places, side="right") - 1
        if (owner < 0).any() or (places > edges[owner, 1]).any():
            raise ValueError("removed has ids that no shard has")
    if int((removed[:, 1] - removed[:, 0]).sum()) >= sum(entry["rows"] for entry in value["shards"]):
        raise ValueError("removed has as many ids as there are rows")
