"""Losses of torchvision's detection models, which give them only while they train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LossError
from ..tree import preserved_random_state
from .base import PerExampleLoss

# Modules whose training mode changes what is computed of an example, and not which outputs there are.
_STAY = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class DetectionLoss(PerExampleLoss):
    """The weighted sum of a detection model's losses; see :func:`detection`.

    Args:
        weights: pairs of a loss's name and its weight.
        seed: of the proposals that some models draw.
    """

    weights: tuple[tuple[str, float], ...] = ()
    seed: int = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """(n,) the losses."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise LossError(f"The batch is a {type(batch).__name__}, but must be a pair of pictures and targets.")
        with _training(model):
            return torch.stack([self._one(model, *pair) for pair in zip(*batch, strict=True)])

    def _one(self, model: nn.Module, picture: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        with preserved_random_state():
            torch.manual_seed(self.seed)
            losses = model([picture], [dict(target)])
        weights = dict(self.weights)
        if not isinstance(losses, Mapping) or not set(weights) <= set(losses):
            named = f"losses {', '.join(losses)}" if isinstance(losses, Mapping) else f"a {type(losses).__name__}"
            raise LossError(
                f"The model returned {named}, but a mapping with {', '.join(weights) or 'losses'} is needed."
            )
        return torch.stack([loss * weights.get(name, 1.0) for name, loss in losses.items()]).sum()


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """In training mode but for dropout, and norms, which keep their statistics."""
    before = [(module, module.training) for module in model.modules() if not isinstance(module, _STAY)]
    try:
        for module, _ in before:
            module.training = True
        yield
    finally:
        for module, training in before:
            module.training = training


def detection(weights: Mapping[str, float] | None = None, seed: int = 0) -> DetectionLoss:
    """The sum of the losses of a detection model of torchvision on each picture.

    Batches are pairs of n pictures (channels, h, w) and n targets with ``boxes`` and ``labels``:
    ``collate=lambda items: tuple(zip(*items))``. Pictures go through the model one by one, because its losses are means
    over a batch; so a batch saves no time here. The model is in training mode meanwhile, but for dropout and norms.

    Args:
        weights: by name of a loss, such as ``"bbox_regression"``; 1 for the others.
        seed: Faster R-CNN and its like draw proposals; each picture's are drawn from this seed, the same at any time.

    Raises:
        LossError: (of a call) the model gives no losses, or none of that name.
    """
    return DetectionLoss(tuple(sorted((weights or {}).items())), seed)
