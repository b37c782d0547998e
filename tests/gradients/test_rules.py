"""Layer rules: one class and one registration each, used where autograd agrees."""

import pytest
import reference
import torch
import toys
from torch import nn

from gradindex.factors import Formed
from gradindex.gradients.rules import RULES, Plain


class Scaling(nn.Module):
    """x times a weight for each feature."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return x * self.weight


def model():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Scaling(5), nn.Linear(5, 3))


@pytest.fixture
def rule(request):
    factor = request.param

    @RULES.register("scaling")
    class Rule(Plain):
        def shape(self, module, names):
            return (module.weight.numel(), 1) if type(module) is Scaling else None

        def gradients(self, module, saved, delta, scales):
            return Formed((saved * delta)[:, :, None] * scales["weight"] * factor)

    yield
    del RULES._implementations["scaling"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [1], indirect=True)
def test_a_toy_rule_is_used_and_agrees_with_autograd(rule, tmp_path):
    routes = reference.check_everything(toys.make_task(tmp_path, model()), tmp_path)
    assert routes == {"0": "linear", "2": "scaling", "3": "linear"}


@pytest.mark.slow
@pytest.mark.parametrize("rule", [1.01], indirect=True)
def test_a_rule_that_disagrees_with_autograd_is_not_used(rule, tmp_path):
    routes = reference.check_everything(toys.make_task(tmp_path, model()), tmp_path)
    assert routes == {"0": "linear", "2.weight": "function", "3": "linear"}
