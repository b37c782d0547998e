"""Runs of the Hugging Face Trainer, made by it: found, ordered, weighted and loaded as it trained."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from toys import call

import gradindex
from gradindex import find_checkpoints
from gradindex.errors import CheckpointError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the libraries' own
]
STEPS, SAVED = 7, (2, 4, 6, 7)
# By name: what makes a run, and how closely its rates follow from what was logged.
RUNS = {
    "linear": ({"lr_scheduler_type": "linear", "logging_steps": 1}, 1e-12),
    "warm cosine": ({"lr_scheduler_type": "cosine", "warmup_steps": 2, "logging_steps": 1}, 1e-12),
    "constant": ({"lr_scheduler_type": "constant", "logging_steps": 3}, 1e-12),
    "linear, logged seldom": ({"lr_scheduler_type": "linear", "logging_steps": 3}, 1e-12),
    "linear, not logged": ({"lr_scheduler_type": "linear", "logging_strategy": "no"}, 1e-12),
}


def gpt2(seed=0):
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra dev")
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    still = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **still))


def tokens(n, seed=1):
    return list(torch.randint(0, 20, (n, 6), generator=torch.Generator().manual_seed(seed)))


def train(model, folder, **options):
    """Trains, and keeps what the optimizer really did: rates of each group before each step, moments at checkpoints."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra dev")
    given = {"max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    arguments = transformers.TrainingArguments(
        str(folder / "run"), report_to=[], disable_tqdm=True, use_cpu=True, weight_decay=0.1, **(given | options)
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in tokens(28)])
    trainer.create_optimizer()
    used, weights, moments = [], {}, {}

    def before(optimizer, *_):
        used.append([group["lr"] for group in optimizer.param_groups])

    def after(optimizer, *_):
        state = optimizer.state
        weights[len(used)] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        moments[len(used)] = {
            name: state[parameter]["exp_avg_sq"] / (1 - 0.999 ** len(used))
            for name, parameter in model.named_parameters()
            if parameter in state
        }

    trainer.optimizer.register_step_pre_hook(before)
    trainer.optimizer.register_step_post_hook(after)
    trainer.train()
    torch.save({"used": used, "weights": weights, "moments": moments}, folder / "true.pt")


@pytest.fixture
def run(made_once, request):
    """The folder of a run, and what truly happened in it."""
    name = getattr(request, "param", "linear")
    folder = made_once(f"trainer {name}", lambda folder: train(gpt2(), folder, **RUNS[name][0]))
    return folder / "run", torch.load(folder / "true.pt")


@pytest.fixture
def own_run(run, tmp_path):
    """A copy of a run to be changed."""
    return shutil.copytree(run[0], tmp_path / "run")


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_rates_are_what_the_last_step_used_and_sums_what_all_since_the_checkpoint_before(run, request):
    folder, true = run
    closely = RUNS[request.node.callspec.params["run"]][1]
    model = gpt2(seed=5)
    names = [name for name, _ in model.named_parameters()]
    used = np.array(true["used"])[:, 0]
    found = find_checkpoints(folder)
    assert [item.step for item in found] == list(SAVED)
    for item in found:
        rates = item.learning_rates(names, model)
        assert list(rates.values()) == pytest.approx([used[item.step - 1]] * len(names), rel=closely)
        assert item.learning_rates(names) == rates
    since = dict(zip(SAVED, (0, *SAVED), strict=False))
    for item in find_checkpoints(folder, weighting="integrated"):
        total = used[since[item.step] : item.step].sum()
        assert list(item.learning_rates(names, model).values()) == pytest.approx([total] * len(names), rel=1e-9)


def test_weights_losses_and_second_moments_are_those_of_the_training(run):
    folder, true = run
    model = gpt2(seed=5)
    for item in find_checkpoints(folder):
        loaded = item.read(model)
        assert loaded.kind == "Hugging Face Trainer"
        assert loaded.filled == ("lm_head.weight",)
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in true["weights"][item.step].items())
        moments = item.second_moments(model)
        assert moments.keys() == {name for name, _ in model.named_parameters()}
        for name, tensor in true["moments"][item.step].items():
            torch.testing.assert_close(moments[name], tensor)
    logged = json.loads((folder / "checkpoint-7" / "trainer_state.json").read_text())["log_history"]
    assert [item.loss() for item in find_checkpoints(folder)] == [logged[step - 1]["loss"] for step in SAVED]


def loss(model, ids):
    return cross_entropy(model(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("preconditioner", [None, "adam"])
def test_scores_of_a_run_are_sums_over_its_checkpoints(run, tmp_path, preconditioner):
    folder, true = run
    model, items = gpt2(seed=5), tokens(4, seed=2)
    task = gradindex.Task(model, loss, items, find_checkpoints(folder), preconditioner=preconditioner)
    found = gradindex.exact_scores(task, items)
    expected = np.zeros((4, 4))
    model.double()
    for step in SAVED:
        model.load_state_dict(true["weights"][step])
        rows = []
        for item in items:
            model.zero_grad()
            loss(model, item[None]).sum().backward()
            rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        rows = torch.stack(rows)
        scale = torch.ones(rows.shape[1], dtype=torch.float64)
        if preconditioner:
            moments = torch.cat([true["moments"][step][name].flatten() for name, _ in model.named_parameters()])
            scale = 1 / (moments.double().sqrt() + 1e-8)
        expected += true["used"][step - 1][0] * (rows @ (rows * scale).T).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_info_says_what_wrote_the_checkpoints(run, tmp_path):
    task = gradindex.Task(gpt2(), loss, tokens(4), find_checkpoints(run[0])[:2])
    gradindex.build(task, tmp_path / "store")
    printed = call("info", tmp_path / "store").output
    assert "Hugging Face Trainer     2  0.00857143  learning_rate" in printed
    later = gradindex.Task(gpt2(), loss, tokens(4), find_checkpoints(run[0])[:3])
    gradindex.growth.add_checkpoint(later, tmp_path / "store")
    kinds = [source["kind"] for source in gradindex.GradientStore(tmp_path / "store").manifest.sources]
    assert kinds == ["Hugging Face Trainer"] * 3


def test_logs_of_older_versions_held_the_next_steps_rate(own_run):
    """They read the rate after the scheduler's step."""
    used = [0.01 * (STEPS - step) / STEPS for step in range(STEPS + 1)]
    for path in own_run.glob("*/trainer_state.json"):
        state = json.loads(path.read_text())
        for entry in state["log_history"]:
            if "learning_rate" in entry:
                entry["learning_rate"] = used[entry["step"]]
        path.write_text(json.dumps(state))
    model = gpt2()
    names = ["transformer.wte.weight"]
    rates = [item.learning_rates(names, model)[names[0]] for item in find_checkpoints(own_run)]
    assert rates == pytest.approx([used[step - 1] for step in SAVED])


def test_groups_with_rates_of_their_own_keep_them(own_run):
    for number in SAVED:
        folder = own_run / f"checkpoint-{number}"
        scheduler, optimizer = torch.load(folder / "scheduler.pt"), torch.load(folder / "optimizer.pt")
        scheduler["base_lrs"][1] *= 3
        scheduler["_last_lr"][1] *= 3
        optimizer["param_groups"][1]["initial_lr"] *= 3
        torch.save(scheduler, folder / "scheduler.pt")
        torch.save(optimizer, folder / "optimizer.pt")
    model = gpt2()
    for item in find_checkpoints(own_run):
        rates = item.learning_rates(["transformer.wte.weight", "transformer.ln_f.weight"], model)
        used = 0.01 * (STEPS + 1 - item.step) / STEPS
        assert list(rates.values()) == pytest.approx([used, 3 * used])
        with pytest.raises(CheckpointError, match="learning rates .* for groups of parameters whose names are not kno"):
            item.learning_rates(["transformer.wte.weight"])


def test_what_the_training_froze_is_not_tracked(made_once):
    def make(folder):
        model = gpt2()
        model.transformer.wte.requires_grad_(False)
        train(model, folder)

    folder = made_once("trainer frozen", make)
    model = gpt2()
    model.transformer.wte.requires_grad_(False)
    (first, *_) = find_checkpoints(folder / "run")
    names = [name for name, _ in model.named_parameters()]
    assert set(names) - first.recorded_training(names, model).keys() == {"transformer.wte.weight"}
    moments = torch.load(folder / "true.pt")["moments"][2]
    torch.testing.assert_close(first.second_moments(model), moments)


def shard(folder):
    """As save_pretrained does with large models."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {f"model-{number:05}-of-00003.safetensors": names[number - 1 :: 3] for number in (1, 2, 3)}
    for file, inside in parts.items():
        save_file({name: weights[name] for name in inside}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FORMS = {"shards": shard, "pytorch_model.bin": as_bin}


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_every_form(run, own_run, form):
    for folder in own_run.iterdir():
        FORMS[form](folder)
    found = find_checkpoints(own_run)
    assert [item.step for item in found] == list(SAVED)
    loaded = found[1].read(gpt2(seed=5))
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in run[1]["weights"][4].items())
    assert loaded.kind == "Hugging Face Trainer" + (", sharded" if form == "shards" else "")
    assert loaded.sha256 == found[1].sha256() != found[2].sha256()


def test_shards_that_transformers_wrote_are_read_by_their_index(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "checkpoint-9", max_shard_size="2KB")
    assert (tmp_path / "checkpoint-9" / "model.safetensors.index.json").exists()
    for path in (tmp_path / "checkpoint-9", tmp_path / "checkpoint-9" / "model.safetensors.index.json"):
        loaded = gradindex.Checkpoint(path, 0.1).load(gpt2(seed=5))
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    (found,) = find_checkpoints(tmp_path, learning_rate=0.1)
    assert found.step == 9


def another_model(run):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), run / "checkpoint-4" / "optimizer.pt")


def other_shapes(run):
    path = run / "checkpoint-4" / "optimizer.pt"
    state = torch.load(path)
    state["state"][0]["exp_avg_sq"] = state["state"][0]["exp_avg"] = torch.ones(3, 3)
    torch.save(state, path)


def without_shard(run):
    shard(run / "checkpoint-4")
    (run / "checkpoint-4" / "model-00002-of-00003.safetensors").unlink()


def beginning(run):
    (run / "checkpoint-7" / "trainer_state.json").unlink()


def barely_begun(run):
    for path in (run / "checkpoint-7").iterdir():
        if path.name != "config.json":
            path.unlink()


def cut_short(run):
    path = run / "checkpoint-7" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def a_second_run(run):
    path = run / "checkpoint-7" / "trainer_state.json"
    path.write_text(path.read_text().replace('"loss": ', '"loss": 1'))


def nested_runs(run):
    shutil.copytree(run, run / "b")
    (run / "a").mkdir()
    for number in SAVED:
        (run / f"checkpoint-{number}").rename(run / "a" / f"checkpoint-{number}")


BAD = {
    "optimizer of another model": (another_model, r"optimizer\.pt is the optimizer of another model: it holds 2"),
    "optimizer of other shapes": (other_shapes, r"of another model: it holds 16 parameters, such as .* \(3, 3\)"),
    "a shard is missing": (without_shard, r"checkpoint-4 lacks 1 of its 3 shards, such as model-00002-of-00003"),
    "being written": (beginning, r"checkpoint-7 has no trainer_state\.json, which the Trainer writes last"),
    "just begun": (barely_begun, r"checkpoint-7 is a folder without weights .*: it holds config\.json\. If a training"),
    "cut short": (cut_short, r"checkpoint-7.*truncated or damaged"),
    "a temporary folder": (lambda run: (run / "tmp-checkpoint-8").mkdir(), "is still being written, or was left"),
    "runs over each other": (a_second_run, r"checkpoint-6 and .*checkpoint-7 are of different runs"),
    "several runs": (nested_runs, r"holds 2 runs \(a, b\), but one is needed\. Give .* find_checkpoints\('.*a'\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_run_is_one_line_and_nothing_is_built(own_run, tmp_path, case):
    change, message = BAD[case]
    change(own_run)
    with pytest.raises(CheckpointError, match=message) as raised:
        gradindex.build(gradindex.Task(gpt2(), loss, tokens(4), find_checkpoints(own_run)), tmp_path / "store")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "store").exists()


def test_runs_of_a_glob_are_told_apart(own_run, tmp_path):
    nested_runs(own_run)
    for number in (2, 4):
        shutil.rmtree(own_run / "a" / f"checkpoint-{number}")
    for number in (6, 7):
        shutil.rmtree(own_run / "b" / f"checkpoint-{number}")
    with pytest.raises(CheckpointError, match=r"b/checkpoint-4 and .*a/checkpoint-6 are of different runs"):
        find_checkpoints(own_run / "*" / "checkpoint-*")


def test_a_schedule_that_ends_at_zero_weighs_its_last_checkpoint_by_the_step_before(run, tmp_path, capsys):
    scheduler = torch.load(run[0] / "checkpoint-7" / "scheduler.pt")
    assert scheduler["_last_lr"] == [0.0, 0.0]
    (last,) = find_checkpoints(run[0] / "checkpoint-7")
    assert last.learning_rates(["transformer.wte.weight"]) == {"transformer.wte.weight": pytest.approx(0.01 / STEPS)}


def test_the_only_run_below_a_folder_is_found_and_the_weights_at_its_end_are_no_checkpoint(own_run, capsys):
    shutil.copy(own_run / "checkpoint-7" / "model.safetensors", own_run / "model.safetensors")
    assert [item.step for item in find_checkpoints(own_run.parent)] == list(SAVED)
    assert "model.safetensors has no step in its name and is skipped" in capsys.readouterr().err


def test_the_weights_file_of_a_checkpoint_is_the_checkpoint(run):
    found = find_checkpoints(run[0] / "checkpoint-*" / "model.safetensors")
    assert [item.step for item in found] == list(SAVED)
    name = "transformer.wte.weight"
    folders = find_checkpoints(run[0])
    assert [item.learning_rates([name]) for item in found] == [item.learning_rates([name]) for item in folders]
    assert [item.sha256() for item in found] == [item.sha256() for item in folders]


def test_a_folder_with_an_optimizer_of_ones_own_loop_is_no_unfinished_run(own_run):
    folder = own_run.parent / "own" / "step_2"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt"):
        shutil.copy(own_run / "checkpoint-2" / name, folder / name)
    (found,) = find_checkpoints(folder.parent, learning_rate=0.1)
    assert (found.step, found.read(gpt2()).kind) == (2, "weights")
    shutil.copy(own_run / "checkpoint-2" / "training_args.bin", folder / "training_args.bin")
    with pytest.raises(CheckpointError, match="which the Trainer writes last"):
        find_checkpoints(folder.parent, learning_rate=0.1)
