"""Make data/golden/: small stores that the tests read, for each type of rows, with wide rows, and with packed factors.

Those of type int4 and of packed factors have format version 2, the others version 1.

Run it only when the format gets a new version: what is in data/golden/ must stay readable for ever.

    python scripts/golden_store.py OUT
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import gradindex
from gradindex.choices import ROW_TYPES
from gradindex.projection import Projection


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Squared error of each example."""
    return functional.mse_loss(model(batch[0]), batch[1], reduction="none").sum(1)


def make_task(folder: Path) -> gradindex.Task:
    """A linear model with weights 1/8, 2/8, ... at two checkpoints, and ten examples of whole numbers."""
    model = nn.Sequential(nn.Linear(3, 2))
    checkpoints = []
    for number, rate in enumerate((0.5, 0.25)):
        with torch.no_grad():
            model[0].weight.copy_((torch.arange(6).reshape(2, 3) + number) / 8)
            model[0].bias.copy_(torch.tensor([1.0, -1.0]))
        torch.save(model.state_dict(), folder / f"w_{number}.pt")
        checkpoints.append(gradindex.Checkpoint(folder / f"w_{number}.pt", learning_rate=rate, step=number))
    x = (torch.arange(30).reshape(10, 3) % 7 - 3).float()
    y = (torch.arange(20).reshape(10, 2) % 5 - 2).float()
    columns = {"word": ["a", "é", "日本", "", "e", "f", "g", "h", "i", "j"], "odd": np.arange(10) % 2 == 1}
    return gradindex.Task(model=model, loss=loss, train=TensorDataset(x, y), checkpoints=checkpoints, columns=columns)


def make_many(folder: Path) -> gradindex.Task:
    """A linear model of 256 classes at two checkpoints, of which few are likely for any of ten examples."""
    model = nn.Sequential(nn.Linear(16, 256))
    checkpoints = []
    for number, rate in enumerate((0.5, 0.25)):
        with torch.no_grad():
            model[0].weight.copy_((torch.arange(4096).square().reshape(256, 16) * (7 + number) % 101 - 50) / 16)
            model[0].bias.zero_()
        torch.save(model.state_dict(), folder / f"many_{number}.pt")
        checkpoints.append(gradindex.Checkpoint(folder / f"many_{number}.pt", learning_rate=rate, step=number))
    x = (torch.arange(160).reshape(10, 16) * 5 % 11).float() / 4
    x[4] /= 4  # many classes are likely: more large entries than are kept
    return gradindex.Task(
        model=model, loss=cross_entropy, train=TensorDataset(x, torch.arange(10)), checkpoints=checkpoints
    )


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of each example."""
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def main(out: Path) -> None:
    """Write one store for each type, one with wide rows and one of packed factors."""
    kinds: dict[str, dict[str, Any]] = {
        row_type: {
            "projection": Projection("none"),
            "row_type": row_type,
            "factors": "float16" if row_type == "float16" else "float32",
        }
        for row_type in ROW_TYPES
    }
    kinds["wide"] = {"projection": Projection(dim=4), "wide": 16}
    kinds["packed"] = {"projection": Projection(dim=8), "factors": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        task, many = make_task(Path(folder)), make_many(Path(folder))
        for name, options in kinds.items():
            asked = many if name == "packed" else task
            store = gradindex.build(asked, out / name, **options, batch_size=2, shard_rows=6)
            gradindex.store.remove(store.folder, np.array([3]))
            (store.folder / "log.jsonl").unlink()
            for lock in store.folder.glob("lock*"):
                lock.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
