"""Losses of queries under a model that was trained elsewhere, such as anew without some examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import TaskError, user_code
from ..examples import Examples, read_example
from ..memory import in_halves
from ..task import PREDICTED, Task
from ..tree import map_tensors, preserved_random_state
from ..unwrapping import uncompiled, unwrapped
from .answers import PREDICTIONS, Answers
from .functional import COLLATE, LOSS, QUERY_LOSS, LossModule
from .precision import full_float32


class QueryLosses:
    """Computes the losses of all of a task's queries under models of the task's architecture, in float32.

    Where the task explains predictions, the labels are the answers of its last checkpoint, whichever model is asked.

    Args:
        task: whose queries and losses.
        batch_size: queries of a pass; 1 where losses mix the examples of a batch.

    Raises:
        TaskError: the task has no queries.
    """

    def __init__(self, task: Task, batch_size: int = 256) -> None:
        if task.query is None or task.n_query == 0:
            raise TaskError("The task has no query, so there is no loss to compare. Give Task(query=...).")
        self._task, self._batch_size = task, batch_size
        self._answers = Answers(task, self._answer) if task.query_loss == PREDICTED else None
        self._final: dict[str, Tensor] | None = None

    def of(self, model: nn.Module) -> NDArray[np.float64]:
        """(n_query,) float64; the model's own modes and the global random state are left as they are.

        Raises:
            TaskError: the model has other parameters than the task's.
            LossError: the loss is not one number per example.
            UserCodeError: the loss, the collate function or the data set failed.
        """
        model = unwrapped(model)
        check_same_parameters(self._task.model, model)
        modes = [(module, module.training) for module in model.modules()]
        try:
            for module, _ in modes:
                module.training = False
            with preserved_random_state(), torch.no_grad(), full_float32(), uncompiled(model):
                return np.concatenate([self._piece(model, start) for start in self._starts])
        finally:
            for module, training in modes:
                module.training = training

    @property
    def _starts(self) -> range:
        return range(0, self._task.n_query, self._batch_size)

    def _piece(self, model: nn.Module, start: int) -> NDArray[np.float64]:
        places = range(start, min(start + self._batch_size, self._task.n_query))
        items = [read_example(self._task.query, place, "query") for place in places]
        names = [f"Query {place}" for place in places]
        examples = Examples(np.arange(places.start, places.stop), items, names, "query")
        name = QUERY_LOSS if callable(self._task.query_loss) else LOSS
        wrapper = LossModule(model, self._task.loss_for("query"), name=name)
        state = _state(model.state_dict())

        def forward(examples: Examples) -> list[NDArray[np.float64]]:
            batch = self._batch(examples, model)
            return [wrapper.losses(state, batch, len(examples)).double().cpu().numpy()]

        return np.concatenate(in_halves(forward, examples, lambda: "the losses of retrained models"))

    def _batch(self, examples: Examples, model: nn.Module) -> Any:
        batch = self._collated(examples, model)
        return batch if self._answers is None else self._answers.relabelled(examples, batch)

    def _collated(self, examples: Examples, model: nn.Module) -> Any:
        with user_code(COLLATE):
            collated = self._task.collate(examples.items)
        device = next(model.parameters()).device
        return map_tensors(collated, lambda tensor: _single(tensor.clone()), device, self._task.data_sets)

    def _answer(self, example: Examples) -> list[Tensor]:
        """What the last checkpoint says of a query, alone."""
        model = self._task.model
        if self._final is None:
            self._final = _state(self._task.checkpoints[-1].load(model))
        loss = LossModule(model, self._task.loss.predictions, name=PREDICTIONS)  # type: ignore[attr-defined]
        modes = [(module, module.training) for module in model.modules()]
        try:
            for module, _ in modes:
                module.training = False
            return loss.within(self._final, self._collated(example, model), list)
        finally:
            for module, training in modes:
                module.training = training


def check_same_parameters(expected: nn.Module, model: nn.Module) -> None:
    """Refuse a model whose parameters have other names or shapes.

    Raises:
        TaskError: names the first that differs.
    """
    wanted, found = (dict(one.named_parameters()) for one in (expected, model))
    for name in [*wanted, *found]:
        if name not in found:
            raise TaskError(f"The model has no parameter {name}. {_SAME}")
        if name not in wanted:
            raise TaskError(f"The model has the parameter {name}, which the task's model has not. {_SAME}")
        if wanted[name].shape != found[name].shape:
            shapes = tuple(found[name].shape), tuple(wanted[name].shape)
            raise TaskError(f"The model's {name} has shape {shapes[0]}, but the task's model's {shapes[1]}. {_SAME}")


_SAME = "It must be a model like the task's, with parameters of the same names and shapes."


def _state(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"model.{name}": _single(value) for name, value in weights.items() if isinstance(value, Tensor)}


def _single(tensor: Tensor) -> Tensor:
    """In float32, where it is a real number of another size; complex numbers as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor
