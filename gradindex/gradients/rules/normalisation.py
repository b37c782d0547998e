"""Normalisations with running statistics or over one example alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...factors import Formed, Gradients, part_bytes
from .base import RULES, Plain, wide

# What sums over positions widen stays in the processor's cache.
_PART_BYTES = 4 << 20


@RULES.register("normalisation")
class Normalisation(Plain):
    """y = weight * n(x) + bias, element by element: G = sum over positions of delta * [n(x), 1]."""

    takes_half = True
    _KINDS = (
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    )

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if type(module) not in self._KINDS:
            return None
        return module.get_parameter(names[0]).numel(), len(names)

    def saved(self, module: nn.Module, inputs: Tensor, *others: Any, **keywords: Any) -> Any:
        """The input, and the running statistics of this checkpoint. See :class:`Rule`."""
        return inputs.detach(), getattr(module, "running_mean", None), getattr(module, "running_var", None)

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        inputs, *statistics = saved
        at_once = max(1, part_bytes(delta.device, _PART_BYTES) // (4 * delta[0].numel()))
        parts = zip(torch.split(delta, at_once), torch.split(inputs, at_once), strict=True)
        return Formed(torch.cat([self._sums(module, wide(d), wide(x), statistics, scales) for d, x in parts]))

    def row_axes(self, module: nn.Module) -> int | None:
        """What is normalised together, of norms that look at nothing else. See :class:`Rule`."""
        return len(module.normalized_shape) if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else None

    def regrouped(self, module: nn.Module, saved: Any, lay: Callable[[Tensor, int], Tensor]) -> Any:
        """See :class:`Rule`."""
        return lay(saved[0], self.row_axes(module) or 0), *saved[1:]

    def _sums(
        self, module: nn.Module, delta: Tensor, inputs: Tensor, statistics: Any, scales: Mapping[str, float]
    ) -> Tensor:
        """(batch, elements, d_in)."""
        columns = []
        for name, scale in scales.items():
            if name == "weight" and isinstance(module, nn.modules.batchnorm._BatchNorm) and statistics[0] is not None:
                summed = self._batch_norm_weight(module, delta, inputs, *statistics)
            else:
                product = delta
                if name == "weight":
                    product = delta * self._normalised(module, inputs, *statistics)
                if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                    # (batch, positions..., *normalized_shape): each element of the shape has its own parameter.
                    product = product.reshape(len(product), -1, prod(module.normalized_shape)).transpose(1, 2)
                else:
                    product = product.reshape(*product.shape[:2], -1)
                summed = product.sum(2)
            columns.append(summed * scale)
        return torch.stack(columns, 2)

    def as_matrix(self, name: str, gradient: Tensor) -> Tensor:
        """See :class:`Rule`."""
        return gradient.flatten(1)[:, :, None]

    @staticmethod
    def _batch_norm_weight(module: nn.Module, delta: Tensor, inputs: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """sum_p delta (x - mean) / std without a normalised copy of x: (batch, channels)."""
        delta, inputs = (tensor.reshape(*tensor.shape[:2], -1) for tensor in (delta, inputs))
        products: Tensor = torch.linalg.vecdot(delta, inputs)
        sums = delta.sum(2)
        eps: float = module.eps  # type: ignore[assignment]  # a number in batch norms
        return (products - sums * mean) * torch.rsqrt(variance + eps)

    @staticmethod
    def _normalised(module: nn.Module, inputs: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor:
        if isinstance(module, nn.LayerNorm):
            return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.RMSNorm):
            return functional.rms_norm(inputs, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.GroupNorm):
            return functional.group_norm(inputs, module.num_groups, eps=module.eps)
        eps: float = module.eps  # type: ignore[assignment]  # the batch and instance norms have a number
        if mean is None or variance is None:
            return functional.instance_norm(inputs, eps=eps)
        return functional.batch_norm(inputs, mean, variance, eps=eps)
