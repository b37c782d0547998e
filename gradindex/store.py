"""The store: rows in HDF5 shards, and the manifest that says what they mean (owns h5py).

The layout is specified in docs/format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError, MismatchError, StoreError
from .files import replacing, sha256, write_json
from .progress import progress

FORMAT, FORMAT_VERSION = "gradindex-store", 0
_MANIFEST = "manifest.json"
_BASES, _SIDES = "bases.h5", ("output_gradients", "activations")


@dataclass(frozen=True)
class ShardRows:
    """What one shard holds, for m examples, C checkpoints and rows of ``dim`` numbers.

    Args:
        ids: (m,) int64.
        rows: (m, dim) float32, the checkpoints' blocks side by side.
        self_influence: (m, C) float64, eta_c ||grad l(w_c; z)||^2.
        losses: (m, C) float64, the training loss at each checkpoint.
        columns: by name (m,), as the task supplied them.
    """

    ids: NDArray[np.int64]
    rows: NDArray[np.float32]
    self_influence: NDArray[np.float64]
    losses: NDArray[np.float64]
    columns: Mapping[str, NDArray[Any]]


class GradientStore:
    """A folder of rows. Opening reads the manifest alone; rows are read when asked for.

    Args:
        folder: what ``gradindex build`` wrote.
        sealed: insist that the build is complete.

    Raises:
        StoreError: no store, damaged, of a newer version, or not complete.
    """

    def __init__(self, folder: str | os.PathLike[str], *, sealed: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        if sealed and not self.manifest["sealed"]:
            raise StoreError(
                f"{self.folder} is a build that has not finished ({len(self.finished())} of "
                f"{len(self.manifest['shards'])} shards). Run the same `gradindex build` again to go on."
            )
        self.n_train: int = self.manifest["data"]["n_train"]
        self.dim: int = self.manifest["dim"]
        self.n_checkpoints: int = len(self.manifest["map"]["checkpoints"])

    @staticmethod
    def begun(folder: str | os.PathLike[str]) -> bool:
        """Whether a build has started a store here."""
        return (Path(folder) / _MANIFEST).exists()

    @classmethod
    def create(cls, folder: str | os.PathLike[str], manifest: dict[str, Any]) -> GradientStore:
        """Start a store, or open the one that an earlier run of the same build started.

        Raises:
            StoreError: the folder holds something else, or cannot be written.
            MismatchError: it holds a build of another task; says what differs.
        """
        folder = Path(folder)
        if cls.begun(folder):
            store = cls(folder, sealed=False)
            differing = differences(store.manifest, manifest)
            if differing:
                raise MismatchError(
                    f"{folder} holds a build of another task: {'; '.join(differing)} differ. "
                    "Choose another folder, or delete this one."
                )
            return store
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder} is not empty and holds no gradindex store. Choose another folder.")
        try:
            (folder / "shards").mkdir(parents=True, exist_ok=True)
            header = {"format": FORMAT, "version": FORMAT_VERSION, "fingerprint": fingerprint(manifest)}
            write_json(folder / _MANIFEST, {**header, **manifest, "sealed": False})
        except OSError as error:
            raise StoreError(f"{folder} cannot be written: {error.strerror}. Choose another folder.") from None
        return cls(folder, sealed=False)

    def finished(self) -> set[int]:
        """Numbers of the shards that are complete."""
        return {number for number in range(len(self.manifest["shards"])) if self._seal_of(number) is not None}

    def write_shard(self, number: int, content: ShardRows) -> None:
        """Write one shard under a temporary name, flush it, rename it, and put its seal beside it.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        path = self._shard_path(number)
        try:
            with replacing(path) as temporary:
                with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
                    file.attrs["fingerprint"] = self.manifest["fingerprint"]
                    for name in ("rows", "ids", "self_influence", "losses"):
                        file.create_dataset(name, data=getattr(content, name))
                    for name, values in content.columns.items():
                        kind = h5py.string_dtype() if values.dtype.kind == "U" else values.dtype
                        data = values.astype(object) if values.dtype.kind == "U" else values
                        file.create_dataset(f"columns/{name}", data=data, dtype=kind)
                seal = {"rows": len(content.ids), "bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
            write_json(path.with_suffix(".json"), seal)
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(f"{path} cannot be written: {reason}. Finished shards are kept.") from None

    def seal(self, build: Mapping[str, Any]) -> None:
        """Gather the shards' seals in the manifest, which completes the store."""
        for number, shard in enumerate(self.manifest["shards"]):
            seal = self._seal_of(number)
            if seal is None:
                raise StoreError(f"{self._shard_path(number)} is missing. Run the same `gradindex build` again.")
            shard.update(seal)
        self.manifest["build"] = dict(build)
        self.manifest["sealed"] = True
        write_json(self.folder / _MANIFEST, self.manifest)

    def write_bases(self, bases: Mapping[tuple[int, int], tuple[NDArray[np.float32], NDArray[np.float32]]]) -> None:
        """Keep what a fitted projection was fitted to, before the first shard.

        Args:
            bases: by (checkpoint, layer), (rows, a) and (columns, b).

        Raises:
            StoreError: the folder cannot be written.
        """
        path = self.folder / _BASES
        try:
            with replacing(path) as temporary:
                with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
                    file.attrs["fingerprint"] = self.manifest["fingerprint"]
                    for (checkpoint, layer), sides in bases.items():
                        for name, side in zip(_SIDES, sides, strict=True):
                            file.create_dataset(f"{checkpoint}/{layer}/{name}", data=side)
                seal = {"bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
            write_json(path.with_suffix(".json"), seal)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror or error}.") from None

    def bases(self) -> dict[tuple[int, int], tuple[NDArray[np.float32], NDArray[np.float32]]] | None:
        """What :meth:`write_bases` kept, or ``None`` where nothing was fitted yet.

        Raises:
            StoreError: it is damaged, or missing beside finished shards.
        """
        if self.manifest["map"]["projection"]["kind"] != "fitted":
            return None
        problem = self._bases_damage()
        if problem and not self.finished():
            return None
        if problem:
            raise StoreError(f"{problem}, and its rows mean nothing without. Restore it from a copy, or build again.")
        with h5py.File(self.folder / _BASES, "r") as file:
            return {
                (int(checkpoint), int(layer)): (sides[_SIDES[0]][:], sides[_SIDES[1]][:])
                for checkpoint, layers in file.items()
                for layer, sides in layers.items()
            }

    def _bases_damage(self) -> str | None:
        path = self.folder / _BASES
        try:
            return _damage(path, json.loads(path.with_suffix(".json").read_text()))
        except (OSError, ValueError, KeyError):
            return f"{path} or its seal is missing"

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Ids (m,) and rows (m, dim), shard by shard in the order of ids."""
        for number in range(len(self.manifest["shards"])):
            with self._shard(number) as file:
                yield file["ids"][:], file["rows"][:]

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(ids), dim) float32 rows in the order of ``ids``."""
        return self._gather("rows", ids)

    def self_influence(self, ids: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """(n_train, C) or (len(ids), C) float64: eta_c ||grad l(w_c; z)||^2; the sum over C is TracInCP(z, z).

        Exact or projected, as the manifest's ``self_influence`` says.
        """
        return self._whole("self_influence") if ids is None else self._gather("self_influence", ids)

    def losses(self, ids: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """(n_train, C) or (len(ids), C) float64 training losses."""
        return self._whole("losses") if ids is None else self._gather("losses", ids)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.manifest["columns"])

    def column(self, name: str, ids: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """The values of a column: (n_train,), or those of ``ids`` in their shape and order."""
        if name not in self.columns:
            raise ArgumentError(f"The store has no column {name!r}. It has: {', '.join(self.columns) or 'none'}.")
        if ids is None:
            return self._whole(f"columns/{name}")
        return self._gather(f"columns/{name}", ids.ravel()).reshape(ids.shape)

    def check_ids(self, ids: NDArray[np.int64]) -> None:
        """Refuse ids that no row has."""
        wrong = ids[(ids < 0) | (ids >= self.n_train)]
        if len(wrong):
            raise ArgumentError(f"There is no training id {wrong[0]}; ids go from 0 to {self.n_train - 1}.")

    def verify(self) -> list[str]:
        """Read every file and compare sizes, checksums and contents.

        Returns:
            One sentence for each problem; empty when the store is sound.
        """
        problems = []
        if self.manifest["map"]["projection"]["kind"] == "fitted":
            damage = self._bases_damage()
            problems += [damage] if damage else []
        with progress("verifying", self.n_train, "rows") as advance:
            for number, shard in enumerate(self.manifest["shards"]):
                path = self._shard_path(number)
                problem = _damage(path, shard)
                if problem is None:
                    with self._shard(number) as file:
                        ids = np.arange(shard["start"], shard["start"] + shard["rows"])
                        if file["rows"].shape != (shard["rows"], self.dim) or not np.array_equal(file["ids"][:], ids):
                            problem = f"{path} holds other rows than the manifest says"
                        elif file.attrs["fingerprint"] != self.manifest["fingerprint"]:
                            problem = f"{path} belongs to another build"
                if problem:
                    problems.append(f"{problem} (ids {shard['start']} to {shard['start'] + shard['rows'] - 1})")
                advance(shard["rows"])
        return problems

    def _gather(self, name: str, ids: NDArray[np.int64]) -> NDArray[Any]:
        self.check_ids(ids)
        starts = np.array([shard["start"] for shard in self.manifest["shards"]])
        owners = np.searchsorted(starts, ids, side="right") - 1
        result: NDArray[Any] | None = None
        for number in np.unique(owners) if len(ids) else [0]:
            mine = np.flatnonzero(owners == number)
            places, back = np.unique(ids[mine] - starts[number], return_inverse=True)
            with self._shard(int(number)) as file:
                values = _text(file[name])[places][back]
            if result is None:
                result = np.empty((len(ids), *values.shape[1:]), values.dtype)
            result[mine] = values
        assert result is not None
        return result.astype(str) if result.dtype == object else result

    def _whole(self, name: str) -> NDArray[Any]:
        parts = []
        for number in range(len(self.manifest["shards"])):
            with self._shard(number) as file:
                part = _text(file[name])[:]
                parts.append(part.astype(str) if part.dtype == object else part)
        return np.concatenate(parts)

    def _shard_path(self, number: int) -> Path:
        return self.folder / "shards" / f"{number:05d}.h5"

    def _shard(self, number: int) -> h5py.File:
        path = self._shard_path(number)
        try:
            return h5py.File(path, "r")
        except OSError as error:
            reason = "is missing" if not path.exists() else f"cannot be read ({str(error)[:80]})"
            raise StoreError(f"{path} {reason}. Run `gradindex verify {self.folder}`, then build again.") from None

    def _seal_of(self, number: int) -> dict[str, Any] | None:
        path = self._shard_path(number)
        try:
            seal: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
            return seal if path.stat().st_size == seal["bytes"] else None
        except (OSError, ValueError, KeyError):
            return None


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over what rows depend on: the canonical JSON of a manifest's ``map`` and ``data``."""
    described = {name: manifest[name] for name in ("map", "data")}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def differences(stored: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two manifests' maps and data, in words."""
    found = [name for name in other["map"] if stored["map"].get(name) != other["map"][name]]
    if "layers" in found and "checkpoints" in found:
        # Rates are listed for the tracked parameters alone, so that other layers always list others.
        files = [[item["sha256"] for item in side["map"]["checkpoints"]] for side in (stored, other)]
        if files[0] == files[1]:
            found.remove("checkpoints")
    if stored["data"]["n_train"] != other["data"]["n_train"]:
        found.append(f"data length ({stored['data']['n_train']} stored, {other['data']['n_train']} now)")
    elif stored["data"] != other["data"]:
        found.append("data")
    found += [name for name in ("columns", "self_influence") if name in other and stored[name] != other[name]]
    return found


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.is_file():
        raise StoreError(
            f"{folder} is not a gradindex store (no {_MANIFEST}). Build one: gradindex build TASK --out DIR."
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError("another format")
        version = int(manifest["version"])
        for name in ("map", "data", "dim", "shards", "columns", "self_influence", "sealed", "fingerprint"):
            manifest[name]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}). Restore it from a copy, or build again elsewhere.") from None
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{folder} has format version {version}, but this gradindex reads up to {FORMAT_VERSION}. "
            "Upgrade gradindex."
        )
    if manifest["fingerprint"] != fingerprint(manifest):
        raise StoreError(f"{path} is damaged (its contents do not match its fingerprint). Restore it from a copy.")
    return manifest


def _text(data: h5py.Dataset) -> Any:
    """A view that gives strings instead of bytes where the data set holds text."""
    return data.asstr() if h5py.check_string_dtype(data.dtype) else data


def _damage(path: Path, seal: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != seal["bytes"]:
        return f"{path} has {path.stat().st_size} bytes instead of {seal['bytes']}"
    return f"{path} has another checksum than when it was written" if sha256(path) != seal["sha256"] else None
