"""Loads FAISS, or says what is wrong with it."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from ..errors import DependencyError


def load_faiss() -> Any:
    """The module.

    Raises:
        DependencyError: it is missing or broken.
    """
    try:
        import faiss
    except (ImportError, RuntimeError) as error:  # faiss-gpu without its CUDA wheels raises RuntimeError
        raise DependencyError(
            f"FAISS cannot be imported ({error}). Install one: pip install 'gradindex[cpu]' or 'gradindex[gpu]'."
        ) from None
    return faiss


def require() -> None:
    """Check that FAISS can be used, before hours of other work.

    Raises:
        DependencyError: it is missing, broken, or installed twice.
    """
    packages = sorted(set(importlib.metadata.packages_distributions().get("faiss", [])))
    if len(packages) > 1:
        raise DependencyError(
            f"{' and '.join(packages)} are both installed and overwrite each other's files. "
            "Uninstall all of them, then install one: pip install 'gradindex[cpu]' or 'gradindex[gpu]'."
        )
    load_faiss()
