"""Exact inner-product search over rows (owns faiss)."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, DependencyError, DimensionMismatchError, IndexFileError, check_k
from ..files import replacing, sha256, write_json

_DATA, _SEAL = "flat.faiss", "index.json"


class SearchIndex:
    """A FAISS ``IndexFlatIP`` whose positions are the ids.

    Args:
        index: a FAISS index with inner product.
    """

    def __init__(self, index: Any) -> None:
        self._index = index

    @staticmethod
    def require() -> None:
        """Check that FAISS can be used, before hours of other work.

        Raises:
            DependencyError: it is missing, broken, or installed twice.
        """
        _faiss()

    @classmethod
    def build(cls, dim: int, blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]) -> SearchIndex:
        """Index rows that come in the order of their ids, from 0 on."""
        index = _faiss().IndexFlatIP(dim)
        for ids, rows in blocks:
            if not np.array_equal(ids, np.arange(index.ntotal, index.ntotal + len(ids))):
                raise ArgumentError(f"Rows must come in the order of their ids; {ids[0]} came at {index.ntotal}.")
            index.add(np.ascontiguousarray(rows, dtype=np.float32))
        return cls(index)

    @property
    def n_train(self) -> int:
        """The number of rows."""
        return int(self._index.ntotal)

    def search(self, query: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The rows with the largest inner products.

        Opponents are searched with the negated query, never as the smallest of what was found.

        Args:
            query: (n_query, dim) float32.
            k: how many, from 1 to the number of rows.

        Returns:
            Scores and ids, (n_query, k), by score descending, then id ascending.

        Raises:
            DimensionMismatchError: the query has another dimension than the rows.
            ArgumentError: ``k`` is out of range, or the query is not finite.
        """
        if query.ndim != 2 or query.shape[1] != self._index.d:
            raise DimensionMismatchError(
                f"The query has shape {query.shape}, but the index needs (n_query, {self._index.d}). "
                "Use the task that the store was built from."
            )
        check_k(k, self.n_train)
        if not np.isfinite(query).all():
            raise ArgumentError("The query has NaN or infinite numbers.")
        scores, ids = self._index.search(np.ascontiguousarray(query, dtype=np.float32), k)
        order = np.lexsort((ids, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1).astype(np.int64)

    def save(self, folder: Path, fingerprint: str) -> None:
        """Write the index and its seal (size, SHA-256, what rows it belongs to) into ``folder``."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / _DATA) as temporary:
                _faiss().write_index(self._index, str(temporary))
                seal = {
                    "kind": "flat",
                    "file": _DATA,
                    "rows": self.n_train,
                    "dim": int(self._index.d),
                    "fingerprint": fingerprint,
                    "bytes": temporary.stat().st_size,
                    "sha256": sha256(temporary),
                }
            write_json(folder / _SEAL, seal)
        except (OSError, RuntimeError) as error:
            raise IndexFileError(f"The index in {folder} cannot be written: {error}. The rows are kept.") from None

    @classmethod
    def load(cls, folder: Path, fingerprint: str) -> SearchIndex:
        """Check size and SHA-256, then open.

        Raises:
            IndexFileError: missing, damaged, or of other rows.
        """
        problem = damage(folder, fingerprint)
        if problem:
            raise IndexFileError(f"{problem}. Run the same `gradindex build` again to make the index anew.")
        faiss = _faiss()
        index = faiss.read_index(str(folder / _DATA))
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise IndexFileError(f"{folder / _DATA} does not search by inner product. Build the index again.")
        return cls(index)


def describe(folder: Path) -> dict[str, Any] | None:
    """The seal of the index in ``folder``, or ``None`` without one."""
    try:
        seal: dict[str, Any] = json.loads((folder / _SEAL).read_text())
        return seal
    except (OSError, ValueError):
        return None


def damage(folder: Path, fingerprint: str) -> str | None:
    """What is wrong with the index in ``folder``, or ``None``."""
    seal, path = describe(folder), folder / _DATA
    if seal is None or not path.is_file():
        return f"{path} is missing"
    if seal.get("fingerprint") != fingerprint:
        return f"{path} belongs to other rows than the store's"
    if path.stat().st_size != seal.get("bytes") or sha256(path) != seal.get("sha256"):
        return f"{path} is damaged: it has another size or checksum than when it was written"
    return None


def _faiss() -> Any:
    packages = sorted(set(importlib.metadata.packages_distributions().get("faiss", [])))
    if len(packages) > 1:
        raise DependencyError(
            f"{' and '.join(packages)} are both installed and overwrite each other's files. "
            "Uninstall all of them, then install one: pip install 'gradindex[cpu]' or 'gradindex[gpu]'."
        )
    try:
        import faiss
    except (ImportError, RuntimeError) as error:  # faiss-gpu without its CUDA wheels raises RuntimeError
        raise DependencyError(
            f"FAISS cannot be imported ({error}). Install one: pip install 'gradindex[cpu]' or 'gradindex[gpu]'."
        ) from None
    return faiss
