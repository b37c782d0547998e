"""Commands about finding: whiten, index, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..choices import INDEX_KINDS, QueryGeometry
from ..output import table, to_json
from .main import JSON, say
from .options import DAMPING, DEVICE, FOLDER, GEOMETRY, part_option

_TASK = click.option("--task", help="Use this task's queries and exact scores; by default training examples.")
_K = click.option("-k", "--k", type=int, help="Size of the top; by default 100, or all if there are fewer.")
_QUERIES = click.option(
    "--queries", type=click.IntRange(min=20), default=500, show_default=True, help="Largest number of queries to use."
)


def _retriever(folder: Path, task: str | None, device: str | None, **asked: Any) -> Any:
    if task is None:
        return None
    from ..retrieval.retriever import load
    from ..task import load_task

    return load(load_task(task), folder, device=device, use_index=False, **asked)


def _top(folder: Path, k: int | None, task: str | None) -> int:
    from ..store import GradientStore

    most = GradientStore(folder).n_train - (task is None)  # a training example is no answer to itself
    return max(1, min(100, most)) if k is None else k


@click.command()
@FOLDER
@part_option("Only part I of N, beside other processes; a call without --part then joins them.")
def whiten(folder: Path, part: tuple[int, int] | None) -> None:
    """Make what whitened queries take: the second moments of a store's rows, in one pass over them.

    They lie beside the rows; add, remove, compact, merge and add-checkpoint keep them true. Safe to rerun: it goes on
    where it stopped, and does nothing where nothing changed.

    Example: gradindex whiten /tmp/mnist
    """
    from ..store import second_moments

    found = second_moments(folder, part)
    of_part = "" if part is None else f" of part {part[0]}/{part[1]}"
    few = found.count < found.sums.shape[1]
    say(
        f"{folder}: second moments of {found.count:,} rows{of_part}, {len(found.sums)} checkpoints of "
        f"{found.sums.shape[1]:,} numbers"
        + ("; there are fewer rows than numbers, so that damping decides much" if few and part is None else "")
    )


@click.command()
@FOLDER
@click.option("--recall", default=0.99, show_default=True, help="Share of the true top-k that the index must find.")
@_K
@_QUERIES
@_TASK
@DEVICE
@click.option(
    "--kind",
    type=click.Choice(INDEX_KINDS),
    help="flat and ivf store a byte per number, pq two bits, spill one in several lists; ivf and spill scan a few "
    "lists, the others all rows. By default the fastest.",
)
@click.option("--dim", type=int, help="Size of an index row, in numbers; by default the fastest.")
@click.option("--copies", type=click.IntRange(min=1), help="Lists that a row is in, for spill; by default the fastest.")
@click.option("--budget", type=float, help="Seconds after which no further index is begun; by default no limit.")
@click.option("--drop", is_flag=True, help="Remove the index: scan all rows.")
@GEOMETRY
@DAMPING
def index(
    folder: Path, recall: float, k: int | None, queries: int, task: str | None, device: str | None, drop: bool,
    geometry: QueryGeometry, damping: float | None, **options: Any,
) -> None:  # fmt: skip
    """Build the fastest index that finds --recall of the true top-k, both of proponents and of opponents.

    Half of the queries tune it, the other half measure it: if no index reaches this recall on held-out queries, none
    is created. Nor is one created where scanning all rows is as fast, as in small stores.

    Example: gradindex index /tmp/mnist --recall 0.99 --k 100
    """
    from ..evaluation import index as run
    from ..evaluation.tuning import drop as take_away

    if drop:
        say(f"{folder}: {take_away(folder, geometry).how}")
        return
    asked: dict[str, Any] = {"geometry": geometry, "damping": damping}
    retriever = _retriever(folder, task, device, **asked)
    options |= {"device": device, "retriever": retriever} | (asked if retriever is None else {})
    found = run(folder, recall=recall, k=_top(folder, k, task), n_query=queries, **options)
    say(f"{folder}: {found.how}")


@click.command()
@FOLDER
@_K
@_QUERIES
@_TASK
@GEOMETRY
@DAMPING
@DEVICE
@JSON
def evaluate(
    folder: Path, k: int | None, queries: int, task: str | None, device: str | None, as_json: bool, **asked: Any
) -> None:
    """Measure how much of the true top-k is found, with the index and with the rows alone.

    "at least" is the lower end of a one-sided 95% interval over the queries.

    Example: gradindex evaluate /tmp/mnist
    """
    from ..evaluation.measuring import as_records
    from ..evaluation.measuring import evaluate as run

    k = _top(folder, k, task)
    retriever = _retriever(folder, task, device, **asked)
    against, found = run(folder, k=k, n_query=queries, retriever=retriever, **(asked if retriever is None else {}))
    records = as_records(found, k)
    click.echo(to_json({"against": against, "records": records}) if as_json else f"{table(records)}\n{against}")
