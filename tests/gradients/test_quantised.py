"""Adapters on frozen quantised layers of bitsandbytes and torchao, where these are installed, and on a stand-in."""

import frameworks
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import gradindex
from gradindex.digests import digest
from gradindex.errors import MismatchError
from gradindex.gradients.layers import same_packed

pytestmark = pytest.mark.filterwarnings("ignore")  # of these libraries


class Adapted(nn.Module):
    """A frozen layer, and a product of two matrices beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(0.1 * torch.randn(2, base.in_features))
        self.b = nn.Parameter(0.1 * torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def task_of(layers, folder):
    """A task of two quantised layers, whose adapters alone are saved."""
    model = nn.Sequential(Adapted(layers[0]), nn.Tanh(), Adapted(layers[1]))
    data = TensorDataset(torch.randn(8, 64), torch.randint(0, 64, (8,)))
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save(weights, folder / "step_1.pt")
    checkpoints = gradindex.find_checkpoints(folder / "step_1.pt", learning_rate=0.1, base="model")
    return gradindex.Task(model, loss, data, checkpoints, query=TensorDataset(*data[:2]))


def check(task, folder):
    """Scores of a store are those of plain autograd through the quantised model, one example at a time."""
    rows, model = [], task.model.eval()
    for i in range(task.n_train):
        model.zero_grad()
        task.loss(model, task.collate([task.train[i]])).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).double())
    gradients = torch.stack(rows)
    truth = (0.1 * gradients[:2] @ gradients.T).numpy()
    tolerance = 1e-5 * np.abs(truth).max()
    np.testing.assert_allclose(gradindex.exact_scores(task, [0, 1]), truth, atol=tolerance)
    gradindex.build(task, folder / "store")
    hits = gradindex.load(task, folder / "store").proponents([0, 1], k=1)
    np.testing.assert_allclose(hits.scores[:, 0], truth.max(1), atol=tolerance)


def plain_layers():
    torch.manual_seed(0)
    return [nn.Linear(64, 64), nn.Linear(64, 64)]


def of_bitsandbytes(name, **options):
    nn_of = frameworks.imported("bitsandbytes").nn
    found = []
    for layer in plain_layers():
        quantised = getattr(nn_of, name)(64, 64, **options)
        quantised.load_state_dict(layer.state_dict())
        found.append(quantised.to("cpu"))  # which quantises
    assert not found[0].weight.is_floating_point()
    return found


def of_torchao(name, **options):
    quantization = frameworks.imported("torchao.quantization")
    model = nn.Sequential(*plain_layers())
    quantization.quantize_(model, getattr(quantization, name)(**options))
    assert type(model[0].weight.detach()) is not torch.Tensor
    return list(model)


REAL = {
    "4 bits of bitsandbytes": lambda: of_bitsandbytes("Linear4bit", compute_dtype=torch.float32, quant_type="nf4"),
    "8 bits of bitsandbytes": lambda: of_bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "8 bits of torchao": lambda: of_torchao("Int8WeightOnlyConfig"),
    "4 bits of torchao": lambda: of_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
}


@pytest.mark.parametrize("kind", REAL)
def test_adapters_on_quantised_layers_have_autograds_gradients(tmp_path, capfd, kind):
    task = task_of(REAL[kind](), tmp_path)
    check(task, tmp_path)
    said = capfd.readouterr().err
    assert "from the model, as its base." in said
    assert "filled in" not in said  # scales belong to the base as the codes do


@pytest.mark.slow
def test_an_adapter_on_four_bits_of_transformers(tmp_path):
    """QLoRA: peft on a Llama that was loaded in 4 bits."""
    frameworks.imported("bitsandbytes")
    transformers, peft = frameworks.imported("transformers"), frameworks.imported("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    narrow = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=narrow,
        dtype=torch.float32,
        device_map="cpu",
        attn_implementation="eager",
    )
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "run" / "checkpoint-1")
    texts = [{"input_ids": torch.randint(0, 64, (5,))} for _ in range(6)]
    checkpoints = gradindex.find_checkpoints(tmp_path / "run", learning_rate=0.1)
    check(gradindex.Task(model, gradindex.losses.causal_lm("sum"), texts, checkpoints, query=texts[:2]), tmp_path)


def two(a, b):
    """A tensor that is made of two, as those of torchao are of codes and scales."""
    return frameworks.imported("torch.testing._internal.two_tensor").TwoTensor(a, b)


def test_weights_that_are_made_of_tensors_are_told_apart_by_all_of_them():
    codes, scales = torch.arange(6.0), torch.ones(6)
    one = two(codes, scales)
    assert same_packed(one, two(codes.clone(), scales.clone()))
    assert digest([one]) == digest([two(codes.clone(), scales.clone())])
    for other in (two(codes + 1, scales), two(codes, 2 * scales)):
        assert not same_packed(one, other)
        assert digest([one]) != digest([other])
    assert not same_packed(codes, one)


class Scaled(nn.Linear):
    """Stands for a layer that saves the scale of its weight beside it, as bitsandbytes does, and is no buffer."""

    scale = torch.ones(())

    def forward(self, x):
        return self.scale * super().forward(x)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = self.scale


def test_the_scales_of_a_base_are_part_of_it(tmp_path, capsys):
    torch.manual_seed(0)
    task = task_of([Scaled(64, 64), Scaled(64, 64)], tmp_path)
    check(task, tmp_path)
    assert "filled in" not in capsys.readouterr().err
    task.model[0].base.scale = torch.full((), 2.0)
    with pytest.raises(MismatchError, match="checkpoints differ"):
        gradindex.load(task, tmp_path / "store")
