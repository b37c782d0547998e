"""Walks over what data sets and collate functions hand out.

An *item* is one example of a data set, a *batch* is many of them collated: tensors, arrays, pictures, numbers and
strings in tuples, lists, mappings, and objects of a user's own classes.
"""

from __future__ import annotations

import copy
import enum
import random
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, Dataset, Sampler

from .errors import TaskError

SCALARS = frozenset({str, bytes, bool, int, float, complex, type(None)})
# What is no part of an item's value, though attributes may lead there.
APART = (nn.Module, Dataset, DataLoader, Sampler, torch.optim.Optimizer, types.ModuleType)
APART_PACKAGES = frozenset({
    "asyncio", "concurrent", "datasets", "h5py", "logging", "multiprocessing", "pyarrow", "socket", "sqlite3",
    "subprocess", "threading", "tokenizers", "weakref",
})  # fmt: skip
# Objects that are not looked into for tensors: they hold none.
_CLOSED = (*APART, type, types.FunctionType, types.MethodType, enum.Enum, np.ndarray, np.generic, torch.Size)
_CLOSED_PACKAGES = APART_PACKAGES | {"PIL", "pandas", "pathlib", "datetime", "re", "random", "io", "uuid"}
_SHALLOW = 16
# More than a batch has: a reference leads out of it.
_MOST = 1_000_000

# How deep items are looked into for shapes, and up to which length lists of numbers and texts are looked through.
_DEEPEST, _SHORT, _LOOKED_AT = 6, 8, 2000


def map_tensors(
    tree: Any,
    function: Callable[[Tensor], Any],
    device: torch.device | None = None,
    apart: Collection[Any] = (),
) -> Any:
    """Apply ``function`` to every tensor of ``tree``, keeping its structure; nothing of ``tree`` is changed.

    Lists, dictionaries and whatever holds tensors are copied (objects without a call of ``__init__``), all else is
    handed on. A tensor that stands in several places is mapped once, and cycles stay cycles. Data sets, loaders and
    modules are left as they are. A mapping whose values are made when they are asked for becomes a ``dict``, unless
    its type takes one.

    Args:
        tree: an item, a batch, or any part of one.
        function: what becomes of a tensor.
        device: where tensors go before ``function`` is called; objects that have a ``to`` of their own are moved
            by it, and their tensors stay where it puts them (the lengths of a ``PackedSequence`` on the CPU).
        apart: objects that are handed on as they are, such as the data set that an item came from.

    Raises:
        TaskError: an object that holds tensors cannot be copied, or leads to more than a batch could hold.
    """
    if _is_plain(tree, _SHALLOW):
        return _map_plain(tree, function, device, {})
    try:
        return _Mapped(tree, function, device, apart).of(tree)
    except RecursionError:
        raise TaskError(
            f"A {type(tree).__name__} of the data is nested too deep to be looked through. Give Task a collate= that "
            "returns tuples or dictionaries of tensors."
        ) from None


def _is_plain(tree: Any, deeper: int) -> bool:
    """Whether there are only tensors and scalars in tuples, lists and dictionaries, as nearly always: the fast way."""
    kind = type(tree)
    if kind is Tensor or kind in SCALARS:
        return True
    if deeper == 0 or kind not in (tuple, list, dict):
        return False
    parts = tree.values() if kind is dict else tree
    return all(type(part) in SCALARS or _is_plain(part, deeper - 1) for part in parts)


def _map_plain(tree: Any, function: Callable[[Tensor], Any], device: torch.device | None, made: dict[int, Any]) -> Any:
    kind = type(tree)
    if kind is Tensor:
        if id(tree) not in made:
            made[id(tree)] = function(tree if device is None else tree.to(device))
        return made[id(tree)]
    if kind is dict:
        return {key: _map_plain(value, function, device, made) for key, value in tree.items()}
    if kind is tuple or kind is list:
        return kind([v if type(v) in SCALARS else _map_plain(v, function, device, made) for v in tree])
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor of ``tree``, each once, in the order in which :func:`map_tensors` comes to them."""
    found: list[Tensor] = []
    seen: dict[int, Any] = {}
    stack = [tree]
    while stack:
        node = stack.pop()
        if type(node) in SCALARS or id(node) in seen:
            continue
        seen[id(node)] = node
        if isinstance(node, Tensor):
            found.append(node)
        else:
            stack += reversed(_parts(node))
    return found


def made_of(tensor: Any) -> tuple[dict[str, Tensor] | None, Any]:
    """The tensors inside a tensor that is made of several, such as a weight that torchao quantised, and how it is made.

    ``(None, None)`` for a tensor with memory of its own.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return None, None
    names, how = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}, how


def attributes(value: Any) -> dict[str, Any]:
    """What an object keeps in slots and in its ``__dict__``, by the names that it is kept under."""
    found: dict[str, Any] = {}
    for kind in type(value).__mro__[:-1]:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{name}" if private else name
            member = kind.__dict__.get(name)
            if isinstance(member, types.MemberDescriptorType):
                try:
                    found[name] = member.__get__(value, kind)
                except AttributeError:  # not set
                    continue
    own = getattr(value, "__dict__", None)
    return found | own if isinstance(own, dict) else found


def _parts(node: Any) -> list[Any]:
    """What a container or an object holds, in the order in which it is mapped."""
    kind = type(node)
    if kind in (list, tuple, set, frozenset):
        return list(node)
    if kind is dict:
        return list(node.values())
    if isinstance(node, np.ndarray) and node.dtype == object:
        return list(node.flat)
    if isinstance(node, _CLOSED) or kind.__module__.partition(".")[0] in _CLOSED_PACKAGES:
        return []
    items: list[Any] = []
    if isinstance(node, Mapping):
        items = list(node.values())
    elif isinstance(node, (list, tuple, set, frozenset, deque)):
        items = list(node)
    return [*attributes(node).values(), *items]


class _Mapped:
    """A copy of a tree, as far as it holds tensors."""

    def __init__(
        self, tree: Any, function: Callable[[Tensor], Any], device: torch.device | None, apart: Collection[Any]
    ) -> None:
        self._function, self._device, self._apart = function, device, apart
        self._seen: list[Any] = []  # keeps what ids stand for
        self._holders = self._found(tree)
        self._made: dict[int, Any] = {}

    def _found(self, tree: Any) -> set[int]:
        """Ids of all from which tensors can be reached, and of these."""
        above: dict[int, list[int]] = {id(tree): []}
        self._seen.append(tree)
        stack, reached, apart = [tree], list[int](), {id(one) for one in self._apart}
        while stack:
            node = stack.pop()
            if isinstance(node, Tensor):
                reached.append(id(node))
                continue
            for part in _parts(node):
                if type(part) in SCALARS or id(part) in apart:
                    continue
                if id(part) not in above:
                    above[id(part)] = []
                    self._seen.append(part)
                    stack.append(part)
                above[id(part)].append(id(node))
            if len(self._seen) > _MOST:
                raise TaskError(
                    f"A {type(tree).__name__} of the data leads to over {_MOST:,} objects, by way of a "
                    f"{type(node).__name__}. Leave the reference out, in the data set or with collate=."
                )
        holders: set[int] = set()
        while reached:
            key = reached.pop()
            if key not in holders:
                holders.add(key)
                reached += above[key]
        return holders

    def of(self, node: Any) -> Any:
        """What becomes of a part of the tree."""
        if id(node) in self._made:
            return self._made[id(node)]
        if isinstance(node, Tensor):
            made = self._function(node if self._device is None else node.to(self._device))
        elif id(node) not in self._holders and type(node) not in (list, dict, tuple):
            return node
        elif self._device is not None and callable(getattr(type(node), "to", None)):
            made = self._by_itself(node, self._device)
        else:
            return self._copy(node)
        self._seen.append(node)
        self._made[id(node)] = made
        return made

    def _by_itself(self, node: Any, device: torch.device) -> Any:
        """Moved by its own ``to``, which may work in place and so gets a copy."""
        own = map_tensors(node, lambda tensor: tensor.detach(), apart=self._apart)
        try:
            moved = own.to(device)
        except Exception:  # whatever it raises: its ``to`` means something else
            return map_tensors(node, lambda tensor: self._function(tensor.to(device)), apart=self._apart)
        return map_tensors(own if moved is None else moved, self._function, apart=self._apart)

    def _copy(self, node: Any) -> Any:
        kind = type(node)
        if isinstance(node, (tuple, set, frozenset)):
            parts = [self.of(part) for part in node]
            if id(node) not in self._made:  # it may be, in a cycle
                made = self._made[id(node)] = _of_parts(kind, parts)
                for name, value in attributes(node).items():
                    _set(made, name, self.of(value))
            return self._made[id(node)]
        kept = any(id(value) in self._holders for value in attributes(node).values())
        if isinstance(node, Mapping) and not isinstance(node, dict) and not kept:
            return self._as_dict(node)
        made = {} if kind is dict else [] if kind is list else _copied(node)
        self._made[id(node)] = made
        return self._filled(made, node)

    def _filled(self, made: Any, node: Any) -> Any:
        """A copy with what holds tensors mapped."""
        kind = type(node)
        if kind is dict:
            made |= {key: self.of(value) for key, value in node.items()}
            return made
        if kind is list:
            made[:] = [self.of(value) for value in node]
            return made
        if isinstance(node, np.ndarray):
            for index in np.ndindex(node.shape):
                made[index] = self.of(node[index])
            return made
        own = attributes(made)
        for name, value in attributes(node).items():
            if id(value) in self._holders:
                mine, plain = own.get(name), isinstance(value, (Tensor, tuple, frozenset))
                if id(value) in self._made or mine is value or type(mine) is not type(value) or plain:
                    _set(made, name, self.of(value))
                else:  # copied along by the class's own __copy__, maybe with a reference back
                    self._made[id(value)] = mine
                    self._filled(mine, value)
        if isinstance(node, dict):
            for key, value in node.items():
                dict.__setitem__(made, key, self.of(value))
        elif isinstance(node, (list, deque)):
            for place, value in enumerate(node):
                made[place] = self.of(value)
        return made

    def _as_dict(self, node: Mapping[Any, Any]) -> Any:
        """A mapping whose values are nowhere but made when they are asked for."""
        mapped = {key: map_tensors(value, self._function, self._device, self._apart) for key, value in node.items()}
        try:
            made: Any = type(node)(mapped)  # type: ignore[call-arg]  # some mappings take a dict; the others raise
        except TypeError:
            made = mapped
        self._made[id(node)] = made
        return made


def _of_parts(kind: Any, parts: list[Any]) -> Any:
    if issubclass(kind, tuple):
        try:
            return tuple.__new__(kind, parts)  # not by its own constructor, which may take something else
        except TypeError:  # of a type that is made in C, as functions of torch return
            return kind(parts)
    return kind(parts)


def _copied(node: Any) -> Any:
    """A shallow copy."""
    try:
        made = copy.copy(node)
        if made is not node:
            return made
    except Exception:  # whatever a class of the user's raises
        made = None
    try:
        made = object.__new__(type(node))
        for name, value in attributes(node).items():
            _set(made, name, value)
    except Exception as error:  # as above
        raise TaskError(
            f"A {type(node).__name__} of the data holds tensors and cannot be copied ({type(error).__name__}: "
            f"{error}). Give Task a collate= that returns tuples or dictionaries of tensors."
        ) from error
    return made


def _set(made: Any, name: str, value: Any) -> None:
    """Whatever the class does when attributes are set, or forbids (frozen dataclasses)."""
    own = getattr(made, "__dict__", None)
    slot = next((kind.__dict__[name] for kind in type(made).__mro__ if name in kind.__dict__), None)
    if isinstance(slot, types.MemberDescriptorType):
        slot.__set__(made, value)
    elif isinstance(own, dict):
        own[name] = value
    else:
        object.__setattr__(made, name, value)


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
    return _shapes(item, _DEEPEST, [_LOOKED_AT])


def extent(shape: tuple[Any, ...]) -> int:
    """How large an item is, from its :func:`shapes`: the sum of all axes, so that longer texts and sequences come out
    larger.
    """
    return sum(extent(part) if isinstance(part, tuple) else int(part) for part in shape)


def _shapes(tree: Any, deeper: int, left: list[int]) -> tuple[Any, ...]:
    """``left`` holds how many parts may still be looked at: items may refer to all others."""
    left[0] -= 1
    if tree is None or isinstance(tree, (bool, int, float, complex)) or deeper == 0 or left[0] < 0:
        return ()
    if isinstance(tree, (str, bytes, range)):
        return (len(tree),)
    if isinstance(tree, Mapping):
        return tuple(_shapes(value, deeper - 1, left) for value in islice(tree.values(), left[0]))
    if isinstance(tree, (list, tuple)):
        numbers = not tree or isinstance(tree[0], (bool, int, float, str))
        if numbers and len(tree) > _SHORT:
            return (len(tree),)
        return tuple(_shapes(value, deeper - 1, left) for value in islice(tree, left[0]))
    for name in ("shape", "size"):  # tensors and arrays; pictures of PIL
        axes = getattr(tree, name, None) if hasattr(type(tree), name) else None  # own classes may raise whatever
        if isinstance(axes, tuple):
            return tuple(int(axis) for axis in axes if isinstance(axis, (int, np.integer)))
    return () if isinstance(tree, _CLOSED) else _shapes(attributes(tree), deeper - 1, left)
