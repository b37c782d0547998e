"""Recorder: three lines in a training loop, and what they write."""

import pytest
import torch
import toys

import gradindex
from gradindex.checkpoint import read_record
from gradindex.errors import ArgumentError, CheckpointError


def train(model, optimizer, steps, scheduler=None):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def groups(path):
    return [(g["learning_rate"], g["learning_rate_sum"]) for g in read_record(path)["groups"]]


def test_rates_and_their_sums_follow_the_scheduler_of_each_group(tmp_path):
    model = toys.mlp()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.8}, {"params": model[2].parameters(), "lr": 0.1}]
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 1 + step])
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    train(model, optimizer, 2, scheduler)
    first = recorder.save()
    train(model, optimizer, 1, scheduler)
    second = recorder.save()
    assert [path.name for path in (first, second)] == ["step_00000002.pt", "step_00000003.pt"]
    assert groups(first) == [(0.4, pytest.approx(0.8 + 0.4)), (0.2, pytest.approx(0.1 + 0.2))]
    assert groups(second) == [(0.2, 0.2), (pytest.approx(0.3), pytest.approx(0.3))]
    record = read_record(first)
    assert (record["version"], record["step"]) == (1, 2)
    assert [g["parameters"] for g in record["groups"]] == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]


def test_the_weights_are_those_of_the_moment(tmp_path):
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    train(model, optimizer, 1)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = recorder.save()
    train(model, optimizer, 1)
    found = gradindex.Checkpoint(path).load(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_steps_that_were_not_taken_do_not_count(tmp_path):
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    with pytest.raises(CheckpointError, match=r"No optimizer step was taken before Recorder.save\(\) at step 0"):
        recorder.save()
    train(model, optimizer, 2)
    assert groups(recorder.save()) == [(0.1, pytest.approx(0.2))]
    with pytest.raises(CheckpointError, match=r"at step 2.*Call save\(\) after optimizer.step\(\)"):
        recorder.save()


def test_it_stops_listening_when_closed(tmp_path):
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradindex.Recorder(model, optimizer, tmp_path) as recorder:
        train(model, optimizer, 1)
    train(model, optimizer, 3)
    assert recorder.step == 1


def test_two_trainings_do_not_mix(tmp_path):
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    for _ in range(3):
        train(model, optimizer, 1)
        recorder.save()
    recorder.close()
    (tmp_path / "notes.pt").write_text("mine")
    with pytest.raises(ArgumentError, match="already holds 3 checkpoints of another training.*overwrite=True"):
        gradindex.Recorder(model, optimizer, tmp_path)
    with pytest.raises(ArgumentError, match="already holds 1 checkpoints"):
        gradindex.Recorder(model, optimizer, tmp_path, first_step=2)
    resumed = gradindex.Recorder(model, optimizer, tmp_path, first_step=2, overwrite=True)
    train(model, optimizer, 2)
    resumed.save()
    assert sorted(path.name for path in tmp_path.glob("step*")) == [f"step_0000000{i}.pt" for i in (1, 2, 4)]
    resumed.close()
    gradindex.Recorder(model, optimizer, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.pt"]


def test_a_crash_while_saving_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    train(model, optimizer, 1)

    def half(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("killed")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(RuntimeError, match="killed"):
        recorder.save()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert groups(recorder.save()) == [(0.1, 0.1)]  # nothing recorded was lost


def test_second_moments_are_bias_corrected(tmp_path):
    model = toys.mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99))
    recorder = gradindex.Recorder(model, optimizer, tmp_path, second_moments=True)
    squares = []
    for _ in range(3):
        train(model, optimizer, 1)
        squares.append({name: p.grad.clone().square() for name, p in model.named_parameters()})
    moments = read_record(recorder.save())["second_moments"]
    for name in squares[0]:
        v = sum(0.01 * 0.99 ** (2 - step) * square[name] for step, square in enumerate(squares))
        torch.testing.assert_close(moments[name], v / (1 - 0.99**3))


def test_an_optimizer_without_second_moments_is_refused(tmp_path):
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = gradindex.Recorder(model, optimizer, tmp_path, second_moments=True)
    train(model, optimizer, 1)
    with pytest.raises(CheckpointError, match=r"SGD keeps no second moments \(exp_avg_sq\) for 0.weight"):
        recorder.save()


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    optimizer = torch.optim.SGD(toys.mlp().parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="The optimizer holds 4 parameters that are not the model's"):
        gradindex.Recorder(toys.mlp(), optimizer, tmp_path)
