"""Whether examples have losses and gradients of their own: mixing, randomness, NaN, batches that a loss changes."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import toys
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import TensorDataset

import gradindex
from gradindex.errors import LossError, MismatchError, NonFiniteGradientError, TaskError
from gradindex.gradients import Engine, check_routes
from gradindex.projection import Projection
from gradindex.rows import RowMaker
from gradindex.spotcheck import SpotCheck


class LastStep(nn.Module):
    """Reads a text to its end, which in a batch is padding: what a beginner writes."""

    def __init__(self):
        super().__init__()
        self.words, self.read, self.head = nn.Embedding(20, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, words):
        return self.head(self.read(self.words(words))[0][:, -1])


class Masked(nn.Module):
    """The same reader, which knows where the padding is."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 4), nn.Linear(4, 3)

    def forward(self, words):
        there = (words > 0).to(self.head.weight.dtype)[..., None]
        return self.head((torch.tanh(self.words(words)) * there).sum(1) / there.sum(1))


def padded(items):
    return pad_sequence([words for words, _ in items], batch_first=True), torch.tensor([label for _, label in items])


def longest_first(items):
    return padded(sorted(items, key=lambda item: -len(item[0])))


def texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(1, 20, (n,), generator=generator), n % 3) for n in lengths]


LENGTHS = [6, 3, 5, 9, 4, 7, 2, 8, 3, 5, 4, 6]  # both ends equally long


def text_task(folder, model=None, collate=padded, train=None, **options):
    train = texts(LENGTHS) if train is None else train
    return toys.make_task(folder, model or LastStep(), train=train, query=train[:3], collate=collate, **options)


@pytest.mark.parametrize(
    ("model", "collate"),
    [(LastStep, padded), (Masked, longest_first)],
    ids=["padding is read", "the batch has another order"],
)
@pytest.mark.parametrize("batch_size", [2, 12])
def test_an_example_that_its_batch_changes_is_refused_with_a_way_out(tmp_path, model, collate, batch_size):
    task = text_task(tmp_path, model(), collate)
    with pytest.raises(LossError, match=r"depends on the others of its batch .*batch_size=1"):
        gradindex.build(task, tmp_path / "store", batch_size=batch_size)
    assert not (tmp_path / "store").exists()


def test_a_mask_makes_padding_right(tmp_path):
    task = text_task(tmp_path, Masked())
    store = gradindex.build(task, tmp_path / "store", projection=Projection("none"), precision="float64", batch_size=5)
    rows = reference.gradients(task, task.train)
    np.testing.assert_allclose(store.self_influence().sum(1), self_influence(rows), rtol=1e-9)


def self_influence(rows):
    return (torch.tensor(toys.RATES, dtype=torch.float64)[:, None] * rows.square()).sum((1, 2)).numpy()


@pytest.mark.slow
def test_batches_of_one_are_right_whatever_a_batch_would_change(tmp_path):
    task = text_task(tmp_path)
    options = {"projection": Projection("none"), "precision": "float64", "batch_size": 1}
    store = gradindex.build(task, tmp_path / "store", **options)
    train, queries = reference.gradients(task, task.train), reference.gradients(task, task.query)
    truth, scale = reference.scores(task, queries, train, toys.RATES)
    np.testing.assert_allclose(store.self_influence().sum(1), self_influence(train), rtol=1e-9)
    retriever = gradindex.load(task, store.folder)
    found = {
        "through the model": retriever.exact_scores(range(3)),
        "by rows": retriever.query_rows(range(3)).astype(np.float64) @ store.rows(store.ids).astype(np.float64).T,
        "split": retriever.explain(range(3), store.ids).scores.sum((2, 3)),
        "without a store": gradindex.exact_scores(task, task.query, precision="float64", batch_size=1),
    }
    for name, scores in found.items():
        assert np.all(np.abs(scores - truth) <= (1e-5 if name == "by rows" else 1e-9) * scale), name
    grown = replace(task, train=[*task.train, *texts([11, 1, 4], seed=1)])
    gradindex.add(grown, store.folder)
    rows = reference.gradients(grown, grown.train)
    np.testing.assert_allclose(gradindex.GradientStore(store.folder).self_influence().sum(1), self_influence(rows))


@pytest.mark.slow
def test_one_long_example_among_many_is_met_while_building(tmp_path):
    """It lies between those that are looked at before; the batches without it are right, its own is not."""
    lengths = [6] * 200
    lengths[102] = 30
    task = text_task(tmp_path, train=texts(lengths))
    with pytest.raises(LossError, match=r"training example \d+ depends on the others of its batch .*batch of 40"):
        gradindex.build(task, tmp_path / "store", batch_size=40, shard_rows=40)
    made = sorted(path.name for path in (tmp_path / "store" / "shards").glob("*.h5"))
    assert made == ["0001-00000.h5", "0001-00001.h5"]
    with pytest.raises(MismatchError, match="started with batch_size 40, not 1"):
        gradindex.build(task, tmp_path / "store", batch_size=1)
    assert gradindex.build(task, tmp_path / "alone", batch_size=1).n_train == 200


def test_an_example_that_is_another_one_later_is_met_while_building(tmp_path):
    class Drifting(TensorDataset):
        later = False

        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return (x + 1 if self.later else x), y

    task = toys.make_task(tmp_path)
    data = Drifting(*task.train.tensors)
    task = replace(task, train=data)
    check = SpotCheck.check

    def drifted(self, *args):
        data.later = True
        check(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpotCheck, "check", drifted)
        with pytest.raises(TaskError, match=r"Training example \d+ differs between two reads"):
            gradindex.build(task, tmp_path / "store")


@pytest.mark.slow
def test_queries_that_their_batch_changes_are_asked_one_at_a_time(tmp_path):
    train = texts([6] * 12)
    task = text_task(tmp_path, train=train)
    task = replace(task, query=texts([3, 9, 5], seed=2))
    gradindex.build(task, tmp_path / "store", projection=Projection(dim=8))
    retriever = gradindex.load(task, tmp_path / "store")
    with pytest.raises(LossError, match=r"query 0 depends on the others of its batch .*one at a time"):
        retriever.proponents(range(3), k=3)
    with pytest.raises(LossError, match=r"query 0 of 3 depends on the others of its batch .*one at a time"):
        gradindex.exact_scores(task, task.query)
    queries = reference.gradients(task, task.query)
    truth, scale = reference.scores(task, queries, reference.gradients(task, train), toys.RATES)
    for place in range(3):
        hits = retriever.proponents(place, k=12)
        assert np.all(np.abs(hits.scores[0] - truth[place, hits.ids[0]]) <= 1e-4 * scale[place, hits.ids[0]])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rounding_is_not_taken_for_mixing(tmp_path, precision):
    """Of a model that has converged, losses and gradients are all rounding."""
    model = nn.Linear(4, 3)
    task = toys.make_task(tmp_path, model, shape=(4,), n_train=100)
    for checkpoint in task.checkpoints:
        torch.save({name: tensor * 80 for name, tensor in torch.load(checkpoint.path).items()}, checkpoint.path)
    x = task.train.tensors[0]
    weights = torch.load(task.checkpoints[-1].path)
    labels = (x.float() @ weights["weight"].T + weights["bias"]).argmax(1)
    task = replace(task, train=TensorDataset(x, labels), checkpoints=task.checkpoints[-1:])
    store = gradindex.build(task, tmp_path / "store", precision=precision, batch_size=32)
    assert np.median(store.losses()) < 1e-6


def noisy(model, batch):
    return toys.cross_entropy(model, (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]))


def dropping(model, batch):
    return toys.cross_entropy(model, (functional.dropout(batch[0], 0.3), batch[1]))


def seeded(model, batch):
    noise = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(0)).to(batch[0])
    return toys.cross_entropy(model, (batch[0] + noise, batch[1]))


def masking(items):
    x, y = (torch.stack(parts) for parts in zip(*items, strict=True))
    return x * (torch.rand(x.shape) > 0.3), y


RANDOM = {
    "noise in the loss": ({"loss": noisy}, "The loss is random: .* in two calls on training example 0 alone"),
    "dropout left on": ({"loss": dropping}, "The loss is random: .*training=self.training"),
    "a mask in collate": ({"collate": masking}, "collate is random: .* training example 0 alone"),
    "noise by place": ({"loss": seeded}, "depends on its place in the batch .*generator that is seeded in the loss"),
    "noise in the query loss": ({"query_loss": noisy}, "The loss is random: .* in two calls on query 0 alone"),
}


@pytest.mark.parametrize("case", RANDOM)
def test_what_is_random_is_said_to_be(tmp_path, case):
    options, message = RANDOM[case]
    state = torch.random.get_rng_state()
    task = toys.make_task(tmp_path)
    torch.random.set_rng_state(state)
    with pytest.raises(LossError, match=message):
        gradindex.build(replace(task, **options), tmp_path / "store")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 5, 11])
@pytest.mark.parametrize("zero_gradient", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_wherever_it_stands(tmp_path, place, zero_gradient, value):
    def loss(model, batch):
        x, y, added = batch
        return toys.cross_entropy(model, (x, y)) * (1 if zero_gradient else added) + added

    added = torch.zeros(12)
    added[place] = value
    task = toys.make_task(tmp_path, loss=loss)
    task = replace(task, train=TensorDataset(*task.train.tensors, added), query=None)
    message = rf"Training example {place} has a NaN or infinite loss at checkpoint 0 .*Task\(skip=\[{place}\]\)"
    with pytest.raises(NonFiniteGradientError, match=message):
        gradindex.build(task, tmp_path / "store")
    skipping = replace(task, skip=[place])
    assert gradindex.build(skipping, tmp_path / "store").n_train == 11
    with pytest.raises(NonFiniteGradientError, match="Fix it, or drop it"):
        gradindex.load(skipping, tmp_path / "store").proponents(place, k=2, source="train")


def test_a_query_that_is_not_finite_hinders_no_other_question(tmp_path):
    task = toys.make_task(tmp_path, query_loss=toys.cross_entropy)
    task.query.tensors[0][[0, 3]] = float("nan")
    gradindex.build(task, tmp_path / "store", projection=Projection(dim=8))
    retriever = gradindex.load(task, tmp_path / "store")
    assert retriever.proponents([1, 2], k=3).ids.shape == (2, 3)
    with pytest.raises(NonFiniteGradientError, match="query 0 has a NaN or infinite loss .*drop it"):
        retriever.proponents([1, 0], k=3)


def test_all_of_a_batch_that_are_not_finite_are_named_at_once(tmp_path):
    task = toys.make_task(tmp_path, n_train=64)
    task.train.tensors[0][[20, 31, 40]] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"Training examples 20, 31 and 40 .*Task\(skip=\[20, 31, 40\]\)"):
        gradindex.build(task, tmp_path / "store")


def popping(model, batch):
    labels = batch.pop("labels")
    return functional.cross_entropy(model(**batch), labels, reduction="none")


def in_place(model, batch):
    batch["input"].sub_(0.5).div_(2)
    batch["labels"].clamp_(max=1)
    return functional.cross_entropy(model(batch["input"]), batch["labels"], reduction="none")


def untouched(model, batch):
    x, labels = batch["input"], batch["labels"]
    return functional.cross_entropy(model((x - 0.5) / 2), labels.clamp(max=1), reduction="none")


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("loss", [popping, in_place])
def test_a_loss_may_take_its_batch_apart_and_change_it(tmp_path, loss, alone):
    """Also where collate hands on the data set's own tensors."""

    def collate(items):
        if len(items) == 1:
            return {name: part[None] for name, part in items[0].items()}
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    task = toys.make_task(tmp_path, loss=loss, collate=collate)
    train = [{"input": x.float(), "labels": y} for x, y in task.train]
    before = [{name: part.clone() for name, part in item.items()} for item in train]
    task = replace(task, train=train, query=train[:2])
    store = gradindex.build(task, tmp_path / "store", projection=Projection("none"), batch_size=1 if alone else 5)
    plain = replace(task, loss=untouched if loss is in_place else popping)
    copies = [{name: part.clone() for name, part in item.items()} for item in before]
    rows = reference.gradients(replace(plain, train=copies), copies)
    np.testing.assert_allclose(store.self_influence().sum(1), self_influence(rows), rtol=1e-4)
    assert all(torch.equal(item[name], kept[name]) for item, kept in zip(train, before, strict=True) for name in kept)


def no_gradient(model, batch):
    with torch.no_grad():
        return toys.cross_entropy(model, batch)


def detached(model, batch):
    return toys.cross_entropy(model, batch).detach()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"loss": no_gradient}, "The loss of 8 examples"), ({"query_loss": detached}, "The query loss of 4 examples")],
)
def test_a_loss_without_any_gradient_is_refused(tmp_path, options, message):
    with pytest.raises(TaskError, match=f"{message} tried depends on none of the tracked parameters"):
        gradindex.build(toys.make_task(tmp_path, **options), tmp_path / "store")


def test_computing_in_float64_for_a_while_leaves_an_engine_as_it_was(tmp_path):
    task = toys.make_task(tmp_path)
    with Engine(task) as engine:
        check_routes(engine)
        examples = task.read(task.train_ids)
        maker = RowMaker(engine, Projection("none"))
        losses, norms = maker.losses_and_norms(0, examples)
        state = engine.states[0]
        with engine.doubled(0):
            exact_losses, exact_norms = maker.losses_and_norms(0, examples)
        again, _ = maker.losses_and_norms(0, examples)
        assert engine.states[0] is state and engine.dtype == torch.float32
    true_norms = reference.gradients(task, task.train)[:, 0].norm(dim=1) * toys.RATES[0] ** 0.5
    np.testing.assert_allclose(exact_norms.numpy(), true_norms.numpy(), rtol=1e-9)
    np.testing.assert_allclose(norms.numpy(), exact_norms.numpy(), rtol=1e-4)
    np.testing.assert_allclose(losses.numpy(), exact_losses.numpy(), rtol=1e-4)
    assert torch.equal(again, losses)
