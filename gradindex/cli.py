"""The command line: parse, call one function, show."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import ArgumentError, GradIndexError


class _OneLineErrors(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GradIndexError as error:
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=_OneLineErrors)
@click.version_option(__version__)
def main() -> None:
    """Which training examples made my model do this? (TracIn, as a search engine.)"""


def _show(records: list[dict[str, Any]], as_json: bool, as_csv: bool, note: str) -> None:
    from .hits import table

    if as_json:
        click.echo(json.dumps({"note": note, "records": records}))
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, list(records[0]) if records else [])
        writer.writeheader()
        writer.writerows(records)
        click.echo(note, err=True)
    else:
        click.echo(f"{table(records)}\n{note}")


@main.command()
@click.argument("task")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the store.")
@click.option("--projection", type=click.Choice(["tensorsketch", "none"]), default="tensorsketch", show_default=True)
@click.option("--dim", default=1024, show_default=True, help="Numbers per checkpoint.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random map.")
@click.option("--batch-size", default=256, show_default=True)
def build(task: str, out: Path, projection: str, dim: int, seed: int, batch_size: int) -> None:
    """Build the store and index of TASK (path/to/file.py:name or package.module:name).

    Run it again to go on after an interruption.

    Example: gradindex build scripts/tasks/mnist.py:task --out /tmp/mnist
    """
    from .building import build as run
    from .projection import Projection
    from .task import load_task

    chosen = Projection(projection, dim, seed)  # type: ignore[arg-type]  # click.Choice allows the two literals alone
    store = run(load_task(task), out, projection=chosen, batch_size=batch_size)
    click.echo(f"{store.n_train} rows of {store.dim} numbers at {store.n_checkpoints} checkpoints in {out}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--task", required=True, help="The task that the store was built from.")
@click.option("-q", "--position", multiple=True, type=int, help="Position in the task's query data; repeatable.")
@click.option("--train-id", multiple=True, type=int, help="Training id as the query; repeatable.")
@click.option("--file", "path", type=click.Path(path_type=Path), help="A file that the task's read_query reads.")
@click.option("-k", default=10, show_default=True, help="Hits for each query.")
@click.option("--opponents", is_flag=True, help="Lowest scores instead of highest.")
@click.option("--rerank", type=click.Choice(["exact", "none"]), default="exact", show_default=True)
@click.option("--candidates", type=int, help="Candidates to re-score, by default 10 k.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--csv", "as_csv", is_flag=True)
def query(
    folder: Path, task: str, position: tuple[int, ...], train_id: tuple[int, ...], path: Path | None,
    k: int, opponents: bool, rerank: str, candidates: int | None, as_json: bool, as_csv: bool,
) -> None:  # fmt: skip
    """Show the top training examples of queries.

    Example: gradindex query /tmp/mnist --task scripts/tasks/mnist.py:task -q 0 -k 5
    """
    if bool(position) + bool(train_id) + bool(path) != 1:
        raise click.UsageError("Give exactly one of --position, --train-id and --file.")
    from .hits import SIGN
    from .retrieval import load
    from .task import load_task

    loaded = load_task(task)
    if path is not None:
        if loaded.read_query is None:
            raise ArgumentError("The task has no read_query, so it cannot read queries from a file. Add read_query= to Task.")
        if not path.exists():
            raise ArgumentError(f"{path} does not exist.")
        queries: Any = loaded.read_query(path)
    else:
        queries = list(position or train_id)
    source: Any = "train" if train_id else "query"
    options: dict[str, Any] = {"source": source, "rerank": rerank, "candidates": candidates}
    hits = load(folder, loaded).search(queries, k, opponents=opponents, **options)
    _show(hits.records(), as_json, as_csv, f"{hits.scored} TracInCP scores; {SIGN}")


@main.command("self-influence")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-k", default=20, show_default=True, help="How many.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--csv", "as_csv", is_flag=True)
def self_influence(folder: Path, k: int, as_json: bool, as_csv: bool) -> None:
    """Show the training examples with the highest self-influence: mislabelled, rare or ambiguous.

    Example: gradindex self-influence /tmp/mnist -k 20
    """
    import numpy as np

    from .store import GradientStore

    store = GradientStore(folder)
    if not 1 <= k <= store.n_train:
        raise ArgumentError(f"k is {k}, but must be between 1 and the number of training examples, {store.n_train}.")
    scores = store.self_influence().sum(1)
    top = np.argsort(-scores, kind="stable")[:k]
    columns = {name: store.column(name) for name in store.columns}
    records = [
        {"rank": r + 1, "id": int(i), "self_influence": float(scores[i])} | {n: v[i].item() for n, v in columns.items()}
        for r, i in enumerate(top)
    ]
    _show(records, as_json, as_csv, "exact TracInCP(z, z); high for mislabelled, rare and ambiguous examples")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True)
def info(folder: Path, as_json: bool) -> None:
    """Show what a store holds.

    Example: gradindex info /tmp/mnist
    """
    from .index.flat import describe
    from .store import GradientStore

    store = GradientStore(folder, sealed=False)
    if as_json:
        click.echo(json.dumps(store.manifest | {"index": describe(folder / "index")}))
        return
    described = store.manifest["map"]
    click.echo(f"{store.manifest['task']}: {store.n_train} rows of {store.dim} numbers, projection {described['projection']}")
    click.echo("complete" if store.manifest["sealed"] else f"unfinished: {len(store.finished())} shards done")
    for number, item in enumerate(described["checkpoints"]):
        rates = sorted(set(item["learning_rates"].values()))
        click.echo(f"checkpoint {number}: step {item['step']}, eta {rates} ({item['weighting']})")
    for layer in described["layers"]:
        click.echo(f"layer {layer['name']}: {layer['shape'][0]} x {layer['shape'][1]}, route {layer['route']}")
    click.echo(f"index: {(describe(folder / 'index') or {}).get('kind', 'none')}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Read every file of a store and compare it with its checksum.

    Example: gradindex verify /tmp/mnist
    """
    from .errors import StoreError
    from .index.flat import damage
    from .store import GradientStore

    store = GradientStore(folder)
    problems = store.verify()
    problem = damage(folder / "index", store.manifest["map_fingerprint"])
    problems += [problem] if problem else []
    if problems:
        raise StoreError("; ".join(problems))
    click.echo(f"{folder}: {store.n_train} rows in {len(store.manifest['shards'])} shards and the index are sound")
