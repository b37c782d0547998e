"""An image folder in ILSVRC layout: its files and classes, reading and preprocessing, and which files are broken."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from gradindex import GradIndexError
from gradindex.files import storing
from gradindex.progress import progress

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
# What PIL turns into RGB without a choice of ours; of 16-bit grey, for one, it would cut off what is bright.
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_CHUNK = 256


class PictureError(GradIndexError, RuntimeError):
    """A file cannot be read: the system says why, and the picture may be sound."""


class BrokenPictureError(GradIndexError, ValueError):
    """A file is no whole picture."""


class Texts(Sequence[str]):
    """Many texts, kept as bytes in one array: Python objects would be copied into every process that reads.

    Args:
        table: (m,) bytes, encoded as file names are.
        places: (n,) which of these are meant, by default all in turn.
    """

    def __init__(self, table: NDArray[np.bytes_], places: NDArray[np.int64] | None = None) -> None:
        self._table, self._places = table, places

    def __len__(self) -> int:
        return len(self._table if self._places is None else self._places)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return os.fsdecode(bytes(self._table[place if self._places is None else self._places[place]]))


@dataclass(frozen=True)
class Files:
    """The pictures of a split, ordered by class and name; a position in this order is an id.

    Args:
        root: of the image folder.
        names: (n,) bytes, paths below ``root``.
        labels: (n,) int64.
    """

    root: Path
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """A path below the root."""
        return os.fsdecode(bytes(self.names[i]))


@dataclass(frozen=True)
class Preparation:
    """How a file becomes what the network sees: shorter side to ``resize``, centre crop, as torchvision does it.

    Args:
        resize: pixels of the shorter side.
        crop: pixels of the square.
        upright: turn the picture as its EXIF tag says, which torchvision's loaders do not.
    """

    resize: int = 256
    crop: int = 224
    upright: bool = False

    def __call__(self, path: Path) -> NDArray[np.uint8]:
        """The picture in a file, (3, crop, crop) RGB.

        Raises:
            BrokenPictureError: it is none, or not whole.
            PictureError: the file cannot be read.
        """
        image = decoded(path, upright=self.upright)
        width, height = image.size
        if width <= height:
            size = (self.resize, int(self.resize * height / width))
        else:
            size = (int(self.resize * width / height), self.resize)
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (round((side - self.crop) / 2) for side in size)
        image = image.crop((left, top, left + self.crop, top + self.crop))
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def decoded(path: Path, *, upright: bool = False, coarse: bool = False) -> Image.Image:
    """The whole picture in a file as RGB, whatever its colours; ``coarse`` in an eighth of its size where that is fast.

    Raises:
        BrokenPictureError: it is none, or not whole.
        PictureError: the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            if coarse:
                image.draft(None, (1, 1))
            image.load()
            if image.mode not in _MODES:
                raise BrokenPictureError(
                    f"{path} has pixels of type {image.mode}, but must be in 8-bit colours or grey."
                )
            turned = ImageOps.exif_transpose(image) if upright else image
            if "transparency" in turned.info:
                turned = turned.convert("RGBA")
            return turned.convert("RGB")
    except GradIndexError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # PIL's parsers raise all kinds of errors on damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise PictureError(f"{path} cannot be read: {error.strerror}. Check the file and its disk.") from None
        reason = str(error).replace(f" {str(path)!r}", "")
        raise BrokenPictureError(f"{path} cannot be decoded: {reason or type(error).__name__}.") from None


class Pictures(Dataset[tuple[NDArray[np.uint8], int]]):
    """Prepared pictures and their labels."""

    def __init__(self, files: Files, prepare: Preparation) -> None:
        self.files, self.prepare = files, prepare

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        # Bytes and not tensors: a tensor takes an open file of the process that gets it from another.
        return self.prepare(self.files.root / self.files.name(i)), int(self.files.labels[i])


def find_classes(root: Path) -> list[str]:
    """The synsets: names of the folders below ``train``, in order, with pictures or without."""
    return _entries(root / "train", folders=True)


def list_files(root: Path, split: str, classes: Sequence[str], labels: Path | None = None) -> Files:
    """The pictures of a split.

    Args:
        root: of the image folder.
        split: ``"train"`` or ``"val"``.
        classes: the synsets by label.
        labels: of a flat folder, a text file with a picture's name and its synset in each line, such as
            ``LOC_val_solution.csv``.

    Raises:
        PictureError: a folder cannot be read, holds no pictures, or has a class that there is not.
    """
    numbers = {name: label for label, name in enumerate(classes)}
    folder = root / split
    found: list[tuple[int, str]] = []
    if labels is not None:
        synsets = _read_labels(labels)
        for name in _entries(folder):
            synset = synsets.get(name) or synsets.get(Path(name).stem)
            if synset not in numbers:
                problem = "has no line" if synset is None else f"has the class {synset}, for which train has no folder,"
                raise PictureError(f"{folder / name} {problem} in {labels}. Give a file with a line for each picture.")
            found.append((numbers[synset], f"{split}/{name}"))
    else:
        for synset in _entries(folder, folders=True):
            if synset not in numbers:
                raise PictureError(f"{folder / synset} is a class for which {root / 'train'} has no folder. Make one.")
            found += [(numbers[synset], f"{split}/{synset}/{name}") for name in _entries(folder / synset)]
        if not found and _entries(folder):
            raise PictureError(
                f"{folder} holds pictures beside each other, whose classes are unknown. "
                "Give their labels (--val-labels)."
            )
    if not found:
        raise PictureError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}). Give the folder above train and val.")
    return Files(
        root,
        np.array([os.fsencode(name) for _, name in found], dtype=np.bytes_),
        np.array([label for label, _ in found], dtype=np.int64),
    )


def _entries(folder: Path, folders: bool = False) -> list[str]:
    """Names of the pictures, or of the folders, in a folder, in order."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and (entry.is_dir() if folders else entry.name.lower().endswith(SUFFIXES) and entry.is_file())
            )
    except OSError as error:
        raise PictureError(f"{folder} cannot be read: {error.strerror}. Give the folder above train and val.") from None


def read_names(path: Path, classes: Sequence[str]) -> list[str]:
    """What to call the classes, from lines such as ``n01440764 tench, Tinca tinca``: the first name of each.

    Raises:
        PictureError: the file cannot be read, or names none of them.
    """
    found = {}
    for line in _lines(path):
        synset, _, names = re.sub(r"\s+", " ", line.strip()).partition(" ")
        found[synset] = names.partition(",")[0]
    if not any(synset in found for synset in classes):
        raise PictureError(
            f"{path} names none of the {len(classes)} classes. Its lines must look like: n01440764 tench."
        )
    return [found.get(synset) or synset for synset in classes]


def _read_labels(path: Path) -> dict[str, str]:
    pairs = [re.split(r"[,\s]+", line.strip())[:2] for line in _lines(path) if line.strip()]
    if not pairs or any(len(pair) < 2 for pair in pairs):
        raise PictureError(
            f"{path} must have a picture's name and its synset in each line. The numbers of ILSVRC's own ground truth "
            "do not do: they are not in the order of synsets."
        )
    return {pair[0]: pair[1] for pair in pairs}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {error.strerror}. Check the path.") from None
    except UnicodeDecodeError:
        raise PictureError(f"{path} is no text in UTF-8. Check the path.") from None


def find_broken(files: Files, record: Path, workers: int) -> dict[int, str]:
    """Decode every picture once and say which are broken, and why.

    What is done is written to ``record``, a line of JSON for each 256 files, and not done again; but where some
    were broken, that is looked at once more, for they may have been replaced.

    Raises:
        PictureError: a file cannot be read; what was found before is kept.
    """
    known = _recorded(files, record)
    starts = [start for start in range(0, len(files), _CHUNK) if known.get(start) != {}]
    done = len(files) - sum(min(_CHUNK, len(files) - start) for start in starts)
    checks: DataLoader[Any] = DataLoader(_Checks(files, starts), batch_size=None, num_workers=workers)
    with storing(record):
        record.parent.mkdir(parents=True, exist_ok=True)
        _end_line(record)
    with (
        storing(record),
        record.open("a") as out,
        progress("checking pictures", len(files), "pictures", done) as advance,
    ):
        for start, found in zip(starts, checks, strict=True):
            if isinstance(found, GradIndexError):
                raise found
            if known.get(start) != found:
                print(
                    json.dumps({"start": start, "files": _digest(files, start), "broken": found}), file=out, flush=True
                )
            known[start] = found
            advance(min(_CHUNK, len(files) - start))
    return _positions(files, known)


def _end_line(record: Path) -> None:
    """End the line that a killed process did not."""
    with record.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")


def recorded_broken(files: Files, record: Path) -> dict[int, str] | None:
    """What :func:`find_broken` found, or ``None`` where it has not finished."""
    known = _recorded(files, record)
    return _positions(files, known) if len(known) == len(range(0, len(files), _CHUNK)) else None


def _recorded(files: Files, record: Path) -> dict[int, dict[str, str]]:
    """Broken files and reasons by the first position of 256 files, as far as these are still the same."""
    known: dict[int, dict[str, str]] = {}
    for line in record.read_text().splitlines() if record.is_file() else ():
        try:
            entry = json.loads(line)
            if entry["files"] == _digest(files, entry["start"]):
                known[entry["start"]] = entry["broken"]
        except (ValueError, KeyError, TypeError):  # a line that a killed process did not end
            continue
    return known


def _digest(files: Files, start: int) -> str:
    return hashlib.sha256(b"\0".join(files.names[start : start + _CHUNK].tolist())).hexdigest()[:16]


def _positions(files: Files, known: dict[int, dict[str, str]]) -> dict[int, str]:
    return {
        i: found[name]
        for start, found in sorted(known.items())
        if found
        for i in range(start, min(start + _CHUNK, len(files)))
        if (name := files.name(i)) in found
    }


class _Checks(Dataset[Any]):
    """For each of some starts, the broken ones among the 256 files from there on, or what the system says."""

    def __init__(self, files: Files, starts: Iterable[int]) -> None:
        self._files, self._starts = files, list(starts)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: int) -> dict[str, str] | PictureError:
        start = self._starts[place]
        try:
            return dict(self._broken(range(start, min(start + _CHUNK, len(self._files)))))
        except PictureError as error:  # handed on, for what a worker raises arrives wrapped in its traceback
            return error

    def _broken(self, positions: Iterable[int]) -> Iterator[tuple[str, str]]:
        for i in positions:
            path = self._files.root / self._files.name(i)
            try:
                decoded(path, coarse=True)
            except BrokenPictureError as error:
                yield self._files.name(i), str(error).removeprefix(f"{path} ")
