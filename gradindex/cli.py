"""The command line: parse, call one function, show."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import GradIndexError, check_k


class _OneLineErrors(click.Group):
    """Turns every error that gradindex raises on purpose into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GradIndexError as error:
            if ctx.params["traceback"]:
                raise
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--traceback", is_flag=True, help="On an error, show where it came from.")
def main(traceback: bool) -> None:
    """Which training examples made my model do this? Answered by TracIn, as a search engine."""


# As gradindex.projection.Kind and gradindex.gradients.Precision, which would import torch for --help.
KINDS = ["tensorsketch", "fitted", "kronecker", "gaussian", "rademacher", "none"]
PRECISIONS = ["float32", "bfloat16", "float16", "float64"]
_PATH = click.Path(path_type=Path)
_FOLDER = click.argument("folder", metavar="DIR", type=_PATH)
_DEVICE = click.option("--device", help="Where to compute, such as cuda; by default where the task's model is.")
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
_CSV = click.option("--csv", "as_csv", is_flag=True, help="CSV instead of a table.")


def _show(records: Sequence[dict[str, Any]], text: str, note: str, as_json: bool, as_csv: bool) -> None:
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


@main.command()
@click.option("--out", type=_PATH, default="gradindex-demo", show_default=True, help="Folder for all that it makes.")
def demo(out: Path) -> None:
    """Try everything on real handwritten digits: train, build, ask, report.

    Takes less than a minute on a CPU, needs the extra "demo", and prints the path of its report last.

    Example: gradindex demo --out /tmp/gradindex-demo
    """
    from .demo import run

    click.echo(run(out))


@main.command()
@click.argument("task")
@click.option("--out", required=True, type=_PATH, metavar="DIR", help="Folder of the store.")
@click.option("--projection", type=click.Choice(KINDS), default="tensorsketch", show_default=True)
@click.option("--dim", type=int, help="Numbers per checkpoint, at most; by default 1024.")
@click.option("--row-dim", type=int, help="Instead of --dim: numbers in a whole row, at most.")
@click.option("--row-bytes", type=int, help="Instead of --dim: bytes of a whole row, at most.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random map.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="float32", show_default=True)
@click.option(
    "--self-influence",
    type=click.Choice(["exact", "projected"]),
    default="exact",
    show_default=True,
    help="Exact, or the squared norm of the row: faster, an estimate.",
)
@click.option("--unit-norm", is_flag=True, help="Rank by the cosine of the gradients instead of TracInCP.")
@_DEVICE
@click.option("--workers", default=0, show_default=True, help="Processes that read examples.")
@click.option(
    "--channels-last/--channels-first",
    default=None,
    help="How pictures are laid out; by default with the channels last where the model can have that: faster.",
)
@click.option("--batch-size", type=int, help="Examples per pass; by default as many, up to 256, as --memory holds.")
@click.option(
    "--memory", metavar="SIZE", help="What a pass may take, such as 2G; by default a quarter of what is free."
)
def build(
    task: str, out: Path, projection: Any, dim: int | None, row_dim: int | None, row_bytes: int | None, seed: int,
    memory: str | None, **options: Any,
) -> None:  # fmt: skip
    """Build the store and index of TASK (path/to/file.py:name or package.module:name).

    Run it again to go on after an interruption: finished shards are kept.

    Example: gradindex build scripts/tasks/mnist.py:task --out /tmp/mnist
    """
    from .building import build as run
    from .memory import parse_bytes
    from .projection import DEFAULT_DIM, Projection
    from .task import load_task

    if sum(size is not None for size in (dim, row_dim, row_bytes)) > 1:
        raise click.UsageError("Give one of --dim, --row-dim and --row-bytes.")
    options["projection"] = Projection(projection, DEFAULT_DIM if dim is None else dim, seed, row_dim, row_bytes)
    options["memory"] = None if memory is None else parse_bytes(memory)
    store = run(load_task(task), out, **options)
    click.echo(f"{out}: {store.n_train:,} rows of {store.dim:,} numbers, from {store.n_checkpoints} checkpoints")


@main.command()
@_FOLDER
@click.option("--task", required=True, help="The task that the store was built from, as for build.")
@click.option("-q", "--position", multiple=True, type=int, help="Position in the task's query data; repeatable.")
@click.option("--train-id", multiple=True, type=int, help="Training id as the query; repeatable.")
@click.option("--file", "path", type=_PATH, help="A file that the task's read_query reads.")
@click.option("-k", default=10, show_default=True, help="Hits for each query.")
@click.option("--kind", type=click.Choice(["both", "proponents", "opponents"]), default="both", show_default=True)
@click.option(
    "--rerank",
    type=click.Choice(["exact", "none"]),
    default="exact",
    show_default=True,
    help="Settle the order by exact scores, or show the index's estimates.",
)
@click.option("--candidates", type=int, help="Candidates to settle by exact scores, by default 10 k.")
@_DEVICE
@click.option("--html", type=_PATH, help="Also write a page with pictures here (extra \"demo\").")  # fmt: skip
@_JSON
@_CSV
def query(
    folder: Path, task: str, position: tuple[int, ...], train_id: tuple[int, ...], path: Path | None,
    kind: str, device: str | None, html: Path | None, as_json: bool, as_csv: bool, **options: Any,
) -> None:  # fmt: skip
    """Show the top training examples behind queries: proponents, opponents or both.

    Example: gradindex query /tmp/mnist --task scripts/tasks/mnist.py:task --position 0 -k 5
    """
    if bool(position) + bool(train_id) + bool(path) != 1:
        raise click.UsageError("Give exactly one of --position, --train-id and --file.")
    from .hits import as_text
    from .retrieval import load
    from .task import load_task

    loaded = load_task(task)
    queries = loaded.read_queries(path) if path else list(position or train_id)
    retriever = load(folder, loaded, device=device)
    answers = [
        retriever.search(queries, opponents=name == "opponents", source="train" if train_id else "query", **options)
        for name in ("proponents", "opponents")
        if kind in (name, "both")
    ]
    if html:
        answers[0].save_html(html, *answers[1:])
        click.echo(html, err=True)
    records = [record for hits in answers for record in hits.records()]
    _show(records, as_text(answers), answers[0].note, as_json, as_csv)


@main.command("self-influence")
@_FOLDER
@click.option("-k", default=20, show_default=True, help="How many.")
@_JSON
@_CSV
def self_influence(folder: Path, k: int, as_json: bool, as_csv: bool) -> None:
    """Show the training examples with the highest self-influence: mislabelled, rare or ambiguous.

    Example: gradindex self-influence /tmp/mnist -k 20
    """
    import numpy as np

    from .hits import table
    from .store import GradientStore

    store = GradientStore(folder)
    check_k(k, store.n_train)
    scores = store.self_influence().sum(1)
    top = np.argsort(-scores, kind="stable")[:k]
    columns = {name: store.column(name, top) for name in store.columns}
    records = [
        {"rank": rank + 1, "id": int(i), "self_influence": float(scores[i])}
        | {name: values[rank].item() for name, values in columns.items()}
        for rank, i in enumerate(top)
    ]
    precision = store.manifest["map"]["precision"]
    rough = f" ({precision})" if precision in ("bfloat16", "float16") else ""
    note = f"{store.manifest['self_influence']}{rough} TracInCP of an example with itself, never negative; "
    note += "high for mislabelled, rare and ambiguous examples"
    _show(records, f"{table(records)}\n{note}", note, as_json, as_csv)


@main.command()
@_FOLDER
@_JSON
def info(folder: Path, as_json: bool) -> None:
    """Show what a store holds: data, layers, checkpoints with their weights, projection, index.

    Example: gradindex info /tmp/mnist
    """
    from .hits import table
    from .index.flat import describe
    from .store import GradientStore

    store = GradientStore(folder, sealed=False)
    index, described = describe(folder / "index"), store.manifest["map"]
    if as_json:
        click.echo(json.dumps(store.manifest | {"index": index}))
        return
    state = "complete" if store.manifest["sealed"] else f"unfinished, {len(store.finished())} shards done"
    projection = described["projection"]
    sketch = f", {projection['dim']} a checkpoint, seed {projection['seed']}" if projection["kind"] != "none" else ""
    checkpoints = [
        {
            "checkpoint": number,
            "step": item["step"],
            "eta": ", ".join(f"{rate:.6g}" for rate in sorted(set(item["learning_rates"].values()))),
            "weighting": item["weighting"],
        }
        for number, item in enumerate(described["checkpoints"])
    ]
    layers = [
        {"layer": x["name"] or "(model)", "rows": x["shape"][0], "columns": x["shape"][1], "route": x["route"]}
        for x in described["layers"]
    ]
    unit = ", rows of unit norm" if described["unit_norm"] else ""
    click.echo(
        f"{store.manifest['task']}: {store.n_train:,} rows of {store.dim:,} numbers ({state})\n"
        f"projection {projection['kind']}{sketch}; gradients in {described['precision']}{unit}\n"
        f"columns: {', '.join(store.columns) or 'none'}; index: {index['kind'] if index else 'none'}\n\n"
        f"{table(checkpoints)}\n\n{table(layers)}"
    )


@main.command()
@_FOLDER
def verify(folder: Path) -> None:
    """Read every file of a store and compare it with its checksum.

    Example: gradindex verify /tmp/mnist
    """
    from .errors import StoreError
    from .index.flat import damage
    from .store import GradientStore

    store = GradientStore(folder)
    problems = store.verify()
    index_problem = damage(folder / "index", store.manifest["fingerprint"])
    problems += [index_problem] if index_problem else []
    if problems:
        raise StoreError("; ".join(problems))
    click.echo(f"{folder}: {store.n_train:,} rows in {len(store.manifest['shards'])} shards and the index are sound")


if __name__ == "__main__":
    main()
