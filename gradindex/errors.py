"""Every error that gradindex raises on purpose.

Each one also subclasses the builtin that a caller would expect, and carries one
sentence: what, expected, got, and the way out.
"""

from __future__ import annotations


class GradIndexError(Exception):
    """Base of all errors below; the command line prints it as one line and exits with 1."""


class ArgumentError(GradIndexError, ValueError):
    """A value that the caller gave is outside what is possible."""


class TaskError(GradIndexError, ValueError):
    """The task (model, data, layers, columns) cannot be used as it is."""


class CheckpointError(GradIndexError, ValueError):
    """A checkpoint is missing, damaged, has no weight, or does not fit the model."""


class LossError(GradIndexError, ValueError):
    """The loss is not one number per example, or mixes the examples of a batch."""


class NonFiniteGradientError(GradIndexError, ArithmeticError):
    """An example has a NaN or infinite gradient."""


class OutOfMemoryError(GradIndexError, MemoryError):
    """A single example needs more memory than there is."""


class StoreError(GradIndexError, RuntimeError):
    """A store is missing, incomplete, damaged, or not a store."""


class IndexFileError(GradIndexError, RuntimeError):
    """A search index is missing, damaged, or belongs to other rows."""


class RecallError(GradIndexError, RuntimeError):
    """No index keeps the recall that was asked for."""


class DimensionMismatchError(GradIndexError, ValueError):
    """Two arrays whose last axes must agree do not."""


class MismatchError(GradIndexError, ValueError):
    """A task and a store describe different gradients."""


class DependencyError(GradIndexError, ImportError):
    """An optional package is missing or installed twice."""


def check_k(k: int, n_train: int) -> None:
    """Refuse a number of hits that there cannot be.

    Raises:
        ArgumentError: ``k`` is below 1 or above ``n_train``.
    """
    if not 1 <= k <= n_train:
        raise ArgumentError(f"k is {k}, but must be between 1 and the number of training examples, {n_train}.")
