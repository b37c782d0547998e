"""The manifest, which says what a store's rows mean, and the plan of a change under way (docs/format.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import digest_of, read_checked

FORMAT, VERSION = "gradindex-store", 1
MANIFEST, PENDING, LOCK = "manifest.json", "pending.json", "lock"
SHARDS = "shards"
# What a manifest may list under "needs": parts of the format that came after version 1 and cannot be ignored.
FEATURES: tuple[str, ...] = ()

# What a store keeps for good; all else in a manifest changes with its shards.
FIXED = (
    "task",
    "map",
    "fingerprint",
    "dim",
    "row_type",
    "factors",
    "self_influence",
    "columns",
    "batch_size",
    "threads",
    "shard_rows",
)


def fingerprint(described: Mapping[str, Any]) -> str:
    """SHA-256 over what a row depends on besides its example: the format's version and the map."""
    return digest_of({"version": VERSION, "map": described})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete store.

    Raises:
        StoreError: there is none, it is damaged, or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(
            f"{folder} is not a gradindex store (no {MANIFEST}). Build one: gradindex build TASK --out DIR."
        )
    manifest = _read(path)
    if manifest["fingerprint"] != fingerprint(manifest["map"]):
        raise StoreError(f"{path} is damaged (its map does not match its fingerprint). Restore it from a copy.")
    return manifest


def read_pending(folder: Path) -> dict[str, Any] | None:
    """The plan of the change that is under way, or ``None``.

    Raises:
        StoreError: it is damaged, or of another version.
    """
    path = folder / PENDING
    return _read(path) if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        version = _version(path)
        if version == 0:
            raise StoreError(f"{path.parent} has format version 0, of a trial version. Build it again.")
        if version > VERSION:
            raise StoreError(
                f"{path.parent} has format version {version}, but this gradindex reads up to {VERSION}. "
                "Upgrade gradindex."
            )
        value = read_checked(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}. Check the folder.") from None
    except (ValueError, KeyError, TypeError) as error:
        way_out = "Restore it from a copy, or build again elsewhere."
        if path.name == PENDING:
            way_out = "Delete it to give up the change that it plans, and give the command again."
        raise StoreError(f"{path} is damaged ({error}). {way_out}") from None
    unknown = [feature for feature in value["needs"] if feature not in FEATURES]
    if unknown:
        raise StoreError(f"{path.parent} uses {', '.join(unknown)}, which this gradindex does not know. Upgrade it.")
    return value


def _version(path: Path) -> int:
    """Read before the checksum, whose rule may change with it."""
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is not JSON") from None
    if value["format"] != FORMAT:
        raise ValueError("another format")
    return int(value["version"])


def differences(stored: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two manifests' maps and contents, in words; what ``other`` does not say is left out."""
    found = [name for name in other["map"] if stored["map"].get(name) != other["map"][name]]
    if "layers" in found and "checkpoints" in found:
        # Rates are listed for the tracked parameters alone, so that other layers always list others.
        files = [[item["sha256"] for item in side["map"]["checkpoints"]] for side in (stored, other)]
        if files[0] == files[1]:
            found.remove("checkpoints")
    named = {"columns": "columns", "self_influence": "self_influence", "row_type": "row type", "factors": "factors"}
    return found + [words for name, words in named.items() if name in other and stored[name] != other[name]]
