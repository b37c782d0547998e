"""Half precision on CUDA, memory layouts, and modules that hide what they do."""

import contextlib

import numpy as np
import pytest
import torch
import toys
from click.testing import CliRunner
from reference import check_against_autograd
from torch import nn

import gradindex
from gradindex.cli import main
from gradindex.errors import ArgumentError, CheckpointError, NonFiniteGradientError, TaskError
from gradindex.gradients import Engine, check_routes, precision
from gradindex.projection import Projection

WHOLE = Projection("none")


@pytest.fixture
def task(tmp_path):
    return toys.make_task(tmp_path, toys.convolutional(), shape=(2, 8, 8), n_train=40)


def test_float16_is_for_cuda_devices(task, tmp_path):
    with pytest.raises(ArgumentError, match="precision is 'float16', but that is for CUDA devices, and this is 'cpu'"):
        gradindex.build(task, tmp_path / "store", precision="float16")


@pytest.fixture
def half_on_cpu(monkeypatch):
    """What CUDA does in float16, done slowly by the processor."""
    monkeypatch.setattr("gradindex.gradients.engine.check_precision", lambda *_: None)


@pytest.mark.slow
def test_float16_rows_point_where_float32_rows_do(task, tmp_path, half_on_cpu):
    exact, rough = (
        gradindex.build(task, tmp_path / p, projection=WHOLE, precision=p).rows(np.arange(40))
        for p in ("float32", "float16")
    )
    cosines = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert cosines.min() > 0.999
    assert np.abs(exact - rough).max() > 1e-5  # it was used
    hits = gradindex.load(task, tmp_path / "float16").proponents(range(4), k=5, candidates=40)
    truth = gradindex.exact_scores(task, list(task.query))
    np.testing.assert_allclose(hits.scores, -np.sort(-truth, 1)[:, :5], rtol=1e-4)


def faint(factor):
    return lambda model, batch: toys.cross_entropy(model, batch) * factor


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-6, 1.0, 300.0, 30_000.0])
@pytest.mark.parametrize("model", [toys.mlp, lambda: nn.Sequential(nn.Linear(6, 5), nn.PReLU(), nn.Linear(5, 3))])
def test_losses_are_scaled_so_that_float16_neither_underflows_nor_overflows(tmp_path, half_on_cpu, factor, model):
    task = toys.make_task(tmp_path, model(), loss=faint(factor), n_train=40)
    exact, rough = (
        gradindex.build(task, tmp_path / p, projection=WHOLE, precision=p).rows(np.arange(40))
        for p in ("float32", "float16")
    )
    assert np.abs(exact - rough).max() < 0.01 * np.abs(exact).max()


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-6, 300.0, 30_000.0])
@pytest.mark.parametrize("count", [2, 20])  # with few queries, the second layer is compared along their gradients
def test_exact_scores_and_fits_in_float16_are_scaled_as_well(tmp_path, half_on_cpu, factor, count):
    model = nn.Sequential(nn.Linear(6, 5), nn.PReLU(), nn.Linear(5, 3))
    task = toys.make_task(tmp_path, model, loss=faint(factor), n_train=40, n_query=count)
    exact, rough = (gradindex.exact_scores(task, list(task.query), precision=p) for p in ("float32", "float16"))
    assert np.abs(exact - rough).max() < 0.01 * np.abs(exact).max()
    fitted = Projection("fitted", 20)
    rows = [gradindex.build(task, tmp_path / p, projection=fitted, precision=p) for p in ("float32", "float16")]
    exact, rough = (store.rows(np.arange(40)) @ store.rows(np.arange(40)).T for store in rows)
    assert np.abs(exact - rough).max() < 0.05 * np.abs(exact).max()


def test_what_overflows_in_float16_at_any_scale_is_named(tmp_path, half_on_cpu):
    task = toys.make_task(tmp_path, loss=faint(1e9))
    with pytest.raises(NonFiniteGradientError, match="a NaN or infinite gradient at checkpoint 0"):
        gradindex.build(task, tmp_path / "store", precision="float16")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 4, 8, 8)])
def test_channels_last_changes_the_layout_and_not_the_numbers(tmp_path, shape, monkeypatch):
    dims = len(shape) - 1
    convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    model = nn.Sequential(convolution(2, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(2, *shape))
    task = toys.make_task(tmp_path, model, shape=shape, n_train=20)
    layouts = []
    run = Engine.run_hooked

    def spy(self, *args, **options):
        layout = torch.channels_last if dims == 2 else torch.channels_last_3d
        layouts.append(self.states[0]["model.0.weight"].is_contiguous(memory_format=layout))
        return run(self, *args, **options)

    monkeypatch.setattr(Engine, "run_hooked", spy)
    plain, last = (
        gradindex.build(task, tmp_path / str(on), projection=WHOLE, channels_last=on) for on in (False, True)
    )
    assert set(layouts[: len(layouts) // 2]) == {False}
    assert set(layouts[len(layouts) // 2 :]) == {True}
    np.testing.assert_allclose(last.rows(np.arange(20)), plain.rows(np.arange(20)), rtol=1e-4, atol=1e-5)
    assert last.manifest.fingerprint == plain.manifest.fingerprint


class Flattening(nn.Module):
    """A view that needs the channels first."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Conv2d(2, 4, 3), nn.Linear(144, 3)

    def forward(self, x):
        return self.head(self.inner(x).view(len(x), -1))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "expected"), [(toys.convolutional, True), (Flattening, False), (toys.mlp, False)])
def test_channels_come_last_where_the_model_can_have_that(tmp_path, model, expected):
    shape = (6,) if model is toys.mlp else (2, 8, 8)
    task = toys.make_task(tmp_path, model(), shape=shape)
    with Engine(task) as engine:
        check_routes(engine)
        assert engine.channels_last == expected
    first, own = (gradindex.build(task, tmp_path / str(on), projection=WHOLE, channels_last=on) for on in (False, None))
    np.testing.assert_allclose(own.rows(np.arange(12)), first.rows(np.arange(12)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "expected"), [([], True), (["--channels-last"], True), (["--channels-first"], False)]
)
def test_the_command_line_leaves_the_layout_to_the_build_unless_told(task, tmp_path, monkeypatch, option, expected):
    monkeypatch.setattr("gradindex.task.load_task", lambda name: task)
    checked = []

    def spy(engine):
        check_routes(engine)
        checked.append(engine.channels_last)

    monkeypatch.setattr("gradindex.filling.check_routes", spy)
    done = CliRunner().invoke(main, ["build", "mine.py:task", "--out", str(tmp_path / "store"), *option])
    assert done.exit_code == 0
    assert checked == [expected]


def test_channels_last_that_cannot_be_had_is_refused(tmp_path):
    task = toys.make_task(tmp_path, Flattening(), shape=(2, 8, 8))
    with pytest.raises(ArgumentError, match=r"The model does not run with channels_last \(view size is not compatible"):
        gradindex.build(task, tmp_path / "store", channels_last=True)


class Quantised(nn.Linear):
    """Stands for a layer whose weights are packed."""


Quantised.__module__ = "torch.ao.nn.quantized.modules.linear"


class Packed(nn.Linear):
    """Stands for a layer whose weights are packed, but which passes gradients on."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.scale * self.weight.detach().to(x.dtype))


class Codes(nn.Parameter):
    """Stands for packed weights: without their scale they mean nothing."""


Packed.__module__ = Codes.__module__ = "bitsandbytes.nn.modules"


def packed(scale=0.5):
    """A frozen packed layer and an adapter beside it."""
    layer = Packed(6, 5, bias=False)
    layer.weight = Codes(torch.arange(30, dtype=torch.uint8).reshape(5, 6), requires_grad=False)
    layer.weight.scale = scale
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 3))


def test_packed_layers_under_what_is_tracked_stay_as_they_are(tmp_path):
    torch.manual_seed(0)
    task = toys.make_task(tmp_path, packed(0.01))
    routes = check_against_autograd(task)
    assert routes == {"2": "linear"}
    assert task.model[0].weight.scale == 0.01


def test_other_packed_weights_than_the_models_are_refused(tmp_path):
    task = toys.make_task(tmp_path, packed())
    task.model[0].weight.data += 1
    with pytest.raises(CheckpointError, match=r"has another 0\.weight than the model, which is quantised"):
        gradindex.build(task, tmp_path / "store")


def test_packed_layers_are_not_tracked(tmp_path):
    model = packed()
    model[0].weight.data = model[0].weight.data.half()  # some keep their codes in a type of floating point
    task = toys.make_task(tmp_path, model, layers="*")
    with pytest.raises(TaskError, match=r"0 \(Packed\) is quantised.*Track the adapters alone, with layers="):
        gradindex.build(task, tmp_path / "store")


def compiled_in_place(model):
    model[0].compile(backend="eager")
    return model


class DistributedDataParallel(nn.Module):
    """Stands for torch's, which needs a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda m: torch.compile(m, backend="eager"), "wrapped in OptimizedModule;"),
        (nn.DataParallel, "wrapped in DataParallel;"),
        (
            lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
            "wrapped in OptimizedModule and DistributedDataParallel;",
        ),
        (compiled_in_place, ""),
    ],
    ids=["compiled", "data parallel", "both", "compiled in place"],
)
def test_wrapped_models_are_unwrapped_with_a_word(tmp_path, capsys, wrap, said):
    task = toys.make_task(tmp_path)
    expected = gradindex.exact_scores(task, [0, 1])
    call = task.model[0]._compiled_call_impl
    wrapped = gradindex.Task(wrap(task.model), task.loss, task.train, task.checkpoints, task.query)
    assert ((said and f"The model is {said}") or "") in capsys.readouterr().err
    np.testing.assert_array_equal(gradindex.exact_scores(wrapped, [0, 1]), expected)
    assert wrapped.model is task.model
    assert (wrapped.model[0]._compiled_call_impl is not None) == (wrap is compiled_in_place)
    task.model[0]._compiled_call_impl = call


HIDING = {
    "a compiled part": (
        lambda m: nn.Sequential(torch.compile(m[0]), m[1], m[2]),
        "0 is compiled, so its weights cannot be swapped",
    ),
    "a parallel part": (
        lambda m: nn.Sequential(nn.DataParallel(m[0]), m[1], m[2]),
        r"0 is wrapped in DataParallel.*\(wrapped\.module\)",
    ),
    "scripted": (lambda m: nn.Sequential(Trace(m[0]).traced, m[1], m[2]), "0 is a TorchScript module"),
    "quantised": (lambda m: nn.Sequential(Quantised(6, 5), m[1], m[2]), r"0 \(Quantised\) is quantised"),
}


class Trace:
    """A traced module."""

    def __init__(self, module):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.traced = torch.jit.trace(module, torch.zeros(1, 6))


@pytest.mark.slow
@pytest.mark.parametrize("case", HIDING)
def test_modules_that_hide_what_they_do_are_refused_with_a_way_out(tmp_path, case):
    wrap, message = HIDING[case]
    task = toys.make_task(tmp_path)
    task = gradindex.Task(wrap(task.model), task.loss, task.train, task.checkpoints)
    with pytest.raises(TaskError, match=message):
        gradindex.build(task, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_parameters_that_are_no_floating_point_numbers_are_refused(tmp_path):
    model = toys.mlp()
    model.packed = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    task = toys.make_task(tmp_path, model, layers="*")
    with pytest.raises(TaskError, match=r"packed is of torch\.int8.*Leave it out, with layers="):
        gradindex.build(task, tmp_path / "store")


def test_frozen_parameters_are_tracked_when_asked_for(tmp_path):
    task = toys.make_task(tmp_path, layers="*")
    expected = gradindex.exact_scores(task, list(task.query))
    task.model.requires_grad_(False)
    np.testing.assert_array_equal(gradindex.exact_scores(task, list(task.query)), expected)


def functional_weights(model, batch):
    """A loss that computes with the weights and never calls the modules."""
    x, y = batch
    hidden = torch.relu(nn.functional.linear(x, model[0].weight, model[0].bias))
    logits = torch.addmm(model[2].bias, hidden, model[2].weight.T)
    return nn.functional.cross_entropy(logits, y, reduction="none")


def test_weights_used_without_their_modules_take_another_route(tmp_path):
    routes = check_against_autograd(toys.make_task(tmp_path, loss=functional_weights))
    assert routes == {"0.weight": "function", "0.bias": "function", "2.weight": "vmap", "2.bias": "vmap"}


def switches():
    """Where torch says that float32 may be rounded; some readings fail where only new switches were set."""
    found = [switch.fp32_precision for switch in precision._switches() if hasattr(switch, "fp32_precision")]
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("mixed")
    return found


@pytest.fixture(params=["as they are", "medium", "new switches"])
def rounding(request):
    """What a training script may have asked for, taken back afterwards."""
    if request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    elif request.param == "new switches":
        if not hasattr(torch.backends.cudnn, "conv"):
            pytest.skip("this torch has none")
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield switches()
    if request.param == "new switches":
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.set_float32_matmul_precision("highest")
    assert switches()[-2:] == ["highest", True]


def test_float32_is_float32_whatever_training_asked_for(tmp_path, rounding):
    """torch rounds CUDA's convolutions to 10 bits by default, which moved rows by 9%."""
    seen = []

    def loss(model, batch):
        seen.append(switches())
        return toys.cross_entropy(model, batch)

    gradindex.build(toys.make_task(tmp_path, loss=loss, n_train=4), tmp_path / "store")
    assert seen
    for found in seen:
        assert not {"tf32", "bf16", True, "medium"} & set(found)
    assert switches() == rounding


def test_the_last_thread_to_leave_puts_rounding_back(rounding):
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(precision.full_float32())
        inside = switches()
        second.enter_context(precision.full_float32())
        first.close()
        assert switches() == inside
    assert switches() == rounding


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_on_cuda(task, tmp_path, precision):
    exact = gradindex.build(task, tmp_path / "cpu", projection=WHOLE).rows(np.arange(40))
    store = gradindex.build(
        task, tmp_path / "cuda", projection=WHOLE, precision=precision, device="cuda", channels_last=True
    )
    rough = store.rows(np.arange(40))
    cosines = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert cosines.min() > 0.98
