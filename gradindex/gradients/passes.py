"""Examples through an engine: each alone by autograd, or in batches that fit the memory and name whoever fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import UserCodeError, failed, joined_names
from ..examples import Examples, Role
from ..lengths import length_of
from ..tree import shapes
from .engine import Engine
from .functional import BACKWARD, COLLATE, loop_gradients

T = TypeVar("T")

# What torch says where a norm has no running statistics.
_OVER_BATCH = "more than 1 value per channel"
# What it says where a tensor is of another type than the weights.
_OTHER_TYPE = re.compile(r"same dtype|expected scalar type|expected m1 and m2|[Ii]nput type .* should be the same")


def in_batches(engine: Engine, action: Callable[[Examples], list[T]], examples: Examples) -> list[T]:
    """``action(examples)``, in as many batches as the memory needs, or one by one for an engine that is ``alone``.

    Args:
        engine: entered.
        action: takes a batch through the engine and returns a list; those of several batches are joined.
        examples: at least one.

    Raises:
        OutOfMemoryError: one example alone does not fit; says which and where.
        UserCodeError: the loss or collate failed; names the first example that fails alone, else the batch.
    """
    with blamed(engine, examples):
        groups = [slice(None)] if engine.batch_tokens is None else by_tokens(examples.items, engine.batch_tokens)
        return [result for group in groups for result in engine.in_halves(action, examples[group])]


def by_tokens(items: Sequence[Any], most: int) -> list[slice]:
    """Neighbours in groups of at most ``most`` tokens, each counted as long as the longest of its group.

    The length of an item is the longest first axis in it, such as that of ``input_ids``; one that is too long is alone.
    """
    groups, start, longest = [], 0, 0
    for place, item in enumerate(items):
        length = max(1, length_of(shapes(item)))
        if place > start and (place + 1 - start) * max(longest, length) > most:
            groups.append(slice(start, place))
            start, longest = place, 0
        longest = max(longest, length)
    return [*groups, slice(start, len(items))]


def alone_gradients(
    engine: Engine, examples: Examples, parameters: Sequence[str], checkpoint: int = -1
) -> list[Tensor]:
    """(n, *shape) for each parameter: plain autograd on each example alone, never in half precision; slow and right."""
    wrapper = engine.wrapper(examples.role, exact=True)
    return loop_gradients(wrapper, engine.states[checkpoint], parameters, engine.singles(examples))


@contextmanager
def blamed(engine: Engine, examples: Examples) -> Iterator[None]:
    """Say at which example the loss or collate failed: the first that fails alone, else the batch.

    Raises:
        UserCodeError: the block raised one.
    """
    try:
        yield
    except UserCodeError as error:
        raise _located(engine, examples, error) from error.__cause__


def _located(engine: Engine, examples: Examples, error: UserCodeError) -> UserCodeError:
    cause = error.__cause__
    if not error.what or " on " in error.what or cause is None:
        return error
    for example in examples:
        try:
            if error.what == BACKWARD:
                alone_gradients(engine, example, engine.parameters)
            else:
                engine.losses(-1, example)
        except UserCodeError as own:
            cause = own.__cause__ or own
            return failed(f"{own.what} on {lower(example.names[0])}", cause, _hint(engine, own.what, example, cause))
    hint = _hint(engine, error.what, examples, cause)
    if len(examples) > 1:
        hint = f"{hint or 'Each of them works alone.'} {one_at_a_time(examples.role)}."
    return failed(f"{error.what} on {lower(joined_names(examples.names))}", cause, hint)


def _hint(engine: Engine, what: str, examples: Examples, cause: BaseException) -> str:
    if _OVER_BATCH in str(cause):
        return "It normalises over the batch, so that no example has a gradient of its own: use running statistics."
    if _OTHER_TYPE.search(str(cause)) and what != COLLATE:
        return _fixed_type(engine, str(cause))
    if what != COLLATE:
        return ""
    item_shapes = [shapes(item) for item in examples.items]
    other = next((shape for shape in item_shapes if shape != item_shapes[0]), None)
    if other is None:
        return "Give Task(collate=...) that makes a batch of such examples, or a data set of tensors."
    return (
        f"They differ in shape ({_plain(item_shapes[0])} and {_plain(other)}): give Task(collate=...) that pads them."
    )


def _fixed_type(engine: Engine, message: str) -> str:
    """What to do about a type that the model's code fixes, where its weights are of another one here."""
    running, other = ("float32", "float64") if engine.dtype == torch.float32 else ("float64", "float32")
    way_out = "Cast to the type of the weights instead, such as x.to(self.weight.dtype)"
    if set(re.findall("double|bfloat16|half|float", message.lower())) == {"double", "float"}:
        way_out += f", or choose precision={other!r}"
    return (
        f"This is at {engine.at}. Weights and inputs are of {running} here, so a type that the code fixes (.half(), "
        f".double(), .to(torch.bfloat16)) does not fit them. {way_out}."
    )


def _plain(shape: tuple[Any, ...]) -> str:
    """The shapes that are not empty: of a text and its label (17,)."""
    parts = [part for part in shape if part != ()]
    return str(parts[0] if len(parts) == 1 and isinstance(parts[0], tuple) else tuple(parts))


def lower(name: str) -> str:
    """A name in the middle of a sentence."""
    return name[:1].lower() + name[1:]


def one_at_a_time(role: Role) -> str:
    """The way out that always works."""
    if role == "query":
        return "Or ask about one at a time"
    return "Or give each example a batch of its own, with batch_size=1, which is slower and always right"
