"""The group of commands, and what they share: options, errors in one line, ways to show records."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
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
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
CSV = click.option("--csv", "as_csv", is_flag=True, help="CSV instead of a table.")


class _OneLineErrors(click.Group):
    """Turns every error that gradindex raises on purpose, and Ctrl-C, into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GradIndexError as error:
            if ctx.params["traceback"]:
                raise
            raise click.ClickException(" ".join(str(error).split())) from error
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in _RESUMABLE
            more = " What was finished is kept: run the same command again to go on." if goes_on else ""
            click.echo(f"Interrupted.{more}", err=True)
            ctx.exit(130)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--traceback", is_flag=True, help="On an error, show where it came from.")
def main(traceback: bool) -> None:
    """Which training examples made my model do this? Answered by TracIn, as a search engine."""


def show(records: Sequence[dict[str, Any]], text: str, note: str, as_json: bool, as_csv: bool) -> None:
    """Print records as the user wants them."""
    if as_json and as_csv:
        raise click.UsageError("Give --json or --csv, not both.")
    if as_json:
        click.echo(json.dumps({"note": note, "records": records}))
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, list(records[0]) if records else [])
        writer.writeheader()
        writer.writerows(records)
        click.echo(note, err=True)
    else:
        click.echo(text)
