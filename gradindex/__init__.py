"""gradindex: which training examples made my model do this?

A search engine for training-data influence by TracIn (Pruthi et al. 2020, arXiv:2002.08484).
Start with :class:`Task`, :func:`build` and :func:`load`. To change a store, see
:mod:`gradindex.store` (remove, compact, merge, seal, export) and :mod:`gradindex.growth` (add
checkpoints, repair). :mod:`gradindex.evaluation` builds and measures indexes;
:mod:`gradindex.checkpoint` selects from many checkpoints (evenly, by_loss_drop), and
:mod:`gradindex.losses` has losses of other libraries' models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import building as building
    from . import checkpoint as checkpoint
    from . import evaluation as evaluation
    from . import growth as growth
    from . import losses as losses
    from . import store as store
    from .building import build as build
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import find_checkpoints as find_checkpoints
    from .errors import GradIndexError as GradIndexError
    from .growth import add as add
    from .options import BuildOptions as BuildOptions
    from .recorder import Recorder as Recorder
    from .retrieval.hits import Hits as Hits
    from .retrieval.question import Question as Question
    from .retrieval.retriever import Retriever as Retriever
    from .retrieval.retriever import load as load
    from .retrieval.scoring import exact_scores as exact_scores
    from .store import GradientStore as GradientStore
    from .task import Task as Task
    from .task import load_task as load_task

__version__ = "0.1.0"

# Loaded on first use (PEP 562), so that `gradindex --help` and `gradindex info` need no torch.
_HOMES = {
    "BuildOptions": "options",
    "Checkpoint": "checkpoint",
    "GradIndexError": "errors",
    "GradientStore": "store",
    "Hits": "retrieval.hits",
    "Question": "retrieval.question",
    "Recorder": "recorder",
    "Retriever": "retrieval.retriever",
    "Task": "task",
    "add": "growth",
    "build": "building",
    "exact_scores": "retrieval.scoring",
    "find_checkpoints": "checkpoint",
    "load": "retrieval.retriever",
    "load_task": "task",
}

# Reached as attributes without an import of their own, and loaded then.
_ROOMS = ("building", "checkpoint", "evaluation", "growth", "losses", "store")

__all__ = [*_HOMES, "__version__"]


if not TYPE_CHECKING:  # to a type checker, a module with this function has every name

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return importlib.import_module(f".{name}", __name__)
        if name not in _HOMES:
            raise AttributeError(f"module 'gradindex' has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
