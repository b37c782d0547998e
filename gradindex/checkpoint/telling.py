"""What to tell people of how checkpoints were fitted to a model."""

from __future__ import annotations

from collections.abc import Sequence

from ..weights import and_others
from .file import Loaded


def differing_names(read: Sequence[Loaded]) -> list[str]:
    """What to tell of names that only the file or only the model has, once for all checkpoints that are alike."""
    alike: dict[tuple[tuple[str, ...], ...], list[Loaded]] = {}
    for item in read:
        if item.filled or item.passed_over or item.from_base:
            alike.setdefault((item.filled, item.passed_over, item.from_base), []).append(item)
    said = []
    for (filled, passed_over, from_base), items in alike.items():
        parts = []
        if from_base:
            parts.append(f"takes {_names(from_base)} from the model, as its base")
        if filled:
            parts.append(f"lacks {_names(filled)}, filled in from the tied parameter or from the model's buffer")
        if passed_over:
            parts.append(f"has {_names(passed_over)} that the model lacks, ignored")
        said.append(f"{items[0].checkpoint.path}{and_others(len(items) - 1)} {'; and '.join(parts)}.")
    return said


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
