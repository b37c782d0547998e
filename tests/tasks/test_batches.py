"""Items and batches of a user's own classes: cast, moved, digested, and never changed."""

import collections
import dataclasses
import datetime
import enum
import functools
import pathlib
import threading
import time
import types
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import TensorDataset

import gradindex
from gradindex.digests import digest
from gradindex.errors import TaskError
from gradindex.gradients import Engine, check_routes
from gradindex.tree import map_tensors, shapes, tensors

X, Y = torch.arange(6.0).reshape(2, 3), torch.tensor([1, 2])


@dataclasses.dataclass
class Open:
    x: torch.Tensor
    y: torch.Tensor
    note: str = "kept"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: torch.Tensor
    y: torch.Tensor


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Picky(tuple):
    """A tuple whose constructor takes something else, with an attribute."""

    def __new__(cls, x, y):
        made = super().__new__(cls, (x, y))
        made.extra = x
        return made

    x = property(lambda self: self[0])
    y = property(lambda self: self[1])


class Plain:
    def __init__(self, x, y):
        self.x, self.y, self.lock = x, y, threading.Lock()  # which cannot be copied itself


class Strict:
    """Private slots, and attributes that are not to be set."""

    __slots__ = ("__x", "y")

    def __init__(self, x, y):
        object.__setattr__(self, "_Strict__x", x)
        object.__setattr__(self, "y", y)

    x = property(lambda self: self.__x)

    def __setattr__(self, name, value):
        raise AttributeError("read only")


class Chosen(collections.abc.Mapping):
    """A mapping over a dictionary inside."""

    def __init__(self, *, x, y):
        self._kept = {"x": x, "y": y}

    def __getitem__(self, key):
        return self._kept[key]

    def __iter__(self):
        return iter(self._kept)

    def __len__(self):
        return len(self._kept)

    x = property(lambda self: self["x"])
    y = property(lambda self: self["y"])


class Made(Chosen):
    """A mapping whose tensors are made when they are asked for."""

    def __init__(self, *, x, y):
        self._arrays = {"x": x.numpy(), "y": y.numpy()}
        self._kept = {"x": 0, "y": 0}

    def __getitem__(self, key):
        return torch.from_numpy(self._arrays[key])


class Attributes(dict):
    """A dictionary with attributes beside its items."""

    def __init__(self, x, y):
        super().__init__(x=x)
        self.y = y

    x = property(lambda self: self["x"])


class InPlace:
    """Moves itself, as transformers' BatchEncoding does."""

    def __init__(self, x, y):
        self.data, self.device = {"x": x, "y": y}, None

    def to(self, device):
        self.data = {name: tensor.to(device) for name, tensor in self.data.items()}
        self.device = device
        return self

    x = property(lambda self: self.data["x"])
    y = property(lambda self: self.data["y"])


class Silent(InPlace):
    """Moves itself and returns nothing."""

    def to(self, device):
        super().to(device)


class Unit:
    """A ``to`` that means something else."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, unit: str):
        return {"m": 1, "km": 1000}[unit]


class Store(collections.abc.MutableMapping):
    """As PyTorch Geometric's: what a graph keeps, with a way back to the graph that its copy must follow."""

    def __init__(self, parent, kept):
        self.parent, self.kept = parent, kept

    def __getitem__(self, key):
        return self.kept[key]

    def __setitem__(self, key, value):
        self.kept[key] = value

    def __delitem__(self, key):
        del self.kept[key]

    def __iter__(self):
        return iter(self.kept)

    def __len__(self):
        return len(self.kept)


class Graph:
    def __init__(self, x, y):
        self.__dict__["store"] = Store(self, {"x": x, "y": y})

    def __getattr__(self, name):
        if name == "store" or name.startswith("__"):
            raise AttributeError(name)
        return self.store[name]

    def __setattr__(self, name, value):
        self.store[name] = value

    def __copy__(self):
        made = type(self).__new__(type(self))
        made.__dict__["store"] = Store(made, dict(self.store.kept))
        return made

    def to(self, device):
        for name, value in self.store.items():
            self.store[name] = value.to(device)
        return self


BATCHES = {
    "dataclass": Open,
    "frozen dataclass": Frozen,
    "slots": Slotted,
    "named tuple": Named,
    "tuple of its own": Picky,
    "plain object": Plain,
    "private slots": Strict,
    "namespace": lambda x, y: types.SimpleNamespace(x=x, y=y),
    "mapping": lambda x, y: Chosen(x=x, y=y),
    "dictionary with attributes": Attributes,
    "moves itself": InPlace,
    "moves itself and says nothing": Silent,
    "to means something else": Unit,
    "graph": Graph,
}


@pytest.mark.parametrize("case", BATCHES)
def test_tensors_of_own_classes_are_cast_and_the_users_object_is_not_changed(tmp_path, case):
    batch = BATCHES[case](X, Y)
    with Engine(toys.make_task(tmp_path), "float64") as engine:
        for tree, inside in ((batch, lambda x: x), ({"a": [batch]}, lambda x: x["a"][0])):
            cast = inside(engine.cast(tree))
            assert type(cast) is type(batch)
            assert cast is not batch
            assert (cast.x.dtype, cast.y.dtype) == (torch.float64, torch.int64)
            assert torch.equal(cast.x, X.double())
            assert torch.equal(cast.y, Y)
            assert batch.x is X
            assert batch.y is Y
    if case == "graph":
        assert cast.store.parent is cast
    if case == "tuple of its own":
        assert cast.extra is cast.x  # the same tensor in two places stays the same
    if case.startswith("moves itself"):
        assert (cast.device, batch.device) == (engine.device, None)


def test_containers_keep_their_types():
    batch = {
        "default": collections.defaultdict(list, a=[X]),
        "ordered": collections.OrderedDict(b=X, a=Y),
        "view": types.MappingProxyType({"a": {"b": X}}),
        "made": Made(x=X, y=Y),
        "deque": collections.deque([X, 1], maxlen=2),
        "set": {X},
        "objects": np.array([X, None], dtype=object),
        "size": X.shape,
        "text": ["a", None],
        "maxima": X.max(1),
    }
    doubled = map_tensors(batch, lambda tensor: tensor * 2)
    kinds = {name: dict if name in ("made",) else type(value) for name, value in batch.items()}
    assert {name: type(value) for name, value in doubled.items()} == kinds
    assert doubled["default"]["new"] == []
    assert list(doubled["ordered"]) == ["b", "a"]
    assert doubled["deque"].maxlen == 2
    for found in (
        doubled["default"]["a"][0], doubled["ordered"]["b"], doubled["view"]["a"]["b"], doubled["made"]["x"],
        doubled["deque"][0], next(iter(doubled["set"])), doubled["objects"][0],
    ):  # fmt: skip
        assert torch.equal(found, X * 2)
    assert doubled["text"] == batch["text"]
    assert doubled["text"] is not batch["text"]  # which a loss may take apart
    assert batch["objects"][0] is X


@pytest.mark.slow
def test_transformers_batches_keep_their_attributes():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import SequenceClassifierOutput

    encoding = transformers.BatchEncoding({"input_ids": Y[None], "values": X})
    output = SequenceClassifierOutput(loss=X, logits=Y)
    for batch in (encoding, output):
        cast = map_tensors(batch, lambda t: t.double() if t.is_floating_point() else t, torch.device("cpu"))
        assert type(cast) is type(batch)
    assert cast.loss.dtype == cast["loss"].dtype == torch.float64
    assert cast.logits is Y
    assert output.loss is X
    assert encoding["values"] is X
    cast = map_tensors(encoding, lambda t: t.double() if t.is_floating_point() else t, torch.device("cpu"))
    assert (cast.values.dtype if isinstance(cast.values, torch.Tensor) else cast["values"].dtype) == torch.float64


def test_a_packed_sequence_keeps_its_lengths_where_they_are():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    moved = []

    def function(tensor):
        moved.append(tensor)
        return tensor.double() if tensor.is_floating_point() else tensor

    cast = map_tensors(packed, function, torch.device("meta"))
    assert type(cast) is PackedSequence
    assert (cast.data.device.type, cast.data.dtype) == ("meta", torch.float64)
    assert (cast.batch_sizes.device.type, cast.batch_sizes.dtype) == ("cpu", torch.int64)
    words = pack_sequence([torch.tensor([1, 2]), torch.tensor([3])])
    assert map_tensors(words, lambda t: t, torch.device("cpu")).data.dtype == torch.int64


ODD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
    "nested, 4 axes": lambda: torch.nested.nested_tensor([torch.ones(2, 3, 4), torch.ones(1, 3, 4)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged),
    "bfloat16": lambda: torch.ones(2, dtype=torch.bfloat16),
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "four axes, sparse": lambda: torch.ones(1, 2, 2, 2).to_sparse(),
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse|sparse)")
@pytest.mark.parametrize("case", ODD)
def test_odd_tensors_are_cast(tmp_path, case):
    odd = ODD[case]()
    with Engine(toys.make_task(tmp_path), "float64") as engine:
        cast = engine.cast({"x": odd})["x"]
    assert cast.dtype == (torch.complex128 if case == "complex" else torch.float64)
    assert cast.layout == odd.layout
    assert cast.is_nested == odd.is_nested


class Item:
    """One of many that know each other."""

    def __init__(self, x, others):
        self.x, self.others = x, others


def neighbours(n):
    items = [Item(torch.full((2,), float(i)), []) for i in range(n)]
    for i, item in enumerate(items):
        item.others += [items[(i + k) % n] for k in range(1, 6)]
    return items


def test_items_that_know_each_other_end():
    items = neighbours(30)
    mapped = map_tensors(items[0], lambda tensor: tensor + 1)
    assert torch.equal(mapped.x, torch.ones(2))
    assert mapped.others[0].others[0].x[0] == 3
    assert mapped.others[0].others[0] is mapped.others[1]
    assert mapped.others[-1].others[-1].others[-1].others[-1].others[-1].others[-1] is mapped  # 6 x 5 = 30
    assert len(tensors(items[0])) == 30
    assert digest(items[0]) == digest(neighbours(30)[0]) != digest(items[1])


def test_a_list_that_holds_itself_ends():
    knot = [X]
    knot.append((knot, "end"))
    mapped = map_tensors(knot, lambda tensor: tensor * 2)
    assert mapped[1][0] is mapped
    again = [X.clone()]
    again.append((again, "end"))
    assert digest(knot) == digest(again)


def test_copies_and_references_have_one_digest():
    shared = [1, 2]
    assert digest([shared, shared]) == digest([[1, 2], [1, 2]])
    deep = [X]
    for _ in range(60):
        deep = [deep, deep]  # 2^60 paths
    assert len(tensors(deep)) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradindex.digests._AGAIN", 100)
        assert digest(deep)


def test_what_an_item_refers_to_is_not_its_value(tmp_path):
    class Owned(torch.utils.data.Dataset):
        def __init__(self):
            self.rows = torch.randn(5, 3)

        def __len__(self):
            return 5

        def __getitem__(self, i):
            return Item(self.rows[i], self)

    first, second = Owned(), Owned()
    second.rows[0] = first.rows[0]
    assert digest(first[0]) == digest(second[0])
    mapped = map_tensors(first[0], lambda tensor: tensor.double())
    assert mapped.others is first
    assert mapped.x.dtype == torch.float64
    # A data set that is a plain list is known from the task.
    items = [Item(torch.full((6,), float(i)), None) for i in range(12)]
    for item in items:
        item.others = items
    task = toys.make_task(tmp_path, train=items)
    before = task.example_digest(items[0])
    items[5].x = torch.zeros(6)
    assert task.example_digest(items[0]) == before
    with Engine(task) as engine:
        assert engine.cast(items[0]).others is items


def test_shapes_of_items_that_hold_all_others_are_found_in_no_time():
    items = [Item(torch.full((6,), float(i)), None) for i in range(20_000)]
    for item in items:
        item.others = items
    started = time.perf_counter()
    assert shapes(items[0])[0] == (6,)
    assert time.perf_counter() - started < 5  # all pairs would be 400 million
    assert shapes(items[0]) == shapes(items[7])


def test_what_is_too_large_or_too_deep_is_one_line(monkeypatch):
    monkeypatch.setattr("gradindex.tree._MOST", 1000)
    far = [Item(torch.zeros(1), None) for _ in range(1000)]
    with pytest.raises(TaskError, match="leads to over 1,000 objects.*Leave the reference out"):
        map_tensors(Item(X, far), lambda tensor: tensor)
    monkeypatch.undo()
    chain = None
    for _ in range(5000):
        chain = Item(torch.zeros(1), chain)
    with pytest.raises(TaskError, match="nested too deep to be looked through"):
        map_tensors(chain, lambda tensor: tensor)
    with pytest.raises(TaskError, match="nested too deep to be compared by value"):
        digest(chain)


class Uncopied:
    def __init__(self, x):
        self.x = x

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot be pickled")

    def __new__(cls, *args):
        return super().__new__(cls)


def test_objects_that_refuse_to_be_copied_are_copied_by_their_attributes():
    batch = Uncopied(X)
    mapped = map_tensors(batch, lambda tensor: tensor * 2)
    assert torch.equal(mapped.x, X * 2)
    assert batch.x is X


# The loss of a batch of each kind, on the slow general routes: an LSTM.


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, lengths=None):
        states, (last, _) = self.lstm(x)
        if isinstance(states, PackedSequence):
            return self.head(last[-1])
        places = torch.as_tensor(lengths or [states.shape[1]] * len(states)) - 1
        return self.head(states[torch.arange(len(states)), places])


def collated(kind, items):
    sequences, targets = [x for x, _ in items], torch.stack([y for _, y in items])
    if kind == "packed":
        return Open(pack_sequence(sequences, enforce_sorted=False), targets)
    lengths = [len(x) for x in sequences]
    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return {"lengths": lengths, "batch": Frozen(padded, targets), "n": len(items)}


def loss(model, batch):
    x, y, lengths = (batch.x, batch.y, None) if isinstance(batch, Open) else (
        batch["batch"].x, batch["batch"].y, batch["lengths"],
    )  # fmt: skip
    return nn.functional.cross_entropy(model(x, lengths), y, reduction="none")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "lists of lengths"])
def test_what_cannot_be_cut_into_examples_takes_the_loop(tmp_path, kind):
    torch.manual_seed(7)
    # The two ends, which are tried first, are equally long; others are not.
    lengths = [4, 4, 2, 5, 1, 3, 4, 4]
    train = [(torch.randn(n, 3, dtype=torch.float64), torch.randint(3, ())) for n in lengths]
    task = toys.make_task(
        tmp_path, Reader(), loss=loss, train=train, query=None, collate=functools.partial(collated, kind),
    )  # fmt: skip
    with Engine(task, "float64") as engine:
        check_routes(engine)
        routes = {layer.name: layer.route for layer in engine.layers}
        assert {route for name, route in routes.items() if name.startswith("lstm")} == {"loop"}
    found = gradindex.exact_scores(task, train, precision="float64")
    expected = 0
    for checkpoint, rate in zip(task.checkpoints, toys.RATES, strict=True):
        model = task.model.double()
        model.load_state_dict(checkpoint.load(model))
        rows = []
        for item in train:
            value = loss(model, collated(kind, [item])).sum()
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
        expected = expected + rate * torch.stack(rows) @ torch.stack(rows).T
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batches_that_can_be_cut_still_take_vmap(tmp_path):
    torch.manual_seed(7)
    data = [Frozen(torch.randn(4, 3, dtype=torch.float64), torch.randint(3, ())) for _ in range(6)]
    task = toys.make_task(
        tmp_path, Reader(), train=data, query=None,
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none"),
        collate=lambda items: Frozen(torch.stack([i.x for i in items]), torch.stack([i.y for i in items])),
    )  # fmt: skip
    with Engine(task) as engine:
        check_routes(engine)
        assert {layer.route for layer in engine.layers if layer.name.startswith("lstm")} == {"vmap"}


class Kind(enum.Enum):
    A = 1
    B = 2


PROGRAM = """
import collections, datetime, enum, functools, pathlib, threading, types
import numpy as np, torch
from torch.nn.utils.rnn import pack_sequence
from gradindex.digests import digest

class Kind(enum.Enum):
    A = 1

class Slots:
    __slots__ = ("words", "tensor", "missing")
    def __init__(self): self.words, self.tensor = frozenset("abcdefgh"), torch.arange(3.0)

class Busy:
    def __init__(self):
        self.squares, self.lock, self.function = (i * i for i in range(3)), threading.Lock(), lambda x: x
        self.method, self.kind, self.cls, self.view = self.__init__, Kind.A, Kind, memoryview(b"abc")
        self.other = object()

items = [
    torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.eye(3).to_sparse_csc(),
    torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged),
    torch.ones(3).to(torch.float8_e4m3fn), torch.ones(2, dtype=torch.complex64).conj(),
    pack_sequence([torch.ones(2), torch.ones(1)]), Slots(), Busy(), np.array(["a", None, object()], dtype=object),
    10**5000, datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc), pathlib.Path("a/b"), Kind.A,
    collections.deque([torch.ones(2)]), {Kind.A: 1, ("a", 2): 3}, types.SimpleNamespace(a={1, "x", None}),
]
print(*[digest(item).hex() for item in items])
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_digests_of_odd_values_are_the_same_in_every_process(capsys):
    exec(PROGRAM, {"__name__": "__main__"})
    here = capsys.readouterr().out
    assert len(set(here.split())) == len(here.split()) == 17
    assert toys.python(PROGRAM, PYTHONWARNINGS="ignore", **toys.OTHER_HASHES) == here


class Seen:
    def __init__(self):
        self.x = [1, 2]

    @functools.cached_property
    def total(self):
        return sum(self.x)


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse|sparse)")
def test_digests_are_by_value():
    long, other = torch.zeros(5000), torch.zeros(5000)
    other[2500] = 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = [torch.quantize_per_tensor(torch.ones(2) * n, 0.1, 0, torch.quint8) for n in (1, 2)]
    different = [
        (Slotted(long, Y), Slotted(other, Y)),
        (long.to_sparse(), other.to_sparse()),
        (long[None].to_sparse_csr(), other[None].to_sparse_csr()),
        (torch.nested.nested_tensor([long]), torch.nested.nested_tensor([other])),
        (np.array([1, "a"], dtype=object), np.array([1, "b"], dtype=object)),
        (np.array([long], dtype=object), np.array([other], dtype=object)),
        (collections.deque([long]), collections.deque([other])),
        (Kind.A, Kind.B),
        (10**5000, 10**5000 + 1),
        (pathlib.PurePosixPath("a"), pathlib.PurePosixPath("b")),
        (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
        (pack_sequence([long]), pack_sequence([other])),
        tuple(quantised),
        (Picky(long, Y), Picky(other, Y)),
        (X.to(torch.float8_e5m2), (X + 1).to(torch.float8_e5m2)),
    ]
    for one, two in different:
        assert digest(one) != digest(two), one
    uncoalesced = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([1.0, 2.0]), (3,))
    assert digest(uncoalesced) == digest(torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([3.0]), (3,)))
    used, fresh = Seen(), Seen()
    assert used.total == 3  # which is kept, but no value of its own
    assert digest(used) == digest(fresh)


def test_digests_of_stores_that_are_there_stay():
    """Written down before items of other classes were looked into."""
    item = (
        {"a": torch.arange(3.0), "b": [1, "x", None, 2.5, True, b"y"], "c": {"p", "q"}},
        np.float32(3), torch.ones(2, dtype=torch.bfloat16), types.SimpleNamespace(z=(np.arange(2, dtype="<i4"), 1j)),
    )  # fmt: skip
    assert digest(item).hex() == "c4f7226e4c015d6b44c23bd931dc3b329781082095e2510510b43ea856be3e1b"


@pytest.mark.slow
def test_a_build_of_objects_equals_one_of_tuples(tmp_path):
    task = toys.make_task(tmp_path)
    plain = gradindex.build(task, tmp_path / "plain")
    items = [Graph(x, y) for x, y in task.train]

    def collate(some):
        return Graph(torch.stack([i.x for i in some]), torch.stack([i.y for i in some]))

    own = toys.make_task(
        tmp_path, train=items, query=None, collate=collate,
        loss=lambda model, batch: toys.cross_entropy(model, (batch.x, batch.y)),
    )  # fmt: skip
    store = gradindex.build(own, tmp_path / "own")
    np.testing.assert_array_equal(store.rows(store.ids), plain.rows(plain.ids))
    assert gradindex.load(own, tmp_path / "own").proponents([items[0]], k=1).ids.shape == (1, 1)
    assert isinstance(task.train, TensorDataset)
