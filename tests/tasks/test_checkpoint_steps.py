"""Steps from files and names, rates in every form, and checkpoints that hardly count."""

import decimal
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys

import gradindex
from gradindex.errors import ArgumentError, CheckpointError, TaskError

STATE = toys.mlp().state_dict()


def saved(folder, *names, content=STATE):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)


def found(pattern, **options):
    items = gradindex.find_checkpoints(pattern, **({"learning_rate": 0.1} | options))
    return [(os.path.basename(item.path), item.step) for item in items]  # noqa: PTH119  # a path is a text here


NAMES = {
    "epoch=01-val_loss=0.9.ckpt": 1,
    "epoch=09-val_loss=0.31.ckpt": 9,
    "epoch=3-step=400.ckpt": 400,
    "epoch=3-step=400-v1.ckpt": 400,
    "epoch_7_acc_93.pth": 7,
    "model_epoch12.pth": 12,
    "ep3-f1-0.87.pt": 3,
    "10epochs.pt": 10,
    "global_step_20.pt": 20,
    "iter_000300.pth": 300,
    "step-5_loss-1e-3.pt": 5,
    "checkpoint_30.pth.tar": 30,
    "ckpt-40.bin": 40,
    "ckpt50.pt": 50,
    "net_v2_60.pt": 60,
    "run-2024-01-15-70.pt": 70,
    "20240115_80.pt": 80,
    "resnet18-90.pt": 90,
    "model.100.pt": 100,
    "a1b2c3d_110.pt": 110,
    "seed_1-120.pt": 120,
    "llama-7b-130.safetensors.pt": 130,
    "val_loss=1-step=140.ckpt": 140,
    "w_0.5_150.pt": 150,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_step_is_the_labelled_number_or_the_only_whole_one(tmp_path, name):
    saved(tmp_path, name)
    assert found(tmp_path / name) == [(name, NAMES[name])]


UNCLEAR = {
    "best.pt": "has no step in its name",
    "model_v2.pt": "has no step in its name",
    "val_loss=0.31.ckpt": "has no step in its name",
    "model-0.95.pt": "has no step in its name",
    "acc_93.pt": "has no step in its name",
    "seed-3.pt": "has no step in its name",
    "2024-01-15.pt": "has no step in its name",
    "deadbeef1.pt": "has no step in its name",
    "checkpoint_3_of_10.pt": "has numbers 3 and 10 in its name, so its step is unknown",
    "step_1_step_2.pt": "has steps 1 and 2 in its name",
}  # fmt: skip


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_step_that_is_not_plain_is_refused_with_the_way_out(tmp_path, name):
    saved(tmp_path, name)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} {UNCLEAR[name]}.*\[Checkpoint\(path, learning_rate"):
        found(tmp_path / name)


@pytest.mark.parametrize("file", ["model.safetensors.pt", "pytorch_model.bin"])
def test_a_file_without_a_number_takes_its_folders(tmp_path, file):
    saved(tmp_path, f"checkpoint-9/{file}", f"checkpoint-10/{file}", f"checkpoint-100/{file}")
    items = gradindex.find_checkpoints(tmp_path / "checkpoint-*" / file, learning_rate=lambda step: 1 / step)
    assert [(item.step, item.learning_rate) for item in items] == [(9, 1 / 9), (10, 0.1), (100, 0.01)]


@pytest.mark.parametrize("folder", ["run3", "exp_12", "2024-01-15", "resnet50"])
def test_a_folder_that_is_no_checkpoints_gives_no_step(tmp_path, folder):
    saved(tmp_path, f"{folder}/model.pt")
    with pytest.raises(CheckpointError, match="has no step in its name"):
        found(tmp_path / folder / "model.pt")


INSIDE = [
    ({"global_step": 40, "epoch": 3, "state_dict": STATE}, 40),
    ({"step": 41, "model": STATE}, 41),
    ({"epoch": 5, "model_state_dict": STATE, "best_acc": 93.0}, 5),
    ({"iteration": 6.0, "model": STATE}, 6),
    ({"epoch": 2.5, "model": STATE}, 7),
    ({"epoch": True, "step": "4", "model": STATE}, 7),
]  # fmt: skip


@pytest.mark.parametrize(("content", "step"), INSIDE)
def test_the_step_inside_goes_before_the_name(tmp_path, content, step):
    saved(tmp_path, "w_7.pt", content=content)
    assert found(tmp_path) == [("w_7.pt", step)]


def test_a_label_in_the_name_goes_before_a_lesser_one_inside(tmp_path):
    saved(tmp_path, "step_400.pt", content={"epoch": 1, "model": STATE})
    saved(tmp_path, "step_50.pt", content={"epoch": 2, "model": STATE})
    assert found(tmp_path) == [("step_50.pt", 50), ("step_400.pt", 400)]


def test_a_buffer_called_step_is_no_step(tmp_path):
    saved(tmp_path, "w_7.pt", content={**STATE, "step": torch.tensor(3), "epoch": 9})
    assert found(tmp_path) == [("w_7.pt", 7)]


def test_all_files_of_a_training_are_placed_by_the_same_kind_of_number(tmp_path):
    saved(tmp_path, "epoch=1-step=900.ckpt", "epoch=2.ckpt", "epoch=10-step=9000.ckpt")
    assert [step for _, step in found(tmp_path)] == [1, 2, 10]
    saved(tmp_path, "step=5.ckpt")
    with pytest.raises(CheckpointError, match=r"by epoch 2, but .*step=5\.ckpt by step 5, so their order is unknown"):
        found(tmp_path)


def test_two_different_files_of_one_step_are_refused_and_a_copy_is_left_out(tmp_path, capsys):
    saved(tmp_path, "epoch=1-step=5.ckpt", content={"state_dict": STATE, "global_step": 5})
    saved(tmp_path, "epoch=2-step=9.ckpt", content={"state_dict": STATE, "global_step": 9})
    shutil.copy(tmp_path / "epoch=2-step=9.ckpt", tmp_path / "last.ckpt")
    (tmp_path / "newest.ckpt").symlink_to(tmp_path / "last.ckpt")
    assert found(tmp_path) == [("epoch=1-step=5.ckpt", 5), ("epoch=2-step=9.ckpt", 9)]
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition("/")[2] for line in said] == ["epoch=2-step=9.ckpt and is skipped."] * 2
    saved(tmp_path, "best.ckpt", content={"state_dict": toys.regressor().state_dict(), "global_step": 9})
    with pytest.raises(
        CheckpointError, match=r"best\.ckpt and .*step=9\.ckpt both have step 9, so it is unclear which one counts"
    ):
        found(tmp_path)


def test_a_folder_is_searched_for_every_suffix_and_no_optimizers(tmp_path):
    for number, suffix in enumerate((".pt", ".pth", ".ckpt", ".bin", ".pth.tar", ".tar"), 1):
        saved(tmp_path, f"w_{number}{suffix}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "scaler.pt", ".hidden_9.pt"):
        saved(tmp_path, name, content={"not": "weights"})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder_8.pt").mkdir()
    assert [step for _, step in found(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_folders_of_checkpoints_are_found_by_their_numbers(tmp_path):
    saved(tmp_path, "checkpoint-9/pytorch_model.bin", "checkpoint-10/pytorch_model.bin", "runs/notes.txt")
    for pattern in (tmp_path, tmp_path / "checkpoint-*", tmp_path.parent / tmp_path.name):
        assert found(pattern) == [("checkpoint-9", 9), ("checkpoint-10", 10)]
    (tmp_path / "checkpoint-11").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint-11 is a folder without weights that .*: it is empty"):
        found(tmp_path)


def test_a_folder_of_runs_is_refused_and_the_only_run_below_one_is_found(tmp_path):
    saved(tmp_path, "logs/version_0/checkpoints/step=1.ckpt", "logs/version_0/checkpoints/step=2.ckpt")
    assert found(tmp_path) == [("step=1.ckpt", 1), ("step=2.ckpt", 2)]
    saved(tmp_path, "logs/version_1/checkpoints/step=1.ckpt")
    with pytest.raises(CheckpointError, match=r"logs holds 2 runs \(version_0, version_1\), but one is needed"):
        found(tmp_path)


@pytest.fixture
def three(tmp_path):
    saved(tmp_path, "step_9.pt", "step_10.pt", "step_100.pt")
    return tmp_path


FORMS = {
    "list": [0.3, 0.2, 0.1],
    "tuple of texts": ("3e-1", "0.2", "0.1"),
    "tensor": torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64),
    "array": np.array([0.3, 0.2, 0.1]),
    "by step": {100: 0.1, 9: 0.3, 10: 0.2, 11: 7.0},
    "by step as text": {"9": 0.3, "10": 0.2, "100": "0.1"},
    "by step of numpy": {np.int64(9): 0.3, np.int64(10): np.float64(0.2), np.int64(100): torch.tensor(0.1).double()},
    "function": lambda step: {9: 0.3, 10: np.float64(0.2), 100: "0.1"}[step],
    "function of lists": lambda step: [{9: 0.3, 10: 0.2, 100: 0.1}[step]],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_one_rate_for_each_checkpoint(three, form):
    items = gradindex.find_checkpoints(three, learning_rate=FORMS[form])
    assert [item.step for item in items] == [9, 10, 100]
    assert [item.learning_rate for item in items] == pytest.approx([0.3, 0.2, 0.1], rel=1e-7)
    assert all(type(item.learning_rate) is float for item in items)


ONE = ["1e-3", " 0.001 ", np.float64(0.001), torch.tensor(0.001, dtype=torch.float64), np.array([0.001]), [0.001],
       decimal.Decimal("0.001")]  # fmt: skip


@pytest.mark.parametrize("rate", ONE)
def test_one_rate_in_every_form(rate):
    assert gradindex.Checkpoint("w.pt", rate).learning_rate == 0.001
    assert gradindex.Checkpoint("w.pt", {"0.*": rate}).learning_rate == {"0.*": 0.001}


WRONG = {
    "two of three": ([0.1, 0.2], r"is a list of 2, but there are 3 checkpoints\. Give one rate for each"),
    "get_last_lr": ([0.1], r"is a list of 1, but there are 3 checkpoints.*one number for all"),
    "no step": ({9: 0.1, 10: 0.2}, r"has steps 9, 10, but .*step_100\.pt has step 100"),
    "negative in a list": ([0.1, -0.2, 0.1], r"step_10\.pt has learning rate -0\.2, but a rate must be finite and not"),
    "NaN as text": ("nan", "must be finite and not negative"),
    "None in a list": ([0.1, None, 0.1], r"step_10\.pt has a learning rate of type NoneType, but needs a number"),
    "words": ("auto", r"has a learning rate 'auto', but needs a number"),
    "truth": (True, "of type bool, but needs a number"),
    "groups": ([[0.1, 0.2]] * 3, "has 2 learning rates, but is a single checkpoint"),
    "complex": (0.1j, "of type complex, but needs a number"),
    "an object": (object(), "of type object, but needs a number"),
    "nothing": ({}, "empty mapping"),
    "a function of nothing": (lambda step: None, "of type NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_rates_that_mean_nothing_are_refused_with_the_way_out(three, case):
    rate, message = WRONG[case]
    with pytest.raises(ArgumentError, match=message) as raised:
        gradindex.find_checkpoints(three, learning_rate=rate)
    assert "\n" not in str(raised.value)


def test_the_closest_pattern_counts_whatever_the_order_and_modules_are_patterns():
    names = ["backbone.0.weight", "head.weight", "head.bias"]

    def rates(given):
        return list(gradindex.Checkpoint("w.pt", given).learning_rates(names).values())

    for given in ({"*": 0.1, "head.*": 0.01, "head.bias": 1}, {"head.bias": 1, "head.*": 0.01, "*": 0.1}):
        assert rates(given) == [0.1, 0.01, 1.0]
    assert rates({"backbone": 0.1, "head": 0.01}) == [0.1, 0.01, 0.01]
    with pytest.raises(CheckpointError, match=r"learning rates 0\.1 \(\*\.weight\) and 0\.2 \(\?\.weight\*\) for x\.w"):
        gradindex.Checkpoint("w.pt", {"*.weight": 0.1, "?.weight*": 0.2, "head.*": 1}).learning_rates(["x.weight"])


def test_a_rate_by_step_can_be_by_parameter(three):
    given = {step: {"0": 0.1 * step, "*": 0.5} for step in (9, 10, 100)}
    items = gradindex.find_checkpoints(three, learning_rate=given)
    assert items[1].learning_rates(["0.weight", "2.bias"]) == {"0.weight": 1.0, "2.bias": 0.5}


def test_a_checkpoint_that_hardly_counts_is_named_once(tmp_path, capsys):
    task = toys.make_task(tmp_path, rates=(0.3, 0.1, 0.0))
    gradindex.build(task, tmp_path / "store")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"w_2\.pt has learning rate 0, below 1/1000 of the largest, 0\.3, so it hardly counts\. Give", line
    )
    assert "'integrated'" in line
    assert "'uniform'" in line
    gradindex.load(task, tmp_path / "store").proponents([0], k=1)
    assert "hardly counts" not in capsys.readouterr().err


def test_weights_just_above_a_thousandth_are_not_named(tmp_path, capsys):
    gradindex.build(toys.make_task(tmp_path, rates=(1.0, 0.0011)), tmp_path / "store")
    assert "hardly" not in capsys.readouterr().err


def test_a_group_of_parameters_without_a_rate_is_no_checkpoint_without_one(tmp_path, capsys):
    task = toys.make_task(tmp_path, rates=({"0": 0.0, "2": 0.1}, 0.1))
    gradindex.build(task, tmp_path / "store")
    assert "hardly" not in capsys.readouterr().err


def test_checkpoints_that_all_count_nothing_are_refused(tmp_path):
    task = toys.make_task(tmp_path, rates=(0.0, 0.0))
    with pytest.raises(
        CheckpointError, match=r"w_0\.pt \(like 1 other\) has learning rate 0, so all scores would be 0"
    ):
        gradindex.build(task, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_one_checkpoint_needs_no_list_and_an_iterator_will_do(tmp_path):
    task = toys.make_task(tmp_path)
    assert replace(task, checkpoints=task.checkpoints[0]).checkpoints == [task.checkpoints[0]]
    assert replace(task, checkpoints=(item for item in task.checkpoints)).checkpoints == list(task.checkpoints)


NOT_CHECKPOINTS = [
    ("runs/*.pt", r"is the path 'runs/\*\.pt'.*Write checkpoints=find_checkpoints\('runs/\*\.pt', learning_rate"),
    (["runs/1.pt"], r"checkpoints\[0\] is a str, but must be a gradindex\.Checkpoint\. Use find_checkpoints"),
    ([STATE], r"checkpoints\[0\] is a OrderedDict.*torch\.save\(model\.state_dict\(\), 'step_1\.pt'\)"),
    ([toys.mlp()], r"checkpoints\[0\] is a Sequential.*torch\.save\(model\.state_dict\(\), 'step_1\.pt'\)"),
    (STATE, "checkpoints is a OrderedDict, but must be a list"),
    (None, "checkpoints is a NoneType"),
    (iter(()), "checkpoints is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), NOT_CHECKPOINTS)
def test_what_are_no_checkpoints_is_told_how_to_become_one(tmp_path, given, message):
    task = toys.make_task(tmp_path)
    with pytest.raises(TaskError, match=message):
        replace(task, checkpoints=given)


def test_weights_in_memory_are_no_path():
    with pytest.raises(ArgumentError, match=r"path is a OrderedDict, but must be .*torch\.save\(model\.state_dict\(\)"):
        gradindex.Checkpoint(STATE, 0.1)


def test_finding_large_files_reads_no_weights(tmp_path, monkeypatch):
    saved(tmp_path, "w_1.pt", content={"model": {"w": torch.zeros(3_000_000)}, "epoch": 4})
    whole, read = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *given: read.append(len(x := whole(*given))) or x)
    assert found(tmp_path) == [("w_1.pt", 4)]
    assert sum(read) < 6_000_000  # of 12,000,000
