"""What a user brings: a model, its losses, its data and its checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from .checkpoint import Checkpoint
from .choices import PRECONDITIONERS, Preconditioner
from .columns import Column, columns_by_name, positions_of
from .digests import digest
from .errors import ArgumentError, TaskError, user_code
from .examples import Examples, read_example
from .importing import import_by_name
from .losses import name_of
from .registry import Registry
from .tree import preserved_random_state
from .unwrapping import unwrapped

# What ``preconditioner`` names, see gradindex/gradients/geometry.py; here, so that a name is checked where it is given.
GEOMETRIES: Registry[Any] = Registry("preconditioner", PRECONDITIONERS)

Arrays = dict[str, NDArray[Any]]
Loss = Callable[[nn.Module, Any], Tensor]
# As ``query_loss``: the training loss, with the final model's own answers as labels.
PREDICTED: Final = "predicted"

_READ_TWICE = 8
_SAMPLED = 64
_PIECE = 8192


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """A trained model and everything that its gradients depend on.

    Args:
        model: the model; its current weights are never changed.
        loss: ``loss(model, batch) -> (batch,)``, the training loss of each example
            (``reduction="none"``), before any mean or weight decay.
        train: the training examples, a map-style data set without random augmentation;
            the position of an example is its id.
        checkpoints: from training, see :func:`find_checkpoints`; one alone needs no list.
        query: the examples to ask about, usually a test set; by default none, and queries
            come from ``train``.
        query_loss: the function of a query whose change scores explain; by default ``loss``. ``"predicted"`` explains
            the final model's own answer: ``loss`` with what the last checkpoint says as labels, at every checkpoint.
            Losses of :mod:`gradindex.losses` can do that, and any that has ``predictions(model, batch)``, an answer
            (a tensor) for each example, and ``relabelled(batch, predictions)``, a batch with these as labels.
        layers: which parameters are tracked: names or patterns of modules (all parameters at
            or below) or of parameters, frozen or not. ``"*"`` is every parameter. By default
            those that were trained: the ones that :class:`Recorder` saw the optimizer step, and for other
            checkpoints the ones with ``requires_grad`` in ``model``.
        preconditioner: ``"adam"`` weighs each parameter by D = 1 / (sqrt(v) + 1e-8), with v the second
            moments that ``Recorder(second_moments=True)`` saved: D^(1/2) on both sides (remark 3.4
            of Pruthi et al. 2020). By default none, as for plain gradient descent.
        columns: by name, one value for each training example (numbers, booleans, texts or dates), such as
            ``{"label": labels}``; stored with the rows and shown with the answers. Values are matched to examples by
            position, whatever container holds them; :mod:`gradindex.columns` says how dates and missing values are
            stored.
        query_columns: the same for ``query``.
        show: ``show(item)`` returns how to display an item: a picture (an array
            (h, w) or (h, w, 3), or PIL), a text, or a mapping (a table row).
        collate: turns a list of items into a batch; by default torch's ``default_collate``.
        read_query: ``read_query(path)`` returns a sequence of items; with it, the command line
            can read queries from a file.
        name: what to call the task in reports.
        skip: positions of training examples that are never read and get no row, such as broken files, or a
            mask with a boolean for each; the other examples keep their ids.
        tokenizer: turns a text into an item, for ``gradindex query --text``: a tokenizer of transformers (whose items
            are mappings with ``input_ids``), or a function. What it calls its tokens (``convert_ids_to_tokens``), the
            view of scores by token shows.
        train_model: ``train_model(ids, seed)`` trains a new model on the training examples ``ids``, (m,) int64
            ascending, from an initialisation and an order that ``seed`` decides, and returns it: a
            ``torch.nn.Module`` whose parameters have the names and shapes of ``model``'s. With it,
            :func:`gradindex.evaluation.judge` compares scores with what models retrained without some examples do.
    """

    model: nn.Module
    loss: Loss
    train: Dataset[Any] | Sequence[Any]
    checkpoints: Sequence[Checkpoint]
    query: Dataset[Any] | Sequence[Any] | None = None
    query_loss: Loss | Literal["predicted"] | None = None
    layers: str | Sequence[str] | None = None
    preconditioner: Preconditioner | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    query_columns: Mapping[str, Any] = field(default_factory=dict)
    show: Callable[[Any], Any] | None = None
    collate: Callable[[list[Any]], Any] = default_collate
    read_query: Callable[[Path], Sequence[Any]] | None = None
    name: str = "task"
    skip: Any = ()
    tokenizer: Any = None
    train_model: Callable[[NDArray[np.int64], int], nn.Module] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TaskError(f"model is a {type(self.model).__name__}, but must be a torch.nn.Module.")
        object.__setattr__(self, "model", unwrapped(self.model))
        for role, data in (("train", self.train), ("query", self.query)):
            if data is not None:
                _check_data_set(role, data)
        for name in ("loss", "query_loss", "collate", "show", "read_query", "tokenizer", "train_model"):
            given = getattr(self, name)
            if name == "query_loss" and isinstance(given, str):
                _check_predicted(given, self.loss)
            elif not callable(given) and (given is not None or name in ("loss", "collate")):
                raise TaskError(f"{name} is a {type(given).__name__}, but must be a function.")
        if not isinstance(self.name, str):
            raise TaskError(f"name is {self.name!r}, a {type(self.name).__name__}, but must be a string.")
        try:
            patterns = all(isinstance(pattern, str) for pattern in self.layer_patterns or ())
        except TypeError:
            patterns = False
        if not patterns:
            raise TaskError(
                f"layers is a {type(self.layers).__name__}, but must be a name or pattern, or a list of them."
            )
        if self.preconditioner is not None:
            names = dict.fromkeys((*PRECONDITIONERS, *GEOMETRIES))
            if self.preconditioner not in names:
                known = ", ".join(map(repr, names))
                raise TaskError(f"preconditioner is {self.preconditioner!r}, but must be {known} or None.")
        for name, parameter in self.model.named_parameters():
            if is_lazy(parameter):
                raise TaskError(f"{name} has no shape yet (a lazy module). Run the model on one batch first.")
            if parameter.is_meta:
                raise TaskError(
                    f"{name} is on the meta device and holds no data. Create the model on a real device, or call "
                    "model.to_empty(device='cpu'): the weights come from the checkpoints."
                )
        object.__setattr__(self, "checkpoints", _listed_checkpoints(self.checkpoints))
        if len(self.train_ids) == 0:
            raise TaskError("skip covers all training examples. Keep at least one.")
        self._by_place  # noqa: B018 - made here, where an error is the caller's to see

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        counts = [(self.n_train, "training example"), (self.n_query, "query"), (len(self.checkpoints), "checkpoint")]
        told = [f"{n:,} {word if n == 1 else 'queries' if word == 'query' else word + 's'}" for n, word in counts]
        return f"<Task {self.name!r}: {type(self.model).__name__} with {parameters:,} parameters; {', '.join(told)}>"

    @functools.cached_property
    def n_train(self) -> int:
        """The number of training examples, skipped ones as well; as it was when the task was made."""
        return len(self.train)  # type: ignore[arg-type]  # checked to have a length in __post_init__

    @functools.cached_property
    def train_ids(self) -> NDArray[np.int64]:
        """(m,) int64 ascending, the training examples that are not skipped."""
        try:
            skipped = positions_of("skip", self.skip, self.n_train, "train")
        except ArgumentError as error:
            raise TaskError(str(error)) from None
        return np.setdiff1d(np.arange(self.n_train, dtype=np.int64), skipped)

    @functools.cached_property
    def n_query(self) -> int:
        """The number of examples in ``query`` (0 without)."""
        return 0 if self.query is None else len(self.query)  # type: ignore[arg-type]  # as above

    def first_and_last(self) -> Examples:
        """Two training examples (one of them twice if there is only one) to try things on."""
        return self.read(self.train_ids[[0, -1]])

    def read(self, ids: Sequence[int] | NDArray[np.int64]) -> Examples:
        """Training examples by id, with their names."""
        return Examples.training(ids, self.examples(ids))

    def examples(self, ids: Iterable[Any]) -> list[Any]:
        """Training examples by id, as the data set hands them out."""
        return [read_example(self.train, int(i), "training") for i in ids]

    def read_queries(self, path: Path) -> list[Any]:
        """Items from a file, by the task's own ``read_query``.

        Raises:
            TaskError: the task has none, or it failed.
            ArgumentError: there is no such file.
        """
        if self.read_query is None:
            raise TaskError(
                "The task has no read_query, so it cannot read queries from a file. Give Task(read_query=...)."
            )
        if not path.exists():
            raise ArgumentError(f"{path} does not exist. Check the path.")
        with user_code(f"Reading queries from {path}"):
            found = self.read_query(path)
            if found is None or isinstance(found, (str, bytes, Mapping)):
                raise TaskError(f"read_query returned a {type(found).__name__}, but must return a sequence of items.")
            return list(found)

    def read_texts(self, texts: Iterable[str]) -> list[Any]:
        """Items from texts, by the task's ``tokenizer``.

        Raises:
            TaskError: the task has none, or it failed.
        """
        if self.tokenizer is None:
            raise TaskError("The task has no tokenizer, so it cannot read texts. Give Task(tokenizer=...).")
        items = []
        for text in texts:
            with user_code(f"Tokenizing {text!r:.60}"):
                item = self.tokenizer(text)
                items.append(dict(item) if isinstance(item, Mapping) else item)
        return items

    def token_names(self, ids: Sequence[int]) -> list[str]:
        """What the ``tokenizer`` calls tokens; without one that knows, their numbers."""
        names = getattr(self.tokenizer, "convert_ids_to_tokens", None)
        if names is None:
            return [str(i) for i in ids]
        with user_code("Naming tokens (tokenizer.convert_ids_to_tokens)"):
            return [str(name) for name in names(list(ids))]

    def shown(self, item: Any, name: str) -> Any:
        """What ``show`` makes of an item.

        Raises:
            UserCodeError: it raised; names the item.
        """
        if self.show is None:
            return None
        with user_code(f"show ({name})"):
            return self.show(item)

    @property
    def data_sets(self) -> tuple[Any, ...]:
        """``train`` and ``query``: what items refer to, but is no part of them."""
        return (self.train, self.query)

    def loss_for(self, role: str) -> Loss:
        """The loss of a ``"train"`` or ``"query"`` example."""
        own = role == "query" and callable(self.query_loss)
        return self.query_loss if own else self.loss  # type: ignore[return-value]  # a function

    @property
    def layer_patterns(self) -> tuple[str, ...] | None:
        """``layers`` as a tuple; ``None`` where what was trained is tracked."""
        return (self.layers,) if isinstance(self.layers, str) else None if self.layers is None else tuple(self.layers)

    def column_arrays(self, role: str, positions: Sequence[int] | NDArray[np.int64] | None = None) -> Arrays:
        """Columns of ``"train"`` or ``"query"`` examples, of all or some, as NumPy arrays of their types."""
        n = self.n_train if role == "train" else self.n_query
        chosen = np.arange(n) if positions is None else np.asarray(positions, dtype=np.int64)
        return {name: column.take(chosen) for name, column in self._by_place[role].items()}

    def column_types(self) -> dict[str, str]:
        """Types of the columns of ``train`` in NumPy's notation, such as ``"<i8"``; ``"U"`` for text."""
        return {name: column.kind for name, column in self._by_place["train"].items()}

    @functools.cached_property
    def _by_place(self) -> dict[str, dict[str, Column]]:
        return {
            "train": columns_by_name("columns", self.columns, "train", self.n_train),
            "query": columns_by_name("query_columns", self.query_columns, "query", self.n_query),
        }

    def data_fingerprint(self, ids: NDArray[np.int64] | None = None) -> str:
        """SHA-256 over up to 64 evenly spaced training examples and their ids, and over all values of columns.

        Args:
            ids: (m,) int64, the examples that are meant; by default all that are not skipped.
        """
        if ids is None:
            ids = self.train_ids
        sampled = ids[np.unique(np.linspace(0, len(ids) - 1, min(_SAMPLED, len(ids))).astype(np.int64))]
        with preserved_random_state():
            examples = digest(list(zip(sampled.tolist(), self.examples(sampled), strict=True)), self.data_sets)
        pieces = (ids[start : start + _PIECE] for start in range(0, len(ids), _PIECE))
        columns = [digest(self.column_arrays("train", piece)) for piece in pieces] if self._by_place["train"] else []
        return digest([examples, *columns]).hex()

    def sample_digests(self, ids: NDArray[np.int64]) -> list[tuple[int, str]]:
        """Ids and digests of those training examples among ``ids`` that stand for all (:func:`sampled`)."""
        with preserved_random_state():
            return [(int(i), self.example_digest(item)) for i in sampled(ids) for item in self.examples([i])]

    def differing(self, samples: Sequence[tuple[int, str]]) -> list[int]:
        """Ids whose training examples are not those that :meth:`sample_digests` saw."""
        with preserved_random_state():
            return [i for i, then in samples if self.example_digest(*self.examples([i])) != then]

    def example_digest(self, item: Any) -> str:
        """128 bits of the SHA-256 over an example's values, in hexadecimal."""
        return digest(item, self.data_sets).hex()[:32]

    def check_reads_repeat(self, ids: NDArray[np.int64] | None = None) -> None:
        """Read a few training examples twice and refuse them if they differ.

        Args:
            ids: (m,) those to choose from, by default all that are not skipped.

        Raises:
            TaskError: random augmentation: an id would mean another example at each read.
        """
        with user_code("len(train)"):
            length = len(self.train)  # type: ignore[arg-type]  # as above
        if length != self.n_train:
            raise TaskError(
                f"train had {self.n_train} examples when the task was created, but has {length} now. "
                "Create the task again."
            )
        positions = spread(self.train_ids if ids is None else ids, _READ_TWICE)
        with preserved_random_state():
            first = [self.example_digest(item) for item in self.examples(positions)]
            second = [self.example_digest(item) for item in self.examples(positions)]
        differing = [int(i) for i, a, b in zip(positions, first, second, strict=True) if a != b]
        if differing:
            raise TaskError(
                f"Training example {differing[0]} differs between two reads ({len(differing)} of {len(positions)} "
                "sampled ones do), so the data set is randomly augmented, but an id must always mean the same "
                "example. Give Task the same data without random transforms."
            )


def _listed_checkpoints(given: Any) -> list[Checkpoint]:
    """One checkpoint alone stands for a list of it."""
    if isinstance(given, Checkpoint):
        return [given]
    way_out = "Use find_checkpoints('folder/*.pt') or Checkpoint(path, learning_rate=...)."
    if isinstance(given, str | Path):
        raise TaskError(
            f"checkpoints is the path {str(given)!r}, but must be a list of gradindex.Checkpoint. "
            f"Write checkpoints=find_checkpoints({str(given)!r}, learning_rate=...)."
        )
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise TaskError(
            f"checkpoints is a {type(given).__name__}, but must be a list of gradindex.Checkpoint. {way_out}"
        )
    checkpoints = list(given)
    if not checkpoints:
        raise TaskError("checkpoints is empty. Give at least one, for example find_checkpoints('checkpoints/*.pt').")
    for number, item in enumerate(checkpoints):
        if not isinstance(item, Checkpoint):
            if isinstance(item, Mapping | nn.Module):
                way_out = (
                    "Save the weights and give the file: torch.save(model.state_dict(), 'step_1.pt'), then "
                    "Checkpoint('step_1.pt', learning_rate=...)."
                )
            raise TaskError(
                f"checkpoints[{number}] is a {type(item).__name__}, but must be a gradindex.Checkpoint. {way_out}"
            )
    return checkpoints


def spread(ids: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Up to ``count`` evenly spaced ones, the first and the last among them."""
    chosen: NDArray[np.int64] = ids[np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(np.int64))]
    return chosen


def sampled(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Up to 8 evenly spaced ids of a shard, whose examples stand for all."""
    return spread(ids, 8)


def load_task(name: str) -> Task:
    """Import a task by name.

    Args:
        name: ``path/to/file.py:name`` or ``package.module:name``; the name is a :class:`Task`
            or a callable without arguments that returns one.

    Raises:
        TaskError: there is no such file, module or name, importing it failed, or what it
            names is not a task.
    """
    found = import_by_name(name, "a task")
    if not isinstance(found, Task) and callable(found):
        with user_code(f"Calling {name}"):
            found = found()
    if not isinstance(found, Task):
        raise TaskError(
            f"{name} is a {type(found).__name__}, but must be a gradindex.Task or a callable that returns one."
        )
    return found


def _check_predicted(query_loss: str, loss: Any) -> None:
    if query_loss != PREDICTED:
        raise TaskError(f"query_loss is {query_loss!r}, but must be a function or {PREDICTED!r}.")
    if not (callable(getattr(loss, "predictions", None)) and callable(getattr(loss, "relabelled", None))):
        raise TaskError(
            "query_loss='predicted' needs a loss with predictions(model, batch) and relabelled(batch, predictions), "
            f"but {name_of(loss)} has not. Use one of gradindex.losses, such as losses.cross_entropy()."
        )


def _check_data_set(role: str, data: object) -> None:
    if isinstance(data, DataLoader):
        raise TaskError(
            f"{role} is a DataLoader, whose shuffling and batching hide which example is which. "
            f"Give its data set: {role}=loader.dataset."
        )
    if isinstance(data, torch.Tensor):
        raise TaskError(f"{role} is a Tensor, but must hold items as the loss receives them. Use TensorDataset(x, y).")
    if isinstance(data, (str, bytes, Mapping)) or hasattr(data, "iloc"):
        raise TaskError(
            f"{role} is a {type(data).__name__}, which cannot be indexed by position. Give a list of items or a data "
            "set: for a data frame, frame.to_dict('records'); for a mapping of splits, one of the splits."
        )
    if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TaskError(
            f"{role} is a {type(data).__name__}, which cannot be indexed, but examples are looked up by id. "
            "Give a map-style data set with __len__ and __getitem__."
        )
    with user_code(f"len({role})"):
        length = len(data)
    if length == 0:
        raise TaskError(f"{role} is empty. Give at least one example.")
