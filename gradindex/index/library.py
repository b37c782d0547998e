"""Loads FAISS, or says what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DependencyError
from ..forking import one_thread_in_children

# Products of two numbers from which on several threads are quicker than one.
_WORTH_THREADS = 1 << 20


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
    one_thread_in_children("faiss", faiss.omp_set_num_threads)
    return faiss


def require() -> None:
    """Check that FAISS can be used, before hours of other work.

    Raises:
        DependencyError: it is missing, broken, or installed twice.
    """
    packages = _packages()
    if len(packages) > 1:
        raise DependencyError(
            f"{' and '.join(packages)} are both installed and overwrite each other's files. "
            "Uninstall all of them, then install one: pip install 'gradindex[cpu]' or 'gradindex[gpu]'."
        )
    load_faiss()


def _packages() -> list[str]:
    """The installed packages whose module is ``faiss``."""
    folders = (path for entry in sys.path for path in Path(entry or ".").glob("faiss*-info"))
    if len({path.resolve() for path in folders}) < 2:  # to look into every package takes half a second and more
        return ["faiss"]
    return sorted(set(importlib.metadata.packages_distributions().get("faiss", [])))


def paired_products(
    at: NDArray[np.int64], other_at: NDArray[np.int64], sides: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]
) -> list[NDArray[np.float32]]:
    """For each of ``sides``, one and other, (m,) inner products <one[at[j]], other[other_at[j]]>; none are gathered.

    Args:
        at: (m,) positions in the first of each two.
        other_at: (m,) positions in the second, which is read there alone.
        sides: (n, d) and (n', d), float32 and contiguous.
    """
    if not len(at):
        return [np.empty(0, dtype=np.float32) for _ in sides]
    at, other_at = (np.ascontiguousarray(places, dtype=np.int64) for places in (at, other_at))
    # FAISS checks neither types nor bounds.
    needed = at.max() + 1, other_at.max() + 1
    assert len(at) == len(other_at) and min(at.min(), other_at.min()) >= 0
    for pair in sides:
        assert all(side.dtype == np.float32 and side.flags.c_contiguous for side in pair)
        assert all(len(side) >= least for side, least in zip(pair, needed, strict=True))
        assert pair[0].shape[1] == pair[1].shape[1]
    faiss = load_faiss()
    pointer = faiss.swig_ptr
    first_at, second_at, products_of_sides = pointer(at), pointer(other_at), []
    before, work = faiss.omp_get_max_threads(), len(at) * sum(one.shape[1] for one, _ in sides)
    # For little work, to wait for another thread takes longer than it spares, above all on a busy machine.
    faiss.omp_set_num_threads(before if work >= _WORTH_THREADS else 1)  # of this thread alone
    try:
        for one, other in sides:
            products = np.empty(len(at), dtype=np.float32)
            faiss.pairwise_indexed_inner_product(
                one.shape[1], len(at), pointer(one), first_at, pointer(other), second_at, pointer(products)
            )
            products_of_sides.append(products)
    finally:
        faiss.omp_set_num_threads(before)
    return products_of_sides
