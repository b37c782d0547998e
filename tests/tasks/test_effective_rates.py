"""Momentum and clipping as part of a checkpoint's weight, against the sums that they stand for, in float64."""

import pytest
import torch
import toys

import gradindex
from gradindex.checkpoint import read_record
from gradindex.errors import ArgumentError, CheckpointError


def constant_gradients(model, factor=1.0):
    """The same gradient for each weight in every step: then what a step moves says how much gradient is in it."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, factor)


def effective(path):
    return {name: group.get("effective_sum") for group in read_record(path)["groups"] for name in group["parameters"]}


SGD = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.25},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "fused": {"momentum": 0.9, "fused": True},
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("case", SGD)
def test_effective_rates_are_how_far_equal_gradients_move_the_weights(tmp_path, case, late):
    """Whether clipping is told before a step or after it, when a schedule has changed the group already."""
    model = toys.mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, **SGD[case])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    for taken in (3, 1, 5):
        before = model[0].weight.detach().clone()
        for step in range(taken):
            factor = 0.25 if step % 2 else 1.0
            constant_gradients(model, factor)
            told = (4.0 - 1e-6 if step % 2 else 0.5, 1.0)
            if not late:
                recorder.clipped(*told)
            optimizer.step()
            schedule.step()
            if late:
                optimizer.param_groups[0]["momentum"], kept = 0.1, optimizer.param_groups[0]["momentum"]
                recorder.clipped(*told, late=True)
                optimizer.param_groups[0]["momentum"] = kept
        moved = (before - model[0].weight.detach()).flatten()
        path = recorder.save()
        assert effective(path)["0.weight"] == pytest.approx(float(moved[0]), rel=1e-12)
        assert float(moved.std()) < 1e-12
        (factors,) = {group["clipping_factor"] for group in read_record(path)["groups"]}
        assert factors == pytest.approx((taken + taken % 2 + (taken - taken % 2) * 0.25) / 2 / taken)


def test_groups_weigh_by_their_own_momentum(tmp_path):
    model = toys.mlp().double()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "momentum": 0.9}, {"params": model[2].parameters()}], lr=0.5
    )
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(4):
        constant_gradients(model)
        optimizer.step()
    path = recorder.save()
    (found,) = gradindex.find_checkpoints(tmp_path, weighting="effective")
    rates = found.learning_rates(list(before))
    for name, parameter in model.named_parameters():
        assert rates[name] == pytest.approx(float((before[name] - parameter.detach()).mean()), rel=1e-12)
    assert rates["2.bias"] == 2.0
    settings = {name: g["settings"] for g in read_record(path)["groups"] for name in g["parameters"]}
    assert (settings["0.bias"]["momentum"], settings["2.bias"]["momentum"]) == (0.9, 0)
    assert found.weight_source == "effective"


def test_momentum_that_a_schedule_changes_is_followed(tmp_path):
    model = toys.mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=8)
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    before = model[0].weight.detach().clone()
    for _ in range(6):
        constant_gradients(model)
        used = optimizer.param_groups[0]["momentum"]
        optimizer.step()
        schedule.step()
    (group,) = read_record(recorder.save())["groups"]
    assert group["effective_sum"] == pytest.approx(float((before - model[0].weight.detach()).mean()), rel=1e-12)
    assert group["settings"]["momentum"] == used != optimizer.param_groups[0]["momentum"]


def test_a_buffer_that_is_cleared_or_was_filled_before_is_known(tmp_path):
    model = toys.mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    for _ in range(60):  # until the buffer holds two gradients
        constant_gradients(model)
        optimizer.step()
    recorder = gradindex.Recorder(model, optimizer, tmp_path, first_step=60)
    constant_gradients(model)
    optimizer.step()
    assert effective(recorder.save())["0.bias"] == pytest.approx(2.0)
    optimizer.state.clear()
    constant_gradients(model)
    optimizer.step()
    assert effective(recorder.save())["0.bias"] == pytest.approx(1.0)


def test_a_resumed_recorder_goes_on_counting(tmp_path):
    model = toys.mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    whole = gradindex.Recorder(model, optimizer, tmp_path / "whole")
    first = gradindex.Recorder(model, optimizer, tmp_path / "parts")
    for _ in range(3):
        constant_gradients(model)
        whole.clipped(2.0, 1.0)
        first.clipped(2.0, 1.0)
        optimizer.step()
    state = first.state_dict()
    first.close()
    second = gradindex.Recorder(model, optimizer, tmp_path / "parts", first_step=state["step"])
    second.load_state_dict(state)
    constant_gradients(model)
    optimizer.step()
    expected, found = read_record(whole.save()), read_record(second.save())
    assert (found["step"], found["groups"]) == (4, expected["groups"])


def test_effective_rates_are_those_of_plain_sgd_alone(tmp_path):
    model = toys.mlp()
    adam = torch.optim.Adam(model.parameters(), 0.5)
    unknown = {"clipping_unknown": True}
    for optimizer, options in ((adam, {}), (torch.optim.SGD(model.parameters(), 0.5), unknown)):
        with gradindex.Recorder(model, optimizer, tmp_path / type(optimizer).__name__, **options) as recorder:
            constant_gradients(model)
            optimizer.step()
            path = recorder.save()
        assert set(effective(path).values()) == {None}
        with pytest.raises(CheckpointError, match=r"has no effective rates.*torch.optim.SGD.*weighting='integrated'"):
            gradindex.Checkpoint(path, weighting="effective").learning_rates(["0.weight"])


def test_accelerate_tells_the_norm_that_it_clipped(tmp_path):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model = toys.mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.5))
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    factors = []
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(4, 6)).square().mean())
        before = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        recorder.clipped(accelerator.clip_grad_norm_(model.parameters(), 0.1), 0.1)
        after = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        factors.append(float(after.norm() / before.norm()))
        optimizer.step()
    assert max(factors) < 1
    (group,) = read_record(recorder.save())["groups"]
    assert group["clipping_factor"] == pytest.approx(sum(factors) / 3, rel=1e-5)


def test_a_norm_that_is_none_is_refused(tmp_path):
    model = toys.mlp()
    recorder = gradindex.Recorder(model, torch.optim.SGD(model.parameters(), 0.5), tmp_path)
    with pytest.raises(ArgumentError, match="max_norm is 0, but must be a positive number"):
        recorder.clipped(1.0, 0)


def test_only_what_is_trained_is_saved_with_all_buffers(tmp_path):
    model = toys.convolutional()
    head = list(model[6].parameters())
    optimizer = torch.optim.SGD(head, 0.5)
    recorder = gradindex.Recorder(model, optimizer, tmp_path, only_trained=True)

    def step():
        optimizer.zero_grad()
        model(torch.randn(3, 2, 8, 8)).square().mean().backward()
        optimizer.step()

    def saved():
        return set(torch.load(recorder.save(), weights_only=True)["model"])

    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    step()
    assert saved() == {"6.weight", "6.bias"} | buffers
    optimizer.param_groups[0]["params"] = [model[4].weight]
    step()
    # What was trained once is not what the base has.
    assert saved() == {"6.weight", "6.bias", "4.weight"} | buffers


def test_what_is_not_saved_comes_from_the_model(tmp_path):
    model = toys.mlp()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model[2].parameters(), 0.5)
    recorder = gradindex.Recorder(model, optimizer, tmp_path, only_trained=True)
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recorder.save()
    fresh = toys.mlp()
    fresh.load_state_dict(base)
    (found,) = gradindex.find_checkpoints(tmp_path, base="model")
    weights = found.load(fresh)
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained.items())
    assert not torch.equal(weights["2.weight"], base["2.weight"])
    (alone,) = gradindex.find_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        alone.load(fresh)
