"""Checkpoint files: found in order, read safely, fitted to the model, and weighted."""

import math

import pytest
import torch
import toys
from safetensors.torch import save_file
from torch import nn

import gradindex
from gradindex.errors import ArgumentError, CheckpointError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return toys.mlp()


def saved(folder, content, name="w_3.pt"):
    torch.save(content, folder / name)
    return gradindex.Checkpoint(folder / name, learning_rate=0.1)


def same(found, model):
    expected = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def wrapped(model, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


CONTENTS = {
    "state_dict": (lambda m: m.state_dict(), {}),
    "under state_dict": (lambda m: {"epoch": 3, "state_dict": m.state_dict(), "optimizer": {"lr": 1}}, {}),
    "under model": (lambda m: {"model": m.state_dict()}, {}),
    "DataParallel": (lambda m: wrapped(m, "module."), {}),
    "compiled": (lambda m: wrapped(m, "_orig_mod."), {}),
    "compiled DataParallel": (lambda m: {"state_dict": wrapped(m, "module._orig_mod.")}, {}),
    "nested key": (lambda m: {"ema": {"net": m.state_dict()}, "model": toys.mlp().state_dict()}, {"key": "ema.net"}),
    "own prefix": (lambda m: wrapped(m, "encoder.net."), {"prefix": "encoder.net."}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
def test_weights_are_found_where_people_put_them(tmp_path, model, case):
    content, options = CONTENTS[case]
    saved(tmp_path, content(model))
    assert same(gradindex.Checkpoint(tmp_path / "w_3.pt", **options).load(toys.mlp()), model)


def test_safetensors_are_read(tmp_path, model):
    save_file(wrapped(model, "module."), tmp_path / "step_4.safetensors")
    (found,) = gradindex.find_checkpoints(tmp_path, learning_rate=0.1)
    assert found.step == 4
    assert same(found.load(toys.mlp()), model)


def test_a_models_own_prefix_is_not_stripped(tmp_path, model):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = toys.mlp()

    wrapper = Wrapper()
    assert same(saved(tmp_path, wrapper.state_dict()).load(Wrapper()), wrapper)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("content", [Evil(), {"model": Evil()}, toys.mlp()])
def test_python_objects_are_never_executed(tmp_path, model, capsys, content):
    with pytest.raises(CheckpointError, match=r"Python objects besides tensors.*Save model.state_dict\(\)"):
        saved(tmp_path, content).load(model)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("size", [0, 1, 100, 0.5, 0.9, -1])
@pytest.mark.parametrize("name", ["w_3.pt", "w_3.safetensors"])
def test_a_truncated_file_is_refused(tmp_path, model, name, size):
    path = tmp_path / name
    save_file(model.state_dict(), path) if name.endswith("safetensors") else torch.save(model.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(size * len(content)) if 0 < size < 1 else size])
    with pytest.raises(
        CheckpointError, match=r"w_3\.\w+ cannot be read as a checkpoint; it may be truncated or damaged"
    ):
        gradindex.Checkpoint(path).load(model)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        gradindex.find_checkpoints(path)


def test_a_missing_file_is_named(tmp_path, model):
    for action in ("load", "learning_rates"):
        with pytest.raises(CheckpointError, match=r"w_9\.pt does not exist. Check the path"):
            getattr(gradindex.Checkpoint(tmp_path / "w_9.pt"), action)(model if action == "load" else ["0.weight"])


MISFITS = {
    "another width": (toys.regressor(), r"2\.weight has shape \(1, 5\), the model \(3, 5\); 2\.bias has shape \(1,\)"),
    "fewer layers": (nn.Sequential(nn.Linear(6, 5)), r"2\.weight is missing; 2\.bias is missing\. Check"),
    "more layers": (nn.Sequential(*toys.mlp(), nn.Linear(3, 3)), r"3\.weight is not in the model; 3\.bias is not"),
    "all else": (toys.convolutional(), r"2\.bias is missing; 1\.weight is not in the model \(and \d+ more\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_names_the_first_keys_that_differ(tmp_path, model, case):
    other, message = MISFITS[case]
    with pytest.raises(CheckpointError, match=message):
        saved(tmp_path, other.state_dict()).load(model)


NO_WEIGHTS = {
    "a number": (3, {}, "holds a int, but a state_dict is needed"),
    "no tensors": ({"epoch": 3, "lr": 0.1}, {}, "holds no weights under the usual keys; it holds: epoch, lr"),
    "a wrong key": ({"ema": {"net": {}}}, {"key": "ema.model"}, "has no key 'ema.model'. It holds: net"),
}


@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_a_file_without_weights_says_what_it_holds(tmp_path, model, case):
    content, options, message = NO_WEIGHTS[case]
    saved(tmp_path, content)
    with pytest.raises(CheckpointError, match=message):
        gradindex.Checkpoint(tmp_path / "w_3.pt", **options).load(model)


def test_rates_are_given_in_every_form(tmp_path):
    names = ["0.weight", "0.bias", "2.weight"]

    def rates(learning_rate):
        return gradindex.Checkpoint(tmp_path / "any.pt", learning_rate).learning_rates(names)

    assert rates(0.5) == {"0.weight": 0.5, "0.bias": 0.5, "2.weight": 0.5}
    assert rates({"0.*": 0.25, "2.weight": 0, "0.bias": 2.0}) == {"0.weight": 0.25, "0.bias": 2.0, "2.weight": 0.0}
    with pytest.raises(CheckpointError, match="has learning rates for 1 parameters, but none for 2.weight. Exclude it"):
        rates({"0.*": 0.25})


def test_an_unknown_rate_names_the_ways_out(tmp_path, model):
    saved(tmp_path, model.state_dict())
    (found,) = gradindex.find_checkpoints(tmp_path / "*.pt")
    with pytest.raises(CheckpointError, match=r"unknown. Give learning_rate= .* gradindex.Recorder, .*'uniform'"):
        found.learning_rates(["0.weight"])


def test_a_schedule_is_a_function_of_the_step(tmp_path, model):
    for step in (10, 9, 100):
        torch.save(model.state_dict(), tmp_path / f"net-{step}.pth")
    found = gradindex.find_checkpoints(tmp_path / "net-*.pth", learning_rate=lambda step: 1 / step)
    assert [(c.step, c.learning_rate) for c in found] == [(9, 1 / 9), (10, 0.1), (100, 0.01)]
    assert [c.weight_source for c in found] == ["given"] * 3


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf, {"0.weight": -1.0}])
def test_impossible_rates_are_refused(tmp_path, rate):
    with pytest.raises(ArgumentError, match="must be finite and not negative"):
        gradindex.Checkpoint(tmp_path / "w.pt", rate)


def test_weightings_choose_what_the_recorder_saved(tmp_path, model):
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.4}]
    )
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    for _ in range(3):
        optimizer.step()
    recorder.save()
    names = ["0.weight", "2.bias"]
    found = {
        weighting: gradindex.find_checkpoints(tmp_path, weighting=weighting)[0].learning_rates(names)
        for weighting in ("learning_rate", "integrated", "uniform")
    }
    assert found["learning_rate"] == {"0.weight": 0.1, "2.bias": 0.4}
    assert found["integrated"] == pytest.approx({"0.weight": 0.3, "2.bias": 1.2})
    assert found["uniform"] == {"0.weight": 1.0, "2.bias": 1.0}
    with pytest.raises(ArgumentError, match="weighting is 'mean'"):
        gradindex.find_checkpoints(tmp_path, weighting="mean")


def test_rates_recorded_of_a_wrapped_model_fit_the_plain_one(tmp_path, model):
    wrapper = nn.DataParallel(model)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.2)
    recorder = gradindex.Recorder(wrapper, optimizer, tmp_path)
    optimizer.step()
    recorder.save()
    (found,) = gradindex.find_checkpoints(tmp_path)
    assert found.learning_rates(["0.weight"]) == {"0.weight": 0.2}
    assert same(found.load(toys.mlp()), model)


def test_nothing_found_and_no_step_are_explained(tmp_path, model):
    with pytest.raises(CheckpointError, match=r"No checkpoint matches .*runs. Check the path, or train with"):
        gradindex.find_checkpoints(tmp_path / "runs")
    saved(tmp_path, model.state_dict(), "best.pt")
    with pytest.raises(CheckpointError, match=r"best\.pt has no step in its name.*List the checkpoints yourself"):
        gradindex.find_checkpoints(tmp_path)


def test_the_hash_is_the_files(tmp_path, model):
    first, second = saved(tmp_path, model.state_dict()), saved(tmp_path, toys.mlp().state_dict(), "w_4.pt")
    assert len(first.sha256()) == 64
    assert first.sha256() != second.sha256()
    (tmp_path / "copy.pt").write_bytes((tmp_path / "w_3.pt").read_bytes())
    assert gradindex.Checkpoint(tmp_path / "copy.pt").sha256() == first.sha256()


def steps(count):
    return [gradindex.Checkpoint(f"w_{step}.pt", learning_rate=0.1, step=step) for step in range(1, count + 1)]


def chosen(found):
    return [item.step for item in found]


@pytest.mark.parametrize(
    ("n", "count", "expected"),
    [(20, 5, [2, 6, 10, 14, 18]), (20, 1, [10]), (5, 5, [1, 2, 3, 4, 5]), (7, 3, [1, 4, 6]), (1, 1, [1])],
)
def test_evenly_takes_the_middles_of_equal_spans(n, count, expected):
    assert chosen(gradindex.checkpoint.evenly(steps(n), count)) == expected


def test_evenly_takes_none_twice():
    for n in range(1, 30):
        for count in range(1, n + 1):
            assert len(set(chosen(gradindex.checkpoint.evenly(steps(n), count)))) == count


def test_by_loss_drop_takes_those_before_which_the_loss_fell_most():
    losses = [2.0, 1.2, 1.1, 0.4, 0.5]  # drops: -, 0.8, 0.1, 0.7, -0.1
    for count, expected in ((1, [2]), (2, [2, 4]), (3, [2, 3, 4]), (4, [2, 3, 4, 5]), (5, [1, 2, 3, 4, 5])):
        assert chosen(gradindex.checkpoint.by_loss_drop(steps(5), count, losses)) == expected


def test_by_loss_drop_reads_what_the_recorder_was_given(tmp_path, model):
    recorder = gradindex.Recorder(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1), tmp_path)
    for loss in (3.0, 2.9, 1.0):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        recorder.save(loss)
    found = gradindex.find_checkpoints(tmp_path)
    assert [item.loss() for item in found] == [3.0, 2.9, 1.0]
    assert chosen(gradindex.checkpoint.by_loss_drop(found, 1)) == [3]


def test_a_choice_that_cannot_be_made_says_why(tmp_path, model):
    with pytest.raises(ArgumentError, match="count is 6, but must be from 1 to 5"):
        gradindex.checkpoint.evenly(steps(5), 6)
    for losses in ([1.0, 2.0], [1.0, 2.0, 3.0, 4.0, math.nan]):
        with pytest.raises(ArgumentError, match=r"losses has \d finite values, but there are 5 checkpoints"):
            gradindex.checkpoint.by_loss_drop(steps(5), 2, losses)
    with pytest.raises(CheckpointError, match=r"has no recorded training loss.*save\(loss\)"):
        gradindex.checkpoint.by_loss_drop([saved(tmp_path, model.state_dict())], 1)
    recorder = gradindex.Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "run")
    with pytest.raises(ArgumentError, match="loss is nan at step 0, but must be finite"):
        recorder.save(math.nan)
