"""By default what is tracked is what was trained: scores against naive TracIn over the trained parameters."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from click.testing import CliRunner
from places import GOLDEN
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from toys import digest_of

import gradindex
from gradindex.checkpoint import find_checkpoints
from gradindex.cli import main
from gradindex.errors import CheckpointError, MismatchError, TaskError
from gradindex.gradients import Engine, check_routes
from gradindex.recorder import RECORD_KEY

FROZEN = "frozen: requires_grad is False"


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def data(n=10):
    torch.manual_seed(4)
    return TensorDataset(torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,)))


def freeze(model, *prefixes):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))
    return model


def batch_loss(model, train):
    x, y = train.tensors
    return cross_entropy(model(x.to(model[-1].weight.dtype)), y)


def step(model, optimizer, train):
    optimizer.zero_grad()
    batch_loss(model, train).backward()
    optimizer.step()


def naive(task, rates):
    """(n, n) float64: sum over checkpoints of eta_p <g_p, g'_p>, with a rate by checkpoint and parameter name."""
    model, total = task.model.double(), 0
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(True).eval()
    for checkpoint, by_name in zip(task.checkpoints, rates, strict=True):
        model.load_state_dict({name: t.double() for name, t in checkpoint.load(model).items()})
        names, parameters = zip(*model.named_parameters(), strict=True)
        rows = []
        for item in task.train:
            losses = task.loss(model, task.collate([item]))
            found = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
            scaled = [g.flatten() * by_name.get(n, 0.0) ** 0.5 for n, g in zip(names, found, strict=True)]
            rows.append(torch.cat(scaled))
        total = total + torch.stack(rows) @ torch.stack(rows).T
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    return total.numpy()


def scores(task):
    n = task.n_train
    return gradindex.exact_scores(task, [task.train[i] for i in range(n)], precision="float64")


def agree(task, rates):
    expected = naive(task, rates)
    np.testing.assert_allclose(scores(task), expected, rtol=1e-8, atol=1e-10 * np.abs(expected).max())


def tracked(task):
    with Engine(task) as engine:
        return engine.parameters, engine.tracked.described


def saved_by_hand(folder, model, names):
    """A task of two checkpoints of which the named parameters were trained with rate 0.1."""
    train = data()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n in names], lr=0.1)
    for number in (1, 2):
        step(model, optimizer, train)
        torch.save(model.state_dict(), folder / f"step_{number}.pt")
    return gradindex.Task(model, toys.cross_entropy, train, find_checkpoints(folder / "*.pt", learning_rate=0.1))


FREEZINGS = {
    "backbone": ("0.", "2."),
    "a bias only": ("2.bias",),
    "all but one bias": ("0.", "2.", "4.weight"),
    "in the middle": ("2.",),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FREEZINGS)
def test_frozen_parameters_are_left_out_of_checkpoints_saved_by_hand(tmp_path, case):
    model = freeze(network(), *FREEZINGS[case])
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    task = saved_by_hand(tmp_path, model, names)
    agree(task, [dict.fromkeys(names, 0.1)] * 2)
    parameters, described = tracked(task)
    assert set(parameters) == names
    (left_out,) = described["left_out"]
    others = [name for name, _ in model.named_parameters() if name not in names]
    assert left_out == {
        "why": FROZEN, "parameters": len(others), "first": others[:3],
        "numbers": sum(model.get_parameter(name).numel() for name in others),
    }  # fmt: skip


class Words(nn.Module):
    """Frozen word vectors under a small head; the output layer may be the same weight."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(5)
        self.words, self.middle, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.words(x).mean(1))))


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_embedding_is_left_out_with_all_of_its_uses(tmp_path, tied):
    model = Words(tied)
    model.words.weight.requires_grad_(False)
    train = TensorDataset(torch.randint(9, (8, 5)), torch.randint(9, (8,)))
    torch.save(model.state_dict(), tmp_path / "w_1.pt")
    task = gradindex.Task(model, toys.cross_entropy, train, find_checkpoints(tmp_path, learning_rate=0.1))
    names = {"middle.weight", "middle.bias"} | (set() if tied else {"head.weight"})
    agree(task, [dict.fromkeys(names, 0.1)])


def test_patterns_are_obeyed_and_it_is_said(tmp_path):
    model = freeze(network(), "0.", "2.")
    task = replace(saved_by_hand(tmp_path, model, {"4.weight", "4.bias"}), layers="*")
    agree(task, [dict.fromkeys([name for name, _ in model.named_parameters()], 0.1)] * 2)
    described = tracked(task)[1]
    assert described["left_out"] == []
    (noted,) = described["noted"]
    assert (noted["why"], noted["parameters"]) == (f"{FROZEN}, but named by layers=", 4)
    head = tracked(replace(task, layers=["4", "2.bias"]))[1]
    assert [(x["why"], x["first"]) for x in head["left_out"]] == [
        ("not named by layers=", ["0.weight", "0.bias", "2.weight"])
    ]
    assert [x["first"] for x in head["noted"]] == [["2.bias"]]


def test_a_model_that_was_frozen_whole_is_no_empty_answer(tmp_path):
    task = saved_by_hand(tmp_path, network(), {"4.weight"})
    task.model.requires_grad_(False)
    with pytest.raises(TaskError, match=r"No parameter of the model has requires_grad.*layers='\*'"):
        Engine(task)
    everything = dict.fromkeys([name for name, _ in task.model.named_parameters()], 0.1)
    agree(replace(task, layers="*"), [everything] * 2)


def recorded(folder, model, optimizer, train, saves=2, steps=2, **options):
    with gradindex.Recorder(model, optimizer, folder, **options) as recorder:
        for _ in range(saves):
            for _ in range(steps):
                step(model, optimizer, train)
            recorder.save()
    return gradindex.Task(model, toys.cross_entropy, train, find_checkpoints(folder))


def test_what_the_optimizer_did_not_hold_is_left_out(tmp_path):
    model, train = network(), data()
    task = recorded(tmp_path, model, torch.optim.SGD(model[2:].parameters(), lr=0.1), train)
    names = ["2.weight", "2.bias", "4.weight", "4.bias"]
    agree(task, [dict.fromkeys(names, 0.1)] * 2)
    assert tracked(task)[1]["left_out"] == [
        {"why": "not in the recorded optimizer", "parameters": 2, "numbers": 35, "first": ["0.weight", "0.bias"]}
    ]
    with pytest.raises(CheckpointError, match="none for 0.weight"):
        Engine(replace(task, layers="*"))


FROZEN_INSIDE = {"no gradient": False, "a gradient that is left over": True}


@pytest.mark.slow
@pytest.mark.parametrize("left_over", FROZEN_INSIDE.values(), ids=FROZEN_INSIDE)
def test_frozen_parameters_in_the_optimizer_take_no_steps(tmp_path, left_over):
    model, train = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if left_over:
        batch_loss(model, train).backward()
        optimizer.zero_grad(set_to_none=False)
    task = recorded(tmp_path, freeze(model, "0.", "2.bias"), optimizer, train)
    names = ["2.weight", "4.weight", "4.bias"]
    agree(task, [dict.fromkeys(names, 0.1)] * 2)
    assert tracked(task)[1]["left_out"][0]["why"] == "no step in the recorded training"
    # The flags of the model that the task builds do not matter where the recorder knows.
    for flag in (True, False):
        task.model.requires_grad_(flag)
        parameters, described = tracked(task)
        assert parameters == names
        assert [x["why"] for x in described["noted"]] == (
            [] if flag else ["requires_grad is False, but it took steps in the recorded training"]
        )
    # Who names all gets all, with the rates of their groups.
    agree(replace(task, layers="*"), [dict.fromkeys([n for n, _ in model.named_parameters()], 0.1)] * 2)


def as_of_an_earlier_version(folder):
    for path in folder.glob("*.pt"):
        content = torch.load(path, weights_only=True)
        for group in content[RECORD_KEY]["groups"]:
            del group["steps"]
        torch.save(content, path)


def test_records_of_earlier_versions_are_joined_with_requires_grad(tmp_path):
    model, train = network(), data()
    task = recorded(tmp_path, freeze(model, "2."), torch.optim.SGD(model[:4].parameters(), lr=0.1), train)
    as_of_an_earlier_version(tmp_path)
    # As the model is: held and not frozen.
    assert tracked(task)[0] == ["0.weight", "0.bias"]
    assert [(x["why"], x["first"]) for x in tracked(task)[1]["left_out"]] == [
        (FROZEN, ["2.weight", "2.bias"]),
        ("not in the recorded optimizer", ["4.weight", "4.bias"]),
    ]
    # Frozen as a whole: what the optimizer held.
    model.requires_grad_(False)
    assert tracked(task)[0] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def unfrozen_by_and_by(folder, **options):
    """Three checkpoints: the head alone, then the middle as well, then the head frozen; by name, whether trained."""
    model, train = freeze(network(), "0.", "2."), data()
    optimizer = torch.optim.SGD([{"params": model[4].parameters(), "lr": 0.1}])
    with gradindex.Recorder(model, optimizer, folder, **options) as recorder:
        for phase in range(3):
            if phase == 1:
                model[2].requires_grad_(True)
                optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.05})
            if phase == 2:
                model[4].requires_grad_(False)
                optimizer.zero_grad()
            for _ in range(2):
                step(model, optimizer, train)
            recorder.save()
    head, middle = (["4.weight", "4.bias"], 0.1), (["2.weight", "2.bias"], 0.05)
    phases = [[head], [head, middle], [middle]]
    rates = [{name: rate for names, rate in phase for name in names} for phase in phases]
    return gradindex.Task(model, toys.cross_entropy, train, find_checkpoints(folder)), rates


@pytest.mark.slow
def test_a_parameter_has_no_weight_where_it_took_no_step(tmp_path):
    task, rates = unfrozen_by_and_by(tmp_path)
    agree(task, rates)
    integrated = replace(task, checkpoints=find_checkpoints(tmp_path, weighting="integrated"))
    agree(integrated, [{name: 2 * rate for name, rate in by_name.items()} for by_name in rates])
    uniform = replace(task, checkpoints=find_checkpoints(tmp_path, weighting="uniform"))
    agree(uniform, [dict.fromkeys(by_name, 1.0) for by_name in rates])
    given = replace(task, checkpoints=find_checkpoints(tmp_path, learning_rate=0.3))
    agree(given, [dict.fromkeys(by_name, 0.3) for by_name in rates])
    assert tracked(task)[1]["left_out"][0]["why"] == "not in the recorded optimizer"


def test_checkpoints_with_and_without_records_mix(tmp_path):
    task, rates = unfrozen_by_and_by(tmp_path)
    torch.save(task.model.state_dict(), tmp_path / "last.pt")
    freeze(task.model, "0.", "4.")  # as it was at the end
    last = gradindex.Checkpoint(tmp_path / "last.pt", learning_rate=0.2)
    agree(replace(task, checkpoints=[*task.checkpoints, last]), [*rates, {"2.weight": 0.2, "2.bias": 0.2}])


@pytest.mark.slow
def test_a_store_goes_on_where_less_is_trained_and_refuses_where_more_is(tmp_path):
    task, rates = unfrozen_by_and_by(tmp_path / "all")
    two = replace(task, checkpoints=task.checkpoints[:2])
    gradindex.build(two, tmp_path / "store")
    gradindex.growth.add_checkpoint(task, tmp_path / "store")
    whole = gradindex.build(task, tmp_path / "whole")
    store = gradindex.GradientStore(tmp_path / "store")
    assert store.manifest.map == whole.manifest.map
    np.testing.assert_allclose(store.rows(store.ids), whole.rows(whole.ids), rtol=1e-5, atol=1e-6)
    hits = gradindex.load(task, tmp_path / "store").proponents([0], k=10, source="train")
    expected = naive(task, rates)[0]
    np.testing.assert_allclose(hits.scores[0], expected[hits.ids[0]], rtol=1e-4, atol=1e-6)
    gradindex.build(replace(task, checkpoints=task.checkpoints[:1]), tmp_path / "one")
    with pytest.raises(TaskError, match="The new checkpoints trained 2.weight, 2.bias, which the store does not track"):
        gradindex.growth.add_checkpoint(task, tmp_path / "one")


def test_groups_with_rate_zero_were_not_trained(tmp_path):
    model, train = network(), data()
    groups = [{"params": model[4].parameters(), "lr": 0.1}, {"params": model[:4].parameters(), "lr": 0.0}]
    task = recorded(tmp_path, model, torch.optim.SGD(groups), train)
    agree(task, [{"4.weight": 0.1, "4.bias": 0.1}] * 2)
    assert tracked(task)[0] == ["4.weight", "4.bias"]
    given = find_checkpoints(tmp_path, learning_rate={"4.*": 0.1, "*": 0.0})
    agree(replace(task, checkpoints=given), [{"4.weight": 0.1, "4.bias": 0.1}] * 2)


def test_records_that_name_nothing_of_the_model_are_an_error(tmp_path):
    model, train = network(), data()
    task = recorded(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.0), train)
    with pytest.raises(TaskError, match="None of the model's parameters took a step in the recorded training"):
        Engine(task)


class LowRank(nn.Module):
    """A frozen linear layer with trained low-rank factors beside it, and integers that never have a gradient."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.codes = nn.Parameter(torch.arange(4), requires_grad=False)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


def test_low_rank_factors_beside_frozen_layers_and_integers(tmp_path):
    model = network()
    model[0] = LowRank(model[0])
    model.requires_grad_(False)
    for layer in (model[0].down, model[0].up):
        layer.requires_grad_(True)
    task = saved_by_hand(tmp_path, model, {"0.down.weight", "0.up.weight"})
    assert tracked(task)[0] == ["0.down.weight", "0.up.weight"]
    agree_names = {"0.down.weight": 0.1, "0.up.weight": 0.1}
    with Engine(task, "float64") as engine:
        check_routes(engine)
        assert {layer.route for layer in engine.layers} == {"linear"}
    expected = expected_of(task, agree_names)
    np.testing.assert_allclose(scores(task), expected, rtol=1e-8, atol=1e-10 * np.abs(expected).max())
    with pytest.raises(TaskError, match="0.codes is of torch.int64, which has no gradient"):
        Engine(replace(task, layers="*"))


def expected_of(task, rates):
    """As :func:`naive`, for models with integers among their parameters."""
    model, total = task.model, 0
    for checkpoint in task.checkpoints:
        model.load_state_dict(checkpoint.load(model))
        model.double()
        parameters = [model.get_parameter(name) for name in rates]
        rows = [
            torch.cat([
                g.flatten() * rate**0.5
                for rate, g in zip(
                    rates.values(),
                    torch.autograd.grad(task.loss(model, task.collate([item])).sum(), parameters),
                    strict=True,
                )
            ])
            for item in task.train
        ]  # fmt: skip
        total = total + torch.stack(rows) @ torch.stack(rows).T
    return total.numpy()


def test_second_moments_are_asked_of_trained_parameters_alone(tmp_path):
    model, train = freeze(network(), "0.", "2."), data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with gradindex.Recorder(model, optimizer, tmp_path, second_moments=True) as recorder:
        step(model, optimizer, train)
        recorder.save()
        model[2].requires_grad_(True)
        step(model, optimizer, train)
        recorder.save()
    task = gradindex.Task(model, toys.cross_entropy, train, find_checkpoints(tmp_path), preconditioner="adam")
    with Engine(task, "float64") as engine:
        check_routes(engine)
        assert engine.parameters == ["2.weight", "2.bias", "4.weight", "4.bias"]
        assert [engine.learning_rates[c]["2.weight"] for c in (0, 1)] == [0.0, 0.01]
    assert np.isfinite(scores(task)).all()


def test_info_says_what_was_left_out_and_why(tmp_path):
    task = saved_by_hand(tmp_path, freeze(network(), "0.", "2."), {"4.weight", "4.bias"})
    gradindex.build(task, tmp_path / "store")
    call = lambda *words: CliRunner().invoke(main, list(words), catch_exceptions=False).stdout  # noqa: E731  # short
    text = call("info", str(tmp_path / "store"))
    assert (
        "tracked: 2 parameters of 15 numbers (what was trained)\n"
        "  left out: 4 parameters of 59 numbers (frozen: requires_grad is False): "
        "0.weight, 0.bias, 2.weight and 1 more\n"
    ) in text
    found = json.loads(call("info", str(tmp_path / "store"), "--json"))["tracked"]
    assert (found["layers"], found["parameters"], found["left_out"][0]["numbers"]) == (None, 2, 59)
    gradindex.build(replace(task, layers=["4", "0.bias"]), tmp_path / "named")
    text = call("info", str(tmp_path / "named"))
    assert "tracked: 3 parameters of 20 numbers (layers='4', '0.bias')\n" in text
    assert (
        "  among them: 1 parameter of 5 numbers (frozen: requires_grad is False, but named by layers=): 0.bias\n"
        in text
    )
    assert "  left out: 3 parameters of 54 numbers (not named by layers=): 0.weight, 2.weight, 2.bias\n" in text


def test_a_store_that_counted_frozen_parameters_says_so_when_it_does_not_match(tmp_path):
    task = saved_by_hand(tmp_path, freeze(network(), "0.", "2."), {"4.weight", "4.bias"})
    gradindex.build(replace(task, layers="*"), tmp_path / "store")
    hint = r"also tracks 4 parameters that were not trained \(such as 0.weight\), as layers='\*' does, formerly"
    for action in (lambda: gradindex.load(task, tmp_path / "store"), lambda: gradindex.build(task, tmp_path / "store")):
        with pytest.raises(MismatchError, match=hint):
            action()
    assert gradindex.load(replace(task, layers="*"), tmp_path / "store").proponents([0], k=1, source="train")


def test_a_store_without_the_key_is_shown_without_the_line(tmp_path):
    shutil.copytree(GOLDEN / "float32", tmp_path / "store")
    result = CliRunner().invoke(main, ["info", str(tmp_path / "store")], catch_exceptions=False)
    assert result.exit_code == 0
    assert "tracked" not in result.stdout


@pytest.mark.parametrize("forged", [[], {"layers": 3}, {"left_out": "all"}, {"noted": [{"why": "?"}]}])
def test_a_forged_account_of_what_is_tracked_is_one_line(tmp_path, forged):
    shutil.copytree(GOLDEN / "float32", tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    told = {"layers": None, "parameters": 1, "numbers": 1, "left_out": [], "noted": []}
    manifest["tracked"] = told | forged if forged else forged
    path.write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}))
    result = CliRunner().invoke(main, ["info", str(tmp_path / "store")])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "tracked" in result.stderr
    assert result.stderr.count("\n") == 1
