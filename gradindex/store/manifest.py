"""The manifest, which says what a store's rows mean, and the plan of a change under way (docs/format.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import checked, digest_of, is_there, read_checked, read_text
from .forms import DATES_NEED, check_manifest, check_pending, check_unfinished

FORMAT, VERSION = "gradindex-store", 1
MANIFEST, PENDING, LOCK, LOG = "manifest.json", "pending.json", "lock", "log.jsonl"
SHARDS, INDEX = "shards", "index"
# Beside a plan: names of the shards that are of no manifest yet, for when the plan is taken away.
UNFINISHED = "unfinished.json"
# What a manifest may list under "needs": parts of the format that came after version 1 and cannot be ignored.
FEATURES = (DATES_NEED,)

# What changes with the shards; a change keeps all else, also what a later version may have added.
CHANGING = ("format", "version", "generation", "shards", "sha256")


def fingerprint(described: Mapping[str, Any]) -> str:
    """SHA-256 over what a row depends on besides its example: the format's version and the map."""
    return digest_of({"version": VERSION, "map": described})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete store.

    Raises:
        StoreError: there is none, it is damaged, or of another version.
    """
    path = folder / MANIFEST
    if not is_there(path):
        raise StoreError(
            f"{folder} is not a gradindex store (no {MANIFEST}). Build one: gradindex build TASK --out DIR."
        )
    manifest = _read(path, check_manifest)
    if manifest["fingerprint"] != fingerprint(manifest["map"]):
        raise StoreError(f"{path} is damaged (its map does not match its fingerprint). Restore it from a copy.")
    return manifest


def read_pending(folder: Path) -> dict[str, Any] | None:
    """The plan of the change that is under way, or ``None``.

    Raises:
        StoreError: it is damaged, or of another version.
    """
    path = folder / PENDING
    return _read(path, check_pending) if is_there(path) else None


def read_unfinished(folder: Path) -> dict[str, Any] | None:
    """The shards and bases of a change that has not ended: ``shards``, names, and ``bases``, a digest or null.

    Raises:
        StoreError: it is damaged, or another's file.
    """
    path = folder / UNFINISHED
    if not is_there(path):
        return None
    try:
        value = read_checked(path)
        check_unfinished(value)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged ({error}). Delete it; shards of a change that was given up then stay."
        ) from None
    return value


def _read(path: Path, check: Callable[[Any], None]) -> dict[str, Any]:
    try:
        content = read_text(path)
        version = _version(content)
        if version == 0:
            raise StoreError(f"{path.parent} has format version 0, of a trial version. Build it again.")
        if version > VERSION:
            raise StoreError(
                f"{path.parent} has format version {version}, but this gradindex reads up to {VERSION}. "
                "Upgrade gradindex."
            )
        value = checked(content)
        unknown = [feature for feature in value["needs"] if feature not in FEATURES]
        if not unknown:  # else its form may be another one as well
            check(value)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}. Check the folder.") from None
    except (ValueError, KeyError, TypeError) as error:
        way_out = "Restore it from a copy, or delete the folder and build again."
        if path.name == PENDING and (path.parent / MANIFEST).exists():
            way_out = "Delete it to give up the change that it plans, and give the command again."
        raise StoreError(f"{path} is damaged ({error}). {way_out}") from None
    if unknown:
        named = ", ".join(map(str, unknown)).encode("ascii", "backslashreplace").decode()[:100]
        raise StoreError(f"{path.parent} uses {named}, which this gradindex does not know. Upgrade it.")
    return value


def _version(content: bytes) -> int:
    """Found before the checksum is looked at, whose rule may change with it; no number but in its place is taken."""
    found = re.match(rb'\s*{\s*"format": "([^"]*)",\s*"version": (\d{1,9}),', content)
    if found is None:
        raise ValueError("it does not begin as a manifest does")
    if found[1].decode(errors="replace") != FORMAT:
        raise ValueError("another format")
    return int(found[2])


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
