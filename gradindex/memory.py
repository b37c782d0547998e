"""How many examples fit at once: measured before a build, halved where a batch is too much nevertheless."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import ArgumentError, OutOfMemoryError, is_out_of_memory
from .examples import Examples
from .tree import tensors

T = TypeVar("T")

# The largest batch that is chosen unasked: more brings no speed, and less shows progress sooner.
LARGEST_BATCH = 256
_SMALLEST_TRIED, LARGEST_TRIED = 2, 8
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class InseparableError(RuntimeError):
    """The gradients of a batch cannot be told apart by example. Nobody sees it: :func:`in_halves` halves the batch."""


def in_halves(
    action: Callable[[Examples], list[T]], examples: Examples, at: Callable[[], str], alone: bool = False
) -> list[T]:
    """``action(examples)``, or the results of both halves where memory runs out or gradients cannot be told apart.

    Args:
        action: returns a list, which the halves' lists are joined to.
        examples: at least one.
        at: says what was being computed when memory ran out.
        alone: whether each example goes by itself from the start.

    Raises:
        OutOfMemoryError: one example alone does not fit; says where, and how much was asked for.
    """
    if alone and len(examples) > 1:
        return [result for example in examples for result in in_halves(action, example, at)]
    try:
        return action(examples)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        separable = not isinstance(error, InseparableError)
        if separable and not is_out_of_memory(error):
            raise
        if separable and len(examples) == 1:
            wanted = re.search(r"[Tt]ried to allocate ([\d.]+) ?(\w+)", str(error))
            amount = _readable(wanted[1], wanted[2]) if wanted else "it"
            raise OutOfMemoryError(
                f"{examples.names[0]} alone needs more memory than is available: {at()} requested {amount}. "
                "Track fewer layers, shorten the example, or use a machine with more memory."
            ) from None
    half = len(examples) // 2
    return in_halves(action, examples[:half], at) + in_halves(action, examples[half:], at)


def _readable(number: str, unit: str) -> str:
    return f"{float(number) / 2**30:.3g} GiB" if unit == "bytes" else f"{number} {unit}"


def parse_bytes(text: str) -> int:
    """``"500M"``, ``"2 GiB"``, ``"1.5g"`` or ``"4096"`` as bytes; the units are powers of 1,024.

    Raises:
        ArgumentError: it is none of these, or not positive.
    """
    parsed = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?b)?\s*", text.lower())
    try:
        value = int(float(parsed[1]) * _UNITS[parsed[2]]) if parsed else 0
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise ArgumentError(f"{text!r} is not an amount of memory. Write for example 500M or 2G.")
    return value


def available_bytes(device: torch.device) -> int:
    """What passes may use unasked: half of what a CUDA device has free, a quarter of the machine's free memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return free_bytes() // 4


def free_bytes() -> int:
    """The machine's free memory, with what only keeps files at hand; 8 GiB where the system does not tell."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 << 30


def batch_size_for(action: Callable[[Examples], Any], examples: Examples, budget: int, device: torch.device) -> int:
    """The largest power of two, up to 256, whose peak memory fits; measured on up to 8 examples.

    Args:
        action: does with examples what a build does.
        examples: where to take them from.
        budget: bytes for one pass, weights not included.
        device: where the action computes.
    """
    if len(examples) <= _SMALLEST_TRIED:
        return LARGEST_BATCH
    return largest_batch(*pass_bytes(action, examples, device), budget)


def largest_batch(fixed: int, each: int, budget: int) -> int:
    """The largest power of two, up to 256, that a budget has room for; arguments from :func:`pass_bytes`."""
    size = 1
    while size < LARGEST_BATCH and fixed + 2 * size * each <= budget:
        size *= 2
    return size


def pass_bytes(action: Callable[[Examples], Any], examples: Examples, device: torch.device) -> tuple[int, int]:
    """Peak memory of a pass: bytes whatever its size, and bytes for each example; measured on up to 8 of them."""
    small, large = (min(count, len(examples)) for count in (_SMALLEST_TRIED, LARGEST_TRIED))
    peaks = [peak_bytes(partial(action, examples[:n]), device) for n in (small, large)]
    each = max(1, (peaks[1] - peaks[0]) // (large - small)) if small < large else -(-peaks[1] // large)
    return max(0, peaks[0] - small * each), each


def peak_bytes(action: Callable[[], Any], device: torch.device) -> int:
    """The most memory that the tensors which an action makes take at once; on CUDA, what the allocator says."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return int(torch.cuda.max_memory_allocated(device)) - before
    meter = _Meter()
    with _watching(meter):
        action()
    return meter.peak


def _watching(meter: _Meter) -> TorchDispatchMode:
    """A mode in which a meter is told of every operation.

    Its class is made here, for torch has its compiler pass over such a class, and imports the compiler to tell it so,
    which takes two seconds. Where nobody has imported it, there is nothing that it compiles.
    """

    class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return "torch._dynamo" in sys.modules

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return meter.run(func, args, kwargs or {})

    return Watching()  # type: ignore[no-untyped-call]  # the same


class _Meter:
    """Adds up the storages that operations make, and takes them off as they die."""

    def __init__(self) -> None:
        self._live: dict[int, int] = {}
        self._total = 0
        self.peak = 0

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One operation."""
        for tensor in tensors([*args, kwargs]):
            self._add(tensor.untyped_storage(), 0)  # was there before, such as a weight
        outputs = func(*args, **kwargs)
        for tensor in tensors(outputs):
            self._add(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return outputs

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = size
        self._total += size
        self.peak = max(self.peak, self._total)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._total -= self._live.pop(key, 0)
