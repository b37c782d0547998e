"""Rows and scores for other programs: NumPy files or Parquet (owns pyarrow)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DependencyError, StoreError
from ..files import discard, flush, put_in_place, storing, temporary_for
from ..progress import progress
from .reader import GradientStore
from .summary import flat, flat_names

# Rows of which everything but the rows is read together.
_AT_ONCE = 1 << 16


def export(store: GradientStore, out: str | os.PathLike[str], rows: bool = True) -> Path:
    """Write ids, rows, self-influence, losses and columns where other programs read them; blocks stream.

    Args:
        store: what to write; removed rows are left out.
        out: a file ``*.parquet`` (needs the extra ``parquet``) with columns named as
            :meth:`GradientStore.to_pandas` names them, beside ``id`` and ``row``; or a new folder for ``ids.npy``,
            ``rows.npy`` (n, dim) float32, ``self_influence.npy`` (n, C), ``losses.npy`` (n, C) and
            ``columns/NAME.npy``.
        rows: whether to write the rows themselves, which are most of the bytes.

    Returns:
        ``out``.

    Raises:
        StoreError: ``out`` exists or cannot be written, or a block of the store is damaged.
        DependencyError: pyarrow is missing.
    """
    path = Path(out)
    _check_new(path)
    temporary = temporary_for(path)
    try:
        if path.suffix == ".parquet":
            _to_parquet(store, path, temporary, rows)
        else:
            _to_numpy(store, path, temporary, rows)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        discard(temporary)
    return path


def _check_new(path: Path) -> None:
    with storing(path):
        if path.is_symlink() or path.exists():
            raise StoreError(f"{path} exists. Choose another name.")


def _pieces(store: GradientStore, rows: bool) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32] | None]]:
    """Ids and, where they are wanted, rows, piece by piece, with progress."""
    with progress("exporting", store.n_train, "rows") as advance:
        if rows:
            pieces: Iterator[tuple[NDArray[np.int64], NDArray[np.float32] | None]] = store.blocks()
        else:
            every = store.ids
            pieces = ((every[start : start + _AT_ONCE], None) for start in range(0, len(every), _AT_ONCE))
        for ids, block in pieces:
            if len(ids):
                yield ids, block
                advance(len(ids))


def _to_numpy(store: GradientStore, path: Path, temporary: Path, rows: bool) -> None:
    kinds = {name: kind if kind != "U" else f"<U{store.longest(name)}" for name, kind in store.manifest.columns.items()}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"ids": ("<i8", ())}
    shapes |= {"rows": ("<f4", (store.dim,))} if rows else {}
    shapes |= dict.fromkeys(("self_influence", "losses"), ("<f8", (store.n_checkpoints,)))
    shapes |= {f"columns/{name}": (kind, ()) for name, kind in kinds.items()}
    with storing(path):
        (temporary / "columns").mkdir(parents=True)
        for name, (kind, shape) in shapes.items():
            header = {"descr": kind, "fortran_order": False, "shape": (store.n_train, *shape)}
            with (temporary / f"{name}.npy").open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
    for ids, block in _pieces(store, rows):
        values: dict[str, NDArray[Any]] = {"ids": ids, "losses": store.losses(ids)}
        values |= {"self_influence": store.self_influence(ids)} | ({} if block is None else {"rows": block})
        values |= {f"columns/{name}": store.column(name, ids) for name in store.columns}
        with storing(path):
            for name, array in values.items():
                with (temporary / f"{name}.npy").open("ab") as file:
                    file.write(np.ascontiguousarray(_without_gaps(array), dtype=shapes[name][0]).tobytes())
    with storing(path):
        for made in temporary.rglob("*.npy"):
            flush(made)
        _check_new(path)  # it may have come in the meantime
        put_in_place((temporary, path))


def _to_parquet(store: GradientStore, path: Path, temporary: Path, rows: bool) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DependencyError(
            f"{path} needs the package pyarrow. Install it: pip install 'gradindex[parquet]', or export to a folder."
        ) from None
    of_type: Callable[[str], Any] = lambda kind: pa.string() if kind == "U" else pa.from_numpy_dtype(np.dtype(kind))  # noqa: E731
    fields = [("id", pa.int64()), *([("row", pa.list_(pa.float32(), store.dim))] if rows else [])]
    fields += [(name, of_type(kind)) for name, kind in flat_names(store).items()]
    schema = pa.schema(fields)
    with storing(path):
        writer = pq.ParquetWriter(temporary, schema)
    try:
        for ids, block in _pieces(store, rows):
            named: dict[str, Any] = {"id": ids, "row": block, **flat(store, ids)}
            arrays = [_arrow(pa, named[name]) for name, _ in fields]
            with storing(path):
                writer.write_table(pa.table(arrays, schema=schema))
    finally:
        with storing(path):
            writer.close()
    with storing(path):
        flush(temporary)
        _check_new(path)  # it may have come in the meantime
        put_in_place((temporary, path))


def _without_gaps(array: NDArray[Any]) -> NDArray[Any]:
    """Texts with the empty one for those that are missing, which arrays of texts have no value for."""
    return np.where(array == array, array, "").astype(np.str_) if array.dtype.kind == "O" else array


def _arrow(pa: Any, array: NDArray[Any]) -> Any:
    if array.ndim == 1:
        return pa.array(array, from_pandas=array.dtype.kind == "O")  # with nulls for texts that are missing
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
