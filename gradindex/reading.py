"""Reading training examples, here or in other processes, with errors that name the example."""

from __future__ import annotations

import functools
import io
import multiprocessing
import pickle
import tarfile
import traceback
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import GradIndexError, TaskError, UserCodeError, WorkerError, user_code
from .examples import Examples, read_example
from .importing import import_file, task_files
from .task import Task

# Arrays of a batch share one block of memory, each at a multiple of this, as kernels like it.
_ALIGNED = 64
# How far attributes of a data set are followed to find what cannot be handed on.
_DEPTH, _MOST_LOOKED_AT = 5, 1000


def read(task: Task, ids: NDArray[np.int64], batch_size: int, workers: int) -> Iterator[Examples]:
    """Training examples in the order of ``ids``, ``batch_size`` at a time.

    Args:
        task: whose they are.
        ids: (m,) which.
        batch_size: how many at once.
        workers: processes that read ahead; 0 reads in this one.

    Raises:
        UserCodeError: the data set raised; names the example.
        TaskError: the data set cannot be handed to other processes; names the part of it.
        WorkerError: a process died.
    """
    pieces = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    if not workers:
        for piece in pieces:
            yield task.read(piece)
        return
    if multiprocessing.get_start_method() == "fork":
        _check_no_shared_file(task.train)
    with reading_processes():
        loader = DataLoader(_ByPlace(task, ids), batch_size, collate_fn=_pack, num_workers=workers)
        for piece, packed in zip(pieces, loader, strict=True):
            items = _unpack(packed)
            for item in items:
                if isinstance(item, GradIndexError):
                    raise item
            yield Examples.training(piece, items)


@contextmanager
def reading_processes() -> Iterator[None]:
    """What torch raises for a reading process that died becomes one line.

    Torch learns of a death by a signal, and raises wherever this process is at that moment: so whatever uses what
    :func:`read` hands out belongs into this block as well.

    Raises:
        WorkerError: a process died.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not said.startswith("DataLoader worker"):
            raise
        if "Bus error" in said:
            way = "There is too little shared memory: raise it (docker run --shm-size), or use workers=0"
        else:
            way = "If memory ran out, use fewer workers or a smaller batch_size"
            if multiprocessing.get_start_method() != "fork":
                way += "; a script needs `if __name__ == '__main__':` around what it does, for they import it"
        raise WorkerError(
            f"A process that reads training examples died ({' '.join(said.split())[:200]}). {way}."
        ) from None


class _ByPlace(Dataset[Any]):
    """Training examples by their place among ids; an error comes in the place of its example.

    For what a worker raises arrives wrapped in its traceback, and a ``StopIteration`` would end the loop.
    """

    def __init__(self, task: Task, ids: NDArray[np.int64]) -> None:
        self._train, self._ids = task.train, ids
        self._sent: tuple[bytes, Mapping[str, Path]] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: int) -> Any:
        try:
            if self._sent is not None:
                self._train, self._sent = _received(*self._sent), None
            return read_example(self._train, int(self._ids[place]), "training")
        except GradIndexError as error:
            return _with_traceback(error)

    def __getstate__(self) -> tuple[tuple[bytes, Mapping[str, Path]], NDArray[np.int64]]:
        """For a process that is not forked: the data set is unpacked at the first example, where errors can be told."""
        try:
            sent = bytes(ForkingPickler.dumps(self._train))
        except Exception as error:  # whatever a class of the user's raises
            raise _cannot_be_sent(self._train, error) from error
        return (sent, task_files()), self._ids

    def __setstate__(self, state: tuple[tuple[bytes, Mapping[str, Path]], NDArray[np.int64]]) -> None:
        self._sent, self._ids = state


def _received(sent: bytes, files: Mapping[str, Path]) -> Any:
    with user_code(
        "Handing the data set to a reading process",
        "Define its class in a file that can be imported, or read in this process (workers=0).",
    ):
        return _Unpickler(io.BytesIO(sent), files).load()


class _Unpickler(pickle.Unpickler):
    """Finds classes of task files, which are no modules that ``import`` finds."""

    def __init__(self, file: io.BytesIO, files: Mapping[str, Path]) -> None:
        super().__init__(file)
        self._files = files

    def find_class(self, module: str, name: str, /) -> Any:
        if module in self._files:
            import_file(self._files[module], module)
        return super().find_class(module, name)


def _with_traceback(error: GradIndexError) -> GradIndexError:
    """Causes are lost on the way between processes; a note (Python 3.11) is not."""
    if error.__cause__ is not None and hasattr(error, "add_note"):
        error.add_note("In a reading process:\n" + "".join(traceback.format_exception(error.__cause__)))
    return error


# A batch on its way: the pickle, where its arrays lie in the block, and the block.
_Packed = tuple[bytes, list[tuple[int, int]], Tensor]


def _pack(items: list[Any]) -> _Packed:
    """Items as one pickle and one block of shared memory: torch itself would open a file for each tensor."""
    try:
        return _packed(items)
    except Exception:  # whatever an item's own class raises
        return _packed([_sendable(item) for item in items])


def _sendable(item: Any) -> Any:
    try:
        _packed([item])
    except Exception as error:  # as above
        return UserCodeError(
            f"An example of train cannot be sent from a reading process: {_said(error)}. "
            "Return tensors, arrays, pictures, numbers and texts from __getitem__, or read in this process (workers=0)."
        )
    return item


def _packed(items: list[Any]) -> _Packed:
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, buffers).dump(items)
    places, end = [], 0
    for buffer in buffers:
        places.append((end, buffer.raw().nbytes))
        end += -(-places[-1][1] // _ALIGNED) * _ALIGNED
    block = torch.empty(end, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    memory = block.numpy()
    for (start, size), buffer in zip(places, buffers, strict=True):
        memory[start : start + size] = np.frombuffer(buffer.raw(), dtype=np.uint8)
    return file.getvalue(), places, block


def _unpack(packed: _Packed) -> list[Any]:
    data, places, block = packed
    memory = block.numpy()
    items: list[Any] = pickle.loads(data, buffers=[memory[start : start + size] for start, size in places])
    return items


class _Pickler(pickle.Pickler):
    """Pickles items with the contents of arrays and of plain tensors beside the pickle."""

    def __init__(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer]) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)

    def reducer_override(self, value: Any) -> Any:
        plain = type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.requires_grad or value.is_quantized or value.is_conj() or value.is_neg():
            return NotImplemented
        order = sorted(range(value.dim()), key=lambda axis: -value.stride(axis))
        dense = value.permute(order).contiguous()  # keeps the order in memory, such as channels last
        return _tensor, (dense.reshape(-1).view(torch.uint8).numpy(), value.dtype, dense.shape, order)


def _tensor(memory: NDArray[np.uint8], dtype: torch.dtype, shape: torch.Size, order: list[int]) -> Tensor:
    dense = torch.from_numpy(memory).view(dtype).reshape(shape)
    return dense.permute([order.index(axis) for axis in range(len(order))])


def _cannot_be_sent(data: Any, error: Exception) -> TaskError:
    """Names the part of a data set that a process that is not forked cannot have."""
    name, value, reason = _unpicklable(data, "train", _DEPTH) or ("train", data, _said(error))
    what = f"a {type(value).__name__}"
    way = "Make it when the first example is read"
    if callable(value) and hasattr(value, "__qualname__"):
        code = getattr(value, "__code__", None)
        place = f" ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code else ""
        kind = "lambda" if value.__name__ == "<lambda>" else "class" if isinstance(value, type) else "function"
        what = f"a {kind}{place}" if kind == "lambda" else f"the {kind} {value.__qualname__}{place}"
        way = "Write it as a function (def) at the top level of a file"
    elif "local object" in reason:
        way = "Define its class at the top level of a file"
    elif isinstance(value, io.IOBase) or type(value).__module__.startswith("h5py"):
        way = "Open it when the first example is read"
    return TaskError(
        f"{name} is {what}, which cannot be handed to reading processes that are not forked ({reason}). {way}, "
        "or read in this process (workers=0), or start with multiprocessing.set_start_method('fork')."
    )


def _unpicklable(value: Any, name: str, depth: int) -> tuple[str, Any, str] | None:
    """The innermost part that cannot be pickled, found by trying: its name, itself, and why; ``None`` if all can."""
    try:
        _Pickler(_Nowhere(), _NoBuffers()).dump(value)
    except Exception as error:  # whatever a class of the user's raises
        if depth:
            for part, inner in _parts(value, name):
                innermost = _unpicklable(inner, part, depth - 1)
                if innermost is not None:
                    return innermost
        return name, value, _said(error)
    return None


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:150]


class _Nowhere(io.BytesIO):
    def write(self, data: Any, /) -> int:
        return len(data)


class _NoBuffers(list[pickle.PickleBuffer]):
    def append(self, buffer: pickle.PickleBuffer, /) -> None:
        pass


def _parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Attributes and elements of a value, by what a person would write."""
    if isinstance(value, Mapping):
        parts = [(f"{name}[{key!r}]", inner) for key, inner in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(f"{name}[{place}]", inner) for place, inner in enumerate(value)]
    elif isinstance(value, functools.partial):
        parts = [(f"{name}.func", value.func), (f"{name}.args", value.args), (f"{name}.keywords", value.keywords)]
    else:
        parts = [(f"{name}.{key}", inner) for key, inner in getattr(value, "__dict__", {}).items()]
    yield from parts[:_MOST_LOOKED_AT]


def _check_no_shared_file(data: Any) -> None:
    """Refuse a data set with an open file: forked processes share its position, and would read each other's bytes.

    Raises:
        TaskError: names the file.
    """
    level = [("train", data)]
    for _ in range(_DEPTH):
        for name, value in level:
            if _has_position(value):
                raise TaskError(
                    f"{name} is an open file, whose position reading processes would share, so that each would get "
                    "bytes that another asked for. Open it when the first example is read, or read in this process "
                    "(workers=0)."
                )
        level = [part for name, value in level for part in _parts(value, name)][:_MOST_LOOKED_AT]


def _has_position(value: Any) -> bool:
    """Whether a value reads from a file of the operating system that is open."""
    if isinstance(value, (zipfile.ZipFile, tarfile.TarFile)):
        value = value.fp if isinstance(value, zipfile.ZipFile) else value.fileobj
    if not isinstance(value, io.IOBase) or isinstance(value, (io.BytesIO, io.StringIO)) or value.closed:
        return False
    try:
        return value.fileno() > 2
    except (OSError, AttributeError):
        return False
