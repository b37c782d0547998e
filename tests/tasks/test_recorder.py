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


class Wrapped(torch.optim.Optimizer):
    """As accelerate's: an optimizer by type alone, whose step may be left out and which holds the real one."""

    def __init__(self, optimizer):
        self.optimizer, self.skips = optimizer, False

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        if not self.skips:
            self.optimizer.step()


class Plain:
    """A wrapper that is no optimizer at all, around several."""

    def __init__(self, *optimizers):
        self.optimizers = {str(number): optimizer for number, optimizer in enumerate(optimizers)}

    def zero_grad(self):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers.values():
            optimizer.step()


class Shard(torch.optim.SGD):
    """As ZeroRedundancyOptimizer: holds all parameters, the one inside a part of them."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.optim = torch.optim.SGD(self.param_groups[0]["params"][:1], lr)

    def step(self):
        self.optim.step()


class Derived(torch.optim.SGD):
    """A step inside a step: torch tells of both."""

    def step(self, closure=None):
        return super().step(closure)


class Slow(torch.optim.Optimizer):
    """Lookahead: steps of the inner one, and slow weights behind."""

    def __init__(self, base):
        super().__init__([p for group in base.param_groups for p in group["params"]], {})
        self.base_optimizer = base
        self.param_groups = base.param_groups

    def step(self):
        self.base_optimizer.step()


def two(model):
    return torch.optim.SGD(model[0].parameters(), 0.5), torch.optim.Adam(model[2].parameters(), 0.25)


WRAPPED = {
    "plain": lambda model: torch.optim.SGD(model.parameters(), 0.5),
    "wrapped": lambda model: Wrapped(torch.optim.SGD(model.parameters(), 0.5)),
    "wrapped twice": lambda model: Wrapped(Wrapped(torch.optim.SGD(model.parameters(), 0.5))),
    "lookahead": lambda model: Slow(torch.optim.SGD(model.parameters(), 0.5)),
    "shard": lambda model: Shard(model.parameters(), 0.5),
    "derived": lambda model: Derived(model.parameters(), 0.5),
    "rate as a tensor": lambda model: torch.optim.Adam(model.parameters(), torch.tensor(0.5)),
    "fused": lambda model: torch.optim.Adam(model.parameters(), 0.5, fused=True),
}


def by_name(path, *fields):
    fields = fields or ("learning_rate", "learning_rate_sum", "steps")
    return {n: tuple(g[f] for f in fields) for g in read_record(path)["groups"] for n in g["parameters"]}


@pytest.mark.parametrize("case", WRAPPED)
def test_optimizers_in_wrappers_are_recorded(tmp_path, case):
    model = toys.mlp()
    optimizer = WRAPPED[case](model)
    torch.optim.SGD(model.parameters(), 1.0)  # whose class is hooked by now
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    train(model, optimizer, 3)
    assert by_name(recorder.save()) == dict.fromkeys(dict(model.named_parameters()), (0.5, 1.5, 3))
    assert recorder.step == 3


def test_steps_that_a_wrapper_leaves_out_do_not_count(tmp_path):
    model = toys.mlp()
    optimizer = Wrapped(torch.optim.SGD(model.parameters(), 0.5))
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    for skips in (False, True, True, False):
        optimizer.skips = skips
        train(model, optimizer, 1)
    recorder.save()
    assert recorder.step == 2


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_do_not_count(tmp_path, fused):
    model = toys.mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 6)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert by_name(recorder.save())["0.weight"] == (0.5, 1.0, 2)
    assert recorder.step == 2


def test_accelerate_is_recorded(tmp_path):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(toys.mlp(), torch.optim.SGD([torch.zeros(1)], 0.5))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), 0.5))
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    for _ in range(4):
        with accelerator.accumulate(model):
            optimizer.zero_grad()
            accelerator.backward(model(torch.randn(4, 6)).square().mean())
            optimizer.step()
    assert by_name(recorder.save())["2.bias"] == (0.5, 1.0, 2)


def test_several_optimizers_that_step_in_turn_count_as_one(tmp_path):
    model = toys.mlp()
    first, second = two(model)
    recorder = gradindex.Recorder(model, [first, Wrapped(second), first], tmp_path)  # the same one twice is one
    train(model, Plain(first, second), 2)
    assert recorder.step == 2
    found = by_name(recorder.save())
    assert (found["0.weight"], found["2.bias"]) == ((0.5, 1.0, 2), (0.25, 0.5, 2))
    # One steps more often than the other, and then alone.
    train(model, second, 2)
    train(model, first, 1)
    found = by_name(recorder.save())
    assert (recorder.step, found["0.weight"], found["2.bias"]) == (4, (0.5, 0.5, 1), (0.25, 0.5, 2))
    train(model, first, 1)
    found = by_name(recorder.save())
    assert (recorder.step, found["0.weight"], found["2.bias"]) == (5, (0.5, 0.5, 1), (0.25, 0.0, 0))


@pytest.mark.parametrize("wrap", [Plain, lambda *optimizers: {"a": optimizers[0], "b": optimizers[1]}])
def test_several_optimizers_come_in_an_object_or_by_name(tmp_path, wrap):
    model = toys.mlp()
    optimizers = two(model)
    recorder = gradindex.Recorder(model, wrap(*optimizers), tmp_path)
    train(model, Plain(*optimizers), 1)
    assert set(by_name(recorder.save())) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_closure_computes_gradients_inside_the_step(tmp_path):
    model, inputs = toys.mlp(), torch.randn(4, 6)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5)
    recorder = gradindex.Recorder(model, optimizer, tmp_path)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        optimizer.zero_grad()
    assert by_name(recorder.save())["0.weight"] == (0.5, 1.0, 2)


def test_groups_that_come_later_or_go_are_followed(tmp_path):
    model = toys.mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), 0.5)
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    train(model, optimizer, 1)
    model.append(torch.nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.25})
    train(model, optimizer, 1)
    optimizer.param_groups = optimizer.param_groups[1:]
    train(model, optimizer, 1)
    found = by_name(recorder.save())
    assert found == {
        "0.weight": (0.5, 1.0, 2), "0.bias": (0.5, 1.0, 2), "3.weight": (0.25, 0.5, 2), "3.bias": (0.25, 0.5, 2),
    }  # fmt: skip
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    train(model, optimizer, 1)
    with pytest.raises(CheckpointError, match="The optimizer holds 1 parameters that are not the model's"):
        recorder.save()


class DataParallel(torch.nn.Module):
    """By its name, what distributed training puts around a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def around(kind, model):
    if kind == "compiled layer":
        model[0] = torch.compile(model[0], backend="eager")
        return model
    wrapped = torch.compile(model, backend="eager") if "compiled" in kind else model
    return DataParallel(wrapped) if "parallel" in kind else wrapped


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parallel", "compiled", "compiled layer", "compiled and parallel"])
def test_names_are_those_of_the_model_inside(tmp_path, kind):
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    recorder = gradindex.Recorder(around(kind, model), optimizer, tmp_path)
    train(model, optimizer, 1)
    path = recorder.save()
    assert list(by_name(path)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    (found,) = gradindex.find_checkpoints(tmp_path)
    assert set(found.load(toys.mlp())) == set(by_name(path))
    assert found.learning_rates(["2.bias"]) == {"2.bias": 0.5}


def test_two_recorders_listen_to_one_optimizer(tmp_path):
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    often, seldom = (gradindex.Recorder(model, optimizer, tmp_path / name) for name in ("often", "seldom"))
    for _ in range(2):
        train(model, optimizer, 1)
        assert by_name(often.save())["0.bias"] == (0.5, 0.5, 1)
    assert by_name(seldom.save())["0.bias"] == (0.5, 1.0, 2)


def test_an_optimizer_without_a_schedule_tells_the_rate_in_use(tmp_path):
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    optimizer.param_groups[0]["scheduled_lr"] = 0.125
    train(model, optimizer, 2)
    assert by_name(recorder.save())["0.bias"] == (0.125, 0.25, 2)


class Copies(torch.optim.SGD):
    """As optimizers in another precision: steps copies of the weights."""

    def __init__(self, parameters):
        super().__init__([parameter.detach().clone() for parameter in parameters], 0.5)


def test_what_cannot_be_recorded_is_refused_with_the_reason(tmp_path):
    model = toys.mlp()
    for given, message in (
        ("sgd", "optimizer is a str whose steps cannot be observed, but must be a torch.optim.Optimizer"),
        ([], "optimizer is an empty list"),
        ([torch.optim.SGD(model.parameters(), 0.5), None], "optimizer is a NoneType"),
        (Copies(model.parameters()), "holds 4 parameters that are not the model's.*copies in another precision"),
        (Plain(Copies(model.parameters())), "holds 4 parameters that are not the model's"),
    ):
        with pytest.raises(ArgumentError, match=message):
            gradindex.Recorder(model, given, tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ArgumentError, match="SGD has the learning rate None, but Recorder needs a finite number"):
        gradindex.Recorder(model, optimizer, tmp_path)
    with pytest.raises(ArgumentError, match="model is a list, but must be the torch.nn.Module in training"):
        gradindex.Recorder([model], optimizer, tmp_path)
