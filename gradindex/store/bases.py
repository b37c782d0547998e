"""The bases of a fitted projection: kept in the store, because rows mean nothing without them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from ..files import read_checked
from .container import Container, writing
from .forms import check_container

# By (checkpoint, layer): what was fitted to the output gradients (d_out, a) and to the activations (d_in, b).
Bases = dict[tuple[int, int], tuple[NDArray[np.float32], NDArray[np.float32]]]

_SIDES = ("output_gradients", "activations")


def digest_of_bases(bases: Mapping[tuple[int, int], tuple[NDArray[np.float32], NDArray[np.float32]]]) -> str:
    """What a map names bases by: the digest of their content."""
    return _digest(_arrays(bases))


def write_bases(folder: Path, bases: Mapping[tuple[int, int], tuple[NDArray[np.float32], NDArray[np.float32]]]) -> str:
    """Keep bases under a name of their own content; returns its digest, for the map.

    Raises:
        OSError: they cannot be written.
    """
    arrays = _arrays(bases)
    digest = _digest(arrays)
    specs = {name: (array.shape, "<f4") for name, array in arrays.items()}
    with writing(_path(folder, digest), specs, {}, {}) as writer:
        for name, array in arrays.items():
            writer.put(name, 0, array)
    return digest


def read_bases(folder: Path, digest: str) -> Bases:
    """The bases with this digest.

    Raises:
        StoreError: missing or damaged.
    """
    path = _path(folder, digest)
    try:
        seal = read_checked(path.with_suffix(".json"))
        check_container(seal)
        container = Container(path, seal)
        if any(container.spec(name)[1] != "<f4" or len(container.spec(name)[0]) != 2 for name in container.names()):
            raise ValueError("it holds other arrays than bases")
        arrays = {name: np.array(container.view(name)) for name in container.names()}
        if _digest(arrays) != digest:
            raise ValueError("they are not those that the rows were made with")
        bases: Bases = {}
        for c, layer in sorted({(int(name.split("/")[0]), int(name.split("/")[1])) for name in arrays}):
            bases[c, layer] = arrays[f"{c}/{layer}/{_SIDES[0]}"], arrays[f"{c}/{layer}/{_SIDES[1]}"]
    except (OSError, ValueError, LookupError, StoreError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise StoreError(
            f"{path} {reason}, and rows mean nothing without it. Restore it from a copy, or build again."
        ) from None
    return bases


def base_files(digest: str) -> set[str]:
    """Names of the files of these bases."""
    return {_path(Path(), digest).with_suffix(suffix).name for suffix in (".h5", ".json")}


def _path(folder: Path, digest: str) -> Path:
    return folder / f"bases-{digest[:16]}.h5"


def _arrays(
    bases: Mapping[tuple[int, int], tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> dict[str, NDArray[np.float32]]:
    return {
        f"{checkpoint}/{layer}/{name}": np.ascontiguousarray(side, dtype="<f4")
        for (checkpoint, layer), sides in sorted(bases.items())
        for name, side in zip(_SIDES, sides, strict=True)
    }


def _digest(arrays: Mapping[str, NDArray[np.float32]]) -> str:
    state = hashlib.sha256()
    for name in sorted(arrays):
        state.update(f"{name} {arrays[name].shape}\n".encode())
        state.update(np.ascontiguousarray(arrays[name]).tobytes())
    return state.hexdigest()
