"""Rows and scores for other programs: NumPy files or Parquet (owns pyarrow)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DependencyError, StoreError
from ..files import discard, flush, put_in_place, storing, temporary_for
from ..progress import progress
from .reader import GradientStore


def export(store: GradientStore, out: str | os.PathLike[str]) -> Path:
    """Write ids, rows, self-influence, losses and columns where other programs read them; blocks stream.

    Args:
        store: what to write; removed rows are left out.
        out: a file ``*.parquet`` (needs the extra ``parquet``), or a new folder for ``ids.npy``,
            ``rows.npy`` (n, dim) float32, ``self_influence.npy`` (n, C), ``losses.npy`` (n, C) and
            ``columns/NAME.npy``.

    Returns:
        ``out``.

    Raises:
        StoreError: ``out`` exists or cannot be written, or a block of the store is damaged.
        DependencyError: pyarrow is missing.
    """
    path = Path(out)
    if path.exists():
        raise StoreError(f"{path} exists. Choose another name.")
    temporary = temporary_for(path)
    try:
        if path.suffix == ".parquet":
            _to_parquet(store, path, temporary)
        else:
            _to_numpy(store, path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        discard(temporary)
    return path


def _to_numpy(store: GradientStore, path: Path, temporary: Path) -> None:
    ids = store.ids
    with storing(path):
        (temporary / "columns").mkdir(parents=True)
        np.save(temporary / "ids.npy", ids)
        with (temporary / "rows.npy").open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), store.dim)}
            np.lib.format.write_array_header_1_0(file, header)
    with progress("exporting", len(ids), "rows") as advance, (temporary / "rows.npy").open("ab") as file:
        for some, rows in store.blocks():
            with storing(path):
                file.write(np.ascontiguousarray(rows, dtype="<f4").data)
            advance(len(some))
    for name, values in (("self_influence", store.self_influence()), ("losses", store.losses())):
        with storing(path):
            np.save(temporary / f"{name}.npy", values)
    for name in store.columns:
        column = store.column(name)
        with storing(path):
            np.save(temporary / "columns" / f"{name}.npy", column)
    with storing(path):
        for file_path in temporary.rglob("*.npy"):
            flush(file_path)
        put_in_place((temporary, path))


def _to_parquet(store: GradientStore, path: Path, temporary: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DependencyError(
            f"{path} needs the package pyarrow. Install it: pip install 'gradindex[parquet]', or export to a folder."
        ) from None

    def lists(values: Any, size: int) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), size)

    writer: Any = None
    try:
        with progress("exporting", store.n_train, "rows") as advance:
            for ids, rows in store.blocks():
                table: dict[str, Any] = {"id": pa.array(ids), "row": lists(rows, store.dim)}
                table["self_influence"] = lists(store.self_influence(ids), store.n_checkpoints)
                table["losses"] = lists(store.losses(ids), store.n_checkpoints)
                table |= {f"columns.{name}": pa.array(store.column(name, ids)) for name in store.columns}
                with storing(path):
                    piece = pa.table(table)
                    writer = writer or pq.ParquetWriter(temporary, piece.schema)
                    writer.write_table(piece)
                advance(len(ids))
    finally:
        if writer is not None:
            with storing(path):
                writer.close()
    with storing(path):
        flush(temporary)
        put_in_place((temporary, path))
