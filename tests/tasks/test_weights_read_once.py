"""A checkpoint's file is read once: what changes it later mixes no weights and is stored under no wrong digest."""

import hashlib
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from safetensors.torch import save_file

import gradindex
from gradindex.digests import digest
from gradindex.errors import CheckpointError, MismatchError

RATE = 0.1


def saved(model, path):
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path.read_bytes()


def overwrite(path, content):
    """In place, in the same inode."""
    with path.open("r+b") as file:
        file.write(content)


def replace_by(path, content):
    other = path.with_name("new")
    other.write_bytes(content)
    other.replace(path)


def cut_short(path, content):
    os.truncate(path, 64)


CHANGES = {"overwritten in place": overwrite, "replaced": replace_by, "cut short": cut_short}


class Meddled(torch.utils.data.Dataset):
    """Changes a file when example ``at`` is read."""

    def __init__(self, data, at, change):
        self.data, self.at, self.change = data, at, change

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if i == self.at:
            self.change()
        return self.data[i]


@pytest.fixture(params=["step_1.safetensors", "step_1.pt"])
def case(request, tmp_path):
    task = toys.make_task(tmp_path, n_train=40)
    toys.randomise(task.model)
    path = tmp_path / request.param
    then = saved(task.model, path)
    toys.randomise(task.model)
    (tmp_path / "other").mkdir()
    now = saved(task.model, tmp_path / "other" / path.name)
    assert len(then) == len(now)
    return replace(task, checkpoints=[gradindex.Checkpoint(path, learning_rate=RATE, step=1)]), path, then, now


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_during_a_build_changes_no_row_and_no_digest(case, tmp_path, change):
    task, path, then, now = case
    sound = gradindex.build(task, tmp_path / "sound", batch_size=4, shard_rows=8)
    meddled = replace(task, train=Meddled(task.train, 21, lambda: CHANGES[change](path, now)))
    store = gradindex.build(meddled, tmp_path / "store", batch_size=4, shard_rows=8)
    assert path.read_bytes() != then
    ids = np.arange(40)
    assert np.array_equal(store.rows(ids), sound.rows(ids))
    assert store.manifest.map.checkpoints[0].sha256 == hashlib.sha256(then).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_an_open_retriever_keeps_its_weights(case, tmp_path, change):
    task, path, _, now = case
    gradindex.build(task, tmp_path / "store")
    retriever = gradindex.load(task, tmp_path / "store")
    before = retriever.proponents([0, 1], k=5)
    CHANGES[change](path, now)
    after = retriever.proponents([0, 1], k=5)
    assert np.array_equal(before.ids, after.ids)
    assert np.array_equal(before.scores, after.scores)


def test_the_digest_is_of_what_was_loaded_and_not_of_what_lies_there_later(case, tmp_path):
    task, path, then, now = case
    loaded = task.checkpoints[0].read(toys.mlp())
    replace_by(path, now)
    assert loaded.sha256 == hashlib.sha256(then).hexdigest()
    assert task.checkpoints[0].sha256() == hashlib.sha256(now).hexdigest()


def test_a_store_is_not_answered_from_a_file_that_took_its_checkpoints_place(case, tmp_path):
    task, path, _, now = case
    gradindex.build(task, tmp_path / "store")
    replace_by(path, now)
    with pytest.raises(MismatchError, match="checkpoints"):
        gradindex.load(task, tmp_path / "store").proponents([0], k=1)


def test_a_file_that_is_written_while_it_is_read_is_refused(case, monkeypatch):
    task, path, _, now = case
    whole, done = os.pread, []

    def pread(number, count, start):
        found = whole(number, count, start)
        if not done:
            done.append(overwrite(path, now))
        return found

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(CheckpointError, match=r"step_1\.\w+ changed while it was read, so its weights would be mixed"):
        task.checkpoints[0].load(toys.mlp())


def test_blocks_that_are_not_those_that_were_digested_are_refused(tmp_path):
    """Also where the clock of the file system is too coarse to tell."""
    path, model = tmp_path / "w_1.pt", torch.nn.Linear(1000, 1000)
    content = saved(model, path)
    os.utime(path, ns=(1, 1))
    sought = content.index(model.weight.detach().numpy().tobytes()[:64]) + 2_000_000
    whole, done = os.pread, []

    def pread(number, count, start):
        found = whole(number, count, start)
        if 0 < len(found) < 1 << 20 and start > 0 and not done:  # the last block: all is digested
            done.append(start)
            overwrite(path, content[:sought] + b"\1\2\3\4" + content[sought + 4 :])
            os.utime(path, ns=(1, 1))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", pread)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            gradindex.Checkpoint(path, 0.1).load(model)


def test_two_checkpoints_of_one_file_have_its_digest_and_their_own_weights(tmp_path):
    task = toys.make_task(tmp_path)
    states = []
    for _ in range(2):
        toys.randomise(task.model)
        states.append({name: tensor.clone() for name, tensor in task.model.state_dict().items()})
    torch.save({"model": states[0], "ema": states[1]}, tmp_path / "both.pt")
    checkpoints = [gradindex.Checkpoint(tmp_path / "both.pt", RATE, step=1, key=key) for key in ("model", "ema")]
    for checkpoint, state in zip(checkpoints, states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint.load(task.model).items())
    stores = [
        gradindex.build(replace(task, checkpoints=[item]), tmp_path / f"store-{item.key}") for item in checkpoints
    ]
    first, second = (store.manifest.map.checkpoints[0] for store in stores)
    assert first.sha256 == second.sha256
    assert (first.key, second.key) == ("model", "ema")
    with pytest.raises(MismatchError, match="checkpoints"):  # the same file, but other weights
        gradindex.load(replace(task, checkpoints=checkpoints[1:]), stores[0].folder).proponents([0], k=1)


def test_a_step_that_the_file_no_longer_has_is_refused(tmp_path):
    state = toys.mlp().state_dict()
    torch.save({"state_dict": state, "global_step": 5}, tmp_path / "last.ckpt")
    (found,) = gradindex.find_checkpoints(tmp_path, learning_rate=RATE)
    assert found.step == 5
    torch.save({"state_dict": state, "global_step": 9}, tmp_path / "last.ckpt")
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt has a different step than when it was found. Call find_check"
    ):
        found.load(toys.mlp())


@pytest.mark.parametrize("name", ["w_1.pt", "w_1.safetensors"])
def test_loading_reads_no_more_than_two_passes_and_keeps_nothing_mapped(tmp_path, name, monkeypatch):
    model = torch.nn.Linear(1500, 1500)
    saved(model, tmp_path / name)
    size, read = (tmp_path / name).stat().st_size, []
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: read.append(len(found := whole(*given))) or found)
    weights = gradindex.Checkpoint(tmp_path / name, RATE).load(model)
    assert sum(read) < (2.5 * size if name.endswith(".pt") else 0.1 * size)  # safetensors: one pass, by readinto
    assert torch.equal(weights["weight"], model.weight)
    if Path("/proc/self/maps").exists():
        assert str(tmp_path / name) not in Path("/proc/self/maps").read_text()


def test_a_digest_of_tensors_copies_none():
    """Weights of a distributed checkpoint are digested whole, where a copy would double the largest."""
    numbers = torch.randn(1 << 20)
    tracemalloc.start()
    found = digest({"w": numbers, "empty": torch.empty(0, 3), "one": torch.tensor(2.0)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < numbers.nbytes / 10
    assert found == digest({"w": numbers.clone(), "empty": torch.empty(0, 3), "one": torch.tensor(2.0)})
    assert found != digest({"w": numbers + 1, "empty": torch.empty(0, 3), "one": torch.tensor(2.0)})
