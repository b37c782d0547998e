"""In which precision gradients are computed, and where."""

from __future__ import annotations

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
