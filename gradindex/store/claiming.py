"""A store's folder: who may change it, what in it is the store's own, and what of that is not needed any more.

A store touches nothing but what its manifest or its plan names, and a few names that nobody else uses for anything
else; a link in place of one of its folders would lead to another's files, so it is refused.
"""

from __future__ import annotations

import contextlib
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import ArgumentError, StoreError
from ..files import discard, is_lock, is_there, locked, storing, temporary_of, write_checked
from .bases import base_files
from .documents import (
    INDEX,
    LOCK,
    LOG,
    MANIFEST,
    MOMENTS,
    PENDING,
    SHARDS,
    UNFINISHED,
    Superseded,
    read_manifest,
    read_plan,
    read_unfinished,
)
from .manifest import Manifest

# The i-th of n parts of a job's shards, from 1 on.
Part = tuple[int, int]
_LOCKS = re.compile(rf"{LOCK}(-plan|-\d{{1,9}}-of-(\d{{1,9}}))?")
_BASES = re.compile(r"bases-[0-9a-f]{16}\.(h5|json)")
_SHARD_FILE = re.compile(r"(\d{4,9}-\d{5,9})\.(h5|json)")


def check_part(part: Part | None) -> None:
    """Refuse a part that there cannot be.

    Raises:
        ArgumentError: it is not from 1 to the number of parts.
    """
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ArgumentError(f"part is {part[0]}/{part[1]}, but must be from 1/{part[1]} to {part[1]}/{part[1]}.")


@contextmanager
def claimed(folder: Path, part: Part | None = None, *, new: bool = False) -> Iterator[None]:
    """Be the only process that changes a store, or that makes this part of it.

    Args:
        folder: the store's.
        part: let those in who make another part of as many.
        new: make the folder, unless something else is in it.

    Raises:
        StoreError: another process has it, it cannot be written, or it holds something else.
    """
    if new:
        _check_free(folder)
    _check_folders(folder)
    with contextlib.ExitStack() as stack:
        with storing(folder):
            if new:
                (folder / SHARDS).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, shared=part is not None))
            if part is not None:
                stack.enter_context(locked(folder / f"{LOCK}-{part[0]}-of-{part[1]}"))
                for other in folder.iterdir():
                    found = _LOCKS.fullmatch(other.name)
                    if found and found[2] not in (None, str(part[1])):  # other parts would be of the same shards
                        with locked(other):
                            pass
        yield


def _check_folders(folder: Path) -> None:
    """Refuse links and other things in place of a store's folders: what is changed there would be another's."""
    for name in (SHARDS, INDEX, MOMENTS):
        path = folder / name
        with storing(path):
            if is_there(path) and not stat.S_ISDIR(path.lstat().st_mode):
                kind = "a link" if path.is_symlink() else "no folder"
                raise StoreError(
                    f"{path} is {kind}, but a store only changes files in its own folder. "
                    f"Replace it with the folder that it points to."
                )


def _check_free(folder: Path) -> None:
    """Refuse to make a store where something else is, or what is left of one."""
    with storing(folder):
        if not folder.exists():
            if is_there(folder):
                raise StoreError(f"{folder} is a link to nothing. Choose another folder.")
            return
        if is_there(folder / MANIFEST):
            return  # it has become complete
        if not folder.is_dir():
            raise StoreError(f"{folder} is not empty and holds no gradindex store. Choose another folder.")
        _check_folders(folder)
        inside = [path.name for path in (folder / SHARDS).iterdir()] if is_there(folder / SHARDS) else []
        shards = inside and all(_SHARD_FILE.fullmatch(temporary_of(name) or name) for name in inside)
        if shards and not is_there(folder / PENDING):
            raise StoreError(
                f"{folder} holds shards, but neither {MANIFEST} nor {PENDING}, which say what they are. "
                "Restore it from a copy, or delete the folder."
            )
        plan = read_plan(folder)
        planned = set() if plan is None else {*plan.names}
        foreign = [path.name for path in folder.iterdir() if not _is_own(path, plan is not None)]
        foreign += [f"{SHARDS}/{name}" for name in inside if not _is_shard_of(name, planned)]
    if foreign and plan is None:
        raise StoreError(
            f"{folder} is not empty and holds no gradindex store. Choose another folder: {sorted(foreign)[0]} is there."
        )
    if foreign:
        raise StoreError(
            f"{folder} holds {sorted(foreign)[0]}, which does not belong to the build there. "
            "Move it away, or choose another folder."
        )


def _is_own(path: Path, begun: bool) -> bool:
    """Whether a build may find this in its folder, one that has begun (so that it has a plan) or is about to."""
    target = temporary_of(path.name)
    name = path.name if target is None else target
    if name == SHARDS and target is None:
        return True
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        if _LOCKS.fullmatch(name):
            return target is None and is_lock(path)
    except FileNotFoundError:
        return True  # another part's temporary file, which is in its place by now
    if _BASES.fullmatch(name) or name in (
        PENDING,
        UNFINISHED,
    ):  # bases are kept before the plan that names them is written
        return True
    return name == MANIFEST if target is not None else begun and name == LOG


def _is_shard_of(name: str, planned: set[str]) -> bool:
    found = _SHARD_FILE.fullmatch(temporary_of(name) or name)
    return found is not None and found[1] in planned


def clean(folder: Path) -> None:
    """Take away what is left of changes that have ended: what they superseded, their plan, and temporary files.

    A shard goes only if a plan that has ended says that it superseded it, or if its own plan was given up: one that the
    manifest does not name may be of a newer manifest, in whose place an older one was put back.

    Args:
        folder: of a complete store that is claimed for this process alone.

    Raises:
        StoreError: manifest or plan is damaged.
    """
    manifest, plan = read_manifest(folder), read_plan(folder)
    if plan is None and (unfinished := read_unfinished(folder)) is not None:  # its plan was given up
        supersede(folder, manifest, unfinished)
        discard(folder / UNFINISHED)
    if plan is not None and plan.after.generation <= manifest.generation:
        named = {entry.name for entry in manifest.shards}
        if {planned.name for planned in plan.shards} <= named:
            supersede(folder, manifest, plan.supersedes)
        discard(folder / PENDING)
    targets = {MANIFEST, PENDING, UNFINISHED}
    with contextlib.suppress(OSError):
        discard(*(path for path in folder.iterdir() if _is_left_over(path.name, targets)))
        discard(*(path for path in (folder / SHARDS).iterdir() if _is_left_over(path.name, set())))


def take_ended_plan(folder: Path) -> None:
    """Take away the plan of a change that was killed just after its end, and what it superseded, if one may."""
    if is_there(folder / PENDING):
        with contextlib.suppress(StoreError), claimed(folder):
            clean(folder)


def begin_unfinished(folder: Path, shards: Sequence[str], bases: str | None) -> None:
    """Write down which shards and bases are of no manifest yet, before the first of them is made.

    Raises:
        StoreError: there is another's file in its place.
        OSError: it cannot be written.
    """
    read_unfinished(folder)
    write_checked(folder / UNFINISHED, Superseded(shards, bases).to_json())


def end_unfinished(folder: Path) -> None:
    """What was unfinished is about to be a manifest's."""
    discard(folder / UNFINISHED)


def supersede(folder: Path, manifest: Manifest, superseded: Superseded) -> None:
    """Delete shards and bases that a change has left behind, unless the manifest names them all the same.

    Args:
        folder: the store's, claimed.
        manifest: what the store is now.
        superseded: what the change has left.
    """
    named = {entry.name for entry in manifest.shards}
    for name in superseded.shards:
        if name not in named:
            discard(*(folder / SHARDS / f"{name}{suffix}" for suffix in (".json", ".h5")))
    if superseded.bases is not None and superseded.bases != manifest.map.bases:
        discard(*(folder / name for name in base_files(superseded.bases)))


def left_over(folder: Path) -> list[str]:
    """Names of shards that are there and that the manifest does not name, nor the plan of a change under way."""
    manifest, plan = read_manifest(folder), read_plan(folder)
    named = {entry.name for entry in manifest.shards}
    named |= set() if plan is None else {planned.name for planned in plan.shards}
    with contextlib.suppress(OSError):
        found = {match[1] for path in (folder / SHARDS).iterdir() if (match := _SHARD_FILE.fullmatch(path.name))}
        return sorted(found - named)
    return []


def unused_number(folder: Path, generation: int) -> int:
    """What names of new shards may begin with: the generation, or the next number of which no file is there.

    A file of that name may be left of a change that was given up, and would be taken for the new one's; or be of a
    newer manifest, in whose place an older one was put back.
    """
    with contextlib.suppress(OSError):
        used = {path.name.partition("-")[0] for path in (folder / SHARDS).iterdir()}
        while f"{generation:04d}" in used:
            generation += 1
    return generation


def _is_left_over(name: str, targets: set[str]) -> bool:
    target = temporary_of(name)
    if target is None:
        return False
    return target in targets or (_BASES.fullmatch(target) or _SHARD_FILE.fullmatch(target)) is not None
