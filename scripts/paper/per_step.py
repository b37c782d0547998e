"""MNIST, step by step: first-order influence on a test point's loss against its true change.

The reference training (scripts/tasks/mnist.py) is run again, followed by 100 test points z'. Two comparisons:

- **steps**: before each step, its first-order effect eta <grad l(w_t; z'), g_t>, with g_t the batch's mean
  gradient, by forward mode; after it, the true change l(w_t; z') - l(w_{t+1}; z').
- **examples**: at some steps, the step is taken apart: the shares (eta / b) grad l(w_t; z) of the batch's
  examples are taken one after the other, which ends at w_{t+1}. The change of the loss over an example's share
  is its true influence: these sum to the step's change, as in lemma 3.1. Against it stands TracIn's
  (eta / b) <grad l(w_t; z), grad l(w_t; z')>, by exact_scores at w_t.

Each is correlated for each test point (over steps, or over steps and examples), and then averaged. Both are
repeated without the flipped labels, and the first at smaller learning rates.
Source: Pruthi et al. 2020 (arXiv:2002.08484).

python scripts/paper/per_step.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import NEUTRAL, PROPONENT, Array, Experiment, losses_and_slopes, pearson, quietly, rounded
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gradindex import Checkpoint, Task, exact_scores
from gradindex.progress import progress

N_QUERY, TAKE_APART_EVERY = 100, 50
OTHER_RATES = (0.05, 0.02, 0.01)


@dataclass(frozen=True)
class Followed:
    """First-order and true falls of the losses of test points.

    Args:
        steps: (2, n_query, steps), first-order and true.
        examples: (2, n_query, examples) at the steps that were taken apart.
        difference: the largest, of a step by forward mode and by the sum of its examples' scores, relative.
    """

    steps: Array
    examples: Array
    difference: float


def main() -> None:
    """Measure and print."""
    experiment = Experiment("MNIST: first-order influence against the true change of the loss", __doc__)
    import mnist

    epochs, n_train, every = (1, 3000, 10) if experiment.quick else (mnist.EPOCHS, mnist.N_TRAIN, TAKE_APART_EVERY)
    task = mnist.task()
    rows = np.arange(n_train)
    found = follow(task, rows, mnist.LEARNING_RATE, epochs, every)

    by_point, by_examples = pearson(*found.steps), pearson(*found.examples)
    experiment.figure("steps", found.steps.shape[2], "")
    experiment.bar("steps: Pearson of a test point, mean of 100", by_point.mean(), "", 0.97)
    experiment.figure("steps: median test point", float(np.median(by_point)), "")
    experiment.figure("steps: lowest test point", by_point.min(), "")
    first_order, true = found.steps
    experiment.figure("steps: Pearson, all test points together", float(pearson(first_order.ravel(), true.ravel())), "")
    experiment.figure(
        "steps: Pearson over the test points, mean of the steps", pearson(first_order.T, true.T).mean(), ""
    )
    slope = (first_order * true).sum() / np.square(first_order).sum()
    experiment.figure("steps: true change for each unit of first-order change (least squares)", slope, "")
    experiment.figure("examples", found.examples.shape[2], "")
    experiment.figure("examples: Pearson of a test point, mean of 100", by_examples.mean(), "")
    experiment.figure("examples: lowest test point", by_examples.min(), "")
    experiment.bar("exact_scores summed over a batch against forward mode", found.difference, "", 1e-4, at_most=True)

    correct = rows[~mnist.data()["flipped"][:n_train]]
    clean = follow(task, correct, mnist.LEARNING_RATE, epochs, every)
    for name, pair in (("steps", clean.steps), ("examples", clean.examples)):
        value = pearson(*pair).mean()
        experiment.figure(f"{name}, without the flipped labels: Pearson of a test point, mean of 100", value, "")

    by_rate = {mnist.LEARNING_RATE: float(by_point.mean())}
    for rate in OTHER_RATES[-1:] if experiment.quick else OTHER_RATES:
        other = follow(task, rows, rate, epochs, None)
        by_rate[rate] = float(pearson(*other.steps).mean())
        experiment.figure(f"steps, learning rate {rate}: Pearson of a test point, mean of 100", by_rate[rate], "")

    for name, pair in (("steps", found.steps), ("examples", found.examples), ("clean steps", clean.steps)):
        spans = np.array_split(np.arange(pair.shape[2]), epochs)
        by_epoch = [float(np.median(pearson(*pair[:, :, span]))) for span in spans]
        experiment.keep(f"median Pearson of the test points in each epoch, {name}", rounded(by_epoch))
    experiment.keep("Pearson of each test point over the steps", rounded(np.sort(by_point)))
    experiment.keep("Pearson of each test point over examples", rounded(np.sort(by_examples)))
    experiment.draw(drawn(found, by_rate))
    experiment.finish()


def follow(task: Task, chosen: NDArray[np.int64], rate: float, epochs: int, every: int | None) -> Followed:
    """Train with these examples and compare; every so many steps, take one apart."""
    import mnist

    items = [task.query[i] for i in range(N_QUERY)]
    queries = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
    data = mnist.data()
    training = mnist.Training(*(torch.from_numpy(data[name][chosen]) for name in ("images", "labels")), rate)
    losses, predicted, examples, differences = [], [], [], [0.0]
    with progress(f"learning rate {rate}", epochs * -(-len(chosen) // mnist.BATCH), "steps") as advance:
        for _ in range(epochs):
            for rows, _ in training.epoch():
                gradients = {name: p.grad for name, p in training.model.named_parameters() if p.grad is not None}
                now, along = losses_and_slopes(training.model, mnist.loss, queries, gradients)
                losses.append(now)
                predicted.append(rate * along)
                if every is not None and (len(losses) - 1) % every == 0:
                    share = rate / len(rows)
                    scores = scores_at(task, training.model, items, chosen[rows.numpy()], share)
                    batch = training.images[rows], training.labels[rows]
                    examples.append((scores, taken_apart(training.model, batch, queries, share)))
                    differences.append(np.abs(scores.sum(1) - predicted[-1]).max() / np.abs(predicted[-1]).max())
                advance(1)
    losses.append(losses_and_slopes(training.model, mnist.loss, queries, gradients)[0])
    steps = np.stack([np.array(predicted).T, -np.diff(np.array(losses), axis=0).T])
    pairs = [np.concatenate(parts, 1) for parts in zip(*examples, strict=True)]
    return Followed(steps, np.array(pairs), float(max(differences)))


def scores_at(task: Task, model: nn.Module, items: list[Any], rows: NDArray[np.int64], share: float) -> Array:
    """(n_query, rows) exact scores at the present weights."""
    with tempfile.TemporaryDirectory() as folder, quietly():
        path = Path(folder) / "weights.pt"
        torch.save(model.state_dict(), path)
        return exact_scores(
            replace(task, checkpoints=[Checkpoint(path, learning_rate=share)]), items, rows, precision="float64"
        )


def taken_apart(model: nn.Module, batch: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], share: float) -> Array:
    """(n_query, batch) fall of the test points' losses over each example's share of the step, in the batch's order."""
    import mnist

    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}

    def losses(at: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return mnist.loss(lambda inputs: functional_call(model, at, (inputs.double(),)), (images, labels))

    def one(at: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return losses(at, image[None], label[None])[0]

    with torch.no_grad():
        gradients = vmap(grad(one), (None, 0, 0))(weights, *batch)
        measured = [losses(weights, *queries)]
        for number in range(len(batch[1])):
            weights = {name: w - share * gradients[name][number] for name, w in weights.items()}
            measured.append(losses(weights, *queries))
    return -np.diff(torch.stack(measured, 1).numpy(), axis=1)


def drawn(found: Followed, by_rate: dict[float, float]) -> Figure:
    """Every change against its first-order form, of steps and of examples, and the learning rate."""
    picture = Figure(figsize=(13, 4), layout="constrained")
    panels = picture.subplots(1, 3)
    for axes, pair, what in ((panels[0], found.steps, "steps"), (panels[1], found.examples, "examples")):
        limit = float(np.quantile(np.abs(pair[0]), 0.999))
        box = (-limit, limit, -limit, limit)
        cells = axes.hexbin(*(v.ravel() for v in pair), gridsize=60, bins="log", extent=box, cmap="Blues", mincnt=1)
        picture.colorbar(cells, ax=axes, label=f"{what} and test points")
        axes.plot([-limit, limit], [-limit, limit], "--", color=NEUTRAL, linewidth=1)
        axes.set(xlabel="first order", ylabel="true fall of the loss", xlim=box[:2], ylim=box[2:])
        axes.set_title(f"{what}: mean Pearson {pearson(*pair).mean():.3f}")
    panels[2].semilogx(list(by_rate), list(by_rate.values()), "o-", color=PROPONENT)
    panels[2].axhline(0.978, color=NEUTRAL, linestyle="--", label="the paper, 0.978")
    panels[2].set(xlabel="learning rate", ylabel="mean Pearson over the steps", title="Steps: the learning rate")
    panels[2].set_xticks(list(by_rate), [str(rate) for rate in by_rate])
    panels[2].minorticks_off()
    panels[2].grid(alpha=0.3)
    panels[2].legend(frameon=False)
    return picture


if __name__ == "__main__":
    main()
