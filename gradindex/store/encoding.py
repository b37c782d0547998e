"""How rows are stored: float32, float16, bfloat16, int8 or int4, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..choices import ROW_TYPES
from ..errors import ArgumentError, check_choice

STORED: Mapping[str, str] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1", "int4": "|u1"}
# Types with a scale for each row and checkpoint, and the largest code.
LARGEST_CODE: Mapping[str, int] = {"int8": 127, "int4": 7}
_LARGEST_HALF = float(np.finfo(np.float16).max)


def number_bytes(row_type: str) -> tuple[float, int]:
    """What a number takes, and what a block takes besides."""
    check_row_type(row_type)
    return np.dtype(STORED[row_type]).itemsize / _per_item(row_type), 4 if row_type in LARGEST_CODE else 0


def stored_width(row_type: str, dim: int) -> int:
    """How many items of its type a row of ``dim`` numbers takes.

    Raises:
        ArgumentError: the numbers do not fill whole bytes.
    """
    if dim % _per_item(row_type):
        raise ArgumentError(f"Rows have {dim} numbers, but {row_type} keeps two in a byte. Choose an even dim.")
    return dim // _per_item(row_type)


def _per_item(row_type: str) -> int:
    return 2 if row_type == "int4" else 1


def check_row_type(row_type: str) -> None:
    """Refuse a type that rows cannot have."""
    check_choice("row_type", row_type, ROW_TYPES)


def encode(
    rows: NDArray[np.float32], row_type: str, n_checkpoints: int, name: Callable[[int], str], what: str = "rows"
) -> dict[str, NDArray[Any]]:
    """Rows as they are stored.

    Args:
        rows: (m, dim) float32.
        row_type: one of ``ROW_TYPES``.
        n_checkpoints: blocks in a row; each has a scale of its own in int8.
        name: what to call the row at a position, for the error.
        what: what the rows are, for the error.

    Returns:
        ``rows`` (m, dim), and for int8 and int4 ``scales`` (m, n_checkpoints) float32: a number is its code
        times its block's scale. Of int4 the first of two numbers is in the lower half of a byte, 8 more than its code.

    Raises:
        ArgumentError: a number is too large for the type.
    """
    if row_type == "float32":
        return {"rows": rows}
    if row_type in LARGEST_CODE:
        blocks = rows.reshape(len(rows), n_checkpoints, -1)
        scales = np.abs(blocks).max(2) / np.float32(LARGEST_CODE[row_type])
        scales = np.where(scales >= np.finfo(np.float32).tiny, scales, 0)  # below, a quotient is anything
        codes = np.rint(np.where(scales[:, :, None] > 0, blocks, 0) / np.where(scales > 0, scales, 1)[:, :, None])
        codes = codes.astype(np.int8).reshape(rows.shape)
        if row_type == "int4":
            halves = (codes + 8).astype(np.uint8)
            codes = halves[:, ::2] | halves[:, 1::2] << 4
        return {"rows": codes, "scales": scales.astype(np.float32)}
    if row_type == "float16":
        _refuse(np.abs(rows).max(1, initial=0) > _LARGEST_HALF, rows, row_type, name, what)
        return {"rows": rows.astype(np.float16)}
    bits = np.ascontiguousarray(rows).view(np.uint32)
    # To the nearest, ties to even: what is cut off moves the rest up by one where it is more than half.
    codes = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    _refuse(((codes & 0x7F80) == 0x7F80).any(1), rows, row_type, name, what)
    return {"rows": codes}


def _refuse(
    too_large: NDArray[np.bool_], rows: NDArray[np.float32], row_type: str, name: Callable[[int], str], what: str
) -> None:
    if too_large.any():
        row = int(too_large.argmax())
        way_out = "float32, or as int8, which has a scale for each row." if what == "rows" else "float32."
        raise ArgumentError(
            f"{name(row)} has a number of size {np.abs(rows[row]).max():.4g} in its {what}, more than {row_type} "
            f"holds. Store the {what} as {way_out}"
        )


def decode(rows: NDArray[Any], scales: NDArray[np.float32] | None, row_type: str) -> NDArray[np.float32]:
    """The rows that :func:`encode` stored: (m, dim) float32; of float32 the same array, not a copy."""
    if row_type == "float32":
        return rows
    if row_type == "bfloat16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    if row_type == "int4":
        decoded = np.empty((len(rows), 2 * rows.shape[1]), dtype=np.float32)
        decoded[:, ::2], decoded[:, 1::2] = rows & 0xF, rows >> 4
        decoded -= 8
    else:
        decoded = rows.astype(np.float32)
    if scales is not None:
        decoded.reshape(len(rows), scales.shape[1], -1)[...] *= scales[:, :, None]
    return decoded
