"""Commands that look after a store: info, verify, remove, compact, merge, seal, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..choices import UNSIZED_PROJECTIONS
from ..output import printable, table, to_json
from .main import JSON, say
from .options import FOLDER, PATH

if TYPE_CHECKING:
    from ..store import GradientStore, StoredCheckpoint


@click.command()
@FOLDER
@JSON
def info(folder: Path, as_json: bool) -> None:
    """Show what a store holds: rows, size, layers, untracked parameters, checkpoints, weights, projection, health.

    Example: gradindex info /tmp/mnist
    """
    from ..errors import IndexFileError
    from ..store import GradientStore, asked_again, overview

    found = overview(folder)
    if found.complete:
        try:
            found = found.searched(asked_again(lambda: _searched(GradientStore(folder))))
        except IndexFileError as error:
            found = found.searched(f"damaged index: {error}")
    if as_json:
        click.echo(to_json(found.to_json()))
        return
    manifest = found.manifest
    projection = manifest.map.projection
    sized = projection.kind not in UNSIZED_PROJECTIONS
    sketch = f", {projection.dim} a checkpoint, seed {projection.seed}" if sized else ""
    checkpoints = [
        {
            "checkpoint": number,
            **_source(manifest.sources, number),
            "step": checkpoint.step,
            "eta": ", ".join(f"{rate:.6g}" for rate in sorted(set(checkpoint.learning_rates.values()))),
            "weighting": checkpoint.weighting,
        }
        for number, checkpoint in enumerate(manifest.map.checkpoints)
    ]
    layers = [
        {"layer": layer.title, "d_out": layer.d_out, "d_in": layer.d_in, "route": layer.route}
        for layer in manifest.map.layers
    ]
    columns = ", ".join(map(printable, manifest.columns)) or "none"
    unit = ", rows of unit norm" if manifest.map.unit_norm else ""
    factors = f", exact factors in {manifest.factors}" if manifest.has_factors else ""
    factors += "" if manifest.wide is None else f", wide rows of {manifest.wide:,} numbers a checkpoint"
    say(
        f"{printable(manifest.task)}: {found.n_train:,} rows of {manifest.dim:,} numbers ({found.state})\n"
        f"projection {projection.kind}{sketch}; gradients in {manifest.map.precision}{unit}\n"
        f"rows in {manifest.row_type}{factors}; {_bytes(found.bytes)} in {found.shards} shards, "
        f"made in {found.seconds:,.0f} s\n"
        f"columns: {columns}; search: {found.search or 'once the store is complete'}\n"
        f"{_tracked(manifest.tracked)}"
        f"health: {'; '.join(found.health)}\n\n"
        f"{table(checkpoints)}\n\n{table(layers)}{_differing_names(manifest.map.checkpoints)}"
    )


def _searched(store: GradientStore) -> str:
    """How rows are searched, and for whitened queries where the store has what these take."""
    from ..retrieval.candidates import Candidates
    from ..store import home_of

    how = Candidates(store).how
    if home_of(store).is_dir():
        how += f"; whitened queries: {Candidates(store, geometry='whitened').how}"
    return how


def _source(sources: Sequence[Mapping[str, Any]], number: int) -> dict[str, str]:
    """A cell on what wrote a checkpoint; none of stores that do not say it, or where all are plain weights."""
    plain = all(source["kind"] == "weights" and not source["from_model"]["parameters"] for source in sources)
    if plain or len(sources) <= number:
        return {}
    own = sources[number]["from_model"]["parameters"]
    lent = f" ({own:,} parameter{'s' * (own != 1)} from the model)" if own else ""
    return {"source": f"{sources[number]['kind']}{lent}"}


def _tracked(tracked: Mapping[str, Any] | None) -> str:
    """Lines on what is tracked and what is left out; none of stores that do not say it, which are older."""
    if tracked is None:
        return ""
    by = "what was trained" if tracked["layers"] is None else f"layers={', '.join(map(repr, tracked['layers']))}"
    lines = [f"tracked: {_counted(tracked)} ({by})"]
    for said, summaries in (("among them", tracked["noted"]), ("left out", tracked["left_out"])):
        for summary in summaries:
            more = summary["parameters"] - len(summary["first"])
            names = f"{', '.join(summary['first'])}{f' and {more:,} more' if more else ''}"
            lines.append(f"  {said}: {_counted(summary)} ({summary['why']}): {names}")
    return "\n".join(lines) + "\n"


def _counted(summary: Mapping[str, Any]) -> str:
    parameters, numbers = summary["parameters"], summary["numbers"]
    return f"{parameters:,} parameter{'s' * (parameters != 1)} of {numbers:,} number{'s' * (numbers != 1)}"


def _differing_names(checkpoints: Sequence[StoredCheckpoint]) -> str:
    """What only a checkpoint's file or only the model had."""
    lines = []
    for number, checkpoint in enumerate(checkpoints):
        for name, what in (
            ("filled", "not in the file, taken from tied ones or the model"),
            ("passed_over", "not used"),
        ):
            names = getattr(checkpoint, name)
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"checkpoint {number}, {what}: {', '.join(names[:5])}{more}")
    return "".join(f"\n{line}" for line in (["", *lines] if lines else []))


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, {"bytes": "KiB", "KiB": "MiB", "MiB": "GiB", "GiB": "TiB"}[unit]
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


@click.command()
@FOLDER
def verify(folder: Path) -> None:
    """Read every file of a store and its index, and check it against its checksums.

    Example: gradindex verify /tmp/mnist
    """
    from ..errors import IndexFileError, StoreError
    from ..index import checked
    from ..retrieval.candidates import index_folders
    from ..store import GradientStore, asked_again

    store = GradientStore(folder)
    problems = asked_again(store.verify)
    for index in filter(Path.is_dir, index_folders(folder, "whitened")):
        try:
            checked(index)
        except IndexFileError as error:
            problems.append(f"{error}; rebuild the index: gradindex index {folder}, or remove it with --drop")
    if problems:
        raise StoreError("; ".join(problems))
    say(f"{folder}: {store.n_train:,} rows in {len(store.manifest.shards)} shards are undamaged")


@click.command()
@FOLDER
@click.option("--id", "ids", multiple=True, type=int, help="Training id to remove; repeatable.")
@click.option("--ids-from", type=click.File(), help="A file of ids separated by whitespace; - for standard input.")
def remove(folder: Path, ids: tuple[int, ...], ids_from: Any) -> None:
    """Drop training examples from every answer at once. `gradindex compact` frees their space.

    Example: gradindex remove /tmp/mnist --id 7 --id 12
    """
    if bool(ids) == (ids_from is not None):
        raise click.UsageError("Give either --id or --ids-from.")
    import numpy as np

    from ..store import remove as run

    try:
        wanted = np.array([int(i) for i in (ids or ids_from.read().split())], dtype=np.int64)
    except (ValueError, OverflowError) as error:  # no numbers, no text, or too large
        raise click.UsageError(f"These are not ids: {str(error)[:100]}. Write integers.") from None
    store = run(folder, wanted)
    say(f"{folder}: {store.n_train:,} rows left")


@click.command()
@FOLDER
@click.option("--upgrade", is_flag=True, help="Also pack exact factors of layers with many outputs, without gradients.")
def compact(folder: Path, upgrade: bool) -> None:
    """Free the space of removed rows and merge small shards. Ids do not change.

    Safe to rerun: it resumes where it stopped. Until it is done, the store gives its old answers.

    Example: gradindex compact /tmp/mnist
    """
    from ..store import compact as run
    from ..store import overview

    before = overview(folder).bytes
    store = run(folder, upgrade=upgrade)
    now = overview(folder).bytes
    say(f"{folder}: {store.n_train:,} rows in {_bytes(now)}, {_bytes(before - now)} less than before")


@click.command()
@FOLDER
@click.argument("others", nargs=-1, required=True, type=PATH, metavar="OTHER...")
@click.option(
    "--offset",
    type=int,
    help="Add this to the ids of the first OTHER; the next continue after it. By default ids do not change.",
)
def merge(folder: Path, others: tuple[Path, ...], offset: int | None) -> None:
    """Copy into DIR the rows of stores that were built separately with the same checkpoints and projection.

    Safe to rerun: it resumes where it stopped. Until it is done, the store gives its old answers.

    Example: gradindex merge /tmp/mnist /tmp/more --offset 20000
    """
    from ..store import merge as run

    store = run(folder, others, offset=offset)
    say(f"{folder}: {store.n_train:,} rows, ids up to {store.manifest.next_id - 1}")


@click.command()
@FOLDER
def seal(folder: Path) -> None:
    """Finish a store whose parts were built with `build --part`.

    Example: gradindex seal /tmp/mnist
    """
    from ..store import seal as run

    store = run(folder)
    say(f"{folder}: {store.n_train:,} rows of {store.dim:,} numbers, from {store.n_checkpoints} checkpoints")


@click.command()
@FOLDER
@click.argument("out", type=PATH, metavar="OUT")
@click.option("--no-rows", is_flag=True, help="Leave out the rows: ids, columns, self-influence and losses alone.")
def export(folder: Path, out: Path, no_rows: bool) -> None:
    """Write rows and scores for other programs: OUT.parquet (extra "parquet") or a folder of NumPy files.

    Example: gradindex export /tmp/mnist /tmp/rows.parquet
    """
    from ..store import GradientStore, asked_again
    from ..store import export as run

    def exported() -> GradientStore:
        store = GradientStore(folder)
        run(store, out, rows=not no_rows)
        return store

    store = asked_again(exported)
    of = "" if no_rows else f" of {store.dim:,} numbers"
    say(f"{out}: {store.n_train:,} {'examples' if no_rows else 'rows'}{of}")
