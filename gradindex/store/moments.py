"""Second moments of a store's rows, checkpoint by checkpoint: made in one pass, and kept true by what changes alone.

They lie beside the shards, and say of which rows they are, so that whoever reads them adds the rows that came since and
takes off those that went.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from ..files import discard, is_there, read_checked, storing
from . import runs
from .container import Container, writing
from .documents import MOMENTS
from .forms import check_moments

if TYPE_CHECKING:
    from .reader import GradientStore

_WEIGHTED, _PLAIN, _SUMS = "weighted", "plain", "sums"
WHOLE, PART = re.compile(r"all-(\d{6})\.json"), re.compile(r"part-(\d+)-of-(\d+)-(\d{6})\.json")


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows r, for each checkpoint's block of d numbers.

    Args:
        count: how many rows.
        weighted: (C, d, d) float64, the sum of r r^T / ||r||; rows of zeros count nothing.
        plain: (C, d, d) float64, the sum of r r^T.
        sums: (C, d) float64, the sum of r.
    """

    count: int
    weighted: NDArray[np.float64]
    plain: NDArray[np.float64]
    sums: NDArray[np.float64]

    @classmethod
    def none(cls, n_checkpoints: int, dim: int) -> Moments:
        """Of no rows, with ``dim`` numbers a checkpoint."""
        shape = (n_checkpoints, dim, dim)
        return cls(0, np.zeros(shape), np.zeros(shape), np.zeros(shape[:2]))

    def plus(self, rows: NDArray[np.float32], sign: int = 1) -> Moments:
        """With some rows (m, C d) more, or with ``sign`` -1 without them; the arrays are changed in place."""
        blocks = rows.reshape(len(rows), len(self.sums), -1)
        for checkpoint, (weighted, plain, sums) in enumerate(zip(self.weighted, self.plain, self.sums, strict=True)):
            # In float64, for a whitened query is long where there are no rows, and finds what rounding leaves there. A
            # matrix times its own transpose takes half of the products.
            block = blocks[:, checkpoint].astype(np.float64)
            sums += sign * block.sum(0)
            plain += sign * (block.T @ block)
            lengths = np.sqrt(np.einsum("md,md->m", block, block))
            block /= np.sqrt(np.where(lengths > 0, lengths, 1))[:, None]
            weighted += sign * (block.T @ block)
        return Moments(self.count + sign * len(rows), self.weighted, self.plain, self.sums)

    def joined(self, other: Moments) -> Moments:
        """Of the rows of both."""
        return Moments(
            self.count + other.count, self.weighted + other.weighted, self.plain + other.plain, self.sums + other.sums
        )

    def beside(self, later: Moments) -> Moments:
        """Of the same rows with further checkpoints."""
        both = ((getattr(self, name), getattr(later, name)) for name in (_WEIGHTED, _PLAIN, _SUMS))
        return Moments(self.count, *(np.concatenate(pair) for pair in both))


def problem_of_moments(store: GradientStore) -> str | None:
    """What is wrong with the files of a store's moments, if anything is: every block is compared with its checksum."""
    home = home_of(store)
    for path in sorted(home.glob("*.json")) if is_there(home) else []:
        try:
            _read(path)
        except (OSError, ValueError, StoreError) as error:
            return f"{path} is damaged ({error}). Make it anew: gradindex whiten {store.folder}."
    return None


def home_of(store: GradientStore) -> Path:
    """Where a store has its moments."""
    return store.folder / MOMENTS


def described_rows(store: GradientStore, ids: runs.Runs) -> dict[str, Any]:
    """Which rows of a store moments are of, as their seal says."""
    return {"map": store.manifest.fingerprint, "ids": runs.as_runs(ids).tolist(), "covers": store.origins}


def save(store: GradientStore, stem: str, found: Moments, ids: runs.Runs) -> None:
    """Write them under a new name, then take the former ones away."""
    home = home_of(store)
    with storing(home):
        home.mkdir(exist_ok=True)
        former = sorted(path for path in home.iterdir() if path.name.startswith(f"{stem}-") and path.suffix == ".json")
    number = int(former[-1].stem[-6:]) + 1 if former else 1
    dim = found.sums.shape[1]
    down, across = np.tril_indices(dim)
    arrays = {_WEIGHTED: found.weighted[:, down, across], _PLAIN: found.plain[:, down, across], _SUMS: found.sums}
    specs = {name: (array.shape, "<f8") for name, array in arrays.items()}
    with writing(home / f"{stem}-{number:06d}.h5", specs, {}, described_rows(store, runs.as_runs(ids))) as writer:
        for name, array in arrays.items():
            writer.put(name, 0, array)
    discard(*(each for path in former for each in (path, path.with_suffix(".h5"))))


def kept_as(store: GradientStore, stem: str) -> tuple[Moments, dict[str, Any]] | None:
    """What was kept last and is of use: of rows that the store has, or had and still holds."""
    home = home_of(store)
    if not is_there(home):
        return None
    found = sorted(path for path in home.iterdir() if path.name.startswith(f"{stem}-") and path.suffix == ".json")
    return of_use(store, found[-1]) if found else None


def of_use(store: GradientStore, path: Path) -> tuple[Moments, dict[str, Any]] | None:
    """What a file holds, if it is whole and of rows that the store has, or had and still holds."""
    try:
        about = read_checked(path)
        check_moments(about)
        if about["map"] != store.manifest.fingerprint or not _has(store, about):
            return None
        return _read(path)
    except (OSError, ValueError, StoreError):
        return None


def _read(path: Path) -> tuple[Moments, dict[str, Any]]:
    about = read_checked(path)
    check_moments(about)
    container = Container(path.with_suffix(".h5"), about)
    weighted, plain, sums = (np.array(container.view(name)) for name in (_WEIGHTED, _PLAIN, _SUMS))
    dim = sums.shape[1]
    down, across = np.tril_indices(dim)
    whole = []
    for triangle in (weighted, plain):
        matrix = np.zeros((len(sums), dim, dim))
        matrix[:, down, across] = matrix[:, across, down] = triangle
        whole.append(matrix)
    return Moments(runs.count(about["ids"]), whole[0], whole[1], sums), about


def _has(store: GradientStore, about: Mapping[str, Any]) -> bool:
    """Whether the store holds all rows that moments are of, and they are the same rows."""
    held = [run for number in range(len(store.manifest.shards)) for run in store.shard_runs(number)]
    known = runs.of_same_origin(store.origins, about["covers"])
    return not runs.count(runs.without(about["ids"], held)) and not runs.count(runs.without(about["ids"], known))
