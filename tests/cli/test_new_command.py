"""A command of one's own: one file, one registration."""

import click
from click.testing import CliRunner

from gradindex.cli import main
from gradindex.cli.main import say
from gradindex.cli.options import FOLDER
from gradindex.errors import StoreError
from gradindex.store import overview


@click.command("rows")
@FOLDER
def rows(folder):
    """Count the rows of a store.

    Example: gradindex rows /tmp/mnist
    """
    say(f"{folder}: {overview(folder).n_train}")


def test_a_toy_command_has_help_and_errors_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(main.commands, "rows", rows)
    done = CliRunner().invoke(main, ["rows", str(tmp_path / "nowhere")])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert done.output.startswith(f"Error: {tmp_path / 'nowhere'} is not a gradindex store")
    assert isinstance(done.exception, SystemExit) and StoreError.__name__ not in done.output
    assert "Count the rows of a store." in CliRunner().invoke(main, ["rows", "--help"]).output
    assert "rows" in CliRunner().invoke(main, ["--help"]).output
