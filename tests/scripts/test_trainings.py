"""The reference tasks' trainings: kept once made, and going on where they were cut off."""

import importlib
import sys
from functools import partial

import numpy as np
import pytest
import torch
from places import TOP

from gradindex import find_checkpoints

TASKS = str(TOP / "scripts" / "tasks")


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.syspath_prepend(TASKS)
    for name in ("cifar10", "reference"):  # the tests have a module "reference" of their own
        monkeypatch.delitem(sys.modules, name, raising=False)
    cifar10, reference = (importlib.import_module(name) for name in ("cifar10", "reference"))
    yield cifar10, reference
    for name in ("cifar10", "reference"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_a_training_that_was_cut_off_ends_as_if_nothing_had_happened(tasks, tmp_path, monkeypatch):
    cifar10, _ = tasks
    monkeypatch.setattr(cifar10, "BATCH", 32)  # two steps an epoch
    torch.manual_seed(0)
    images, labels = torch.randn(60, 3, 32, 32), torch.randint(10, (60,))
    small = {"make_model": partial(cifar10.make_model, 2), "shift": 2, "seed": 3}
    state = torch.get_rng_state()
    whole = cifar10.train(tmp_path / "whole", images, labels, **small)
    assert torch.equal(torch.get_rng_state(), state)

    def stop(text, **_):
        if "epoch 3/" in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cifar10, "print", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            cifar10.train(tmp_path / "cut", images, labels, **small)
    # What was saved after the state from which it goes on is saved again, not mixed in.
    last = sorted((tmp_path / "cut").glob("step_*.pt"))[-1]
    last.rename(last.with_name("step_00000099.pt"))
    resumed = cifar10.train(
        tmp_path / "cut", images, labels, make_model=partial(cifar10.make_model, 2), shift=2, seed=3
    )
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "cut" / "resume.pt").exists()
    assert not (tmp_path / "cut" / "step_00000099.pt").exists()
    steps = [[checkpoint.step for checkpoint in find_checkpoints(tmp_path / n / "*.pt")] for n in ("whole", "cut")]
    assert steps[0] == [2, 4, 6, 8, 10, 12]
    assert steps[1] == [2, 4, 8, 10, 12]  # the third was renamed


def test_what_is_kept_is_made_once_and_by_one_at_a_time(tasks, tmp_path):
    _, reference = tasks
    folder, calls = tmp_path / "made" / "it", []

    def half(place):
        (place / "first").write_text("one")
        raise OSError("cut off")

    def rest(place):
        calls.append((place / "first").read_text())
        with pytest.raises(reference.BusyError, match="it"):
            reference.resumable(folder, rest, wait=False)
        assert not folder.exists()

    with pytest.raises(OSError, match="cut off"):
        reference.resumable(folder, half)
    for _ in range(2):
        assert reference.resumable(folder, rest) == folder
    assert calls == ["one"]
    assert [path.name for path in folder.iterdir()] == ["first"]


def test_pictures_are_moved_and_what_comes_in_is_mirrored(tasks):
    cifar10, _ = tasks
    images = torch.randn(200, 2, 6, 5)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    places = set()
    for number, moved in enumerate(cifar10.shifted(images, 2).numpy()):
        at = [
            (down, across)
            for down in range(5)
            for across in range(5)
            if np.array_equal(moved, padded[number, :, down : down + 6, across : across + 5])
        ]
        assert len(at) == 1
        places.update(at)
    assert len(places) == 25
    assert torch.equal(cifar10.shifted(images, 0), images)
