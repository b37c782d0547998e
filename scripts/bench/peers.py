"""Rows of ResNet-9's last layer against Captum's TracInCPFastRandProj; all layers against vmap(grad) and a dense map.

The same rows, checkpoints and process, each contestant once a round in turn; figures are medians of ratios within a
round. Needs captum (not a dependency of gradindex): python -m pip install captum annoy

    python scripts/bench/peers.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from captum.influence import TracInCPFastRandProj
from harness import Bench
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

import gradindex
from gradindex.gradients import Engine
from gradindex.projection import Projection
from gradindex.rows import RowMaker

DIM, BATCH, CHECKPOINTS = 1024, 64, 5


def make_task(folder: Path, n: int) -> gradindex.Task:
    """Random pictures and weights: the time does not depend on them."""
    import cifar10

    torch.manual_seed(0)
    for step in range(CHECKPOINTS):
        model = cifar10.make_model()
        torch.save(model.state_dict(), folder / f"step_{step}.pt")
    data = TensorDataset(torch.randn(n, 3, 32, 32), torch.randint(10, (n,)))
    checkpoints = gradindex.find_checkpoints(folder, learning_rate=1.0)
    return gradindex.Task(model, cifar10.loss, data, checkpoints, layers="8")


def ours(task: gradindex.Task, precision: Any, projection: Projection) -> Callable[[], Any]:
    """Rows of all examples, in batches."""
    engine = Engine(task, precision)
    engine.__enter__().check_routes()
    maker = RowMaker(engine, projection)

    def run() -> None:
        for items in DataLoader(task.train, BATCH, collate_fn=list):
            maker.rows(items, [""] * len(items), "train")

    return run


def captum(task: gradindex.Task) -> Callable[[], Any]:
    """What its constructor computes: projected embeddings and output gradients of all examples at all checkpoints."""

    def load(model: torch.nn.Module, path: str) -> float:
        model.load_state_dict(torch.load(path))
        return 1.0

    paths = [str(checkpoint.path) for checkpoint in task.checkpoints]
    return lambda: TracInCPFastRandProj(
        task.model.eval(),
        task.model[8],
        DataLoader(task.train, BATCH),
        paths,
        load,
        torch.nn.CrossEntropyLoss(reduction="sum"),
        BATCH,
        projection_dim=DIM,
    )


def vmapped(task: gradindex.Task) -> Callable[[], Any]:
    """One batch at one checkpoint: whole per-example gradients, then a dense Rademacher matrix piece by piece."""
    model = task.model.eval()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    x, y = (tensor[:BATCH] for tensor in task.train.tensors)

    def loss(weights: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        output = functional_call(model, weights, (image[None],))
        return torch.nn.functional.cross_entropy(output, label[None])

    def run() -> torch.Tensor:
        gradients = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
        rows = torch.zeros(BATCH, DIM)
        for gradient in gradients.values():
            for piece in gradient.flatten(1).split(8192, 1):
                signs = torch.randint(0, 2, (piece.shape[1], DIM), dtype=torch.int8).float().mul_(2).sub_(1)
                rows += piece @ signs
        return rows / DIM**0.5

    return run


def timed(action: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def medians(actions: dict[str, Callable[[], Any]], base: str, rounds: int) -> dict[str, float]:
    """Median over rounds of how many times longer ``base`` takes."""
    rounds_seconds = [{name: timed(action) for name, action in actions.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(r[base] / r[name] for r in rounds_seconds) for name in actions}


def main() -> None:
    """Measure and print."""
    bench = Bench("Extraction against peers: ResNet-9", __doc__)
    with tempfile.TemporaryDirectory() as name:
        task = make_task(Path(name), 512 if bench.quick else 1024)
        last = {"captum": captum(task)} | {p: ours(task, p, Projection(dim=DIM)) for p in ("float32", "bfloat16")}
        found = medians(last, "captum", 3)
        bench.bar("last layer, float32: Captum's set-up / ours", found["float32"], "x", 1.3)
        bench.bar("last layer, bfloat16: Captum's set-up / ours (bar: with AMX)", found["bfloat16"], "x", 3.0)
        one_batch = TensorDataset(*(tensor[:BATCH] for tensor in task.train.tensors))
        whole = replace(task, layers="*", train=one_batch, checkpoints=task.checkpoints[:1])
        every = {"vmap": vmapped(whole), "ours": ours(whole, "float32", Projection(dim=DIM))}
        found = medians(every, "vmap", 3)
        bench.bar("all layers, float32: vmap(grad) and a dense map / ours", found["ours"], "x", 10.0)
    bench.finish()


if __name__ == "__main__":
    main()
