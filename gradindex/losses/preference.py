"""Losses of pairs: preferences, and why pictures and texts that are told apart in a batch have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import LossError, TaskError
from .base import IGNORED, PerExampleLoss, check_share, cross_entropies, logits_of

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PreferenceLoss(PerExampleLoss):
    """Direct preference optimisation; see :func:`dpo`, whose arguments it has."""

    reference: nn.Module | None = field(default=None, repr=False)
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.reference is not None and not isinstance(self.reference, nn.Module):
            raise TaskError(f"reference is a {type(self.reference).__name__}, but must be a model or None.")
        if not isinstance(self.beta, (int, float)) or not self.beta > 0:
            raise TaskError(f"beta is {self.beta!r}, but must be a number above 0.")
        check_share("label_smoothing", self.label_smoothing)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """(n,) the losses."""
        pairs = _sides(batch)
        # One pass for each side, so that the first axis of what layers see is the example.
        chosen, rejected = (_log_likelihoods(model, *pairs[side]) for side in _SIDES)
        before = self._reference(model, batch, pairs)
        margin = self.beta * ((chosen - rejected) - (before["chosen"] - before["rejected"]).to(chosen))
        kept = (1 - self.label_smoothing) * functional.logsigmoid(margin)
        return -kept - self.label_smoothing * functional.logsigmoid(-margin)

    def _reference(
        self, model: nn.Module, batch: Mapping[str, Any], pairs: Mapping[str, tuple[dict[str, Tensor], Tensor]]
    ) -> dict[str, Tensor]:
        """(n,) log-likelihoods of both sides before training."""
        given = {side: batch.get(f"ref_{side}_logps") for side in _SIDES}
        if all(value is not None for value in given.values()):
            return given  # type: ignore[return-value]  # checked in the line above
        if self.reference is model:
            raise TaskError("The reference of dpo is the trained model itself. Give it a copy from before training.")
        with torch.no_grad():
            if self.reference is not None:
                return {side: _log_likelihoods(self.reference, *pairs[side]) for side in _SIDES}
            without_adapters: Any = getattr(model, "disable_adapter", None)
            if without_adapters is not None:
                with without_adapters():
                    return {side: _log_likelihoods(model, *pairs[side]) for side in _SIDES}
        raise TaskError(
            "dpo has no reference. Give dpo(reference=model_before_training), or ref_chosen_logps and "
            "ref_rejected_logps in the batch; only adapters of peft can be turned off instead."
        )


def _sides(batch: Any) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """For both sides what goes into the model, and labels (n, p) that are -100 outside the completion."""
    if isinstance(batch, Mapping) and "completion_mask" in batch:
        n = len(batch["input_ids"]) // 2
        halves = {"chosen": slice(0, n), "rejected": slice(n, 2 * n)}
        inputs = {
            side: {key: batch[key][half] for key in ("input_ids", "attention_mask") if key in batch}
            for side, half in halves.items()
        }
        masks = {side: batch["completion_mask"][half].bool() for side, half in halves.items()}
        return {side: (inputs[side], inputs[side]["input_ids"].where(masks[side], IGNORED)) for side in _SIDES}
    if isinstance(batch, Mapping) and all(
        f"{side}_{key}" in batch for side in _SIDES for key in ("input_ids", "labels")
    ):
        arguments = ("input_ids", "attention_mask")
        return {
            side: (
                {key: batch[f"{side}_{key}"] for key in arguments if f"{side}_{key}" in batch},
                batch[f"{side}_labels"],
            )
            for side in _SIDES
        }
    keys = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise LossError(
        f"The batch of dpo has {keys}, but needs input_ids and completion_mask, first all chosen texts and then all "
        "rejected ones (TRL's DataCollatorForPreference), or chosen_input_ids, chosen_labels and the same of rejected."
    )


def _log_likelihoods(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """(n,) the log-likelihood of each completion."""
    return -cross_entropies(logits_of(model, inputs)[:, :-1], labels[:, 1:]).sum(1)


def dpo(reference: nn.Module | None = None, beta: float = 0.1, label_smoothing: float = 0.0) -> PreferenceLoss:
    """Direct preference optimisation of each pair of a chosen and a rejected completion.

        l = -log sigmoid(beta ((log p(chosen) - log p(rejected)) - (log q(chosen) - log q(rejected))))

    with p the model and q the reference, summed over the tokens of a completion. Source: Rafailov et al. 2023
    (arXiv:2305.18290), equation 7; with smoothing Mitchell 2023, as in TRL's ``loss_type="sigmoid"``.

    Batches are as TRL's ``DataCollatorForPreference`` makes them: ``input_ids``, ``attention_mask`` and
    ``completion_mask`` of shape (2 n, positions), chosen texts before rejected ones. Or they have ``chosen_input_ids``,
    ``chosen_attention_mask`` and ``chosen_labels`` (n, positions), -100 where the prompt is, and the same of
    ``rejected``.

    Args:
        reference: the model before training, in eval mode and on the device of the computation. ``None`` takes
            ``ref_chosen_logps`` and ``ref_rejected_logps`` (n,) of the batch, or the model with peft's adapters off.
        beta: how much a change of likelihood counts.
        label_smoothing: the share of pairs that are expected to be the wrong way round.

    Raises:
        TaskError: an argument is of the wrong type or out of range.
    """
    return PreferenceLoss(reference, beta, label_smoothing)


def contrastive(*_: Any, **__: Any) -> NoReturn:
    """Refused: a contrastive loss, such as CLIP's, has no gradient of one example.

    Raises:
        TaskError: always; says why, and what to do instead.
    """
    raise TaskError(
        "A contrastive loss, such as CLIP's, compares each example with the others of its batch, so no example has a "
        "loss or a gradient of its own. Make whole batches the examples (items that hold a batch, with a loss of shape "
        "(1,) and batch_size=1), or explain a loss of single pairs, such as a sigmoid of their similarity."
    )
