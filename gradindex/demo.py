"""The demo: real handwritten digits, a tenth of them mislabelled, from training to a report."""

from __future__ import annotations

import importlib.resources
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from .building import build
from .checkpoint import find_checkpoints
from .errors import StoreError
from .evaluation import recall_at_k, share_found
from .files import write_json
from .output import check_file, new_file, table
from .recorder import Recorder
from .report import Section, check_page, line_chart, require, write_page
from .retrieval.hits import SIGN, as_text, make_cards
from .retrieval.retriever import load
from .retrieval.scoring import exact_scores
from .store import GradientStore
from .task import Task

N_TRAIN, FLIPPED, EPOCHS, BATCH, LEARNING_RATE, SEED = 1400, 0.1, 24, 50, 0.05, 0
INSPECTED = (0.1, 0.2, 0.3)
_MARK = "gradindex-demo.json"


def digits() -> dict[str, NDArray[Any]]:
    """The digits: ``images`` float32 (n, 1, 8, 8) in [0, 1], ``labels`` (with flips) and ``query_*``."""
    with (importlib.resources.files("gradindex.data") / "digits.npz").open("rb") as file, np.load(file) as archive:
        images, truth = archive["images"][:, None].astype(np.float32) / 16, archive["labels"].astype(np.int64)
    generator = np.random.default_rng(SEED)
    order = generator.permutation(len(truth))
    images, truth = images[order], truth[order]
    flipped = np.zeros(N_TRAIN, dtype=bool)
    flipped[generator.permutation(N_TRAIN)[: round(FLIPPED * N_TRAIN)]] = True
    others = (truth[:N_TRAIN] + generator.integers(1, 10, N_TRAIN)) % 10
    return {
        "images": images[:N_TRAIN],
        "labels": np.where(flipped, others, truth[:N_TRAIN]),
        "flipped": flipped,
        "query_images": images[N_TRAIN:],
        "query_labels": truth[N_TRAIN:],
    }


def make_model() -> nn.Module:
    """A small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each example."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels, reduction="none")


def train(folder: Path) -> None:
    """Train, with a checkpoint and its learning rate after every fourth epoch."""
    data = digits()
    images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        recorder = Recorder(model, optimizer, folder)
        for epoch in range(1, EPOCHS + 1):
            for rows in torch.randperm(len(images)).split(BATCH):  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.zero_grad()
                loss(model, (images[rows], labels[rows])).mean().backward()  # type: ignore[no-untyped-call]  # the same
                optimizer.step()
            scheduler.step()
            if epoch % 4 == 0:
                recorder.save()


def make_task(folder: Path) -> Task:
    """The demo's task over the checkpoints that a demo left in ``folder``."""
    data = digits()
    return Task(
        name="handwritten digits",
        model=make_model(),
        loss=loss,
        train=TensorDataset(torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])),
        query=TensorDataset(torch.from_numpy(data["query_images"]), torch.from_numpy(data["query_labels"])),
        checkpoints=find_checkpoints(folder / "checkpoints"),
        columns={"label": data["labels"], "flipped": data["flipped"]},
        query_columns={"label": data["query_labels"], "predicted": _predictions(folder, data)},
        show=lambda item: item[0][0].numpy(),
    )


def _predictions(folder: Path, data: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    model = make_model()
    model.load_state_dict(find_checkpoints(folder / "checkpoints")[-1].load(model))
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(data["query_images"])).argmax(1).numpy(), dtype=np.int64)


def run(out: Path) -> Path:
    """Run the whole demo into ``out`` and return the report's path.

    Raises:
        StoreError: ``out`` holds something that an earlier demo did not write.
    """
    require()
    _claim(out)
    clock = _Clock()
    with clock("train with Recorder, 6 checkpoints"):
        train(out / "checkpoints")
    task = make_task(out)
    _introduce(task)
    with clock("build store and index"):
        store = build(task, out / "store")
    with clock("open store and index"):
        retriever = load(task, out / "store")
    queries = list(range(task.n_query))
    with clock("all test digits: the index alone"):
        answers = {"the index alone": retriever.proponents(queries, k=100, rerank="rows")}
    with clock("all test digits: the index, then exact scores"):
        answers["its best 300, re-ranked by exact score"] = retriever.proponents(queries, k=100, candidates=300)
    with clock("all test digits: exact scores of every pair"):
        truth = exact_scores(task, [task.query[i] for i in queries])  # type: ignore[index]  # it has query data

    shown = _worth_showing(task)
    both = retriever.both(shown, k=8)
    recalls = [
        {"answer": name} | {f"recall@{k}": float(recall_at_k(truth, hits.ids[:, :k], k).mean()) for k in (10, 100)}
        for name, hits in answers.items()
    ]
    found, chart = _mislabelled(store)
    for title, text in (
        ("Proponents and opponents", as_text([hits.first(2, 5) for hits in both])),
        ("Flipped labels found", table(found)),
        (f"Agreement with exact TracInCP, {len(queries)} test digits", table(recalls)),
        ("Where the time went", table(clock.records())),
    ):
        click.echo(f"\n{title}\n{text}")
    sections = [
        Section("Training examples behind a prediction", _CARDS, cards=make_cards(both)),
        Section("Flipped labels, found by self-influence", _FOUND, figure=chart, caption=_CAPTION, table=found),
        Section("Does the index find the true answer?", _RECALL, table=recalls),
        Section("Where the time went", table=clock.records()),
    ]
    report = out / "report.html"
    write_page(report, "gradindex on handwritten digits", _LEAD, sections)
    with new_file(out / "task.py", _TASK_MARK) as temporary:
        temporary.write_text(_TASK_FILE)
    click.echo(f"\nAsk on: gradindex query {out / 'store'} --task {out / 'task.py'}:task --position 0")
    return report


_LEAD = (
    f"A small convolutional network was trained on {N_TRAIN:,} handwritten digits; a tenth of their labels were "
    f"flipped at random beforehand. A {SIGN}."
)
_CARDS = (
    "Test digits that the network gets wrong come first, then some that it gets right. Below each one the training "
    "digits that helped it most (proponents) and hurt it most (opponents), by exact TracInCP among the index's "
    "candidates. The label is the one trained with; a red mark means that it was flipped."
)
_FOUND = (
    "Self-influence is TracInCP of an example with itself: how much training on it changes its own loss. Wrong labels "
    "stand out because the network has to learn each one by heart. A person who inspects the examples with the "
    "highest value first finds this share of the flipped labels:"
)
_CAPTION = "Share of flipped labels found against the share of the training set inspected, for three orders and chance."
_RECALL = (
    "Share of the true top-k proponents (exact TracInCP over all parameters, nothing projected) among the top-k "
    "answered, averaged over all test digits."
)
_TASK_MARK = b"The task of the digits demo: gradindex query"
_TASK_FILE = '''"""The task of the digits demo: gradindex query store --task task.py:task --position 0."""

from pathlib import Path

from gradindex.demo import make_task


def task():
    return make_task(Path(__file__).parent)
'''


def _claim(out: Path) -> None:
    """Make ``out`` the demo's, and empty, but only if nothing else lives there."""
    if out.exists() and not (out / _MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} is not empty and holds no earlier demo. Choose another folder with --out.")
    check_page(out / "report.html")
    check_file(out / "task.py", _TASK_MARK)
    for folder in ("checkpoints", "store"):
        if (out / folder).is_symlink():
            raise StoreError(f"{out / folder} is a link, which no demo makes. Choose another folder with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / _MARK, {"written by": "gradindex demo", "safe to delete": True})
        for folder in ("checkpoints", "store"):
            shutil.rmtree(out / folder, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error.strerror}. Choose another folder with --out.") from None


def _introduce(task: Task) -> None:
    columns, queries = task.column_arrays("train"), task.column_arrays("query")
    right = float(np.mean(queries["predicted"] == queries["label"]))
    click.echo(
        f"{task.n_train + task.n_query:,} handwritten digits: {task.n_train:,} to train on, {task.n_query} to ask "
        f"about; {columns['flipped'].sum()} training labels flipped; {right:.1%} of the test digits read correctly"
    )


def _worth_showing(task: Task) -> list[int]:
    """Up to three test digits that the network gets wrong, then three that it gets right."""
    columns = task.column_arrays("query")
    wrong = columns["predicted"] != columns["label"]
    return [*np.flatnonzero(wrong)[:3].tolist(), *np.flatnonzero(~wrong)[:3].tolist()]


def _mislabelled(store: GradientStore) -> tuple[list[dict[str, Any]], str]:
    """Shares of flipped labels found as records, and the curves as a picture."""
    losses, flipped = store.losses(), store.column("flipped")
    orders = {
        "self-influence": store.self_influence().sum(1),
        "loss, mean of all checkpoints": losses.mean(1),
        "loss, last checkpoint": losses[:, -1],
    }
    inspected = np.linspace(0, 1, 101).tolist()
    lines = {name: share_found(order, flipped, inspected) for name, order in orders.items()}
    lines["chance"] = np.array(inspected)
    found = [
        {"order": name} | {f"{share:.0%} inspected": f"{line[round(share * 100)]:.1%}" for share in INSPECTED}
        for name, line in lines.items()
    ]
    return found, line_chart(inspected, lines, "training set inspected", "flipped labels found")


class _Clock:
    """Times named stages."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[stage] = time.perf_counter() - started

    def records(self) -> list[dict[str, Any]]:
        return [{"stage": stage, "seconds": round(seconds, 2)} for stage, seconds in self._seconds.items()]
