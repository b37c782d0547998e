"""The protocols by which attribution is judged: trainings as PyTorch would make them, and what the quick form finds."""

import importlib
import json
import sys
from dataclasses import replace

import pytest
import torch
from places import TOP
from torch import nn
from torch.nn import functional

QUALITY = str(TOP / "scripts" / "quality")


@pytest.fixture
def protocols(monkeypatch):
    monkeypatch.syspath_prepend(QUALITY)
    for name in ("protocols", "reference"):  # the tests have a module "reference" of their own
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("protocols")
    for name in ("protocols", "reference"):
        sys.modules.pop(name, None)


@pytest.fixture
def digits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(150, 28, 28, generator=generator), torch.randint(10, (150,), generator=generator)


def test_gradients_that_are_written_out_are_those_of_autograd(protocols, digits):
    torch.manual_seed(0)
    model = protocols.make_mlp().double()
    layers = [module for module in model if isinstance(module, nn.Linear)]
    images, labels = digits[0].double(), digits[1]
    masks = [torch.rand(150, n, dtype=torch.float64).round() / 0.9 for n in (128, 64)]
    with torch.no_grad():
        protocols.write_gradients(layers, images.flatten(1), labels, masks)
    written = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    hidden = images.flatten(1)
    for layer, mask in zip(layers, masks, strict=False):
        hidden = layer(hidden).relu() * mask
    functional.cross_entropy(layers[-1](hidden), labels).backward()
    for one, parameter in zip(written, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-12, atol=1e-14)


def test_a_training_is_that_of_a_plain_loop(protocols, digits):
    images, labels = digits
    found = protocols.train(protocols.REGRESSION, images, labels, 7, epochs=2)
    torch.manual_seed(7)
    model = protocols.make_regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    order = torch.Generator().manual_seed(7)
    for _ in range(2):
        for rows in torch.randperm(150, generator=order).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-6)
    assert not found.training


def test_a_seed_decides_a_training_and_each_subset_has_another_initialisation(protocols, digits):
    before = torch.get_rng_state()
    mlp = replace(protocols.MLP, epochs=1)
    weights = [protocols.train(mlp, *digits, seed)[1].weight for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    ids = torch.arange(5).numpy()
    assert len({protocols.seed_of("subset", one, seed) for one in (ids, ids[1:]) for seed in (0, 1)}) == 4
    assert protocols.seed_of("subset", ids, 3) == 16984398129525409


def test_the_quick_form_of_lds_finds_scores_ceilings_and_keeps_trainings(quick_forms):
    folder = quick_forms[1] / "quality"
    found = json.loads((folder / "lds.log").read_text().splitlines()[-1])
    figures = {figure["name"]: figure["value"] for figure in found["figures"]}
    for name in ("mnist-mlp", "mnist-lr"):
        assert 0 <= figures[f"{name}: ceiling of one seed"] <= figures[f"{name}: ceiling of the mean of 2"] <= 1
        rows = {row["scores"]: row for row in found["tables"][f"{name}: LDS"]}
        assert set(rows) == {
            "tracin, one run", "whitened, one run", "whitened-exact, one run", "loss", "random", "tracin, three runs",
            "whitened, three runs", "whitened-exact, three runs", "ekfac, one run", "ekfac, three runs",
        }  # fmt: skip
        assert all(row["queries"] == 20 for row in rows.values())
    # Even a few trainings of three epochs tell scores of a convex model from chance.
    assert rows["tracin, one run"]["LDS of one seed"] > rows["random"]["LDS of one seed"]
    assert "## mnist-mlp: LDS" in (folder / "lds.md").read_text()


def test_the_quick_form_of_settings_compares_checkpoints_and_removals(quick_forms):
    found = json.loads((quick_forms[1] / "quality" / "settings.log").read_text().splitlines()[-1])
    tables = found["tables"]
    assert [row["after epochs"] for row in tables["numbers and checkpoints"]] == ["all", "first"]
    assert [row["without"] for row in tables["removal of the top 1%"]] == ["whitened", "tracin", "random"]
    (whole, _), (same,) = tables["numbers and checkpoints"], tables["damping"]
    assert same["LDS of one seed"] == whole["LDS of one seed"]  # by the default damping
    assert [row["geometry"] for row in tables["geometries"]] == ["tracin", "whitened"]
    assert tables["geometries"][1]["LDS of one seed"] == pytest.approx(whole["LDS of one seed"], abs=0.02)
