"""Captum's TracIn classes on this engine: ``from gradindex.compat.captum import TracInCP``, and the rest stays.

Signatures are those of Captum 0.9. ``docs/recipes/captum.md`` says what is different, and how to have it as Captum
computes it. Captum itself is not needed; where it is installed, the classes count as its ``DataInfluence``.

Scores are TracInCP = sum_c eta_c <grad l(w_c; z), grad l(w_c; z')>, with the learning rates eta_c that
``checkpoints_load_func`` returns. Source: Pruthi et al. 2020 (arXiv:2002.08484), section 3.3.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util

from .fast import TracInCPFast, TracInCPFastRandProj
from .neighbors import ExactNeighbors, NearestNeighbors
from .snapshots import load_checkpoint
from .tracin import KMostInfluentialResults, TracInCP, TracInCPBase

__all__ = [
    "ExactNeighbors",
    "KMostInfluentialResults",
    "NearestNeighbors",
    "TracInCP",
    "TracInCPBase",
    "TracInCPFast",
    "TracInCPFastRandProj",
    "load_checkpoint",
]


def _register() -> None:
    """Have ``isinstance(x, captum.influence.DataInfluence)`` hold where Captum is installed and can be imported."""
    if importlib.util.find_spec("captum") is not None:
        with contextlib.suppress(ImportError):
            importlib.import_module("captum.influence").DataInfluence.register(TracInCPBase)


_register()
