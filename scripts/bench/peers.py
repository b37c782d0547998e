"""Rows of ResNet-9 against other libraries: Captum's projected last layer, TRAK's and dattri's whole gradients.

Every contestant has a process of its own and does the same examples, checkpoints and dimensions; a round runs each of
them once, in turn and alone; figures are medians of ratios within a round. The quick form has a sixteenth of the width,
fewer examples and checkpoints, and leaves out libraries that are not installed. The full form needs those of peers.txt,
best in an environment of their own (all.sh makes it):

    python -m venv peers && peers/bin/pip install -c constraints.txt -r scripts/bench/peers.txt -e .[cpu]
    peers/bin/python scripts/bench/peers.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import contextlib
import functools
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import Bench
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

import gradindex
from gradindex.gradients import Engine, check_routes
from gradindex.projection import Projection
from gradindex.rows import RowMaker

DIM, BATCH, CHECKPOINTS, QUICK_CHECKPOINTS = 1024, 64, 5, 2
PEERS = ("captum", "annoy", "traker", "dattri")  # Captum's projected last layer needs annoy


def make_task(folder: Path, n: int) -> gradindex.Task:
    """Random pictures and weights: the time does not depend on them."""
    import cifar10
    import reference

    torch.manual_seed(0)
    for step in range(QUICK_CHECKPOINTS if reference.quick() else CHECKPOINTS):
        model = cifar10.make_model(cifar10.width())
        torch.save(model.state_dict(), folder / f"step_{step}.pt")
    data = TensorDataset(torch.randn(n, 3, 32, 32), torch.randint(10, (n,)))
    checkpoints = gradindex.find_checkpoints(folder, learning_rate=1.0)
    return gradindex.Task(model, cifar10.loss, data, checkpoints, layers="8")


def ours(task: gradindex.Task, precision: Any) -> Callable[[], Any]:
    """Rows of all examples, in batches."""
    engine = Engine(task, precision)
    check_routes(engine.__enter__())
    maker = RowMaker(engine, Projection(dim=DIM))

    def run() -> None:
        for start in range(0, task.n_train, BATCH):
            maker.rows(task.read(task.train_ids[start : start + BATCH]))

    return run


def captum(task: gradindex.Task) -> Callable[[], Any]:
    """What its constructor computes: projected embeddings and output gradients of all examples at all checkpoints."""
    from captum.influence import TracInCPFastRandProj

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


def trak(task: gradindex.Task) -> Callable[[], Any]:
    """Its features of all examples: projected gradients of whole networks, without a GPU's kernel."""
    from trak import TRAKer

    state = torch.load(task.checkpoints[0].path)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            traker = TRAKer(
                model=task.model.eval(),
                task="image_classification",
                train_set_size=task.n_train,
                save_dir=folder,
                device="cpu",
                proj_dim=DIM,
                use_half_precision=False,
                load_from_save_dir=False,
            )
            traker.load_checkpoint(state, model_id=0)
            for batch in DataLoader(task.train, BATCH):
                traker.featurize(batch, num_samples=len(batch[0]))

    return run


def dattri(task: gradindex.Task) -> Callable[[], Any]:
    """Its TracIn scores of all examples with themselves: projected gradients of whole networks, and a row product."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    def loss(parameters: dict[str, torch.Tensor], example: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        output = functional_call(task.model, parameters, (example[0][None],))
        return torch.nn.functional.cross_entropy(output, example[1][None])

    state = torch.load(task.checkpoints[0].path)
    attributor = TracInAttributor(
        AttributionTask(loss_func=loss, model=task.model.eval(), checkpoints=[state]),
        weight_list=torch.ones(1),
        normalized_grad=False,
        projector_kwargs={"proj_dim": DIM, "proj_max_batch_size": BATCH, "device": "cpu", "proj_type": "rademacher"},
        device="cpu",
    )

    def run() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            attributor.self_attribute(DataLoader(task.train, BATCH))

    return run


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
        rows = torch.zeros(len(x), DIM)
        for gradient in gradients.values():
            for piece in gradient.flatten(1).split(8192, 1):
                signs = torch.randint(0, 2, (piece.shape[1], DIM), dtype=torch.int8).float().mul_(2).sub_(1)
                rows += piece @ signs
        return rows / DIM**0.5

    return run


CONTESTANTS: dict[str, Callable[[gradindex.Task], Callable[[], Any]]] = {
    "captum": captum,
    "trak": trak,
    "dattri": dattri,
    "vmap": vmapped,
    "float32": functools.partial(ours, precision="float32"),
    "bfloat16": functools.partial(ours, precision="bfloat16"),
}


def contestant(name: str, whole: bool, n: int, pipe: Any) -> None:
    """A process: seconds of one turn whenever it is asked for one."""
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder), n)
        if whole:
            task = replace(task, layers="*", checkpoints=task.checkpoints[:1])
        action = CONTESTANTS[name](task)
        while pipe.recv():
            started = time.perf_counter()
            action()
            pipe.send(time.perf_counter() - started)


def medians(context: Any, names: Sequence[str], whole: bool, n: int, rounds: int) -> dict[tuple[str, str], float]:
    """For each pair, the median over rounds of how many times longer the first takes than the second."""
    pipes = {}
    for name in names:
        pipes[name], other = context.Pipe()
        context.Process(target=contestant, args=(name, whole, n, other), daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            taken = pipe.recv()
            if number:  # the first round warms up
                seconds[name].append(taken)
    for pipe in pipes.values():
        pipe.send(False)
    return {
        (one, two): statistics.median(a / b for a, b in zip(seconds[one], seconds[two], strict=True))
        for one in names
        for two in names
    }


def main() -> None:
    """Measure and print."""
    bench = Bench("Extraction against peers: ResNet-9", __doc__, packages=PEERS)
    present = bench.installed(PEERS)
    n, batch = (8, 8) if bench.quick else (1024, BATCH)
    if {"captum", "annoy"} <= set(present):
        found = medians(bench.processes, ["captum", "float32", "bfloat16"], False, n, 1 if bench.quick else 5)
        bench.bar("last layer, float32: Captum's set-up / ours", found["captum", "float32"], "x", 1.3)
        bench.bar("last layer, bfloat16: Captum's set-up / ours (bar: with AMX)", found["captum", "bfloat16"], "x", 3.0)
    others = {"vmap": "vmap(grad) and a dense map"}
    others |= {"trak": "TRAK's features"} if "traker" in present else {}
    others |= {"dattri": "dattri's projected TracIn"} if "dattri" in present else {}
    found = medians(bench.processes, [*others, "float32"], True, batch, 1 if bench.quick else 3)
    for name, what in others.items():
        bench.bar(f"all layers, float32: {what} / ours", found[name, "float32"], "x", 10.0)
    bench.finish()


if __name__ == "__main__":
    main()
