"""Activation checkpointing and reversible layers: what runs again on the way back; in float64 against autograd."""

import warnings

import pytest
import torch
import toys
from reference import check_against_autograd, check_everything
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gradindex
from gradindex.errors import TaskError


class Checkpointed(nn.Module):
    """Blocks that are run by ``call(block, x)``, and a scale inside or behind them."""

    def __init__(self, call, inside=False, first=True):
        super().__init__()
        self.first = nn.Linear(6, 6) if first else nn.Identity()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.LayerNorm(6)) for _ in range(2)
        )
        self.scale, self.head, self.call, self.inside = nn.Parameter(torch.ones(6)), nn.Linear(6, 3), call, inside

    def run(self, block, x):
        return block(x) * self.scale if self.inside else block(x)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + self.call(lambda x, block=block: self.run(block, x), x)
        return self.head(x * self.scale)


def kept(function, x):
    return checkpoint(function, x, use_reentrant=False)


def early(function, x):
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "inside", "first"), [(kept, False, True), (kept, True, False), (early, False, False)])
def test_activation_checkpointing_runs_again_with_the_weights_of_its_checkpoint(tmp_path, call, inside, first):
    routes = check_everything(toys.make_task(tmp_path, Checkpointed(call, inside, first)), tmp_path)
    assert routes["blocks.0.0"] == routes["blocks.1.2"] == "linear"


class Sequence(nn.Sequential):
    """In two segments, each checkpointed."""

    def forward(self, x):
        return checkpoint_sequential(self, 2, x, use_reentrant=False)


class CheckpointedLSTM(nn.Module):
    """Parameters that no hook knows, run again."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(kept(lambda x: self.rnn(x)[0], x)[:, -1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 5), Sequence(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), nn.Linear(5, 3)), (6,)),
        (CheckpointedLSTM(), (4, 6)),
    ],
)
def test_checkpointed_sequences_and_recurrent_layers_equal_autograd(tmp_path, model, shape):
    check_against_autograd(toys.make_task(tmp_path, model, shape=shape))


def again(function, x):
    return checkpoint(function, x, use_reentrant=True)


class Wrapped(Checkpointed):
    """The modules themselves are checkpointed."""

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + again(block, x)
        return self.head(x * self.scale)


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (Wrapped(None), "*", r"blocks.0 \(Sequential\) is run by .*gradient of first.weight"),
        (Wrapped(None), "blocks.1", r"blocks.1 \(Sequential\) is run by .*use_reentrant=True.*blocks.1.0.weight"),
        (Wrapped(None), "first", r"blocks.0 \(Sequential\) is run by .*gradient of first.weight"),
        (Checkpointed(again, inside=True), "scale", r"A part of the model \(Checkpointed.forward.*gradient of scale"),
    ],
)
def test_reentrant_checkpointing_is_refused_by_its_name(tmp_path, model, layers, message):
    task = toys.make_task(tmp_path, model, layers=layers)
    with pytest.raises(TaskError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of inputs without a gradient
        gradindex.build(task, tmp_path / "store")


@pytest.mark.slow
def test_what_lies_behind_reentrant_checkpointing_is_traced(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_against_autograd(toys.make_task(tmp_path, Wrapped(None), layers="head"), prefixes=("head.",))


class _Reversed(torch.autograd.Function):
    """Keeps its output alone, and runs the block again on the way back with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block, ctx.x = block, x.detach()
        with torch.no_grad():
            return x + block(x)

    @staticmethod
    def backward(ctx, delta):
        with torch.enable_grad():
            x = ctx.x.clone().requires_grad_()
            (x + ctx.block(x)).backward(delta)
        return x.grad, None


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(_Reversed.apply(self.first(x), self.block))


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["*", "block.bias"])
def test_layers_that_run_again_with_a_backward_pass_of_their_own_are_refused(tmp_path, layers):
    task = toys.make_task(tmp_path, Reversible(), layers=layers)
    with pytest.raises(TaskError, match=r"block\.\w+ is hidden in a function that runs it again"):
        gradindex.build(task, tmp_path / "store")
    check_against_autograd(toys.make_task(tmp_path, Reversible(), layers=["first", "head"]), prefixes=("first", "head"))
