"""Walks over what data sets and collate functions hand out.

An *item* is one example of a data set, a *batch* is many of them collated: tensors,
arrays, pictures, numbers and strings in tuples, lists and mappings.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# How deep items are looked into for shapes, and up to which length lists of numbers and texts are looked through.
_DEEPEST, _SHORT = 6, 8


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply ``function`` to every tensor of ``tree``, keeping its structure.

    Mappings become plain ``dict`` unless their type can be rebuilt from one
    (Hugging Face's ``BatchEncoding`` can, and keeps its attribute access).
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(value, function) for key, value in tree.items()}
        try:
            return type(tree)(mapped)  # type: ignore[call-arg]  # most mappings take a dict; the others raise
        except TypeError:
            return mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(value, function) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor of ``tree`` in the order of the walk."""
    found: list[Tensor] = []
    map_tensors(tree, found.append)
    return found


def digest(tree: Any) -> bytes:
    """SHA-256 over the values of ``tree``; two reads of an unchanging item agree."""
    state = hashlib.sha256()
    _feed(state, tree)
    return state.digest()


def _feed(state: hashlib._Hash, tree: Any) -> None:
    if isinstance(tree, Tensor):
        tensor = tree.detach().cpu()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.int16)
        tree = tensor.numpy()
    elif hasattr(tree, "__array_interface__") or (hasattr(tree, "__array__") and not isinstance(tree, Mapping)):
        tree = np.asarray(tree)  # NumPy scalars and PIL images
    if isinstance(tree, np.ndarray) and tree.dtype != object:
        state.update(f"{tree.dtype.str}{tree.shape}".encode())
        state.update(np.ascontiguousarray(tree).tobytes())
    elif isinstance(tree, Mapping):
        state.update(f"map{len(tree)}".encode())
        for key in tree:
            state.update(repr(key).encode())
            _feed(state, tree[key])
    elif isinstance(tree, (list, tuple)):
        state.update(f"seq{len(tree)}".encode())
        for value in tree:
            _feed(state, value)
    elif isinstance(tree, (set, frozenset)):
        _feed(state, ("set", sorted(digest(value) for value in tree)))  # their own order changes between processes
    elif tree is None or isinstance(tree, (str, bytes, bool, int, float, complex)):
        state.update(repr(tree).encode())
    else:
        # A user's own class: its attributes are its value (its repr may hold an address).
        state.update(type(tree).__qualname__.encode())
        _feed(state, vars(tree) if hasattr(tree, "__dict__") else repr(tree))


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave the global generators of ``random``, NumPy and torch as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    cuda = list(range(torch.cuda.device_count())) if in_use else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def shapes(item: Any) -> tuple[Any, ...]:
    """The shapes and lengths of what an item holds, nested as it is: two items that need padding to stack differ."""
    return _shapes(item, _DEEPEST)


def extent(shape: tuple[Any, ...]) -> int:
    """How large an item is, from its :func:`shapes`: the sum of all axes, so that longer texts and sequences come out
    larger.
    """
    return sum(extent(part) if isinstance(part, tuple) else int(part) for part in shape)


def _shapes(tree: Any, deeper: int) -> tuple[Any, ...]:
    if tree is None or isinstance(tree, (bool, int, float, complex)) or deeper == 0:
        return ()
    if isinstance(tree, (str, bytes, range)):
        return (len(tree),)
    if isinstance(tree, Mapping):
        return tuple(_shapes(value, deeper - 1) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        numbers = not tree or isinstance(tree[0], (bool, int, float, str))
        return (len(tree),) if numbers and len(tree) > _SHORT else tuple(_shapes(value, deeper - 1) for value in tree)
    for name in ("shape", "size"):  # tensors and arrays; pictures of PIL
        axes = getattr(tree, name, None)
        if isinstance(axes, tuple):
            return tuple(int(axis) for axis in axes if isinstance(axis, (int, np.integer)))
    return _shapes(vars(tree), deeper - 1) if hasattr(tree, "__dict__") else ()
