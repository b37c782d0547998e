"""Examples of very different lengths go through the model in the order of their lengths, and nobody sees it."""

from itertools import chain

import numpy as np
import pytest
import torch
import toys
from test_batch_tokens import Model, collate, loss
from torch import nn

import gradindex
from gradindex import filling, growth, lengths
from gradindex.examples import Examples
from gradindex.lengths import Window, length_of, window_rows, windows
from gradindex.projection import Projection
from gradindex.tree import shapes

N, BATCH, SHARD = 48, 4, 24
LENGTHS = np.random.default_rng(3).integers(1, 13, N)


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"input_ids": (torch.arange(LENGTHS[i]) + i) % 7, "label": torch.tensor(i % 3)}


@pytest.fixture
def task(tmp_path):
    torch.manual_seed(0)
    model = Model()
    for step in (1, 2):
        nn.init.normal_(model.head.weight)
        torch.save(model.state_dict(), tmp_path / f"step_{step}.pt")
    checkpoints = gradindex.find_checkpoints(tmp_path / "*.pt", learning_rate=0.1)
    return gradindex.Task(model, loss, Texts(), checkpoints, Texts(), collate=collate)


def options(**more):
    return {"projection": Projection("none"), "batch_size": BATCH, "shard_rows": SHARD} | more


def batches_of(items, size=BATCH):
    ids = np.arange(len(items))
    return [Examples.training(ids[start : start + size], items[start : start + size]) for start in ids[::size]]


def unsorted(batches, size, most):
    """What :func:`windows` would be for examples of one length."""
    return (Window(examples, size) for examples in batches)


def padded(model):
    """Tokens with their padding that went through the model."""
    return sum(rows * columns for rows, columns in model.seen)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


def test_windows_hold_every_example_once_and_sort_some_batches_at_a_time():
    items = list(Texts())
    found = list(windows(batches_of(items), BATCH, 3 * BATCH))
    assert [len(window.examples) for window in found] == [12, 12, 12, 12]
    assert list(chain(*(window.examples.ids for window in found))) == list(range(N))
    for window in found:
        groups = list(window.batches())
        assert [len(group) for group in groups] == [BATCH] * 3
        order = list(chain(*(group.ids.tolist() for group in groups)))
        assert order == sorted(window.examples.ids.tolist(), key=lambda i: (-LENGTHS[i], i))
        assert np.array(order)[window.places].tolist() == window.examples.ids.tolist()


def test_examples_of_one_length_go_as_they_came_and_are_not_held():
    read = []

    def batches():
        for examples in batches_of([torch.zeros(3, 2) for _ in range(10)]):
            read.append(len(examples))
            yield examples

    for count, window in enumerate(windows(batches(), BATCH, 1000), 1):
        assert len(read) == count
        assert window.order is window.places is None
        assert [len(group) for group in window.batches()] == [len(window.examples)]
    assert read == [4, 4, 2]


def test_a_window_holds_no_more_than_it_may(monkeypatch):
    items = [torch.zeros(1 + i % 2, 1000) for i in range(24)]
    whole = [len(window.examples) for window in windows(batches_of(items), BATCH, 1000)]
    monkeypatch.setattr(lengths, "HELD_BYTES", 8 * 1000 * 10)  # a batch has 6,000 numbers
    assert (whole, [len(window.examples) for window in windows(batches_of(items), BATCH, 1000)]) == ([24], [8, 8, 8])
    assert window_rows(32, 8 * 1000) == 32  # at least a batch
    monkeypatch.undo()
    assert window_rows(32, 1000) == 16 * 32
    assert window_rows(32, lengths.HELD_BYTES // 100) == 96
    assert [len(window.examples) for window in windows(batches_of(items, 1), 1, 1000)] == [1] * 24


@pytest.mark.parametrize(
    ("item", "length"),
    [((torch.zeros(7), torch.tensor(1)), 7), ({"a": [1, 2, 3], "b": 5}, 3), ("a text", 6), (3, 0), ([1] * 500, 500)],
)
def test_the_length_of_an_item_is_its_longest_first_axis(item, length):
    assert length_of(shapes(item)) == length


@pytest.mark.parametrize("more", [{}, {"batch_tokens": 30}, {"one_at_a_time": True}, {"row_type": "float16"}])
def test_rows_are_the_same_at_their_ids_with_less_padding(task, tmp_path, monkeypatch, more):
    def built(name):
        task.model.seen.clear()
        return gradindex.build(task, tmp_path / name, **options(**more)), padded(task.model)

    by_length, few = built("sorted")
    monkeypatch.setattr(filling, "windows", unsorted)
    in_order, many = built("unsorted")
    ids = np.arange(N)
    tolerance = {"rtol": 2e-3, "atol": 1e-3} if "row_type" in more else {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_array_equal(by_length.ids, ids)
    np.testing.assert_allclose(by_length.rows(ids), in_order.rows(ids), **tolerance)
    np.testing.assert_allclose(by_length.losses(), in_order.losses(), rtol=1e-5)
    np.testing.assert_allclose(by_length.self_influence(), in_order.self_influence(), rtol=1e-5)
    assert by_length.samples() == in_order.samples()
    assert few < many


def test_a_pass_has_the_padding_of_its_neighbours_in_length(task, tmp_path):
    task.model.seen.clear()
    gradindex.build(task, tmp_path / "store", **options())
    passes = {shape for shape in task.model.seen if shape[0] == BATCH}
    for start in range(0, N, SHARD):
        longest = sorted(LENGTHS[start : start + SHARD], reverse=True)[::BATCH]
        assert {(BATCH, int(length)) for length in longest} <= passes


def test_a_build_that_was_interrupted_ends_with_the_same_bytes(task, tmp_path, monkeypatch):
    whole = gradindex.build(task, tmp_path / "whole", **options())
    batches = filling.batches

    def interrupted(maker, task, ids, *more):
        for number, batch in enumerate(batches(maker, task, ids, *more)):
            if ids[0] > 0 or number > 0:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(filling, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gradindex.build(task, tmp_path / "again", **options())
    monkeypatch.undo()
    assert [path.suffix for path in (tmp_path / "again" / "shards").iterdir()].count(".json") == 1
    resumed = gradindex.build(task, tmp_path / "again", **options())
    assert contents(resumed.folder) == contents(whole.folder)


def test_a_shard_that_is_repaired_has_the_same_rows(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", **options())
    rows = store.rows(np.arange(N))
    path = store.folder / "shards" / f"{store.manifest.shards[1].name}.h5"
    path.write_bytes(path.read_bytes()[:-1])
    assert len(growth.repair(task, store.folder)) == 1
    np.testing.assert_array_equal(gradindex.GradientStore(store.folder).rows(np.arange(N)), rows)


def test_examples_of_one_length_keep_their_bytes(tmp_path, monkeypatch):
    task = toys.make_task(tmp_path, n_train=20)
    own = gradindex.build(task, tmp_path / "own", **options(shard_rows=8))
    monkeypatch.setattr(filling, "windows", unsorted)
    before = gradindex.build(task, tmp_path / "before", **options(shard_rows=8))
    assert contents(own.folder) == contents(before.folder)


def test_progress_counts_every_example_once(task, monkeypatch, tmp_path):
    counted = []
    store = gradindex.build(task, tmp_path / "store", **options())
    with filling.running(task, "float32", gradindex.BuildOptions(), BATCH) as engine:
        maker = filling.row_maker(engine, store.manifest, None)
        given = filling.batches(maker, task, np.arange(N), store.manifest, 0, [], counted.append)
        assert [i for examples, rows in given for i in examples.ids] == list(range(N))
    assert counted == [BATCH] * (N // BATCH)


def test_queries_and_exact_scores_are_in_the_order_that_was_asked(task, tmp_path):
    gradindex.build(task, tmp_path / "store", **options())
    retriever = gradindex.load(task, tmp_path / "store")
    task.model.seen.clear()
    together = retriever.prepare(range(30))
    by_length = np.sort(LENGTHS[:30])[::-1]
    assert (BATCH, int(by_length[BATCH])) in task.model.seen
    rows = retriever.store.rows(np.arange(30))  # the training examples are the queries, with the same loss
    np.testing.assert_allclose(together.rows, rows, rtol=1e-5, atol=1e-6)
    queries = list(Texts())[:3]
    truth = gradindex.exact_scores(task, queries, batch_size=1)
    np.testing.assert_allclose(gradindex.exact_scores(task, queries, batch_size=BATCH), truth, rtol=1e-4, atol=1e-6)
    held = gradindex.load(task, tmp_path / "store", one_at_a_time=True)
    np.testing.assert_allclose(held.exact_scores(queries), truth, rtol=1e-4, atol=1e-6)
    total = held.prepare(range(30), aggregate="sum")
    np.testing.assert_allclose(total.rows[0], rows.sum(0), rtol=1e-4, atol=1e-5)
