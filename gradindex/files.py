"""Files that are whole or not there: checksums, writing under a temporary name, and one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import StoreError

_TEMPORARY = ".tmp-"
# As `temporary_for` makes them, and nobody else is likely to: host, process, eight random digits.
_OUR_TEMPORARY = re.compile(r"(.+)\.tmp-.*-\d+-[0-9a-f]{8}", re.DOTALL)
# What `locked` writes; a lock that holds anything else is another's file.
_OUR_LOCK = re.compile(rb"(process \d+ on [^\n]*\n?)?")
_LONGEST_LOCK = 512
# More than a manifest of 10^8 removed ids; no file in place of one is read for hours.
_LARGEST_JSON = 1 << 32
# What a file system without locks answers.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    state = hashlib.sha256()
    with regular(path) as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def regular(path: Path) -> io.FileIO:
    """Open a file for reading, and nothing but a file: a pipe in its place would be waited for without end.

    Raises:
        OSError: it cannot be opened, or is a pipe, a device, a socket or a folder.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return io.FileIO(number, "rb")
    except BaseException:
        os.close(number)
        raise


def own_file(path: Path, flags: int) -> int:
    """Open a file to write to it in place, or make it: never through a link, and nothing but a file; its descriptor.

    Raises:
        OSError: it cannot be opened, or is a link, a pipe, a device, a socket or a folder.
    """
    try:
        number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.EINVAL, "it is a link", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return number


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
    """Whether there is something of this name, also a link or a pipe; a name that no file can have is not."""
    return os.path.lexists(path)


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
        raise StoreError(f"{path} cannot be written: {reason}. Finished work is kept.") from None


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


def temporary_of(name: str) -> str | None:
    """The name of the file that a temporary one was to become, or ``None`` where it is none of ours."""
    found = _OUR_TEMPORARY.fullmatch(name)
    return None if found is None else found[1]


def leftovers(folder: Path, *names: str) -> list[Path]:
    """Temporary files that killed processes left in ``folder``, of targets with these names."""
    with contextlib.suppress(OSError):
        return [path for path in folder.iterdir() if temporary_of(path.name) in names]
    return []


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
        OSError: it cannot be read, or is no regular file.
        ValueError: it is damaged.
    """
    return checked(read_text(path))


def read_text(path: Path) -> bytes:
    """All of a file of JSON.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is larger than any such file.
    """
    with regular(path) as file:
        if os.fstat(file.fileno()).st_size > _LARGEST_JSON:
            raise ValueError(f"it has more than {_LARGEST_JSON:,} bytes")
        return file.readall()


def checked(content: bytes) -> dict[str, Any]:
    """The object in what :func:`write_checked` wrote, with ``sha256``.

    Raises:
        ValueError: it is damaged.
    """
    try:
        value = json.loads(content, object_pairs_hook=_object, parse_constant=_constant)
        if not isinstance(value, dict) or "sha256" not in value:
            raise ValueError("it has no checksum")
        agree = value["sha256"] == digest_of({name: item for name, item in value.items() if name != "sha256"})
    except RecursionError:
        raise ValueError("it is not JSON that we wrote: it is nested too deep") from None
    if not agree:
        raise ValueError("its contents do not match its checksum")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is there twice")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


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
    with io.FileIO(own_file(path, os.O_RDWR | os.O_APPEND), "r+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            owner = " ".join(file.read(_LONGEST_LOCK).decode(errors="replace").split()) or "another process"
            raise StoreError(f"{path.parent} is being written by {owner}. Wait until it ends, or end it.") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise StoreError(
                f"{path.parent} is on a file system without locks ({error.strerror}). Make sure that no other process "
                "writes there and set GRADINDEX_LOCKS=off, or choose another folder."
            ) from None
        if not _OUR_LOCK.fullmatch(file.read(_LONGEST_LOCK)):
            raise StoreError(f"{path} is no lock of a store, but another file. Move it away.")
        file.truncate(0)  # what a process wrote that was killed
        if not shared:
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            if not shared:
                file.truncate(0)


def is_lock(path: Path) -> bool:
    """Whether a file is a lock, and not another's file of that name.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with regular(path) as file:
        return _OUR_LOCK.fullmatch(file.read(_LONGEST_LOCK)) is not None
