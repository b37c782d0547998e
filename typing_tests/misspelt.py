"""What people mistype. Mypy must refuse each line with an ignore: strict, it reports one that ignores nothing."""

from gradindex import Hits, Retriever, Task, evaluation
from gradindex.building import build
from gradindex.projection import Projection


def names() -> None:
    """Functions that do not exist."""
    evaluation.recal_at_k  # type: ignore[attr-defined]
    evaluation.indx("store", recall=0.9)  # type: ignore[attr-defined]


def options_of_a_build(task: Task) -> None:
    """Options that do not exist, and values that they do not take."""
    build(task, "store", precison="float32")  # type: ignore[call-arg]
    build(task, "store", precision="float23")  # type: ignore[arg-type]
    build(task, "store", row_type="int4")  # type: ignore[arg-type]
    Projection("kroneker", 512)  # type: ignore[arg-type]


def options_of_a_question(retriever: Retriever) -> None:
    """Methods and options that do not exist, and values that they do not take."""
    retriever.search(0, at_leats=1)  # type: ignore[call-arg]
    retriever.search(0, kind="proponent")  # type: ignore[arg-type]


def parts_of_an_answer(hits: Hits) -> None:
    """Attributes that do not exist."""
    hits.idx  # type: ignore[attr-defined]
