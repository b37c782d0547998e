"""Losses of one answer for each example: classes, soft targets, several labels, numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import LossError, TaskError, check_choice
from .base import PerExampleLoss, check_share, inputs_of, labels_of, logits_of, needed_labels, with_labels

# As transformers calls them.
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


@dataclass(frozen=True)
class ClassLoss(PerExampleLoss):
    """The loss of what a model says of each example; see :func:`sequence_classification` and :func:`cross_entropy`.

    Args:
        problem_type: what labels mean; ``None`` follows the model and the labels, as transformers does.
        label_smoothing: the share of a label that is spread over all classes.
    """

    problem_type: ProblemType | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.problem_type is not None:
            check_choice("problem_type", self.problem_type, get_args(ProblemType))
        check_share("label_smoothing", self.label_smoothing)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """(n,) the losses."""
        logits, labels = _answered(model, batch)
        kind = self._kind(model, logits, labels)
        if kind == "single_label_classification":
            labels = labels.to(logits) if labels.is_floating_point() else labels.reshape(-1)
            return functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        labels = labels.reshape(logits.shape).to(logits)
        if kind == "regression":
            return (logits - labels).square().mean(1)
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)

    def predictions(self, model: nn.Module, batch: Any) -> list[Tensor]:
        """The model's own answer for each example: a class, or 0 and 1 for each of several labels.

        Raises:
            TaskError: the answers are numbers, whose squared error has no gradient.
        """
        logits = _logits(model, batch)
        kind = self._kind(model, logits, labels_of(batch))
        if kind == "regression":
            raise TaskError(
                "The squared error of a model's own answer is 0 and has no gradient. Explain the answer itself, with "
                "query_loss=lambda model, batch: ..., which returns it for each example."
            )
        return list(logits.argmax(1) if kind == "single_label_classification" else (logits > 0).to(logits))

    def relabelled(self, batch: Any, predictions: Sequence[Tensor]) -> Any:
        """The batch with what :meth:`predictions` gave as labels."""
        return with_labels(batch, torch.stack(list(predictions)))

    def _kind(self, model: nn.Module, logits: Tensor, labels: Tensor | None) -> ProblemType:
        known: ProblemType | None = self.problem_type or getattr(getattr(model, "config", None), "problem_type", None)
        if known is not None:
            return known
        if logits.shape[1] == 1:
            return "regression"
        several = labels is not None and labels.is_floating_point()
        return "multi_label_classification" if several else "single_label_classification"


@dataclass(frozen=True)
class BinaryLoss(PerExampleLoss):
    """A yes or no for each class; see :func:`binary_cross_entropy`, whose arguments it has."""

    smoothing: float = 0.1
    target_threshold: float | None = None
    sum_classes: bool = False
    pos_weight: float | tuple[float, ...] | None = None
    smooth_dense: bool = False

    def __post_init__(self) -> None:
        check_share("smoothing", self.smoothing)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """(n,) the losses."""
        logits, labels = _answered(model, batch)
        n, classes = logits.shape
        if labels.shape != logits.shape:
            off = self.smoothing / classes
            targets = torch.full_like(logits, off)
            targets = targets.scatter(1, labels.reshape(n, 1).long(), 1 - self.smoothing + off)
        else:
            targets = labels.to(logits)
            if self.smooth_dense:
                targets = targets * (1 - self.smoothing) + self.smoothing / 2
        if self.target_threshold is not None:
            targets = targets.gt(self.target_threshold).to(logits)
        weight = None if self.pos_weight is None else torch.as_tensor(self.pos_weight).to(logits)
        losses = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
        return losses.sum(1) if self.sum_classes else losses.mean(1)

    def predictions(self, model: nn.Module, batch: Any) -> list[Tensor]:
        """The model's own answer for each example: the class, or 0 and 1 for each where labels are so."""
        logits, labels = _logits(model, batch), labels_of(batch)
        several = labels is not None and labels.shape == logits.shape
        return list((logits > 0).to(logits) if several else logits.argmax(1))

    def relabelled(self, batch: Any, predictions: Sequence[Tensor]) -> Any:
        """The batch with what :meth:`predictions` gave as labels."""
        return with_labels(batch, torch.stack(list(predictions)))


def _answered(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and labels of a batch."""
    labels = needed_labels(batch)
    return _logits(model, batch), labels


def _logits(model: nn.Module, batch: Any) -> Tensor:
    logits = logits_of(model, inputs_of(batch))
    if logits.ndim != 2:
        raise LossError(f"The logits have shape {tuple(logits.shape)}, but must have (examples, classes).")
    return logits


def sequence_classification(problem_type: ProblemType | None = None) -> ClassLoss:
    """The loss of a class, several labels or a number for each sequence, as models of transformers compute it.

    Batches have ``input_ids`` and ``labels``, or are pairs ``(x, y)``; logits are (n, classes). Labels are (n,)
    integers for one class each, (n, classes) floats for several, which are averaged, and (n,) or (n, classes) numbers
    for regression, whose squared errors are averaged.

    Args:
        problem_type: which of these, by default what ``model.config.problem_type`` says, else a number if there is
            one logit, several labels if they are floats, and one class otherwise.

    Raises:
        ArgumentError: there is no such type.
    """
    return ClassLoss(problem_type)


def multiple_choice() -> ClassLoss:
    """Cross entropy of the right one of several choices.

    Batches have ``input_ids`` of shape (n, choices, positions) and ``labels`` (n,); logits are (n, choices). A model of
    transformers runs all choices side by side, so its layers take a slower route or ``batch_size=1``.
    """
    return ClassLoss("single_label_classification")


def cross_entropy(label_smoothing: float = 0.0) -> ClassLoss:
    """Cross entropy of pictures, or whatever else has one class: of labels or of soft targets.

    As ``LabelSmoothingCrossEntropy`` and ``SoftTargetCrossEntropy`` of timm, and ``CrossEntropyLoss`` of torch, but for
    each example. Batches are pairs ``(x, y)``, or mappings with ``labels``: (n,) classes, or (n, classes) shares
    (mixup).

    Args:
        label_smoothing: the share of a label that is spread over all classes.

    Raises:
        TaskError: it is not from 0 to below 1.
    """
    return ClassLoss("single_label_classification", label_smoothing)


def binary_cross_entropy(
    smoothing: float = 0.1,
    target_threshold: float | None = None,
    sum_classes: bool = False,
    pos_weight: float | tuple[float, ...] | None = None,
    smooth_dense: bool = False,
) -> BinaryLoss:
    """Binary cross entropy over classes, as ``BinaryCrossEntropy`` of timm, but for each example.

    Batches are pairs ``(x, y)``, or mappings with ``labels``: (n,) classes or (n, classes) targets.

    Args:
        smoothing: of classes: 1 - s + s / classes for the right one, s / classes for the others.
        target_threshold: makes targets 1 above it and 0 elsewhere.
        sum_classes: sums over classes instead of averaging.
        pos_weight: of positive targets, one number or one for each class.
        smooth_dense: moves (n, classes) targets towards 0.5 as well.

    Raises:
        TaskError: ``smoothing`` is not from 0 to below 1.
    """
    return BinaryLoss(smoothing, target_threshold, sum_classes, pos_weight, smooth_dense)
