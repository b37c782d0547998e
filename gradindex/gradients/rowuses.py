"""Parameters by the functions that use them, where rows are not examples: routers, and experts stacked in a tensor.

What is met here is a product of rows with a matrix, with one of a stack of matrices, or with a matrix for each row,
and a vector that is added to rows or multiplies them. Which row belongs to whom is not asked here, see ``owners``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..factors import Factors, Formed, Gradients, Layer, Lookups
from ..stacks import Rows, Stacks
from .owners import Lay, basic_route, last_axis
from .uses import ELEMENTWISE, TRANSPOSED, VIEWING, Uses, as_matrix

# Turns the gradients of an output's rows (rows, features) and their owners into the parameter's per-example gradients.
MakeOfRows = Callable[[Tensor, Rows], Gradients]
WatchRows = Callable[[int, MakeOfRows, Tensor, Lay], Tensor]

_VIEWING = VIEWING | {"t", "swapaxes", "select", "contiguous", "double", "bfloat16", "half", "type_as", "__get__"}
_GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}


@dataclass(frozen=True)
class _Part:
    """A parameter, or a part of one.

    Args:
        number: of its layer.
        parameter: whole.
        flipped: whether the last two axes are exchanged.
        blocks: which of the first axis: all, one, or one for each row (rows,).
    """

    number: int
    parameter: Tensor
    flipped: bool = False
    blocks: int | Tensor | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it has two axes: whole, or one of a stack."""
        return isinstance(self.blocks, int) == (self.parameter.ndim == 3) and self.parameter.ndim in (2, 3)

    @property
    def is_vector(self) -> bool:
        """Whether it has one axis at most: whole, or a row of a matrix."""
        return self.parameter.ndim - isinstance(self.blocks, int) <= 1

    @property
    def is_stack(self) -> bool:
        """Whether it has a matrix for each of the first axis."""
        return self.parameter.ndim == 3 and not isinstance(self.blocks, int)

    def of(self, view: Tensor, source: Tensor) -> _Part | None:
        """This part, which is ``source``, as a view of it shows it: told by where the view lies in memory."""
        if view.shape == source.shape and view.dtype != source.dtype:  # a copy
            return self
        if view.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
            return None
        offset, blocks = int(view.storage_offset()) - int(source.storage_offset()), self.blocks
        if view.ndim == source.ndim - 1 and blocks is None and not (self.flipped and source.ndim == 2):
            blocks = offset // max(1, source.stride(0))
            offset, source = offset - blocks * source.stride(0), source[blocks]
        if offset or view.ndim != source.ndim:
            return None
        for turned in (False, True)[: 1 + (view.ndim > 1)]:
            same = source.transpose(-2, -1) if turned else source
            if (view.shape, view.stride()) == (same.shape, same.stride()):
                return replace(self, flipped=self.flipped != turned, blocks=blocks)
        return None


class RowUses(Uses):
    """Meets the calls that take a tracked parameter with rows, and has their outputs watched.

    Args:
        layers: of this route, by number, with the tensor that is in the model now.
        n: examples in the batch.
        watch: ``watch(number, make, output, lay)`` returns the output to go on with.
    """

    def __init__(self, layers: Mapping[int, tuple[Layer, Tensor]], n: int, watch: WatchRows) -> None:
        super().__init__(layers, n, lambda number, make, output: output)
        self._parts = {id(p): _Part(number, p) for number, (_, p) in layers.items()}
        self._watch_rows = watch

    def _meet(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        places = [place for place, value in enumerate(args) if id(value) in self._parts]
        if name == "linear" and not kwargs:
            return self._linear(func, args)
        if len(places) != 1:
            return func(*args, **kwargs)
        place, part = places[0], self._parts[id(args[places[0]])]
        if name in ELEMENTWISE and part.is_vector:
            return self._elementwise_of_rows(func, args, kwargs, place, part)
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor):
            return output
        if name in ("matmul", "mm", "bmm"):
            return self._multiplied(output, args, place, part)
        if name in _GROUPED and place == 1 and part.is_stack and args[0].ndim == 2:
            return self._grouped(output, args[0], part, kwargs.get("offs", args[2] if len(args) > 2 else None))
        if place == 0 and name in ("__getitem__", "index_select"):
            index = args[-1][0] if isinstance(args[-1], tuple) and len(args[-1]) == 1 else args[-1]
            if isinstance(index, Tensor) and index.ndim and index.dtype in (torch.int64, torch.int32):
                along_first = name == "__getitem__" or args[1] == 0
                return self._looked_up(output, index.long(), part) if along_first else output
        if (
            name == "embedding"
            and place == 1
            and kwargs.get("max_norm") is None
            and not kwargs.get("scale_grad_by_freq")
        ):
            return self._looked_up(output, args[0].long(), part, kwargs.get("padding_idx"))
        if name in _VIEWING and place == 0:
            shown = part.of(output, args[0])
            if shown is not None:
                self._show(output, shown)
        return output

    def _show(self, view: Tensor, part: _Part) -> None:
        self._met += 1
        self._views.append(view)
        self._parts[id(view)] = self._tracked[id(view)] = part  # type: ignore[assignment]  # asked for its number alone

    def _watched_rows(self, part: _Part, make: MakeOfRows, output: Tensor, lay: Lay = last_axis) -> Tensor:
        self._met += 1
        return self._watch_rows(part.number, make, output, lay) if torch.is_grad_enabled() else output

    def _linear(self, func: Any, args: Any) -> Any:
        inputs, weight, *rest = args
        output = func(*args)
        part = self._parts.get(id(weight))
        if part is not None and part.is_matrix:
            output = self._product_of_rows(output, last_axis(inputs), part, part.flipped)
        bias = self._parts.get(id(rest[0])) if rest else None
        if bias is not None and bias.is_vector:
            output = self._watched_rows(bias, lambda delta, rows: self._of_vector(bias, delta, rows), output)
        return output

    def _multiplied(self, output: Tensor, args: Any, place: int, part: _Part) -> Tensor:
        """Rows times a matrix on their right, or a stack of matrices times the rows on either side."""
        other = args[1 - place]
        if part.is_matrix and place == 1:
            return self._product_of_rows(output, last_axis(other), part, not part.flipped)
        if not part.is_stack or output.ndim != 3 or other.ndim != 3:
            return output
        other = other.expand(len(output), *other.shape[1:])
        blocks = part.blocks if isinstance(part.blocks, Tensor) else torch.arange(len(output), device=output.device)
        if place == 1:
            part = replace(part, blocks=blocks.repeat_interleave(output.shape[1]))
            return self._product_of_rows(output, last_axis(other), part, not part.flipped)
        part = replace(part, blocks=blocks.repeat_interleave(output.shape[2]))
        inputs = last_axis(other.transpose(1, 2))
        return self._product_of_rows(output, inputs, part, part.flipped, lambda delta: last_axis(delta.transpose(1, 2)))

    def _grouped(self, output: Tensor, inputs: Tensor, part: _Part, ends: Any) -> Tensor:
        """Rows in the order of the matrices that they are multiplied with; what is behind the last ``ends`` is not."""
        if not isinstance(ends, Tensor) or part.blocks is not None:
            return output
        blocks = torch.searchsorted(ends, torch.arange(len(inputs), device=ends.device, dtype=ends.dtype), right=True)
        behind = (blocks == len(ends))[:, None]
        part = replace(part, blocks=blocks.clamp_max(len(ends) - 1))
        return self._product_of_rows(output, inputs, part, not part.flipped, lambda delta: delta.masked_fill(behind, 0))

    def _product_of_rows(
        self, output: Tensor, inputs: Tensor, part: _Part, straight: bool, lay: Lay = last_axis
    ) -> Tensor:
        """Of x P, or x P^T if not ``straight``: sums of outer products, each in the block of its row."""
        saved = inputs.detach()

        def make(delta: Tensor, rows: Rows) -> Gradients:
            left, right = (saved.to(delta), delta) if straight else (delta, saved.to(delta))
            if part.parameter.ndim == 2:
                sides = rows.padded(right), rows.padded(left)
                return Factors(*sides[::-1]) if self._transposed(part) else Factors(*sides)
            blocks = part.blocks
            if not isinstance(blocks, Tensor):
                blocks = torch.full_like(rows.owners, blocks or 0)
            return Stacks(right, left, rows.owners, blocks, rows.n, len(part.parameter))

        return self._watched_rows(part, make, output, lay)

    def _looked_up(self, output: Tensor, indices: Tensor, part: _Part, padding: int | None = None) -> Tensor:
        """Rows of a matrix; a matrix of a stack for each row, which a product then takes."""
        if part.blocks is not None:
            return output
        indices = indices % len(part.parameter)
        if part.is_stack:
            if indices.ndim == 1:
                self._show(output, replace(part, blocks=indices))
            return output
        if part.parameter.ndim != 2 or part.flipped:
            return output

        def make(delta: Tensor, rows: Rows) -> Gradients:
            places = indices.flatten()
            if padding is not None:
                delta = delta * (places != padding % len(part.parameter))[:, None]
            if self._transposed(part):
                return Lookups(rows.padded(places), rows.padded(delta), len(part.parameter))
            return Factors(rows.padded(delta), rows.padded(one_hot(places, len(part.parameter)).to(delta)))

        return self._watched_rows(part, make, output)

    def _elementwise_of_rows(self, func: Any, args: Any, kwargs: Any, place: int, part: _Part) -> Any:
        shapes = [value.shape for value in args if isinstance(value, Tensor)]
        shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        used = args[place]
        if len(shapes) < 2 or len(shape) < 2 or used.numel() not in (1, shape[-1]):
            return func(*args, **kwargs)

        def make(delta: Tensor, rows: Rows) -> Gradients:
            return self._of_vector(part, delta if used.numel() == delta.shape[1] else delta.sum(1, keepdim=True), rows)

        expanded = self._watched_rows(part, make, used.expand(shape))
        return func(*args[:place], expanded, *args[place + 1 :], **kwargs)

    def _of_vector(self, part: _Part, delta: Tensor, rows: Rows) -> Gradients:
        """The gradient of a vector that met each row: the sum over an example's rows."""
        summed, whole = rows.summed(delta), part.parameter
        if isinstance(part.blocks, int):
            place = one_hot(torch.tensor(part.blocks), len(whole)).to(delta).expand(rows.n, 1, len(whole))
            return Factors(summed[:, None], place)
        return Formed(as_matrix(self._layers[part.number], summed.reshape(rows.n, *whole.shape)))

    def _transposed(self, part: _Part) -> bool:
        return basic_route(self._layers[part.number]) == TRANSPOSED
