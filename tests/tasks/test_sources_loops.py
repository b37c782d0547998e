"""Checkpoints of Lightning, accelerate and timm, made by them: rates are those that the training used."""

import argparse
import importlib
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import gradindex
from gradindex import Checkpoint, find_checkpoints
from gradindex.errors import CheckpointError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STEPS, EPOCH = 8, 4
SCHEDULES = {
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=STEPS),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=STEPS + 1, pct_start=0.3, div_factor=3),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [3, 5], gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "a function": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 - step / STEPS),
    "none": lambda o: None,
}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(16, 4, generator=generator), torch.arange(16) % 3), 16 // EPOCH)


def watched(optimizer, model):
    """What an optimizer does from now on: the rate before each step, and weights and moments after it."""
    true = {"used": [], "weights": {}, "moments": {}}
    optimizer.register_step_pre_hook(lambda o, *_: true["used"].append(o.param_groups[0]["lr"]))

    def after(optimizer, *_):
        step = len(true["used"])
        true["weights"][step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        true["moments"][step] = {
            name: optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999**step)
            for name, parameter in model.named_parameters()
        }

    optimizer.register_step_post_hook(after)
    return true


def check(found, true, steps, closely=1e-9, sums=True):
    """Steps, rates, sums, weights and moments of a run."""
    model = net(seed=5)
    names = [name for name, _ in model.named_parameters()]
    used = np.array(true["used"])
    assert [item.read(model).record["step"] for item in found] == list(steps)
    for item, step, since in zip(found, steps, (0, *steps), strict=False):
        rates = list(item.learning_rates(names, model).values())
        assert rates == pytest.approx([used[step - 1]] * len(names), rel=closely)
        loaded = item.read(model)
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in true["weights"][step].items())
        for name, tensor in item.second_moments(model).items():
            torch.testing.assert_close(tensor, true["moments"][step][name])
        if sums:
            integrated = replace(item, weighting="integrated")
            total = used[since:step].sum()
            assert list(integrated.learning_rates(names, model).values()) == pytest.approx([total] * 4, rel=closely)


def lightning_run(folder, schedule, interval, averaged=False):
    lightning = pytest.importorskip("lightning", reason="needs lightning, of the extra dev")
    callbacks = lightning.pytorch.callbacks

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, _):
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.1)
            self.true = watched(optimizer, self.net)
            scheduler = SCHEDULES[schedule](optimizer)
            if scheduler is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    saving = {"every_n_epochs": 1} if interval == "epoch" else {"every_n_train_steps": 3}
    used = [callbacks.ModelCheckpoint(dirpath=folder / "run", save_top_k=-1, **saving)]
    if averaged:
        used.append(callbacks.EMAWeightAveraging())
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=STEPS // EPOCH, callbacks=used, logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, batches())
    return module.true


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lightnings_schedules_by_step(tmp_path, schedule):
    true = lightning_run(tmp_path, schedule, "step")
    found = find_checkpoints(tmp_path / "run")
    assert [item.step for item in found] == [3, 6]
    assert found[0].read(net()).kind == "Lightning"
    check(found, true, (3, 6))


@pytest.mark.parametrize("schedule", ["linear", "steps", "a function"])
def test_lightnings_schedules_by_epoch(tmp_path, schedule):
    true = lightning_run(tmp_path, schedule, "epoch")
    found = find_checkpoints(tmp_path / "run")
    assert [item.step for item in found] == [4, 8]
    if schedule == "a function":  # what came before the first is on the line of those after it
        assert true["used"] == [0.1] * 4 + [pytest.approx(0.0875)] * 4
    check(found, true, (4, 8))


def test_lightning_within_an_epoch(tmp_path):
    true = lightning_run(tmp_path, "steps", "step")
    path = tmp_path / "run" / "epoch=1-step=6.ckpt"
    content = torch.load(path)
    content["lr_schedulers"][0] |= {"last_epoch": 1, "_step_count": 2, "_last_lr": [0.1]}
    torch.save(content, path)
    assert Checkpoint(path).learning_rates(["0.weight"]) == {"0.weight": 0.1}
    assert true["used"][0] == 0.1
    content["lr_schedulers"][0] |= {"last_epoch": 4, "_last_lr": [0.05]}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="after 6 steps of its optimizer, but 4 of its scheduler do not match"):
        Checkpoint(path).learning_rates(["0.weight"])
    assert Checkpoint(path, 0.1).read(net()).tensors


def test_of_averaged_weights_those_in_training_are_taken(tmp_path):
    true = lightning_run(tmp_path, "none", "step", averaged=True)
    found = find_checkpoints(tmp_path / "run")
    check(found, true, (3, 6))
    assert found[0].read(net()).kind == "Lightning, with averaged weights"
    averaged = find_checkpoints(tmp_path / "run", key="state_dict")[1].load(net())
    assert not torch.equal(averaged["0.weight"], true["weights"][6]["0.weight"])


def accelerate_run(folder, schedule, by="step", every=3):
    accelerator = pytest.importorskip("accelerate", reason="needs accelerate, of the extra dev").Accelerator(cpu=True)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    true = watched(optimizer, model)
    scheduler = SCHEDULES[schedule](optimizer)
    model, optimizer, data = accelerator.prepare(model, optimizer, batches())
    scheduler = None if scheduler is None else accelerator.prepare(scheduler)
    taken = 0
    for epoch in range(STEPS // EPOCH):
        for x, y in data:
            accelerator.backward(cross_entropy(model(x), y))
            optimizer.step()
            if scheduler is not None and by == "step":
                scheduler.step()
            optimizer.zero_grad()
            taken += 1
            if taken % every == 0 and by == "step":
                accelerator.save_state(str(folder / f"step_{taken}"))
        if scheduler is not None and by == "epoch":
            scheduler.step()
            accelerator.save_state(str(folder / f"epoch_{epoch}"))
    return true


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_accelerates_schedules_by_step(tmp_path, schedule):
    true = accelerate_run(tmp_path / "run", schedule)
    found = find_checkpoints(tmp_path / "run")
    assert [item.step for item in found] == [3, 6]
    assert found[0].read(net()).kind == "accelerate"
    check(found, true, (3, 6))


def test_accelerates_schedules_by_epoch(tmp_path):
    true = accelerate_run(tmp_path / "run", "steps", by="epoch")
    found = find_checkpoints(tmp_path / "run")
    assert [item.step for item in found] == [1, 2]
    check(found, true, (4, 8), sums=False)


def test_accelerates_own_names_are_ordered_by_the_scheduler(tmp_path):
    true = accelerate_run(tmp_path / "run", "linear", every=1)
    for number, step in enumerate((2, 5, 8)):
        (tmp_path / "run" / f"step_{step}").rename(tmp_path / "run" / f"checkpoint_{number}")
    for step in (1, 3, 4, 6, 7):
        shutil.rmtree(tmp_path / "run" / f"step_{step}")
    found = find_checkpoints(tmp_path / "run")
    assert [item.step for item in found] == [2, 5, 8]
    check(found, true, (2, 5, 8))


def test_a_schedule_that_ended_at_zero_is_weighed_by_its_last_step(tmp_path):
    true = accelerate_run(tmp_path / "run", "linear", every=4)
    assert torch.load(tmp_path / "run" / "step_8" / "scheduler.bin")["_last_lr"] == [0.0]
    check(find_checkpoints(tmp_path / "run"), true, (4, 8))


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    accelerate_run(tmp_path / "run", "none")
    other = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))
    torch.save(other.state_dict(), tmp_path / "run" / "step_3" / "pytorch_model.bin")
    (tmp_path / "run" / "step_3" / "model.safetensors").unlink()
    data = [(torch.ones(4), 0)] * 4

    def loss(model, batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(CheckpointError, match=r"optimizer\.bin is the optimizer of another model: it holds 4 param"):
        gradindex.build(gradindex.Task(other, loss, data, Checkpoint(tmp_path / "run" / "step_3")), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def timm_content(model, optimizer, epoch):
    """As timm 1.0's CheckpointSaver writes it, with the command line of its training script."""
    arguments = argparse.Namespace(model="net", lr=0.1, sched="step", sched_on_updates=False, mean=None, sizes=[3, 4])
    return {
        "epoch": epoch, "arch": "net", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
        "version": 2, "args": arguments, "state_dict_ema": net(seed=9).state_dict(), "metric": 0.5,
    }  # fmt: skip


def timm_run(folder, save):
    """timm's order: train an epoch, save, then the scheduler; weights without decay are the first group."""
    model = net()
    flat = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": flat, "weight_decay": 0.0}, {"params": [p for p in model.parameters() if p.ndim > 1]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    true = watched(optimizer, model)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    for epoch in range(2):
        for x, y in batches():
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        save(model, optimizer, epoch)
        scheduler.step()
    return true


def check_timm(folder, true):
    found = find_checkpoints(folder)
    assert [item.step for item in found] == [0, 1]
    assert found[0].read(net()).kind == "timm"
    model = net(seed=5)
    for item, step in zip(found, (4, 8), strict=True):
        assert set(item.learning_rates(["0.weight", "2.bias"], model).values()) == {true["used"][step - 1]}
        loaded = item.load(model)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in true["weights"][step].items())
        for name, tensor in item.second_moments(model).items():
            torch.testing.assert_close(tensor, true["moments"][step][name])
    with pytest.raises(CheckpointError, match="no logged schedule, so the sum .* is unknown"):
        find_checkpoints(folder, weighting="integrated")[1].learning_rates(["0.weight"], model)


def test_a_file_of_timms_layout(tmp_path):
    def save(model, optimizer, epoch):
        torch.save(timm_content(model, optimizer, epoch), tmp_path / f"checkpoint-{epoch}.pth.tar")

    check_timm(tmp_path, timm_run(tmp_path, save))
    averaged = find_checkpoints(tmp_path, key="state_dict_ema")[0].load(net())
    assert torch.equal(averaged["0.weight"], net(seed=9).state_dict()["0.weight"])


def test_a_run_that_timm_saved(tmp_path):
    try:
        utils = importlib.import_module("timm.utils")
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision for another torch
        pytest.skip(f"needs timm and a torchvision that fits torch ({error})")
    saver = []

    def save(model, optimizer, epoch):
        if not saver:
            arguments = argparse.Namespace(model="net", sched_on_updates=False)
            saver.append(utils.CheckpointSaver(model, optimizer, arguments, checkpoint_dir=str(tmp_path)))
        saver[0].save_checkpoint(epoch)

    check_timm(tmp_path, timm_run(tmp_path, save))


def test_a_schedule_by_update_of_timm_is_not_guessed(tmp_path):
    model = net()
    content = timm_content(model, torch.optim.AdamW(model.parameters(), lr=0.1), 3)
    content["args"].sched_on_updates = True
    torch.save(content, tmp_path / "checkpoint-3.pth.tar")
    with pytest.raises(CheckpointError, match="has no recorded learning rate"):
        find_checkpoints(tmp_path)[0].learning_rates(["0.weight"])
