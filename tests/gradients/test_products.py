"""Exact products of layers on general routes: which way is taken, and that each equals autograd."""

import numpy as np
import pytest
import reference
import toys
from torch.utils.data import TensorDataset
from toys import Attentive, Cubic, Once, Recurrent, Twice

import gradindex
from gradindex.gradients import Engine, Products, check_routes


def truth_of(task, count):
    queries = reference.gradients(task, [task.query[i] for i in range(count)], "query")
    return reference.scores(task, queries, reference.gradients(task, task.train), toys.RATES)


CASES = {
    "GRU": (lambda: Recurrent("GRU"), "forward mode"),
    "LSTM": (lambda: Recurrent("LSTM"), "forward mode"),
    "attention": (Attentive, "forward mode"),
    "a cube": (lambda: Cubic(lambda x: x**3), "forward mode"),
    "no forward rule": (lambda: Cubic(Twice.apply), "double backward"),
    "no second derivative": (lambda: Cubic(Once.apply), "gradients"),
}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("case", CASES)
def test_each_way_equals_autograd(tmp_path, case, count):
    make, route = CASES[case]
    task = toys.make_task(tmp_path, make(), shape=(4, 6), n_query=20)
    found = gradindex.exact_scores(task, [task.query[i] for i in range(count)], precision="float64")
    truth, scale = truth_of(task, count)
    assert np.all(np.abs(found - truth) <= 1e-10 * scale)
    with Engine(task, "float64") as engine:
        check_routes(engine)
        assert Products(engine, [task.query[i] for i in range(count)], "query").route == (
            "gradients" if count == 20 else route
        )


def test_an_lstm_in_float32_takes_the_second_way(tmp_path):
    # Its fused kernel, for float32 alone, has no forward-mode rule.
    task = toys.make_task(tmp_path, Recurrent("LSTM"), shape=(4, 6))
    with Engine(task) as engine:
        check_routes(engine)
        products = Products(engine, [task.query[0]], "query")
        found = products.of(task.read(task.train_ids))
    truth, scale = truth_of(task, 1)
    assert np.all(np.abs(found.numpy() - truth) <= 1e-5 * scale)
    assert products.route == "double backward"


def test_no_example_has_a_gradient_of_its_own_for_a_few_queries(tmp_path, monkeypatch):
    task = toys.make_task(tmp_path, Recurrent("GRU"), shape=(4, 6))
    with Engine(task, "float64") as engine:
        check_routes(engine)
        products = Products(engine, [task.query[0]], "query")
        for name in ("vmap_gradients", "loop_gradients"):
            monkeypatch.setattr(f"gradindex.gradients.engine.{name}", None)
        found = products.of(task.read(task.train_ids))
    truth, scale = truth_of(task, 1)
    assert np.all(np.abs(found.numpy() - truth) <= 1e-10 * scale)


def test_several_queries_share_one_pass_over_the_data(tmp_path):
    reads = []

    class Counting(TensorDataset):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)

    task = toys.make_task(tmp_path, Recurrent("GRU"), shape=(4, 6))
    task = gradindex.Task(task.model, task.loss, Counting(*task.train.tensors), task.checkpoints)
    items = [task.train[i] for i in range(3)]
    counts = []
    for some in (items[:1], items):
        reads.clear()
        gradindex.exact_scores(task, some, np.arange(1, 11), batch_size=4)
        assert reads[-10:] == list(range(1, 11))  # after the checks
        counts.append(len(reads))
    assert counts[0] == counts[1]
