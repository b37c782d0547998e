"""Passes of a budget of tokens."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import gradindex
from gradindex.errors import ArgumentError
from gradindex.gradients.passes import by_tokens
from gradindex.projection import Projection

LENGTHS = [3, 9, 2, 2, 7, 1, 4, 12, 5, 3, 3, 6]


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, i):
        return {"input_ids": torch.arange(LENGTHS[i]) % 7, "label": torch.tensor(i % 3)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 5, padding_idx=7), nn.Linear(5, 3)
        self.seen = []

    def forward(self, ids):
        self.seen.append(tuple(ids.shape))
        return self.head(self.embedding(ids).sum(1))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["input_ids"]), batch["label"], reduction="none")


def collate(items):
    ids = pad_sequence([item["input_ids"] for item in items], batch_first=True, padding_value=7)
    return {"input_ids": ids, "label": torch.stack([item["label"] for item in items])}


@pytest.fixture
def task(tmp_path):
    torch.manual_seed(0)
    model = Model()
    torch.save(model.state_dict(), tmp_path / "step_1.pt")
    checkpoints = gradindex.find_checkpoints(tmp_path, learning_rate=0.1)
    return gradindex.Task(model, loss, Texts(), checkpoints, Texts(), collate=collate)


def test_neighbours_go_together_as_long_as_they_fit():
    items = list(Texts())
    groups = by_tokens(items, 16)
    assert [i for group in groups for i in range(*group.indices(12))] == list(range(12))
    for group in groups:
        lengths = LENGTHS[group]
        assert len(lengths) * max(lengths) <= 16
    for one, other in pairwise(groups):  # none has room for the next
        lengths = LENGTHS[one.start : other.start + 1]
        assert len(lengths) * max(lengths) > 16
    assert by_tokens(items, 1) == [slice(i, i + 1) for i in range(12)]
    assert by_tokens(items, 1000) == [slice(0, 12)]
    assert by_tokens([{"ids": [4, 5, 6]}, {"ids": [4]}], 5) == [slice(0, 1), slice(1, 2)]
    assert by_tokens(["a", "bcd", "e"], 4) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_no_pass_has_more_tokens_and_rows_are_the_same(task, tmp_path):
    options = {"projection": Projection("none"), "batch_size": 12}
    whole = gradindex.build(task, tmp_path / "whole", **options)
    task.model.seen.clear()
    split = gradindex.build(task, tmp_path / "split", batch_tokens=16, **options)
    rows = [shape for shape in task.model.seen if shape[0] > 1]
    assert rows
    ids = np.arange(12)
    np.testing.assert_allclose(split.rows(ids), whole.rows(ids), rtol=1e-5, atol=1e-6)
    building = task.model.seen[-len(by_tokens(list(Texts()), 16)) :]
    assert (12, 12) not in building


@pytest.mark.parametrize("wrong", [0, -3, 2.5, "many"])
def test_no_other_budget_is_taken(task, tmp_path, wrong):
    with pytest.raises(ArgumentError, match="batch_tokens is .* but must be a whole number of at least 1"):
        gradindex.build(task, tmp_path / "store", batch_tokens=wrong)


def test_the_command_line_takes_it(tmp_path, monkeypatch):
    help_text = toys.call("build", "--help").stdout
    assert "--batch-tokens" in help_text
    assert "--one-at-a-time" in help_text
