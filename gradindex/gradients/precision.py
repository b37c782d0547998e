"""In which precision gradients are computed, and where."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ..choices import PRECISIONS
from ..errors import ArgumentError, check_choice

# Precisions whose gradients are not exact.
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# Losses times the first do not underflow in float16; where a gradient overflows, the next one is tried.
LOSS_SCALES = (2.0**14, 2.0**7, 1.0)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that there is none, or none on a device.

    Raises:
        ArgumentError: says which there are.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision == "float16" and device.type != "cuda":
        raise ArgumentError(
            f"precision is 'float16', but that is for CUDA devices, and this is {device.type!r}. Use 'bfloat16'."
        )


def usable(device: str | torch.device) -> torch.device:
    """The device, if a tensor can be put there.

    Raises:
        ArgumentError: it cannot.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the second
        reason = str(error).splitlines()[0]
        raise ArgumentError(
            f"device is {str(device)!r}, but it cannot be used here ({reason}). Choose another."
        ) from None


_LOCK, _inside = threading.Lock(), 0
_restore = contextlib.ExitStack()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Have float32 products and convolutions computed in float32 for the time of the block, in the whole process.

    torch lets CUDA's convolutions round to TF32 (10 bits) by default, and matrix products, also a CPU's, where
    ``torch.set_float32_matmul_precision`` or a ``fp32_precision`` says so: rows were 9% off on an H200. Threads may be
    in such blocks at the same time; the last to leave puts back what the first found.
    """
    global _inside
    with _LOCK:
        if not _inside:
            _restore.enter_context(_full_float32())
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                _restore.close()


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    # torch has switches of two generations. Each reading of an old one fails where only a new one was set.
    new = [switch for switch in _switches() if hasattr(switch, "fp32_precision")]
    before = [switch.fp32_precision for switch in new]
    try:
        old = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        old = None
    try:
        if old is not None:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        for switch in new:
            if switch.fp32_precision not in ("ieee", "none"):
                switch.fp32_precision = "ieee"
        yield
    finally:
        if old is not None:
            torch.set_float32_matmul_precision(old[0])
            torch.backends.cudnn.allow_tf32 = old[1]
        for switch, precision in zip(new, before, strict=True):
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision


def _switches() -> list[Any]:
    kinds = {"cuda": ("matmul",), "cudnn": ("conv", "rnn"), "mkldnn": ("matmul", "conv", "rnn")}
    return [
        getattr(getattr(torch.backends, library, None), kind, None) for library, some in kinds.items() for kind in some
    ]
