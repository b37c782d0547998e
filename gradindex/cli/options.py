"""Options that several commands share, and those that stand in the library and are only read here."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import click

from ..choices import QUERY_GEOMETRIES
from ..options import ComputeOptions
from ..retrieval.question import Question

Command = Callable[..., Any]

PATH = click.Path(path_type=Path, readable=False)  # what is wrong with a path, the function says
FOLDER = click.argument("folder", metavar="DIR", type=PATH)
TASK = click.option("--task", required=True, help="The task that the store was built from, written as for build.")
POSITION = click.option(
    "-q", "--position", multiple=True, type=int, help="Query by position in the task's queries; repeatable."
)
TRAIN_ID = click.option("--train-id", multiple=True, type=int, help="Query by training id; repeatable.")
FILE = click.option("--file", "path", type=PATH, help="Read the queries from a file, with the task's read_query.")

GEOMETRY = click.option(
    "--geometry",
    type=click.Choice(QUERY_GEOMETRIES),
    default=QUERY_GEOMETRIES[0],
    show_default=True,
    help="tracin: as the rows were made; whitened: queries turned so that scores predict retraining, after `gradindex "
    "whiten`; whitened-exact: the same with whole gradients, from stored factors.",
)
DAMPING = click.option(
    "--damping", type=float, help="Added to the second moment of whitened queries, a share of its trace; default 3e-4."
)
ITERATIONS = click.option(
    "--iterations", type=int, help="Steps for each query of whitened-exact, passes over all factors; default 5."
)
TEXT = click.option("--text", multiple=True, help="Query by a text, with the task's tokenizer; repeatable.")


def _part(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """``I/N`` as two numbers."""
    found = None if value is None else re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", value, re.ASCII)
    if value is not None and found is None:
        raise click.UsageError(f"--part is {value!r}, but must be of the form I/N, such as 2/8.")
    return None if found is None else (int(found[1]), int(found[2]))


def part_option(help_line: str) -> Callable[[Command], Command]:
    """``--part I/N``, which the command gets as two numbers."""
    return click.option("--part", metavar="I/N", callback=_part, help=help_line)


def options_of(kind: type, *, leave_out: Collection[str] = ()) -> Callable[[Command], Command]:
    """The fields of a dataclass of options as options of a command, whose keywords they become.

    Args:
        kind: such as :class:`gradindex.options.BuildOptions`; fields without a help line are left out.
        leave_out: names of fields that the command has options of its own for.
    """
    shared = [each.name for each in fields(ComputeOptions)]
    own = sorted(fields(kind), key=lambda each: each.name in shared)

    def decorate(command: Command) -> Command:
        for each in reversed(own):
            if "help" in each.metadata and each.name not in leave_out:
                command = _option(each)(command)
        return command

    return decorate


def option_of(kind: type, name: str) -> Callable[[Command], Command]:
    """One field of a dataclass of options, see :func:`options_of`."""
    return next(_option(each) for each in fields(kind) if each.name == name)


def _option(each: Field[Any]) -> Callable[[Command], Command]:
    said: dict[str, Any] = dict(each.metadata)
    names = [said.pop("flags", f"--{each.name.replace('_', '-')}"), each.name]
    default = None if each.default is MISSING else each.default
    kind = said.pop("type", None)
    if "choices" in said:
        said["type"] = click.Choice(said.pop("choices"))
    elif kind == "folder":
        said |= {"type": PATH, "metavar": "DIR"}
    elif kind == "bytes":
        said |= {"metavar": "SIZE", "callback": _bytes}
    elif kind is not None:
        said["type"] = kind
    if default is False:
        said["is_flag"] = True
    elif default is not None:
        said["show_default"] = True
    return click.option(*names, default=default, **said)


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    from ..memory import parse_bytes  # which needs torch

    return None if value is None else parse_bytes(value)


def _condition(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str]]:
    """``column=value`` as pairs."""
    for value in values:
        if not value.partition("=")[0] or "=" not in value:
            raise click.BadParameter(f"{value!r} is not of the form COLUMN=VALUE.")
    return [(name, text) for name, _, text in (value.partition("=") for value in values)]


WHERE = click.option(
    "--where",
    multiple=True,
    callback=_condition,
    metavar="COLUMN=VALUE",
    help="Only training examples with this value; repeatable. A column given twice matches either value.",
)

DEVICE = option_of(ComputeOptions, "device")
AGGREGATE = option_of(Question, "aggregate")
