"""Commands that answer: query, explain, self-influence."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..choices import ANSWER_KINDS
from ..output import shown_as, table_lines
from ..retrieval.question import Question
from .main import Form, forms, say, show
from .options import AGGREGATE, DEVICE, FILE, FOLDER, PATH, POSITION, TASK, TRAIN_ID, WHERE, options_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..retrieval.asking import Queries
    from ..retrieval.retriever import Retriever
    from ..store import GradientStore

# Records whose columns are looked up together.
_AT_ONCE = 10_000


@click.command()
@FOLDER
@TASK
@POSITION
@TRAIN_ID
@FILE
@click.option(
    "--kind",
    type=click.Choice(["both", *ANSWER_KINDS]),
    default="both",
    show_default=True,
    help="proponents: highest scores; opponents: lowest; absolute: largest magnitudes.",
)
@options_of(Question, leave_out=["kind"])
@WHERE
@click.option(
    "--ids", "ids_file", type=PATH, metavar="FILE", help="Only these training ids: one per line, or a .npy file."
)
@DEVICE
@click.option("--html", type=PATH, help="Also write an HTML page with pictures here (extra \"demo\").")  # fmt: skip
@forms
def query(
    folder: Path, task: str, position: tuple[int, ...], train_id: tuple[int, ...], path: Path | None, kind: str,
    where: list[tuple[str, str]], ids_file: Path | None, aggregate: Any, device: str | None, html: Path | None,
    form: Form, **options: Any,
) -> None:  # fmt: skip
    """Show the top training examples behind queries: proponents, opponents, both, or the largest magnitudes.

    Example: gradindex query /tmp/mnist --task scripts/tasks/mnist.py:task --position 0 -k 5
    """
    if html:
        from ..report import check_page

        check_page(html)  # before the gradients
    retriever, asked = _prepare(folder, task, position, train_id, path, aggregate, device)
    from ..retrieval.filters import parse_where, read_ids
    from ..retrieval.hits import summary, text_lines

    options |= {"where": parse_where(retriever.store, where), "ids": None if ids_file is None else read_ids(ids_file)}
    if kind == "both":
        answers = list(retriever.both(asked, **options))
    else:
        answers = [retriever.search(asked, kind=kind, **options)]  # type: ignore[arg-type]  # click chose it
    if html:
        answers[0].save_html(html, *answers[1:])
        say(str(html), err=True)
    show(
        (record for hits in answers for record in hits.each_record()),
        lambda: text_lines(answers),
        summary(answers),
        ["query", "kind", "rank", "id", "score", *map(shown_as, answers[0].columns)],
        form,
    )


def _prepare(
    folder: Path, task: str, position: tuple[int, ...], train_id: tuple[int, ...], path: Path | None, aggregate: Any,
    device: str | None,
) -> tuple[Retriever, Queries]:  # fmt: skip
    """Open a store and prepare the queries that the options name."""
    if bool(position) + bool(train_id) + bool(path) != 1:
        raise click.UsageError("Give exactly one of --position, --train-id and --file.")
    from ..retrieval.retriever import load
    from ..task import load_task

    loaded = load_task(task)
    queries = loaded.read_queries(path) if path else list(position or train_id)
    retriever = load(loaded, folder, device=device)
    if retriever.unseen:
        say(
            f"{folder} lacks {retriever.unseen:,} of the task's training examples, so answers leave them out. "
            f"To add them: gradindex add {folder} --task {task}",
            err=True,
        )
    return retriever, retriever.prepare(queries, "train" if train_id else "query", aggregate)


@click.command()
@FOLDER
@TASK
@POSITION
@TRAIN_ID
@FILE
@click.option("--id", "ids", multiple=True, type=int, required=True, help="Training example to explain; repeatable.")
@AGGREGATE
@DEVICE
@click.option("--html", type=PATH, help="Also write an HTML page with heat maps here (extra \"demo\").")  # fmt: skip
@forms
def explain(
    folder: Path, task: str, position: tuple[int, ...], train_id: tuple[int, ...], path: Path | None,
    ids: tuple[int, ...], aggregate: Any, device: str | None, html: Path | None, form: Form,
) -> None:  # fmt: skip
    """Show which checkpoints and layers the scores of training examples come from.

    Example: gradindex explain /tmp/mnist --task scripts/tasks/mnist.py:task --position 0 --id 5 --id 7
    """
    if html:
        from ..report import check_page

        check_page(html)  # before the gradients
    retriever, asked = _prepare(folder, task, position, train_id, path, aggregate, device)
    explanation = retriever.explain(asked, list(ids))
    if html:
        explanation.save_html(html)
        say(str(html), err=True)
    names = ["query", "id", "checkpoint", "layer", "score"]
    show(
        explanation.records(),
        lambda: str(explanation).split("\n"),
        {"note": explanation.note, "scored": explanation.scored},
        names,
        form,
    )


def _count(_: click.Context, __: click.Parameter, value: str | None) -> int | str | None:
    if value in (None, "all"):
        return value
    try:
        return int(str(value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither an integer nor all.") from None


def _matching(store: GradientStore, where: list[tuple[str, str]]) -> NDArray[np.int64]:
    from ..retrieval.filters import matching, parse_where  # which need torch

    return matching(store, parse_where(store, where))


@click.command("self-influence")
@FOLDER
@click.option(
    "-k", callback=_count, metavar="K", help="How many examples, or all; by default 20, or all if there are fewer."
)
@WHERE
@forms
def self_influence(folder: Path, k: int | str | None, where: list[tuple[str, str]], form: Form) -> None:
    """Show the training examples with the highest self-influence: often mislabelled, rare or ambiguous.

    With -k all, the output is streamed in every format.

    Example: gradindex self-influence /tmp/mnist -k 20
    """
    from ..errors import StoreChangedError
    from ..retrieval.hits import NOTHING
    from ..store import GradientStore as Store
    from ..store import asked_again, followed

    def found() -> tuple[GradientStore, NDArray[np.int64], NDArray[np.float64]]:
        store = Store(folder)
        only = _matching(store, where) if where else None
        count = min(20, store.n_train) if k is None else store.n_train if k == "all" else int(k)
        return store, *store.top_self_influence(count, only)

    store, ids, scores = asked_again(found)

    def values_of(some: NDArray[np.int64]) -> dict[str, list[Any]]:
        try:
            return {shown_as(name): store.column(name, some).tolist() for name in store.columns}
        except StoreChangedError:  # what is shown already stays true where these rows are the same
            now = followed(store, some)
            return {shown_as(name): now.column(name, some).tolist() for name in store.columns}

    def records() -> Iterator[dict[str, Any]]:
        for start in range(0, len(ids), _AT_ONCE):
            some = ids[start : start + _AT_ONCE]
            columns = asked_again(partial(values_of, some))
            for place, i in enumerate(some.tolist()):
                yield {"rank": start + place + 1, "id": i, "self_influence": float(scores[start + place])} | {
                    name: values[place] for name, values in columns.items()
                }

    precision = store.manifest.map.precision
    rough = f" ({precision})" if precision in ("bfloat16", "float16") else ""
    note = f"{store.manifest.self_influence}{rough} TracInCP of an example with itself, never negative; "
    note += "high for mislabelled, rare and ambiguous examples"

    def lines() -> Iterator[str]:
        yield from table_lines(records) if len(ids) else [f"({NOTHING})"]
        yield note

    names = ["rank", "id", "self_influence", *map(shown_as, store.columns)]
    show(records(), lines, {"note": note}, names, form)
