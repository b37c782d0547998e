"""The group of commands, and what they share: options, errors in one line, ways to show records."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import GradIndexError

# Commands that go on where they were when they are given again.
_RESUMABLE = ("build", "add", "add-checkpoint", "compact", "merge")

PATH = click.Path(path_type=Path, readable=False)  # what is wrong with a path, the function says
FOLDER = click.argument("folder", metavar="DIR", type=PATH)
DEVICE = click.option("--device", help="Where to compute, such as cuda; by default where the task's model is.")
WORKERS = click.option("--workers", default=0, show_default=True, help="Processes that read examples.")
CHANNELS = click.option(
    "--channels-last/--channels-first",
    default=None,
    help="How pictures are laid out in memory; by default with the channels last where the model runs so.",
)
TASK = click.option("--task", required=True, help="The task that the store was built from, as for build.")
POSITION = click.option("-q", "--position", multiple=True, type=int, help="Position in the task's queries; repeatable.")
TRAIN_ID = click.option("--train-id", multiple=True, type=int, help="Training id as the query; repeatable.")
FILE = click.option("--file", "path", type=PATH, help="A file that the task's read_query reads.")
AGGREGATE = click.option(
    "--aggregate",
    type=click.Choice(["sum", "mean"]),
    help="Make one question of all queries: what helps them together.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
CSV = click.option("--csv", "as_csv", is_flag=True, help="CSV instead of a table.")


class _OneLineErrors(click.Group):
    """Turns every error that gradindex raises on purpose, and Ctrl-C, into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GradIndexError as error:
            if ctx.params["debug"]:
                raise
            raise click.ClickException(" ".join(str(error).split())) from error
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in _RESUMABLE
            more = " What was finished is kept: run the same command again to go on." if goes_on else ""
            click.echo(f"Interrupted.{more}", err=True)
            ctx.exit(130)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", "--traceback", is_flag=True, help="On an error, show where it came from.")
def main(debug: bool) -> None:
    """Which training examples made my model do this? Answered by TracIn, as a search engine."""


def condition(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str]]:
    """``column=value`` as pairs."""
    for value in values:
        if not value.partition("=")[0] or "=" not in value:
            raise click.BadParameter(f"{value!r} is not of the form column=value.")
    return [(name, text) for name, _, text in (value.partition("=") for value in values)]


WHERE = click.option(
    "--where",
    multiple=True,
    callback=condition,
    metavar="COLUMN=VALUE",
    help="Only training examples with this value; repeatable: a column given twice may have either value.",
)


def show(
    records: Iterable[dict[str, Any]],
    text: Callable[[], str],
    note: str,
    as_json: bool,
    as_csv: bool,
    names: Sequence[str],
    **more: Any,
) -> None:
    """Print records as the user wants them, one after another.

    Args:
        records: of the same keys, ``names``; JSON and CSV are written as they come.
        text: makes the table.
        note: what the numbers mean; on standard error where CSV goes to standard output.
        as_json: one JSON object.
        as_csv: CSV.
        names: the keys, in order.
        more: what else the JSON object holds.
    """
    if as_json and as_csv:
        raise click.UsageError("Give --json or --csv, not both.")
    if as_json:
        sys.stdout.write(f'{json.dumps({"note": note, **more})[:-1]}, "records": [')
        for number, record in enumerate(records):
            sys.stdout.write(f"{', ' if number else ''}{json.dumps(record)}")
        sys.stdout.write("]}\n")
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, names)
        writer.writeheader()
        writer.writerows(records)
        click.echo(note, err=True)
    else:
        click.echo(text())
