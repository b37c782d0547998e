"""Losses of every kind, and batches of every structure, in float64 against autograd on each example alone."""

from collections import namedtuple

import pytest
import torch
import toys
from reference import check_against_autograd
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from toys import TimeMajor

import gradindex
from gradindex.errors import LossError, TaskError
from gradindex.gradients import Engine, check_routes

N_TRAIN, N_QUERY = 12, 4


def task_of(folder, model, loss, make_item, **options):
    """A task whose items ``make_item(i)`` makes."""
    torch.manual_seed(2)
    items = [make_item(i) for i in range(N_TRAIN + N_QUERY)]
    options = {"train": items[:N_TRAIN], "query": items[N_TRAIN:]} | options
    return toys.make_task(folder, model, loss=loss, **options)


def multi_label(folder):
    """Several yes-or-no answers for each example, some of them not asked (-1)."""

    def loss(model, batch):
        losses = functional.binary_cross_entropy_with_logits(
            model(batch["x"]), batch["y"].clamp_min(0), reduction="none"
        )
        return (losses * (batch["y"] >= 0)).sum(1)

    return task_of(
        folder, toys.mlp(), loss, lambda i: {"x": torch.randn(6).double(), "y": torch.randint(-1, 2, (3,)).double()}
    )


Preference = namedtuple("Preference", ["better", "worse"])


def ranking(folder):
    """One tower sees both sides of a pair: Bradley and Terry's loss."""

    def loss(model, batch):
        return -functional.logsigmoid(model(batch.better) - model(batch.worse)).squeeze(1)

    return task_of(
        folder, toys.regressor(), loss, lambda i: Preference(torch.randn(6).double(), torch.randn(6).double())
    )


def ranking_in_one_pass(folder):
    """Both sides of all pairs in one long batch: the first axis is not the example."""

    def loss(model, batch):
        better, worse = model(torch.cat([batch.better, batch.worse])).squeeze(1).chunk(2)
        return functional.softplus(worse - better)

    return task_of(
        folder, toys.regressor(), loss, lambda i: Preference(torch.randn(6).double(), torch.randn(6).double())
    )


def several_heads(folder):
    """A class and a number, from tuples in a tuple."""

    def loss(model, batch):
        x, (label, number) = batch
        out = model(x)
        return functional.cross_entropy(out[:, :2], label, reduction="none") + functional.huber_loss(
            out[:, 2], number, reduction="none"
        )

    return task_of(
        folder,
        toys.mlp(),
        loss,
        lambda i: (torch.randn(6).double(), (torch.tensor(i % 2), torch.randn(()).double())),
    )


class Tagger(nn.Module):
    """A class for each word."""

    def __init__(self):
        super().__init__()
        self.words, self.mix, self.head = (
            nn.Embedding(9, 5, padding_idx=0),
            nn.Conv1d(5, 5, 3, padding=1),
            nn.Linear(5, 4),
        )

    def forward(self, words):
        hidden = self.words(words) * (words != 0)[:, :, None]
        return self.head(torch.tanh(self.mix(hidden.transpose(1, 2)).transpose(1, 2)))


def tagging(folder):
    """Sequences of many lengths; padding has the label that cross-entropy leaves out."""

    def loss(model, batch):
        losses = functional.cross_entropy(
            model(batch["words"]).transpose(1, 2), batch["tags"], ignore_index=-100, reduction="none"
        )
        return losses.sum(1) / (batch["tags"] != -100).sum(1)

    def collate(items):
        return {
            "words": pad_sequence([words for words, _ in items], batch_first=True),
            "tags": pad_sequence([tags for _, tags in items], batch_first=True, padding_value=-100),
        }

    def item(i):
        length = 2 + i % 5
        return torch.randint(1, 9, (length,)), torch.randint(4, (length,))

    return task_of(folder, Tagger(), loss, item, collate=collate)


KINDS = {
    "multi-label": (multi_label, {"0": "linear", "2": "linear"}),
    "ranking pairs": (ranking, {"0": "linear", "2": "linear"}),
    "ranking pairs in one pass": (ranking_in_one_pass, {"0": "linear by rows", "2": "linear by rows"}),
    "several heads": (several_heads, {"0": "linear", "2": "linear"}),
    "tagging with padding": (tagging, {"words": "embedding", "mix": "convolution", "head": "linear"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_this_kind_equal_autograd(tmp_path, kind):
    make, routes = KINDS[kind]
    assert check_against_autograd(make(tmp_path)) == routes


@pytest.mark.slow
def test_a_batch_of_transformers_equals_autograd(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra dev")
    seen = []

    def collate(items):
        return transformers.BatchEncoding(
            {"words": torch.stack([w for w, _ in items]), "y": torch.tensor([y for _, y in items])}
        )

    def loss(model, batch):
        seen.append(type(batch).__name__)
        return functional.cross_entropy(model(batch.words)[:, 0], batch.y, reduction="none")

    task = task_of(tmp_path, Tagger(), loss, lambda i: (torch.randint(1, 9, (4,)), i % 4), collate=collate)
    check_against_autograd(task)
    assert "BatchEncoding" in seen


MIXING = {
    "contrastive over the batch": lambda m, b: -functional.log_softmax(m(b[0]) @ m(b[0]).T, 1).diagonal(),
    "a norm without running statistics": toys.cross_entropy,
}


@pytest.mark.parametrize("case", MIXING)
def test_what_mixes_the_examples_of_a_batch_is_refused(tmp_path, case):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))
    task = toys.make_task(tmp_path, model if "norm" in case else toys.mlp(), loss=MIXING[case])
    with pytest.raises((LossError, ValueError), match=r"others of its batch|more than 1 value per channel"):
        gradindex.build(task, tmp_path / "store")


def test_a_kept_margin_hides_no_layer_from_the_check(tmp_path):
    # The first and the last example have no gradient at all: a check of these alone would find every route right.
    def hinge(model, batch):
        return functional.relu(1 - model(batch[0])[:, 0]) * (batch[1] > 0)

    task = toys.make_task(tmp_path, TimeMajor(), shape=(2, 6), loss=hinge)
    task.train.tensors[1][:] = 1
    task.train.tensors[1][[0, 11]] = 0
    routes = check_against_autograd(task)
    assert routes["inner"] == "linear by rows"


class Experts(nn.Module):
    """Each example goes to one of two layers, those for the same one together."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = x.new_zeros(len(x), 4)
        for expert, chosen in ((self.first, x[:, 0] > 0), (self.second, x[:, 0] <= 0)):
            if bool(chosen.any()):
                hidden[chosen] = expert(x[chosen])
        return self.head(torch.tanh(hidden))


@pytest.mark.slow
def test_experts_that_see_a_part_of_the_batch_are_taken_by_rows(tmp_path):
    task = toys.make_task(tmp_path, Experts())
    task.train.tensors[0][:, 0].abs_()
    task.train.tensors[0][[4, 7], 0] *= -1
    routes = check_against_autograd(task)
    assert routes == {"first": "linear by rows", "second": "linear by rows", "head": "linear"}


def test_a_first_axis_that_was_the_example_in_the_check_alone_stops_the_build(tmp_path):
    task = toys.make_task(tmp_path, Experts(), n_train=64, layers="first")
    task.train.tensors[0][:, 0].abs_()
    unlooked = sorted(set(range(64)) - set(range(0, 64, 2)))[5]
    task.train.tensors[0][unlooked, 0] *= -1
    task.query.tensors[0][:, 0].abs_()
    with Engine(task) as engine:
        check_routes(engine)
        assert [layer.route for layer in engine.layers] == ["linear"]
        with pytest.raises(
            TaskError, match="first saw 63 rows for 64 examples, though each example was a row of its own"
        ):
            engine.run(0, task.read(task.train_ids), lambda number, gradients: None)
