"""A compact index: rows turned to a few fitted directions, in a stock FAISS file.

Gradient rows are a hard case for inner-product indexes: their norms are heavy-tailed, and most of a query's true
top-k come from the heaviest rows, of which lists made by k-means on raw vectors lose most. Here directions are
clustered on the sphere, and lists are probed by <query, centroid> times the norm that most of a list's rows stay
below, so that a list of heavy rows is looked into first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, IndexFileError
from ..files import discard, flush, put_in_place, read_checked, sha256, storing, temporary_for, write_checked
from . import gpu
from .flat import Blocks, checked_query, ranked
from .library import load_faiss

FORMAT, VERSION = "gradindex-index", 1
MANIFEST = "manifest.json"
# The share of a list's rows whose norm stays below what the list is probed by.
_NORM_QUANTILE = 0.9
_WRITTEN_BYTES = 1 << 20
_OVERSAMPLING, _POWER_ITERATIONS = 16, 3
_KMEANS_ITERATIONS, _ROWS_PER_LIST = 10, 39  # fewer, and FAISS warns


@dataclass(frozen=True)
class Shape:
    """How an index is made.

    Args:
        kind: ``"flat"``: all rows are compared; ``"ivf"``: those of the most promising lists.
        dim: numbers of a row in the index.
        lists: of ``"ivf"``.
    """

    kind: Literal["flat", "ivf"]
    dim: int
    lists: int = 0

    def bytes_for(self, rows: int) -> int:
        """Memory that making an index of so many rows takes at most: codes and ids, whose arrays grow by doubling."""
        clustering = 8 * _ROWS_PER_LIST * self.lists * self.dim + 12 * rows if self.kind == "ivf" else 0
        return 2 * rows * (self.dim + 8) + clustering


def fitted_directions(sample: NDArray[np.float32], dim: int, seed: int = 0) -> NDArray[np.float32]:
    """The directions that hold most of unit-normed rows: the top eigenvectors of their second moments.

    No mean is subtracted, for that would change inner products; rows are normed first, for the heavy ones are not
    to decide alone. By subspace iteration (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4).

    Args:
        sample: (m, n) rows.
        dim: how many, at most n.
        seed: of the start.

    Returns:
        (n, dim), orthonormal columns.
    """
    units = sample / _norms(sample)
    start = np.random.default_rng(seed).standard_normal((sample.shape[1], min(dim + _OVERSAMPLING, sample.shape[1])))
    found = start.astype(np.float32)
    for _ in range(_POWER_ITERATIONS):
        found = np.linalg.qr(units.T @ (units @ found))[0]
    inner = units @ found
    _, vectors = np.linalg.eigh((inner.T @ inner).astype(np.float64))
    directions: NDArray[np.float32] = np.ascontiguousarray((found @ vectors[:, ::-1][:, :dim]).astype(np.float32))
    return directions


def _norms(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(m, 1) to divide by: a zero row keeps its zeros."""
    norms: NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norms > 0, norms, np.float32(1))


class CompactIndex:
    """Proposes candidates: rows whose inner product with a query is large in the index's few directions.

    Args:
        index: a FAISS ``IndexPreTransform`` with inner product.
        about: what the manifest says of it.
        gpus: numbers of CUDA devices that search copies of it, see :func:`devices`.
    """

    def __init__(self, index: Any, about: Mapping[str, Any], gpus: Sequence[int] = ()) -> None:
        self._index, self.about, self._copy = index, dict(about), None
        if gpus:
            faiss = load_faiss()
            turn = faiss.downcast_VectorTransform(index.chain.at(0))
            self._turn = faiss.vector_to_array(turn.A).reshape(turn.d_out, turn.d_in).T
            self._copy = gpu.GpuCopy(faiss.downcast_index(index.index), gpus)

    @classmethod
    def build(
        cls,
        shape: Shape,
        sample: NDArray[np.float32],
        blocks: Callable[[], Blocks],
        seed: int = 0,
        gpus: Sequence[int] = (),
    ) -> CompactIndex:
        """Make an index; rows stream, for ``"ivf"`` three times.

        Args:
            shape: what to make.
            sample: (m, n) rows that directions and codes are fitted to.
            blocks: hands out all ids and rows, piece by piece.
            seed: of what is random.
            gpus: devices that cluster, assign and search.

        Raises:
            ArgumentError: more directions than a row has numbers, or more lists than there are rows.
        """
        if not 1 <= shape.dim <= sample.shape[1]:
            raise ArgumentError(f"dim is {shape.dim}, but must be from 1 to the numbers in a row, {sample.shape[1]}.")
        faiss = load_faiss()
        directions = fitted_directions(sample, shape.dim, seed)

        def turned() -> Blocks:
            for ids, rows in blocks():
                if len(ids):
                    yield ids, np.ascontiguousarray(rows @ directions)

        make = _flat if shape.kind == "flat" else _norm_aware_lists
        inner = make(faiss, shape, np.ascontiguousarray(sample @ directions), turned, seed, gpus)
        turn = faiss.LinearTransform(sample.shape[1], shape.dim, False)
        faiss.copy_array_to_vector(np.ascontiguousarray(directions.T).ravel(), turn.A)
        turn.is_trained = True
        about = {"shape": asdict(shape), "dim": sample.shape[1], "rows": int(inner.ntotal)}
        return cls(faiss.IndexPreTransform(turn, inner), about, gpus)  # which keeps its parts alive

    def search(
        self, query: NDArray[np.float32], k: int, *, probes: int = 1, removed: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Candidates by their inner product in the index's directions.

        Args:
            query: (n_query, n) float32, negated for opponents.
            k: how many, at least 1.
            probes: lists looked into, for ``"ivf"``.
            removed: ids to leave out.

        Returns:
            Scores and ids (n_query, k), by score descending, then id ascending. Where fewer are found, ids
            of -1 with a score of minus infinity at the end.

        Raises:
            DimensionMismatchError: the query has another dimension than the rows.
            ArgumentError: the query is not finite.
        """
        faiss, query = load_faiss(), checked_query(query, self.about["dim"])
        gone = 0 if removed is None else len(removed)
        if self._copy is not None and max(k + gone, probes) <= gpu.MOST:
            return self._on_gpu(query, k, probes, removed if gone else None)
        selector = None if removed is None or not len(removed) else faiss.IDSelectorNot(faiss.IDSelectorBatch(removed))
        if self.about["shape"]["kind"] == "ivf":
            inner = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
            # Threads share out the queries, or the lists of a single one; a race for this changes no answer.
            faiss.extract_index_ivf(self._index).parallel_mode = int(len(query) == 1)
        else:
            inner = faiss.SearchParameters(sel=selector)
        found = min(k, self.about["rows"])
        scores, ids = self._index.search(query, found, params=faiss.SearchParametersPreTransform(index_params=inner))
        scores = np.where(ids < 0, -np.inf, scores).astype(np.float32)  # FAISS pads with a score like any other
        return ranked(scores, ids.astype(np.int64), found)

    def _on_gpu(
        self, query: NDArray[np.float32], k: int, probes: int, removed: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """As :meth:`search`; no kernel leaves out removed rows, so that more are found and they are dropped."""
        assert self._copy is not None
        found = min(k, self.about["rows"])
        more = 0 if removed is None else len(removed)
        turned = np.ascontiguousarray(query @ self._turn)
        scores, ids = self._copy.search(turned, min(found + more, self.about["rows"]), probes)
        if removed is not None:
            ids = np.where(np.isin(ids, removed), -1, ids)
        scores = np.where(ids < 0, -np.inf, scores).astype(np.float32)
        return ranked(scores, ids.astype(np.int64), found)

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the index, then its manifest, which makes it the store's at once; readers go on with the one they have.

        Args:
            folder: of the index.
            about: what else the manifest says, such as the ids that it covers and the recall that was measured.

        Raises:
            StoreError: it cannot be written.
        """
        faiss = load_faiss()
        with storing(folder):
            folder.mkdir(exist_ok=True)
            temporary = temporary_for(folder / "index.faiss")
            try:
                file = _written(faiss, self._index, temporary)
                # Another content has another name: nothing is ever overwritten.
                name = f"index-{file['sha256'][:16]}.faiss"
                flush(temporary)
                put_in_place((temporary, folder / name))
            finally:
                discard(temporary)
            self.about |= {**about, "format": FORMAT, "version": VERSION, "file": {"name": name, **file}}
            write_checked(folder / MANIFEST, self.about)
        discard(*(path for path in folder.iterdir() if path.name not in (name, MANIFEST)))

    @classmethod
    def load(cls, folder: Path, gpus: Sequence[int] = ()) -> CompactIndex | None:
        """Check the manifest, then size and SHA-256 of the index, then map it; ``None`` where there is none.

        Args:
            folder: of the index.
            gpus: devices to copy it to, see :func:`devices`.

        Raises:
            IndexFileError: damaged, of a newer version, or not an index that searches by inner product.
        """
        if not (folder / MANIFEST).exists():
            return None
        problem = damage(folder)
        if problem:
            raise IndexFileError(f"{problem}. Make the index again: gradindex index {folder.parent}.")
        faiss, about = load_faiss(), read_checked(folder / MANIFEST)
        path = folder / about["file"]["name"]
        mapped = about["shape"]["kind"] == "ivf" and not gpus
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)
        if mapped:  # starting threads that read ahead takes six times as long as searching what is in memory
            faiss.downcast_InvertedLists(faiss.extract_index_ivf(index).invlists).prefetch_nthread = 0
        if index.metric_type != faiss.METRIC_INNER_PRODUCT or index.d != about["dim"]:
            raise IndexFileError(f"{path} is not the index that its manifest tells of. Make it again: gradindex index.")
        return cls(index, about, gpus)


def _written(faiss: Any, index: Any, path: Path) -> dict[str, Any]:
    """Write an index piece by piece: no copy of it is ever in memory. Returns its size and checksum."""
    state, size = hashlib.sha256(), 0
    with path.open("wb") as file:

        def write(content: bytes) -> int:
            nonlocal size
            size += len(content)
            state.update(content)
            return file.write(content)

        faiss.write_index(index, faiss.PyCallbackIOWriter(write, _WRITTEN_BYTES))
    return {"bytes": size, "sha256": state.hexdigest()}


def damage(folder: Path) -> str | None:
    """What is wrong with the index in ``folder``, or ``None``; nothing is given to FAISS."""
    path = folder / MANIFEST
    try:
        about = read_checked(path)
        if about["format"] != FORMAT:
            raise ValueError("another format")
        if about["version"] > VERSION:
            return f"{path} has version {about['version']}, but this gradindex reads up to {VERSION}"
        path = folder / about["file"]["name"]
        if path.stat().st_size != about["file"]["bytes"] or sha256(path) != about["file"]["sha256"]:
            raise ValueError("it has another size or checksum than when it was written")
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged ({error})"
    return None


def _flat(
    faiss: Any,
    shape: Shape,
    sample: NDArray[np.float32],
    blocks: Callable[[], Blocks],
    seed: int,
    gpus: Sequence[int],
) -> Any:
    """All rows, a byte a number."""
    inner = faiss.IndexIDMap2(faiss.index_factory(shape.dim, "SQ8", faiss.METRIC_INNER_PRODUCT))
    inner.train(sample)
    for ids, rows in blocks():
        inner.add_with_ids(rows, ids)
    return inner


def _norm_aware_lists(
    faiss: Any,
    shape: Shape,
    sample: NDArray[np.float32],
    blocks: Callable[[], Blocks],
    seed: int,
    gpus: Sequence[int],
) -> Any:
    """Lists of rows of about the same direction, probed by <query, centroid> times the norm of the list's rows."""
    spread = _spread(blocks, _ROWS_PER_LIST * shape.lists)
    if not 1 <= shape.lists <= len(spread):
        raise ArgumentError(f"lists is {shape.lists}, but must be from 1 to the number of rows, {len(spread)}.")
    spread /= _norms(spread)
    centroids = gpu.train_centroids(spread, shape.lists, _KMEANS_ITERATIONS, seed, gpus)
    del spread
    finder = gpu.nearest(centroids, gpus)
    assigned, norms = [], []
    for _, rows in blocks():
        assigned.append(finder.search(rows, 1)[1][:, 0])  # the norm of a row does not change its nearest direction
        norms.append(np.linalg.norm(rows, axis=1))
    lists, lengths = np.concatenate(assigned), np.concatenate(norms)
    quantizer = faiss.IndexFlatIP(shape.dim)
    quantizer.add(centroids * _norms_of(lists, lengths, shape.lists)[:, None])
    inner = faiss.IndexIVFScalarQuantizer(
        quantizer, shape.dim, shape.lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, False
    )
    inner.train(sample)
    start = 0
    for ids, rows in blocks():
        mine = np.ascontiguousarray(lists[start : start + len(ids)])
        ids = np.ascontiguousarray(ids)
        inner.add_core(len(ids), faiss.swig_ptr(rows), faiss.swig_ptr(ids), faiss.swig_ptr(mine))
        start += len(ids)
    return inner  # which keeps the quantizer alive


def _spread(blocks: Callable[[], Blocks], least: int) -> NDArray[np.float32]:
    """Every 2^i-th row: ``least`` to 2 x ``least`` of them, or all where there are fewer."""
    kept: list[tuple[int, NDArray[np.float32]]] = []  # with the first one's number among those that are kept
    step, seen, count = 1, 0, 0
    for _, rows in blocks():
        part = rows[-seen % step :: step].copy()
        kept.append((-(-seen // step), part))
        seen, count = seen + len(rows), count + len(part)
        while count >= 2 * least:
            kept = [(-(-first // 2), part[first % 2 :: 2].copy()) for first, part in kept]
            step, count = 2 * step, sum(len(part) for _, part in kept)
    return np.concatenate([part for _, part in kept])


def _norms_of(lists: NDArray[np.int64], norms: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """The norm that most of each list's rows stay below: (count,), 0 for an empty list."""
    order = np.lexsort((norms, lists))
    ends = np.searchsorted(lists[order], np.arange(count), side="right")
    starts = np.searchsorted(lists[order], np.arange(count), side="left")
    places = starts + np.floor(_NORM_QUANTILE * np.maximum(ends - starts - 1, 0)).astype(np.int64)
    return np.where(ends > starts, norms[order][np.minimum(places, len(norms) - 1)], 0).astype(np.float32)
