"""What saved a checkpoint: its step, what was recorded of the training, and where in a file the weights are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...registry import Registry
from ...weights import Content, Trained, numbers_of, outline, read
from .layouts import METADATA, Given, Place, is_folder, place_of

# Of a parameter's state in an optimizer, what second moments are made of.
STEPS_AND_MOMENTS = ("step", "exp_avg_sq")


class Source(ABC):
    """One reading of a checkpoint, and what its trainer wrote beside the weights.

    Args:
        place: where it is.
        content: what its layout read, with or without the numbers of the weights.
    """

    label: ClassVar[str] = ""

    def __init__(self, place: Place, content: Content) -> None:
        self.place, self.content = place, content

    @classmethod
    @abstractmethod
    def recognises(cls, place: Place, content: Content) -> bool:
        """Whether this trainer wrote it."""

    @property
    def path(self) -> Path:
        """As it was given."""
        return self.place.path

    @property
    def kind(self) -> str:
        """What to call the checkpoint."""
        return ", ".join(filter(None, (self.label, self.place.layout.label))) or "weights"

    def numbers(self) -> dict[str, int]:
        """What can be its step, by what it is; see :func:`gradindex.weights.numbers_of`."""
        return numbers_of(self.path, self.content)

    def key(self) -> str | None:
        """Where in the content the weights are, if not in one of the usual places."""
        return None

    def record(self, trained: Trained | None, since: int | None, moments: bool = False) -> Mapping[str, Any] | None:
        """What is known of the steps before it, in the form that ``Recorder`` saves.

        ``learning_rate`` of a group is what the last step before the checkpoint used, ``learning_rate_sum`` the sum
        since step ``since``, or ``None`` where no schedule is known. A group that stands for all parameters that no
        other one names has the parameter ``"*"``. Names are those of the training, as of the weights in the file.

        Args:
            trained: whose parameters the optimizer held; without it, a record that needs their names tells less.
            since: the step of the previous checkpoint; ``None`` if it is to be found out.
            moments: whether second moments are read as well.

        Raises:
            CheckpointError: something beside the weights is damaged, or of another model.
        """
        return None

    @classmethod
    def check_together(cls, sources: Sequence[Source]) -> None:
        """Refuse checkpoints that are not of one training; most sources cannot tell.

        Raises:
            CheckpointError: they are not.
        """
        return


SOURCES: Registry[type[Source]] = Registry(
    "source", order=("recorder", "trainer", "accelerate", "lightning", "timm", "distributed", "file")
)


def opened(path: Path, data: bool, own: bool = False) -> Source:
    """Read what is at ``path`` once.

    Args:
        path: a file or a folder.
        data: whether the numbers of the weights are read.
        own: whether the weights are for a loader of the user's own; only what stands beside them is looked at.

    Raises:
        CheckpointError: nothing is there, it is damaged, or holds Python objects.
    """
    place = Place(path, path if is_folder(path) else None, Given(path, [])) if own else place_of(path)
    content = place.layout.read() if data else place.layout.outline()
    return next(kind(place, content) for kind in SOURCES.values() if kind.recognises(place, content))


def optimizer_at(path: Path, whole: bool) -> Any:
    """The state of an optimizer that is alone in a file, or in a folder of a distributed checkpoint.

    Args:
        path: of the file or the folder.
        whole: whether the numbers of second moments and steps are read.

    Raises:
        CheckpointError: it cannot be read, or a folder holds several.
    """
    if not is_folder(path):
        return (read if whole else outline)(path).value
    from .parts import optimizers_in  # takes time to import

    found = optimizers_in(path, STEPS_AND_MOMENTS if whole else ())
    return found[0] if len(found) == 1 else None


def file_of(path: Path) -> Path:
    """What changes when a file, or a folder of a distributed checkpoint, does."""
    return path / METADATA if is_folder(path) else path
