"""Small tasks with random weights at three checkpoints."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import gradindex

RATES = (0.3, 0.1, 0.02)


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def squared_error(model, batch):
    return (model(batch[0]).squeeze(1) - batch[1]).square()


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def tanh_last():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Tanh())


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def regressor():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def used_twice():
    shared = nn.Linear(6, 6)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(6, 3))


def randomise(model):
    """Weights with which no unit is dead, and running statistics that differ from those of a new model."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():  # not extra state of other types
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.4)


def make_task(folder, model=None, *, shape=(6,), loss=cross_entropy, rates=RATES, n_train=12, n_query=4, **options):
    """A task whose checkpoints lie in ``folder``; ``rates`` holds a learning rate (or a mapping) for each."""
    torch.manual_seed(0)
    model = mlp() if model is None else model
    checkpoints = []
    for number, rate in enumerate(rates):
        randomise(model)
        torch.save(model.state_dict(), folder / f"w_{number}.pt")
        checkpoints.append(gradindex.Checkpoint(folder / f"w_{number}.pt", learning_rate=rate, step=number))

    def data(n):
        target = torch.randn(n, dtype=torch.float64) if loss is squared_error else torch.randint(3, (n,))
        return TensorDataset(torch.randn(n, *shape, dtype=torch.float64), target)

    options = {"train": data(n_train), "query": data(n_query), "checkpoints": checkpoints} | options
    return gradindex.Task(model=model, loss=loss, **options)


def share(found, true):
    """Mean over queries of the share of the true ids that were found."""
    return np.mean([np.isin(t, f).mean() for f, t in zip(found, true, strict=True)])
