"""Losses that are sums over tokens: language models, causal and masked, and a class for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LossError, check_choice
from .base import (
    IGNORED,
    PerExampleLoss,
    cross_entropies,
    inputs_of,
    labels_of,
    logits_of,
    needed_labels,
    with_labels,
)

Reduction = Literal["mean", "sum"]
_REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class TokenLoss(PerExampleLoss):
    """Cross entropy at the labelled positions of each example; see :func:`causal_lm`, which makes one.

    Args:
        kind: ``"causal_lm"``, ``"masked_lm"`` or ``"token_classification"``.
        reduction: ``"mean"`` or ``"sum"`` over an example's labelled positions.
        completion_only: whether positions outside the batch's ``completion_mask`` count as unlabelled.
    """

    kind: Literal["causal_lm", "masked_lm", "token_classification"]
    reduction: Reduction = "mean"
    completion_only: bool = False

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, _REDUCTIONS)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """(n,) the losses; NaN for the mean over no token at all, as in transformers."""
        return self.tokens(model, batch).sum(1)

    def tokens(self, model: nn.Module, batch: Any) -> Tensor:
        """(n, p) each position's share of the loss, which add up to it; 0 where there is no label.

        The share of a token stands at the token's own position, not at the one before, where it is predicted.
        """
        labels = self.labels(batch)
        logits, first = self._logits(model, batch, labels)
        losses = cross_entropies(logits, labels[:, first:])
        if self.reduction == "mean":
            losses = losses / (labels != IGNORED).sum(1, keepdim=True)
        return torch.cat([losses.new_zeros(len(losses), first), losses], 1)

    def labels(self, batch: Any) -> Tensor:
        """(n, p) int64 what each position should be, -100 where it has no loss.

        Raises:
            LossError: there are none, or they are not one for each token.
        """
        inputs = inputs_of(batch)
        labels = labels_of(batch) if self.kind == "causal_lm" else needed_labels(batch)
        if labels is None:
            labels = _present(inputs)
        if labels.ndim != 2 or labels.is_floating_point():
            raise LossError(
                f"The labels have shape {tuple(labels.shape)} and type {labels.dtype}, but must be integers, one for "
                "each token, of shape (examples, positions)."
            )
        if self.completion_only:
            if not isinstance(batch, Mapping) or "completion_mask" not in batch:
                raise LossError(
                    "completion_only needs a completion_mask in the batch, 1 where a token is part of the completion. "
                    "Add it in collate, or set the labels of prompts to -100 there."
                )
            labels = labels.where(batch["completion_mask"].bool(), IGNORED)
        if self.kind == "causal_lm":  # nothing comes before the first token, so nothing predicts it
            labels = torch.cat([torch.full_like(labels[:, :1], IGNORED), labels[:, 1:]], 1)
        return labels

    def token_ids(self, batch: Any) -> Tensor:
        """(n, p) int64 the tokens that positions stand for: of a language model the label, where there is one."""
        labels, ids = self.labels(batch), _ids(inputs_of(batch))
        return ids if self.kind == "token_classification" else labels.where(labels != IGNORED, ids)

    def predictions(self, model: nn.Module, batch: Any) -> list[Tensor]:
        """For each example, the likeliest label at each labelled position, in their order; of text as it is before.

        Where token classification has no labels, all tokens count.
        """
        batch = self._asked(batch)
        labels = self.labels(batch)
        logits, first = self._logits(model, batch, labels)
        return [row[mask] for row, mask in zip(logits.argmax(2), labels[:, first:] != IGNORED, strict=True)]

    def relabelled(self, batch: Any, predictions: Sequence[Tensor]) -> Any:
        """The batch with what :meth:`predictions` gave as labels."""
        labels = self.labels(self._asked(batch))
        return with_labels(batch, labels.masked_scatter(labels != IGNORED, torch.cat(list(predictions))))

    def _asked(self, batch: Any) -> Any:
        if self.kind == "token_classification" and labels_of(batch) is None:
            return with_labels(batch, _present(inputs_of(batch)))
        return batch

    def _logits(self, model: nn.Module, batch: Any, labels: Tensor) -> tuple[Tensor, int]:
        """(n, p - first, classes), what is said of each position from the ``first`` that anything is said of."""
        logits = logits_of(model, inputs_of(batch))
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise LossError(
                f"The logits have shape {tuple(logits.shape)}, but {tuple(labels.shape)} labels need (examples, "
                "positions, classes). Pad labels as far as input_ids."
            )
        return (logits[:, :-1], 1) if self.kind == "causal_lm" else (logits, 0)


def _present(inputs: Mapping[str, Tensor]) -> Tensor:
    """(n, p) the tokens, -100 where there is padding."""
    there = inputs.get("attention_mask")
    return _ids(inputs) if there is None else _ids(inputs).where(there.bool(), IGNORED)


def _ids(inputs: Any) -> Tensor:
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(ids, Tensor):
        raise LossError("The batch has no input_ids, which say what its tokens are. Add them in collate.")
    return ids


def causal_lm(reduction: Reduction = "mean", completion_only: bool = False) -> TokenLoss:
    """The loss of a causal language model on each text, as transformers computes it: each token from those before.

    Batches have ``input_ids``, ``attention_mask`` and ``labels`` of shape (n, positions), or are pairs of ids and
    labels. Labels are not shifted, and -100 is left out; without ``labels``, they are the ids that are not padding. Pad
    on the right, or give ``position_ids``: a model counts positions from the start of the batch.

    Args:
        reduction: ``"mean"`` over an example's labelled tokens, which is what the model's own loss is for one example;
            ``"sum"`` where training divided by the tokens of a whole batch, as ``Trainer`` does, so that long texts
            weigh more.
        completion_only: leaves out tokens outside the batch's ``completion_mask`` (TRL). Where labels of the prompt
            are -100 already, it is not needed.

    Raises:
        ArgumentError: the reduction is unknown.
    """
    return TokenLoss("causal_lm", reduction, completion_only)


def masked_lm(reduction: Reduction = "mean") -> TokenLoss:
    """The loss of a masked language model on each text: of the tokens whose label is not -100.

    A collate function that masks at random gives another example at each read, which is refused: mask the data set
    once, with :class:`Masked`.

    Args:
        reduction: over the masked tokens of an example, see :func:`causal_lm`.

    Raises:
        ArgumentError: the reduction is unknown.
    """
    return TokenLoss("masked_lm", reduction)


def token_classification(reduction: Reduction = "mean") -> TokenLoss:
    """Cross entropy of a class for each token, over those whose label is not -100.

    Args:
        reduction: over the labelled tokens of an example, see :func:`causal_lm`.

    Raises:
        ArgumentError: the reduction is unknown.
    """
    return TokenLoss("token_classification", reduction)
