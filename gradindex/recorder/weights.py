"""A model's weights as they are saved: under its own names, whole where processes share them, or only what is trained.

A module in DistributedDataParallel has all weights in each process. FSDP's are shards: ``fully_shard`` keeps
them as DTensors, which are gathered one at a time, and ``FullyShardedDataParallel`` gathers a state dict itself. Both
need all processes to take part, also those that write nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# Modules around a model, and under which name they hold it.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
T = TypeVar("T")


def writes_here() -> bool:
    """Whether this process is the one that writes: the first of those that train together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not together or torch.distributed.get_rank() == 0


def from_all(value: T) -> list[T]:
    """The values of all processes that train together, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def is_flat(model: nn.Module) -> bool:
    """Whether ``FullyShardedDataParallel`` keeps the weights: then a process has no gradient of another's shards."""
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its shards; all processes call this together."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


def without_wrappers(model: nn.Module) -> Callable[[str], str]:
    """Takes out of a name of the model what distributed training and torch.compile put in."""
    inserted = [
        (f"{path}." if path else "", f"{_WRAPPERS[type(module).__name__]}.")
        for path, module in model.named_modules()
        if type(module).__name__ in _WRAPPERS
    ]

    def strip(name: str) -> str:
        for path, part in reversed(inserted):  # the innermost first
            if name.startswith(path + part):
                name = path + name[len(path + part) :]
        return name

    return strip


def weights_of(model: nn.Module, trained: Collection[int] | None) -> dict[str, Tensor]:
    """Weights by the model's own names, on the CPU; empty in a process that does not write.

    Args:
        model: as it trains.
        trained: ids of the parameters to take, with all buffers; ``None`` for everything.
    """
    writes, found = writes_here(), {}
    with _gathered(model):
        for name, tensor in _named(model, trained):
            tensor = whole(tensor)
            if writes:
                found[name] = tensor.cpu()
    return found


def shards_of(model: nn.Module, trained: Collection[int] | None) -> dict[str, Tensor]:
    """The weights that this process holds: shards of FSDP, whole tensors of other models; arguments as above."""
    with _gathered(model, whole_here=False):
        return dict(_named(model, trained))


def _named(model: nn.Module, trained: Collection[int] | None) -> Iterator[tuple[str, Tensor]]:
    strip = without_wrappers(model)
    wanted: set[str] | None = None
    if trained is not None:
        named = model.named_parameters(remove_duplicate=False)
        wanted = {strip(name) for name, parameter in named if id(parameter) in trained}
        wanted |= {strip(name) for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and (wanted is None or strip(name) in wanted):
            yield strip(name), tensor


@contextmanager
def _gathered(model: nn.Module, whole_here: bool = True) -> Iterator[None]:
    """Let ``FullyShardedDataParallel`` give whole weights, in the process that writes, or its shards."""
    if not is_flat(model):
        yield
        return
    from torch.distributed.fsdp import (
        FullStateDictConfig,
        FullyShardedDataParallel,
        ShardedStateDictConfig,
        StateDictType,
    )

    # On the CPU, torch 2.13 ends the process if it is to bring there what is there.
    elsewhere = next(model.parameters()).device.type != "cpu"
    how: Any = FullStateDictConfig(offload_to_cpu=elsewhere, rank0_only=elsewhere)
    kind = StateDictType.FULL_STATE_DICT
    if not whole_here:
        how, kind = ShardedStateDictConfig(), StateDictType.SHARDED_STATE_DICT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a newer way that needs the above
        with FullyShardedDataParallel.state_dict_type(model, kind, how):
            yield
