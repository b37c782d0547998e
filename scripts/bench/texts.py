"""Rows of texts by a small transformer, sorted by length as builds do it, and as the texts come (extraction.py)."""

from __future__ import annotations

import csv
import re
import statistics
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Bench
from reference import data_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

import gradindex
from gradindex.examples import Examples
from gradindex.gradients import Engine, check_routes
from gradindex.lengths import window_rows, windows
from gradindex.projection import Projection
from gradindex.reading import read
from gradindex.rows import RowMaker

BATCH, TEXTS, QUICK_TEXTS, ROUNDS = 256, 1024, 64, 3
WORDS, WIDTH, HEADS, LAYERS = 8192, 64, 4, 2


class Layer(nn.Module):
    """Attention among the words of a text, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """(b, t, WIDTH) of texts whose ``words`` (b, t) are not padding."""
        sides = self.qkv(self.before(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*sides, attn_mask=words[:, None, None, :])
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Classes of texts, by the mean over their words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(LAYERS)), nn.Linear(WIDTH, 4)
        self.tokens = 0

    def forward(self, ids: Tensor) -> Tensor:
        """(b, 4) of words (b, t), 0 is padding."""
        self.tokens += ids.numel()
        words, x = ids != 0, self.embedding(ids)
        for layer in self.layers:
            x = layer(x, words)
        x = x * words[:, :, None]
        return self.head(x.sum(1) / words.sum(1, keepdim=True))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each text."""
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Padded to the longest."""
    return pad_sequence([ids for ids, _ in items], batch_first=True), torch.stack([label for _, label in items])


def headlines(count: int, whole: bool) -> list[tuple[Tensor, Tensor]]:
    """Words and class of headlines of AG News, or of headlines with what follows them."""
    with data_file("ag_news_7600.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))[1 : count + 1]
    said = [" ".join(line[1:]) if whole else line[1] for line in lines]
    numbered = [
        [1 + zlib.crc32(word.lower().encode()) % (WORDS - 1) for word in re.findall(r"\w+|[^\w\s]", text)]
        for text in said
    ]
    return [
        (torch.tensor(ids or [1]), torch.tensor(int(line[0]) - 1)) for ids, line in zip(numbered, lines, strict=True)
    ]


def measure(
    bench: Bench,
    timed: Callable[[Callable[[], Any]], float],
    ratio: Callable[[dict[str, list[float]], str, str], float],
) -> None:
    """Time and padding of rows, each round both ways in turn."""
    batch = 8 if bench.quick else BATCH
    for whole, name in ((False, "headlines"), (True, "headlines with text")):
        data = headlines(QUICK_TEXTS if bench.quick else TEXTS, whole)
        with tempfile.TemporaryDirectory() as folder:
            task = _task(Path(folder), data)
            engine = Engine(task, "float32")
            check_routes(engine.__enter__())
            maker = RowMaker(engine, Projection())
            ids = np.arange(len(data))

            def in_order(task: gradindex.Task = task, ids: Any = ids) -> Iterator[Examples]:
                return read(task, ids, batch, 0)

            def by_length(maker: RowMaker = maker, in_order: Any = in_order) -> Iterator[Examples]:
                for window in windows(in_order(), batch, window_rows(batch, maker.row_bytes)):
                    yield from window.batches()

            def rows(batches: Callable[[], Iterator[Examples]], maker: RowMaker = maker) -> None:
                for examples in batches():
                    maker.rows(examples)

            ways = {"in order": in_order, "by length": by_length}
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            tokens = {}
            for number in range(1 if bench.quick else ROUNDS + 1):
                for way, batches in ways.items():
                    task.model.tokens = 0  # type: ignore[assignment]  # a number of the class above
                    taken = timed(lambda batches=batches: rows(batches))  # type: ignore[misc]
                    tokens[way] = int(task.model.tokens)  # type: ignore[arg-type]
                    if number or bench.quick:  # the first round warms up
                        seconds[way].append(taken)
        words = sum(len(text) for text, _ in data)
        bench.figure(f"texts: {name}, mean length", words / len(data), "words")
        for way in ways:
            bench.figure(f"texts: {name} {way}, words with padding / words", tokens[way] / words, "x")
            bench.figure(f"texts: {name} {way}, rows", 1e3 * statistics.median(seconds[way]) / len(data), "ms a text")
        bench.figure(f"texts: {name}, rows in order / by length", ratio(seconds, "in order", "by length"), "x")


def _task(folder: Path, data: list[tuple[Tensor, Tensor]]) -> gradindex.Task:
    torch.manual_seed(0)
    model = Transformer()
    torch.save(model.state_dict(), folder / "step_1.pt")
    checkpoints = gradindex.find_checkpoints(folder, learning_rate=0.1)
    return gradindex.Task(model, loss, data, checkpoints, layers="*", collate=collate)
