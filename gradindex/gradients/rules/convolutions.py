"""Convolutions and transposed convolutions: linear layers at every position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...factors import Factors, Formed, Gradients, part_bytes
from .base import RULES, Plain, columns, wide, with_bias

Convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Windows of a part of a batch stay in the processor's cache; up to so many products are cheaper without them.
_PART_BYTES, _FEW = 16 << 20, 3


@RULES.register("convolution")
class Convolution(Plain):
    """1 to 3 dimensions, any stride, padding, dilation and groups: a linear layer at every position of the output."""

    takes_half = True

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if not isinstance(module, CONVOLUTIONS) or type(module) not in CONVOLUTIONS:
            return None
        return module.out_channels, columns(prod(module.weight.shape[1:]), names)

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        assert isinstance(module, CONVOLUTIONS)
        if "weight" in scales and module.groups == 1:
            return Windows(module, saved, delta, scales)
        delta = wide(delta).flatten(2)
        if "weight" not in scales:
            return Formed(delta.sum(2, keepdim=True) * scales["bias"])
        patches = wide(_windows(module, saved))
        parts = [_by_group(module.groups, delta, patches) * scales["weight"]]
        parts += [delta.sum(2, keepdim=True) * scales["bias"]] if "bias" in scales else []
        return Formed(torch.cat(parts, 2))


class Windows(Factors):
    """Factors of a convolution, whose activations (what each output position sees) are laid out only when asked for.

    Args:
        module: without groups.
        inputs: (batch, channels, *sizes).
        delta: (batch, d_out, *output sizes).
        scales: of the weight and, where it is tracked, the bias.
    """

    def __init__(self, module: Convolutions, inputs: Tensor, delta: Tensor, scales: Mapping[str, float]) -> None:
        self._module, self._inputs, self._delta, self._scales = module, inputs, delta, scales

    @cached_property
    def output_gradients(self) -> Tensor:  # type: ignore[override]  # widened on first use
        """(batch, positions, d_out)."""
        return wide(self._delta).flatten(2).transpose(1, 2)

    @cached_property
    def activations(self) -> Tensor:  # type: ignore[override]  # laid out on first use
        """(batch, positions, d_in)."""
        return with_bias(wide(_windows(self._module, self._inputs)).transpose(1, 2), self._scales)

    def parts(self) -> Iterator[tuple[slice, Gradients]]:
        """See ``Gradients``."""
        per_example = prod(self._module.weight.shape[1:]) * self._delta[0, 0].numel() * self._delta.itemsize
        at_once = max(1, part_bytes(self._delta.device, _PART_BYTES) // per_example)
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
        return wide(torch.bmm(projected, seen.transpose(1, 2)))

    def _seen_through(self, matrices: Tensor) -> Tensor:
        """V x_p for each V (d_out, d_in) of (n, d_out, d_in): (batch, n, d_out, positions)."""
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


@RULES.register("convolution^T")
class TransposedConvolution(Plain):
    """The roles change: the gradient of the weight takes patches of delta and the plain input."""

    single = True

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if not isinstance(module, TRANSPOSED) or type(module) not in TRANSPOSED or names != ("weight",):
            return None
        return module.in_channels, prod(module.weight.shape[1:])

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        assert isinstance(module, TRANSPOSED)
        around = [int(size) for size in module.padding for _ in (0, 1)][::-1]  # str is for plain convolutions alone
        patches = _patches(functional.pad(delta, around), module.kernel_size, module.stride, module.dilation)
        if module.groups == 1:
            return Factors(patches.transpose(1, 2) * scales["weight"], saved.flatten(2).transpose(1, 2))
        weight = _by_group(module.groups, saved.flatten(2), patches)
        return Formed(weight * scales["weight"])


@RULES.register("channel bias")
class ChannelBias(Plain):
    """The bias of a transposed convolution."""

    single = True

    def shape(self, module: nn.Module, names: tuple[str, ...]) -> tuple[int, int] | None:
        """See :class:`Rule`."""
        if not isinstance(module, TRANSPOSED) or type(module) not in TRANSPOSED or names != ("bias",):
            return None
        return module.out_channels, 1

    def saved(self, module: nn.Module, inputs: Tensor, *others: Any, **keywords: Any) -> Any:
        """Nothing. See :class:`Rule`."""
        return None

    def gradients(self, module: nn.Module, saved: Any, delta: Tensor, scales: Mapping[str, float]) -> Gradients:
        """See :class:`Rule`."""
        return Formed(delta.flatten(2).sum(2, keepdim=True) * scales["bias"])


def _windows(module: Convolutions, inputs: Tensor) -> Tensor:
    """(batch, channels * kernel, positions): what each position of the output sees."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return functional.unfold(inputs, kernel, dilation, module.padding, stride)  # pads without a copy
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return _patches(
        functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode), kernel, stride, dilation
    )


def _by_group(groups: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Outer products summed over positions, each row with its group's columns alone: a common x does not exist."""
    rows, columns = (tensor.reshape(len(tensor), groups, -1, tensor.shape[2]) for tensor in (rows, columns))
    return (rows @ columns.transpose(2, 3)).flatten(1, 2)


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
