"""Proponents and opponents as pictures: TracIn beside influence functions and the similarity of features.

MNIST (every parameter) and CIFAR-10 (the last layer), 10,000 training rows each, a tenth with flipped labels, the
cached checkpoints of the reference tasks. Beside TracInCP stand

- influence functions (Koh and Liang 2017, arXiv:1703.04730) of the last layer at the last checkpoint,
  g'^T (H + damping)^-1 g, with its exact Hessian H = 1/n sum (diag(p) - p p^T) x [x, 1] [x, 1]^T; signed as
  TracIn is: positive = more weight for the training example lowers the query's loss;
- the cosine of the last layer's inputs.

python scripts/paper/pictures.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from common import OPPONENT, PROPONENT, Experiment, spearman
from last_layer import LastLayer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.data import Subset

import gradindex
from gradindex import Hits, Task
from gradindex.evaluation import share_found
from gradindex.projection import Projection

N_TRAIN, N_QUERY, K, SEED = 10_000, 100, 10, 0
# Multiples of the Hessian's mean eigenvalue that are added to each of its eigenvalues; the last is shown.
DAMPINGS = (0.1, 1.0, 10.0)
ON_PAGE, IN_PICTURE = 6, 3  # queries and hits


def main() -> None:
    """Measure, draw and print."""
    experiment = Experiment("Pictures: TracIn, influence functions and similar features", __doc__)
    import cifar10
    import mnist

    makers = {"mnist": mnist.task} if experiment.quick else {"mnist": mnist.task, "cifar10": cifar10.task}
    for name, make in makers.items():
        compare(experiment, name, smaller(make(), 1000 if experiment.quick else N_TRAIN))
    experiment.finish()


def smaller(task: Task, n_train: int) -> Task:
    """Some of the training rows and of the queries."""
    rows = np.sort(np.random.default_rng(SEED).permutation(task.n_train)[:n_train])
    return replace(
        task,
        train=Subset(task.train, rows.tolist()),
        query=Subset(task.query, range(N_QUERY)),
        columns={name: np.asarray(values)[rows] for name, values in task.columns.items()},
        query_columns={name: np.asarray(values)[:N_QUERY] for name, values in task.query_columns.items()},
    )


def compare(experiment: Experiment, name: str, task: Task) -> None:
    """All three ways on one task."""
    train, query = LastLayer.of(task, task.train), LastLayer.of(task, task.query)
    right = (query.probabilities.argmax(1) == query.labels).numpy()
    experiment.figure(f"{name}: accuracy on the queries", right.mean(), "share")
    with tempfile.TemporaryDirectory() as folder:
        # With exact factors in the store, all exact scores follow without another pass over the training examples.
        store = gradindex.build(task, folder, projection=Projection(dim=64), factors="float32")
        hits = gradindex.load(task, folder).proponents(range(N_QUERY), k=task.n_train)
        own = {"TracIn": store.self_influence().sum(1)}
    scores = {"TracIn": np.empty_like(hits.scores)}
    np.put_along_axis(scores["TracIn"], hits.ids, hits.scores, 1)

    hessian = train.hessian()
    for damping in DAMPINGS:
        mine, theirs = (layer.whitened(hessian, damping) for layer in (query, train))
        scores["influence functions"] = (mine.T @ theirs).numpy()
        own["influence functions"] = theirs.square().sum(0).numpy()
        value = spearman(scores["TracIn"], scores["influence functions"]).mean()
        what = f"{name}: TracIn and influence functions damped by {damping:g}"
        experiment.figure(f"{what}: Spearman, mean of the queries", value, "")
        inspected = share_found(own["influence functions"], task.columns["flipped"], (0.1, 0.2))
        experiment.keep(f"{name}: flipped labels found at 10% and 20%, damping {damping:g}", inspected.tolist())
    features = [functional.normalize(layer.inputs[:, :-1]) for layer in (query, train)]
    scores["similar features"] = (features[0] @ features[1].T).numpy()

    answers = []
    for way, values in scores.items():
        answers.append(answer(hits, values, f"proponents by {way}" if way in own else f"most {way}", False))
        if way in own:
            answers.append(answer(hits, values, f"opponents by {way}", True))
    labels = hits.query_columns["label"][:, None]
    for found in answers:
        top = found.first(N_QUERY, K)
        experiment.figure(
            f"{name}, {found.kind}: with the query's label", (top.columns["label"] == labels).mean(), "share"
        )
        experiment.figure(f"{name}, {found.kind}: flipped labels", top.columns["flipped"].mean(), "share")
    for way, suspicion in own.items():
        for inspected, share in zip(
            (0.1, 0.2), share_found(suspicion, task.columns["flipped"], (0.1, 0.2)), strict=True
        ):
            experiment.figure(f"{name}, {way}: flipped labels found at {inspected:.0%} inspected", share, "share")
    chosen = np.concatenate([np.flatnonzero(right)[: ON_PAGE // 2], np.flatnonzero(~right)[: ON_PAGE // 2]]).tolist()
    shown = [only(found, chosen) for found in answers]
    page = experiment.place(f"-{name}.html")
    if page is not None:
        shown[0].save_html(page, *shown[1:])
    experiment.draw(drawn(shown), f"-{name}.png")


def answer(like: Hits, scores: NDArray[Any], kind: str, opponents: bool) -> Hits:
    """The best by these scores, as an answer to the same queries."""
    ids = np.argsort(scores if opponents else -scores, axis=1, kind="stable")[:, :K].astype(np.int64)
    back = np.argsort(like.ids, axis=1)  # the columns of ``like`` are in its own order
    columns = {
        name: np.take_along_axis(np.take_along_axis(values, back, 1), ids, 1) for name, values in like.columns.items()
    }
    return replace(like, ids=ids, scores=np.take_along_axis(scores, ids, 1), kind=kind, columns=columns)


def only(hits: Hits, queries: Sequence[int]) -> Hits:
    """Some of the queries, five hits each."""
    show = hits.show_query
    return replace(
        hits,
        ids=hits.ids[queries, :5],
        scores=hits.scores[queries, :5],
        queries=tuple(hits.queries[row] for row in queries),
        columns={name: values[queries, :5] for name, values in hits.columns.items()},
        query_columns={name: values[queries] for name, values in hits.query_columns.items()},
        show_query=None if show is None else lambda row: show(queries[row]),
    )


def drawn(answers: Sequence[Hits]) -> Figure:
    """A row for each query: itself, then the first hits of each kind; flipped labels in red."""
    n_query = len(answers[0].queries)
    widths = [1.0] + [w for _ in answers for w in (0.25, *[1.0] * IN_PICTURE)]
    picture = Figure(figsize=(0.82 * sum(widths), 1.12 * n_query + 0.5), layout="constrained")
    picture.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.5 / picture.get_figheight()))  # the headings' place
    grid = picture.subplots(n_query, len(widths), width_ratios=widths, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row in range(n_query):
        shown, label = answers[0].show_query, answers[0].query_columns["label"][row]
        place(grid[row, 0], shown(row) if shown else None, str(label), "black")
        for number, hits in enumerate(answers):
            for rank in range(IN_PICTURE):
                axes = grid[row, 2 + number * (IN_PICTURE + 1) + rank]
                label, flipped = (hits.columns[name][row, rank] for name in ("label", "flipped"))
                place(axes, hits.show_train(int(hits.ids[row, rank])), str(label), OPPONENT if flipped else "black")
                if row == 0 and rank == IN_PICTURE // 2:
                    colour = OPPONENT if hits.kind.startswith("opponents") else PROPONENT
                    above = {"transform": axes.transAxes, "ha": "center", "fontsize": 9, "color": colour}
                    axes.text(0.5, 1.45, hits.kind.replace(" by ", "\nby "), **above).set_in_layout(False)
    return picture


def place(axes: Any, shown: Any, label: str, colour: str) -> None:
    """A picture with its label above."""
    axes.imshow(np.squeeze(shown), cmap="gray", interpolation="nearest")
    axes.set_title(label, fontsize=8, color=colour, pad=2)


if __name__ == "__main__":
    main()
