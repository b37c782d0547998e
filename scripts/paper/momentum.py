"""Momentum and clipping: which weight of a checkpoint stands for the steps that were taken.

Stochastic gradient descent with momentum uses the gradient of an example not once, but in all later steps, a
little less each time. Its influence on a test point z' is, to first order, the sum over the steps s from t on, where t
is a step whose batch of b examples holds z, of

    (eta_s / b) mu^(s - t) c_t <grad l(w_s; z'), grad l(w_t; z)>

with c_t the factor by which the gradient of step t was clipped. This is computed for all training examples by going
back through the stored weights of all steps, in float64. Against it stands TracInCP at the end of each epoch,
weighted by learning rates, by their sums (``integrated``), by the shares of gradients in the steps (``effective``),
or not at all: Pearson over the training examples, mean of the test points and of three seeds. Trainings differ in
what could matter: momentum that cycles, clipping, and parameter groups with different momentum.

python scripts/paper/momentum.py [--quick] [--json] [--save FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from common import Array, Experiment, pearson, quietly, rounded
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.data import TensorDataset

from gradindex import Recorder, Task, demo, exact_scores, find_checkpoints
from gradindex.choices import Weighting

N_TRAIN, N_QUERY, EPOCHS, BATCH, RATE, SEEDS = 1000, 60, 20, 50, 0.02, 3
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """How to train.

    Args:
        momentum: of the first and of the last layer.
        clip: the norm to clip to, if any.
        cycle: whether the rate goes up and down and the momentum down and up (OneCycleLR).
        flipped: the share of wrong labels.
        rate: the learning rate.
    """

    momentum: tuple[float, float] = (0.9, 0.9)
    clip: float | None = None
    cycle: bool = False
    flipped: float = 0.1
    rate: float = RATE


SETTINGS = {
    "momentum 0.9": Setting(),
    "momentum in a cycle": Setting(cycle=True),
    "clipped to 0.3, momentum 0.9": Setting(clip=0.3, flipped=0.0),
    "clipped to 0.3, no momentum": Setting(momentum=(0.0, 0.0), clip=0.3, flipped=0.0, rate=0.2),
    "momentum 0.9 and 0": Setting(momentum=(0.9, 0.0)),
    "momentum 0 and 0.9": Setting(momentum=(0.0, 0.9)),
    "momentum 0.9 and 0.5, clipped to 0.3": Setting(momentum=(0.9, 0.5), clip=0.3),
}


@dataclass(frozen=True)
class Step:
    """What is needed of a step to go back through it.

    Args:
        weights: before it.
        rows: of the batch.
        factor: of clipping.
        rates: by parameter.
        momenta: by parameter.
    """

    weights: dict[str, Tensor]
    rows: Tensor
    factor: float
    rates: dict[str, float]
    momenta: dict[str, float]


def make_model() -> nn.Module:
    """Digits of 8 x 8 through one hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of each example."""
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(setting: Setting, data: Data, epochs: int, folder: Path) -> list[Step]:
    """Train, with a checkpoint at the end of each epoch."""
    model = make_model()
    layers = zip((model[1], model[3]), setting.momentum, strict=True)  # type: ignore[index]  # a Sequential
    groups = [{"params": list(layer.parameters()), "momentum": momentum} for layer, momentum in layers]
    optimizer = torch.optim.SGD(groups, setting.rate)
    total = epochs * -(-len(data[1]) // BATCH)
    schedule = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.rate, total_steps=total) if setting.cycle else None
    )
    recorder, steps = Recorder(model, optimizer, folder), []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for _ in range(epochs):
        for rows in torch.randperm(len(data[1])).split(BATCH):
            weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            optimizer.zero_grad()
            loss(model, (data[0][rows], data[1][rows])).mean().backward()
            factor = 1.0
            if setting.clip is not None:
                norm = nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
                recorder.clipped(norm, setting.clip)
                factor = min(1.0, setting.clip / (float(norm) + 1e-6))
            settings = [
                {names[id(p)]: float(group[key]) for group in optimizer.param_groups for p in group["params"]}
                for key in ("lr", "momentum")
            ]
            steps.append(Step(weights, rows, factor, *settings))
            optimizer.step()
            if schedule is not None:
                schedule.step()
        recorder.save()
    return steps


def influences(steps: list[Step], data: Data, queries: Data) -> Array:
    """(n_query, n_train) through all steps, by going back from the last."""
    model = make_model()

    def one(weights: Mapping[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return loss(lambda inputs: functional_call(model, weights, (inputs,)), (image[None], label[None]))[0]  # type: ignore[arg-type]

    gradients = vmap(grad(one), (None, 0, 0))
    found = torch.zeros(len(queries[1]), len(data[1]), dtype=torch.float64)
    # How a gradient of the step at hand lowers each query's loss, through the momentum buffer also in later steps.
    ahead = {name: torch.zeros(len(queries[1]), *weight.shape).double() for name, weight in steps[0].weights.items()}
    kept = dict.fromkeys(ahead, 0.0)  # the share of the buffer that the next step keeps
    for step in reversed(steps):
        on_queries = gradients(step.weights, *queries)
        own = gradients(step.weights, data[0][step.rows], data[1][step.rows])
        for name in ahead:
            ahead[name] = step.rates[name] * on_queries[name] + kept[name] * ahead[name]
            products = ahead[name].flatten(1) @ own[name].flatten(1).T
            found[:, step.rows] += step.factor / len(step.rows) * products
        kept = step.momenta
    return found.numpy()


def main() -> None:
    """Measure and print."""
    experiment = Experiment("Momentum, clipping and the weight of a checkpoint", __doc__)
    n_train, epochs, seeds = (200, 4, 1) if experiment.quick else (N_TRAIN, EPOCHS, SEEDS)
    digits = demo.digits()
    images, labels = torch.from_numpy(digits["images"][:n_train]).double(), torch.from_numpy(digits["labels"][:n_train])
    queries = (
        torch.from_numpy(digits["query_images"][:N_QUERY]).double(),
        torch.from_numpy(digits["query_labels"][:N_QUERY]),
    )
    table: dict[str, dict[str, list[float]]] = {}
    for name, setting in SETTINGS.items():
        found: dict[str, list[float]] = {weighting: [] for weighting in get_args(Weighting)}
        for seed in range(seeds):
            torch.manual_seed(seed)
            wrong = torch.rand(n_train) < setting.flipped
            data = images, torch.where(wrong, torch.randint(10, (n_train,)), labels)
            with tempfile.TemporaryDirectory() as folder:
                steps = train(setting, data, epochs, Path(folder))
                truth = influences(steps, data, queries)
                for weighting, values in found.items():
                    checkpoints = find_checkpoints(folder, weighting=weighting)
                    task = Task(make_model(), loss, TensorDataset(*data), checkpoints, query=TensorDataset(*queries))
                    with quietly():
                        scores = exact_scores(task, range(N_QUERY), np.arange(n_train), precision="float64")
                    values.append(float(pearson(scores, truth).mean()))
        for weighting, values in found.items():
            experiment.figure(f"{name}, {weighting}: mean Pearson", float(np.mean(values)), "")
        table[name] = found
    experiment.keep(
        "Pearson by training and weighting, for each seed", {k: rounded(list(v.values())) for k, v in table.items()}
    )
    gains = [np.mean(table[name]["effective"]) for name in SETTINGS if len(set(SETTINGS[name].momentum)) > 1]
    experiment.bar("groups with different momentum, effective: lowest mean Pearson", float(min(gains)), "", 0.99)
    experiment.finish()


if __name__ == "__main__":
    main()
