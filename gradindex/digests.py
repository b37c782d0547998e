"""Digests of items by value: the same in every process, whatever addresses and orders of sets it has."""

from __future__ import annotations

import enum
import functools
import hashlib
import re
import sys
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import TaskError
from .tree import APART, APART_PACKAGES, SCALARS, attributes, made_of

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# How often containers are come to again before they are taken for knots, whose paths have no end.
_AGAIN = 1_000_000
_BUILT_IN = sys.stdlib_module_names | {"torch", "numpy"}


def digest(tree: Any, apart: Collection[Any] = ()) -> bytes:
    """SHA-256 over the values of ``tree``; two reads of an unchanging item agree.

    Data sets, loaders and modules that an item refers to count by their types alone.

    Args:
        tree: an item, or what was made of several.
        apart: objects that are not looked into, such as the data set that an item came from.

    Raises:
        TaskError: it is nested too deep.
    """
    return _digest(tree, apart, True)


def skeleton(tree: Any) -> bytes:
    """The same over all but tensors."""
    return _digest(tree, (), False)


def _digest(tree: Any, apart: Collection[Any], with_tensors: bool) -> bytes:
    try:
        try:
            return _Digest(apart, with_tensors, knotted=False).of(tree)
        except _KnotError:
            return _Digest(apart, with_tensors, knotted=True).of(tree)
    except RecursionError:
        raise TaskError(
            f"A {type(tree).__name__} of the data is nested too deep to be compared by value. Keep references to other "
            "examples out of the data set's items."
        ) from None


class _KnotError(Exception):
    """An object leads back to itself."""


class _Digest:
    """Feeds values into a hash.

    What stands in several places is told in each, so that copies and references are the same. Only where references
    have knots, each object is told once, and then by its number.
    """

    def __init__(self, apart: Collection[Any], with_tensors: bool, knotted: bool) -> None:
        self._apart, self._with_tensors, self._knotted = {id(one) for one in apart}, with_tensors, knotted
        self._state = hashlib.sha256(b"knotted" if knotted else b"")
        self._numbers: dict[int, int] = {}
        self._above: set[int] = set()
        self._seen: list[Any] = []  # keeps what ids stand for
        self._again = 0

    def of(self, tree: Any) -> bytes:
        self._feed(tree)
        return self._state.digest()

    def _feed(self, tree: Any) -> None:
        kind, state = type(tree), self._state
        if kind in SCALARS:
            state.update(_text(tree).encode())
        elif isinstance(tree, Tensor):
            self._feed_tensor(tree)
        elif id(tree) in self._apart or isinstance(tree, APART) or kind.__module__.partition(".")[0] in APART_PACKAGES:
            state.update(f"apart {kind.__qualname__}".encode())
        elif isinstance(tree, type):
            state.update(f"{kind.__qualname__} {tree.__module__}.{tree.__qualname__}".encode())
        elif isinstance(tree, enum.Enum) and not isinstance(tree, (str, int, float)):
            state.update(f"{kind.__qualname__}.{tree.name}".encode())
            self._feed(tree.value)
        elif isinstance(tree, np.ndarray) or (_is_array(kind) and not isinstance(tree, Mapping)):
            self._feed_array(np.asarray(tree))  # NumPy scalars and PIL images too
        elif isinstance(tree, (str, bytes, bool, int, float, complex)):
            state.update(_text(tree).encode())
        elif id(tree) in self._above and not self._knotted:
            raise _KnotError
        elif self._is_new(tree):
            self._above.add(id(tree))
            self._feed_parts(tree)
            self._above.discard(id(tree))

    def _is_new(self, tree: Any) -> bool:
        number = self._numbers.setdefault(id(tree), len(self._numbers))
        if number == len(self._seen):
            self._seen.append(tree)
            return True
        if self._knotted:
            self._state.update(f"number{number}".encode())
            return False
        self._again += 1
        if self._again > _AGAIN:
            raise _KnotError
        return True

    def _feed_parts(self, tree: Any) -> None:
        kind, state = type(tree), self._state
        if isinstance(tree, Mapping):
            state.update(f"map{len(tree)}".encode())
            for key in tree:
                state.update(_text(key).encode())
                self._feed(tree[key])
        elif isinstance(tree, (list, tuple)):
            state.update(f"seq{len(tree)}".encode())
            for value in tree:
                self._feed(value)
        elif isinstance(tree, (set, frozenset)):
            self._feed(("set", sorted(self._apart_from_all(value) for value in tree)))  # whose order changes
        elif isinstance(tree, deque):
            state.update(kind.__qualname__.encode())
            self._feed(list(tree))
        else:
            # A user's own class: its attributes are its value (its repr may hold an address).
            state.update(kind.__qualname__.encode())
            built_in = kind.__module__.partition(".")[0] in _BUILT_IN and not hasattr(tree, "__dict__")
            own = {} if built_in else attributes(tree)
            derived = {name for name in own if isinstance(getattr(kind, name, None), functools.cached_property)}
            if own or hasattr(tree, "__dict__"):
                self._feed({name: value for name, value in own.items() if name not in derived})
            else:
                state.update(repr(_text(tree)).encode())

    def _apart_from_all(self, value: Any) -> bytes:
        """The digest of one value of a set."""
        state, self._state = self._state, hashlib.sha256()
        self._feed(value)
        state, self._state = self._state, state
        return state.digest()

    def _feed_tensor(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        if not self._with_tensors:
            self._state.update(b"tensor")
        elif tensor.device.type == "meta":
            self._state.update(f"meta{tensor.dtype}{tuple(tensor.shape)}".encode())
        elif tensor.is_nested:
            self._feed(("nested", list(tensor.unbind())))
        elif (parts := made_of(tensor))[0] is not None:
            self._feed((type(tensor).__qualname__, *parts))
        elif tensor.layout == torch.sparse_coo:
            tensor = tensor.coalesce()
            self._feed(("sparse", tuple(tensor.shape), tensor.indices(), tensor.values()))
        elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            self._feed(("rows", tuple(tensor.shape), tensor.crow_indices(), tensor.col_indices(), tensor.values()))
        elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            self._feed(("columns", tuple(tensor.shape), tensor.ccol_indices(), tensor.row_indices(), tensor.values()))
        elif tensor.is_quantized:
            self._feed(("quantised", str(tensor.dtype), tensor.int_repr(), tensor.dequantize()))
        else:
            tensor = (tensor if tensor.layout == torch.strided else tensor.to_dense()).cpu()
            tensor = tensor.resolve_conj().resolve_neg()
            if tensor.dtype == torch.bfloat16:
                tensor = tensor.view(torch.int16)
            try:
                array = tensor.numpy()
            except TypeError:  # of a type that NumPy does not have, such as 8-bit floats
                self._state.update(f"{tensor.dtype}".encode())
                array = tensor.contiguous().flatten().view(torch.uint8).reshape(*tensor.shape, -1).numpy()
            self._feed_array(array)

    def _feed_array(self, array: np.ndarray[Any, Any]) -> None:
        if array.dtype.hasobject:
            self._state.update(f"objects{array.shape}".encode())
            self._feed(array.tolist())
        else:
            self._state.update(f"{array.dtype.str}{array.shape}".encode())
            numbers = np.ascontiguousarray(array).reshape(-1)
            self._state.update(numbers.view(np.uint8).data if numbers.nbytes else b"")  # a copy would be as large


def _is_array(kind: type) -> bool:
    return hasattr(kind, "__array_interface__") or hasattr(kind, "__array__")


def _text(value: Any) -> str:
    """The repr of a value, without addresses."""
    if isinstance(value, int) and value.bit_length() > 4096:
        return hex(value)  # Python refuses to write out long ones
    text = repr(value)
    return text if type(value) in SCALARS else _ADDRESS.sub("", text)
