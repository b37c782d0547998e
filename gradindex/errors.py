"""Every error that gradindex raises on purpose.

Each one also subclasses the builtin that a caller would expect, and carries one
sentence: what, expected, got, and the way out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

# Characters of another's message that are shown: one line, not a page.
_LONGEST = 300
# Examples that an error names.
_SHOWN = 8
_TRAINING = "Training example "


class GradIndexError(Exception):
    """Base of all errors below; the command line prints it as one line and exits with 1."""


class ArgumentError(GradIndexError, ValueError):
    """An argument is out of range or of the wrong type."""


class TaskError(GradIndexError, ValueError):
    """The task (model, data, layers, columns) cannot be used as it is."""


class UserCodeError(TaskError, RuntimeError):
    """The user's own code (loss, collate, data set, show) raised; ``__cause__`` is what it raised.

    Attributes:
        what: whose code it is.
        hint: the way out, where one is known.
    """

    what = hint = ""


class WorkerError(GradIndexError, RuntimeError):
    """A process that reads training examples died."""


class CheckpointError(GradIndexError, ValueError):
    """A checkpoint is missing, damaged, has no weight, or does not fit the model."""


class LossError(GradIndexError, ValueError):
    """The loss is not one number per example, mixes the examples of a batch, or is not finite after a retraining."""


class NonFiniteGradientError(GradIndexError, ArithmeticError):
    """An example has a NaN or infinite gradient."""


class OutOfMemoryError(GradIndexError, MemoryError):
    """A single example needs more memory than there is."""


class StoreError(GradIndexError, RuntimeError):
    """A store is missing, incomplete, damaged, or not a store."""


class StoreChangedError(StoreError):
    """A store changed while it was open and no longer has the files that were needed: open it again and retry."""


class IndexFileError(GradIndexError, RuntimeError):
    """A search index is missing, damaged, or belongs to other rows."""


class RecallError(GradIndexError, RuntimeError):
    """No index reaches the requested recall."""


class DimensionMismatchError(GradIndexError, ValueError):
    """Two arrays whose last axes must match do not."""


class MismatchError(GradIndexError, ValueError):
    """A task and a store describe different gradients."""


class DependencyError(GradIndexError, ImportError):
    """An optional package is missing or installed twice."""


class user_code:  # noqa: N801 - reads as the verb that it is
    """Whatever the user's own code raises becomes one line that says whose code failed; its traceback stays the cause.

    Our own errors pass, and so does running out of memory, which batches are halved for. No generator-based context
    manager: ``contextlib`` takes a ``RuntimeError`` that a ``StopIteration`` caused for that ``StopIteration``.

    Args:
        what: whose code and on what, such as ``"The loss (training examples 0 to 31)"``; the line goes on with
            "failed".
        hint: the way out, where one is known.

    Raises:
        UserCodeError: the block raised.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        self._what, self._hint = what, hint

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Whatever it is, it is theirs: StopIteration too, which would end a loop of ours.
        if not isinstance(error, Exception) or isinstance(error, (GradIndexError, MemoryError)):
            return
        if is_out_of_memory(error) or is_worker_death(error):
            return
        raise failed(self._what, error, self._hint) from error


def failed(what: str, error: BaseException, hint: str = "") -> UserCodeError:
    """An error that says that the user's code raised ``error``; arguments as for :func:`user_code`."""
    reason = " ".join(str(error).split())
    reason = f": {reason if len(reason) <= _LONGEST else reason[: _LONGEST - 3] + '...'}" if reason else ""
    end = "" if reason.endswith((".", "!", "?")) else "."
    made = UserCodeError(f"{what} failed: {type(error).__name__}{reason}{end}{hint and ' '}{hint}")
    made.what, made.hint = what, hint
    return made


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def is_worker_death(error: BaseException) -> bool:
    """Whether torch says that a reading process died, which it raises wherever this process is at that moment."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def training_names(ids: Iterable[int]) -> list[str]:
    """What training examples are called in errors."""
    return [f"{_TRAINING}{i}" for i in ids]


def joined_names(names: Sequence[str]) -> str:
    """``"Training examples 3, 5 and 9"``, of many the first few."""
    of_training = all(name.startswith(_TRAINING) for name in names)
    shown = [name.removeprefix(_TRAINING) if of_training else name for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        shown.append(f"{len(names) - _SHOWN} more")
    text = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
    return f"{_TRAINING.strip()}{'s' if len(names) > 1 else ''} {text}" if of_training else text


def left_out(names: Sequence[str]) -> str:
    """How to leave examples out, as a sentence: training examples by ``skip``, others by not asking about them."""
    if not all(name.startswith(_TRAINING) for name in names):
        return f"Fix {'it' if len(names) == 1 else 'them'}, or drop {'it' if len(names) == 1 else 'them'}."
    ids = ", ".join(name.removeprefix(_TRAINING) for name in names[:_SHOWN])
    more = ", ..." if len(names) > _SHOWN else ""
    return f"Fix {'it' if len(names) == 1 else 'them'}, or skip with Task(skip=[{ids}{more}])."


def as_whole(name: str, value: Any) -> int:
    """A whole number, in whichever type it comes.

    Raises:
        ArgumentError: it is none; ``True`` is none either.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError):
        shown = " ".join(repr(value).split())[:80]
        raise ArgumentError(f"{name} is {shown}, a {type(value).__name__}, but must be an integer.") from None


def check_choice(name: str, value: Any, choices: Sequence[str], more: str = "") -> None:
    """Refuse a word that is none of those to choose from.

    Args:
        name: what the value is called.
        value: what was given.
        choices: the words.
        more: what else the error says, as a sentence.

    Raises:
        ArgumentError: names them.
    """
    if value not in choices:
        raise ArgumentError(f"{name} is {value!r}, but must be one of: {', '.join(choices)}.{more and ' '}{more}")


def check_k(k: int, n_train: int) -> None:
    """Refuse a number of hits that there cannot be.

    Raises:
        ArgumentError: ``k`` is below 1 or above ``n_train``.
    """
    if not 1 <= as_whole("k", k) <= n_train:
        raise ArgumentError(f"k is {k}, but must be between 1 and the number of training examples, {n_train}.")
