"""What a pass through the model computes and keeps, and what it never touches."""

import random

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset
from toys import Towers

import gradindex
from gradindex.checkpoint import Checkpoint
from gradindex.gradients import Engine, check_routes
from gradindex.projection import Projection


class Recorded(TorchDispatchMode):
    """The operations that run, by name, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))

    def named(self, name):
        return [args for found, args in self.calls if found == name]


def pictures(folder, **options):
    return toys.make_task(folder, toys.convolutional(), shape=(2, 8, 8), **options)


def test_the_backward_pass_computes_no_weight_gradient(tmp_path):
    task = pictures(tmp_path)
    with Engine(task) as engine:
        check_routes(engine)
        assert all(layer.hooked for layer in engine.layers)
        with Recorded() as recorded:
            engine.run(0, task.read(task.train_ids), lambda number, gradients: None)
    masks = [args[-1] for args in recorded.named("convolution_backward")]
    assert masks == [[True, False, False]]  # of the second; the first is where the graph begins
    # The last layer sends its input a gradient; (3, 16), its weight's shape, is made by no product.
    shapes = [(args[0].shape[0], args[1].shape[1]) for args in recorded.named("mm")]
    assert (12, 16) in shapes
    assert (3, 16) not in shapes


@pytest.mark.parametrize(("layers", "expected"), [("6", [False, False, True]), ("4", [False, True, True])])
def test_no_graph_is_kept_below_the_first_tracked_layer(tmp_path, layers, expected):
    task = pictures(tmp_path, layers=layers)
    grown = []
    for place in (0, 4, 6):
        task.model[place].register_forward_hook(lambda module, args, output: None)
    with Engine(task) as engine:
        check_routes(engine)
        # Registered last, so that it sees what the engine's own hook hands on.
        handles = [
            task.model[place].register_forward_hook(lambda module, args, output: grown.append(output.requires_grad))
            for place in (0, 4, 6)
        ]
        engine.run(0, task.read(task.train_ids), lambda number, gradients: None)
        for handle in handles:
            handle.remove()
    assert grown == expected


def test_towers_side_by_side_each_begin_a_graph_of_their_own(tmp_path):
    task = toys.make_task(tmp_path, Towers())
    inputs = []
    with Engine(task) as engine:
        check_routes(engine)
        for tower in (task.model.left, task.model.right):
            tower.register_forward_pre_hook(lambda module, args: inputs.append(args[0].requires_grad))
        with Recorded() as recorded:
            engine.run(0, task.read(task.train_ids), lambda number, gradients: None)
    assert inputs == [False, False]
    # Of the four products of the pass, three go forward; backward, the head alone has an input to send a gradient to.
    assert len(recorded.named("addmm")) == 3
    assert [args[1].shape for args in recorded.named("mm")] == [(3, 8)]


class _Told(torch.autograd.Function):
    """The identity, which says when the backward pass comes by."""

    @staticmethod
    def forward(ctx, x, tell):
        ctx.tell = tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx, delta):
        ctx.tell()
        return delta, None


class Between(nn.Module):
    """Tells when the backward pass is between two layers."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def forward(self, x):
        return _Told.apply(x, lambda: self.events.append("between"))


def test_factors_are_consumed_while_the_backward_pass_runs(tmp_path):
    events = []
    model = nn.Sequential(nn.Linear(6, 5), Between(events), nn.Tanh(), nn.Linear(5, 3))
    task = toys.make_task(tmp_path, model)
    with Engine(task) as engine:
        check_routes(engine)
        events.clear()
        engine.run(0, task.read(task.train_ids), lambda number, gradients: events.append(engine.layers[number].name))
    assert events == ["3", "between", "0"]


def test_each_example_is_read_once_but_for_spot_checks_and_each_checkpoint_once(tmp_path, monkeypatch):
    reads, loads = [], []

    class Counting(TensorDataset):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)

    task = toys.make_task(tmp_path)
    task = gradindex.Task(task.model, task.loss, Counting(*task.train.tensors), task.checkpoints)
    read = Checkpoint.read

    def counted(self, model, *shared):
        loads.append(self.step)
        return read(self, model, *shared)

    monkeypatch.setattr(Checkpoint, "read", counted)
    with Engine(task) as engine:
        check_routes(engine)
    spent = len(reads)
    reads.clear()
    loads.clear()
    monkeypatch.setattr(gradindex.Task, "check_reads_repeat", lambda self: None)
    monkeypatch.setattr(gradindex.Task, "data_fingerprint", lambda self, ids=None: "")
    gradindex.build(task, tmp_path / "store", batch_size=4)
    assert loads == [0, 1, 2]
    assert sorted(set(reads[spent:])) == list(range(12))
    assert len(reads[spent:]) == 12 + 3  # three are read again, to be compared with themselves alone


def states():
    return torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensorsketch", "fitted", "kronecker", "gaussian", "rademacher", "none"])
def test_no_map_reads_or_moves_a_global_random_state(tmp_path, kind):
    task = toys.make_task(tmp_path)
    rows = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = states()
        store = gradindex.build(task, tmp_path / str(seed), projection=Projection(kind, 16))
        after = states()
        assert torch.equal(before[0], after[0])
        assert np.array_equal(before[1], after[1])
        assert before[2] == after[2]
        rows.append(store.rows(np.arange(12)))
    np.testing.assert_array_equal(*rows)
