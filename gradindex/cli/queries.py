"""Commands that answer: query, explain, self-influence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..choices import ANSWER_KINDS, Aggregate, QueryGeometry
from ..output import shown_as, table_lines
from ..retrieval.question import Question
from .main import Form, forms, say, show
from .options import (
    AGGREGATE,
    DAMPING,
    DEVICE,
    FILE,
    FOLDER,
    GEOMETRY,
    ITERATIONS,
    PATH,
    POSITION,
    TASK,
    TEXT,
    TRAIN_ID,
    WHERE,
    Command,
    options_of,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..retrieval.asking import Queries
    from ..retrieval.retriever import Retriever
    from ..store import GradientStore

# Records whose columns are looked up together.
_AT_ONCE = 10_000


def _about_queries(html_help: str) -> Callable[[Command], Command]:
    """Options that name a store and queries, and the page to write.

    The command gets ``retriever`` and ``queries``, which are prepared once the page is known to be writable, and
    ``html``.
    """
    options = (
        FOLDER, TASK, POSITION, TRAIN_ID, FILE, TEXT, AGGREGATE, GEOMETRY, DAMPING,
        ITERATIONS, DEVICE,
        click.option("--html", type=PATH, help=html_help),
    )  # fmt: skip

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(
            folder: Path, task: str, position: tuple[int, ...], train_id: tuple[int, ...], path: Path | None,
            text: tuple[str, ...], aggregate: Aggregate | None, geometry: QueryGeometry, damping: float | None,
            iterations: int | None, device: str | None, html: Path | None, **others: Any,
        ) -> None:  # fmt: skip
            if html:
                from ..report import check_page

                check_page(html)
            if bool(position) + bool(train_id) + bool(path) + bool(text) != 1:
                raise click.UsageError("Give exactly one of --position, --train-id, --file and --text.")
            from ..retrieval.retriever import load
            from ..task import load_task

            loaded = load_task(task)
            given: Any = loaded.read_texts(text) if text else list(position or train_id)
            if path:
                given = loaded.read_queries(path)
            asked: dict[str, Any] = {"geometry": geometry, "damping": damping, "iterations": iterations}
            retriever = load(loaded, folder, device=device, **asked)
            if retriever.unseen:
                say(
                    f"{folder} lacks {retriever.unseen:,} of the task's training examples, so answers leave them out. "
                    f"To add them: gradindex add {folder} --task {task}",
                    err=True,
                )
            queries = retriever.prepare(given, "train" if train_id else "query", aggregate)
            command(retriever=retriever, queries=queries, html=html, **others)

        decorated: Command = run
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


@click.command()
@_about_queries('Also write an HTML page with pictures here (extra "demo").')
@click.option(
    "--kind",
    type=click.Choice(["both", *ANSWER_KINDS]),
    default="both",
    show_default=True,
    help="proponents: highest scores; opponents: lowest; absolute: largest magnitudes.",
)
@options_of(Question, leave_out=["kind", "aggregate"])
@WHERE
@click.option(
    "--ids", "ids_file", type=PATH, metavar="FILE", help="Only these training ids: one per line, or a .npy file."
)
@forms
def query(
    retriever: Retriever, queries: Queries, html: Path | None, kind: str, where: list[tuple[str, str]],
    ids_file: Path | None, form: Form, **options: Any,
) -> None:  # fmt: skip
    """Show the top training examples behind queries: proponents, opponents, both, or the largest magnitudes.

    Example: gradindex query /tmp/mnist --task scripts/tasks/mnist.py:task --position 0 -k 5
    """
    from ..retrieval.filters import parse_where, read_ids
    from ..retrieval.hits import summary, text_lines

    options |= {"where": parse_where(retriever.store, where), "ids": None if ids_file is None else read_ids(ids_file)}
    if kind == "both":
        answers = list(retriever.both(queries, **options))
    else:
        answers = [retriever.answer(queries, Question.from_dict({"kind": kind, **options}))]
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


@click.command()
@_about_queries('Also write an HTML page with heat maps here (extra "demo").')
@click.option("--id", "ids", multiple=True, type=int, required=True, help="Training example to explain; repeatable.")
@click.option("--tokens", is_flag=True, help="By tokens of the query and of the training example instead.")
@forms
def explain(
    retriever: Retriever, queries: Queries, html: Path | None, ids: tuple[int, ...], tokens: bool, form: Form
) -> None:
    """Show which checkpoints and layers, or which tokens, the scores of training examples come from.

    Example: gradindex explain /tmp/mnist --task scripts/tasks/mnist.py:task --position 0 --id 5 --id 7
    """
    explanation: Any = (retriever.explain_tokens if tokens else retriever.explain)(queries, list(ids))
    if html:
        explanation.save_html(html)
        say(str(html), err=True)
    show(
        explanation.records(),
        lambda: str(explanation).split("\n"),
        {"note": explanation.note, "scored": "exact" if tokens else explanation.scored},
        ["query", "id", *(("side", "position", "token") if tokens else ("checkpoint", "layer")), "score"],
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
