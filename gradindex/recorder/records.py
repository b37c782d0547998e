"""What a checkpoint of Recorder holds beside the weights, read again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

RECORD_KEY = "gradindex"
MODEL_KEY = "model"
MOMENTS_KEY = "second_moments"
# The record, as JSON, in a folder of a distributed checkpoint.
RECORD_FILE = "gradindex.json"


def recorded_groups(record: dict[str, Any], field: str) -> dict[str, float]:
    """Parameter name to the recorded number ``field`` of its group; groups without that number are left out."""
    groups: Iterable[dict[str, Any]] = record["groups"]
    return {name: float(group[field]) for group in groups if field in group for name in group["parameters"]}


def recorded_training(record: dict[str, Any]) -> dict[str, bool | None]:
    """Whether each parameter that the optimizer held took a step since the previous ``save``.

    ``None`` where records do not tell, those of earlier versions: the optimizer held it and had a rate for it.
    """
    found: dict[str, bool | None] = {}
    for group in record["groups"]:
        took: bool | None = group["steps"] > 0 if "steps" in group else None
        if group["learning_rate"] == group["learning_rate_sum"] == 0:
            took = False
        found |= dict.fromkeys(group["parameters"], took)
    return found
