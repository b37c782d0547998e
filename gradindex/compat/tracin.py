"""Captum's ``TracInCP``, and what its relatives share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArgumentError, as_whole
from ..examples import Role
from ..projection.base import BlockMap
from ..retrieval.ranking import Best
from ..unwrapping import unwrapped
from .bar import shown
from .batches import AssertedError, in_order, is_loader, loader_of
from .losses import LossFn, PerExample, reduction_of
from .session import NO_BATCH, ByParameter, Session
from .snapshots import LoadFn, listed, load_checkpoint, snapshots_of


class KMostInfluentialResults(NamedTuple):
    """The strongest training examples of each query, strongest first.

    Args:
        indices: (n_query, k) int64, positions in the training data.
        influence_scores: (n_query, k), signed; positive = training on it lowered the loss of the query.
    """

    indices: Tensor
    influence_scores: Tensor


class TracInCPBase:
    """What the three classes share. Their arguments are described in :class:`TracInCP`."""

    # Whether a loss is expected to reduce a batch to one number.
    _reduces = True

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        checkpoints: Any,
        checkpoints_load_func: LoadFn = load_checkpoint,
        loss_fn: LossFn | None = None,
        batch_size: int | None = 1,
        test_loss_fn: LossFn | None = None,
    ) -> None:
        self.model, self._inner = model, unwrapped(model)
        self.checkpoints = checkpoints
        self.checkpoints_load_func = checkpoints_load_func
        self.loss_fn, self.batch_size = loss_fn, batch_size
        self.test_loss_fn = loss_fn if test_loss_fn is None else test_loss_fn
        self.train_dataloader = loader_of(train_dataset, batch_size)
        self.reduction_type = reduction_of(loss_fn, "loss_fn", self._reduces)
        self.test_reduction_type = self.reduction_type
        if test_loss_fn is not None:
            self.test_reduction_type = reduction_of(test_loss_fn, "test_loss_fn", self._reduces)

    @property
    def checkpoints(self) -> list[Any]:
        """What is given to ``checkpoints_load_func``, in order; setting it takes a folder, paths or objects."""
        return self._checkpoints

    @checkpoints.setter
    def checkpoints(self, checkpoints: Any) -> None:
        self._checkpoints = listed(checkpoints)
        self._opened: Session | None = None

    @classmethod
    def get_name(cls) -> str:
        """The name of the class."""
        return cls.__name__

    def _layers(self) -> list[str] | None:
        return None

    def _session(self) -> Session:
        """The engine; the checkpoints are loaded when it is needed first, each once."""
        if self._opened is None:
            snapshots = snapshots_of(self.model, self._inner, self.checkpoints, self.checkpoints_load_func)
            query_loss = None
            if self.test_loss_fn is not self.loss_fn:
                query_loss = PerExample(self.test_loss_fn, self.test_reduction_type)
            self._opened = Session(
                self._inner,
                snapshots,
                self._layers(),
                PerExample(self.loss_fn, self.reduction_type),
                query_loss,
                self.train_dataloader,
            )
        return self._opened

    def _scores(self, inputs: Any, together: bool, label: str, show_progress: bool) -> Iterator[tuple[int, Tensor]]:
        """For each training batch its first id, and scores (n_query, n)."""
        session, first = self._session(), 0
        with session.products(batches_of(inputs), together) as products:
            for batch in shown(self.train_dataloader, label, show_progress):
                scores = session.scores(products, together, batch, first)
                yield first, scores
                first += scores.shape[1]

    def _answer(
        self, inputs: Any, k: int | None, proponents: bool, show_progress: bool, together: bool
    ) -> Tensor | KMostInfluentialResults:
        if inputs is None:
            raise AssertedError("inputs is required. For the self-influence of the training data, use self_influence.")
        name = self.get_name()
        if k is None:
            label = f"Using {name} to compute influence for training batches"
            return torch.cat([scores for _, scores in self._scores(inputs, together, label, show_progress)], 1)
        k, kind = checked_k(k), "proponents" if proponents else "opponents"
        label = f"Using {name} to perform computation for getting {kind}. Processing training batches"
        best: Best | None = None
        for first, scores in self._scores(inputs, together, label, show_progress):
            best = Best("proponents" if proponents else "opponents", len(scores), k) if best is None else best
            best.add(np.arange(first, first + scores.shape[1]), scores.cpu().numpy())
        assert best is not None  # a session has met a batch
        ids, scores_of = (np.stack(part) for part in zip(*best.found(), strict=True))
        device = self._session().engine.device
        return KMostInfluentialResults(torch.from_numpy(ids).to(device), torch.from_numpy(scores_of).to(device))

    def self_influence(
        self, inputs: Any = None, show_progress: bool = False, outer_loop_by_checkpoints: bool = False
    ) -> Tensor:
        """The score of each example with itself, sum_c eta_c ||grad l(w_c; z)||^2.

        Args:
            inputs: a batch ``(*inputs, labels)`` or a loader of batches; by default the training data.
            show_progress: whether to say on standard error how far it is.
            outer_loop_by_checkpoints: whether all data go through one checkpoint after another and are read once for
                each; by default each batch goes through all of them. The scores are the same, to rounding.

        Returns:
            (n,), in the order of the examples.

        Raises:
            NonFiniteGradientError: names the examples.
        """
        session = self._session()
        batches = self.train_dataloader if inputs is None else batches_of(inputs)
        label = f"Using {self.get_name()} to compute self influence. Processing"
        every = range(session.engine.n_checkpoints)

        def over(checkpoints: Iterable[int]) -> Tensor:
            parts, first = [], 0
            for batch in shown(batches, f"{label} batch", show_progress):
                parts.append(session.squares(checkpoints, batch, first, "" if inputs is None else "Example"))
                first += len(parts[-1])
            if not parts:
                raise ArgumentError(NO_BATCH)
            return torch.cat(parts)

        with session.engine:
            if not outer_loop_by_checkpoints:
                return over(every)
            one_by_one = shown(every, f"{label} checkpoint", show_progress)
            return torch.stack([over([checkpoint]) for checkpoint in one_by_one]).sum(0)

    def _rows(self, inputs: Any, maps: list[BlockMap], dim: int, role: Role = "train") -> list[Tensor]:
        """The rows, piece by piece."""
        session = self._session()
        name = "" if inputs is self.train_dataloader else "Query" if role == "query" else "Example"
        with session.engine:
            rows = list(session.rows(maps, dim, batches_of(inputs), role, name))
        if not rows:
            raise ArgumentError(NO_BATCH)
        return rows


class TracInCP(TracInCPBase):
    """Exact TracInCP over all parameters, or those of some layers.

    Args:
        model: called as ``model(*batch[:-1])``; it is computed in eval mode, and is as before afterwards.
        train_dataset: a data set of tuples ``(*inputs, label)``, or a loader of their batches that does not shuffle.
        checkpoints: a folder, a list of paths, or any objects that ``checkpoints_load_func`` takes.
        checkpoints_load_func: ``f(model, checkpoint) -> learning rate``, which loads a checkpoint into the model.
            Called once for each checkpoint; all stay in memory.
        layers: names of modules, by default all parameters with ``requires_grad``.
        loss_fn: ``loss_fn(output, labels)``; ``None`` takes the sum of the model's outputs.
        batch_size: of the training batches, if ``train_dataset`` is a data set.
        test_loss_fn: the same for queries; by default ``loss_fn``.
        sample_wise_grads_per_batch: whether ``loss_fn`` reduces a batch to one number (``reduction`` is ``"sum"`` or
            ``"mean"``); by default it returns one for each example (``"none"``). Gradients are computed for a whole
            batch at a time in both cases.

    Raises:
        ArgumentError: an argument cannot be used; also an ``AssertionError`` where Captum asserts.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        checkpoints: Any,
        checkpoints_load_func: LoadFn = load_checkpoint,
        layers: list[str] | None = None,
        loss_fn: LossFn | None = None,
        batch_size: int | None = 1,
        test_loss_fn: LossFn | None = None,
        sample_wise_grads_per_batch: bool = False,
    ) -> None:
        self._reduces = self.sample_wise_grads_per_batch = sample_wise_grads_per_batch
        super().__init__(model, train_dataset, checkpoints, checkpoints_load_func, loss_fn, batch_size, test_loss_fn)
        if layers is not None and not (
            isinstance(layers, list) and layers and all(isinstance(name, str) for name in layers)
        ):
            raise AssertedError(f"layers is {layers!r}, but must be a list of names of modules, such as ['fc'].")
        self.layers = layers

    def _layers(self) -> list[str] | None:
        if self.layers is None:
            return None
        modules = dict(self.model.named_modules())
        inside = {module: name for name, module in self._inner.named_modules()}
        return [inside.get(modules[name], name) if name in modules else name for name in self.layers]

    def influence(
        self,
        inputs: Any,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor | KMostInfluentialResults:
        """Scores of all training examples, or the strongest.

        Args:
            inputs: a batch ``(*inputs, labels)`` of queries, or a loader of batches.
            k: how many of the strongest; by default all scores are returned.
            proponents: whether the strongest are those with the highest scores, else those with the lowest.
            show_progress: whether to say on standard error how far it is.
            aggregate: whether all queries are one, whose gradient is the sum of theirs.

        Returns:
            (n_query, n_train) scores, n_query being 1 for ``aggregate``; with ``k`` the strongest, equal scores by
            index.

        Raises:
            ArgumentError: ``inputs`` is missing, or ``k`` is below 1.
            NonFiniteGradientError: names the training examples.
        """
        return self._answer(inputs, k, proponents, show_progress, aggregate)

    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False) -> Tensor:
        """Whole gradients times sqrt(eta): the inner product of two rows is the score.

        Args:
            inputs: a batch, or a loader of batches.
            aggregate: whether to add the rows up.

        Returns:
            (n, C P) for C checkpoints and P numbers in the layers' parameters, each parameter flattened, in the
            model's order; (1, C P) for ``aggregate``.
        """
        engine = self._session().engine
        whole = ByParameter(engine)
        rows = self._rows(inputs, [whole] * engine.n_checkpoints, whole.size)
        return torch.stack([part.sum(0) for part in rows]).sum(0, keepdim=True) if aggregate else torch.cat(rows)


def batches_of(inputs: Any) -> Any:
    """What the user asks about as batches.

    Raises:
        ArgumentError: a loader shuffles.
    """
    return in_order(inputs) if is_loader(inputs) else [inputs]


def checked_k(k: int) -> int:
    """How many are wanted.

    Raises:
        ArgumentError: it is no integer, or below 1.
    """
    if as_whole("k", k) < 1:
        raise ArgumentError(f"k is {k}, but must be at least 1.")
    return k
