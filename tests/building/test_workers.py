"""Examples that other processes read: forked or not, with files, lambdas and deaths."""

import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from places import TESTS
from torch import nn
from toys import make_task

import gradindex
from gradindex import reading
from gradindex.errors import OutOfMemoryError, TaskError, UserCodeError, WorkerError, user_code

OPTIONS = {"batch_size": 4, "shard_rows": 8}


@pytest.fixture
def spawned():
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture
def task(tmp_path):
    (tmp_path / "weights").mkdir()
    return make_task(tmp_path / "weights", rates=(0.1,))


class Data:
    """The examples of another data set, with something done to each and something held."""

    def __init__(self, data, each=None, **held):
        self.data, self.each = data, each
        self.__dict__.update(held)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i] if self.each is None else self.each(i, self.data[i])


def unchanged(i, item):
    return item


def killed(i, item):
    if i == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def left(i, item):
    if i == 6:
        os._exit(3)
    return item


@pytest.mark.slow
def test_a_task_of_a_file_is_read_by_processes_that_are_not_forked(task, tmp_path, spawned):
    (tmp_path / "my_task.py").write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        from pathlib import Path
        from toys import make_task
        class Twice:
            def __init__(self, data): self.data = data
            def __len__(self): return len(self.data)
            def __getitem__(self, i): return self.data[i][0] * 2, self.data[i][1]
        folder = Path({str(tmp_path / "weights")!r})
        given = make_task(folder, rates=(0.1,))
        task = make_task(folder, rates=(0.1,), train=Twice(given.train))
        """)
    )
    loaded = gradindex.load_task(f"{tmp_path}/my_task.py:task")
    options = OPTIONS | {"shard_rows": 12}  # the processes are started for each shard
    here = gradindex.build(loaded, tmp_path / "here", **options)
    there = gradindex.build(loaded, tmp_path / "there", **options, workers=2)
    np.testing.assert_array_equal(here.rows(here.ids), there.rows(there.ids))


def test_the_tasks_of_two_files_of_one_name_are_both_handed_on(task, tmp_path):
    loaded = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(f"class Data(list):\n    kind = {folder!r}\ntask = Data()\n")
        loaded.append(reading.import_file(tmp_path / folder / "same.py").task)
    assert [pickle.loads(pickle.dumps(one)).kind for one in loaded] == ["a", "b"]


def test_a_task_file_does_not_take_the_place_of_a_module(tmp_path):
    (tmp_path / "json.py").write_text("name = __name__\n")
    assert reading.import_file(tmp_path / "json.py").name == "json_2"
    assert hasattr(sys.modules["json"], "dumps")


def in_a_function():
    class Local(Data):
        pass

    def each(i, item):
        return item

    return Local, each


UNPICKLABLE = {
    "lambda": (
        lambda task, path: Data(task.train, lambda i, item: item),
        "train.each is a lambda (test_workers.py, line ",
        "def",
    ),
    "lambda in a list": (
        lambda task, path: Data(task.train, steps=[unchanged, {"flip": lambda x: x}]),
        "train.steps[1]['flip'] is a lambda",
        "def",
    ),
    "function in a function": (
        lambda task, path: Data(task.train, in_a_function()[1]),
        "train.each is the function in_a_function.<locals>",
        "def",
    ),
    "class in a function": (
        lambda task, path: in_a_function()[0](task.train),
        "train is a Local",
        "class at the top level",
    ),
    "lock": (lambda task, path: Data(task.train, lock=threading.Lock()), "train.lock is a lock", "when the first"),
    "file": (lambda task, path: Data(task.train, f=path.open("wb")), "train.f is a BufferedWriter", "Open it when"),
    "HDF5": (lambda task, path: Data(task.train, f=h5py.File(path, "w")), "train.f is a File", "Open it when"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", UNPICKLABLE)
def test_what_cannot_be_handed_on_is_named_with_ways_out(task, tmp_path, case, spawned):
    make, what, way = UNPICKLABLE[case]
    data = make(task, tmp_path / "held")
    changed = replace(task, train=data)
    with pytest.raises(TaskError, match=re.escape(what)) as caught:
        gradindex.build(changed, tmp_path / "store", **OPTIONS, workers=1)
    assert way in str(caught.value) and "workers=0" in str(caught.value) and "\n" not in str(caught.value)
    assert gradindex.build(changed, tmp_path / "store", **OPTIONS).n_train == 12
    if hasattr(data, "f"):
        data.f.close()


@pytest.mark.slow
@pytest.mark.parametrize("held", ["file", "zip"])
def test_forked_processes_would_share_the_position_of_an_open_file(task, tmp_path, held):
    (tmp_path / "plain").write_bytes(bytes(100))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a", "b")
    with zipfile.ZipFile(tmp_path / "zip") as archive, (tmp_path / "plain").open("rb") as file:
        data = Data(task.train, files=[archive if held == "zip" else file])
        with pytest.raises(TaskError, match=r"train\.files\[0\] is an open file.*workers=0"):
            gradindex.build(replace(task, train=data), tmp_path / "store", **OPTIONS, workers=1)
    closed = replace(task, train=Data(task.train, files=[archive, file]))
    assert gradindex.build(closed, tmp_path / "store", **OPTIONS, workers=1).n_train == 12


@pytest.mark.slow
@pytest.mark.parametrize("each", [killed, left])
def test_the_death_of_a_reading_process_is_one_line_and_the_build_goes_on(task, tmp_path, each):
    # The checks read a few examples in this process, which must live on: of 300, they leave out number 6.
    task = make_task(tmp_path / "weights", rates=(0.1,), n_train=300)
    options = {"batch_size": 4, "shard_rows": 100}
    with pytest.raises(WorkerError, match="died.*fewer workers") as caught:
        gradindex.build(replace(task, train=Data(task.train, each)), tmp_path / "store", **options, workers=1)
    assert "\n" not in str(caught.value)
    store = gradindex.build(task, tmp_path / "store", **options)
    assert store.n_train == 300


def test_a_death_that_torch_reports_inside_the_loss_is_not_blamed_on_it():
    with pytest.raises(WorkerError, match="died"), reading.reading_processes(), user_code("The loss"):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="something else"), reading.reading_processes():
        raise RuntimeError("something else")


def stops(i, item):
    if i == 6:
        raise StopIteration
    return item


def ends(i, item):
    if i == 6:
        raise IndexError("list index out of range")
    return item


def asks_too_much(i, item):
    if i == 6:
        raise MemoryError
    return item


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("each", "error", "message"),
    [
        (stops, UserCodeError, "Reading training example 6 failed: StopIteration."),
        (ends, UserCodeError, "Reading training example 6 failed: IndexError: list index out of range. The data set "),
        (asks_too_much, OutOfMemoryError, "Reading training example 6 ran out of memory"),
    ],
)
def test_a_data_set_that_fails_is_named_with_the_example(task, tmp_path, workers, each, error, message):
    task = make_task(tmp_path / "weights", rates=(0.1,), n_train=300)
    options = {"batch_size": 4, "shard_rows": 100, "workers": workers}
    with pytest.raises(error, match=re.escape(message)) as caught:
        gradindex.build(replace(task, train=Data(task.train, each)), tmp_path / "store", **options)
    assert "\n" not in str(caught.value)
    assert not gradindex.GradientStore.complete(tmp_path / "store")


def generates(i, item):
    return (*item, (x for x in [1]))


def with_a_lambda(i, item):
    return {"x": item[0], "y": item[1], "later": lambda: 1}


@pytest.mark.parametrize("each", [generates, with_a_lambda])
def test_an_item_that_cannot_be_sent_is_an_error_and_no_hang(task, each):
    with pytest.raises(UserCodeError, match=r"cannot be sent from a reading process.*workers=0"):
        list(reading.read(replace(task, train=Data(task.train, each)), task.train_ids, 4, 1))


def many_tensors(i, item):
    return [torch.full((2,), float(i)) for _ in range(40)]


@pytest.mark.slow
def test_more_tensors_than_files_may_be_open_arrive(tmp_path):
    code = """
import resource, sys
import numpy as np, torch
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from test_workers import Data, many_tensors
from toys import make_task
from gradindex import reading
task = make_task(Path(sys.argv[3]), rates=(0.1,), train=Data(range(60), many_tensors))
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
for number, examples in enumerate(reading.read(task, np.arange(60), 30, 2)):
    for place, item in enumerate(examples.items):
        assert all(bool((one == number * 30 + place).all()) for one in item)
print("all")
"""
    command = [sys.executable, "-c", code, str(TESTS), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all\n", done.stderr


def test_items_arrive_as_they_were_sent():
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    weight = nn.Parameter(torch.randn(3))
    item = {
        "tensors": [
            torch.randn(5).to(torch.bfloat16), torch.tensor(True), torch.zeros(0, 3), torch.tensor(2 + 1j),
            channels_last, torch.arange(10)[2:8:2], torch.randn(4, requires_grad=True), torch.randn(2, 3).T, weight,
        ],
        "array": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "texts": ("a", None, np.str_("b"), 3),
    }  # fmt: skip
    (back,) = reading._unpack(reading._pack([item]))
    for sent, got in zip(item["tensors"], back["tensors"], strict=True):
        assert type(got) is type(sent) and got.dtype == sent.dtype and got.requires_grad == sent.requires_grad
        assert torch.equal(got, sent)
    assert back["tensors"][4].stride() == channels_last.stride()
    np.testing.assert_array_equal(back["array"], item["array"])
    assert back["texts"] == item["texts"]
    back["array"][0] = 7  # nobody else's
    picture = Image.new("L", (4, 4), 7)
    assert np.asarray(reading._unpack(reading._pack([picture]))[0]).tolist() == [[7] * 4] * 4
