"""RecorderCallback in Lightning's Trainer."""

import warnings
from pathlib import Path

import frameworks
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import gradindex
from gradindex.checkpoint import read_record
from gradindex.errors import ArgumentError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of a trainer without a GPU and with few workers
]


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """Imported where it is used: collecting tests takes no trainer."""
    global pl, RecorderCallback, Module, Manual
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl = frameworks.imported("lightning.pytorch")
        from gradindex.integrations.lightning import RecorderCallback

    class Module(pl.LightningModule):
        def __init__(self, **options):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(3, 2)
            self.options, self.losses, self.norms = options, [], []

        def training_step(self, batch):
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(float(loss))
            return loss

        def on_before_optimizer_step(self, optimizer):
            self.norms.append(float(torch.cat([p.grad.flatten() for p in self.parameters()]).norm()))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.5, **self.options)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD([self.net.weight], 0.5), torch.optim.SGD([self.net.bias], 0.25)]

        def training_step(self, batch):
            loss = super().training_step(batch)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()


def loader(n=24):
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(n, 3), torch.randint(2, (n,))), 4)


def fit(folder, callback, module=None, ckpt_path=None, callbacks=(), **options):
    defaults = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": bool(callbacks), "devices": 1,
    }  # fmt: skip
    trainer = pl.Trainer(default_root_dir=folder, callbacks=[callback, *callbacks], **(defaults | options))
    module = module or Module()
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module


def records(folder):
    return {item.step: read_record(Path(item.path)) for item in gradindex.find_checkpoints(folder)}


def test_rates_losses_and_weights_are_those_of_the_steps(tmp_path):
    module = fit(tmp_path, RecorderCallback(tmp_path / "ck", every=5))
    found = records(tmp_path / "ck")
    assert list(found) == [5, 10, 12]
    used = [0.5 / (1 + step) for step in range(12)]
    for step, span in ((5, slice(0, 5)), (10, slice(5, 10)), (12, slice(10, 12))):
        (group,) = found[step]["groups"]
        assert group["parameters"] == ["net.weight", "net.bias"]
        assert group["learning_rate"] == used[step - 1]
        assert group["learning_rate_sum"] == pytest.approx(sum(used[span])) == group["effective_sum"]
        losses = module.losses[span]
        assert found[step]["loss"] == pytest.approx(sum(losses) / len(losses))
    last = gradindex.Checkpoint(tmp_path / "ck" / "step_00000012.pt")
    assert torch.equal(last.load(Module())["net.weight"], module.net.weight)
    assert last.learning_rates(["net.weight"]) == {"net.weight": used[11]}


def test_folders_of_shards_hold_the_same_as_files(tmp_path):
    files, folders = tmp_path / "files", tmp_path / "folders"
    fit(tmp_path, RecorderCallback(files, every=4))
    fit(tmp_path, RecorderCallback(folders, every=4, sharded=True))
    for one, other in zip(gradindex.find_checkpoints(files), gradindex.find_checkpoints(folders), strict=True):
        assert Path(other.path).is_dir()
        part = torch.nn.Linear(3, 2)
        for name, tensor in one.load(part).items():
            assert torch.equal(other.load(part)[name], tensor)
        rates = other.learning_rates(["weight", "bias"], part)
        assert rates == one.learning_rates(["weight", "bias"], part)
        assert rates["weight"] == pytest.approx(0.5 / one.step)


def test_a_step_is_the_optimizers_where_gradients_are_accumulated(tmp_path):
    module = fit(tmp_path, RecorderCallback(tmp_path / "ck", count=2), accumulate_grad_batches=3)
    found = records(tmp_path / "ck")
    assert {step: record["groups"][0]["steps"] for step, record in found.items()} == {2: 2, 4: 2}
    assert found[2]["loss"] == pytest.approx(sum(module.losses[:6]) / 6)


def test_the_factor_of_clipping_by_norm_is_recorded(tmp_path):
    options = {"gradient_clip_val": 0.25, "max_epochs": 1}
    module = fit(tmp_path, RecorderCallback(tmp_path / "ck", at=[6]), **options)
    (record,) = records(tmp_path / "ck").values()
    factors = [min(1.0, 0.25 / (norm + 1e-6)) for norm in module.norms]
    assert min(factors) < 0.9
    (group,) = record["groups"]
    assert group["clipping_factor"] == pytest.approx(sum(factors) / 6, rel=1e-5)
    effective = sum(0.5 / (1 + step) * factor for step, factor in enumerate(factors))
    assert group["effective_sum"] == pytest.approx(effective, rel=1e-5)
    fit(tmp_path, RecorderCallback(tmp_path / "value", at=[6]), gradient_clip_algorithm="value", **options)
    (record,) = records(tmp_path / "value").values()
    assert "effective_sum" not in record["groups"][0]


def test_several_optimizers_by_hand_count_as_one_step(tmp_path):
    fit(tmp_path, RecorderCallback(tmp_path / "ck", every=6), Manual())
    found = records(tmp_path / "ck")
    assert list(found) == [6, 12]
    groups = {name: group for group in found[6]["groups"] for name in group["parameters"]}
    assert groups["net.weight"]["learning_rate_sum"] == pytest.approx(3.0)
    assert groups["net.bias"]["learning_rate_sum"] == pytest.approx(1.5)
    assert "effective_sum" not in groups["net.bias"]  # whoever steps by hand may clip by hand


def test_a_resumed_training_is_recorded_as_one_that_was_not(tmp_path):
    def saving():
        return pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="at_{step}")

    fit(tmp_path, RecorderCallback(tmp_path / "whole", every=4), Module(momentum=0.9))
    callback = RecorderCallback(tmp_path / "parts", every=4)
    fit(tmp_path, callback, Module(momentum=0.9), callbacks=[saving()])
    (tmp_path / "parts" / "step_00000011.pt").touch()  # of a run that was abandoned
    callback = RecorderCallback(tmp_path / "parts", every=4)
    resumed = str(tmp_path / "at_step=6.ckpt")
    fit(tmp_path, callback, Module(momentum=0.9), resumed, callbacks=[saving()])
    whole, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert list(parts) == list(whole) == [4, 8, 12]
    assert [record["groups"] for record in parts.values()] == [record["groups"] for record in whole.values()]
    assert [record["loss"] for record in parts.values()] == pytest.approx([r["loss"] for r in whole.values()])


def test_a_callback_that_joins_a_resumed_training_counts_from_there(tmp_path):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="at_{step}")
    fit(tmp_path, saving, callbacks=[pl.callbacks.Timer()])
    fit(tmp_path, RecorderCallback(tmp_path / "ck", every=4), ckpt_path=str(tmp_path / "at_step=6.ckpt"))
    found = {step: record["groups"][0]["steps"] for step, record in records(tmp_path / "ck").items()}
    assert found == {8: 2, 12: 4}


def test_a_training_without_an_end_needs_every_or_at(tmp_path):
    with pytest.raises(ArgumentError, match="count=10 needs the number of optimizer steps"):
        fit(tmp_path, RecorderCallback(tmp_path / "ck"), max_epochs=-1)
