"""The JSON files of a store: the manifest, the plan of a change under way, and what is of neither (docs/format.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ArgumentError, StoreError
from ..files import checked, is_there, read_checked, read_text, storing, write_checked
from . import runs
from .forms import DATES_NEED, WIDE_NEED, check_manifest, check_pending, check_unfinished
from .manifest import VERSION, Manifest, ShardEntry

FORMAT = "gradindex-store"
MANIFEST, PENDING, LOCK, LOG = "manifest.json", "pending.json", "lock", "log.jsonl"
SHARDS, INDEX, MOMENTS = "shards", "index", "moments"
# Beside a plan: names of the shards that are of no manifest yet, for when the plan is taken away.
UNFINISHED = "unfinished.json"
# What a manifest may list under "needs": parts of the format that came after version 1 and cannot be ignored.
FEATURES = (DATES_NEED, WIDE_NEED)


class PlannedShard(NamedTuple):
    """A shard that a change makes.

    Args:
        ids: runs ``[start, stop]``.
        sources: where rows are copied, the store, the shard and what is added to its ids: ``[folder, name, shift]``.
        origins: where copied rows were computed, see :class:`ShardEntry`.
        name: given when the plan is written.
    """

    ids: Sequence[Sequence[int]]
    sources: Sequence[Sequence[Any]] = ()
    origins: list[list[Any]] | None = None
    name: str = ""

    @property
    def rows(self) -> int:
        """How many ids it has."""
        return runs.count(self.ids)

    def to_json(self) -> dict[str, Any]:
        """As the plan has it."""
        written = {"name": self.name, "ids": [list(run) for run in self.ids], "sources": [*map(list, self.sources)]}
        return written | ({} if self.origins is None else {"origins": self.origins})


class Superseded(NamedTuple):
    """Names of shards, and the digest of bases, that a change leaves behind or has not finished."""

    shards: Sequence[str] = ()
    bases: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a file has it."""
        return {"shards": list(self.shards), "bases": self.bases}


@dataclass(frozen=True)
class Plan:
    """A change under way.

    Args:
        job: the command.
        after: what the manifest says in the end, without its shards.
        data: by which the same data are known again.
        shards: to be made.
        keep: entries of the manifest that stay.
        supersedes: what the store no longer needs in the end.
    """

    job: str
    after: Manifest
    data: Any
    shards: tuple[PlannedShard, ...]
    keep: tuple[ShardEntry, ...] = ()
    supersedes: Superseded = field(default_factory=Superseded)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """From a file whose form was checked."""
        shards = (
            PlannedShard(shard["ids"], shard.get("sources", ()), shard.get("origins"), shard["name"])
            for shard in value["plan"]
        )
        after = Manifest.from_json(value["after"])
        if after.fingerprint != value["after"]["fingerprint"]:
            raise ValueError("its map does not match its fingerprint")
        superseded = value.get("supersedes", {"shards": (), "bases": None})
        return cls(
            value["job"], after, value["after"]["data"], tuple(shards),
            tuple(map(ShardEntry.from_json, value["keep"])), Superseded(superseded["shards"], superseded["bases"]),
        )  # fmt: skip

    @property
    def names(self) -> list[str]:
        """Of all shards that it makes or keeps."""
        return [shard.name for shard in self.shards] + [entry.name for entry in self.keep]

    def to_json(self) -> dict[str, Any]:
        """As its file has it."""
        return {
            **_header(self.after),
            "job": self.job,
            "after": {**self.after.to_json(), "data": self.data},
            "plan": [shard.to_json() for shard in self.shards],
            "keep": [entry.to_json() for entry in self.keep],
            "supersedes": self.supersedes.to_json(),
        }


def _header(manifest: Manifest) -> dict[str, Any]:
    return {"format": FORMAT, "version": manifest.version, "needs": manifest.needs}


def as_json(manifest: Manifest) -> dict[str, Any]:
    """All that the file of a manifest says, but for its checksum."""
    return {**_header(manifest), **manifest.to_json(), "shards": [entry.to_json() for entry in manifest.shards]}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete store.

    Raises:
        StoreError: there is none, it is damaged, or of another version.
    """
    path = folder / MANIFEST
    if not is_there(path):
        raise StoreError(
            f"{folder} is not a gradindex store (no {MANIFEST}). Build one: gradindex build TASK --out DIR."
        )
    value = _read(path, check_manifest)
    manifest = Manifest.from_json(value)
    if manifest.fingerprint != value["fingerprint"]:
        raise StoreError(f"{path} is damaged (its map does not match its fingerprint). Restore it from a copy.")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest, which changes the store at once.

    Raises:
        StoreError: it cannot be written, or shards overlap.
    """
    for before, after in zip(manifest.shards, manifest.shards[1:], strict=False):
        if before.last >= after.first:
            raise StoreError(f"{folder}: the ids of {before.name} and {after.name} overlap.")
    written = as_json(manifest)
    try:
        check_manifest(written)  # what could not be read is never written
    except ValueError as error:
        raise StoreError(f"{folder} cannot be changed in this way: {error}. It stays as it was.") from None
    with storing(folder / MANIFEST):
        write_checked(folder / MANIFEST, written)


def read_plan(folder: Path) -> Plan | None:
    """The change that is under way, or ``None``.

    Raises:
        StoreError: its plan is damaged, or of another version.
    """
    path = folder / PENDING
    if not is_there(path):
        return None
    value = _read(path, check_pending)
    try:
        return Plan.from_json(value)
    except ValueError as error:
        raise _damaged(path, error) from None


def write_plan(folder: Path, plan: Plan) -> None:
    """Write down a change that is about to begin.

    Raises:
        OSError: it cannot be written.
    """
    write_checked(folder / PENDING, plan.to_json())


def check_plan(folder: Path, plan: Plan) -> None:
    """Refuse a plan that could not be read: such is never written.

    Raises:
        ArgumentError: says why.
    """
    try:
        check_pending(json.loads(json.dumps(plan.to_json())))
    except ValueError as error:
        raise ArgumentError(f"{folder} cannot hold this: {error}. Change the task.") from None


def read_unfinished(folder: Path) -> Superseded | None:
    """The shards and bases of a change that has not ended.

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
            f"{path} is damaged ({error}). Delete it; shards of an abandoned change then stay on disk."
        ) from None
    return Superseded(value["shards"], value["bases"])


def _read(path: Path, check: Callable[[Any], None]) -> dict[str, Any]:
    try:
        content = read_text(path)
        version = _version(content)
        if version == 0:
            raise StoreError(f"{path.parent} has format version 0, of a pre-release. Build it again.")
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
        raise _damaged(path, error) from None
    if unknown:
        named = ", ".join(map(str, unknown)).encode("ascii", "backslashreplace").decode()[:100]
        raise StoreError(f"{path.parent} uses {named}, which this gradindex does not know. Upgrade it.")
    return value


def _damaged(path: Path, error: Exception) -> StoreError:
    way_out = "Restore it from a copy, or delete the folder and build again."
    if path.name == PENDING and (path.parent / MANIFEST).exists():
        way_out = "Delete it to abandon the change that it plans, and rerun the command."
    return StoreError(f"{path} is damaged ({error}). {way_out}")


def _version(content: bytes) -> int:
    """Found before the checksum is looked at, whose rule may change with it; no number but in its place is taken."""
    found = re.match(rb'\s*{\s*"format": "([^"]*)",\s*"version": (\d{1,9}),', content)
    if found is None:
        raise ValueError("it does not start like a manifest")
    if found[1].decode(errors="replace") != FORMAT:
        raise ValueError("another format")
    return int(found[2])
