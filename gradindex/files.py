"""Files that are whole or not there: checksums, writing under a temporary name, and one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import StoreError

_TEMPORARY = ".tmp-"
# What a file system without locks answers.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, flush it to disk and rename it.

    Whatever goes wrong, ``path`` is what it was before or the new file, never a part of it.
    """
    temporary = temporary_for(path)
    try:
        yield temporary
        flush(temporary)
        put_in_place((temporary, path))
    finally:
        discard(temporary)


def temporary_for(path: Path) -> Path:
    """A name beside ``path``, unique among processes and machines."""
    return path.with_name(f"{path.name}{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


def put_in_place(*renamed: tuple[Path, Path]) -> None:
    """Rename files of one folder, which were flushed to disk, in their order."""
    for temporary, path in renamed:
        temporary.replace(path)
    flush(renamed[0][1].parent)


def discard(*paths: Path) -> None:
    """Delete files if they are there and can be deleted; what cannot harms nobody."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def is_there(path: Path) -> bool:
    """Whether a file is there; a name that no file can have is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def signature(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from the one that replaces it, without reading; ``None`` where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn the operating system's errors on writing ``path`` into one that a person can act on.

    Raises:
        StoreError: the disk is full, the folder is read-only or gone, and so on.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{path} cannot be written: {reason}. What was finished is kept.") from None


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or renamed within a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def flushing(path: Path) -> Iterator[None]:
    """Flush a file to disk while the block does something else with it."""
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(flush, path)
        yield
        flushed.result()


def leftovers(folder: Path, prefix: str = "") -> list[Path]:
    """Temporary files that a killed process left in ``folder``, of targets whose names start with ``prefix``."""
    return [path for path in folder.glob(f"{glob.escape(prefix)}*") if _TEMPORARY in path.name]


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a value as JSON with sorted keys, separators ``", "`` and ``": "``, non-ASCII escaped."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_checked(path: Path, value: Mapping[str, Any]) -> str:
    """Write an object as JSON with its own digest as the key ``sha256``; returns the digest."""
    text, digest = with_checksum(value)
    with replacing(path) as temporary:
        temporary.write_text(text)
    return digest


def with_checksum(value: Mapping[str, Any]) -> tuple[str, str]:
    """The text that :func:`write_checked` writes, on one line, for lists of ids are long; and the digest."""
    digest = digest_of(value)
    return json.dumps({**value, "sha256": digest}) + "\n", digest


def read_checked(path: Path) -> dict[str, Any]:
    """What :func:`write_checked` wrote, with ``sha256``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    return checked(path.read_bytes())


def checked(content: bytes) -> dict[str, Any]:
    """The object in what :func:`write_checked` wrote, with ``sha256``.

    Raises:
        ValueError: it is damaged.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is not JSON") from None
    if not isinstance(value, dict) or "sha256" not in value:
        raise ValueError("it has no checksum")
    if value["sha256"] != digest_of({name: item for name, item in value.items() if name != "sha256"}):
        raise ValueError("its contents do not match its checksum")
    return value


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Keep other processes out while the block runs; a dead process keeps nobody out.

    The lock is the operating system's (``flock``), so no clock and no time limit is involved. Where a file
    system has none, ``GRADINDEX_LOCKS=off`` goes on without.

    Args:
        path: the file to lock; it is made, and stays.
        shared: let others in that ask for a shared lock too.
        wait: until the other process lets go.

    Raises:
        StoreError: another process has it, or there are no locks here.
        OSError: the file cannot be made.
    """
    if os.environ.get("GRADINDEX_LOCKS") == "off":
        yield
        return
    with path.open("a+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise StoreError(f"{path.parent} is being written by {owner}. Wait until it ends, or end it.") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise StoreError(
                f"{path.parent} is on a file system without locks ({error.strerror}). Make sure that no other process "
                "writes there and set GRADINDEX_LOCKS=off, or choose another folder."
            ) from None
        file.truncate(0)  # what a process wrote that was killed
        if not shared:
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        try:
            yield
        finally:
            if not shared:
                file.truncate(0)
