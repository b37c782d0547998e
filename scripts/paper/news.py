"""Influence on a text classifier: averaged word embeddings and a fully connected layer.

Proponents and opponents of headlines by the last layer, by the embeddings and by all parameters, and how far the
three agree. By default the 7,600 rows of AG News in the data folder, a tenth of them held out; DBPedia-14, which the
paper uses, has the same layout (class, title, text) and is given as three files:

python scripts/paper/news.py [--quick] [--json] [--data DIR] [--save FILE]
python scripts/paper/news.py --train train.csv --test test.csv --classes classes.txt
"""

from __future__ import annotations

import csv
import html
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from common import Experiment, spearman
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import gradindex
from gradindex import Hits, Recorder, Task, find_checkpoints
from gradindex.checkpoint import evenly

EPOCHS, BATCH, LEARNING_RATE, SEED = 12, 50, 2.0, 0
WIDTH, LENGTH, VOCABULARY = 64, 50, 50_000  # of an embedding, of a text in words, and of the dictionary
PADDING, UNKNOWN = 0, 1
N_CHECKPOINTS, N_QUERY, K = 5, 50, 10
AG_CLASSES = ("World", "Sports", "Business", "Sci/Tech")
LAYERS = {"last layer": "output", "embeddings": "embedding", "all layers": "*"}


@dataclass(frozen=True)
class Texts:
    """Examples of a file.

    Args:
        titles: of each.
        texts: title and body, which the network reads.
        labels: (n,) int64 from 0.
    """

    titles: list[str]
    texts: list[str]
    labels: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> Texts:
        """Some of them."""
        return Texts([self.titles[i] for i in rows], [self.texts[i] for i in rows], self.labels[rows])


def read(path: Path) -> Texts:
    """Read class (from 1), title, text; a header is skipped.

    Raises:
        SystemExit: the file is missing or has another layout.
    """
    if not path.is_file():
        raise SystemExit(f"{path} does not exist. Give --train and --test, or --data with the folder of {path.name}.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows = rows[1:] if rows and not rows[0][0].isdigit() else rows
    wrong = [number for number, row in enumerate(rows, 1) if len(row) != 3 or not row[0].isdigit()]
    if wrong or not rows:
        raise SystemExit(
            f"{path}: record {wrong[0] if wrong else 1} is not class, title, text. Give a file of that layout."
        )
    titles, bodies = ([tidy(row[column]) for row in rows] for column in (1, 2))
    texts = [f"{title}. {body}" for title, body in zip(titles, bodies, strict=True)]
    return Texts(titles, texts, np.array([int(row[0]) - 1 for row in rows], dtype=np.int64))


def tidy(text: str) -> str:
    """Undo what the files' makers did: line breaks became backslashes, and entities lost their ampersand to a space."""
    entities = re.sub(r" ?(?<![&\w])(#\d+|quot|amp|lt|gt);", r"&\1;", text.replace("\\", " "))
    return " ".join(re.sub(r"</?[a-zA-Z][^<>]*>", " ", html.unescape(entities)).split())


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def encode(texts: Sequence[str], dictionary: dict[str, int]) -> Tensor:
    """(n, LENGTH) int64 numbers of words, padded."""
    encoded = torch.full((len(texts), LENGTH), PADDING)
    for row, text in enumerate(texts):
        numbers = [dictionary.get(word, UNKNOWN) for word in words(text)[:LENGTH]] or [UNKNOWN]
        encoded[row, : len(numbers)] = torch.tensor(numbers)
    return encoded


class Classifier(nn.Module):
    """The mean of the words' embeddings, then a fully connected layer."""

    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(vocabulary, WIDTH, mode="mean", padding_idx=PADDING)
        self.output = nn.Linear(WIDTH, classes)
        with torch.no_grad():  # PyTorch's standard deviation of 1 makes it learn texts by heart
            self.embedding.weight.mul_(0.1)

    def forward(self, encoded: Tensor) -> Tensor:
        """(n, LENGTH) to (n, classes)."""
        logits: Tensor = self.output(self.embedding(encoded))
        return logits


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each text."""
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(model: nn.Module, encoded: Tensor, labels: Tensor, epochs: int, folder: Path) -> None:
    """Plain gradient descent; a checkpoint each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    recorder = Recorder(model, optimizer, folder)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            losses = loss(model, (encoded[rows], labels[rows]))
            losses.mean().backward()
            optimizer.step()
            total += float(losses.detach().sum())
        recorder.save(total / len(labels))
        print(f"epoch {epoch} of {epochs}: training loss {total / len(labels):.3f}", file=sys.stderr, flush=True)


def load_texts(experiment: Experiment) -> tuple[Texts, Texts, list[str]]:
    """Training and test texts, and the names of the classes."""
    import reference

    given = experiment.options.train, experiment.options.test
    if any(given) and not all(given):
        raise SystemExit("Only one of --train and --test is given, but both are needed. Give the other one too.")
    if all(given):
        train_texts, test_texts = map(read, given)
    else:
        texts = read(reference.data_file("ag_news_7600.csv"))
        order = np.random.default_rng(SEED).permutation(len(texts.labels))
        held_out = len(order) // 10
        train_texts, test_texts = texts.take(np.sort(order[held_out:])), texts.take(np.sort(order[:held_out]))
    n_classes = int(max(train_texts.labels.max(), test_texts.labels.max())) + 1
    if experiment.options.classes:
        names = experiment.options.classes.read_text(encoding="utf-8").split()
    else:
        names = [f"class {number + 1}" for number in range(n_classes)] if all(given) else list(AG_CLASSES)
    if len(names) < n_classes:
        raise SystemExit(f"--classes names {len(names)} classes, but the data have {n_classes}. Give a name for each.")
    return train_texts, test_texts, names


def main() -> None:
    """Measure, print and write the pages."""
    files = {
        "train": "training examples: class,title,text (default: AG News of the data folder)",
        "test": "test examples",
        "classes": "names of the classes, one a line",
    }
    experiment = Experiment("Text: influence on a classifier of averaged embeddings", __doc__, files)
    epochs, n_query, n_checkpoints = (6, 5, 2) if experiment.quick else (EPOCHS, N_QUERY, N_CHECKPOINTS)
    train_texts, test_texts, names = load_texts(experiment)
    if experiment.quick:
        train_texts = train_texts.take(np.arange(0, len(train_texts.labels), 9))
    counts = Counter(word for text in train_texts.texts for word in words(text))
    kept = [word for word, count in counts.most_common(VOCABULARY) if count > 1]
    dictionary = {word: number for number, word in enumerate(kept, UNKNOWN + 1)}
    encoded, tests = encode(train_texts.texts, dictionary), encode(test_texts.texts, dictionary)
    torch.manual_seed(SEED)
    model = Classifier(len(dictionary) + 2, len(names))
    experiment.figure("training texts", len(train_texts.labels), "")
    experiment.figure("words in the dictionary", len(dictionary), "")
    with tempfile.TemporaryDirectory() as folder:
        train(model, encoded, torch.from_numpy(train_texts.labels), epochs, Path(folder))
        with torch.no_grad():
            logits = model(tests)
            losses = functional.cross_entropy(logits, torch.from_numpy(test_texts.labels), reduction="none").numpy()
        predicted = logits.argmax(1).numpy()
        experiment.figure("test accuracy", (predicted == test_texts.labels).mean(), "")
        chosen = headlines(test_texts.labels, predicted, losses)
        others = np.setdiff1d(np.arange(len(predicted)), chosen)
        rows = np.concatenate([chosen, np.random.default_rng(SEED).permutation(others)[:n_query]])
        named = np.array(names)
        task = Task(
            name="text",
            model=model,
            loss=loss,
            train=TensorDataset(encoded, torch.from_numpy(train_texts.labels), torch.arange(len(encoded))),
            query=TensorDataset(tests[rows], torch.from_numpy(test_texts.labels[rows]), -1 - torch.from_numpy(rows)),
            checkpoints=evenly(find_checkpoints(folder), n_checkpoints),
            columns={"class": named[train_texts.labels]},
            query_columns={"class": named[test_texts.labels[rows]], "predicted": named[predicted[rows]]},
            show=lambda item: train_texts.texts[item[2]] if item[2] >= 0 else test_texts.texts[-1 - item[2]],
        )
        influence(experiment, task, Path(folder), len(chosen))
    experiment.finish()


def headlines(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], losses: NDArray[np.float32]
) -> NDArray[np.int64]:
    """The first well classified test text of each of four classes, and the two most confident mistakes."""
    correct = labels == predicted
    good = [int(np.flatnonzero(correct & (labels == label))[0]) for label in np.unique(labels[correct])[:4]]
    wrong = np.flatnonzero(~correct)
    return np.array(good + wrong[np.argsort(-losses[wrong])[:2]].tolist(), dtype=np.int64)


def influence(experiment: Experiment, task: Task, folder: Path, n_shown: int) -> None:
    """Proponents and opponents by each choice of layers, and their agreement."""
    queries = range(task.n_query)
    own = task.query_columns["class"][:, None]
    answers: dict[str, list[Hits]] = {}
    scores = {}
    for name, layers in LAYERS.items():
        here = replace(task, layers=layers)
        gradindex.build(here, folder / layers.replace("*", "all"))
        retriever = gradindex.load(here, folder / layers.replace("*", "all"))
        answers[name] = [retriever.proponents(queries, k=K), retriever.opponents(queries, k=K)]
        scores[name] = retriever.exact_scores(queries)
        for hits in answers[name]:
            share = (hits.columns["class"] == own).mean()
            experiment.figure(f"{name}: share of the top {K} {hits.kind} with the query's class", share, "")
    for one, other in combinations(LAYERS, 2):
        value = spearman(scores[one], scores[other]).mean()
        experiment.figure(f"{one} and {other}: Spearman of scores, mean of the queries", value, "")
        for which, kind in enumerate(("proponents", "opponents")):
            pairs = zip(answers[one][which].ids, answers[other][which].ids, strict=True)
            shared = np.mean([np.intersect1d(a, b).size / K for a, b in pairs])
            experiment.figure(f"{one} and {other}: share of the top {K} {kind} in both", shared, "")
    page, table = experiment.place(".html"), experiment.place(".md")
    if page is not None and table is not None:
        shown = [
            replace(hits.first(n_shown, 5), kind=f"{hits.kind} by {name}")
            for name, both in answers.items()
            for hits in both
        ]
        shown[0].save_html(page, *shown[1:])
        table.write_text(as_markdown(shown), encoding="utf-8")


def as_markdown(answers: Sequence[Hits]) -> str:
    """Each query with a table of the first three of each kind."""
    lines = ["# Headlines and the training texts behind them", "", f"Scores: {answers[0].note}.", ""]
    for row in range(len(answers[0].queries)):
        columns = {name: values[row] for name, values in answers[0].query_columns.items()}
        lines += [f"## {cell(answers[0].show_query(row), 90)}", ""]
        lines += [f"Class {columns['class']}, read as {columns['predicted']}.", ""]
        lines += ["| kind | score | class | training text |", "| --- | --- | --- | --- |"]
        for hits in answers:
            for rank, i in enumerate(hits.ids[row, :3].tolist()):
                kind = hits.kind if rank == 0 else ""
                about = f"{hits.scores[row, rank]:.3g} | {hits.columns['class'][row, rank]}"
                lines.append(f"| {kind} | {about} | {cell(hits.show_train(i), 110)} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def cell(text: str, length: int) -> str:
    """A text that does not break a table."""
    short = text if len(text) <= length else text[: length - 1].rstrip() + "…"
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", short)


if __name__ == "__main__":
    main()
