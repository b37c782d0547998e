"""Linear layers and embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...factors import Factors, Gradients, Lookups
from .base import RULES, Plain, columns, with_bias


@RULES.register("linear")
class Linear(Plain):
    """y = x W^T + b: G = sum over positions of delta [x, 1]^T."""

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        return (module.out_features, columns(module.in_features, names)) if type(module) is nn.Linear else None

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        activations = saved.reshape(len(saved), -1, saved.shape[-1])
        return Factors(with_bias(activations, scales), delta.reshape(len(delta), -1, delta.shape[-1]))

    def row_axes(self, module: nn.Module) -> int | None:
        """The features. See :class:`Rule`."""
        return 1


@RULES.register("linear^T")
class TransposedLinear(Linear):
    """y = x W + b, as the ``Conv1D`` of transformers has it."""

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if type(module).__name__ != "Conv1D" or not hasattr(module, "nf"):  # asking for a computed weight computes it
            return None
        weight = getattr(module, "weight", None)
        return (weight.shape[1], columns(weight.shape[0], names)) if isinstance(weight, Tensor) else None

    def as_matrix(self, name: str, gradient: Tensor) -> Tensor:
        """See :class:`Rule`."""
        return gradient.transpose(1, 2) if name == "weight" else gradient[:, :, None]


@RULES.register("embedding")
class Embedding(Plain):
    """G has delta in the column of each index; the padding index has no gradient."""

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq:
            return None
        return module.embedding_dim, module.num_embeddings

    def saved(self, module: nn.Module, inputs: Tensor, *others: Any, **keywords: Any) -> Any:
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

    def row_axes(self, module: nn.Module) -> int | None:
        """The features. See :class:`Rule`."""
        return 1

    def regrouped(self, module: nn.Module, saved: Any, lay: Callable[[Tensor, int], Tensor]) -> Any:
        """A row looks up one index; rows that are not there have no gradient. See :class:`Rule`."""
        return lay(saved, 0)

    def as_matrix(self, name: str, gradient: Tensor) -> Tensor:
        """See :class:`Rule`."""
        return gradient.transpose(1, 2)


@RULES.register("embedding bag")
class EmbeddingBag(Embedding):
    """Sums (weighted or not) and means of bags, one bag an example: rows of equal length, or a list with offsets."""

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if type(module) is not nn.EmbeddingBag or module.max_norm is not None or module.scale_grad_by_freq:
            return None
        return (module.embedding_dim, module.num_embeddings) if module.mode in ("sum", "mean") else None

    def row_axes(self, module: nn.Module) -> int | None:
        """None: a row is a bag. See :class:`Rule`."""
        return None

    def saved(
        self,
        module: nn.Module,
        inputs: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *others: Any,
        **keywords: Any,
    ) -> Any:
        """Words, offsets and the words' weights. See :class:`Rule`."""
        assert isinstance(module, nn.EmbeddingBag)
        if offsets is not None and module.include_last_offset:
            offsets = offsets[:-1]
        return inputs, offsets, None if per_sample_weights is None else per_sample_weights.detach()

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        assert isinstance(module, nn.EmbeddingBag)
        words, offsets, weights = saved
        shares = torch.ones_like(words, dtype=delta.dtype) if weights is None else weights
        if offsets is not None:
            words, shares = _as_rows(words, shares, offsets.long())
        if module.padding_idx is not None:
            shares = shares * (words != module.padding_idx)
        if module.mode == "mean":
            shares = shares / shares.sum(1, keepdim=True).clamp_min(1)
        return Lookups(words.long(), delta[:, None] * shares[:, :, None] * scales["weight"], module.num_embeddings)


def _as_rows(words: Tensor, shares: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(bags, longest) words and shares of bags that lie in one list; what fills a shorter bag has the share 0."""
    ends = torch.cat([offsets[1:], offsets.new_tensor([len(words)])])
    longest = int((ends - offsets).max())
    places = offsets[:, None] + torch.arange(longest, device=offsets.device)
    inside = places < ends[:, None]
    places = places.where(inside, 0)
    return words[places], shares[places] * inside
