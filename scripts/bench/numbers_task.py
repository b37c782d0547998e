"""A task as large as ImageNet that needs no data: example i is computed from i, a row has 512 numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradindex

FEATURES, OUTPUTS = 63, 8


class Integers:
    """0, 1, 2, ... as a data set, which takes no memory."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> int:
        return position


def features(items: list[int]) -> tuple[Tensor, Tensor]:
    """Inputs (batch, 63) between -1 and 1, no two alike, and labels."""
    numbers = torch.tensor(items, dtype=torch.float64)
    x = torch.sin(numbers[:, None] * torch.arange(1, FEATURES + 1) * 0.61803398875)
    return x.float(), torch.tensor(items) % OUTPUTS


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each example."""
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_task(n: int, folder: Path | None = None) -> gradindex.Task:
    """A linear classifier at one checkpoint; 8 x 64 numbers a row without projection."""
    folder = folder or Path(tempfile.mkdtemp(prefix="gradindex-numbers-"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(FEATURES, OUTPUTS)
    path = folder / "numbers.pt"
    torch.save(model.state_dict(), path)
    return gradindex.Task(
        name="numbers",
        model=model,
        loss=loss,
        train=Integers(n),
        query=Integers(100),
        checkpoints=[gradindex.Checkpoint(path, learning_rate=0.1, step=1)],
        collate=features,
    )
