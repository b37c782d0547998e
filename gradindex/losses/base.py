"""What losses of this package share: how they read a batch, run the model, and are called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LossError, TaskError

# Where transformers looks away.
IGNORED = -100
# Keys of a batch that are no argument of a model.
_NO_INPUTS = frozenset({"labels", "completion_mask", "assistant_masks", "special_tokens_mask", "seq_lengths"})


class PerExampleLoss(ABC):
    """A loss of each example, ``loss(model, batch) -> (n,)``, as :class:`gradindex.Task` takes it.

    Subclasses are frozen dataclasses: they pickle, and stores know them by their repr. Batches are mappings as collate
    functions of transformers make them, or pairs ``(x, y)``.
    """

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """(n,) the losses."""


def name_of(loss: Any) -> str:
    """What a store calls a loss."""
    if isinstance(loss, PerExampleLoss):
        return repr(loss)
    return str(getattr(loss, "__qualname__", type(loss).__qualname__))


def inputs_of(batch: Any) -> Any:
    """What goes into the model: a mapping without labels, or the ``x`` of a pair.

    Raises:
        LossError: the batch is neither.
    """
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in _NO_INPUTS}
    if isinstance(batch, Sequence) and len(batch) == 2:
        return inputs_of(batch[0]) if isinstance(batch[0], Mapping) else batch[0]
    size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
    raise LossError(f"The batch is a {type(batch).__name__}{size}, but must be a mapping with labels or a pair (x, y).")


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch that :func:`inputs_of` takes; ``None`` where a mapping has none.

    Raises:
        LossError: they are no tensor.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    if labels is not None and not isinstance(labels, Tensor):
        raise LossError(f"The labels are a {type(labels).__name__}, but must be a tensor. Make it one in collate.")
    return labels


def needed_labels(batch: Any) -> Tensor:
    """The same, where there must be labels.

    Raises:
        LossError: there are none.
    """
    labels = labels_of(batch)
    if labels is None:
        raise LossError(f"The batch has no labels among its keys ({', '.join(map(str, batch))}). Add them in collate.")
    return labels


def with_labels(batch: Any, labels: Tensor) -> Any:
    """The batch with other labels."""
    return {**batch, "labels": labels} if isinstance(batch, Mapping) else (batch[0], labels)


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """What the model says, in float32 at least.

    Raises:
        LossError: it has no logits.
    """
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, (tuple, list)):
        output = output[0]
    elif hasattr(output, "logits"):
        output = output.logits
    if not isinstance(output, Tensor):
        raise LossError("The model returned no logits: a tensor, or an output with the attribute logits.")
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(n, p) of logits (n, p, classes) and labels (n, p); 0 where these are -100."""
    there = labels != IGNORED
    picked = logits.log_softmax(2).gather(2, labels.where(there, 0).unsqueeze(2)).squeeze(2)
    return torch.where(there, -picked, 0.0)


def check_share(name: str, value: float) -> None:
    """Refuse a number that is not from 0 to below 1.

    Raises:
        TaskError: it is not.
    """
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise TaskError(f"{name} is {value!r}, but must be a number from 0 to below 1.")
