"""Lemma 3.1: the ideal influences of all training examples sum to the fall of a test point's loss.

Trains with one example a step in float64, credits each step's change of each test point's loss to the
example of that step (TracInIdeal), and compares the sums with the fall of the loss over the
whole training. Then the first-order form: its error in one step against the learning rate.

python scripts/paper/lemma.py [--quick] [--json] [--save FILE]
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import NEUTRAL, PROPONENT, Experiment, rounded
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from gradindex import Checkpoint, Task, demo, exact_scores
from gradindex.progress import progress

LEARNING_RATE, SEED, N_QUERY = 0.05, 0, 100
RATES = np.logspace(-4, -1, 7)


def make_model() -> nn.Module:
    """Digits of 8 x 8 through two layers of tanh, which is smooth: the error of a Taylor series is its next term."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each example."""
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@torch.no_grad()
def step(model: nn.Module, gradients: list[Tensor], rate: float) -> None:
    """One step of plain gradient descent."""
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter -= rate * gradient


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Without a graph."""
    with torch.no_grad():
        return loss(model, batch)


def gradients_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Of the sum of the batch's losses."""
    return list(torch.autograd.grad(loss(model, batch).sum(), list(model.parameters())))


def main() -> None:
    """Measure and print."""
    experiment = Experiment("Lemma 3.1 and the order of its first-order form", __doc__)
    n_train, epochs, n_points = (100, 2, 3) if experiment.quick else (500, 5, 20)
    data = demo.digits()
    images, labels = torch.from_numpy(data["images"][:n_train]).double(), torch.from_numpy(data["labels"][:n_train])
    queries = (
        torch.from_numpy(data["query_images"][:N_QUERY]).double(),
        torch.from_numpy(data["query_labels"][:N_QUERY]),
    )
    torch.manual_seed(SEED)
    model = make_model().double()

    influences = np.zeros((n_train, len(queries[1])))
    order = torch.cat([torch.randperm(n_train) for _ in range(epochs)]).tolist()
    places = np.linspace(0, len(order), n_points, endpoint=False).astype(int)
    points: list[tuple[int, nn.Module]] = []
    first = before = losses_of(model, queries)
    with progress("steps of one example", len(order), "steps") as advance:
        for number, i in enumerate(order):
            if number in places:
                points.append((i, copy.deepcopy(model)))
            step(model, gradients_of(model, (images[i : i + 1], labels[i : i + 1])), LEARNING_RATE)
            after = losses_of(model, queries)
            influences[i] += (before - after).numpy()
            before = after
            advance(1)
    fall = (first - before).numpy()
    experiment.figure("steps", len(order), "")
    experiment.figure("mean loss of the test points before training", float(first.mean()), "")
    experiment.figure("mean loss of the test points after training", float(before.mean()), "")
    experiment.bar(
        "Lemma 3.1: largest difference of summed influences and fall of the loss",
        np.abs(influences.sum(0) - fall).max(),
        "",
        1e-9,
        at_most=True,
    )

    train = TensorDataset(images, labels)
    errors = np.array([step_errors(*point, train, queries) for point in points])
    means = errors.mean((0, 2))
    exponent, _ = np.polyfit(np.log(RATES), np.log(means), 1)
    experiment.figure("exponent of the learning rate in the error of a step", exponent, "")
    experiment.bar("its distance from 2", abs(exponent - 2), "", 0.1, at_most=True)
    experiment.keep("learning rates", RATES.tolist())
    experiment.keep("mean error of a step", means.tolist())
    by_point = [np.polyfit(np.log(RATES), np.log(error.mean(1)), 1)[0] for error in errors]
    experiment.keep("exponent at each point of training", rounded(by_point))

    picture = Figure(figsize=(6, 4), layout="constrained")
    axes = picture.subplots()
    axes.loglog(RATES, means, "o-", color=PROPONENT, label=f"measured, exponent {exponent:.3f}")
    axes.loglog(RATES, means[0] * (RATES / RATES[0]) ** 2, "--", color=NEUTRAL, label="exponent 2")
    axes.set(
        xlabel="learning rate", ylabel="mean error of a step's influence", title="First-order form against true change"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    experiment.draw(picture)
    experiment.finish()


def step_errors(i: int, model: nn.Module, train: TensorDataset, queries: tuple[Tensor, Tensor]) -> NDArray[np.float64]:
    """(rates, n_query) |true change - eta <grad l(w; z'), grad l(w; z)>| of a step with example i from weights w."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(model.state_dict(), path)
        task = Task(make_model().double(), loss, train, [Checkpoint(path, learning_rate=1.0)])
        items = list(zip(*queries, strict=True))
        products = exact_scores(task, items, np.array([i]), precision="float64")[:, 0]
    image, label = train[i]
    gradients, before = gradients_of(model, (image[None], label[None])), losses_of(model, queries)
    errors = []
    for rate in RATES.tolist():
        moved = copy.deepcopy(model)
        step(moved, gradients, rate)
        errors.append(np.abs((before - losses_of(moved, queries)).numpy() - rate * products))
    return np.array(errors)


if __name__ == "__main__":
    main()
