"""Situations that hooks meet badly: right on some route, or an error that names the module; against autograd."""

from functools import partial

import numpy as np
import pytest
import torch
import toys
from reference import check_against_autograd, check_everything
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

import gradindex
from gradindex.errors import UserCodeError
from gradindex.projection import Projection


class NoGrad(nn.Module):
    """``encode`` runs the encoder without a gradient; its own head is trained."""

    def __init__(self, encode):
        super().__init__()
        self.encoder, self.scale, self.head = nn.Linear(6, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)
        self.encode = encode

    def forward(self, x):
        return self.head(self.encode(self, x).tanh())


def under_no_grad(model, x):
    with torch.no_grad():
        return model.encoder(x) * model.scale


def under_inference_mode(model, x):
    with torch.inference_mode():
        features = model.encoder(x) * model.scale
    return features.clone()


@torch.no_grad()
def decorated(model, x):
    return model.encoder(x) * model.scale


def detached(model, x):
    return (model.encoder(x) * model.scale).detach()


def switched(model, x):
    with torch.set_grad_enabled(False):
        return model.encoder(x) * model.scale


def target_and_online(model, x):
    """The same layer with and without a gradient, as in self-distillation."""
    with torch.no_grad():
        target = model.encoder(x.flip(1)) * model.scale
    return model.encoder(x) * model.scale - target


@pytest.mark.slow
@pytest.mark.parametrize(
    "encode", [under_no_grad, under_inference_mode, decorated, detached, switched, target_and_online]
)
def test_what_runs_without_a_gradient_has_none(tmp_path, encode):
    check = partial(check_everything, folder=tmp_path) if encode is under_no_grad else check_against_autograd
    routes = check(toys.make_task(tmp_path, NoGrad(encode)))
    assert routes["head"] == "linear"


class Frozen(nn.Sequential):
    """Its forward is without a gradient, whoever calls it."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def test_a_module_whose_forward_is_decorated_has_no_gradient(tmp_path):
    class Lone(nn.Linear):
        forward = torch.no_grad()(nn.Linear.forward)

    model = nn.Sequential(Frozen(nn.Linear(6, 5), nn.Tanh()), Lone(5, 5), nn.Linear(5, 3))
    assert check_against_autograd(toys.make_task(tmp_path, model))["2"] == "linear"


class Shared(nn.Module):
    """A layer that is called as ``use(layer, x, items)`` says, on examples and on items that all examples share."""

    def __init__(self, use, n_items=4):
        super().__init__()
        self.layer, self.head, self.use = nn.Linear(6, 5), nn.Linear(5, 3), use
        self.register_buffer("items", torch.randn(n_items, 6))

    def forward(self, x):
        return self.head(self.use(self.layer, x, self.items).tanh())


SHARED = {
    "examples and prototypes": lambda f, x, items: f(x) @ f(items).T @ f(items),
    "prototypes first": lambda f, x, items: (f(items)[:, None] - f(x)).square().mean(0),
    "prototypes alone": lambda f, x, items: x[:, :5] + (x @ items.T).softmax(1) @ f(items),
    "mean of the prototypes": lambda f, x, items: x[:, :5] * f(items).mean(0),
    "pairs in one call": lambda f, x, items: torch.mul(*f(torch.cat([x, x.flip(1)])).chunk(2)),
    "pairs in turn": lambda f, x, items: f(torch.stack([x, x.flip(1)], 1).flatten(0, 1)).unflatten(0, (-1, 2)).prod(1),
    "over time": lambda f, x, items: sum(f(x.roll(t, 1)).tanh() for t in range(3)),
    "time in a list": lambda f, x, items: torch.stack([f(x + t) for t in range(4)]).tanh().mean(0),
    "one item": lambda f, x, items: f(x) * f(items[:1]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("n_items", [2, 5])  # as many as the check compares, and as the scores' batches have
@pytest.mark.parametrize("case", SHARED)
def test_a_layer_on_examples_and_on_shared_items_equals_autograd(tmp_path, case, n_items):
    routes = check_against_autograd(toys.make_task(tmp_path, Shared(SHARED[case], n_items)))
    assert routes["head"] == "linear"
    if case in ("over time", "time in a list"):
        assert routes["layer"] == "linear"


def weights_by(wrap):
    layers = [nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 4), nn.Linear(4, 3)]
    layers[0] = wrap(layers[0])
    layers[3] = wrap(layers[3])
    return nn.Sequential(*layers)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + 0.1 * weight.roll(1, 0)


def user_defined(layer):
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return parametrize.register_parametrization(layer, "bias", nn.Softplus())


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 0.3)


COMPUTED = {
    "old weight norm": nn.utils.weight_norm,
    "old weight norm, whole": lambda layer: nn.utils.weight_norm(layer, dim=None),
    "old spectral norm": nn.utils.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "user's own": user_defined,
    "pruned": pruned,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("case", COMPUTED)
def test_weights_that_are_computed_equal_autograd_and_come_back(tmp_path, case):
    torch.manual_seed(2)
    model = weights_by(COMPUTED[case]).train()
    with torch.no_grad():
        model(torch.randn(4, 1, 6))
    task = toys.make_task(tmp_path, model, shape=(1, 6))
    model = task.model.double().train()  # of the checkpoint that was saved last
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = {(i, name): value for i, layer in enumerate(model) for name, value in vars(layer).items()}
    gradindex.exact_scores(task, list(task.query), precision="float64")
    assert {(i, name) for i, layer in enumerate(model) for name in vars(layer)} == set(plain)
    assert all(vars(model[i])[name] is value for (i, name), value in plain.items() if isinstance(value, torch.Tensor))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model(torch.randn(2, 1, 6).double()).sum().backward()
    check_against_autograd(task)


class Spectral(nn.Module):
    """A complex weight between two Fourier transforms, and a complex buffer that turns."""

    def __init__(self, bare=False):
        super().__init__()
        self.lift, self.out = nn.Linear(6, 4), nn.Linear(4, 3)
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.mix = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x):
        modes = torch.fft.rfft(self.lift(x)) * self.turn
        return self.out(torch.fft.irfft((modes * self.weight) @ self.mix * self.gain, n=4).tanh())


class ComplexLinear(nn.Module):
    """Whole layers of complex weights; the loss sees an absolute value."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 4, dtype=torch.complex64), nn.Linear(4, 3, dtype=torch.complex64)

    def forward(self, x):
        hidden = self.inner(x.to(self.inner.weight.dtype))
        return self.outer(hidden * hidden.abs()).abs()


def complex_task(folder, model, **options):
    task = toys.make_task(folder, model, rates=(0.1,), **options)
    for parameter in model.parameters():  # toys leave what is complex as it is
        assert parameter.abs().sum() > 0
    return task


@pytest.mark.slow
@pytest.mark.parametrize("make", [Spectral, ComplexLinear])
def test_complex_weights_have_the_inner_product_of_their_real_and_imaginary_parts(tmp_path, make):
    task = complex_task(tmp_path, make())
    model = task.model
    wide = {name: p.to(torch.complex128 if p.is_complex() else torch.float64) for name, p in model.named_parameters()}
    buffers = {name: buffer.to(torch.complex128) for name, buffer in model.named_buffers()}

    def gradients(items):
        rows = []
        for x, label in items:
            leaves = {name: p.detach().requires_grad_() for name, p in wide.items()}
            logits = torch.func.functional_call(model, leaves | buffers, (x[None],))
            found = torch.autograd.grad(functional.cross_entropy(logits, label[None]), list(leaves.values()))
            real = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in found]
            rows.append(torch.cat([gradient.flatten() for gradient in real]))
        return torch.stack(rows)

    rows = gradients(task.train)
    truth = (0.1 * gradients(task.query) @ rows.T).numpy()
    for precision, tolerance in (("float64", 1e-10), ("float32", 1e-4)):
        for count in (1, 4):  # along the queries' gradients, and by per-example gradients
            found = gradindex.exact_scores(task, list(task.query)[:count], precision=precision)
            np.testing.assert_allclose(found, truth[:count], atol=tolerance * np.abs(truth).max())
    store = gradindex.build(task, tmp_path / "store", projection=Projection("none"))
    np.testing.assert_allclose(store.self_influence()[:, 0], 0.1 * rows.square().sum(1), rtol=1e-4)
    np.testing.assert_allclose(np.square(store.rows(np.arange(12))).sum(1), 0.1 * rows.square().sum(1), rtol=1e-4)


class FixedType(nn.Module):
    """Its second layer gets a type that its code fixes."""

    def __init__(self, dtype, last):
        super().__init__()
        self.first, self.last, self.dtype = nn.Linear(6, 5), last, dtype

    def forward(self, x):
        return self.last(self.first(x).to(self.dtype).unsqueeze(1)).flatten(1)


@pytest.mark.parametrize("last", [nn.Linear(5, 3), nn.Conv1d(1, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_type_that_the_model_fixes_is_named_with_its_layer(tmp_path, dtype, last):
    task = toys.make_task(tmp_path, FixedType(dtype, last), rates=(0.1,))
    with pytest.raises(UserCodeError, match=rf"forward pass of last \({type(last).__name__}\).* of float32 here") as e:
        gradindex.build(task, tmp_path / "store")
    assert ("precision='float64'" in str(e.value)) == (dtype == torch.float64)
    if dtype == torch.float64:
        gradindex.build(task, tmp_path / "store", precision="float64")
