"""What can be said of a build: each option written once with its default and its help, and once for type checkers.

The command line makes its options of these fields, so nothing heavy is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from .choices import FACTOR_TYPES, NORMS, PRECISIONS, ROW_TYPES, FactorType, Norms, Precision, RowType
from .errors import ArgumentError, check_choice

if TYPE_CHECKING:
    from .projection import Projection

T = TypeVar("T")


def option(default: Any, help: str, **more: Any) -> Any:  # as click calls it
    """A field of options.

    Args:
        default: its value where nothing is said.
        help: one line for the command line.
        **more: how the command line takes it, see :mod:`gradindex.cli.options`: ``choices``, ``type``, ``metavar``,
            ``flags``.
    """
    return field(default=default, metadata={"help": help, **more})


def chosen(options: T | None, keywords: Mapping[str, Any], kind: type[T]) -> T:
    """Options as keywords, or an object of them, or an object with some replaced by keywords.

    Args:
        options: an object, or ``None`` for the defaults.
        keywords: of ``kind``'s fields.
        kind: the dataclass.

    Raises:
        ArgumentError: ``options`` is something else.
        TypeError: there is no such option.
    """
    if options is None:
        return kind(**keywords)
    if not isinstance(options, kind):
        raise ArgumentError(f"options is a {type(options).__name__}, but must be {kind.__name__}.")
    return replace(options, **keywords) if keywords else options  # type: ignore[type-var]  # a dataclass, as all are


def check_workers(count: int) -> None:
    """Refuse more processes than could be of use.

    Raises:
        ArgumentError: below 0, or above 64 and eight times the processors.
    """
    most = max(64, 8 * (os.cpu_count() or 1))
    if not 0 <= count <= most:
        raise ArgumentError(f"workers is {count}, but must be from 0 to {most} on this machine.")


class ComputeKeywords(TypedDict, total=False):
    """The fields of :class:`ComputeOptions` as keywords."""

    device: str | None
    channels_last: bool | None
    workers: int
    one_at_a_time: bool | None
    batch_tokens: int | None


class BuildKeywords(ComputeKeywords, total=False):
    """The fields of :class:`BuildOptions` as keywords."""

    projection: Projection | None
    precision: Precision
    row_type: RowType
    factors: FactorType | None
    pack: bool | None
    wide: int | None
    self_influence: Norms
    unit_norm: bool
    batch_size: int | None
    memory: int | None
    shard_rows: int | None
    bases_from: str | os.PathLike[str] | None


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where and how gradients are computed; rows change at most in their last bits.

    Args:
        device: the device to compute on, such as ``"cuda"``; by default the model's.
        channels_last: whether images use the channels-last memory layout, which changes the speed of convolutions
            and nothing else but rounding; by default if the model has two-dimensional convolutions and supports it.
        workers: processes that load examples in the background.
        one_at_a_time: whether to hold the weights of one checkpoint at a time, and to go through the data once for
            each; by default if the weights of all do not fit into memory. What is the same at several checkpoints, as
            a frozen backbone, is held once either way.
        batch_tokens: the most tokens of a pass, padding counted: examples times the longest of them. A batch that has
            more is split. By default there is no such limit; texts of different lengths are sorted by length either
            way, so that a pass has little padding.

    Raises:
        ArgumentError: ``workers`` or ``batch_tokens`` is out of range.
    """

    device: str | None = option(
        None, "Device to compute on, such as cuda; by default the one that the task's model is on."
    )
    channels_last: bool | None = option(
        None,
        "Memory layout of images; by default channels last where the model supports it.",
        flags="--channels-last/--channels-first",
    )
    workers: int = option(0, "Processes that load examples.")
    one_at_a_time: bool | None = option(
        None,
        "Hold the weights of one checkpoint at a time, or of all; by default all, if they fit into memory.",
        flags="--one-at-a-time/--all-at-once",
    )
    batch_tokens: int | None = option(None, "Most tokens of a pass, padding counted; by default no limit.")

    def __post_init__(self) -> None:
        check_workers(self.workers)
        if self.batch_tokens is not None and (not isinstance(self.batch_tokens, int) or self.batch_tokens < 1):
            raise ArgumentError(f"batch_tokens is {self.batch_tokens!r}, but must be a whole number of at least 1.")


@dataclass(frozen=True, kw_only=True)
class BuildOptions(ComputeOptions):
    """How rows are computed and stored.

    Args:
        device: see :class:`ComputeOptions`, as for ``channels_last``, ``workers``,
            ``one_at_a_time`` and ``batch_tokens``.
        projection: the map from gradients to rows; by default a TensorSketch of 1,024 numbers per checkpoint.
        precision: of the gradients.
        row_type: number format of stored rows: ``"float32"``, ``"float16"`` (overflow is an error), ``"bfloat16"``,
            or ``"int8"`` or ``"int4"`` with a scale for each row and checkpoint; ``"int4"`` is for stores that have
            factors, where rows only find candidates, and needs an even number of them.
        factors: also store the two factors whose outer product is each layer's gradient, in ``"float32"`` or
            ``"float16"``, so that exact scores need no backward pass over training examples; only for linear layers
            without positions.
        pack: whether factors of layers with 256 outputs or more are packed, so that they take two thirds of the room
            and scores change by less than float32's rounding (float16's, where they are of that type); by default
            where it spares room, with True it is said which layers are not, and with False none is.
        wide: numbers per checkpoint of a second, wider row beside each, such as 16,384, stored in 4 bits each. It
            settles the order among candidates of a store without factors, so that exact scores, which go through the
            model, are computed for few of them, or with ``rerank="wide"`` for none. Even, and more than a row has.
        self_influence: ``"exact"``, or ``"projected"``: the squared norm of the row, which costs nothing and is an
            estimate (with a fitted projection: too low).
        unit_norm: divide each row by its norm: answers are ranked by the cosine of the gradients, so that examples
            with large gradients lose their advantage.
        batch_size: examples per pass, halved if memory runs out; by default as many, up to 256, as ``memory``
            holds. Fixed for a store once its build has started.
        memory: bytes that a pass may take besides the weights; by default a quarter of the machine's free memory, or
            half of the free memory of a CUDA device.
        shard_rows: rows per file, rounded up to whole batches; by default 8,192, or more if that would make over 64
            files, because a query takes time for each file that holds candidates.
        bases_from: another store with the same map except for its bases; a fitted projection reuses its bases, so that
            the two can be merged.

    Raises:
        ArgumentError: one of them is out of range, or they conflict.
    """

    projection: Projection | None = None  # several options on the command line
    precision: Precision = option("float32", "Precision of the gradients.", choices=PRECISIONS)
    row_type: RowType = option("float32", "Number format of stored rows.", choices=ROW_TYPES)
    factors: FactorType | None = option(
        None,
        "Also store factors of linear layers: exact scores without a backward pass over training examples.",
        choices=FACTOR_TYPES,
    )
    wide: int | None = option(
        None,
        "Numbers per checkpoint of a second, wider row, such as 16384: exact scores through the model then go to few.",
        type=int,
    )
    pack: bool | None = option(
        None,
        "Pack factors of layers with many outputs, in less room at the same precision; by default where it helps.",
        flags="--pack/--whole",
    )
    self_influence: Norms = option(
        "exact", "Exact, or projected: the squared norm of the row, a faster estimate.", choices=NORMS
    )
    unit_norm: bool = option(False, "Rank by the cosine of the gradients instead of TracInCP.")
    batch_size: int | None = option(
        None, "Examples per pass; by default as many, up to 256, as --memory holds.", type=int
    )
    memory: int | None = option(
        None,
        "Memory for a pass, such as 2G; by default a quarter of the free memory, or half on CUDA.",
        type="bytes",
    )
    shard_rows: int | None = option(
        None, "Rows per file, at least; by default 8,192, or more to stay within 64 files.", type=int
    )
    bases_from: str | os.PathLike[str] | None = option(
        None, "Reuse the fitted bases of this store, so that the two can be merged later.", type="folder"
    )

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("memory", 1), ("shard_rows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ArgumentError(f"{name} is {value}, but must be at least {least}.")
        super().__post_init__()
        if self.wide is not None and (not isinstance(self.wide, int) or self.wide < 2 or self.wide % 2):
            raise ArgumentError(f"wide is {self.wide!r}, but must be an even number of at least 2, such as 16384.")
        if self.wide is not None and self.factors is not None:
            raise ArgumentError(
                "Stored factors give exact scores, so wide rows would decide nothing. Give one of them."
            )
        if self.batch_size is not None and self.memory is not None:
            raise ArgumentError("Give batch_size, or memory to have it chosen, not both.")
        if self.self_influence not in NORMS:
            raise ArgumentError(f"self_influence is {self.self_influence!r}, but must be 'exact' or 'projected'.")
        if self.unit_norm and self.self_influence != "exact":
            raise ArgumentError("unit_norm needs exact norms. Leave out self_influence='projected', or unit_norm.")
        check_choice("row_type", self.row_type, ROW_TYPES)
        if self.factors is not None and self.factors not in FACTOR_TYPES:
            raise ArgumentError(f"factors is {self.factors!r}, but must be 'float32', 'float16' or None.")
        if self.pack and self.factors is None:
            raise ArgumentError("pack is about factors. Give factors='float32' or 'float16' with it, or leave it out.")

    @property
    def computing(self) -> ComputeOptions:
        """Those that a store's rows do not depend on."""
        return ComputeOptions(**{each.name: getattr(self, each.name) for each in fields(ComputeOptions)})
