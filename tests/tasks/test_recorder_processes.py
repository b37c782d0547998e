"""Recorder where two processes train one model, over gloo on this machine."""

import pytest
import torch
import toys
from together import run_together

import gradindex

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="needs torch.distributed with gloo",
    ),
]

KINDS = ("ddp", "fsdp1", "fsdp2")
# Run by both processes: trains, records, and compares what the first one wrote with the whole weights.
WORKER = """
import sys, warnings
import torch
from torch import nn
import together
import toys
import gradindex

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()


def train(kind, folder):
    torch.manual_seed(0)
    model = toys.mlp()
    model.register_buffer("scale", torch.ones(2))
    model = together.wrapped(model, kind)
    moments = kind != "fsdp1"
    kinds = torch.optim.Adam if moments else torch.optim.SGD
    optimizer = kinds(model.parameters(), 0.5)
    recorder = gradindex.Recorder(model, optimizer, folder, second_moments=moments)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        for _ in range(3):
            together.step(model, optimizer, generator)
        path = recorder.save()
        torch.distributed.barrier()
        assert path.is_file()
    if rank == 1:
        assert recorder.step == 6


for kind in sys.argv[2:]:
    train(kind, f"{sys.argv[1]}/{kind}")
torch.distributed.destroy_process_group()
"""


def expected():
    """The same training in one process: both batches' mean losses, averaged."""
    torch.manual_seed(0)
    model = toys.mlp()
    return model, [torch.Generator().manual_seed(rank) for rank in range(2)]


def run(folder):
    (folder / "worker.py").write_text(WORKER)
    run_together(folder / "worker.py", folder, *KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_process_writes_whole_weights(made_once, kind):
    first, second = gradindex.find_checkpoints(made_once("recorded together", run) / kind)
    assert (first.step, second.step) == (3, 6)
    model, generators = expected()
    make = torch.optim.SGD if kind == "fsdp1" else torch.optim.Adam
    optimizer = make(model.parameters(), 0.5)
    for checkpoint in (first, second):
        for _ in range(3):
            optimizer.zero_grad()
            for generator in generators:
                (model(torch.randn(4, 6, generator=generator)).square().mean() / 2).backward()
            optimizer.step()
        found = torch.load(checkpoint.path, weights_only=True)
        assert set(found["model"]) == {*dict(model.named_parameters()), "scale"}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found["model"][name], parameter.detach(), rtol=1e-4, atol=1e-5)
        steps = {name: group["steps"] for group in found["gradindex"]["groups"] for name in group["parameters"]}
        assert steps == dict.fromkeys(dict(model.named_parameters()), 3)
        if kind == "fsdp1":
            assert {g["effective_sum"] for g in found["gradindex"]["groups"]} == {1.5}
            continue
        beta, taken = optimizer.defaults["betas"][1], checkpoint.step
        for name, parameter in model.named_parameters():
            v = optimizer.state[parameter]["exp_avg_sq"] / (1 - beta**taken)
            torch.testing.assert_close(found["gradindex"]["second_moments"][name], v, rtol=1e-3, atol=1e-6)
