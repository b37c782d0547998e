"""Whole architectures in float64 against autograd on each example alone, all parameters."""

import os

import pytest
import torch
import toys
from reference import check_against_autograd
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Of which parameters something is expected to leave the hooks; all else must stay on them.
GENERAL = {"vmap", "loop"}


class ConvNeXt(nn.Module):
    """Depthwise convolution, layer norm over channels, an inverted bottleneck, a bare scale, a residual."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 2, 2)
        self.depthwise, self.norm = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6)
        self.up, self.down, self.scale = nn.Linear(6, 12), nn.Linear(12, 6), nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.scale * self.down(functional.gelu(self.up(h)))
        return self.head((x + h.permute(0, 3, 1, 2)).mean((2, 3)))


class ViT(nn.Module):
    """Patches, a class token and positions as bare parameters, one encoder layer."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, 4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])


class LoRA(nn.Module):
    """A frozen linear layer and a low-rank update of it."""

    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.base(x) + 0.5 * self.b(self.a(x))))


def residual():
    class Block(nn.Sequential):
        def forward(self, x):
            return torch.relu(x + super().forward(x))

    def conv(i, o, **options):
        return nn.Conv2d(i, o, 3, padding=1, bias=False, **options), nn.BatchNorm2d(o)

    block = Block(*conv(4, 4), nn.ReLU(inplace=True), *conv(4, 4))
    return nn.Sequential(
        *conv(2, 4, stride=2), nn.ReLU(inplace=True), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


ATTENTION = [f"encoder.self_attn.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
NETWORKS = {
    "ResNet": (residual, (2, 8, 8), "*", set()),
    "ConvNeXt": (ConvNeXt, (2, 8, 8), "*", set()),
    "ViT": (ViT, (2, 8, 8), "*", set(ATTENTION)),
    "LoRA": (LoRA, (6,), ["a", "b"], set()),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", NETWORKS)
def test_networks_equal_autograd(tmp_path, case):
    make, shape, layers, general = NETWORKS[case]
    prefixes = ("",) if layers == "*" else tuple(f"{name}." for name in layers)
    routes = check_against_autograd(toys.make_task(tmp_path, make(), shape=shape, layers=layers), prefixes=prefixes)
    assert {name for name, route in routes.items() if route in GENERAL} == general


def words(n, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    return [
        {"input_ids": torch.randint(1, 30, (length,), generator=generator), "label": i % 2}
        for i, length in enumerate(lengths)
    ]


def padded(items):
    ids = pad_sequence([item["input_ids"] for item in items], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "label": torch.tensor([item["label"] for item in items]),
    }


def language_loss(model, batch):
    """Mean over the tokens of each example, padding left out."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses * mask).sum(1) / mask.sum(1)


def label_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(logits, batch["label"], reduction="none")


def gpt2(transformers):
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2, attn_implementation="eager"
    )
    return transformers.GPT2LMHeadModel(config), language_loss


def bert(transformers):
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), label_loss


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers and what it imports
@pytest.mark.parametrize("make", [gpt2, bert])
def test_language_models_with_padding_equal_autograd(tmp_path, make):
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers, which the extra dev does not install"
    )
    model, loss = make(transformers)
    task = toys.make_task(tmp_path, model, loss=loss, train=words(6, 0), query=words(3, 1), collate=padded)
    routes = check_against_autograd(task)
    # The output layer of GPT-2 is its embedding, and its positions are looked up once for all examples.
    assert not {name for name, route in routes.items() if route in GENERAL}
