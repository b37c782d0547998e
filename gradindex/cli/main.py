"""The group of commands, and what they share: options, errors in one line, ways to show records."""

from __future__ import annotations

import codecs
import contextlib
import csv
import errno
import functools
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import click

from .. import __version__
from ..errors import GradIndexError, UserCodeError
from ..output import csv_cell, plain, printable, to_json

# Commands that resume where they stopped when they are rerun.
_RESUMABLE = ("build", "add", "add-checkpoint", "compact", "merge", "whiten", "judge")

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
_CSV = click.option(
    "--csv",
    "as_csv",
    is_flag=True,
    help="Print CSV instead of a table. Text that a spreadsheet would run (=, +, -, @) is prefixed with '.",
)
_RAW = click.option("--raw-csv", is_flag=True, help="Print CSV with such text unchanged.")
Form = Literal["table", "json", "csv", "raw csv"]


def forms(command: Callable[..., None]) -> Callable[..., None]:
    """Options for the form of an answer, which the command gets as ``form``."""

    @functools.wraps(command)
    def run(*args: Any, as_json: bool, as_csv: bool, raw_csv: bool, **options: Any) -> None:
        if as_json + as_csv + raw_csv > 1:
            raise click.UsageError("Give one of --json, --csv and --raw-csv.")
        if sys.stdout in _CLOSED:
            raise click.ClickException("Standard output is closed, so there is nowhere to print the answer. Open it.")
        form: Form = "json" if as_json else "csv" if as_csv else "raw csv" if raw_csv else "table"
        command(*args, form=form, **options)

    return JSON(_CSV(_RAW(run)))


class _OneLineErrors(click.Group):
    """Turns every error that a person can act on, and Ctrl-C, into one line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and end the process where this is a command of its own."""
        _make_streams_usable()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # writing the help, or an error, to a full disk
            if not kwargs.get("standalone_mode", True):
                raise
            click.echo(f"Error: {printable(_in_one_line(error))}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # while an error is still ours to tell
            return result
        except (GradIndexError, OSError, MemoryError, UnicodeEncodeError) as error:
            if ctx.params["debug"]:
                raise
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # `| head` has seen enough
                _close_output()
                ctx.exit(1)
            raise click.ClickException(printable(" ".join(_in_one_line(error).split()))) from error
        except KeyboardInterrupt:
            resumes = ctx.invoked_subcommand in _RESUMABLE
            more = " Finished work is kept: rerun the same command to resume." if resumes else ""
            click.echo(f"Interrupted.{more}", err=True)
            ctx.exit(130)


def _in_one_line(error: Exception) -> str:
    if isinstance(error, UserCodeError):
        return f"{error} (gradindex --debug shows where.)"
    if isinstance(error, GradIndexError):
        return str(error)
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC and error.filename is None:
            _close_output()
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        reason = error.strerror or str(error)
        return f"{where}{reason}. Check that it exists, that you have permission, and that the disk has space."
    if isinstance(error, UnicodeEncodeError):
        encoding = getattr(sys.stdout, "encoding", error.encoding)
        return (
            f"The output encoding {encoding} cannot represent {error.object[error.start]!a}. "
            "Set PYTHONIOENCODING=utf-8, or use --json."
        )
    return f"Out of memory ({error or 'none is left'}). Ask for less, or use a machine with more."


def _make_streams_usable() -> None:
    """Make standard streams that are closed or of few characters harmless.

    What an output's encoding lacks is shown escaped, and ASCII is taken for UTF-8, as click does. A closed stream's
    number goes to no file that is opened later.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = os.fdopen(
                os.open(os.devnull, os.O_RDWR), mode
            )  # takes the lowest number, which is the closed one's
            setattr(sys, name, stream)
            _CLOSED.append(stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            ascii_alone = codecs.lookup(stream.encoding).name == "ascii"  # a locale that nobody set
            stream.reconfigure(encoding="utf-8" if ascii_alone else None, errors="backslashreplace")


# What stands for standard streams that are closed.
_CLOSED: list[Any] = []


def _close_output() -> None:
    """What is still buffered has nowhere to go; without this, Python would say so once more at the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str, err: bool = False) -> None:
    """Print lines, each one as a terminal can bear it."""
    click.echo("\n".join(map(printable, text.split("\n"))), err=err)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", "--traceback", is_flag=True, help="On an error, print the traceback.")
def main(debug: bool) -> None:
    """Which training examples made my model do this? A search engine for TracIn."""


def show(
    records: Iterable[dict[str, Any]],
    lines: Callable[[], Iterable[str]],
    summary: Mapping[str, Any],
    names: Sequence[str],
    form: Form,
) -> None:
    """Print records as the user wants them, one after another.

    Args:
        records: of the same keys, ``names``; JSON and CSV are written as they come.
        lines: makes the table, line by line.
        summary: what else the JSON object holds; its ``note`` says what the numbers mean, and goes to standard error
            where CSV goes to standard output.
        names: the keys, in order.
        form: a table, one JSON object, or CSV, in which cells that begin as a formula are made harmless or left raw.
    """
    if form == "table":
        for line in lines():
            sys.stdout.write(f"{line}\n")
    elif form == "json":
        sys.stdout.write(f'{to_json(summary)[:-1]}, "records": [')
        for number, record in enumerate(records):
            sys.stdout.write(f"{', ' if number else ''}{to_json(record)}")
        sys.stdout.write("]}\n")
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="strict")  # for a program, what cannot be written is an error
        cell: Callable[[Any], Any] = csv_cell if form == "csv" else plain
        writer = csv.writer(sys.stdout)
        writer.writerow(map(cell, names))
        writer.writerows(map(cell, record.values()) for record in records)
        say(summary["note"], err=True)
