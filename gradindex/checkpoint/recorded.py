"""What was recorded of a training, by the names of a task's model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..choices import Weighting
from ..errors import CheckpointError
from ..recorder import recorded_groups, recorded_training
from ..weights import Trained, recorded_as
from .sources import ALL, UNKNOWN

_RECORDED_FIELD = {
    "learning_rate": "learning_rate",
    "integrated": "learning_rate_sum",
    "effective": "effective_sum",
}


class Recorded:
    """A record in the form that ``Recorder`` saves.

    Args:
        path: of its checkpoint, for errors.
        record: whose names are those of what was trained.
        trained: says which of them are the model's; without it, names alone tell.
        prefix: as it was given to the checkpoint.

    Raises:
        CheckpointError: several prefixes fit.
    """

    def __init__(
        self, path: Path, record: Mapping[str, Any], trained: Trained | None = None, prefix: str | None = None
    ) -> None:
        self._path, self.record, self._trained, self._prefix = path, record, trained, prefix

    def rates(self, weighting: Weighting, parameters: Sequence[str]) -> dict[str, float]:
        """Eta by parameter, of those that have one, and of ``"*"`` where there is one for all others.

        Raises:
            CheckpointError: none of this weighting was recorded.
        """
        path, groups = self._path, self.record["groups"]
        if UNKNOWN in self.record:
            raise CheckpointError(
                f"{path} {self.record[UNKNOWN]}, so its weight eta is unknown. Give learning_rate= (a number, or "
                "{pattern: rate}), or train with gradindex.Recorder."
            )
        wanted = _RECORDED_FIELD[weighting]
        if not any(wanted in group for group in groups) and weighting == "effective":
            raise CheckpointError(
                f"{path} has no effective rates: they are recorded for torch.optim.SGD where the clipping is "
                "known. Choose weighting='integrated'."
            )
        if any(wanted in group and group[wanted] is None for group in groups):
            raise CheckpointError(
                f"{path} has no logged schedule, so the sum of its learning rates since the previous checkpoint "
                "is unknown. Choose weighting='learning_rate' or 'uniform', or give learning_rate=."
            )
        known = recorded_groups(dict(self.record), wanted)
        rates = {name: known[place] for name, place in self._places(known, parameters).items()}
        return {**rates, ALL: known[ALL]} if ALL in known else rates

    def training(self, parameters: Sequence[str]) -> dict[str, bool | None] | None:
        """Whether parameters took a step since the previous checkpoint; see :meth:`Checkpoint.recorded_training`."""
        if UNKNOWN in self.record:
            return None
        found = recorded_training(dict(self.record))
        if ALL in found:
            return dict.fromkeys(parameters, found[ALL])
        return {name: found[place] for name, place in self._places(found, parameters).items()}

    def second_moments(self, parameters: Sequence[str] | None) -> dict[str, Tensor]:
        """Adam's by parameter, or as they were recorded.

        Raises:
            CheckpointError: none were.
        """
        if "second_moments" not in self.record:
            raise no_moments(self._path)
        found: dict[str, Tensor] = dict(self.record["second_moments"])
        if parameters is None and self._trained is None:
            return found
        if parameters is None and self._trained is not None:
            places = self._trained.recorded(found)
            own = {name for name, _ in self._trained.model.named_parameters()}
            return {name: found[place] for name, place in places.items() if name in own}
        return {name: found[place] for name, place in self._places(found, parameters or ()).items()}

    def _places(self, names: Iterable[str], parameters: Sequence[str]) -> dict[str, str]:
        """Of each parameter the name that it was recorded by, where it was."""
        names = [name for name in names if name != ALL]
        if self._trained is None:
            return recorded_as(self._path, names, parameters, self._prefix)
        wanted = set(parameters)
        return {name: place for name, place in self._trained.recorded(names).items() if name in wanted}


def no_moments(path: Path) -> CheckpointError:
    """What to tell where no second moments were recorded."""
    return CheckpointError(
        f"{path} has no recorded second moments. Train with "
        "gradindex.Recorder(..., second_moments=True), or drop preconditioner from the task."
    )
