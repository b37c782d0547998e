"""A compact index: rows turned to fitted directions and coded, in a stock FAISS file, with a manifest beside it."""

from __future__ import annotations

import contextlib
import hashlib
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import IndexFileError
from ..files import (
    discard,
    flush,
    put_in_place,
    read_checked,
    sha256,
    signature,
    storing,
    temporary_for,
    temporary_of,
    write_checked,
)
from ..schema import LARGEST, Check, list_of, number, one_of, record, runs, text, tuple_of, whole
from . import gpu
from .exact import Blocks, checked_query, ranked
from .kinds import INDEXES, Rows
from .library import load_faiss
from .shapes import Shape, made

FORMAT, VERSION = "gradindex-index", 1
MANIFEST = "manifest.json"
_WRITTEN_BYTES = 1 << 20
# So many times as many rows are asked for as are wanted, where some are found twice.
_TWICE = 2
_IN_PROGRESS = "index.faiss"
_NAME = re.compile(r"index-([0-9a-f]{16})\.faiss")
_DIGEST = text("[0-9a-f]{64}", "a SHA-256 in hexadecimal")
_share: Check = number(0, 1)


def _kind(value: Any) -> None:
    """One of the kinds that are registered by now."""
    one_of(*INDEXES)(value)


_tuning = {
    "effort": record({"probes": whole(1, 1 << 31), "proposals": whole(1, 1 << 40)}),
    "recall": record({"k": whole(1), "against": text(), "proponents_at_least": _share, "opponents_at_least": _share}),
}
_of_geometry = record(_tuning, {"damping": number(0)})

# What a manifest must be to be trusted, and what it may hold besides.
_form = record(
    {
        "shape": record(
            {"kind": _kind, "dim": whole(1, 1 << 31), "lists": whole(0, 1 << 31)}, {"copies": whole(1, 1 << 10)}
        ),
        "dim": whole(1, 1 << 40),
        "rows": whole(1),
        "file": record({"name": text(_NAME.pattern, "the name of an index"), "bytes": whole(), "sha256": _DIGEST}),
    },
    {
        "map": text(),
        "ids": runs,
        "covers": list_of(tuple_of(_DIGEST, whole(), whole(0, LARGEST - 1))),
        **_tuning,
        "geometries": record({}, {"tracin": _of_geometry, "whitened": _of_geometry}),
    },
)


class LeftOut:
    """Rows that an index has and no answer may; made once for many searches.

    Args:
        ids: (m,) int64, ascending.
    """

    def __init__(self, ids: NDArray[np.int64]) -> None:
        faiss = load_faiss()
        self.ids = ids
        self._batch = faiss.IDSelectorBatch(ids)
        self.selector = faiss.IDSelectorNot(self._batch)

    def has(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some ids these are."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.asarray(self.ids[places] == ids)


class CompactIndex:
    """Proposes candidates: rows whose inner product with a query is large in the index's few directions.

    Args:
        index: a FAISS ``IndexPreTransform`` with inner product.
        about: what the manifest says of it.
        gpus: numbers of CUDA devices that search copies of it, see :func:`devices`.
    """

    def __init__(self, index: Any, about: Mapping[str, Any], gpus: Sequence[int] = ()) -> None:
        self._index, self.about, self._copy = index, dict(about), None
        self.shape = _shape_of(about)
        self._method = self.shape.method
        if gpus:
            faiss = load_faiss()
            turn = faiss.downcast_VectorTransform(index.chain.at(0))
            self._turn = faiss.vector_to_array(turn.A).reshape(turn.d_out, turn.d_in).T
            copied = self._method.for_gpu(faiss.downcast_index(index.index))
            self._copy = None if copied is None else gpu.GpuCopy(*copied, gpus)

    @classmethod
    def build(
        cls,
        shape: Shape,
        sample: NDArray[np.float32],
        blocks: Callable[[], Blocks],
        seed: int = 0,
        gpus: Sequence[int] = (),
        directions: NDArray[np.float32] | None = None,
    ) -> CompactIndex:
        """Make an index; rows stream, for ``"ivf"`` three times, for ``"flat"`` and ``"spill"`` twice, for ``"pq"``
        once.

        Args:
            shape: what to make.
            sample: (m, n) rows that directions and codes are fitted to.
            blocks: hands out all ids and rows, piece by piece.
            seed: of what is random.
            gpus: devices that cluster, assign and search.
            directions: (n, dim) orthonormal ones that its numbers are of, by default fitted to the sample.

        Raises:
            ArgumentError: more directions than a row has numbers, or more lists than there are rows.
        """
        index = made(shape, Rows(sample, blocks, seed, gpus, directions))
        about = {"shape": _told(shape), "dim": sample.shape[1], "rows": index.ntotal // shape.copies}
        return cls(index, about, gpus)

    def search(
        self, query: NDArray[np.float32], k: int, *, probes: int = 1, removed: LeftOut | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Candidates by their inner product in the index's directions.

        Args:
            query: (n_query, n) float32, negated for opponents.
            k: how many, at least 1.
            probes: lists looked into, for ``"ivf"``.
            removed: rows to leave out.

        Returns:
            Scores and ids (n_query, k), by score descending, then id ascending. Where fewer are found, ids
            of -1 with a score of minus infinity at the end.

        Raises:
            DimensionMismatchError: the query has another dimension than the rows.
            ArgumentError: the query is not finite.
        """
        faiss, query = load_faiss(), checked_query(query, self.about["dim"])
        removed = None if removed is None or not len(removed.ids) else removed
        n_rows = self.about["rows"]
        wanted = min(k, n_rows)
        # Copies of a row are found as often as lists of it are looked into.
        copies = min(self.shape.copies, probes)
        # GPUs and some codes know no way to leave out rows: more are found, and those dropped.
        more = min(wanted + (0 if removed is None else len(removed.ids)), n_rows)
        if self._copy is not None and max(more, probes) <= gpu.MOST:
            scores, ids = self._copy.search(np.ascontiguousarray(query @ self._turn), more, probes)
        else:
            selector = None if removed is None else removed.selector
            inner = self._method.options(self._index, len(query), probes, selector)
            options = None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
            if options is not None and copies > 1:
                return self._several(query, wanted, copies, options)
            scores, ids = self._index.search(query, more if options is None else wanted, params=options)
        if removed is not None:
            ids = np.where(removed.has(ids), -1, ids)
        return ranked(scores, ids.astype(np.int64), wanted)

    def _several(
        self, query: NDArray[np.float32], wanted: int, copies: int, options: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Of rows that stand in several lists; few of them are found twice, but each may be."""
        for count in (min(wanted * copies, round(_TWICE * wanted)), wanted * copies):
            scores, ids = self._index.search(query, count, params=options)
            best = ranked(scores, ids.astype(np.int64), wanted)
            if not ((best[1][:, -1] < 0) & (ids[:, -1] >= 0)).any():  # all that there are, or as many as are wanted
                break
        return best

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
            before = _own_files(folder)
            temporary = temporary_for(folder / _IN_PROGRESS)
            try:
                file = _written(faiss, self._index, temporary)
                # Another content has another name: nothing is ever overwritten.
                name = f"index-{file['sha256'][:16]}.faiss"
                flush(temporary)
                put_in_place((temporary, folder / name))
            finally:
                discard(temporary)
            self.about |= {**about, "format": FORMAT, "version": VERSION, "file": {"name": name, **file}}
            self.about.pop("sha256", None)  # of what the manifest said before
            write_checked(folder / MANIFEST, self.about)
        discard(*(path for path in before if path.name not in (name, MANIFEST)))

    @classmethod
    def load(cls, folder: Path, gpus: Sequence[int] = ()) -> CompactIndex | None:
        """Check the manifest, then size and SHA-256 of the index, then map it; ``None`` where there is none.

        Args:
            folder: of the index.
            gpus: devices to copy it to, see :func:`devices`.

        Raises:
            IndexFileError: damaged, of a newer version, or not an index that searches by inner product.
        """
        seen = signature(folder / MANIFEST)
        if seen is None:
            return None
        try:
            about = checked(folder)
            faiss, path = load_faiss(), folder / about["file"]["name"]
            method = _shape_of(about).method
            mapped = method.mapped and not gpus
            try:
                index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)
                stored = index.metric_type, index.d, index.ntotal, isinstance(index, faiss.IndexPreTransform)
                if mapped:
                    method.after_mapping(index)
            except (RuntimeError, AttributeError) as error:
                raise IndexFileError(f"{path} cannot be read by FAISS ({str(error)[:100]})") from None
            if stored != (faiss.METRIC_INNER_PRODUCT, about["dim"], about["rows"] * _shape_of(about).copies, True):
                raise IndexFileError(f"{path} is not the index that its manifest describes")
        except IndexFileError as error:
            if seen != signature(folder / MANIFEST):  # another has taken its place, or it was taken away
                return cls.load(folder, gpus)
            raise IndexFileError(
                f"{error}. Rebuild the index: gradindex index {folder.parent}, or remove it to scan all rows: the same "
                "with --drop."
            ) from None
        return cls(index, about, gpus)

    @staticmethod
    def remove(folder: Path) -> None:
        """Take an index away, if there is one: first what makes it the store's. What else lies there stays."""
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(folder.lstat().st_mode):
                discard(*sorted(_own_files(folder), key=lambda path: path.name != MANIFEST))
                folder.rmdir()


def _own_files(folder: Path) -> list[Path]:
    """Files of an index, also of one that was not finished, and none of another's.

    What the manifest names is the index's own; so is a file whose name is the digest of its content.
    """
    named = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        named = read_checked(folder / MANIFEST)["file"]["name"]
    own = []
    for path in folder.iterdir():
        name = _NAME.fullmatch(path.name)
        is_own = path.name == MANIFEST or temporary_of(path.name) in (MANIFEST, _IN_PROGRESS)
        if not is_own and name:
            with contextlib.suppress(OSError):
                is_own = path.name == named or sha256(path).startswith(name[1])
        own += [path] if is_own and stat.S_ISREG(path.lstat().st_mode) else []
    return own


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


def _told(shape: Shape) -> dict[str, Any]:
    """A shape as a manifest tells it, which earlier versions read where there is one copy of each row."""
    told = asdict(shape)
    if shape.copies == 1:
        del told["copies"]
    return told


def _shape_of(about: Mapping[str, Any]) -> Shape:
    """The shape that a manifest tells; a later version's may have more to it."""
    shape = about["shape"]
    return Shape(shape["kind"], shape["dim"], shape["lists"], shape.get("copies", 1))


def checked(folder: Path) -> dict[str, Any]:
    """What the manifest says of the index in ``folder``, whose file has the size and checksum that it tells.

    Raises:
        IndexFileError: says what is wrong; nothing was given to FAISS.
    """
    path = folder / MANIFEST
    try:
        about: dict[str, Any] = read_checked(path)
        if about["format"] != FORMAT:
            raise ValueError("another format")
        whole()(about["version"])
        if about["version"] > VERSION:
            raise IndexFileError(f"{path} has version {about['version']}, but this gradindex reads up to {VERSION}")
        _form(about)
        _shape_of(about)
        path = folder / about["file"]["name"]
        if path.stat().st_size != about["file"]["bytes"] or sha256(path) != about["file"]["sha256"]:
            raise ValueError("its size or checksum has changed since it was written")
    except FileNotFoundError:
        raise IndexFileError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IndexFileError(f"{path} is damaged ({error})") from None
    return about
