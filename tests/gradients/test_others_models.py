"""What other people's models do besides computing: whatever it is, scores equal autograd, or it is refused by name."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import toys
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import gradindex
from gradindex.checkpoint import find_checkpoints
from gradindex.errors import CheckpointError, LossError, TaskError
from gradindex.projection import Projection

WHOLE = Projection("none")


def check_all(task, tmp_path):
    """Exact scores, those of rows and the answers of a retriever against the naive reference, with few queries."""
    items = [task.query[i] for i in range(2)]
    found = gradindex.exact_scores(task, items)
    store = gradindex.build(task, tmp_path / "store", projection=WHOLE)
    retriever = gradindex.load(task, store.folder)
    answers = [retriever.proponents([0, 1], k=12, **options) for options in ({"rerank": "rows"}, {})]
    names = gradindex.GradientStore(store.folder).manifest.map.layers
    prefixes = tuple(name for layer in names for name in layer.parameters)
    train, queries = (
        reference.gradients(task, items, role, prefixes=prefixes)
        for items, role in (([task.train[i] for i in range(12)], "train"), (items, "query"))
    )
    expected, norms = reference.scores(task, queries, train, toys.RATES)
    np.testing.assert_allclose(found, expected, atol=1e-5 * norms.max())
    for answer in answers:
        np.testing.assert_allclose(answer.scores, np.take_along_axis(expected, answer.ids, 1), atol=1e-5 * norms.max())


class Target(nn.Module):
    """The head follows a target that is computed without a gradient; where both inputs are equal, there is none."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        with torch.no_grad():
            target = self.head(self.cell(x[:, 3:]))
        return (self.head(self.cell(x[:, :3])) - target).square().sum(1)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, delta):
        return delta.clamp(-0.05, 0.05)


class Clipping(nn.Module):
    """The gradient is clipped on its way: by a function, or by a hook on a tensor."""

    def __init__(self, by_hook):
        super().__init__()
        self.cell, self.head, self.by_hook = nn.GRUCell(6, 4), nn.Linear(4, 3), by_hook

    def forward(self, x):
        found = self.cell(x)
        if not self.by_hook:
            found = _Clipped.apply(found)
        elif found.requires_grad:
            found.register_hook(lambda delta: delta.clamp(-0.05, 0.05))
        return self.head(found)


def weighted(model, batch):
    return batch[2].to(batch[0].dtype) * functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.slow
@pytest.mark.parametrize("equal", [[0], [0, 11], range(11)])
def test_routes_are_chosen_where_gradients_are_not_zero(tmp_path, equal):
    def loss(model, batch):
        return model(batch[0])

    task = toys.make_task(tmp_path, Target(), loss=loss, layers=["cell.*"])
    x, y = task.train.tensors
    x = x.clone()
    x[list(equal), 3:] = x[list(equal), :3]
    check_all(replace(task, train=TensorDataset(x, y)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("by_hook", [False, True])
def test_routes_are_chosen_where_a_clipped_gradient_is_clipped(tmp_path, by_hook):
    task = toys.make_task(tmp_path, Clipping(by_hook), loss=weighted, layers=["cell.*"])
    for name in ("train", "query"):
        x, y = getattr(task, name).tensors
        weights = torch.full((len(x),), 20.0)
        weights[[0, -1]] = 0.02
        task = replace(task, **{name: TensorDataset(x, y, weights)})
    check_all(task, tmp_path)


class Scaled(nn.Module):
    """Scalars that no hook knows, as CLIP's logit_scale."""

    def __init__(self):
        super().__init__()
        self.inner, self.log_scale, self.shift = (
            nn.Linear(6, 3),
            nn.Parameter(torch.ones(())),
            nn.Parameter(torch.zeros(())),
        )

    def forward(self, x):
        return self.inner(x) * self.log_scale.exp() + self.shift * x[:, :3]


@pytest.mark.slow
def test_parameters_without_an_axis_equal_autograd(tmp_path):
    check_all(toys.make_task(tmp_path, Scaled()), tmp_path)


class Merging(nn.Linear):
    """Adds its adapter to its weight in eval mode, as loralib does, and takes it out again for training."""

    def __init__(self):
        super().__init__(6, 3)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(3, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged is mode:
            self.weight.data += (self.b @ self.a).data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        found = functional.linear(x, self.weight, self.bias)
        return found if self.merged else found + x @ self.a.T @ self.b.T


def test_a_train_method_of_the_models_own_is_not_called(tmp_path):
    model = nn.Sequential(Merging(), nn.Tanh(), nn.Linear(3, 3))
    task = toys.make_task(tmp_path, model, layers=["0.a", "0.b"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = gradindex.exact_scores(task, [task.query[0]])
    assert model[0].training and not model[0].merged
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    expected = np.zeros((1, 12))
    for checkpoint, rate in zip(task.checkpoints, toys.RATES, strict=True):
        double = nn.Sequential(Merging(), nn.Tanh(), nn.Linear(3, 3)).double()
        double.load_state_dict(checkpoint.load(model))

        def gradient(item, model=double):
            loss = toys.cross_entropy(model, (item[0].double()[None], item[1][None])).sum()
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [model[0].a, model[0].b])])

        query = gradient(task.query[0])
        expected += rate * np.array([[float(query @ gradient(item)) for item in task.train]])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class Remembering(nn.Linear):
    """Keeps more than tensors in its state dict."""

    def __init__(self, kept):
        super().__init__(6, 3)
        self.kept = kept

    def get_extra_state(self):
        return self.kept

    def set_extra_state(self, kept):
        self.kept = kept


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "other"), [({"scale": 2.0}, {"scale": 1.0}), (torch.arange(2), torch.zeros(2))])
def test_extra_state_that_differs_is_refused_and_equal_one_is_no_weight(tmp_path, kept, other):
    task = toys.make_task(tmp_path, nn.Sequential(Remembering(kept), nn.Tanh(), nn.Linear(3, 3)))
    found = gradindex.exact_scores(task, [task.query[0]])
    gradindex.build(task, tmp_path / "store")
    checkpoints = []
    for number, checkpoint in enumerate(task.checkpoints):  # the same without it
        torch.save(checkpoint.load(task.model), tmp_path / f"plain_{number}.pt")
        checkpoints.append(replace(checkpoint, path=tmp_path / f"plain_{number}.pt"))
    plain = replace(task, model=nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3)), checkpoints=checkpoints)
    np.testing.assert_allclose(found, gradindex.exact_scores(plain, [plain.query[0]]), rtol=1e-5)
    task.model[0].kept = other
    with pytest.raises(CheckpointError, match=r"different 0\._extra_state than the model.*load_state_dict"):
        gradindex.exact_scores(task, [task.query[0]])


def test_a_parameter_with_a_gradient_hook_is_refused(tmp_path):
    task = toys.make_task(tmp_path, toys.mlp())
    handle = task.model[0].weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(TaskError, match=r"0\.weight has a gradient hook .*\.remove\(\).*layers="):
        gradindex.build(task, tmp_path / "store")
    gradindex.exact_scores(replace(task, layers=["2"]), [task.query[0]])
    handle.remove()
    gradindex.exact_scores(task, [task.query[0]])


def test_a_loss_of_another_model_is_refused(tmp_path):
    other = toys.mlp()
    task = toys.make_task(tmp_path, toys.mlp(), loss=lambda model, batch: toys.cross_entropy(other, batch))
    with pytest.raises(TaskError, match="none of the tracked parameters .*another model than it is given"):
        gradindex.build(task, tmp_path / "store")


class ByPosition(Dataset):
    """Hands out positions, which say nothing of the texts that collate looks up."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        return i


class Averaging(nn.Module):
    """Averages over padding as well."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 4), nn.Linear(4, 3)

    def forward(self, words):
        return self.head(self.words(words).mean(1))


def by_position(tmp_path, short, n=48):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 20, (3 if i in short else 9,), generator=generator) for i in range(n)]

    def collate(items):
        return nn.utils.rnn.pad_sequence([texts[i] for i in items], batch_first=True), torch.tensor(items) % 3

    small = toys.make_task(tmp_path, Averaging(), shape=(4,))
    return replace(small, train=ByPosition(n), query=None, query_columns={}, columns={}, collate=collate)


@pytest.mark.parametrize("short", [{7}, {20, 21}])
def test_padding_of_items_that_do_not_tell_their_length_is_refused(tmp_path, short):
    task = by_position(tmp_path, short)
    for ask in (
        lambda: gradindex.exact_scores(task, [0], role="train"),
        lambda: gradindex.build(task, tmp_path / "store"),
    ):
        with pytest.raises(LossError, match="depends on the others of its batch"):
            ask()


def test_one_such_item_among_many_stops_the_build(tmp_path):
    task = by_position(tmp_path, {101}, 200)
    with pytest.raises(LossError, match="depends on the others of its batch"):
        gradindex.build(task, tmp_path / "store", batch_size=100)


class Noisy(Dataset):
    """Augmented at random."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.randn(6), torch.tensor(i % 3)


def test_exact_scores_refuse_random_augmentation(tmp_path):
    task = replace(toys.make_task(tmp_path), train=Noisy())
    with pytest.raises(TaskError, match="differs between two reads"):
        gradindex.exact_scores(task, [task.query[0]])


class Broken(TensorDataset):
    """Some examples cannot be read, others have no finite gradient."""

    def __getitem__(self, i):
        if i in (3, 5):
            raise OSError("no such picture")
        x, y = super().__getitem__(i)
        return (x * float("nan"), y) if i in (0, 11) else (x, y)


def test_what_is_wrong_with_examples_that_nobody_asked_for_hinders_no_exact_scores(tmp_path):
    task = toys.make_task(tmp_path, Target(), loss=lambda model, batch: model(batch[0]), layers=["cell.*"])
    ids, items = np.array([1, 2, 4, 6, 7, 8, 9, 10]), [task.query[0]]
    expected = gradindex.exact_scores(task, items)[:, ids]
    task = replace(task, train=Broken(*task.train.tensors))
    np.testing.assert_allclose(gradindex.exact_scores(task, items, ids), expected, rtol=1e-4, atol=1e-6)


def test_models_without_numbers_are_refused_at_once(tmp_path):
    with pytest.raises(TaskError, match=r"0\.weight has no shape yet \(a lazy module\)"):
        replace(toys.make_task(tmp_path), model=nn.Sequential(nn.LazyLinear(3)))
    with torch.device("meta"), pytest.raises(TaskError, match="is on the meta device"):
        replace(toys.make_task(tmp_path), model=nn.Sequential(nn.Linear(6, 3)))


@pytest.mark.parametrize("convert", [lambda loss: loss > 0, lambda loss: loss * 1j])
def test_losses_that_are_no_real_numbers_are_refused(tmp_path, convert):
    task = toys.make_task(tmp_path, loss=lambda model, batch: convert(toys.cross_entropy(model, batch)))
    with pytest.raises(LossError, match="must be real numbers that have a gradient"):
        gradindex.exact_scores(task, [task.query[0]])


def test_a_backward_pass_that_fails_for_one_example_alone_names_it(tmp_path):
    def loss(model, batch):
        hidden = torch.sigmoid(model(batch[0]))
        found = hidden.sum(1)
        hidden.mul_(2)  # breaks what sigmoid saved
        return found

    task = toys.make_task(tmp_path, loss=loss)
    with pytest.raises(gradindex.GradIndexError, match="on training example 0 failed") as caught:
        gradindex.exact_scores(task, [task.query[0]])
    assert "Each of them works alone" not in str(caught.value)


def test_a_checkpoint_that_is_saved_twice_under_two_names_is_one(tmp_path):
    weights = toys.mlp().state_dict()
    for name in ("epoch=2-step=40", "last"):
        torch.save({"state_dict": weights, "global_step": 40}, tmp_path / f"{name}.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() != (tmp_path / "epoch=2-step=40.ckpt").read_bytes()
    assert [checkpoint.step for checkpoint in find_checkpoints(tmp_path, learning_rate=0.1)] == [40]
    other = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"state_dict": other, "global_step": 40}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="both have step 40"):
        find_checkpoints(tmp_path, learning_rate=0.1)
