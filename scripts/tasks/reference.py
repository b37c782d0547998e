"""What the reference tasks share: where data and trained checkpoints are, stand-ins, decoding, label flips."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import stand_in
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def data_folder() -> Path:
    """The folder with the archives: ``GRADINDEX_DATA``, by default ``../shared/data`` beside the checkout."""
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    return Path(os.environ.get("GRADINDEX_DATA", default))


STAND_INS: list[str] = []
"""What stands in for what, in this process."""


def quick() -> bool:
    """Whether the quick form of a script is running: tasks are small and kept apart, absent data have stand-ins."""
    return "GRADINDEX_QUICK" in os.environ


def cache_folder() -> Path:
    """Where trained checkpoints and the like are kept: ``GRADINDEX_CACHE``, by default ``~/.cache/gradindex``.

    The quick form of a script has a folder of its own (``GRADINDEX_QUICK``), so that nothing of it is taken for
    the real thing.
    """
    return Path(os.environ["GRADINDEX_QUICK"]) if quick() else _lasting_folder()


def _lasting_folder() -> Path:
    return Path(os.environ.get("GRADINDEX_CACHE", Path.home() / ".cache" / "gradindex"))


def data_file(name: str) -> Path:
    """A table of the data folder; in the quick form a stand-in where it is not there."""
    path = data_folder() / name
    if path.is_file() or not quick():
        return path
    made = cache_folder() / name
    _say(f"made-up rows stand in for {name}, which is not in {data_folder()}")
    getattr(stand_in, made.stem)(made)
    return made


def _say(what: str) -> None:
    if what not in STAND_INS:
        STAND_INS.append(what)
        print(f"quick: {what}", file=sys.stderr, flush=True)


def image_archive(name: str) -> Arrays:
    """Decode ``<name>.tar.xz`` (``train/<class>/*``, ``test/<class>/*``) once, then map it.

    The quick form has digits in place of CIFAR-10, and of MNIST where it is not there.

    Returns:
        ``train_images``, ``test_images`` uint8 (n, h, w) or (n, h, w, 3), ``train_labels``,
        ``test_labels`` int64 (n,), ordered by the path inside the archive, and ``classes``,
        the names of the labels.

    Raises:
        FileNotFoundError: the archive is not there; names the variable to set.
    """
    keys = ["classes"] + [f"{part}_{what}" for part in ("train", "test") for what in ("images", "labels")]
    archive, cached = data_folder() / f"{name}.tar.xz", _lasting_folder() / "data" / name
    if quick() and (name != "mnist" or not (cached.is_dir() or archive.is_file())):
        why = "is not there" if name == "mnist" else "takes long to decode"
        _say(f"digits stand in for {name}.tar.xz, which {why}")
        return stand_in.images(name)
    if not cached.is_dir():
        if not archive.is_file():
            raise FileNotFoundError(
                f"{archive} does not exist. Set GRADINDEX_DATA to the folder that holds {archive.name}."
            )
        once(cached, lambda folder: _decode(archive, folder))
    return {key: np.load(cached / f"{key}.npy", mmap_mode="r") for key in keys}


def _decode(archive: Path, folder: Path) -> None:
    from PIL import Image

    print(f"decoding {archive} once", file=sys.stderr)
    images: dict[str, tuple[str, NDArray[np.uint8]]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            part = Path(member.name).parts
            if not member.isfile() or len(part) < 3:
                continue
            content = tar.extractfile(member)
            assert content is not None
            images[member.name.removeprefix("./")] = (part[-2], np.asarray(Image.open(io.BytesIO(content.read()))))
    classes = sorted({label for label, _ in images.values()})
    np.save(folder / "classes.npy", np.array(classes))
    for split in ("train", "test"):
        chosen = [images[name] for name in sorted(images) if name.startswith(f"{split}/")]
        np.save(folder / f"{split}_images.npy", np.stack([image for _, image in chosen]))
        np.save(folder / f"{split}_labels.npy", np.array([classes.index(label) for label, _ in chosen], dtype=np.int64))


class BusyError(Exception):
    """Another process fills that folder just now."""


def resumable(folder: Path, fill: Callable[[Path], None], wait: bool = True) -> Path:
    """Call ``fill`` on a folder and rename it to ``folder``; do nothing where ``folder`` is there.

    Processes take turns; ``fill`` finds what an interrupted call left.

    Raises:
        BusyError: another process is at it, and ``wait`` is false.
    """
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    with unfinished.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BusyError(folder.name) from error
        if not folder.is_dir():  # another process may have been faster
            unfinished.mkdir(exist_ok=True)
            fill(unfinished)
            unfinished.rename(folder)
        elif unfinished.is_dir():
            unfinished.rmdir()
    return folder


def once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """As :func:`resumable`, but ``fill`` begins with an empty folder."""

    def anew(unfinished: Path) -> None:
        for left in unfinished.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        fill(unfinished)

    return resumable(folder, anew)


def flip_labels(
    labels: NDArray[np.int64], share: float, classes: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Give a share of the examples a uniformly random other label.

    Returns:
        The labels (n,) int64 and which of them were flipped (n,) bool.
    """
    generator = np.random.default_rng(seed)
    flipped = np.zeros(len(labels), dtype=bool)
    flipped[generator.permutation(len(labels))[: round(share * len(labels))]] = True
    shifts = generator.integers(1, classes, size=len(labels))
    return np.where(flipped, (labels + shifts) % classes, labels).astype(np.int64), flipped
