"""A task's model that is a part of what was trained: rates, steps and second moments are found as its weights are."""

from collections import OrderedDict

import frameworks
import numpy as np
import pytest
import torch
import toys
from torch import nn

import gradindex
from gradindex import Checkpoint, find_checkpoints
from gradindex.errors import CheckpointError

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
Y = torch.arange(8) % 3


def whole(net="net"):
    """A frozen body and a head around a net; the head has weights of the net's shapes."""
    torch.manual_seed(0)
    parts = {"body": nn.Linear(6, 6), net: toys.mlp(), "head": nn.Linear(3, 3)}
    parts["body"].requires_grad_(False)
    return nn.Sequential(OrderedDict(parts))


def moments_of(optimizer, model, steps):
    return {name: optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**steps) for name, p in model.named_parameters()}


def recorded(folder, model, groups, **options):
    """Train for three steps and save."""
    optimizer = torch.optim.Adam(groups)
    recorder = gradindex.Recorder(model, optimizer, folder, **options)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return recorder.save(), optimizer


def groups_of(model, net="net"):
    return [
        {"params": [getattr(model, net)[0].weight, getattr(model, net)[2].bias], "lr": 0.01},
        {"params": [getattr(model, net)[2].weight, *model.head.parameters()], "lr": 0.002},
    ]


EXPECTED = {"0.weight": 0.01, "2.bias": 0.01, "2.weight": 0.002}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_recorded_part_has_its_own_rates_steps_and_moments(tmp_path, wrapped):
    model = whole()
    _, optimizer = recorded(
        tmp_path, nn.DataParallel(model) if wrapped else model, groups_of(model), second_moments=True
    )
    (found,) = find_checkpoints(tmp_path)
    part = toys.mlp()
    assert found.recorded_training(["0.weight", "0.bias", "2.weight", "2.bias"], part) == dict.fromkeys(EXPECTED, True)
    assert found.learning_rates(list(EXPECTED), part) == EXPECTED
    loaded = found.read(part)
    assert torch.equal(loaded.tensors["2.weight"], model.net[2].weight)
    true = {
        name: optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)
        for name, p in model.net.named_parameters()
        if name in EXPECTED
    }
    for moments in (found.second_moments(part), loaded.second_moments()):
        assert moments.keys() == true.keys()
        for name, tensor in true.items():
            torch.testing.assert_close(moments[name], tensor)


def test_a_task_of_a_part_tracks_what_was_trained_of_it_with_the_recorded_rates(tmp_path):
    model = whole()
    recorded(tmp_path, model, groups_of(model))
    data = list(zip(X, Y, strict=True))
    task = gradindex.Task(toys.mlp(), toys.cross_entropy, data, find_checkpoints(tmp_path))
    given = gradindex.Task(
        toys.mlp(), toys.cross_entropy, data, find_checkpoints(tmp_path, learning_rate=EXPECTED, prefix="net"),
        layers=list(EXPECTED),
    )  # fmt: skip
    found = gradindex.exact_scores(task, data)
    assert np.array_equal(found, gradindex.exact_scores(given, data))
    assert np.abs(found).max() > 0


def test_of_two_copies_the_chosen_one_counts(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"student": toys.mlp(), "teacher": toys.mlp()})
    groups = [
        {"params": model["student"].parameters(), "lr": 0.1},
        {"params": model["teacher"].parameters(), "lr": 0.3},
    ]
    optimizer = torch.optim.SGD(groups)
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    (model["student"](X) + model["teacher"](X)).square().mean().backward()
    optimizer.step()
    path = recorder.save()
    for rate, name in ((0.1, "student"), (0.3, "teacher.")):
        for model_too in ((toys.mlp(),), ()):
            found = Checkpoint(path, prefix=name).learning_rates(["0.weight", "2.bias"], *model_too)
            assert found == {"0.weight": rate, "2.bias": rate}
    for model_too in ((toys.mlp(),), ()):
        with pytest.raises(
            CheckpointError, match=r"2 times, under 'student\.' and 'teacher\.'\. Choose one: .*prefix='st"
        ):
            Checkpoint(path).learning_rates(["0.weight"], *model_too)
    with pytest.raises(CheckpointError, match="2 times"):
        Checkpoint(path).recorded_training(["0.weight"], toys.mlp())


def test_names_of_the_whole_that_are_the_parts_too_are_told_by_their_shapes(tmp_path):
    class Both(nn.Linear):
        def __init__(self):
            super().__init__(6, 4)
            self.inner = nn.Linear(4, 2)

        def forward(self, x):
            return self.inner(super().forward(x))

    model = Both()
    optimizer = torch.optim.SGD(
        [{"params": [model.weight, model.bias], "lr": 0.5}, {"params": model.inner.parameters(), "lr": 0.1}]
    )
    recorder = gradindex.Recorder(model, optimizer, tmp_path)
    model(X).square().mean().backward()
    optimizer.step()
    assert Checkpoint(recorder.save()).learning_rates(["weight", "bias"], nn.Linear(4, 2)) == {
        "weight": 0.1,
        "bias": 0.1,
    }


def test_names_that_are_alike_but_for_a_wrappers_are_kept_apart(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))
            self.module = nn.Linear(6, 3)

        def forward(self, x):
            return self.module(x * self.weight)

    model = Scaled()
    optimizer = torch.optim.Adam(
        [{"params": [model.weight], "lr": 0.1}, {"params": model.module.parameters(), "lr": 0.2}]
    )
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    content = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.4", "global_step": 1, "epoch": 0}
    torch.save({**content, "optimizer_states": [optimizer.state_dict()], "lr_schedulers": []}, tmp_path / "step=1.ckpt")
    found = Checkpoint(tmp_path / "step=1.ckpt").learning_rates(["weight", "module.weight"], Scaled())
    assert found == {"weight": 0.1, "module.weight": 0.2}


def accelerate_run(folder, model, groups, step=3):
    accelerator = frameworks.imported("accelerate").Accelerator(cpu=True)
    optimizer = torch.optim.Adam(groups)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    for _ in range(step):
        prepared_optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(prepared(X), Y))
        prepared_optimizer.step()
    accelerator.save_state(str(folder / f"step_{step}"))
    return optimizer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_part_of_what_accelerate_saved_without_the_order_of_names(tmp_path):
    """Its safetensors are in the order of names; where the part's parameters stand follows from their shapes."""
    model = whole("zz")
    groups = [{"params": [p for p in model.parameters() if p.requires_grad and p.ndim > 1], "lr": 0.01},
              {"params": [p for p in model.parameters() if p.requires_grad and p.ndim <= 1], "lr": 0.002}]  # fmt: skip
    optimizer = accelerate_run(tmp_path, model, groups)
    (found,) = find_checkpoints(tmp_path)
    part = toys.mlp()
    rates = {"0.weight": 0.01, "0.bias": 0.002, "2.weight": 0.01, "2.bias": 0.002}
    assert found.read(part).source()["kind"] == "accelerate"
    with pytest.raises(CheckpointError, match="for groups of parameters whose names are not known"):
        found.learning_rates(["0.bias"])
    assert found.learning_rates(list(rates), part) == rates
    for name, tensor in moments_of(optimizer, model.zz, 3).items():
        torch.testing.assert_close(found.second_moments(part)[name], tensor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_part_whose_place_among_alike_ones_is_unclear_is_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(a=nn.Linear(6, 6), net=nn.Linear(6, 6), z=nn.Linear(6, 6)))
    groups = [
        {"params": list(model.parameters())[:3], "lr": 0.01},
        {"params": list(model.parameters())[3:], "lr": 0.02},
    ]
    accelerate_run(tmp_path, model, groups)
    (found,) = find_checkpoints(tmp_path, prefix="net")
    with pytest.raises(
        CheckpointError, match=r"has learning rates 0\.01 and 0\.02 for groups .* names are not known.*Give l"
    ):
        found.learning_rates(["weight", "bias"], nn.Linear(6, 6))
    with pytest.raises(CheckpointError, match=r"does not tell which .* Make the optimizer with names"):
        found.second_moments(nn.Linear(6, 6))


def lightning_run(folder, named):
    lightning = frameworks.imported("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.parts = whole()
            self.used = []

        def training_step(self, batch, _):
            self.used.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
            return nn.functional.cross_entropy(self.parts(batch[0]), batch[1])

        def configure_optimizers(self):
            self.parts.body.requires_grad_(True)
            kept = (lambda part: part.named_parameters()) if named else (lambda part: part.parameters())
            groups = [{"params": [*kept(self.parts.body), *([] if named else kept(self.parts.net))], "lr": 0.01}]
            groups += [{"params": list(self.parts.net.named_parameters()), "lr": 0.03}] if named else []
            groups += [] if named else [{"params": list(kept(self.parts.head)), "lr": 0.002}]
            optimizer = torch.optim.Adam(groups)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    module = Module()
    callback = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, every_n_epochs=1)
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[callback], logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, devices=1,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 4))
    return module, trainer.optimizers[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", [False, True])
def test_the_net_of_a_lightning_module_has_the_rates_and_moments_that_it_was_trained_with(tmp_path, named):
    module, optimizer = lightning_run(tmp_path, named)
    part, group = toys.mlp(), 1 if named else 0
    found = find_checkpoints(tmp_path)
    assert [item.step for item in found] == [2, 4]
    for item in found:
        rates = item.learning_rates(["0.weight", "0.bias", "2.weight", "2.bias"], part)
        assert set(rates.values()) == {module.used[item.step - 1][group]}
    moments = found[-1].second_moments(part)
    assert len(moments) == 4
    for name, tensor in moments_of(optimizer, module.parts.net, 4).items():
        torch.testing.assert_close(moments[name], tensor)
    integrated = find_checkpoints(tmp_path, weighting="integrated")[1].learning_rates(["0.weight"], part)
    assert integrated == {"0.weight": pytest.approx(sum(rates[group] for rates in module.used[2:]))}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_net_inside_a_model_of_the_trainer(tmp_path):
    transformers = frameworks.imported("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
            self.a_head = nn.Linear(3, 3)

        def forward(self, x, labels):
            return {"loss": nn.functional.cross_entropy(self.a_head(self.net(x)), labels)}

    model = Model()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True, weight_decay=0.1,
        learning_rate=0.01, lr_scheduler_type="linear", logging_steps=1, optim="adamw_torch",
    )  # fmt: skip
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    (found,) = find_checkpoints(tmp_path)
    part = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    rates = found.learning_rates([name for name, _ in part.named_parameters()], part)
    assert list(rates.values()) == pytest.approx([0.01 / 3] * 6)
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    true = moments_of(inner, model.net, 3)
    moments = found.second_moments(part)
    assert moments.keys() == true.keys()
    for name, tensor in true.items():
        torch.testing.assert_close(moments[name], tensor)
