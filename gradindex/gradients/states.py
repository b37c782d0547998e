"""The weights of all checkpoints on the device: what does not differ once, or one checkpoint after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..memory import available_bytes
from ..progress import note
from .narrow import Narrow

State = dict[str, Tensor]


class States:
    """The weights of C checkpoints by number, also from the end.

    A tensor that is the same at several checkpoints, as in a frozen backbone, is held once. Where the weights do not
    fit together, or where that is asked for, one checkpoint's are held at a time, and read again when they are needed.

    Args:
        count: how many there are.
        read: reads those of a checkpoint.
        device: where they are held.
        one_at_a_time: whether to; ``None`` decides as they come.
    """

    def __init__(
        self, count: int, read: Callable[[int], State], device: torch.device, one_at_a_time: bool | None
    ) -> None:
        self._count, self._read, self._device = count, read, device
        self._decided = one_at_a_time is not None or count == 1
        self.one_at_a_time = bool(one_at_a_time) and count > 1
        self._held: dict[int, State] = {}
        self._largest = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> State:
        number = range(self._count)[number]
        if number not in self._held:
            self._held.clear()  # before the next is read: never two
            self._held[number] = self._read(number)
        return self._held[number]

    def keep(self, number: int, state: State) -> None:
        """Take what was just read; checkpoints come in their order."""
        new = 0
        if not self.one_at_a_time:
            earlier = self._held.get(number - 1, {})
            for name, tensor in state.items():
                known = earlier.get(name)
                if known is not None and _same(known, tensor):
                    state[name] = known
                else:
                    new += _bytes(tensor)
        left = self._count - number - 1
        if not self._decided and left and new * left > 2 * available_bytes(self._device):  # half of a CPU's memory
            self.one_at_a_time = self._decided = True
            note(
                f"The weights of {self._count} checkpoints do not fit into memory together ({new / 1e9:.3g} GB each): "
                "they are held one at a time."
            )
        if self.one_at_a_time:
            self._held.clear()
        self._held[number] = state
        self._largest = max(self._largest, sum(map(_bytes, state.values())))

    @property
    def nbytes(self) -> int:
        """Of the tensors that are held at the same time."""
        if self.one_at_a_time:
            return self._largest
        distinct = {id(tensor): _bytes(tensor) for state in self._held.values() for tensor in state.values()}
        return sum(distinct.values())

    def recast(self, cast: Callable[[State], State]) -> None:
        """Cast what is held; what is the same at several checkpoints stays so."""
        made: dict[int, Tensor] = {}
        for state in self._held.values():
            new = {name: tensor for name, tensor in state.items() if id(tensor) not in made}
            before = {name: id(tensor) for name, tensor in state.items()}
            made |= {before[name]: tensor for name, tensor in cast(new).items()}
            state.update({name: made[number] for name, number in before.items()})

    @contextmanager
    def replaced(self, number: int, cast: Callable[[State], State]) -> Iterator[None]:
        """Have one checkpoint's weights cast for the time of the block."""
        number = range(self._count)[number]
        before = self[number]
        self._held[number] = cast(before)
        try:
            yield
        finally:
            self._held[number] = before


def _same(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, Narrow) and isinstance(other, Narrow):
        one, other = one.plain(), other.plain()
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.layout == other.layout == torch.strided
        and one.stride() == other.stride()
        and torch.equal(one, other)
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.plain().nbytes if isinstance(tensor, Narrow) else tensor.nbytes
