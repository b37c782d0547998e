"""Whose code failed, at which example: one line, the cause kept."""

from dataclasses import replace

import pytest
import torch
import toys
from click.testing import CliRunner
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import gradindex
from gradindex import cli
from gradindex.errors import OutOfMemoryError, UserCodeError


def failing_at(value):
    """A loss that fails for examples whose first number is larger."""

    def loss(model, batch):
        if bool((batch[0][:, 0] > value).any()):
            raise KeyError("no such label")
        return toys.cross_entropy(model, batch)

    return loss


@pytest.mark.parametrize("place", [0, 7, 11, 150])
def test_a_loss_that_fails_names_the_example_wherever_it_stands(tmp_path, place):
    task = toys.make_task(tmp_path, loss=failing_at(50), n_train=200)
    task.train.tensors[0][place, 0] = 100
    with pytest.raises(
        UserCodeError, match=rf"^The loss on training example {place} failed: KeyError: 'no such label'\.$"
    ) as caught:
        gradindex.build(task, tmp_path / "store", batch_size=64)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_fitted_projection_names_it_as_well(tmp_path):
    task = toys.make_task(tmp_path, loss=failing_at(50), n_train=200)
    task.train.tensors[0][150, 0] = 100
    with pytest.raises(UserCodeError, match="The loss on training example 150 failed"):
        gradindex.build(task, tmp_path / "store", projection=gradindex.projection.Projection("fitted", 8))


def test_a_query_loss_is_told_from_the_loss(tmp_path):
    task = toys.make_task(tmp_path, query_loss=failing_at(50))
    gradindex.build(task, tmp_path / "store")
    retriever = gradindex.load(task, tmp_path / "store")
    task.query.tensors[0][2, 0] = 100
    with pytest.raises(UserCodeError, match="The query loss on query 2 failed: KeyError"):
        retriever.proponents(range(4), k=2)
    with pytest.raises(UserCodeError, match="The query loss on query 2 of 4 failed: KeyError"):
        gradindex.exact_scores(task, list(task.query))


def test_the_model_and_its_backward_pass_are_the_users_too(tmp_path):
    wrong = toys.make_task(tmp_path)
    wrong = replace(wrong, train=TensorDataset(torch.randn(12, 5), torch.zeros(12, dtype=torch.long)), query=None)
    with pytest.raises(UserCodeError, match=r"The loss on training example 0 failed: RuntimeError: mat1 and mat2"):
        gradindex.build(wrong, tmp_path / "store")

    def overwriting(model, batch):
        hidden = model(batch[0]).exp()
        losses = functional.cross_entropy(hidden, batch[1], reduction="none")
        hidden.zero_()
        return losses + hidden.sum(1)

    task = toys.make_task(tmp_path, loss=overwriting)
    with pytest.raises(UserCodeError, match="The backward pass of the loss .*training example.* failed: RuntimeError"):
        gradindex.build(task, tmp_path / "store")


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 4), nn.Linear(4, 3)

    def forward(self, words):
        return self.head(self.words(words).mean(1))


def test_ragged_items_name_their_shapes_and_collate(tmp_path):
    train = [(torch.randint(0, 20, (3 + i % 4,)), i % 3) for i in range(12)]
    task = toys.make_task(tmp_path, Texts(), train=train, query=train[:2])
    with pytest.raises(
        UserCodeError, match=r"collate on training examples .*\(3,\) and \(6,\)\): give Task\(collate=.*batch_size=1"
    ):
        gradindex.build(task, tmp_path / "store")
    assert gradindex.build(task, tmp_path / "store", batch_size=1).n_train == 12


UNSTACKABLE = {
    "a picture": Image.new("L", (3, 2)),
    "nothing": None,
    "an object": object(),
}


@pytest.mark.parametrize("case", UNSTACKABLE)
def test_items_that_make_no_batch_name_collate(tmp_path, case):
    train = [(torch.randn(6), UNSTACKABLE[case]) for _ in range(6)]
    task = toys.make_task(tmp_path)
    task = replace(task, train=train, query=None)
    if case == "an object":
        task = replace(task, train=[(x, train[0][1]) for x, _ in train])
    with pytest.raises(
        UserCodeError, match=r"collate on training example 0 failed: TypeError.*Give Task\(collate=\.\.\.\)"
    ):
        gradindex.build(task, tmp_path / "store")


def test_the_command_line_says_how_to_see_where(tmp_path, monkeypatch):
    task = toys.make_task(tmp_path, loss=failing_at(-1000))
    monkeypatch.setattr("gradindex.task.load_task", lambda name: task)
    done = CliRunner().invoke(cli.main, ["build", "my.py:task", "--out", str(tmp_path / "store")])
    assert done.exit_code == 1
    expected = "The loss on training example 0 failed: KeyError: 'no such label'. (gradindex --debug shows where.)"
    assert done.stderr.splitlines()[-1] == f"Error: {expected}"
    done = CliRunner().invoke(cli.main, ["--debug", "build", "my.py:task", "--out", str(tmp_path / "store")])
    assert isinstance(done.exception, UserCodeError) and isinstance(done.exception.__cause__, KeyError)


def test_what_only_a_batch_makes_fail_says_so(tmp_path):
    def loss(model, batch):
        if len(batch[0]) > 1:
            raise ValueError("one at a time, please")
        return toys.cross_entropy(model, batch)

    task = toys.make_task(tmp_path, loss=loss)
    with pytest.raises(UserCodeError, match=r"The loss on training examples 0, .* failed: .*works alone.*batch_size=1"):
        gradindex.build(task, tmp_path / "store")
    assert gradindex.build(task, tmp_path / "store", batch_size=1).n_train == 12


def test_running_out_of_memory_is_no_fault_of_the_loss(tmp_path):
    def loss(model, batch):
        if bool((batch[0][:, 0] > 50).any()):
            torch.empty(2**50)
        return toys.cross_entropy(model, batch)

    task = toys.make_task(tmp_path, loss=loss, n_train=40)
    task.train.tensors[0][5, 0] = 100
    with pytest.raises(OutOfMemoryError, match="Training example 5 alone needs more memory"):
        gradindex.build(task, tmp_path / "store", batch_size=16)
