"""Whether examples have finite losses of their own; and whose code failed at which of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..digests import digest
from ..errors import LossError, NonFiniteGradientError, UserCodeError, failed, joined_names, left_out
from ..memory import in_halves
from ..tree import preserved_random_state, shapes
from .engine import Engine
from .functional import BACKWARD, COLLATE, LossModule, loop_gradients

# How far the loss of an example in a batch may be from its loss alone, relative to either; and two calls on it alone.
MIXED, _REPEATED = {torch.float32: 2e-3, torch.float64: 1e-8}, 1e-5
# What torch says where a norm has no running statistics.
_OVER_BATCH = "more than 1 value per channel"
# What it says where a tensor is of another type than the weights.
_OTHER_TYPE = re.compile(r"same dtype|expected scalar type|expected m1 and m2|[Ii]nput type .* should be the same")


def check_examples(engine: Engine, items: list[Any], names: Sequence[str], role: str) -> None:
    """Compare the losses of examples alone, alone once more, and together in one batch.

    Args:
        engine: entered.
        items: which differ as much as those of a build.
        names: what to call each.
        role: ``"train"`` or ``"query"``, which chooses the loss.

    Raises:
        LossError: the loss is random, or depends on the other examples of a batch.
        NonFiniteGradientError: a loss is NaN or infinite.
    """
    wrapper = engine.wrapper(role, exact=True)
    with preserved_random_state():
        first, second = (_losses(engine, wrapper, items, names, alone=True) for _ in range(2))
        refuse_non_finite(engine, first.isfinite().tolist(), items, names, role)
        differ = ~_agree(first, second, _REPEATED)
        if bool(differ.any()):
            place = int(differ.nonzero()[0])
            raise LossError(_random(engine, items[place], names[place], float(first[place]), float(second[place])))
        if engine.alone or len(items) == 1:
            return
        together = _losses(engine, wrapper, items, names)
        differ = ~_agree(first, together, MIXED[engine.dtype])
        if bool(differ.any()):  # float32 rounds; a loss near zero of large logits is all rounding
            exact = _doubled_losses(engine, wrapper, items, names)
            differ = differ if exact is None else ~_agree(*exact, MIXED[engine.dtype])
        if bool(differ.any()):
            place = int(differ.nonzero()[0])
            values = float(first[place]), float(together[place])
            raise LossError(_mixed(engine, wrapper, items[place], names[place], values, len(items), role))


def answerable(engine: Engine, items: list[Any], names: list[str]) -> tuple[list[Any], list[str]]:
    """Queries whose loss can be computed and is finite, and their names; all, if none is.

    What is wrong with the others is told when they are asked about, and hinders no other question.
    """
    wrapper, good = engine.wrapper("query", exact=True), []
    for item, name in zip(items, names, strict=True):
        with contextlib.suppress(UserCodeError):
            if bool(_losses(engine, wrapper, [item], [name]).isfinite().all()):
                good.append((item, name))
    return ([item for item, _ in good], [name for _, name in good]) if good else (items, names)


def _losses(
    engine: Engine,
    wrapper: LossModule,
    items: list[Any],
    names: Sequence[str],
    alone: bool = False,
    checkpoint: int = -1,
) -> Tensor:
    """(n,) the losses of a batch, halved where memory runs out, or of each example alone."""

    def losses(group: list[Any]) -> list[Tensor]:
        with torch.no_grad():
            return [wrapper.losses(engine.states[checkpoint], engine.batch(group), len(group))]

    return torch.cat(in_halves(losses, items, names, lambda: engine.at, alone))


def _doubled_losses(
    engine: Engine, wrapper: LossModule, items: list[Any], names: Sequence[str]
) -> tuple[Tensor, Tensor] | None:
    """Alone and together in float64; ``None`` where the model does not run so."""
    try:
        with engine.doubled(-1):
            alone = _losses(engine, wrapper, items, names, alone=True)
            return alone, _losses(engine, wrapper, items, names)
    except (UserCodeError, RuntimeError, TypeError):
        return None


def _agree(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """(n,) whether two values are as good as one."""
    return ((a - b).abs() <= tolerance * torch.maximum(a.abs(), b.abs())) | (a == b) | (a.isnan() & b.isnan())


def _random(engine: Engine, item: Any, name: str, first: float, second: float) -> str:
    apart = engine.task.data_sets
    if digest(engine.task.collate([item]), apart) != digest(engine.task.collate([item]), apart):
        return (
            f"collate is random: it makes two different batches of {_lower(name)} alone (masks drawn at random?). "
            "Draw what is random once for each example, in the data set, by its position."
        )
    return (
        f"The loss is random: {first:.6g} and {second:.6g} in two calls on {_lower(name)} alone. Turn off what the "
        "model draws in eval mode (F.dropout needs training=self.training), and make noise, masks and time steps part "
        "of each example."
    )


def _mixed(
    engine: Engine, wrapper: LossModule, item: Any, name: str, values: tuple[float, float], n: int, role: str
) -> str:
    alone, together = values
    figures = f"{alone:.6g} alone, {together:.6g} in a batch of {n}"
    with contextlib.suppress(UserCodeError):
        copies = _losses(engine, wrapper, [item] * n, [name] * n)
        if not bool(_agree(copies, copies[:1].expand_as(copies), MIXED[engine.dtype]).all()):
            return (
                f"The loss of {_lower(name)} depends on its place in the batch ({figures}), as when noise is drawn "
                "from a generator that is seeded in the loss. Make what is drawn part of each example."
            )
    return mixed(name, figures, role)


def mixed(name: str, figures: str, role: str, what: str = "loss") -> str:
    """What to say of an example whose loss, or ``what`` else, is another one in a batch."""
    return (
        f"The {what} of {_lower(name)} depends on the others of its batch ({figures}), so it has no gradient of its "
        "own. Use a per-example loss, normalisation with running statistics, and a mask where padding is seen. "
        f"{_alone(role)}."
    )


def _alone(role: str) -> str:
    """The way out that always works."""
    if role == "query":
        return "Or ask about one at a time"
    return "Or give each example a batch of its own, with batch_size=1, which is slower and always right"


def _lower(name: str) -> str:
    return name[:1].lower() + name[1:]


def refuse_non_finite(
    engine: Engine, finite: Sequence[bool], items: Sequence[Any], names: Sequence[str], role: str
) -> None:
    """Name the examples that are not ``finite`` at the last checkpoint, and the first checkpoint where they are not.

    Raises:
        NonFiniteGradientError: there are some.
    """
    bad = [place for place, good in enumerate(finite) if not good]
    if not bad:
        return
    wrapper, item, name = engine.wrapper(role, exact=True), items[bad[0]], names[bad[0]]
    for checkpoint, state in enumerate(engine.states):
        finite_loss = bool(_losses(engine, wrapper, [item], [name], checkpoint=checkpoint).isfinite().all())
        gradients = loop_gradients(wrapper, state, engine.parameters, engine.singles([item])) if finite_loss else []
        if not (finite_loss and all(bool(gradient.isfinite().all()) for gradient in gradients)):
            break
    raise non_finite(engine, checkpoint, [names[place] for place in bad], finite_loss)


def non_finite(
    engine: Engine, checkpoint: int, names: Sequence[str], finite_loss: bool = True
) -> NonFiniteGradientError:
    """What to raise for examples that have no finite loss or gradient at a checkpoint."""
    what = "gradient" if finite_loss else "loss"
    path, have = engine.task.checkpoints[checkpoint].path, "has" if len(names) == 1 else "have"
    return NonFiniteGradientError(
        f"{joined_names(names)} {have} a NaN or infinite {what} at checkpoint {checkpoint} ({path}). {left_out(names)}"
    )


@contextmanager
def blamed(engine: Engine, items: Sequence[Any], names: Sequence[str], role: str) -> Iterator[None]:
    """Say at which example the loss or collate failed: the first that fails alone, else the batch.

    Raises:
        UserCodeError: the block raised one.
    """
    try:
        yield
    except UserCodeError as error:
        raise _located(engine, items, names, role, error) from error.__cause__


def _located(
    engine: Engine, items: Sequence[Any], names: Sequence[str], role: str, error: UserCodeError
) -> UserCodeError:
    cause = error.__cause__
    if not error.what or " on " in error.what or cause is None:
        return error
    wrapper = engine.wrapper(role, exact=True)
    for item, name in zip(items, names, strict=True):
        try:
            if error.what == BACKWARD:
                loop_gradients(wrapper, engine.states[-1], engine.parameters, engine.singles([item]))
            else:
                _losses(engine, wrapper, [item], [name])
        except UserCodeError as own:
            cause = own.__cause__ or own
            return failed(f"{own.what} on {_lower(name)}", cause, _hint(engine, own.what, [item], cause))
    hint = _hint(engine, error.what, items, cause)
    if len(items) > 1:
        hint = f"{hint or 'Each of them works alone.'} {_alone(role)}."
    return failed(f"{error.what} on {_lower(joined_names(names))}", cause, hint)


def _hint(engine: Engine, what: str, items: Sequence[Any], cause: BaseException) -> str:
    if _OVER_BATCH in str(cause):
        return "It normalises over the batch, so that no example has a gradient of its own: use running statistics."
    if _OTHER_TYPE.search(str(cause)) and what != COLLATE:
        return _fixed_type(engine, str(cause))
    if what != COLLATE:
        return ""
    found = [shapes(item) for item in items]
    other = next((shape for shape in found if shape != found[0]), None)
    if other is None:
        return "Give Task(collate=...) that makes a batch of such examples, or a data set of tensors."
    return f"They differ in shape ({_plain(found[0])} and {_plain(other)}): give Task(collate=...) that pads them."


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
