"""What a hook can know about a module: the per-example gradients of its parameters from its input and output gradient.

Each rule knows one kind of module. Nothing here is trusted: the engine compares every layer
with autograd on two examples before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..factors import Factors, Formed, Gradients, Lookups

Convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Windows of a part of a batch stay in the processor's cache, and so does what sums over positions widen;
# up to so many products are cheaper without windows.
_PART_BYTES, _SUM_BYTES, _FEW = 16 << 20, 4 << 20, 3


class Rule(Protocol):
    """How one kind of module is handled.

    ``names`` and ``scales`` go by the parameter's own name, such as ``"bias"``.
    ``takes_half`` says whether bfloat16 comes as it is; else it is widened to float32.
    """

    takes_half: bool

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """Rows and columns of the gradient of these parameters together, or ``None``: not by this rule."""

    def saved(self, module: nn.Module, inputs: Tensor) -> Any:
        """What to keep of the forward pass, while a checkpoint's tensors are in the module."""

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """Gradients of the tracked parameters, each times its scale; ``delta`` is the output's gradient."""

    def as_matrix(self, name: str, gradient: Tensor) -> Tensor:
        """A parameter's gradient (batch, *its shape) as its columns of the layer's matrix (batch, rows, -1)."""


class _Plain:
    """What most rules share."""

    takes_half = False

    def saved(self, module: nn.Module, inputs: Tensor) -> Any:
        return inputs.detach()

    def as_matrix(self, name: str, gradient: Tensor) -> Tensor:
        return gradient.flatten(2) if gradient.ndim > 2 else gradient[:, :, None]


def _with_bias(activations: Tensor, scales: Mapping[str, float]) -> Tensor:
    """(batch, positions, columns) scaled, and a column for the bias: its activation is 1 at every position."""
    parts = []
    if "weight" in scales:
        parts.append(activations if scales["weight"] == 1 else activations * scales["weight"])
    if "bias" in scales:
        parts.append(activations.new_full((*activations.shape[:2], 1), scales["bias"]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _columns(inputs: int, names: tuple[str, ...]) -> int:
    return inputs * ("weight" in names) + ("bias" in names)


class Linear(_Plain):
    """y = x W^T + b: G = sum over positions of delta [x, 1]^T."""

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        return (module.out_features, _columns(module.in_features, names)) if type(module) is nn.Linear else None

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        activations = saved.reshape(len(saved), -1, saved.shape[-1])
        return Factors(_with_bias(activations, scales), delta.reshape(len(delta), -1, delta.shape[-1]))


class TransposedLinear(Linear):
    """y = x W + b, as the ``Conv1D`` of transformers has it."""

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        weight = getattr(module, "weight", None)
        if type(module).__name__ != "Conv1D" or not hasattr(module, "nf") or not isinstance(weight, Tensor):
            return None
        return weight.shape[1], _columns(weight.shape[0], names)

    def as_matrix(self, name: str, gradient: Tensor) -> Tensor:
        """See :class:`Rule`."""
        return gradient.transpose(1, 2) if name == "weight" else gradient[:, :, None]


class Convolution(_Plain):
    """1 to 3 dimensions, any stride, padding, dilation and groups: a linear layer at every position of the output."""

    takes_half = True

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if not isinstance(module, CONVOLUTIONS) or type(module) not in CONVOLUTIONS:
            return None
        return module.out_channels, _columns(prod(module.weight.shape[1:]), names)

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        assert isinstance(module, CONVOLUTIONS)
        if "weight" in scales and module.groups == 1:
            return Windows(module, saved, delta, scales)
        delta = _wide(delta).flatten(2)
        if "weight" not in scales:
            return Formed(delta.sum(2, keepdim=True) * scales["bias"])
        patches = _wide(_windows(module, saved))
        # Each output channel sees its group's inputs alone, so that a common x does not exist.
        split = patches.reshape(len(patches), module.groups, -1, patches.shape[2])
        weight = delta.reshape(len(delta), module.groups, -1, delta.shape[2]) @ split.transpose(2, 3)
        parts = [weight.flatten(1, 2) * scales["weight"]]
        parts += [delta.sum(2, keepdim=True) * scales["bias"]] if "bias" in scales else []
        return Formed(torch.cat(parts, 2))


class Windows(Factors):
    """Factors of a convolution, whose activations (what each output position sees) are laid out only when asked for.

    Args:
        module: without groups.
        inputs: (batch, channels, *sizes).
        delta: (batch, rows, *output sizes).
        scales: of the weight and, where it is tracked, the bias.
    """

    def __init__(self, module: Convolutions, inputs: Tensor, delta: Tensor, scales: Mapping[str, float]) -> None:
        self._module, self._inputs, self._delta, self._scales = module, inputs, delta, scales

    @cached_property
    def output_gradients(self) -> Tensor:  # type: ignore[override]  # widened on first use
        """(batch, positions, rows)."""
        return _wide(self._delta).flatten(2).transpose(1, 2)

    @cached_property
    def activations(self) -> Tensor:  # type: ignore[override]  # laid out on first use
        """(batch, positions, columns)."""
        return _with_bias(_wide(_windows(self._module, self._inputs)).transpose(1, 2), self._scales)

    def parts(self) -> Iterator[tuple[slice, Gradients]]:
        """See ``Gradients``."""
        per_example = prod(self._module.weight.shape[1:]) * self._delta[0, 0].numel() * self._delta.itemsize
        at_once = max(1, _PART_BYTES // per_example)
        for start in range(0, len(self._delta), at_once):
            part = slice(start, start + at_once)
            yield part, Windows(self._module, self._inputs[part], self._delta[part], self._scales)

    def products(self, other: Gradients) -> Tensor:
        """With a few formed gradients: the convolution itself, with these in the weight's place. See ``Gradients``.

        sum_p delta_p . (V x_p) is what the forward-mode derivative along V computes for this layer.
        """
        if not isinstance(other, Formed) or len(other.gradient) > _FEW:
            return super().products(other)
        outputs = self._seen_through(other.gradient)
        delta = self._delta.flatten(1).to(outputs)[:, None]
        # Not vecdot in bfloat16: it would sum in bfloat16 as well.
        products: Tensor = (
            (outputs.flatten(2) * delta).sum(2, dtype=torch.float32)
            if outputs.dtype == torch.bfloat16
            else torch.linalg.vecdot(outputs.flatten(2), delta)
        )
        return products

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """The right side is a convolution as well. See ``Gradients``."""
        seen = self._seen_through(right.T[None])[:, 0]  # (batch, b, positions)
        projected = left.T.to(seen) @ self._delta.flatten(2).to(seen)
        return _wide(torch.bmm(projected, seen.transpose(1, 2)))

    def _seen_through(self, matrices: Tensor) -> Tensor:
        """V x_p for each V (rows, columns) of (n, rows, columns): (batch, n, rows, positions)."""
        count, rows, _ = matrices.shape
        module, weight_columns = self._module, prod(self._module.weight.shape[1:])
        weights = (
            matrices[:, :, :weight_columns].reshape(count * rows, *module.weight.shape[1:]) * self._scales["weight"]
        )
        inputs, padding = self._inputs, module.padding
        if module.padding_mode != "zeros":
            inputs = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = (0,) * len(module.kernel_size)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(module.kernel_size) - 1]
        outputs = convolve(inputs, weights.to(inputs), None, module.stride, padding, module.dilation)
        outputs = outputs.reshape(len(inputs), count, rows, -1)
        if "bias" in self._scales:
            outputs = outputs + (matrices[None, :, :, -1:] * self._scales["bias"]).to(outputs)
        return outputs


class TransposedConvolution(_Plain):
    """The roles change: the gradient of the weight takes patches of delta and the plain input."""

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if not isinstance(module, TRANSPOSED) or type(module) not in TRANSPOSED or names != ("weight",):
            return None
        return (module.in_channels, prod(module.weight.shape[1:])) if module.groups == 1 else None

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        assert isinstance(module, TRANSPOSED)
        around = [int(size) for size in module.padding for _ in (0, 1)][::-1]  # str is for plain convolutions alone
        patches = _patches(functional.pad(delta, around), module.kernel_size, module.stride, module.dilation)
        return Factors(patches.transpose(1, 2) * scales["weight"], saved.flatten(2).transpose(1, 2))


class ChannelBias(_Plain):
    """The bias of a transposed convolution."""

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if not isinstance(module, TRANSPOSED) or type(module) not in TRANSPOSED or names != ("bias",):
            return None
        return module.out_channels, 1

    def saved(self, module: nn.Module, inputs: Tensor) -> Any:
        """Nothing. See :class:`Rule`."""
        return None

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        return Formed(delta.flatten(2).sum(2, keepdim=True) * scales["bias"])


class Normalisation:
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

    def saved(self, module: nn.Module, inputs: Tensor) -> Any:
        """The input, and the running statistics of this checkpoint. See :class:`Rule`."""
        return inputs.detach(), getattr(module, "running_mean", None), getattr(module, "running_var", None)

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        inputs, *statistics = saved
        at_once = max(1, _SUM_BYTES // (4 * delta[0].numel()))
        parts = zip(delta.split(at_once), inputs.split(at_once), strict=True)
        return Formed(torch.cat([self._sums(module, _wide(d), _wide(x), statistics, scales) for d, x in parts]))

    def _sums(
        self, module: nn.Module, delta: Tensor, inputs: Tensor, statistics: Any, scales: Mapping[str, float]
    ) -> Tensor:
        """(batch, elements, columns)."""
        columns = []
        by_channel = not isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        for name, scale in scales.items():
            if name == "weight" and isinstance(module, nn.modules.batchnorm._BatchNorm) and statistics[0] is not None:
                summed = self._batch_norm_weight(module, delta, inputs, *statistics)
            else:
                product = delta
                if name == "weight":
                    product = delta * self._normalised(module, inputs, *statistics)
                if by_channel:
                    product = product.reshape(*product.shape[:2], -1)
                else:  # (batch, positions..., *normalized_shape): each element of the shape has its own parameter
                    product = product.reshape(len(product), -1, prod(module.normalized_shape)).transpose(1, 2)
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
        products, sums = torch.linalg.vecdot(delta, inputs), delta.sum(2)
        products = products - sums * mean
        return products * torch.rsqrt(variance + module.eps)  # type: ignore[operator]  # a number in batch norms

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


RULES: Mapping[str, Rule] = {
    "linear": Linear(),
    "linear^T": TransposedLinear(),
    "convolution": Convolution(),
    "convolution^T": TransposedConvolution(),
    "channel bias": ChannelBias(),
    "normalisation": Normalisation(),
    "embedding": Embedding(),
    "embedding bag": EmbeddingBag(),
}

# Rules for one parameter of a module whose others have another layer.
SINGLE = (TransposedConvolution, ChannelBias)


def _windows(module: Convolutions, inputs: Tensor) -> Tensor:
    """(batch, channels * kernel, positions): what each position of the output sees."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return functional.unfold(inputs, kernel, dilation, module.padding, stride)  # pads without a copy
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return _patches(
        functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode), kernel, stride, dilation
    )


def _patches(padded: Tensor, kernel: Any, stride: Any, dilation: Any) -> Tensor:
    """The same of inputs that are padded already."""
    batch, channels, *sizes = padded.shape
    if len(sizes) == 2:
        return functional.unfold(padded, kernel, dilation=dilation, stride=stride)
    steps = padded.stride()[2:]
    seen = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)]
    view = padded.as_strided(
        (batch, channels, *kernel, *seen),
        (
            *padded.stride()[:2],
            *(step * d for step, d in zip(steps, dilation, strict=True)),
            *(step * s for step, s in zip(steps, stride, strict=True)),
        ),
        padded.storage_offset(),
    )
    return view.reshape(batch, channels * prod(kernel), prod(seen))
