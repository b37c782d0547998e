"""Commands that answer: query, self-influence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .main import CSV, DEVICE, FOLDER, JSON, PATH, show


@click.command()
@FOLDER
@click.option("--task", required=True, help="The task that the store was built from, as for build.")
@click.option("-q", "--position", multiple=True, type=int, help="Position in the task's query data; repeatable.")
@click.option("--train-id", multiple=True, type=int, help="Training id as the query; repeatable.")
@click.option("--file", "path", type=PATH, help="A file that the task's read_query reads.")
@click.option("-k", default=10, show_default=True, help="Hits for each query.")
@click.option("--kind", type=click.Choice(["both", "proponents", "opponents"]), default="both", show_default=True)
@click.option(
    "--rerank",
    type=click.Choice(["exact", "none"]),
    default="exact",
    show_default=True,
    help="Settle the order by exact scores, or show the rows' estimates.",
)
@click.option(
    "--candidates",
    type=int,
    help="Candidates to settle by exact scores, by default 10 k, or what the index was tuned to.",
)
@DEVICE
@click.option("--html", type=PATH, help="Also write a page with pictures here (extra \"demo\").")  # fmt: skip
@JSON
@CSV
def query(
    folder: Path, task: str, position: tuple[int, ...], train_id: tuple[int, ...], path: Path | None,
    kind: str, device: str | None, html: Path | None, as_json: bool, as_csv: bool, **options: Any,
) -> None:  # fmt: skip
    """Show the top training examples behind queries: proponents, opponents or both.

    Example: gradindex query /tmp/mnist --task scripts/tasks/mnist.py:task --position 0 -k 5
    """
    if bool(position) + bool(train_id) + bool(path) != 1:
        raise click.UsageError("Give exactly one of --position, --train-id and --file.")
    from ..hits import as_text
    from ..retrieval import load
    from ..task import load_task

    loaded = load_task(task)
    queries = loaded.read_queries(path) if path else list(position or train_id)
    retriever = load(folder, loaded, device=device)
    if retriever.unseen:
        click.echo(
            f"{folder} lacks {retriever.unseen:,} training examples of the task, which it answers without. "
            f"To add them: gradindex add {folder} --task {task}",
            err=True,
        )
    answers = [
        retriever.search(queries, opponents=name == "opponents", source="train" if train_id else "query", **options)
        for name in ("proponents", "opponents")
        if kind in (name, "both")
    ]
    if html:
        answers[0].save_html(html, *answers[1:])
        click.echo(html, err=True)
    records = [record for hits in answers for record in hits.records()]
    show(records, as_text(answers), answers[0].note, as_json, as_csv)


@click.command("self-influence")
@FOLDER
@click.option("-k", type=int, help="How many; by default 20, or all if there are fewer.")
@JSON
@CSV
def self_influence(folder: Path, k: int | None, as_json: bool, as_csv: bool) -> None:
    """Show the training examples with the highest self-influence: mislabelled, rare or ambiguous.

    Example: gradindex self-influence /tmp/mnist -k 20
    """
    from ..hits import table
    from ..store import GradientStore

    store = GradientStore(folder)
    ids, scores = store.top_self_influence(min(20, store.n_train) if k is None else k)
    columns = {name: store.column(name, ids) for name in store.columns}
    records = [
        {"rank": rank + 1, "id": int(i), "self_influence": float(scores[rank])}
        | {name: values[rank].item() for name, values in columns.items()}
        for rank, i in enumerate(ids)
    ]
    precision = store.manifest["map"]["precision"]
    rough = f" ({precision})" if precision in ("bfloat16", "float16") else ""
    note = f"{store.manifest['self_influence']}{rough} TracInCP of an example with itself, never negative; "
    note += "high for mislabelled, rare and ambiguous examples"
    show(records, f"{table(records)}\n{note}", note, as_json, as_csv)
