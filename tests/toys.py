"""Small models, tasks with random weights at three checkpoints, and the command line run on them."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import gradindex
from gradindex.cli import main
from gradindex.projection import Projection

RATES = (0.3, 0.1, 0.02)
# The environment of a process in which texts have other hashes than here.
OTHER_HASHES = {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}


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


class PerToken(nn.Module):
    """A linear layer at every position, and a mean over positions."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)).mean(1))


class TimeMajor(PerToken):
    """The first axis of what ``inner`` sees is the position, not the example."""

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


class Towers(nn.Module):
    """Two first layers side by side; the second one's output also goes around the head."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 3)

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        return self.head(torch.cat([left, right], 1).relu()) + right[:, :3]


class Recurrent(nn.Module):
    """A sequence to a class."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.head = getattr(nn, kind)(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(x)[0][:, -1])


class Attentive(nn.Module):
    """One layer of a transformer, with its packed weights."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.inner(x).mean(1))


class Once(torch.autograd.Function):
    """x^3, of which torch knows a first derivative and nothing more."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, delta):
        (x,) = ctx.saved_tensors
        return delta * 3 * x**2


class Twice(torch.autograd.Function):
    """x^3 without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, delta):
        (x,) = ctx.saved_tensors
        return delta * 3 * x**2


class Cubic(nn.Module):
    """A parameter that no hook knows, and a cube."""

    def __init__(self, cube):
        super().__init__()
        self.p, self.head, self.cube = nn.Parameter(torch.ones(6)), nn.Linear(24, 3), cube

    def forward(self, x):
        return self.head(self.cube(x * self.p.sigmoid()).flatten(1))


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


def call(*arguments, **options):
    """The command line in this process: exit code, stdout, stderr; what it does not turn into a message is raised."""
    result = CliRunner().invoke(main, list(map(str, arguments)), **options)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def shell(*arguments, **options):
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "gradindex.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **{"timeout": 300} | options)


def python(code, *arguments, cwd=None, **environment):
    """What a Python process of its own prints; it must end well."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def digest_of(value):
    """The checksum of a JSON value by docs/format.md."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sharp_task(folder, n_train=60):
    """A classifier of 300 classes, most of whose probability is on a few."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 300))
    checkpoints = []
    for number in range(2):
        with torch.no_grad():
            model[0].weight.copy_(2 * torch.randn(300, 24))
        torch.save(model.state_dict(), folder / f"sharp_{number}.pt")
        checkpoints.append(gradindex.Checkpoint(folder / f"sharp_{number}.pt", learning_rate=0.5 - 0.2 * number))
    x, y = torch.rand(n_train + 8, 24), torch.randint(300, (n_train + 8,))
    train, query = TensorDataset(x[:n_train], y[:n_train]), TensorDataset(x[n_train:], y[n_train:])
    columns = {"label": y[:n_train].numpy()}
    return gradindex.Task(
        model=model, loss=cross_entropy, train=train, query=query, checkpoints=checkpoints, columns=columns
    )


def with_factors(folder, task, name, **options):
    """A store of it."""
    options = {"factors": "float32", "batch_size": 8, "shard_rows": 24, **options}
    return gradindex.build(task, folder / name, projection=Projection("fitted", 32), **options)
