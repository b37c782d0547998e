"""From the search for checkpoints to the engine, each file is opened once for its record and once for its weights."""

import argparse
import collections
import io
import os
from pathlib import Path

import frameworks
import pytest
import torch
import toys
from safetensors.torch import save_file
from torch import nn

import gradindex
from gradindex import find_checkpoints
from gradindex.errors import CheckpointError
from gradindex.gradients import Engine
from gradindex.gradients.tracked import choose

X, Y = torch.randn(8, 6), torch.arange(8) % 3


@pytest.fixture
def opened(monkeypatch):
    """How often each file was opened, by whatever means Python has."""
    counts = collections.Counter()
    true = os.open, io.open

    def count(path):
        if isinstance(path, str | os.PathLike):
            counts[Path(path).name] += 1

    monkeypatch.setattr(os, "open", lambda path, *a, **k: count(path) or true[0](path, *a, **k))
    monkeypatch.setattr("io.open", lambda path, *a, **k: count(path) or true[1](path, *a, **k))
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: count(path) or true[1](path, *a, **k))
    return counts


def engine_of(folder, **options):
    """As a build does: find, make the task, load."""
    found = find_checkpoints(folder, **options)
    task = gradindex.Task(toys.mlp(), toys.cross_entropy, list(zip(X, Y, strict=True)), found)
    return Engine(task)


def train(model, optimizer):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


def of_recorder(folder):
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = gradindex.Recorder(model, optimizer, folder)
    for _ in range(3):
        train(model, optimizer)
        recorder.save()
    return {f"step_0000000{step}.pt": 2 for step in (1, 2, 3)}


def of_safetensors(folder):
    for step in (1, 2, 3):
        save_file(toys.mlp().state_dict(), folder / f"step_{step}.safetensors")
    return {f"step_{step}.safetensors": 2 for step in (1, 2, 3)}


def of_lightnings_layout(folder):
    """Each checkpoint looks at the others of its run."""
    model = toys.mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for step in (1, 2, 3):
        train(model, optimizer)
        schedule.step()
        content = {
            "state_dict": model.state_dict(),
            "pytorch-lightning_version": "2.4",
            "global_step": step,
            "epoch": 0,
        }
        content |= {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [schedule.state_dict()]}
        torch.save(content, folder / f"step={step}.ckpt")
    return {f"step={step}.ckpt": 2 for step in (1, 2, 3)}


def of_timms_layout(folder):
    model = toys.mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for epoch in (0, 1):
        train(model, optimizer)
        content = {"epoch": epoch, "arch": "net", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(content | {"args": argparse.Namespace(lr=0.1)}, folder / f"checkpoint-{epoch}.pth.tar")
    return {f"checkpoint-{epoch}.pth.tar": 2 for epoch in (0, 1)}


def of_shards(folder):
    """``.metadata`` is read once; of the part also what is plain beside the tensors."""
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = gradindex.Recorder(model, optimizer, folder, sharded=True)
    train(model, optimizer)
    recorder.save()
    return {".metadata": 1, "gradindex.json": 1, "__0_0.distcp": 1}


def of_accelerate(folder):
    accelerator = frameworks.imported("accelerate").Accelerator(cpu=True)
    model = toys.mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    train(model, optimizer)
    accelerator.save_state(str(folder / "step_1"))
    return {"model.safetensors": 2, "optimizer.bin": 2}  # once more for the steps that Adam counted


WAYS = [of_recorder, of_safetensors, of_lightnings_layout, of_timms_layout, of_shards, of_accelerate]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_files_are_opened_once_for_the_record_and_once_for_the_weights(tmp_path, opened, way):
    expected = way(tmp_path)
    opened.clear()
    engine = engine_of(tmp_path, **({"learning_rate": 0.1} if way is of_safetensors else {}))
    assert {name: opened[name] for name in expected} == expected
    assert engine.n_checkpoints == len(find_checkpoints(tmp_path, learning_rate=0.1))


def test_a_record_that_changes_in_between_is_named(tmp_path):
    """What was kept of a file is asked for again once its inode, size or time is another."""
    of_recorder(tmp_path)
    path = tmp_path / "step_00000002.pt"
    content = torch.load(path)
    torch.save(content, path)  # under this name, which is in the file
    found = find_checkpoints(tmp_path)
    content["gradindex"]["groups"][0]["learning_rate"] = 0.7
    about = path.stat()
    (tmp_path / "new").mkdir()
    other = tmp_path / "new" / path.name
    torch.save(content, other)
    os.utime(other, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert found[1].learning_rates(["0.weight"]) == {"0.weight": 0.1}
    other.replace(path)
    assert path.stat().st_size == about.st_size
    assert path.stat().st_mtime_ns == about.st_mtime_ns
    assert found[1].learning_rates(["0.weight"]) == {"0.weight": 0.7}
    content["gradindex"]["step"] = 9
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"step_00000002\.pt has a different step than when it was found"):
        found[1].read(toys.mlp())


def test_a_checkpoint_that_is_replaced_between_task_and_weights_is_named(tmp_path):
    of_recorder(tmp_path)
    found = find_checkpoints(tmp_path)
    path = Path(found[0].path)
    content = torch.load(path)
    content["gradindex"]["groups"][0]["learning_rate"] = 0.7
    task = gradindex.Task(toys.mlp(), toys.cross_entropy, list(zip(X, Y, strict=True)), found)
    chosen = choose(task)
    torch.save(content, path)
    with pytest.raises(
        CheckpointError, match=r"step_00000001\.pt has different learning rates than when its record was"
    ):
        Engine(task, tracked=chosen)
