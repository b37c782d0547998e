"""What people mistype. Mypy must refuse each line with an ignore: strict, it reports one that ignores nothing."""

import gradindex
from gradindex import BuildOptions, Hits, Question, Retriever, Task, evaluation, losses
from gradindex.building import build
from gradindex.projection import Projection


def names() -> None:
    """Functions that do not exist."""
    gradindex.laod  # type: ignore[attr-defined]
    gradindex.evaluation.idnex("store")  # type: ignore[attr-defined]
    evaluation.recal_at_k  # type: ignore[attr-defined]
    evaluation.indx("store", recall=0.9)  # type: ignore[attr-defined]


def options_of_a_build(task: Task) -> None:
    """Options that do not exist, and values that they do not take."""
    build(task, "store", precison="float32")  # type: ignore[call-overload]
    build(task, "store", precision="float23")  # type: ignore[call-overload]
    build(task, "store", row_type="int3")  # type: ignore[call-overload]
    BuildOptions(row_tpye="int8")  # type: ignore[call-arg]
    gradindex.add(task, "store", worker=2)  # type: ignore[call-arg]
    gradindex.load("store", task)  # type: ignore[arg-type]
    Projection("kroneker", 512)  # type: ignore[arg-type]


def losses_of_a_task(task: Task) -> None:
    """Values that losses do not take."""
    losses.causal_lm("average")  # type: ignore[arg-type]
    losses.sequence_classification("ranking")  # type: ignore[arg-type]
    Task(task.model, task.loss, task.train, task.checkpoints, query_loss="predict")  # type: ignore[arg-type]


def options_of_a_question(retriever: Retriever) -> None:
    """Methods and options that do not exist, and values that they do not take."""
    retriever.search(0, at_leats=1)  # type: ignore[call-arg]
    retriever.proponents(0, at_leats=1)  # type: ignore[call-arg]
    retriever.opponents(0, 5, whre={"label": 3})  # type: ignore[call-arg]
    retriever.both(0, kind="absolute")  # type: ignore[call-arg]
    retriever.explian(0, [3])  # type: ignore[attr-defined]
    Question(kind="oponents")  # type: ignore[arg-type]
    retriever.search(0, kind="proponent")  # type: ignore[arg-type]


def parts_of_an_answer(hits: Hits) -> None:
    """Attributes that do not exist."""
    hits.idx  # type: ignore[attr-defined]
