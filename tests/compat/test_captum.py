"""Captum's classes on this engine: scores against autograd, what they refuse, and that the model is as before."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toys import python

from gradindex.compat import captum as ours
from gradindex.errors import ArgumentError, GradIndexError, LossError, NonFiniteGradientError, TaskError, UserCodeError

RATES = (0.5, 0.1, 0.02)
N_TRAIN, N_QUERY, CLASSES = 11, 4, 3
SUM = nn.CrossEntropyLoss(reduction="sum")
NONE = nn.CrossEntropyLoss(reduction="none")


def make_model(dtype=torch.float64):
    """With a tanh after the last layer, which a closed form of that layer's gradient would miss."""
    layers = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, CLASSES), nn.Tanh())
    return layers.to(dtype)


def load(model, checkpoint):
    state, rate = checkpoint
    model.load_state_dict(state)
    return rate


def make_case(dtype=torch.float64):
    torch.manual_seed(0)
    model = make_model(dtype)
    checkpoints = tuple((make_model(dtype).state_dict(), rate) for rate in RATES)
    draw = lambda n: (torch.randn(n, 5, dtype=dtype), torch.randint(CLASSES, (n,)))  # noqa: E731
    return model, checkpoints, draw(N_TRAIN), draw(N_QUERY)


@pytest.fixture
def case():
    return make_case()


def gradients(model, checkpoints, batch, loss=NONE, only=""):
    """(n, C, P) by autograd, one example at a time, times sqrt(eta)."""
    model, rows = type(model)(*model), []
    model.eval()
    for x, y in zip(*batch, strict=True):
        row = []
        for state, rate in checkpoints:
            model.load_state_dict(state)
            named = dict(model.named_parameters())
            chosen = [p for name, p in named.items() if name.startswith(only)]
            found = torch.autograd.grad(loss(model(x[None]), y[None]).sum(), chosen, materialize_grads=True)
            row.append(torch.cat([g.flatten() for g in found]).double() * rate**0.5)
        rows.append(torch.stack(row))
    return torch.stack(rows).detach()


def truth(case, loss=NONE, query_loss=None, only=""):
    model, checkpoints, train, query = case
    keep = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    a = gradients(model, checkpoints, query, query_loss or loss, only).flatten(1)
    b = gradients(model, checkpoints, train, loss, only).flatten(1)
    model.load_state_dict(keep)
    model.train()
    return a @ b.T


def close(found, expected, tolerance=1e-6):
    found, expected = found.double(), expected.double()
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def tracin(case, **options):
    model, checkpoints, train, _ = case
    options = {"loss_fn": NONE, "batch_size": 4} | options
    return ours.TracInCP(model, TensorDataset(*train), checkpoints, load, **options)


def fast(case, kind=ours.TracInCPFast, **options):
    model, checkpoints, train, _ = case
    options = {"loss_fn": SUM, "batch_size": 4} | options
    return kind(model, options.pop("layer", model[3]), TensorDataset(*train), checkpoints, load, **options)


class Summed:
    """A loss of a user's own; vectorised, or with a branch on a value that no vmap follows."""

    reduction = "sum"

    def __init__(self, branches):
        self.branches = branches

    def __call__(self, output, labels):
        total = functional.cross_entropy(output, labels, reduction="sum")
        return total if self.branches and float(total.detach()) < -1 else total * 1


@pytest.mark.parametrize(
    ("loss", "reduces"),
    [
        (NONE, False),
        (SUM, True),
        (nn.CrossEntropyLoss(), True),  # the mean over a batch, each of whose examples counts whole
        (Summed(branches=False), True),
        (Summed(branches=True), True),
    ],
    ids=["none", "sum", "mean", "own", "own, with a branch"],
)
def test_scores_of_all_layers_are_those_of_autograd(case, loss, reduces):
    made = tracin(case, loss_fn=loss, sample_wise_grads_per_batch=reduces)
    close(made.influence(case[3]), truth(case))


def test_scores_in_float32_are_those_of_autograd():
    case = make_case(torch.float32)
    close(tracin(case).influence(case[3]), truth(case), 1e-5)
    close(fast(case).influence(case[3]), truth(case, only="3.weight"), 1e-5)


def test_layers_are_named_as_modules(case):
    close(tracin(case, layers=["0"]).influence(case[3]), truth(case, only="0."))


@pytest.mark.parametrize("loss", [nn.MSELoss(reduction="none"), nn.MSELoss(reduction="sum"), nn.MSELoss()])
def test_a_loss_of_several_numbers_an_example_is_summed_or_averaged_over_them(case, loss):
    model, checkpoints, (x, _), (q, _) = case
    case = model, checkpoints, (x, torch.randn(N_TRAIN, CLASSES).double()), (q, torch.randn(N_QUERY, CLASSES).double())
    reduces = loss.reduction != "none"
    found = tracin(case, loss_fn=loss, sample_wise_grads_per_batch=reduces).influence(case[3])
    close(found, truth(case, loss if reduces else nn.MSELoss(reduction="sum")))


def test_without_a_loss_the_outputs_are_summed(case):
    close(tracin(case, loss_fn=None).influence(case[3]), truth(case, lambda output, _: output))


def test_the_loss_of_queries_may_be_another_one(case):
    def logit(output, labels):
        return output.gather(1, labels[:, None])[:, 0]

    logit.reduction = "none"
    close(tracin(case, test_loss_fn=logit).influence(case[3]), truth(case, NONE, logit))


def test_a_loss_of_queries_may_use_the_layer_in_its_own_way_but_not_after_rows_are_made(case):
    model = case[0]

    def penalised(output, labels):
        return SUM(output, labels) + len(labels) * model[3].weight.square().sum()

    penalised.reduction = "sum"
    made = fast(case, test_loss_fn=penalised)
    made.self_influence()
    close(made.influence(case[3]), truth(case, NONE, penalised, "3.weight"))
    rows = fast(case, ours.TracInCPFastRandProj, test_loss_fn=penalised)
    with pytest.raises(TaskError, match="Use TracInCPFast"):
        rows.influence(case[3])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", [None, "3"])
def test_the_last_layer_counts_with_what_follows_it_and_with_its_bias_if_asked(case, bias, layer):
    options = {} if layer is None else {"layer": layer}
    only = "3." if bias else "3.weight"
    made = fast(case, bias=bias, **options)
    close(made.influence(case[3]), truth(case, only=only))
    rows = fast(case, ours.TracInCPFastRandProj, bias=bias, **options)
    close(rows.influence(case[3], k=None), truth(case, only=only))


def test_a_wrapped_model_is_loaded_as_it_is_and_its_layers_have_the_names_of_either(case):
    model, checkpoints, train, query = case
    wrapped = nn.DataParallel(model)

    def load_wrapped(net, checkpoint):
        assert net is wrapped
        return load(net.module, checkpoint)

    data = TensorDataset(*train)
    for names in (["module.0"], ["0"]):
        made = ours.TracInCP(wrapped, data, checkpoints, load_wrapped, names, NONE)
        close(made.influence(query), truth(case, only="0."))
    for layer in (model[3], "module.3"):
        made = ours.TracInCPFast(wrapped, layer, data, checkpoints, load_wrapped, SUM)
        close(made.influence(query), truth(case, only="3.weight"))


def test_class_weights_multiply_each_loss_whatever_the_reduction(case):
    weights = torch.tensor([0.2, 1.0, 3.0]).double()
    expected = truth(case, nn.CrossEntropyLoss(weights, reduction="none"))
    for reduction in ("sum", "mean"):
        loss = nn.CrossEntropyLoss(weights, reduction=reduction)
        close(tracin(case, loss_fn=loss, sample_wise_grads_per_batch=True).influence(case[3]), expected)


@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("make", [tracin, fast, lambda case: fast(case, ours.TracInCPFastRandProj, projection_dim=4)])
def test_the_strongest_are_those_of_all_scores(case, make, k, proponents):
    made = make(case)
    scores = made.influence(case[3], k=None).numpy()
    found = made.influence(case[3], k=k, proponents=proponents)
    order = np.argsort(-scores if proponents else scores, axis=1, kind="stable")[:, :k]
    assert found.indices.tolist() == order.tolist()
    assert found.indices.dtype == torch.int64
    np.testing.assert_allclose(found.influence_scores.numpy(), np.take_along_axis(scores, order, 1), rtol=1e-12)


def test_self_influence_is_the_squared_norm_by_batches_and_by_checkpoints(case):
    expected = gradients(*case[:3]).square().sum((1, 2))
    made = tracin(case)
    close(made.self_influence(), expected)
    close(made.self_influence(outer_loop_by_checkpoints=True), expected)
    close(made.self_influence(case[3]), gradients(case[0], case[1], case[3]).square().sum((1, 2)))
    close(fast(case).self_influence(), gradients(*case[:3], only="3.weight").square().sum((1, 2)))


def test_queries_can_be_one_question(case):
    made = tracin(case)
    close(made.influence(case[3], aggregate=True), truth(case).sum(0, keepdim=True))
    found = made.influence(case[3], k=3, aggregate=True)
    assert found.indices[0].tolist() == truth(case).sum(0).argsort(descending=True)[:3].tolist()


def test_rows_are_gradients_in_the_order_of_the_parameters_and_their_products_scores(case):
    made = tracin(case)
    rows = made.compute_intermediate_quantities(case[2])
    close(rows, gradients(*case[:3]).flatten(1))
    loader = DataLoader(TensorDataset(*case[2]), 3)
    close(made.compute_intermediate_quantities(loader, aggregate=True), rows.sum(0, keepdim=True))
    close(made.compute_intermediate_quantities(case[3]) @ rows.T, made.influence(case[3]))


@pytest.mark.slow
def test_projected_scores_are_unbiased_and_repeat_with_the_seed(case):
    def scores(seed):
        made = fast(case, ours.TracInCPFastRandProj, projection_dim=9, seed=seed)
        assert made.src_intermediate_quantities.shape == (N_TRAIN, 9 * len(RATES))
        return made.influence(case[3], k=None)

    assert torch.equal(scores(0), scores(0))
    expected = truth(case, only="3.weight")
    errors = [float((torch.stack([scores(s) for s in range(n)]).mean(0) - expected).norm()) for n in (2, 30)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.4 * float(expected.norm())


def test_a_search_of_the_users_own_takes_the_negated_rows_for_opponents(case):
    class Recorded(ours.ExactNeighbors):
        def get_nearest_neighbors(self, query, k):
            asked.append(query)
            return super().get_nearest_neighbors(query, k)

    asked = []
    made = fast(case, ours.TracInCPFastRandProj, nearest_neighbors=Recorded())
    found = [made.influence(case[3], 2, proponents) for proponents in (True, False)]
    assert torch.equal(asked[0], -asked[1])
    assert bool((found[0].influence_scores[:, 0] > found[1].influence_scores[:, 0]).all())


class Stream(IterableDataset):
    """Batches of its own, without a length."""

    def __init__(self, batch, size):
        self.parts = [tensor.split(size) for tensor in batch]

    def __iter__(self):
        return zip(*self.parts, strict=True)


def test_a_loader_and_batches_of_unequal_size_give_the_same_scores(case):
    model, checkpoints, train, query = case
    expected = tracin(case).influence(query)
    data = TensorDataset(*train)
    for batches in (DataLoader(data, 3), DataLoader(Stream(train, 5), batch_size=None)):
        made = ours.TracInCP(model, batches, checkpoints, load, loss_fn=NONE, batch_size=None)
        close(made.influence(DataLoader(TensorDataset(*query), 3)), expected, 1e-12)


class Counted(TensorDataset):
    reads = 0

    def __getitem__(self, position):
        self.reads += 1
        return super().__getitem__(position)


@pytest.mark.parametrize("kept", ["kept", "not asked for", "no room"])
def test_gradients_of_the_last_layer_stay_for_the_next_question_where_they_may(case, kept, monkeypatch):
    model, checkpoints, train, query = case
    # Input and output gradient in float64, at each checkpoint.
    needed = N_TRAIN * (4 + CLASSES) * 8 * len(RATES)
    monkeypatch.setattr("gradindex.compat.fast.available_bytes", lambda _: needed - (kept == "no room"))
    data = Counted(*train)
    keep = kept != "not asked for"
    made = ours.TracInCPFast(model, "3", data, checkpoints, load, SUM, batch_size=4, keep=keep)
    close(made.influence(query), truth(case, only="3.weight"))
    reads = data.reads
    again = [made.influence(query, 2, proponents=False), made.self_influence()]
    assert data.reads == reads + (0 if kept == "kept" else 2 * N_TRAIN)
    close(again[0].influence_scores, truth(case, only="3.weight").sort(1).values[:, :2])
    close(again[1], gradients(*case[:3], only="3.weight").square().sum((1, 2)))


def test_large_batches_are_cut_and_small_ones_joined(case):
    model, checkpoints, _, query = case
    torch.manual_seed(1)
    train = torch.randn(600, 5).double(), torch.randint(CLASSES, (600,))
    for size in (600, 7):
        made = fast((model, checkpoints, train, query), batch_size=size)
        close(made.influence(query), truth((model, checkpoints, train, query), only="3.weight"))
        assert [len(piece.names) for pieces in made._session().kept for piece in pieces] == {
            600: [256, 256, 88],
            7: [256, 3, 256, 3, 82],
        }[size]


def test_batches_of_other_lengths_are_met_in_groups(case):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, CLASSES).double()

        def forward(self, x):
            return self.inner(x.mean(1))

    torch.manual_seed(0)
    model, labels = Pooled(), torch.tensor([0, 1])
    batches = [(torch.randn(2, length, 5).double(), labels) for length in (3, 7)]
    checkpoints = [(model.state_dict(), 1.0)]
    made = ours.TracInCP(model, _Batches(batches), checkpoints, load, loss_fn=NONE)
    together = made.influence(_Batches(batches))
    apart = torch.cat([made.influence(batch) for batch in batches])
    close(together, apart, 1e-12)
    close(made.influence(_Batches(batches), aggregate=True), apart.sum(0, keepdim=True), 1e-12)
    close(made.self_influence(), together.diagonal(), 1e-12)


class _Batches:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_model_mode_flags_and_random_state_are_as_before(case):
    model, _, _, query = case
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    tracin(case, layers=["0"]).influence(query)
    fast(case, ours.TracInCPFastRandProj, projection_dim=4).influence(query)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model[0].weight.requires_grad
    assert model[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_files_are_taken_by_the_numbers_in_their_names_with_the_rates_inside(case, tmp_path):
    model, checkpoints, train, query = case
    for number, (state, rate) in zip((2, 10, 9), checkpoints, strict=True):
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"model_state_dict": wrapped, "learning_rate": rate}, tmp_path / f"step-{number}.pt")
    made = ours.TracInCP(model, TensorDataset(*train), str(tmp_path), loss_fn=NONE, batch_size=4)
    assert [path.rpartition("-")[2] for path in made.checkpoints] == ["2.pt", "9.pt", "10.pt"]
    close(made.influence(query), truth(case))
    torch.save(checkpoints[0][0], tmp_path / "bare.pt")
    assert ours.load_checkpoint(model, tmp_path / "bare.pt") == 1.0


def test_setting_other_checkpoints_takes_effect(case):
    made = tracin(case)
    made.influence(case[3])
    made.checkpoints = case[1][:1]
    close(made.influence(case[3]), truth((case[0], case[1][:1], *case[2:])))


@pytest.mark.parametrize("k", [None, 2])
def test_progress_ends_at_100_per_cent(case, capsys, k):
    made = tracin(case)
    made.influence(case[3], k, show_progress=True)
    label = "compute influence for training batches" if k is None else "perform computation for getting proponents"
    said = capsys.readouterr().err
    assert f"Using TracInCP to {label}" in said
    assert said.endswith(": 100% 3/3\n")
    made.self_influence(show_progress=True, outer_loop_by_checkpoints=True)
    said = capsys.readouterr().err
    assert said.count("Processing batch: 100% 3/3\n") == len(RATES)
    assert said.count("Processing checkpoint: 100% 3/3\n") == 1


def refused(error, words):
    return pytest.raises(error, match=words)


def test_what_captum_asserts_is_an_assertion_error_that_says_the_way_out(case):
    for made in (tracin(case), fast(case)):
        with refused(AssertionError, "inputs is required.*use self_influence"):
            made.influence(None)
    with refused(AssertionError, "loss_fn has reduction 'sum', but must have 'none'"):
        tracin(case, loss_fn=SUM)
    with refused(AssertionError, "loss_fn has reduction 'none', but must have 'sum' or 'mean'"):
        fast(case, loss_fn=NONE)
    with refused(AssertionError, "loss_fn is None, but a loss is needed"):
        fast(case, loss_fn=None)
    with refused(AssertionError, "layers is 'fc', but must be a list"):
        tracin(case, layers="fc")
    with refused(AssertionError, "batch_size is None, but must be an integer"):
        tracin(case, batch_size=None)
    with refused(GradIndexError, "loss_fn is a int, but must be callable"):
        tracin(case, loss_fn=3)


def test_arguments_that_cannot_be_meant_are_refused(case, tmp_path):
    model, checkpoints, train, query = case
    data = TensorDataset(*train)
    with refused(ValueError, 'Invalid final_fc_layer str: "head" provided!.*Give one of'):
        fast(case, layer="head")
    with refused(ArgumentError, "final_fc_layer is a Tanh, which has no weight"):
        fast(case, layer=model[1])
    with refused(ValueError, "Invalid checkpoints provided for TracIn class"):
        ours.TracInCP(model, data, str(tmp_path), loss_fn=NONE)
    with refused(ArgumentError, "The loader shuffles"):
        ours.TracInCP(model, DataLoader(data, 3, shuffle=True), checkpoints, load, loss_fn=NONE)
    with refused(ArgumentError, "returned None for checkpoint 0, but must return its learning rate"):
        ours.TracInCP(model, data, checkpoints, lambda *_: None, loss_fn=NONE).influence(query)
    with refused(ArgumentError, "must be finite and not negative"):
        ours.TracInCP(model, data, checkpoints, lambda *_: -1.0, loss_fn=NONE).influence(query)
    with refused(UserCodeError, r"checkpoints_load_func \(checkpoint 0\) failed: ZeroDivisionError"):
        ours.TracInCP(model, data, checkpoints, lambda *_: 1 / 0, loss_fn=NONE).influence(query)
    with refused(ArgumentError, "k is 0, but must be at least 1"):
        tracin(case).influence(query, 0)
    with refused(ArgumentError, "projection_dim is 0"):
        fast(case, ours.TracInCPFastRandProj, projection_dim=0)
    with refused(TaskError, "The layer pattern 'head' matches nothing in the model"):
        tracin(case, layers=["head"]).influence(query)
    with refused(NotImplementedError, "Use TracInCPFast"):
        fast(case, ours.TracInCPFastRandProj).self_influence()
    with refused(ArgumentError, "A batch is a Tensor, but must be a tuple"):
        tracin(case).influence(torch.ones(2, 5))


def test_a_loss_without_a_reduction_is_taken_as_expected_and_said(case):
    def loss(output, labels):
        return functional.cross_entropy(output, labels, reduction="sum")

    with pytest.warns(UserWarning, match="loss_fn has no attribute reduction.*sums the losses"):
        made = fast(case, loss_fn=loss)
    close(made.influence(case[3]), truth(case, only="3.weight"))
    with pytest.warns(UserWarning, match="returns one loss per example"):
        made = tracin(case, loss_fn=loss)
    with refused(LossError, r"loss_fn has shape \(\) for \d+ examples"):
        made.influence(case[3])


def test_an_example_without_a_finite_gradient_is_named(case):
    case[2][0][9] = float("nan")
    with refused(NonFiniteGradientError, "Training example 9 has a NaN"):
        tracin(case).influence(case[3])
    case[2][0][9] = 0
    case[3][0][1] = float("nan")
    with refused(NonFiniteGradientError, "Example 1 has a NaN"):
        tracin(case).self_influence(case[3])
    made = tracin(case)
    made.influence(case[2])
    with refused(NonFiniteGradientError, "Query 1 has a NaN"):
        made.influence(case[3])


def test_captum_gives_the_same_scores_with_rates_other_than_1(case):
    influence = pytest.importorskip("captum.influence")
    model, checkpoints, train, query = case
    model.eval()
    theirs = influence.TracInCP(model, TensorDataset(*train), checkpoints, load, loss_fn=NONE, batch_size=4)
    made = tracin(case)
    close(made.influence(query), theirs.influence(query))
    assert made.influence(query, 3)[0].tolist() == theirs.influence(query, 3)[0].tolist()
    assert isinstance(made, influence.DataInfluence)


@pytest.mark.slow
def test_captum_need_not_be_installed():
    code = "import sys; sys.modules['captum'] = None\nfrom gradindex.compat.captum import TracInCP\nprint(TracInCP)"
    assert "TracInCP" in python(code)
