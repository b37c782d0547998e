"""One reading of a checkpoint file: what is parsed is what was digested, and nothing stays mapped.

A mapped file that is overwritten changes tensors that were loaded from it, and one that is cut short ends the process
(SIGBUS). So weights are always copied, through one descriptor.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from ..errors import CheckpointError
from .remembering import remembered
from .safe import LONGEST_HEADER, read_tensors

_BLOCK = 1 << 20
# How torch.save began its files before it wrote zip archives: a pickle of its magic number.
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
_SHARD = re.compile(r"-(\d{3,})-of-(\d{3,})(?=\.)")
_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket"}
_SAVE_WEIGHTS = "Save model.state_dict() instead of the model"


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Args:
        value: what was saved; of safetensors a mapping of names to tensors. On the CPU.
        sha256: of the very bytes that ``value`` was parsed from; empty of an outline.
        metadata: the texts beside the tensors of safetensors.
        ordered: whether tensors stand in the order in which they were saved.
    """

    value: Any
    sha256: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    ordered: bool = False


def read(path: Path, part: bool = False) -> Content:
    """Read a whole file, and digest what was read.

    Memory: what the file holds, once.

    Args:
        path: of the file.
        part: whether it may be one of several shards.

    Raises:
        CheckpointError: it is missing, damaged, no checkpoint, holds Python objects, or changed meanwhile.
    """
    with _opened(path, part) as (number, size):
        kind = _kind(path, number, size)
        if kind == "safetensors":
            return Content(*_safetensors(path, number, size, True))
        digest, sums = _digests(number, size)
        checked = _Checked(path, number, size, sums)
        return Content(_torch(path, checked, size, kind, map_location="cpu"), digest, ordered=True)


def outline(path: Path, part: bool = False) -> Content:
    """What a file holds but for the numbers in its tensors, which are on the meta device where torch can leave them.

    It is read once, until the file changes; nobody may change what is returned.

    Raises:
        CheckpointError: as for :func:`read`.
    """
    if not part:
        refuse_shard(path)
    return remembered("outline", path, lambda: _outline(path, part))


def _outline(path: Path, part: bool) -> Content:
    with _opened(path, part) as (number, size):
        kind = _kind(path, number, size)
        if kind == "safetensors":
            return Content(*_safetensors(path, number, size, False))
        value = _torch(path, _Checked(path, number, size, None), size, kind, map_location="meta")
        return Content(value, ordered=True)


def digest_of_file(path: Path, part: bool = False) -> str:
    """SHA-256 of a file as it is now, in hexadecimal.

    Raises:
        CheckpointError: it cannot be read.
    """
    with _opened(path, part) as (number, size):
        return _digests(number, size)[0]


def refuse_shard(path: Path) -> None:
    """Refuse a part of a checkpoint that was saved in several files, by its name.

    Raises:
        CheckpointError: it is one.
    """
    part = _SHARD.search(path.name)
    if part is not None and int(part[2]) > 1:
        raise CheckpointError(
            f"{path} is part {int(part[1])} of {int(part[2])} of a checkpoint saved in shards, but all of them are "
            f"needed. Give their folder, Checkpoint({str(path.parent)!r}), or save the whole model by torch.save."
        )


@contextmanager
def _opened(path: Path, part: bool) -> Iterator[tuple[int, int]]:
    """A descriptor of a regular file, which is opened once, and its size; no pipe or device is waited for.

    Raises:
        CheckpointError: there is none, or it changed while the block ran.
    """
    if not part:
        refuse_shard(path)
    try:
        kind = stat.S_IFMT(path.stat().st_mode)  # opening a device can have effects
        if kind == stat.S_IFREG:
            number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError(f"Checkpoint {path} does not exist. Check the path in the task.") from None
    except OSError as error:
        raise CheckpointError(f"Checkpoint {path} cannot be read: {error.strerror}. Check the path.") from None
    except ValueError as error:
        raise CheckpointError(f"Checkpoint {str(path)!r} cannot be read: {error}. Check the path.") from None
    if kind != stat.S_IFREG:
        _refuse(path, kind)
    try:
        before = os.fstat(number)
        if not stat.S_ISREG(before.st_mode):
            _refuse(path, stat.S_IFMT(before.st_mode))
        yield number, before.st_size
        after = os.fstat(number)
        if (before.st_ino, before.st_mtime_ns, before.st_size) != (after.st_ino, after.st_mtime_ns, after.st_size):
            raise _changed(path)
    except OSError as error:
        raise CheckpointError(f"Checkpoint {path} cannot be read: {error.strerror or error}. Copy it again.") from None
    finally:
        os.close(number)


def _refuse(path: Path, kind: int) -> None:
    if kind == stat.S_IFDIR:
        raise CheckpointError(f"{path} is a folder, but a file is expected. Give the file of weights in it.")
    raise CheckpointError(
        f"{path} is a {_KINDS.get(kind, 'special file')}, but a checkpoint must be a regular file. Copy it to one."
    )


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} changed while it was read, so its weights would be mixed. Try again once it is fully written."
    )


def _kind(path: Path, number: int, size: int) -> str:
    """``"zip"``, ``"legacy"`` (both by torch.save) or ``"safetensors"``, by what the file begins with.

    Raises:
        CheckpointError: it is something else, which is named.
    """
    head = os.pread(number, 512, 0)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(_LEGACY):
        return "legacy"
    if path.suffix == ".safetensors" or (
        head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= min(size, LONGEST_HEADER)
    ):
        return "safetensors"
    known = None
    if head.startswith(b"version https://git-lfs"):
        known = "a pointer of Git LFS to a file. Fetch the file: git lfs pull"
    elif head[:1] == b"\x80" and head[1:2] in b"\x00\x01\x02\x03\x04\x05" and size > len(_LEGACY):
        known = "a pickle that torch.save did not write, and gradindex never executes one. " + (
            "Save the weights with torch.save(model.state_dict(), path)"
        )
    elif head[257:262] == b"ustar" or head[:2] == b"\x1f\x8b":
        known = "an archive (tar or gzip). Unpack it and give the checkpoint in it"
    elif head[:4] == b"\x89HDF":
        known = "an HDF5 file. Load the weights into the model and save model.state_dict() with torch.save"
    elif len(head) > 19 and all(byte in b"\t\n\r\f\b" or byte >= 32 for byte in head) and _is_text(head):
        known = "a text file, not a checkpoint. Give a file that torch.save or safetensors wrote"
    if known is not None:
        raise CheckpointError(f"{path} is {known}.")
    reason = "it does not start like a file written by torch.save or safetensors" if size else "it is empty"
    raise CheckpointError(_damaged(path, reason))


def _is_text(head: bytes) -> bool:
    try:
        head[:-4].decode()  # the last letter may be cut
    except UnicodeDecodeError:
        return False
    return True


def _digests(number: int, size: int) -> tuple[str, list[int]]:
    """SHA-256 of a file, in hexadecimal, and a check sum of each block."""
    state, sums = hashlib.sha256(), []
    for start in range(0, size, _BLOCK):
        block = os.pread(number, _BLOCK, start)
        state.update(block)
        sums.append(zlib.crc32(block))
    return state.hexdigest(), sums


class _Checked(io.RawIOBase):
    """A file for torch.load that holds only blocks that are still what was digested.

    Torch reads in an order of its own, so the digest cannot be taken on the way; and a copy of all bytes would double
    the memory.
    """

    def __init__(self, path: Path, number: int, size: int, sums: list[int] | None) -> None:
        self._path, self._number, self._size, self._sums = path, number, size, sums
        self._at = 0
        self._cached: tuple[int, bytes] = (-1, b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        buffer = bytearray(left if size is None or size < 0 else min(size, left))  # whatever a damaged file claims
        self.readinto(buffer)
        return bytes(buffer)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done, wanted = 0, max(0, min(len(view), self._size - self._at))
        while done < wanted:
            number, skip = divmod(self._at, _BLOCK)
            piece = memoryview(self._block(number))[skip : skip + wanted - done]
            if len(piece) == 0:
                raise _changed(self._path)
            view[done : done + len(piece)] = piece
            done += len(piece)
            self._at += len(piece)
        return done

    def _block(self, number: int) -> bytes:
        if self._cached[0] != number:
            block = os.pread(self._number, _BLOCK, number * _BLOCK)
            if self._sums is not None and zlib.crc32(block) != self._sums[number]:
                raise _changed(self._path)
            self._cached = number, block
        return self._cached[1]


def _torch(path: Path, file: _Checked, size: int, kind: str, map_location: str) -> Any:
    if kind == "zip":
        _check_archive(path, file, size)
        file.seek(0)
    try:
        return torch.load(cast(IO[bytes], file), map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever damaged bytes make torch and pickle raise
        text = str(error)
        if "argparse.Namespace" in text and (value := _of_timm(file, map_location)) is not None:
            return value
        if map_location == "meta":  # some things cannot be there, such as sparse tensors
            file.seek(0)
            return _torch(path, file, size, kind, "cpu")
        raise CheckpointError(_objects(path, text) or _damaged(path, _reason(error))) from None


def _of_timm(file: _Checked, map_location: str) -> Any:
    """What timm's trainer saved, whose command line is a Namespace, which holds plain values; else ``None``."""
    file.seek(0)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            value = torch.load(cast(IO[bytes], file), map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Exception:  # it holds other objects as well, which the caller names
        return None
    return value if isinstance(value, Mapping) and {"arch", "args", "state_dict"} <= value.keys() else None


def _check_archive(path: Path, file: _Checked, size: int) -> None:
    """Refuse zip files that torch.save did not write, and what claims more bytes than there are."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, MemoryError) as error:
        raise CheckpointError(_damaged(path, _reason(error))) from None
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript archive, whose code gradindex never executes. {_SAVE_WEIGHTS}.")
    if "data.pkl" not in names:
        raise CheckpointError(
            f"{path} is a zip file that torch.save did not write (it has no data.pkl). "
            "Give a file that torch.save or safetensors wrote."
        )
    if any(entry.file_size > size for entry in entries):
        raise CheckpointError(_damaged(path, "it claims more bytes than it has"))


def _objects(path: Path, text: str) -> str | None:
    """What to say of a file that holds Python objects; ``None`` where the error is another."""
    found = re.search(r"GLOBAL ([\w.]+)", text)
    blocked = "is blocked" in text or (found is not None and found[1].split(".")[0] in ("builtins", "__builtin__"))
    refused = re.search(
        r"unsupported (global|class)|unrecognized function|can only (build|create)", text, re.IGNORECASE
    )
    if refused is None:
        if "Unsupported operand" in text or "Detected pickle protocol" in text:
            return (
                f"{path} was pickled in a way that can hold code, or is damaged, and gradindex never executes one. "
                "Save model.state_dict() with torch.save and its own pickle protocol."
            )
        return None
    name = f" ({found[1]})" if found is not None else ""
    way_out = ""
    if found is not None and not blocked:
        way_out = (
            " Or, if you trust the file and know that type, allow it first: "
            f"torch.serialization.add_safe_globals([{found[1]}])."
        )
    return (
        f"{path} holds Python objects besides tensors and plain values{name}, which gradindex never executes. "
        f"{_SAVE_WEIGHTS}, without such objects.{way_out}"
    )


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def _damaged(path: Path, reason: str) -> str:
    return f"{path} cannot be read as a checkpoint; it may be truncated or damaged ({reason}). Copy or save it again."


def _safetensors(path: Path, number: int, size: int, data: bool) -> tuple[dict[str, Tensor], str, dict[str, str]]:
    try:
        return read_tensors(number, size, data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(_damaged(path, _reason(error))) from None
    except EOFError:
        raise _changed(path) from None
    except RuntimeError as error:  # torch has no memory for them
        raise CheckpointError(f"{path} does not fit in memory: {_reason(error)}. Free some memory.") from None
