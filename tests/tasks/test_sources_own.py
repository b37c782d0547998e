"""A loader of one's own, the model as a base, and folders that hold something else."""

import re

import numpy as np
import pytest
import torch
import toys
from reference import gradients, scores
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradindex
from gradindex import Checkpoint, find_checkpoints
from gradindex.errors import ArgumentError, CheckpointError, TaskError, UserCodeError
from gradindex.gradients import Engine


@pytest.fixture
def model():
    torch.manual_seed(0)
    return toys.mlp()


def same(found, model):
    expected = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def save_arrays(model, path):
    """In a format that gradindex does not know."""
    np.savez(path, **{name.replace(".", "/"): tensor.numpy() for name, tensor in model.state_dict().items()})


def load_arrays(path, model):
    with np.load(path) as arrays:
        return {name.replace("/", "."): torch.from_numpy(arrays[name]) for name in arrays}


def test_a_loader_of_ones_own_gives_the_weights(tmp_path, model):
    trained = toys.mlp()
    save_arrays(trained, tmp_path / "w_4.npz")
    checkpoint = Checkpoint(tmp_path / "w_4.npz", 0.1, load=load_arrays)
    assert same(checkpoint.load(model), trained)
    assert checkpoint.read(model).kind == "own loader"
    with pytest.raises(CheckpointError, match="zip file that torch.save did not write"):
        Checkpoint(tmp_path / "w_4.npz", 0.1).load(model)


def test_a_folder_of_files_of_ones_own_is_found_and_scored_as_autograd_does(tmp_path):
    task = toys.make_task(tmp_path, n_train=6)
    (tmp_path / "own").mkdir()
    for step in (9, 10, 100):
        toys.randomise(task.model)
        save_arrays(task.model, tmp_path / "own" / f"w_{step}.npz")
    for pattern in (tmp_path / "own", tmp_path / "own" / "*.npz"):
        found = find_checkpoints(pattern, learning_rate=[0.3, 0.2, 0.1], load=load_arrays)
        assert [(item.step, item.learning_rate) for item in found] == [(9, 0.3), (10, 0.2), (100, 0.1)]
    task = gradindex.Task(task.model, task.loss, task.train, found)
    items = [task.train[i] for i in range(6)]
    got = gradindex.exact_scores(task, items)
    rows = gradients(task, items)
    expected, norms = scores(task, rows, rows, [0.3, 0.2, 0.1])
    np.testing.assert_allclose(got, expected, atol=1e-5 * norms.max())


def test_a_store_is_tied_to_what_a_loader_gave(tmp_path):
    task = toys.make_task(tmp_path, rates=(0.1,))
    save_arrays(task.model, tmp_path / "w_4.npz")
    checkpoint = Checkpoint(tmp_path / "w_4.npz", 0.1, step=4, load=load_arrays)
    task = gradindex.Task(task.model, task.loss, task.train, checkpoint)
    store = gradindex.build(task, tmp_path / "store")
    assert store.manifest.map.checkpoints[0].sha256 == checkpoint.sha256(task.model)
    gradindex.load(task, tmp_path / "store")
    with torch.no_grad():
        task.model[0].bias += 1e-6
    save_arrays(task.model, tmp_path / "w_4.npz")
    with pytest.raises(gradindex.errors.MismatchError, match="checkpoints differ"):
        gradindex.load(task, tmp_path / "store")
    with pytest.raises(ArgumentError, match=r"Give it: sha256\(model\)"):
        checkpoint.sha256()


def test_a_loader_that_loads_into_its_model_leaves_the_users_alone(tmp_path, model):
    trained = toys.mlp()
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def load(path, model):
        model.load_state_dict(torch.load(path))
        return model.state_dict()

    assert same(Checkpoint(tmp_path / "w.pt", 0.1, load=load).load(model), trained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_names_of_a_loader_are_fitted_as_those_of_a_file(tmp_path, model):
    trained = toys.mlp()
    weights = {f"student.{name}": tensor for name, tensor in trained.state_dict().items()}
    weights |= {f"teacher.{name}": tensor for name, tensor in model.state_dict().items()}
    loaded = Checkpoint("hub:weights", 0.1, load=lambda path, model: weights, prefix="student.").read(model)
    assert same(loaded.tensors, trained)
    assert len(loaded.passed_over) == 4


WRONG = {
    "fails": (lambda path, model: 1 / 0, UserCodeError, r"load, the loader of w\.own, failed: ZeroDivisionError.*gets"),
    "nothing": (lambda path, model: None, CheckpointError, r"load returned a NoneType for w\.own, but must"),
    "no tensors": (lambda path, model: {"step": 3}, CheckpointError, "load returned a dict without tensors"),
    "a model": (lambda path, model: model, CheckpointError, "load returned a Sequential"),
    "others": (lambda path, model: {"w": torch.ones(2)}, CheckpointError, r"w\.own does not fit the model: 0\.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_a_loader_does_wrong_is_one_line(model, case):
    load, error, message = WRONG[case]
    with pytest.raises(error, match=message) as raised:
        Checkpoint("w.own", 0.1, load=load).load(model)
    assert "\n" not in str(raised.value)


def test_a_loader_and_a_base_that_are_none_are_refused():
    with pytest.raises(ArgumentError, match="load is a str, but must be a function of the path and a model"):
        Checkpoint("w.pt", 0.1, load="torch.load")
    with pytest.raises(ArgumentError, match="base is 'other', but must be 'model' or None"):
        Checkpoint("w.pt", 0.1, base="other")


class Tuned(nn.Module):
    """A backbone that nobody trains, with statistics, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.norm(self.backbone(x)))


@pytest.fixture
def tuned(tmp_path):
    """A task whose checkpoints hold the head alone."""
    task = toys.make_task(tmp_path, Tuned())
    weights = []
    for number in range(3):
        toys.randomise(task.model.head)
        weights.append({name: tensor.clone() for name, tensor in task.model.state_dict().items()})
        torch.save(
            {name: tensor for name, tensor in weights[-1].items() if name.startswith("head.")},
            tmp_path / f"h_{number}.pt",
        )
    task.model.backbone.requires_grad_(False)
    task.model.norm.requires_grad_(False)
    return task, weights


def test_weights_that_a_checkpoint_lacks_are_the_models_once_for_all(tuned, tmp_path):
    task, weights = tuned
    found = find_checkpoints(tmp_path / "h_*.pt", learning_rate=0.1, base="model")
    for item, expected in zip(found, weights, strict=True):
        loaded = item.read(task.model)
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in expected.items())
        assert set(loaded.from_base) == {name for name in expected if name.startswith(("backbone", "norm"))} - set(
            loaded.filled
        )
    task = gradindex.Task(task.model, task.loss, task.train, found)
    states = Engine(task).states
    assert all(states[0][name] is states[2][name] for name in ("model.backbone.weight", "model.norm.running_var"))
    assert states[0]["model.head.weight"] is not states[2]["model.head.weight"]


def test_a_base_is_lent_and_must_stay_as_it_is(tuned, tmp_path):
    task, _ = tuned
    found = find_checkpoints(tmp_path / "h_*.pt", learning_rate=0.1, base="model")
    handed_out, own = found[0].load(task.model), task.model.backbone.weight
    handed_out["backbone.weight"] += 1  # is the caller's
    assert not torch.equal(handed_out["backbone.weight"], own)
    task = gradindex.Task(task.model, task.loss, task.train, found)
    first = Engine(task).states[0]
    assert first["model.backbone.weight"].data_ptr() == task.model.backbone.weight.data_ptr()
    assert first["model.norm.running_var"].data_ptr() != task.model.norm.running_var.data_ptr()  # models write to these
    gradindex.build(task, tmp_path / "store")
    retriever = gradindex.load(task, tmp_path / "store")
    retriever.proponents([0], source="train", k=2)
    toys.randomise(task.model.head)  # is not of the base
    retriever.proponents([0], source="train", k=2)
    with torch.no_grad():
        task.model.backbone.weight += 1
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"backbone\.weight of the model was changed after it was read as the"
        ):
            retriever.proponents([0], source="train", k=2)


def test_a_base_is_part_of_what_a_store_was_built_from_and_is_said(tuned, tmp_path, capsys):
    task, _ = tuned
    found = find_checkpoints(tmp_path / "h_*.pt", learning_rate=0.1, base="model")
    task = gradindex.Task(task.model, task.loss, task.train, found)
    gradindex.build(task, tmp_path / "store")
    said = capsys.readouterr().err
    assert re.search(r"h_0\.pt \(like 2 others\).* takes backbone\.weight, .* from the model, as its base", said)
    assert "weights (6 parameters from the model)" in toys.call("info", tmp_path / "store").output
    with torch.no_grad():
        task.model.backbone.bias += 1e-6
    with pytest.raises(gradindex.errors.MismatchError, match="checkpoints differ"):
        gradindex.load(task, tmp_path / "store")


def test_a_base_stands_in_for_nothing_that_is_tracked(tuned, tmp_path):
    task, _ = tuned
    found = find_checkpoints(tmp_path / "h_*.pt", learning_rate=0.1, base="model")
    task = gradindex.Task(task.model, task.loss, task.train, found, layers="*")
    with pytest.raises(CheckpointError, match=r"h_0\.pt .*backbone\.weight is missing and tracked, so the model's own"):
        gradindex.build(task, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    without = find_checkpoints(tmp_path / "h_*.pt", learning_rate=0.1)
    with pytest.raises(CheckpointError, match=r"backbone\.weight is missing.*base='model'"):
        without[0].load(task.model)


def test_a_base_is_no_excuse_for_other_names(tuned, tmp_path):
    task, _ = tuned
    torch.save({"other.weight": torch.ones(3, 5)}, tmp_path / "w_1.pt")
    with pytest.raises(CheckpointError, match="none of its names is the model's"):
        Checkpoint(tmp_path / "w_1.pt", 0.1, base="model").load(task.model)


@pytest.mark.parametrize("before", ["model.", "net.encoder."])
def test_a_part_of_the_weights_under_a_prefix_is_found(tuned, tmp_path, before):
    task, weights = tuned
    content = {f"{before}{name}": weights[0][name] for name in ("head.weight", "head.bias")}
    torch.save({"state_dict": content}, tmp_path / "w_1.pt")
    loaded = Checkpoint(tmp_path / "w_1.pt", 0.1, base="model").load(task.model)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights[0].items() if name.startswith("head"))


def test_a_list_of_checkpoints_with_loaders_is_copied_with_other_rates(tmp_path, model):
    save_arrays(model, tmp_path / "w_4.npz")
    found = find_checkpoints(tmp_path, load=load_arrays, learning_rate={4: 0.5})
    assert found == [Checkpoint(str(tmp_path / "w_4.npz"), 0.5, step=4, load=load_arrays)]
    with pytest.raises(TaskError, match="checkpoints"):
        gradindex.Task(model, toys.cross_entropy, [1], [load_arrays])


def test_averages_that_torch_keeps_are_found_and_named(tmp_path, model):
    averages = []
    for step in (1, 2):
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for _ in range(step + 1):
            toys.randomise(model)
            averaged.update_parameters(model)
        averages.append(averaged.module)
        torch.save(averaged.state_dict(), tmp_path / f"ema_{step}.pt")
    found = find_checkpoints(tmp_path, learning_rate=0.1)
    assert [item.read(toys.mlp()).kind for item in found] == ["AveragedModel"] * 2
    assert all(same(item.load(toys.mlp()), averaged) for item, averaged in zip(found, averages, strict=True))
    torch.save({"model": model.state_dict(), "ema": averages[0].state_dict()}, tmp_path / "both.pt")
    assert same(Checkpoint(tmp_path / "both.pt", 0.1).load(toys.mlp()), model)
    assert same(Checkpoint(tmp_path / "both.pt", 0.1, key="ema").load(toys.mlp()), averages[0])
