"""gradindex: which training examples made my model do this?

A retrieval system for training-data influence by TracIn (Pruthi et al. 2020,
arXiv:2002.08484). Start with :class:`Task`, :func:`build` and :func:`load`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .building import build as build
    from .building import build_part as build_part
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import find_checkpoints as find_checkpoints
    from .errors import GradIndexError as GradIndexError
    from .growth import add as add
    from .growth import add_checkpoint as add_checkpoint
    from .growth import repair as repair
    from .hits import Hits as Hits
    from .recorder import Recorder as Recorder
    from .retrieval import Retriever as Retriever
    from .retrieval import exact_scores as exact_scores
    from .retrieval import load as load
    from .store import GradientStore as GradientStore
    from .store import compact as compact
    from .store import export as export
    from .store import merge as merge
    from .store import remove as remove
    from .store import seal as seal
    from .task import Task as Task
    from .task import load_task as load_task

__version__ = "0.1.0"

# Loaded on first use (PEP 562), so that `gradindex --help` and `gradindex info` need no torch.
_HOMES = {
    "Checkpoint": "checkpoint",
    "GradIndexError": "errors",
    "GradientStore": "store",
    "Hits": "hits",
    "Recorder": "recorder",
    "Retriever": "retrieval",
    "Task": "task",
    "add": "growth",
    "add_checkpoint": "growth",
    "build": "building",
    "build_part": "building",
    "compact": "store",
    "exact_scores": "retrieval",
    "export": "store",
    "find_checkpoints": "checkpoint",
    "load": "retrieval",
    "load_task": "task",
    "merge": "store",
    "remove": "store",
    "repair": "growth",
    "seal": "store",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradindex' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
