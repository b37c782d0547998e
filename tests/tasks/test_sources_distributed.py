"""Weights that many processes wrote: torch's distributed checkpoints, and DeepSpeed's through its converter."""

import pickle
import shutil
import socket
import sys
import types

import pytest
import torch
import torch.distributed.checkpoint as dcp
import toys
from torch.distributed.checkpoint.state_dict import get_state_dict

import gradindex
from gradindex import Checkpoint, find_checkpoints
from gradindex.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return toys.mlp()


def same(found, model):
    expected = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def save(model, folder, **beside):
    """The model and its optimizer, as torch's own guide does."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, **beside}, checkpoint_id=str(folder), no_dist=True)


def test_a_distributed_checkpoint_is_found_and_loaded(tmp_path, model):
    trained = toys.mlp()
    save(trained, tmp_path / "run" / "step_9")
    shutil.copytree(tmp_path / "run" / "step_9", tmp_path / "run" / "step_10")
    found = find_checkpoints(tmp_path / "run", learning_rate=0.1)
    assert [item.step for item in found] == [9, 10]
    loaded = found[0].read(model)
    assert same(loaded.tensors, trained)
    assert loaded.kind == "torch distributed checkpoint"
    assert loaded.sha256 == found[0].sha256() == found[1].sha256()
    save(model, tmp_path / "other" / "step_9")
    assert Checkpoint(tmp_path / "other" / "step_9", 0.1).sha256() != loaded.sha256


def test_its_step_is_what_it_says(tmp_path, model):
    save(model, tmp_path / "run" / "a", step=70, notes=["mine"])
    (found,) = find_checkpoints(tmp_path / "run" / "a", learning_rate=0.1)
    assert found.step == 70
    assert same(found.load(toys.mlp()), model)


def test_weights_alone_and_those_of_fsdp_in_a_folder(tmp_path, model):
    dcp.save(model.state_dict(), checkpoint_id=str(tmp_path / "plain"), no_dist=True)
    assert same(Checkpoint(tmp_path / "plain", 0.1).load(toys.mlp()), model)
    folder = tmp_path / "checkpoint-4" / "pytorch_model_fsdp_0"
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(folder), no_dist=True)
    (found,) = find_checkpoints(tmp_path / "checkpoint-4", learning_rate=0.1)
    assert (found.step, same(found.load(toys.mlp()), model)) == (4, True)


def test_of_several_models_one_is_chosen_by_its_key(tmp_path, model):
    other = toys.mlp()
    content = {"net": model.state_dict(), "ema": other.state_dict()}
    dcp.save(content, checkpoint_id=str(tmp_path / "w"), no_dist=True)
    assert same(Checkpoint(tmp_path / "w", 0.1, key="ema").load(toys.mlp()), other)


class Evil:
    def __reduce__(self):
        return (exec, ("open('executed', 'w')",))


def executing(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))


def of_a_class_inside(folder):
    (folder / ".metadata").write_bytes(b"\x80\x04ctorch.distributed.checkpoint.filesystem\nos.system\n.")


BAD = {
    "a part is missing": (lambda f: (f / "__0_0.distcp").unlink(), r"lacks 1 of its 1 parts, such as __0_0\.distcp"),
    "being written": (lambda f: (f / ".metadata").unlink(), r"has no \.metadata, which is written last"),
    "cut short": (lambda f: (f / "__0_0.distcp").write_bytes(b"PK\x03\x04"), "truncated or damaged"),
    "damaged": (lambda f: (f / ".metadata").write_bytes(b"\x80\x04nothing"), "damaged"),
    "code": (executing, r"holds Python objects besides descriptions of tensors \(builtins\.exec\)"),
    "code of a module inside": (of_a_class_inside, r"besides descriptions of tensors \(torch.*os\.system\)"),
    "something else": (lambda f: (f / ".metadata").write_bytes(pickle.dumps([1])), "describes no checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_distributed_checkpoint_is_one_line(tmp_path, monkeypatch, model, case):
    monkeypatch.chdir(tmp_path)
    save(model, tmp_path / "step_3")
    change, message = BAD[case]
    change(tmp_path / "step_3")
    with pytest.raises(CheckpointError, match=message) as raised:
        Checkpoint(tmp_path / "step_3", 0.1).load(toys.mlp())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "executed").exists()


def zero(folder, step):
    """The layout that DeepSpeed documents, without the numbers, which only its converter reads."""
    parts = folder / f"global_step{step}"
    parts.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (parts / name).write_bytes(b"of DeepSpeed")
    (folder / "latest").write_text(f"global_step{step}")
    (folder / "zero_to_fp32.py").write_text("")


def test_zero_without_deepspeed_names_the_ways_out(tmp_path, monkeypatch, model):
    for name in ("deepspeed", "deepspeed.utils.zero_to_fp32"):
        monkeypatch.setitem(sys.modules, name, None)
    zero(tmp_path / "run", 5)
    for act in (lambda: find_checkpoints(tmp_path / "run", learning_rate=0.1),
                lambda: Checkpoint(tmp_path / "run", 0.1).load(model)):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"only DeepSpeed's converter.*Install deepspeed, or run `python z"):
            act()


def test_zero_is_converted_by_deepspeeds_own_function(tmp_path, monkeypatch, capsys, model):
    """With a stand-in for the function, which is called as DeepSpeed documents it."""
    called = []

    def convert(checkpoint_dir, tag=None, **_):
        called.append((checkpoint_dir, tag))
        print("Processing zero checkpoint")
        return dict(model.state_dict())

    module = types.ModuleType("deepspeed.utils.zero_to_fp32")
    module.get_fp32_state_dict_from_zero_checkpoint = convert
    for name in ("deepspeed", "deepspeed.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    zero(tmp_path / "run", 5)
    zero(tmp_path / "run", 20)
    found = find_checkpoints(tmp_path / "run", learning_rate=0.1)
    assert [item.step for item in found] == [5, 20]
    loaded = found[0].read(toys.mlp())
    assert same(loaded.tensors, model)
    assert loaded.kind == "DeepSpeed ZeRO"
    assert called == [(str(tmp_path / "run"), "global_step5")]
    assert capsys.readouterr().out == ""  # which belongs to what the command line answers


@pytest.mark.slow
def test_a_run_that_deepspeed_wrote(tmp_path, capfd):
    """ZeRO-2 in bfloat16, in a process of its own; DeepSpeed compiles an operator when it runs for the first time."""
    pytest.importorskip("deepspeed", reason="needs deepspeed, which is not in the extra dev")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    toys.python(DEEPSPEED, tmp_path / "run", tmp_path / "weights.pt", DS_ACCELERATOR="cpu", **process)
    expected = torch.load(tmp_path / "weights.pt")
    capfd.readouterr()
    model = toys.mlp()
    (found,) = find_checkpoints(tmp_path / "run", learning_rate=0.1)
    loaded = found.read(model)
    assert (found.step, loaded.kind) == (3, "DeepSpeed ZeRO")
    assert loaded.tensors.keys() == expected.keys()
    for name, weight in expected.items():  # whose master copies in float32 are what was saved
        assert loaded.tensors[name].dtype == torch.float32
        torch.testing.assert_close(loaded.tensors[name], weight.float(), rtol=2**-8, atol=0)
    assert capfd.readouterr().out == ""


DEEPSPEED = """
import sys
import deepspeed, torch
from torch import nn

deepspeed.init_distributed(dist_backend="gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
optimizer = {"type": "Adam", "params": {"lr": 0.1, "torch_adam": True}}
options = {"train_batch_size": 4, "optimizer": optimizer, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=options)[0]
for _ in range(3):
    engine.backward(engine(torch.randn(4, 6).bfloat16()).float().square().mean())
    engine.step()
engine.save_checkpoint(sys.argv[1])
torch.save({name: weight.detach() for name, weight in engine.module.named_parameters()}, sys.argv[2])
"""


def test_a_latest_that_was_not_written_yet_is_named(tmp_path):
    zero(tmp_path / "run", 5)
    (tmp_path / "run" / "latest").write_text("global_step9")
    with pytest.raises(CheckpointError, match="names global_step9 as its latest checkpoint, which has no parts"):
        Checkpoint(tmp_path / "run", 0.1).load(toys.mlp())


def test_scores_of_distributed_checkpoints_equal_those_of_files(tmp_path):
    task = toys.make_task(tmp_path, rates=(0.1,), n_train=4)
    dcp.save({"model": task.checkpoints[0].load(task.model)}, checkpoint_id=str(tmp_path / "w"), no_dist=True)
    other = gradindex.Task(task.model, task.loss, task.train, Checkpoint(tmp_path / "w", 0.1, step=0))
    items = [task.train[i] for i in range(4)]
    assert (gradindex.exact_scores(task, items) == gradindex.exact_scores(other, items)).all()
