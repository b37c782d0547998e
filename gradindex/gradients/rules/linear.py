"""Linear layers and embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...factors import Factors, Gradients, Lookups
from .base import Plain, columns, with_bias


class Linear(Plain):
    """y = x W^T + b: G = sum over positions of delta [x, 1]^T."""

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        return (module.out_features, columns(module.in_features, names)) if type(module) is nn.Linear else None

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        activations = saved.reshape(len(saved), -1, saved.shape[-1])
        return Factors(with_bias(activations, scales), delta.reshape(len(delta), -1, delta.shape[-1]))


class TransposedLinear(Linear):
    """y = x W + b, as the ``Conv1D`` of transformers has it."""

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        weight = getattr(module, "weight", None)
        if type(module).__name__ != "Conv1D" or not hasattr(module, "nf") or not isinstance(weight, Tensor):
            return None
        return weight.shape[1], columns(weight.shape[0], names)

    def as_matrix(self, name: str, gradient: Tensor) -> Tensor:
        """See :class:`Rule`."""
        return gradient.transpose(1, 2) if name == "weight" else gradient[:, :, None]


class Embedding:
    """G has delta in the column of each index; the padding index has no gradient."""

    takes_half = False

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq:
            return None
        return module.embedding_dim, module.num_embeddings

    def saved(self, module: nn.Module, inputs: Tensor) -> Any:
        """See :class:`Rule`."""
        return inputs

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        assert isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        indices = saved.reshape(len(saved), -1).long()
        delta = delta.reshape(*indices.shape, -1) * scales["weight"]
        if module.padding_idx is not None:
            delta = delta * (indices != module.padding_idx)[:, :, None]
        return Lookups(indices, delta, module.num_embeddings)

    def as_matrix(self, name: str, gradient: Tensor) -> Tensor:
        """See :class:`Rule`."""
        return gradient.transpose(1, 2)


class EmbeddingBag(Embedding):
    """Sums and means of bags of equal length, one bag an example; bags given by offsets take the general route."""

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if type(module) is not nn.EmbeddingBag or module.max_norm is not None or module.scale_grad_by_freq:
            return None
        return (module.embedding_dim, module.num_embeddings) if module.mode in ("sum", "mean") else None

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        assert isinstance(module, nn.EmbeddingBag)
        saved = saved if saved.ndim == 2 else saved.reshape(len(delta), -1)
        if module.mode == "mean":
            counted = saved != (-1 if module.padding_idx is None else module.padding_idx)
            delta = delta / counted.sum(1, keepdim=True).clamp_min(1)
        return super().gradients(module, saved, delta[:, None].expand(-1, saved.shape[1], -1), scales)
