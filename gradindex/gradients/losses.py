"""Whether examples have finite losses of their own, which are the same in any batch and at any time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..digests import digest
from ..errors import LossError, NonFiniteGradientError, UserCodeError, joined_names, left_out
from ..examples import Examples, Role
from ..tree import preserved_random_state
from .engine import Engine
from .passes import alone_gradients, lower, one_at_a_time

# How far the loss of an example in a batch may be from its loss alone, relative to either; and two calls on it alone.
MIXED, _REPEATED = {torch.float32: 2e-3, torch.float64: 1e-8}, 1e-5


def check_examples(engine: Engine, examples: Examples) -> None:
    """Compare the losses of examples alone, alone once more, and together in one batch.

    Args:
        engine: entered.
        examples: which differ as much as those of a build.

    Raises:
        LossError: the loss is random, or depends on the other examples of a batch.
        NonFiniteGradientError: a loss is NaN or infinite.
    """
    with preserved_random_state():
        first, second = _alone_losses(engine, examples), _alone_losses(engine, examples)
        refuse_non_finite(engine, examples, first.isfinite().tolist())
        differ = ~_agree(first, second, _REPEATED)
        if bool(differ.any()):
            place = int(differ.nonzero()[0])
            raise LossError(_random(engine, _at(examples, place), float(first[place]), float(second[place])))
        if engine.alone or len(examples) == 1:
            return
        together = engine.losses(-1, examples)
        differ = ~_agree(first, together, MIXED[engine.dtype])
        if bool(differ.any()):  # float32 rounds; a loss near zero of large logits is all rounding
            exact = _doubled_losses(engine, examples)
            differ = differ if exact is None else ~_agree(*exact, MIXED[engine.dtype])
        if bool(differ.any()):
            place = int(differ.nonzero()[0])
            values = float(first[place]), float(together[place])
            raise LossError(_mixed(engine, _at(examples, place), values, len(examples)))


def answerable(engine: Engine, queries: Examples) -> Examples:
    """Queries whose loss can be computed and is finite; all, if none is.

    What is wrong with the others is told when they are asked about, and hinders no other question.
    """
    good = []
    for place, query in enumerate(queries):
        with contextlib.suppress(UserCodeError):
            if bool(engine.losses(-1, query).isfinite().all()):
                good.append(place)
    return queries.at(good) if good else queries


def _alone_losses(engine: Engine, examples: Examples) -> Tensor:
    """(n,) the loss of each example alone, at the last checkpoint."""
    return torch.cat([engine.losses(-1, example) for example in examples])


def _doubled_losses(engine: Engine, examples: Examples) -> tuple[Tensor, Tensor] | None:
    """Alone and together in float64; ``None`` where the model does not run so."""
    try:
        with engine.doubled(-1):
            return _alone_losses(engine, examples), engine.losses(-1, examples)
    except (UserCodeError, RuntimeError, TypeError):
        return None


def _at(examples: Examples, place: int) -> Examples:
    return examples[place : place + 1]


def _agree(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """(n,) whether two values are as good as one."""
    return ((a - b).abs() <= tolerance * torch.maximum(a.abs(), b.abs())) | (a == b) | (a.isnan() & b.isnan())


def _random(engine: Engine, example: Examples, first: float, second: float) -> str:
    apart, name = engine.task.data_sets, lower(example.names[0])
    if digest(engine.task.collate(example.items), apart) != digest(engine.task.collate(example.items), apart):
        return (
            f"collate is random: it makes two different batches of {name} alone (masks drawn at random?). "
            "Draw what is random once for each example, in the data set, by its position."
        )
    return (
        f"The loss is random: {first:.6g} and {second:.6g} in two calls on {name} alone. Turn off what the "
        "model draws in eval mode (F.dropout needs training=self.training), and make noise, masks and time steps part "
        "of each example."
    )


def _mixed(engine: Engine, example: Examples, values: tuple[float, float], n: int) -> str:
    alone, together = values
    figures = f"{alone:.6g} alone, {together:.6g} in a batch of {n}"
    with contextlib.suppress(UserCodeError):
        copies = engine.losses(-1, example.at([0] * n))
        if not bool(_agree(copies, copies[:1].expand_as(copies), MIXED[engine.dtype]).all()):
            return (
                f"The loss of {lower(example.names[0])} depends on its place in the batch ({figures}), as when noise "
                "is drawn from a generator that is seeded in the loss. Make what is drawn part of each example."
            )
    return mixed(example.names[0], figures, example.role)


def mixed(name: str, figures: str, role: Role, what: str = "loss") -> str:
    """What to say of an example whose loss, or ``what`` else, is another one in a batch."""
    return (
        f"The {what} of {lower(name)} depends on the others of its batch ({figures}), so it has no gradient of its "
        "own. Use a per-example loss, normalisation with running statistics, and a mask where padding is seen. "
        f"{one_at_a_time(role)}."
    )


def refuse_non_finite(engine: Engine, examples: Examples, finite: Sequence[bool]) -> None:
    """Name the examples that are not ``finite`` at the last checkpoint, and the first checkpoint where they are not.

    Raises:
        NonFiniteGradientError: there are some.
    """
    bad = [place for place, good in enumerate(finite) if not good]
    if not bad:
        return
    example = _at(examples, bad[0])
    for checkpoint in range(engine.n_checkpoints):
        finite_loss = bool(engine.losses(checkpoint, example).isfinite().all())
        gradients = alone_gradients(engine, example, engine.parameters, checkpoint) if finite_loss else []
        if not (finite_loss and all(bool(gradient.isfinite().all()) for gradient in gradients)):
            break
    raise non_finite(engine, checkpoint, [examples.names[place] for place in bad], finite_loss)


def non_finite(
    engine: Engine, checkpoint: int, names: Sequence[str], finite_loss: bool = True
) -> NonFiniteGradientError:
    """What to raise for examples that have no finite loss or gradient at a checkpoint."""
    what = "gradient" if finite_loss else "loss"
    path, have = engine.task.checkpoints[checkpoint].path, "has" if len(names) == 1 else "have"
    return NonFiniteGradientError(
        f"{joined_names(names)} {have} a NaN or infinite {what} at checkpoint {checkpoint} ({path}). {left_out(names)}"
    )
