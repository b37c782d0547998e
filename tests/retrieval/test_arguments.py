"""What people give as queries, positions, ids and numbers: what can be meant is done, the rest is one clear line."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import gradindex
from gradindex.errors import ArgumentError, GradIndexError, TaskError, UserCodeError
from gradindex.projection import Projection

OPTIONS = {"projection": Projection(dim=8), "factors": "float32", "batch_size": 4}


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arguments")
    task = toys.make_task(folder, columns={"n": range(12)}, query_columns={"n": [3, 2, 1, 0]})
    gradindex.build(task, folder / "store", **OPTIONS)
    return gradindex.load(task, folder / "store")


POSITIONS = {
    "an array": lambda: np.array([2, 0]),
    "small whole numbers": lambda: np.array([2, 0], dtype=np.uint8),
    "a tensor": lambda: torch.tensor([2, 0]),
    "a tuple": lambda: (2, 0),
    "NumPy's numbers": lambda: [np.int64(2), np.int32(0)],
    "torch's numbers": lambda: [torch.tensor(2), torch.tensor(0)],
    "a range": lambda: range(2, -1, -2),
    "a generator": lambda: (i for i in (2, 0)),
    "keys": lambda: {2: "a", 0: "b"}.keys(),
    "objects": lambda: np.array([2, 0], dtype=object),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", POSITIONS)
def test_whole_numbers_are_positions_whatever_holds_them(retriever, form):
    hits, expected = retriever.proponents(POSITIONS[form](), k=3), retriever.proponents([2, 0], k=3)
    assert hits.queries == ("query 2", "query 0")
    assert hits.query_columns["n"].tolist() == [1, 3]
    np.testing.assert_array_equal(hits.ids, expected.ids)
    np.testing.assert_array_equal(hits.scores, expected.scores)


@pytest.mark.parametrize(
    ("one", "names"),
    [
        (torch.tensor(3), ("query 3",)),
        (np.int32(3), ("query 3",)),
        (np.array(3), ("query 3",)),
        (slice(1, 3), ("query 1", "query 2")),
        (np.array([False, True, False, True]), ("query 1", "query 3")),
        ([True, False, False, True], ("query 0", "query 3")),
        (torch.tensor([False, True, False, True]), ("query 1", "query 3")),
    ],
)
def test_one_position_a_slice_and_a_mask(retriever, one, names):
    assert retriever.proponents(one, k=2).queries == names


def test_a_series_is_taken_by_place(retriever):
    pd = pytest.importorskip("pandas")
    for values in (pd.Series([2, 0], index=[0, 2]), pd.Index([2, 0]), pd.Series([2, 0], dtype="Int64")):
        assert retriever.proponents(values, k=2).queries == ("query 2", "query 0")
        assert retriever.proponents([0], k=2, ids=values).counts == [2]
    with pytest.raises(ArgumentError, match="is a DataFrame with 2 axes"):
        retriever.proponents(pd.DataFrame({"a": [1]}))


def items(task):
    x, y = task.query[1]
    return {
        "a list of one": ([(x, y)], 1),
        "a tuple": ((x, y), 1),
        "a list that is an item": ([x, y], 1),
        "a tuple with a number": ((x, int(y)), 1),
        "a tuple of two": ((task.query[1], task.query[0]), 2),
        "a list of two": ([task.query[1], task.query[0]], 2),
        "a data set": (Subset(task.query, [1, 0]), 2),
        "a generator": ((task.query[i] for i in (1, 0)), 2),
        "a class with places": (Places(task.query, 3), 3),
    }


class Places:
    """A data set that knows its end by its length alone, as those of files do."""

    def __init__(self, data, n):
        self.data, self.n = data, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.data[(i + 1) % 4]


@pytest.mark.parametrize("form", items(type("Any", (), {"query": [(torch.zeros(1), torch.tensor(0))] * 2})))
def test_items_of_ones_own_with_and_without_a_list(retriever, form):
    queries, n = items(retriever.task)[form]
    hits = retriever.proponents(queries, k=3)
    assert hits.queries == tuple(f"item {i}" for i in range(n))
    np.testing.assert_allclose(hits.scores[0], retriever.proponents(1, k=3).scores[0], rtol=1e-6)
    if n == 2:
        np.testing.assert_allclose(hits.scores[1], retriever.proponents(0, k=3).scores[0], rtol=1e-6)


def one_and_several(folder, item, loss, model, collate=None):
    """Hits of one item without a list, in a list, and of two."""
    task = toys.make_task(folder, model, loss=loss, train=[item(i) for i in range(6)], query=None)
    task = task if collate is None else replace(task, collate=collate)
    gradindex.build(task, folder / "store", projection=Projection(dim=8), batch_size=1)
    retriever = gradindex.load(task, folder / "store")
    alone, listed, two = (retriever.proponents(q, k=6) for q in (item(7), [item(7)], [item(7), item(8)]))
    assert (len(alone.queries), len(listed.queries), len(two.queries)) == (1, 1, 2)
    np.testing.assert_array_equal(alone.scores, listed.scores)
    np.testing.assert_array_equal(alone.ids[0], two.ids[0])
    return retriever


def vector(i):
    return torch.randn(6, generator=torch.Generator().manual_seed(i))


def squares(model, x):
    return model(x.float()).square().sum(1)


def test_a_tensor_alone_is_an_item_where_examples_are_tensors(tmp_path):
    retriever = one_and_several(tmp_path, vector, squares, nn.Linear(6, 2))
    batch = torch.stack([vector(7), vector(8)])
    assert retriever.proponents(batch, k=2).queries == ("item 0", "item 1")
    np.testing.assert_array_equal(retriever.proponents(batch.numpy(), k=2).ids, retriever.proponents(batch, k=2).ids)
    with pytest.raises(ArgumentError, match=r"shape \(2, 2, 6\).*integers along one axis.*are a Tensor"):
        retriever.proponents(torch.zeros(2, 2, 6))


def test_a_mapping_alone_is_an_item(tmp_path):
    one_and_several(tmp_path, lambda i: {"x": vector(i)}, lambda m, b: squares(m, b["x"]), nn.Linear(6, 2))


def test_a_text_alone_is_an_item_where_examples_are_texts(tmp_path):
    def embedded(model, texts):
        x = torch.stack([torch.tensor([float(ord(c)) / 100 for c in text]) for text in texts])
        return squares(model, x)

    retriever = one_and_several(tmp_path, lambda i: f"text {i}", embedded, nn.Linear(6, 2), collate=list)
    assert retriever.proponents(("text 7", "text 8"), k=2).queries == ("item 0", "item 1")


def test_two_tensors_are_one_item_or_two_as_examples_are(tmp_path):
    def pair(model, batch):
        return squares(model, batch[0] * batch[1])

    retriever = one_and_several(tmp_path, lambda i: (vector(i), vector(i + 50)), pair, nn.Linear(6, 2))
    assert retriever.proponents([vector(7), vector(57)], k=2).queries == ("item 0",)


QUERIES = {
    "none": (None, "queries is None"),
    "a flag": (True, "queries is True, but must be positions"),
    "a fraction": (1.0, "queries is 1.0, but must be positions"),
    "fractions": ([0.0, 1.0], "queries mix positions, which are integers, with other values"),
    "a tensor of fractions": (
        torch.tensor([0.0, 1.0]),
        r"of shape \(2,\).*examples of the task are a tuple of \(Tensor,",
    ),
    "positions and items": ([0, (torch.zeros(6), 1)], "queries mix positions"),
    "a text": ("0", "queries is a str, but examples of the task are a tuple"),
    "empty list": ([], "There are no queries"),
    "empty array": (np.array([]), "There are no queries"),
    "empty tensor": (torch.tensor([]), "There are no queries"),
    "empty slice": (slice(9, 12), "There are no queries"),
    "no one of a mask": ([False] * 4, "There are no queries"),
    "a mask of others": ([True, False], "queries is a mask of 2 values, but query has 4 examples"),
    "a set": ({0, 1}, "queries is a set, which has no order. Give a list"),
    "beyond": ([4], "There is no query example 4; positions go from 0 to 3"),
    "negative": (-1, "There is no query example -1; positions go from 0 to 3"),
    "negative in a tensor": (torch.tensor([0, -2]), "There is no query example -2"),
    "a loader": (DataLoader([1, 2]), "queries is a DataLoader"),
}


@pytest.mark.parametrize("case", QUERIES)
def test_queries_that_mean_nothing_are_refused_in_one_line(retriever, case):
    queries, message = QUERIES[case]
    with pytest.raises(ArgumentError, match=message) as caught:
        retriever.proponents(queries, k=2)
    assert "\n" not in str(caught.value)


def test_positions_need_a_query_set(retriever, tmp_path):
    task = replace(retriever.task, query=None, query_columns={})
    alone = gradindex.load(task, retriever.store.folder)
    with pytest.raises(ArgumentError, match="The task has no query data to look positions up in.*source='train'"):
        alone.proponents(torch.tensor([0]))
    assert alone.proponents(torch.tensor([0]), k=2, source="train").queries == ("train 0",)
    assert alone.proponents(task.train[0], k=2).queries == ("item 0",)


def test_a_mask_over_training_examples(retriever):
    mask = np.arange(12) % 5 == 0
    assert retriever.proponents(mask, k=2, source="train").queries == ("train 0", "train 5", "train 10")


@pytest.mark.parametrize("k", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_a_number_of_hits_in_any_type(retriever, k):
    assert retriever.proponents(0, k=k, candidates=k).ids.shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 3.0}, "k is 3.0, a float, but must be an integer"),
        ({"k": "3"}, "k is '3', a str"),
        ({"k": True}, "k is True, a bool"),
        ({"k": [3]}, r"k is \[3\], a list"),
        ({"k": torch.tensor([1.5])}, "a Tensor, but must be an integer"),
        ({"k": 0}, "k is 0, but must be between 1 and"),
        ({"k": -1}, "k is -1"),
        ({"k": 100}, "k is 100, but must be between 1 and the number of training examples, 12"),
        ({"candidates": "many"}, "candidates is 'many', a str"),
        ({"at_least": "big"}, "at_least is a str, but must be a number"),
        ({"where": [("n", 3)]}, "where is a list, but must be a mapping"),
        ({"where": "n"}, "where is a str, but must be a mapping"),
        ({"where": np.zeros((1, 2))}, "where is a ndarray, but must be a mapping"),
        ({"where": {"m": 3}}, "The store has no column 'm'. It has: n"),
        ({"differs": ["n"]}, "The store has no column"),
        ({"ids": [1.5]}, "ids are of type float64"),
        ({"ids": [True] * 12}, "ids are of type bool.*np.flatnonzero"),
        ({"ids": [[1, 2], [3]]}, "ids are not an array"),
        ({"ids": ["a"]}, "ids are of type"),
        ({"ids": np.array([2**63], dtype=np.uint64)}, r"below 2\^63"),
        ({"ids": [2**70]}, "ids are not an array"),
        ({"ids": [99]}, "99"),
    ],
)
def test_options_that_mean_nothing_are_refused_in_one_line(retriever, options, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        retriever.proponents(0, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ids",
    [
        [3, 5], (5, 3), {3, 5}, range(3, 6, 2), np.array([3, 5], dtype=np.uint8), torch.tensor([5, 3]),
        {3: 0, 5: 0}.keys(), (i for i in (3, 5)), [np.int64(3), 5], np.array([3, 5], dtype=object),
        [torch.tensor(3), 5],
    ],
    ids=lambda ids: type(ids).__name__,
)  # fmt: skip
def test_ids_in_any_container(retriever, ids):
    assert sorted(retriever.proponents(0, k=5, ids=ids).of(0)[0].tolist()) == [3, 5]


def test_ids_of_a_split_and_of_a_removal_are_tensors_too(retriever, tmp_path):
    assert retriever.explain(0, torch.tensor([3, 5])).scores.shape[:2] == (1, 2)


SKIPPED = {
    "a list": [2, 5],
    "a set": {2, 5},
    "a tensor": torch.tensor([5, 2]),
    "a mask": np.isin(np.arange(12), [2, 5]),
    "a mask as a tensor": torch.isin(torch.arange(12), torch.tensor([2, 5])),
    "a mask as a list": [i in (2, 5) for i in range(12)],
    "a range": range(2, 6, 3),
    "small numbers": np.array([2, 5], dtype=np.uint8),
}


@pytest.mark.parametrize("form", SKIPPED)
def test_what_is_skipped_in_any_container(tmp_path, form):
    task = toys.make_task(tmp_path, skip=SKIPPED[form])
    assert task.train_ids.tolist() == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ([True, False], "skip is a mask of 2 values, but train has 12 examples"),
        ([1.5], "skip holds 1.5, a float, but positions are integers from 0 to 11"),
        (torch.tensor([1.0]), "skip holds"),
        ("ab", "skip holds 'ab', a str"),
        ([-1], "skip holds -1, but positions in train go from 0 to 11"),
        ([True] * 12, "skip covers all training examples"),
    ],
)
def test_what_cannot_be_skipped_is_refused(tmp_path, skip, message):
    with pytest.raises(TaskError, match=message):
        toys.make_task(tmp_path, skip=skip)


class Failing(Dataset):
    def __init__(self, data, at, error):
        self.data, self.at, self.error = data, at, error

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if i == self.at:
            raise self.error
        return self.data[i]


@pytest.mark.parametrize("error", [KeyError("text"), StopIteration(), IndexError("index out of range")])
def test_a_query_that_cannot_be_read_is_named(retriever, error):
    task = replace(retriever.task, query=Failing(retriever.task.query, 2, error))
    with pytest.raises(UserCodeError, match=f"Reading query example 2 failed: {type(error).__name__}"):
        gradindex.load(task, retriever.store.folder).proponents([1, 2], k=2)
    with pytest.raises(UserCodeError, match=f"Reading given example 2 failed: {type(error).__name__}"):
        retriever.proponents(task.query, k=2)


def test_an_error_of_show_names_the_example(retriever):
    def show(item):
        raise AttributeError("no text here")

    hits = gradindex.load(replace(retriever.task, show=show), retriever.store.folder).proponents(1, k=2)
    with pytest.raises(UserCodeError, match=r"show \((query 1|id \d+)\) failed: AttributeError: no text here"):
        str(hits)


@pytest.mark.parametrize(
    ("read_query", "message"),
    [
        (lambda path: [1 / 0], "Reading queries from .* failed: ZeroDivisionError"),
        (lambda path: (1 / 0 for _ in range(2)), "Reading queries from .* failed: ZeroDivisionError"),
        (lambda path: None, "read_query returned a NoneType, but must return a sequence of items"),
        (lambda path: "text", "read_query returned a str"),
    ],
)
def test_an_error_of_read_query_is_one_line(retriever, read_query, message):
    with pytest.raises(TaskError, match=message):
        replace(retriever.task, read_query=read_query).read_queries(Path(__file__))


class Length:
    def __init__(self, data, lengths):
        self.data, self.lengths = data, lengths

    def __len__(self):
        return self.lengths.pop(0) if len(self.lengths) > 1 else self.lengths[0]

    def __getitem__(self, i):
        return self.data[i]


def test_lengths_that_lie_or_change_are_refused(tmp_path):
    task = toys.make_task(tmp_path, query=None)
    with pytest.raises(GradIndexError, match="Reading training example 12 failed: IndexError.*a length of 13"):
        gradindex.build(replace(task, train=Length(list(task.train), [13])), tmp_path / "store", **OPTIONS)
    changes = replace(task, train=Length(task.train, [12, 12, 11]))
    with pytest.raises(TaskError, match="train had 12 examples when the task was created, but has 11 now"):
        gradindex.build(changes, tmp_path / "other", **OPTIONS)
    with pytest.raises(UserCodeError, match=r"len\(train\) failed: TypeError"):
        replace(task, train=Length(task.train, [1.5]))


DATA = {
    "a mapping of parts": ({"x": torch.zeros(12, 6), "y": torch.zeros(12)}, "train is a dict, which cannot be indexed"),
    "a text": ("some text", "train is a str"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_without_positions_are_refused(tmp_path, case):
    data, message = DATA[case]
    with pytest.raises(TaskError, match=message):
        toys.make_task(tmp_path, train=data)


def test_frames_and_series_are_no_data_sets(tmp_path):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"x": range(12)}, index=range(11, -1, -1))
    for data in (frame, frame["x"]):
        with pytest.raises(TaskError, match=r"which cannot be indexed by position.*to_dict\('records'\)"):
            toys.make_task(tmp_path, train=data)


@pytest.mark.parametrize("name", ["loss", "query_loss", "collate", "show", "read_query"])
def test_what_must_be_a_function_is_one(tmp_path, name):
    given = "'function'" if name == "query_loss" else "a str"  # there, one text has a meaning
    with pytest.raises(TaskError, match=f"{name} is {given}, but must be a function"):
        toys.make_task(tmp_path, **{name: "function"}) if name != "loss" else toys.make_task(tmp_path, loss="function")


@pytest.mark.slow
@pytest.mark.parametrize("queries", [torch.tensor([1]), 1, [1]])
def test_exact_scores_take_what_a_search_takes(retriever, queries):
    expected = gradindex.exact_scores(retriever.task, [retriever.task.query[1]])
    np.testing.assert_array_equal(gradindex.exact_scores(retriever.task, queries), expected)
    np.testing.assert_array_equal(gradindex.exact_scores(retriever.task, retriever.task.query[1]), expected)


@pytest.mark.parametrize(
    ("changes", "message"), [({"name": 3}, "name is 3, a int"), ({"layers": 3}, "layers is a int")]
)
def test_names_and_patterns_are_texts(tmp_path, changes, message):
    with pytest.raises(TaskError, match=message):
        toys.make_task(tmp_path, **changes)


def test_a_task_and_queries_are_told_in_a_line(retriever):
    big = replace(retriever.task, columns={"text": ["long " * 100] * 12})
    assert repr(big) == ("<Task 'task': Sequential with 53 parameters; 12 training examples, 4 queries, 3 checkpoints>")
    asked = repr(retriever.prepare(range(4)))
    assert asked == "<Queries: query 0, query 1 and 2 more; rows of 24 numbers>"
    assert re.fullmatch(r"<Queries: query 0; rows .*>", repr(retriever.prepare(0)))
    hits = retriever.proponents(range(4), k=3)
    assert repr(hits) == "<Hits: proponents (4 x 3) by exact TracInCP scores; print them for a table>"
