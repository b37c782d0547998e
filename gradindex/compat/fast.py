"""Captum's ``TracInCPFast`` and ``TracInCPFastRandProj``: the last linear layer alone."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, as_whole
from ..gradients import Engine
from ..memory import available_bytes
from ..projection.base import BlockMap
from ..projection.hashing import key
from ..projection.kronecker import random_sides
from ..projection.sides import TwoSided
from .bar import shown
from .batches import AssertedError
from .losses import LossFn
from .neighbors import ExactNeighbors, NearestNeighbors
from .session import ByParameter, Piece, refuse_non_finite
from .snapshots import LoadFn, load_checkpoint
from .tracin import KMostInfluentialResults, TracInCPBase, batches_of, checked_k


class TracInCPFast(TracInCPBase):
    """TracInCP of the last linear layer alone, whose gradient is one outer product.

    Like Captum's, it takes the layer's weight without its bias, unless asked for. Unlike Captum's, it takes the
    gradient of the layer's own output, whatever follows in the model.

    Args:
        final_fc_layer: the layer, or its name.
        vectorize: taken for the sake of the signature; has no effect, as in Captum 0.9.
        bias: whether the layer's bias counts as well.
        keep: whether the gradients of the training data (the layer's input and the gradient of its output, at each
            checkpoint) stay in memory from the first question on, if a quarter of the free memory holds them. Later
            questions then take products alone.
        model, train_dataset, checkpoints, checkpoints_load_func, batch_size: see :class:`TracInCP`.
        loss_fn, test_loss_fn: reduce a batch to one number, by ``reduction`` ``"sum"`` or ``"mean"``.

    Raises:
        ArgumentError: an argument cannot be used; also an ``AssertionError`` where Captum asserts.
    """

    def __init__(
        self,
        model: nn.Module,
        final_fc_layer: nn.Module | str,
        train_dataset: Any,
        checkpoints: Any,
        checkpoints_load_func: LoadFn = load_checkpoint,
        loss_fn: LossFn | None = None,
        batch_size: int | None = 1,
        test_loss_fn: LossFn | None = None,
        vectorize: bool = False,
        *,
        bias: bool = False,
        keep: bool = True,
    ) -> None:
        super().__init__(model, train_dataset, checkpoints, checkpoints_load_func, loss_fn, batch_size, test_loss_fn)
        if loss_fn is None:
            raise AssertedError("loss_fn is None, but a loss is needed. Give nn.CrossEntropyLoss(reduction='sum').")
        self.vectorize, self.bias, self.keep = vectorize, bias, keep
        self.final_fc_layer = final_fc_layer

    @property
    def final_fc_layer(self) -> nn.Module:
        """The layer; setting it takes a name as well."""
        return self._final_fc_layer

    @final_fc_layer.setter
    def final_fc_layer(self, layer: nn.Module | str) -> None:
        names = {module: name for name, module in self._inner.named_modules()}
        found = dict(self.model.named_modules()).get(layer) if isinstance(layer, str) else layer
        if found not in names:
            shown_as = layer if isinstance(layer, str) else type(layer).__name__
            raise ArgumentError(
                f'Invalid final_fc_layer str: "{shown_as}" provided! The model has no such module. Give one of '
                f"{', '.join(name for name in list(names.values())[-5:] if name)}."
            )
        if getattr(found, "weight", None) is None:
            raise ArgumentError(
                f"final_fc_layer is a {type(found).__name__}, which has no weight. Give a linear layer."
            )
        assert found is not None
        self._final_fc_layer, self._final_name, self._opened = found, names[found], None

    def _layers(self) -> list[str]:
        has_bias = self.bias and getattr(self._final_fc_layer, "bias", None) is not None
        own = ["weight", "bias"] if has_bias else ["weight"]
        return [f"{self._final_name}.{name}" if self._final_name else name for name in own]

    def influence(
        self, inputs: Any, k: int | None = None, proponents: bool = True, show_progress: bool = False
    ) -> Tensor | KMostInfluentialResults:
        """As :meth:`TracInCP.influence`."""
        return self._answer(inputs, k, proponents, show_progress, together=False)

    def _scores(self, inputs: Any, together: bool, label: str, show_progress: bool) -> Iterator[tuple[int, Tensor]]:
        session, first = self._session(), 0
        with session.engine:
            queries = session.query_pieces(batches_of(inputs))
            for pieces in self._training(label, show_progress):
                for piece in pieces:
                    yield first, session.scores_of(queries, piece)
                    first += len(piece.names)

    def self_influence(
        self, inputs: Any = None, show_progress: bool = False, outer_loop_by_checkpoints: bool = False
    ) -> Tensor:
        """As :meth:`TracInCP.self_influence`; from the gradients of the training data where these stay in memory."""
        session = self._session()
        if inputs is not None or outer_loop_by_checkpoints:
            return super().self_influence(inputs, show_progress, outer_loop_by_checkpoints)
        label = f"Using {self.get_name()} to compute self influence. Processing batch"
        squares = []
        with session.engine:
            for pieces in self._training(label, show_progress):
                for piece in pieces:
                    squares.append(session.squares_of(piece))
                    refuse_non_finite(squares[-1].isfinite(), piece.names, "self-influence")
        return torch.cat(squares).to(session.engine.dtype)

    def _training(self, label: str, show_progress: bool) -> Iterator[list[Piece]]:
        """The gradients of each training batch; computed if they are not in memory."""
        session = self._session()
        if session.kept is not None:
            yield from shown(session.kept, label, show_progress)
            return
        kept: list[list[Piece]] = []
        room = available_bytes(session.engine.device) if self.keep else -1
        for pieces in session.pieces(shown(self.train_dataloader, label, show_progress)):
            yield pieces
            room -= sum(piece.n_bytes for piece in pieces)
            if room >= 0:
                kept.append(pieces)
            else:
                kept.clear()
        if room >= 0:
            session.kept = kept


class TracInCPFastRandProj(TracInCPFast):
    """Rows of the training data in memory, made when the object is: questions then take a search alone.

    Each checkpoint's gradient G (d_out, d_in) of the layer becomes B^T G A with random sides of its own, unless it is
    small enough. Scores of projected rows are estimates.

    Args:
        nearest_neighbors: has ``setup(data)`` and ``get_nearest_neighbors(query, k)``, as Captum's have; by default
            :class:`ExactNeighbors`.
        projection_dim: numbers of each checkpoint in a row, at most; by default there is no projection.
        seed: of the random sides. The global random state is left alone.
        model, final_fc_layer, train_dataset, checkpoints, checkpoints_load_func, loss_fn, batch_size, test_loss_fn:
            see :class:`TracInCPFast`.
        vectorize, bias: the same.

    Raises:
        ArgumentError: an argument cannot be used; also an ``AssertionError`` where Captum asserts.
        NonFiniteGradientError: names the training examples.
    """

    def __init__(
        self,
        model: nn.Module,
        final_fc_layer: nn.Module | str,
        train_dataset: Any,
        checkpoints: Any,
        checkpoints_load_func: LoadFn = load_checkpoint,
        loss_fn: LossFn | None = None,
        batch_size: int | None = 1,
        test_loss_fn: LossFn | None = None,
        vectorize: bool = False,
        nearest_neighbors: NearestNeighbors | None = None,
        projection_dim: int | None = None,
        seed: int = 0,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__(
            model,
            final_fc_layer,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            loss_fn,
            batch_size,
            test_loss_fn,
            vectorize,
            bias=bias,
            keep=False,
        )
        if projection_dim is not None and as_whole("projection_dim", projection_dim) < 1:
            raise ArgumentError(f"projection_dim is {projection_dim}, but must be at least 1.")
        self.projection_dim, self.seed = projection_dim, seed
        self.nearest_neighbors = ExactNeighbors() if nearest_neighbors is None else nearest_neighbors
        session = self._session()
        self._maps, self._dim = _maps(session.engine, projection_dim, seed)
        session.fixed = True
        self.src_intermediate_quantities = torch.cat(self._rows(self.train_dataloader, self._maps, self._dim))
        self.nearest_neighbors.setup(self.src_intermediate_quantities)

    def influence(  # type: ignore[override]  # Captum's has no show_progress either
        self, inputs: Any = None, k: int | None = 5, proponents: bool = True
    ) -> Tensor | KMostInfluentialResults:
        """Scores of rows, or the training examples that ``nearest_neighbors`` finds.

        Opponents are searched with the negated row.

        Args:
            inputs: a batch ``(*inputs, labels)`` of queries, or a loader of batches.
            k: how many; ``None`` returns all scores.
            proponents: whether the highest scores are looked for, else the lowest.

        Returns:
            As :meth:`TracInCP.influence`.
        """
        if inputs is None:
            raise AssertedError("inputs is required. For self-influence, which needs no rows, use TracInCPFast.")
        rows = torch.cat(self._rows(inputs, self._maps, self._dim, "query"))
        if k is None:
            return rows @ self.src_intermediate_quantities.T
        sign = 1 if proponents else -1
        ids, scores = self.nearest_neighbors.get_nearest_neighbors(sign * rows, checked_k(k))
        return KMostInfluentialResults(ids, sign * scores)

    def self_influence(
        self, inputs: Any = None, show_progress: bool = False, outer_loop_by_checkpoints: bool = False
    ) -> Tensor:
        """Refused, as by Captum: :class:`TracInCPFast` has it exactly, and keeps nothing in memory.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("TracInCPFastRandProj has no self_influence. Use TracInCPFast, which has it exactly.")

    def compute_intermediate_quantities(self, inputs: Any) -> Tensor:
        """(n, C dim) rows of a batch, or of a loader of batches, with the training loss."""
        return torch.cat(self._rows(inputs, self._maps, self._dim))


def _maps(engine: Engine, dim: int | None, seed: int) -> tuple[list[BlockMap], int]:
    """A map for each checkpoint, and numbers in a block: as Captum, the root of ``dim`` on each side at most."""
    layers = engine.layers  # one, unless its weight and bias had to go separate routes
    if dim is None or sum(layer.size for layer in layers) <= dim:
        whole = ByParameter(engine)
        return [whole] * engine.n_checkpoints, whole.size
    root = max(1, isqrt(dim // len(layers)))
    sizes = [(min(root, layer.d_out), min(root, layer.d_in)) for layer in layers]
    like = torch.zeros((), dtype=engine.dtype, device=engine.device)
    maps: list[BlockMap] = []
    for checkpoint in range(engine.n_checkpoints):
        streams = [key(seed, checkpoint, layer.name) for layer in layers]
        maps.append(TwoSided([random_sides(*each) for each in zip(layers, streams, sizes, strict=True)], like))
    return maps, sum(a * b for a, b in sizes)
