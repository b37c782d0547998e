"""Task: what is refused and why, how one is found by name, and when two data sets are the same."""

import collections
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from places import TESTS
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import gradindex
from gradindex.digests import digest
from gradindex.errors import ArgumentError, TaskError
from gradindex.tree import map_tensors, preserved_random_state, tensors

DATA = TensorDataset(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


REFUSED = {
    "model": ({"model": "resnet"}, "model is a str, but must be a torch.nn.Module"),
    "loader": ({"train": DataLoader(DATA)}, r"train is a DataLoader.*Give its data set: train=loader.dataset"),
    "query loader": ({"query": DataLoader(DATA)}, r"query is a DataLoader.*query=loader.dataset"),
    "stream": ({"train": Stream()}, "train is a Stream, which cannot be indexed"),
    "generator": ({"train": (i for i in range(3))}, "train is a generator, which cannot be indexed"),
    "tensor": ({"train": torch.zeros(4, 6)}, r"train is a Tensor.*Use TensorDataset\(x, y\)"),
    "empty": ({"train": []}, "train is empty. Give at least one example"),
    "no checkpoints": ({"checkpoints": []}, "checkpoints is empty"),
    "paths": ({"checkpoints": ["w_0.pt"]}, r"checkpoints\[0\] is a str, but must be a gradindex.Checkpoint"),
    "short column": ({"columns": {"label": [1, 2]}}, r"columns\['label'\] has 2 values, but train has 12 examples"),
    "short query column": (
        {"query_columns": {"label": [1]}},
        r"query_columns\['label'\] has 1 values, but query has 4",
    ),
    "objects": ({"columns": {"label": [object()] * 12}}, r"columns\['label'\] holds a object \(at place 0\)"),
    "complex": (
        {"columns": {"label": [1j] * 12}},
        r"holds a complex \(at place 0\), but a column must hold numbers, booleans, strings or dates",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_task_is_refused_with_the_reason(tmp_path, case):
    changes, message = REFUSED[case]
    task = toys.make_task(tmp_path)
    with pytest.raises(TaskError, match=message):
        replace(task, **changes)


def test_columns_come_in_many_kinds(tmp_path):
    columns = {"a": list("ab") * 6, "b": torch.arange(12), "c": np.linspace(0, 1, 12), "d": [True] * 12, "e": range(12)}
    arrays = toys.make_task(tmp_path, columns=columns).column_arrays("train")
    assert {name: values.dtype.kind for name, values in arrays.items()} == dict(zip("abcde", "Uifbi", strict=True))
    assert arrays["b"].tolist() == list(range(12))


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "neighbour.py").write_text("answer = 42\n")
    (tmp_path / "my_tasks.py").write_text(
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import toys\nfrom pathlib import Path\nfrom neighbour import answer\n"
        "task = toys.make_task(Path(__file__).parent, name='mine')\n"
        "def make(): return task\n"
        "def fails(): raise KeyError('label')\n"
    )
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    yield
    for name in ("my_tasks", "neighbour", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["my_tasks.py:task", "my_tasks.py:make", "my_tasks:task", "./my_tasks.py:make"])
def test_a_task_is_found_by_file_or_module(module, name):
    assert gradindex.load_task(name).name == "mine"


NAMES = {
    "my_tasks.py": "'my_tasks.py' does not name a task. Write path/to/file.py:name or package.module:name",
    ":task": "does not name a task",
    "my_tasks.py:": "does not name a task",
    "other.py:task": "Task file other.py does not exist. Check the path",
    "my_tasks.py:tasks": "my_tasks.py has no 'tasks'. Close names: task",
    "my_tasks.py:answer": "my_tasks.py:answer is a int, but must be a gradindex.Task or a callable that returns one",
    "my_tasks.py:Path": "my_tasks.py:Path is a PosixPath",
    "my_tasks.py:fails": "Calling my_tasks.py:fails failed: KeyError: 'label'",
    "broken.py:task": "Importing broken.py failed: ModuleNotFoundError: No module named 'nothing_of_that_name'",
    "nowhere.at.all:task": "Importing nowhere.at.all failed: ModuleNotFoundError",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_to_no_task_is_explained(module, name):
    with pytest.raises(TaskError, match=NAMES[name]):
        gradindex.load_task(name)


def test_queries_are_read_by_the_tasks_own_function(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("a b")
    task = toys.make_task(tmp_path, read_query=lambda path: (word for word in path.read_text().split()))
    assert task.read_queries(path) == ["a", "b"]
    with pytest.raises(ArgumentError, match=r"no.txt does not exist"):
        task.read_queries(tmp_path / "no.txt")
    with pytest.raises(TaskError, match="has no read_query, so it cannot read queries from a file"):
        replace(task, read_query=None).read_queries(path)
    with pytest.raises(TaskError, match=r"Reading queries from .*words.txt failed: ZeroDivisionError"):
        replace(task, read_query=lambda path: 1 / 0).read_queries(path)


class Noisy(TensorDataset):
    """Differs between reads by whichever generator is named."""

    def __init__(self, generator):
        super().__init__(torch.zeros(12, 6), torch.zeros(12, dtype=torch.long))
        self.noise = {"torch": torch.rand, "numpy": lambda _: np.random.rand(), "python": lambda _: random.random()}[
            generator
        ]

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + float(self.noise(1)), y


@pytest.mark.parametrize("generator", ["torch", "numpy", "python"])
def test_augmented_data_is_refused_and_no_random_state_changes(tmp_path, generator):
    task = replace(toys.make_task(tmp_path), train=Noisy(generator))
    before = torch.rand(1, generator=None), np.random.get_state()[1].copy(), random.getstate()
    state = torch.random.get_rng_state()
    with pytest.raises(TaskError, match=r"Training example 0 differs between two reads \(8 of 8 sampled ones do\)"):
        task.check_reads_repeat()
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_the_fingerprint_follows_values_order_and_length(tmp_path):
    task = toys.make_task(tmp_path)
    own = task.data_fingerprint()
    assert replace(task, train=list(task.train)).data_fingerprint() == own
    items = list(task.train)
    for other in (items[::-1], items[:-1], [(items[0][0] + 1e-9, items[0][1]), *items[1:]], [(x,) for x, _ in items]):
        assert replace(task, train=other).data_fingerprint() != own


DIGEST = """
import numpy as np, torch
from gradindex.digests import digest
class Mine:
    def __init__(self): self.words, self.image = set("abcdefgh"), np.arange(6).reshape(2, 3)
print(digest(({"a": torch.ones(2), "b": [1, "x", None, 2.5, True]}, np.float32(3), b"y", Mine())).hex())
"""


@pytest.mark.slow
def test_a_digest_is_the_same_in_another_process(capsys):
    exec(DIGEST, {"__name__": "__main__"})
    here = capsys.readouterr().out
    assert len(here) == 65
    assert toys.python(DIGEST, **toys.OTHER_HASHES) == here


Pair = collections.namedtuple("Pair", "x y")


def test_different_values_have_different_digests():
    image = Image.new("L", (2, 2))
    values = [
        (1, 2), ([1], 2), (12,), {"a": 1}, {"b": 1}, "1", 1, 1.0, True, None, torch.ones(2), torch.ones(2, 1),
        torch.ones(2).double(), torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int16), image,
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest(image) == digest(Image.new("L", (2, 2)))


def test_tensors_are_mapped_inside_every_structure():
    tree = {"a": (torch.ones(1), "text"), "b": [Pair(torch.ones(2), 3)], "c": collections.OrderedDict(d=torch.ones(3))}
    doubled = map_tensors(tree, lambda tensor: tensor * 2)
    assert doubled["b"][0].x.tolist() == [2, 2]
    assert doubled["b"][0].y == 3
    assert doubled["a"][1] == "text"
    assert type(doubled["c"]) is collections.OrderedDict
    assert [len(tensor) for tensor in tensors(tree)] == [1, 2, 3]


def test_random_states_come_back_after_an_exception():
    before = torch.random.get_rng_state(), random.getstate()
    with pytest.raises(ValueError, match="inside"), preserved_random_state():
        torch.rand(3), random.random()
        raise ValueError("inside")
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
