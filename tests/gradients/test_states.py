"""Weights of several checkpoints: what is the same once, and one checkpoint at a time where they do not fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toys

import gradindex
from gradindex.errors import CheckpointError
from gradindex.filling import batches, row_maker
from gradindex.gradients import Engine, check_routes, states
from gradindex.projection import Projection
from gradindex.rows import RowMaker

OPTIONS = [
    {"projection": Projection(dim=16), "row_type": "bfloat16"},
    {"projection": Projection("fitted", 12), "unit_norm": True},
    {"projection": Projection("none"), "factors": "float32", "precision": "float64"},
]


@pytest.fixture
def task(tmp_path):
    return toys.make_task(tmp_path)


@pytest.fixture
def frozen(task):
    """A first layer that all checkpoints share."""
    first = torch.load(task.checkpoints[0].path, weights_only=True)
    for checkpoint in task.checkpoints:
        weights = torch.load(checkpoint.path, weights_only=True)
        torch.save(weights | {name: first[name] for name in first if name.startswith("0.")}, checkpoint.path)
    return task


def weight_bytes(task):
    return sum(tensor.nbytes for tensor in task.model.state_dict().values())


def bytes_of(store):
    factors = store.factors(store.ids) if store.has_factors else {}
    arrays = [
        store.rows(store.ids),
        store.self_influence(),
        store.losses(),
        *(x for sides in factors.values() for x in sides),
    ]
    return [array.tobytes() for array in arrays]


def test_what_does_not_differ_is_held_once(frozen):
    engine = Engine(frozen)
    first, *others = (engine.states[number] for number in range(3))
    for other in others:
        assert other["model.0.weight"] is first["model.0.weight"]
        assert other["model.2.weight"] is not first["model.2.weight"]
    shared = sum(tensor.nbytes for name, tensor in first.items() if name.startswith("model.0."))
    assert engine.states.nbytes == 3 * weight_bytes(frozen) - 2 * shared
    with engine.doubled(1):
        assert engine.states[1]["model.0.weight"].dtype == torch.float64
        assert engine.states[0]["model.0.weight"].dtype == torch.float32
    engine.lay_out(True)
    assert engine.states[2]["model.0.weight"] is engine.states[0]["model.0.weight"]
    assert engine.states.nbytes == 3 * weight_bytes(frozen) - 2 * shared


def test_sharing_changes_no_score(frozen):
    scores = gradindex.exact_scores(frozen, [0, 1], precision="float64")
    alone = [
        gradindex.exact_scores(replace(frozen, checkpoints=[checkpoint]), [0, 1], precision="float64")
        for checkpoint in frozen.checkpoints
    ]
    np.testing.assert_allclose(scores, sum(alone), rtol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=["bfloat16", "fitted, unit norm", "factors"])
def test_one_at_a_time_makes_the_same_store(task, tmp_path, options):
    options = {**options, "batch_size": 5, "shard_rows": 10}
    together = gradindex.build(task, tmp_path / "together", **options)
    apart = gradindex.build(task, tmp_path / "apart", one_at_a_time=True, **options)
    assert bytes_of(apart) == bytes_of(together)
    assert apart.manifest.fingerprint == together.manifest.fingerprint
    one, all_ = (gradindex.load(task, together.folder, one_at_a_time=how) for how in (True, False))
    np.testing.assert_allclose(one.exact_scores([0, 1]), all_.exact_scores([0, 1]), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(one.proponents([0, 1], k=4).ids, all_.proponents([0, 1], k=4).ids)


def test_never_more_than_one_is_held(task, tmp_path, monkeypatch):
    held, reads = [], []
    original = states.States.__getitem__

    def watched(self, number):
        before = set(self._held)
        found = original(self, number)
        reads.extend(set(self._held) - before)
        held.append(len(self._held))
        return found

    monkeypatch.setattr(states.States, "__getitem__", watched)
    gradindex.build(task, tmp_path / "store", one_at_a_time=True, projection=Projection(dim=8), batch_size=2)
    assert set(held) == {1}
    assert len(reads) < 30  # not for each of six batches


@pytest.mark.parametrize("shard_rows", [1000, 6])
def test_checks_of_examples_alone_read_no_checkpoint_again(task, tmp_path, monkeypatch, shard_rows):
    """A shard goes through each checkpoint once, with three examples that are computed again alone on the way."""
    read, alone = [], []
    original, blocks = states.States.__getitem__, RowMaker.blocks

    def watched(self, number):
        before = set(self._held)
        found = original(self, number)
        read.extend(set(self._held) - before)
        return found

    def counted(self, examples, checkpoints):
        alone.extend(checkpoints if len(examples) == 1 else ())
        return blocks(self, examples, checkpoints)

    options = {"projection": Projection(dim=8), "batch_size": 2, "shard_rows": shard_rows}
    gradindex.build(task, tmp_path / "first", one_at_a_time=True, **options)
    engine = Engine(task, one_at_a_time=True)
    manifest = gradindex.GradientStore(tmp_path / "first").manifest
    with engine, monkeypatch.context() as patch:
        check_routes(engine)
        patch.setattr(states.States, "__getitem__", watched)
        patch.setattr(RowMaker, "blocks", counted)
        maker = row_maker(engine, manifest, None)
        for shard in range(0, 12, min(shard_rows, 12)):
            ids = np.arange(shard, min(shard + shard_rows, 12))
            made = list(batches(maker, task, ids, manifest, 0, []))
            assert [rows.losses.shape for _, rows in made] == [(2, 3)] * len(made)
    shards = 12 // min(shard_rows, 12)
    assert sorted(alone) == sorted([0, 1, 2] * 3 * shards)
    assert len(read) <= 3 * shards


def test_where_weights_do_not_fit_one_is_held_and_that_is_said(task, monkeypatch, capsys):
    monkeypatch.setattr(states, "available_bytes", lambda device: 100)
    assert Engine(task).states.one_at_a_time
    assert "The weights of 3 checkpoints do not fit into memory together" in capsys.readouterr().err
    assert not Engine(task, one_at_a_time=False).states.one_at_a_time
    assert not Engine(replace(task, checkpoints=task.checkpoints[:1]), one_at_a_time=True).states.one_at_a_time


def test_weights_that_are_the_same_always_fit(task, monkeypatch):
    for checkpoint in task.checkpoints[1:]:
        torch.save(torch.load(task.checkpoints[0].path, weights_only=True), checkpoint.path)
    monkeypatch.setattr(states, "available_bytes", lambda device: weight_bytes(task))  # room for two more
    engine = Engine(task)
    assert not engine.states.one_at_a_time
    assert engine.states.nbytes == weight_bytes(task)


def test_a_file_that_changes_meanwhile_is_refused(task):
    engine = Engine(task, one_at_a_time=True)
    weights = torch.load(task.checkpoints[0].path, weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, task.checkpoints[0].path)
    with pytest.raises(CheckpointError, match="was changed while it was in use"):
        engine.states[0]


def test_a_dry_run_counts_the_weights_that_are_held(task, tmp_path):
    together, apart = (gradindex.building.estimate(task, tmp_path / "s", one_at_a_time=how) for how in (False, True))
    assert together.weight_bytes == 3 * weight_bytes(task)
    assert apart.weight_bytes == weight_bytes(task)
