"""Adapters of PEFT, made by it: what they hold comes from the file, the base from the model."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import gradindex
from gradindex import Checkpoint, find_checkpoints
from gradindex.errors import CheckpointError

peft = pytest.importorskip("peft", reason="needs peft, of the extra dev")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["head"]),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["first"], use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["first"], feedforward_modules=[]),
    "embedding": lambda: peft.LoraConfig(r=2, target_modules=["words", "first"]),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.first, self.head = nn.Embedding(10, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.first(self.words(ids).mean(1))))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


DATA = [(torch.randint(0, 10, (4,), generator=torch.Generator().manual_seed(i)), i % 3) for i in range(6)]


def adapted(kind, base_seed=0, seed=1):
    torch.manual_seed(base_seed)
    base = Net()
    torch.manual_seed(seed)
    return peft.get_peft_model(base, KINDS[kind]())


def shaken(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def saved(model, folder, steps=(3, 20)):
    weights = []
    for step in steps:
        weights.append(shaken(model, step))
        model.save_pretrained(folder / f"checkpoint-{step}")
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_fitted_to_the_adapted_model(tmp_path, kind):
    weights = saved(adapted(kind), tmp_path)
    model = adapted(kind, seed=2)
    found = find_checkpoints(tmp_path, learning_rate=[0.2, 0.1])
    assert [item.step for item in found] == [3, 20]
    for item, expected in zip(found, weights, strict=True):
        loaded = item.read(model)
        assert loaded.kind == "PEFT adapter"
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in expected.items())
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert set(loaded.from_base).isdisjoint(trained)
        assert set(loaded.from_base) == set(expected) - trained


def test_scores_of_adapters_are_those_of_the_trained_parameters(tmp_path):
    weights = saved(adapted("lora"), tmp_path)
    model = adapted("lora", seed=2)
    task = gradindex.Task(model, loss, DATA, find_checkpoints(tmp_path, learning_rate=[0.2, 0.1]))
    found = gradindex.exact_scores(task, DATA)
    expected = np.zeros((6, 6))
    model.double().eval()
    for rate, state in zip((0.2, 0.1), weights, strict=True):
        model.load_state_dict(state)
        rows = []
        for ids, label in DATA:
            model.zero_grad()
            loss(model, (ids[None], torch.tensor([label]))).sum().backward()
            rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        rows = torch.stack(rows)
        expected += rate * (rows @ rows.T).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_file_of_an_adapter_is_the_adapter(tmp_path):
    weights = saved(adapted("lora"), tmp_path)
    found = find_checkpoints(tmp_path / "*" / "adapter_model.safetensors", learning_rate=0.1)
    assert [item.step for item in found] == [3, 20]
    loaded = found[0].load(adapted("lora", seed=2))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights[0].items())


def test_of_several_adapters_the_one_of_the_folders_name_is_meant(tmp_path):
    model = adapted("lora")
    model.add_adapter("second", KINDS["lora"]())
    model.set_adapter("second")
    weights = shaken(model, 5)
    model.save_pretrained(tmp_path)
    other = adapted("lora", seed=2)
    other.add_adapter("second", KINDS["lora"]())
    loaded = Checkpoint(tmp_path / "second", 0.1).load(other)
    own = {name for name in weights if ".second." in name}
    assert own
    assert all(torch.equal(loaded[name], weights[name]) for name in own)
    assert all(torch.equal(loaded[name], other.state_dict()[name]) for name in weights.keys() - own)


def without_base(folder):
    return Net()


def of_another_rank(folder):
    return peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=["first"], modules_to_save=["head"]))


def of_another_scale(folder):
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["first"], modules_to_save=["head"])
    return peft.get_peft_model(Net(), config)


def of_other_modules(folder):
    return peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["first", "words"], modules_to_save=["head"]))


def without_weights(folder):
    (folder / "adapter_model.safetensors").unlink()
    return adapted("lora")


def without_numbers(folder):
    path = folder / "adapter_config.json"
    path.write_text(path.read_text()[:40])
    return adapted("lora")


BAD = {
    without_base: r"holds an adapter, but the task's model has none.*PeftModel\.from_pretrained\(base, path, is_tr",
    of_another_rank: r"adapter_config\.json has r 2, but the model's adapter 'default' has 3",
    of_another_scale: r"has lora_alpha 8, but the model's adapter 'default' has 2",
    of_other_modules: r"does not fit the model's adapter 'default': base_model\.model\.words\.lora_embedding_A\.def",
    without_weights: r"has adapter_config\.json, but no weights",
    without_numbers: r"adapter_config\.json cannot be read as JSON",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.__name__)
def test_adapters_that_do_not_fit_are_refused_in_one_line(tmp_path, case):
    saved(adapted("lora"), tmp_path / "run", steps=(3,))
    model = case(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(CheckpointError, match=BAD[case]) as raised:
        task = gradindex.Task(model, loss, DATA, Checkpoint(tmp_path / "run" / "checkpoint-3", 0.1))
        gradindex.build(task, tmp_path / "store")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "store").exists()


def test_an_adapter_trained_by_the_trainer_has_its_rates_and_moments(made_once):
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra dev")

    class Lossy(Net):
        def forward(self, ids, labels):
            logits = super().forward(ids)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def train(folder):
        torch.manual_seed(0)
        model = peft.get_peft_model(Lossy(), KINDS["lora"]())
        arguments = transformers.TrainingArguments(
            str(folder / "run"), max_steps=4, save_steps=2, learning_rate=0.02, per_device_train_batch_size=2,
            logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        data = [{"ids": ids, "labels": label} for ids, label in DATA]
        transformers.Trainer(model, arguments, train_dataset=data).train()
        torch.save(model.state_dict(), folder / "true.pt")

    folder = made_once("trainer peft", train)
    torch.manual_seed(0)
    model = peft.get_peft_model(Lossy(), KINDS["lora"]())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = find_checkpoints(folder / "run")
    assert [item.step for item in found] == [2, 4]
    assert [set(item.learning_rates(trained, model).values()) for item in found] == [{0.015}, {0.005}]
    loaded = found[1].read(model)
    assert loaded.kind == "Hugging Face Trainer, PEFT adapter"
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in torch.load(folder / "true.pt").items())
    assert found[1].second_moments(model).keys() == set(trained)
    assert found[1].recorded_training(trained, model) == dict.fromkeys(trained, True)
    shutil.copytree(folder / "run", folder / "copy", dirs_exist_ok=True)
    path = folder / "copy" / "checkpoint-4" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
    with pytest.raises(CheckpointError, match="has use_rslora True, but the model's adapter 'default' has False"):
        find_checkpoints(folder / "copy")[1].load(model)
