"""Models as training leaves them: inside a wrapper, or compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .progress import note

# By the name of a wrapper's class, where it keeps the module that it wraps.
_INSIDE = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of ``torch.compile`` and data parallelism, whose weights are the same; a line says so."""
    names = []
    while isinstance(inside := getattr(model, _INSIDE.get(type(model).__name__, ""), None), nn.Module):
        names.append(type(model).__name__)
        model = inside
    if names:
        note(f"The model is wrapped in {' and '.join(names)}; gradindex computes with the module inside.")
    return model


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Have modules on which ``compile()`` was called run as they are written, for the time of the block."""
    compiled = [
        (module, call)
        for module in model.modules()
        if (call := getattr(module, "_compiled_call_impl", None)) is not None
    ]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
