"""Precision, device, and norms by projection: what they change, and what they leave."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from click.testing import CliRunner
from torch import nn
from torch.utils.data import TensorDataset

import gradindex
from gradindex.cli import main
from gradindex.errors import ArgumentError, MismatchError
from gradindex.projection import Projection

WHOLE = Projection("none")
IMAGE = {"shape": (2, 8, 8), "n_train": 40}


@pytest.fixture
def task(tmp_path):
    return toys.make_task(tmp_path, toys.convolutional(), **IMAGE)


@pytest.mark.slow
def test_bfloat16_rows_point_where_float32_rows_do(task, tmp_path):
    stores = {p: gradindex.build(task, tmp_path / p, projection=WHOLE, precision=p) for p in ("float32", "bfloat16")}
    exact, rough = (store.rows(np.arange(40)) for store in stores.values())
    cosines = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert cosines.min() > 0.98
    assert np.abs(exact - rough).max() > 1e-4  # it was used
    np.testing.assert_allclose(stores["bfloat16"].losses(), stores["float32"].losses(), rtol=0.1, atol=0.05)


@pytest.mark.slow
def test_a_bfloat16_store_is_settled_by_exact_scores_and_says_what_it_holds(task, tmp_path):
    gradindex.build(task, tmp_path / "store", projection=WHOLE, precision="bfloat16")
    hits = gradindex.load(task, tmp_path / "store").proponents(range(4), k=5, candidates=40)
    truth = gradindex.exact_scores(task, list(task.query))
    np.testing.assert_allclose(hits.scores, -np.sort(-truth, 1)[:, :5], rtol=1e-4)
    printed = CliRunner().invoke(main, ["self-influence", str(tmp_path / "store"), "-k", "1"]).stdout
    assert "exact (bfloat16) TracInCP of an example with itself" in printed


def test_projected_self_influence_is_the_squared_norm_of_the_row(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", projection=Projection(dim=16), self_influence="projected")
    blocks = store.rows(np.arange(40)).reshape(40, 3, 16)
    np.testing.assert_allclose(store.self_influence(), np.square(blocks).sum(2), rtol=1e-4)
    printed = CliRunner().invoke(main, ["self-influence", str(tmp_path / "store"), "-k", "1"]).stdout
    assert "projected TracInCP of an example with itself" in printed
    with pytest.raises(MismatchError, match="self_influence differ"):
        gradindex.build(task, tmp_path / "store", projection=Projection(dim=16))
    with pytest.raises(ArgumentError, match="self_influence is 'none', but must be 'exact' or 'projected'"):
        gradindex.build(task, tmp_path / "other", self_influence="none")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(task, tmp_path, device):
    with pytest.raises(ArgumentError, match=f"device is '{device}', but it cannot be used here"):
        gradindex.build(task, tmp_path / "store", device=device)
    assert not (tmp_path / "store").exists()


def test_an_unknown_precision_is_refused(task, tmp_path):
    with pytest.raises(ArgumentError, match="precision is 'float8', but must be one of: float32, bfloat16, float16"):
        gradindex.build(task, tmp_path / "store", precision="float8")


@pytest.mark.slow
def test_unit_norm_ranks_by_the_cosine(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", projection=WHOLE, unit_norm=True)
    np.testing.assert_allclose(np.square(store.rows(np.arange(40))).sum(1), 1, rtol=1e-4)
    scores = gradindex.exact_scores(task, list(task.query))
    norms, own = (
        np.sqrt(np.diag(gradindex.exact_scores(replace(task, train=data), list(data))))
        for data in (task.train, task.query)
    )
    cosines = scores / np.outer(own, norms)
    retriever = gradindex.load(task, store.folder)
    for rerank in ("exact", "none"):
        for kind, sign in (("proponents", 1), ("opponents", -1)):
            hits = getattr(retriever, kind)(range(4), k=40, rerank=rerank)
            np.testing.assert_allclose(hits.scores, sign * -np.sort(-sign * cosines, 1), rtol=1e-3, atol=1e-5)
            assert hits.note.startswith(f"{hits.scored} cosines of the gradients behind TracInCP; positive score = ")
    np.testing.assert_allclose(store.self_influence().sum(1), norms**2, rtol=1e-3)  # stays TracInCP
    assert "rows of unit norm" in CliRunner().invoke(main, ["info", str(store.folder)]).stdout


def test_unit_norm_needs_exact_norms(task, tmp_path):
    with pytest.raises(ArgumentError, match="unit_norm needs exact norms"):
        gradindex.build(task, tmp_path / "store", unit_norm=True, self_influence="projected")


def test_a_zero_gradient_has_no_direction(tmp_path):
    task = toys.make_task(tmp_path, loss=lambda m, b: toys.cross_entropy(m, b) * (b[0][:, 0] > -100))
    x, y = (tensor.clone() for tensor in task.train.tensors)
    x[4] = -1000.0
    task = replace(task, train=TensorDataset(x, y))
    store = gradindex.build(task, tmp_path / "store", unit_norm=True)
    assert not store.rows(np.array([4])).any()
    hits = gradindex.load(task, store.folder).proponents(0, k=12)
    assert hits.scores[0, hits.ids[0].tolist().index(4)] == 0


class Shifted(nn.Module):
    """A buffer that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([1.0, -2.0, 0.5]), persistent=False)
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x) * self.shift


def test_buffers_that_checkpoints_leave_out_keep_their_values(tmp_path):
    task = toys.make_task(tmp_path, Shifted())
    task.model.load_state_dict(task.checkpoints[2].load(task.model))
    x, y = task.train.tensors
    with torch.no_grad():
        expected = toys.cross_entropy(task.model, (x.float(), y))
    np.testing.assert_allclose(gradindex.build(task, tmp_path / "store").losses()[:, 2], expected, rtol=1e-5)


class Averaging(nn.Module):
    """Goes on averaging its inputs in eval mode, in place and anew, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("spread", torch.ones(6))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        output = self.linear((x - self.mean) / self.spread.abs() + self.calls)
        self.mean.mul_(0.5).add_(0.5 * x.detach().mean(0))
        self.spread = self.spread + x.detach().abs().mean(0)
        self.calls += 1
        return output


def test_no_row_depends_on_what_the_model_wrote_to_its_buffers_for_those_before(tmp_path):
    task = toys.make_task(tmp_path, Averaging())
    before = {name: tensor.clone() for name, tensor in task.model.named_buffers()}
    stores = [
        gradindex.build(task, tmp_path / f"of {size}", projection=WHOLE, batch_size=size, precision="float64")
        for size in (1, 5)
    ]
    expected = np.zeros((12, 12))
    for checkpoint, rate in zip(task.checkpoints, toys.RATES, strict=True):
        gradients = []
        for x, y in task.train:
            model = copy.deepcopy(task.model).double()
            model.load_state_dict(checkpoint.load(task.model))
            loss = toys.cross_entropy(model, (x.double()[None], y[None])).sum()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        gradients = torch.stack(gradients).numpy()
        expected += rate * gradients @ gradients.T
    for store in stores:
        rows = store.rows(np.arange(12)).astype(np.float64)
        np.testing.assert_allclose(rows @ rows.T, expected, rtol=1e-4, atol=1e-6)
    for name, tensor in task.model.named_buffers():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_is_used_without_moving_the_model(task, tmp_path):
    expected = gradindex.exact_scores(task, list(task.query))
    found = gradindex.exact_scores(task, list(task.query), device="cuda")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert next(task.model.parameters()).device.type == "cpu"
