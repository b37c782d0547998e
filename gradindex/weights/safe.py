"""Files of safetensors: 8 bytes with the length of a header, the header, and the tensors, without gaps.

The header is JSON: dtype, shape and place of each tensor; all numbers are little-endian. Its own library maps such
files, which must not happen here.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from typing import Any

import torch
from torch import Tensor

# Its own library refuses longer ones as well.
LONGEST_HEADER = 100_000_000
_PIECE = 1 << 20

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_tensors(number: int, size: int, data: bool) -> tuple[dict[str, Tensor], str, dict[str, str]]:
    """Tensors in the order of the file, each digested as it is read into its own memory.

    Args:
        number: a descriptor of the file.
        size: bytes in it.
        data: whether the numbers are read; else tensors are on the meta device, and there is no digest.

    Returns:
        The tensors by name, SHA-256 of the file, and the texts beside them.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RecursionError: the header is none, or lies.
        EOFError: the file ends before ``size``.
    """
    length = int.from_bytes(os.pread(number, 8, 0), "little")
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
        raise ValueError("its header is longer than the file" if size >= 8 else "it has no header")
    raw = os.pread(number, length, 8)
    metadata, places = _places(json.loads(raw, object_pairs_hook=_without_twins), size - 8 - length)
    tensors = {}
    if not data:
        for name, dtype, shape, _ in places:
            tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
        return tensors, "", metadata
    state = hashlib.sha256(length.to_bytes(8, "little") + raw)
    with io.FileIO(number, closefd=False) as file:
        file.seek(8 + length)
        for name, dtype, shape, count in places:
            numbers = torch.empty(count, dtype=torch.uint8)
            left = memoryview(numbers.numpy().data)
            while len(left):
                got = file.readinto(left[:_PIECE])
                if not got:
                    raise EOFError
                state.update(left[:got])
                left = left[got:]
            tensors[name] = numbers.view(dtype).reshape(shape)
    return tensors, state.hexdigest(), metadata


def _places(header: Any, size: int) -> tuple[dict[str, str], list[tuple[str, torch.dtype, list[int], int]]]:
    """The metadata, and name, dtype, shape and bytes of each tensor, in the order of the file.

    Raises:
        ValueError: they do not fill the file, or one is of an unknown type.
    """
    metadata = {str(key): str(text) for key, text in header.pop("__metadata__", {}).items()}
    places = []
    end = 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = about["data_offsets"]
        if about["dtype"] not in _DTYPES:
            raise ValueError(f"{name} has the unknown type {about['dtype']}")
        dtype, shape = _DTYPES[about["dtype"]], about["shape"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError(f"the shape or offsets of {name} are invalid")
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the offsets of {name} do not fit its shape")
        places.append((name, dtype, shape, stop - start))
        end = stop
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, but it has {size}")
    return metadata, places


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
