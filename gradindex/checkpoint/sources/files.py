"""Files that nobody but their names and contents tell of: those of ``Recorder``, and plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...recorder import MOMENTS_KEY, RECORD_KEY
from ...weights import Content, Trained
from .base import SOURCES, Source
from .layouts import METADATA, Place


@SOURCES.register("recorder")
class Recorded(Source):
    """A file of ``gradindex.Recorder``, or a folder that its processes wrote together."""

    label = "gradindex.Recorder"

    @classmethod
    def recognises(cls, place: Place, content: Content) -> bool:
        """See :class:`Source`."""
        return recorded(content) is not None

    def record(self, trained: Trained | None, since: int | None, moments: bool = False) -> Mapping[str, Any] | None:
        """See :class:`Source`."""
        found = recorded(self.content)
        folder = self.place.layout.files[0]
        if found is None or not moments or not (folder / METADATA).is_file():
            return found
        from .parts import tensors_under  # as in the layout, which could import it

        second_moments = tensors_under(folder, MOMENTS_KEY)
        return {**found, MOMENTS_KEY: second_moments} if second_moments else found


@SOURCES.register("file")
class Plain(Source):
    """Weights, and nothing that is known of their training."""

    @classmethod
    def recognises(cls, place: Place, content: Content) -> bool:
        """See :class:`Source`: whatever no other source knows."""
        return True

    @property
    def kind(self) -> str:
        """See :class:`Source`."""
        weights = self.content.value
        averaged = isinstance(weights, Mapping) and "n_averaged" in weights
        return "AveragedModel" if averaged else super().kind


def recorded(content: Content) -> Mapping[str, Any] | None:
    """What ``Recorder`` saved beside the weights."""
    record = content.value.get(RECORD_KEY) if isinstance(content.value, Mapping) else None
    return record if isinstance(record, dict) and "groups" in record else None
