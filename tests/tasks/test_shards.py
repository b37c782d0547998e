"""Folders that processes write together, by Recorder and by others: rates, steps, loss and moments are read back."""

import json

import pytest
import torch
import toys
from together import run_together
from torch import nn

import gradindex
from gradindex import Checkpoint, find_checkpoints
from gradindex.errors import ArgumentError, CheckpointError

pytestmark = [
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="needs torch.distributed with gloo",
    ),
    pytest.mark.filterwarnings("ignore"),
]

# Run by both processes: trains, saves in each way, and notes which rates the steps used.
WORKER = """
import os, sys, types, warnings
os.environ["ACCELERATE_USE_CPU"] = "true"
warnings.simplefilter("ignore")
from pathlib import Path
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
import together
import toys
import gradindex

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
try:  # what Accelerator.save_state calls; an Accelerator itself shards on GPUs alone
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import fsdp_utils

    PartialState(cpu=True)
except ImportError:
    fsdp_utils = None


def train(kind, folder):
    torch.manual_seed(0)
    model = toys.mlp()
    model.register_buffer("scale", torch.ones(2))
    model = together.wrapped(model, kind)
    accelerator = types.SimpleNamespace(
        process_index=rank, num_processes=2, is_fsdp2=kind == "fsdp2", is_main_process=rank == 0,
        wait_for_everyone=torch.distributed.barrier,
    )
    moments = kind != "fsdp1"
    first, *rest = model.parameters()
    optimizer = torch.optim.Adam([{"params": [first], "lr": 0.01}, {"params": rest, "lr": 0.002}])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    used = []
    optimizer.register_step_pre_hook(lambda o, *_: used.append([group["lr"] for group in o.param_groups]))
    whole = gradindex.Recorder(model, optimizer, folder / "whole", second_moments=moments)
    shards = gradindex.Recorder(model, optimizer, folder / "shards", second_moments=moments, sharded=True)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        for _ in range(3):
            together.step(model, optimizer, generator)
            schedule.step()
        whole.save(0.5)
        path = shards.save(0.5)
        assert (path / ".metadata").is_file() and (path / "gradindex.json").is_file()
        assert path.name == f"step_{shards.step:08d}"
        weights, state = get_state_dict(model, optimizer)
        extra = {"lr_scheduler": schedule.state_dict()}
        dcp.save({"model": weights, "optimizer": state, **extra}, checkpoint_id=str(folder / "guide" / path.name))
        flat = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))[1]
        dcp.save({"model": weights, "optimizer": flat}, checkpoint_id=str(folder / "flat" / path.name))
        here = folder / "accelerate" / path.name
        here.mkdir(parents=True, exist_ok=True)
        if kind == "ddp" or fsdp_utils is None:
            dcp.save({"model": weights}, checkpoint_id=str(here / "pytorch_model_fsdp_0"))
            dcp.save({"optimizer": state}, checkpoint_id=str(here / "optimizer_0"))
        else:
            plugin = FullyShardedDataParallelPlugin(fsdp_version=int(kind[-1]), state_dict_type="SHARDED_STATE_DICT")
            fsdp_utils.save_fsdp_model(plugin, accelerator, model, str(here))
            fsdp_utils.save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(here))
        torch.save({}, here / f"random_states_{rank}.pkl")
        if rank == 0:
            torch.save(schedule.state_dict(), here / "scheduler.bin")
            torch.save(used, folder / "used.pt")
    torch.distributed.barrier()


for kind in sys.argv[2:]:
    train(kind, Path(sys.argv[1]) / kind)
torch.distributed.destroy_process_group()
"""
KINDS = ("ddp", "fsdp1", "fsdp2")
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.fixture
def run(made_once, request):
    """The folder of a training by two processes, and the rates of both groups at each step."""

    def make(folder):
        (folder / "worker.py").write_text(WORKER)
        run_together(folder / "worker.py", folder, *KINDS)

    folder = made_once("shards", make) / request.param
    return folder, torch.load(folder / "used.pt")


def model():
    made = toys.mlp()
    made.register_buffer("scale", torch.zeros(2))
    return made


def rates(used, step):
    first, rest = used[step - 1]
    return dict(zip(NAMES, [first, rest, rest, rest], strict=True))


def same_moments(found, expected):
    assert found.keys() == expected.keys() == set(NAMES)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("run", KINDS, indirect=True)
def test_shards_hold_what_the_first_process_writes_whole(run):
    folder, used = run
    sharded, whole = find_checkpoints(folder / "shards"), find_checkpoints(folder / "whole")
    assert [item.step for item in sharded] == [item.step for item in whole] == [3, 6]
    for one, other in zip(sharded, whole, strict=True):
        found, expected = one.read(model()), other.read(model())
        assert found.kind == "gradindex.Recorder, torch distributed checkpoint"
        assert found.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
        assert one.learning_rates(NAMES, model()) == rates(used, one.step) == one.learning_rates(NAMES)
        assert one.recorded_training(NAMES, model()) == dict.fromkeys(NAMES, True)
        assert one.loss() == 0.5
        record = json.loads((folder / "shards" / f"step_{one.step:08d}" / "gradindex.json").read_text())
        assert record == {name: value for name, value in expected.record.items() if name != "second_moments"}
        if "second_moments" in expected.record:
            same_moments(one.second_moments(model()), other.second_moments(model()))
            same_moments(one.read(model(), moments=True).second_moments(), other.second_moments(model()))
    (integrated,) = find_checkpoints(folder / "shards", weighting="integrated")[1:]
    total = sum(each[0] for each in used[3:])
    assert integrated.learning_rates(["0.weight"], model()) == {"0.weight": pytest.approx(total)}


@pytest.mark.slow
@pytest.mark.parametrize("run", KINDS, indirect=True)
@pytest.mark.parametrize("way", ["guide", "flat", "accelerate"])
def test_of_folders_that_others_wrote_the_optimizer_is_read(run, way):
    """The scheduler's state tells what the last step used; without it, the groups have what it set afterwards."""
    folder, used = run
    whole = find_checkpoints(folder / "whole")
    found = find_checkpoints(folder / way)
    assert [item.step for item in found] == [3, 6]
    # How many steps came before the first is not known without a schedule.
    trained = [None if way == "flat" else True, True]
    assert [item.recorded_training(NAMES, model()) for item in found] == [
        dict.fromkeys(NAMES, took) for took in trained
    ]
    for item, other in zip(found, whole, strict=True):
        after = 0.5 if way == "flat" else 1
        expected = {name: rate * after for name, rate in rates(used, item.step).items()}
        assert item.learning_rates(NAMES, model()) == pytest.approx(expected)
        tensors = item.read(model()).tensors
        assert all(torch.equal(tensors[name], tensor) for name, tensor in other.load(model()).items())
        moments = item.second_moments(model())
        if "second_moments" in other.read(model()).record:
            same_moments(moments, other.second_moments(model()))
        assert moments.keys() == set(NAMES)
    integrated = find_checkpoints(folder / way, weighting="integrated")[1]
    if way == "flat":
        with pytest.raises(CheckpointError, match="no logged schedule"):
            integrated.learning_rates(NAMES, model())
    else:
        total = pytest.approx(sum(each[1] for each in used[3:]))
        assert integrated.learning_rates(["2.bias"], model()) == {"2.bias": total}


def recorded(folder, steps=(1,), kind=torch.optim.Adam, **options):
    torch.manual_seed(0)
    made = toys.mlp()
    optimizer = kind(made.parameters(), 0.1)
    recorder = gradindex.Recorder(made, optimizer, folder, sharded=True, **options)
    for _ in steps:
        made(torch.ones(2, 6)).square().mean().backward()
        optimizer.step()
        recorder.save()
    return made


def test_one_process_alone_writes_such_folders_too_and_a_build_reads_them(tmp_path):
    made = recorded(tmp_path, (1, 2), second_moments=True)
    data = [(torch.ones(6) * i, i % 3) for i in range(4)]
    found = find_checkpoints(tmp_path)
    task = gradindex.Task(toys.mlp(), toys.cross_entropy, data, found, preconditioner="adam")
    store = gradindex.build(task, tmp_path.with_name("store"))
    assert [item.step for item in store.manifest.map.checkpoints] == [1, 2]
    assert {rate for item in store.manifest.map.checkpoints for rate in item.learning_rates.values()} == {0.1}
    assert torch.equal(found[-1].load(toys.mlp())["2.weight"], made[2].weight)


def test_a_folder_that_is_being_written_is_not_found(tmp_path, monkeypatch):
    recorded(tmp_path / "run", (1, 2))
    whole = tmp_path / "run" / "step_00000002"
    whole.rename(tmp_path / "run" / ".step_00000002.tmp-host-1-0123abcd")
    assert [item.step for item in find_checkpoints(tmp_path / "run")] == [1]
    assert [item.step for item in find_checkpoints(tmp_path / "run" / "*")] == [1]
    recorded(tmp_path / "run", overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_00000001"]


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("json.dumps", lambda value: 1 / 0)
    with pytest.raises(
        CheckpointError, match=r"step_00000001 cannot be written: division by zero\. Check that all pro"
    ):
        recorded(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_trainings_do_not_mix_their_folders(tmp_path):
    recorded(tmp_path, (1, 2))
    with pytest.raises(ArgumentError, match="already holds 2 checkpoints of another training"):
        recorded(tmp_path)
    recorded(tmp_path, first_step=1, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_only_what_was_trained_and_a_damaged_record(tmp_path):
    torch.manual_seed(0)
    made = toys.mlp()
    optimizer = torch.optim.SGD(made[2].parameters(), 0.1)
    recorder = gradindex.Recorder(made, optimizer, tmp_path, sharded=True, only_trained=True)
    made(torch.ones(2, 6)).square().mean().backward()
    optimizer.step()
    path = recorder.save()
    (found,) = find_checkpoints(tmp_path, base="model")
    assert found.read(toys.mlp()).from_base == ("0.weight", "0.bias")
    assert found.learning_rates(["2.bias"], toys.mlp()) == {"2.bias": 0.1}
    (path / "gradindex.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"gradindex\.json cannot be read as JSON"):
        find_checkpoints(tmp_path)


def test_a_numbered_state_and_one_inside_an_applications(tmp_path):
    import torch.distributed.checkpoint as dcp

    made = toys.mlp()
    optimizer = torch.optim.Adam(
        [{"params": made[0].parameters(), "lr": 0.01}, {"params": made[2].parameters(), "lr": 0.003}]
    )
    made(torch.ones(2, 6)).square().mean().backward()
    optimizer.step()
    content = {"app": {"net": made.state_dict(), "optim": optimizer.state_dict()}}
    dcp.save(content, checkpoint_id=str(tmp_path / "step_1"))
    found = Checkpoint(tmp_path / "step_1", key="app.net")
    assert found.learning_rates(NAMES, toys.mlp()) == dict(zip(NAMES, [0.01, 0.01, 0.003, 0.003], strict=True))
    moments = found.second_moments(toys.mlp())
    torch.testing.assert_close(moments["2.bias"], optimizer.state[made[2].bias]["exp_avg_sq"] / (1 - 0.999))


def test_a_part_of_what_was_saved_in_shards(tmp_path):
    torch.manual_seed(0)
    made = nn.ModuleDict({"net": toys.mlp(), "head": nn.Linear(3, 2)})
    optimizer = torch.optim.Adam(
        [{"params": made["net"].parameters(), "lr": 0.01}, {"params": made["head"].parameters(), "lr": 0.003}]
    )
    recorder = gradindex.Recorder(made, optimizer, tmp_path, sharded=True, second_moments=True)
    made["head"](made["net"](torch.ones(2, 6))).square().mean().backward()
    optimizer.step()
    found = Checkpoint(recorder.save())
    assert found.learning_rates(NAMES, toys.mlp()) == dict.fromkeys(NAMES, 0.01)
    assert found.second_moments(toys.mlp()).keys() == set(NAMES)
