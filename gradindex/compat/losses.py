"""A loss of Captum's kind, ``loss_fn(output, labels)`` of a whole batch, as one number per example."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LossError
from ..tree import map_tensors
from .batches import AssertedError, count_of

LossFn = Callable[[Any, Any], Tensor]


class PerExample:
    """``loss(model, batch) -> (n,)`` of a model that is called as ``model(*batch[:-1])``.

    A loss that reduces has a loss for each example alone: a sum of sums, a mean of means. torch's own are computed
    with ``reduction="none"`` and summed or averaged over the numbers of each example; any other is called on each
    example, all at once where ``torch.vmap`` can. A mean that torch weighs by classes, or takes over the labels that
    are not ignored, is left as the weighted loss of each example, because its divisor depends on the others.

    Args:
        loss_fn: the loss; ``None`` for the sum of the model's outputs.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``: what it does to a batch.
    """

    def __init__(self, loss_fn: LossFn | None, reduction: str) -> None:
        self._loss_fn, self._reduction = loss_fn, reduction
        self._vectorised = True
        # What gives one loss or more for each example.
        self._plain: Any = loss_fn if reduction == "none" else None
        if reduction != "none" and type(loss_fn).__module__ == "torch.nn.modules.loss":
            self._plain = copy.copy(loss_fn)
            self._plain.reduction = "none"

    def __call__(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """(n,) the losses of a batch."""
        *inputs, labels = batch
        n, output = count_of(batch), model(*inputs)
        if self._loss_fn is None:
            return _by_example(output, n, "The model's output").sum(1)
        if self._plain is not None:
            losses = _by_example(self._plain(output, labels), n, "loss_fn")
            return losses.mean(1) if self._reduction == "mean" else losses.sum(1)
        return self._one_by_one(self._loss_fn, output, labels, n)

    def _one_by_one(self, loss_fn: LossFn, output: Any, labels: Any, n: int) -> Tensor:
        if n == 1:
            return _scalar(loss_fn(output, labels)).reshape(1)
        if self._vectorised and isinstance(output, Tensor) and isinstance(labels, Tensor):
            try:
                return torch.vmap(lambda o, t: _scalar(loss_fn(o, t)))(output.unsqueeze(1), labels.unsqueeze(1))
            except (RuntimeError, TypeError, ValueError, IndexError):  # code that vmap cannot follow, or a user's error
                self._vectorised = False

        def alone(part: Any, place: int) -> Any:
            return map_tensors(part, lambda tensor: tensor[place : place + 1])

        return torch.stack([_scalar(loss_fn(alone(output, place), alone(labels, place))) for place in range(n)])


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise LossError(
            f"loss_fn returns {loss.numel()} numbers for one example, but must reduce a batch to one number. Use "
            "reduction='sum', or for TracInCP sample_wise_grads_per_batch=False with one loss per example."
        )
    return loss.reshape(())


def _by_example(losses: Tensor, n: int, what: str) -> Tensor:
    """(n, numbers of each example)."""
    if n > 1 and losses.shape[:1] != (n,):
        raise LossError(
            f"{what} has shape {tuple(losses.shape)} for {n} examples, but needs a first axis of {n}. Use "
            "reduction='none', or for TracInCP sample_wise_grads_per_batch=True with a loss that reduces."
        )
    return losses.reshape(n, -1)


def reduction_of(loss_fn: Any, name: str, reduces: bool) -> str:
    """How a loss treats a batch: by its attribute ``reduction``, else as is expected of it, which a warning says.

    Args:
        loss_fn: the loss, or ``None``.
        name: of the argument.
        reduces: whether a loss that reduces to one number is expected, or one number per example.

    Raises:
        AssertedError: it is not callable, or its reduction is another one.
    """
    if loss_fn is None:
        return "none"
    if not callable(loss_fn):
        raise AssertedError(f"{name} is a {type(loss_fn).__name__}, but must be callable as {name}(output, labels).")
    expected = ("sum", "mean") if reduces else ("none",)
    if hasattr(loss_fn, "reduction"):
        if loss_fn.reduction not in expected:
            words = " or ".join(map(repr, expected))
            raise AssertedError(
                f"{name} has reduction {loss_fn.reduction!r}, but must have {words} here. Set it, or for TracInCP "
                f"choose sample_wise_grads_per_batch={not reduces}."
            )
        return str(loss_fn.reduction)
    meaning = "sums the losses of a batch" if reduces else "returns one loss per example"
    warnings.warn(
        f"{name} has no attribute reduction, so it is taken as a function that {meaning}. If it does another thing, "
        f"give it the attribute: {name}.reduction = 'mean'.",
        stacklevel=4,
    )
    return expected[0]
