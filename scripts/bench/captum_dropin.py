"""Captum's classes beside those of gradindex.compat.captum, in the set-up of Captum's TracIn tutorial.

The tutorial's network and 6 checkpoints on 5,000 CIFAR-10 pictures: TracInCPFast in batches of 2,048, and
TracInCPFastRandProj in batches of 128 with 100 numbers a checkpoint, which prepares rows once. Asked for the 10
proponents and the 10 opponents of 4 test pictures, in turns, in one process. Captum's TracInCPFast computes the
gradients of the training data for each question; ours keeps them, where memory allows, from the first question on. So
the first question is timed apart. Pictures lie in memory for both. Where Annoy is not installed, Captum's rows are
searched by a product and topk, which takes less time to prepare. Times are processor time, which depends less on
what else the machine does. The quick form takes 256 coloured digits and 2 checkpoints; the fixed cost of ours, checking
the gradients, is a large part of it.

    python scripts/bench/captum_dropin.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Bench
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gradindex.compat import captum as ours

K, N_QUERY, BATCH, ROW_BATCH, ROW_DIM = 10, 4, 2048, 128, 100


class Net(nn.Module):
    """Two convolutions and three linear layers, as in the tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.hidden = nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
        self.last = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        result: Tensor = self.last(self.hidden(self.features(x).flatten(1)))
        return result


def load(model: nn.Module, path: str) -> float:
    """As in the tutorial, all checkpoints with the same weight."""
    model.load_state_dict(torch.load(path))
    return 1.0


def train(folder: Path, data: TensorDataset, checkpoints: int) -> Net:
    """As in the tutorial, SGD with momentum 0.9, with a checkpoint after each epoch.

    By hand, for an optimizer of torch imports its compiler, which takes longer than all else in the quick form.
    """
    torch.manual_seed(0)
    model = Net()
    images, labels = data.tensors
    velocities = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for epoch in range(checkpoints):
        for rows in torch.randperm(len(images)).split(128):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, velocity, gradient in zip(model.parameters(), velocities, gradients, strict=True):
                    velocity.mul_(0.9).add_(gradient)
                    parameter.sub_(0.001 * velocity)
        torch.save(model.state_dict(), folder / f"checkpoint-{epoch}.pt")
    return model.eval()


def data(n: int) -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """Training pictures, and the queries as a batch."""
    import cifar10

    arrays = cifar10.data()

    def tensors(prefix: str, count: int) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(np.array(arrays[f"{prefix}images"][:count])).float().movedim(-1, 1)
        return images / 127.5 - 1, torch.from_numpy(np.array(arrays[f"{prefix}labels"][:count])).long()

    return TensorDataset(*tensors("", n)), tensors("query_", N_QUERY)


class Exact:
    """The simplest search that Captum's class takes."""

    def setup(self, data: Tensor) -> None:
        """Keep the rows."""
        self.rows = data

    def get_nearest_neighbors(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Compare all."""
        scores, places = torch.topk(query @ self.rows.T, k)
        return places, scores


def captum_search() -> Any:
    """What Captum's own class searches with."""
    from captum.influence._utils.nearest_neighbors import AnnoyNearestNeighbors

    return AnnoyNearestNeighbors(num_trees=100) if importlib.util.find_spec("annoy") else Exact()


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Of processor time, and what was returned."""
    started = time.process_time()
    result = action()
    return time.process_time() - started, result


def measured(library: Any, given: dict[str, Any], queries: Any, search: Any) -> tuple[dict[str, float], list[Tensor]]:
    """Seconds of each stage, and the exact scores that were found."""

    def asked(made: Any, proponents: bool) -> Any:
        return made.influence(queries, k=K, proponents=proponents)

    taken = {}
    making, fast = seconds(lambda: library.TracInCPFast(batch_size=BATCH, **given))
    asking, best = seconds(lambda: asked(fast, True))
    taken["TracInCPFast, made and asked for proponents"] = making + asking
    taken["TracInCPFast, then asked for opponents"], worst = seconds(lambda: asked(fast, False))
    making, fast = seconds(lambda: library.TracInCPFast(batch_size=BATCH, **given))
    asking, own = seconds(fast.self_influence)
    taken["TracInCPFast, made and asked for self-influence"] = making + asking
    taken["TracInCPFastRandProj, prepared"], projected = seconds(
        lambda: library.TracInCPFastRandProj(
            batch_size=ROW_BATCH, projection_dim=ROW_DIM, nearest_neighbors=search, **given
        )
    )
    taken["TracInCPFastRandProj, asked for both"], _ = seconds(lambda: [asked(projected, x) for x in (True, False)])
    return taken, [best.influence_scores, worst.influence_scores, own]


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")  # Captum warns of the memory that rows take
    bench = Bench("Captum's classes against those of gradindex.compat.captum", __doc__, packages=("captum", "annoy"))
    if bench.installed(("captum",)) != ["captum"]:
        bench.finish()
        return
    import captum.influence as theirs

    n, checkpoints, rounds = (256, 2, 1) if bench.quick else (5_000, 6, 3)
    with tempfile.TemporaryDirectory() as folder:
        training, queries = data(n)
        model = train(Path(folder), training, checkpoints)
        given = {
            "model": model,
            "final_fc_layer": model.last,
            "train_dataset": training,
            "checkpoints": folder,
            "checkpoints_load_func": load,
            "loss_fn": nn.CrossEntropyLoss(reduction="sum"),
        }
        times: dict[str, list[tuple[float, float]]] = {}
        for number in range(rounds + (not bench.quick)):
            their_seconds, their_scores = measured(theirs, given, queries, captum_search())
            our_seconds, our_scores = measured(ours, given, queries, None)
            for name, taken in their_seconds.items():
                if number or bench.quick:  # the first round warms up
                    times.setdefault(name, []).append((taken, our_seconds[name]))
    for name, pairs in times.items():
        bench.figure(f"{name}: Captum", 1000 * statistics.median(pair[0] for pair in pairs), "ms")
        bench.figure(f"{name}: ours", 1000 * statistics.median(pair[1] for pair in pairs), "ms")
        bench.bar(f"{name}: Captum / ours", statistics.median(a / b for a, b in pairs), "x", 1.0)
    apart = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(their_scores, our_scores, strict=True)]
    bench.bar("largest difference from Captum's scores, of the largest score", max(apart), "", 1e-5, at_most=True)
    bench.figure("rows of Captum's are searched with Annoy", float(not isinstance(captum_search(), Exact)), "(1: yes)")
    bench.finish()


if __name__ == "__main__":
    main()
