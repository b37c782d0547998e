"""The final model's own answers to queries as their labels, the same at every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import LossError, user_code
from ..examples import Examples
from ..task import Task

# What the user's code is called when it fails.
PREDICTIONS = "The predictions of the loss"
# Answers that are kept.
_MOST = 1 << 16


class Answers:
    """Puts answers in place of labels, for ``Task(query_loss="predicted")``. Each query is answered once, alone.

    Args:
        task: its loss has ``predictions`` and ``relabelled``, see there.
        answer: what ``predictions`` gives for a single example at the last checkpoint.
    """

    def __init__(self, task: Task, answer: Callable[[Examples], Sequence[Tensor]]) -> None:
        self._task, self._answer = task, answer
        self._known: dict[str, Tensor] = {}

    def relabelled(self, examples: Examples, batch: Any) -> Any:
        """The batch of some queries with the answers as labels.

        Raises:
            LossError: the loss has not one answer for each example.
            UserCodeError: the loss failed.
        """
        answers = [self._of(example) for example in examples]
        with user_code(PREDICTIONS):
            return self._task.loss.relabelled(batch, answers)  # type: ignore[attr-defined]  # checked by the task

    def _of(self, example: Examples) -> Tensor:
        digest = self._task.example_digest(example.items[0])
        if digest not in self._known:
            found = self._answer(example)
            if len(found) != 1:
                raise LossError(f"The loss has {len(found)} predictions for one example, but must have one for each.")
            while len(self._known) >= _MOST:
                del self._known[next(iter(self._known))]
            self._known[digest] = found[0]
        return self._known[digest]
