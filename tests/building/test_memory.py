"""Batches chosen to fit a memory budget, halved where they do not, and what is said when one example does not fit."""

import re

import numpy as np
import pytest
import torch
import toys
from click.testing import CliRunner
from places import TESTS
from torch import nn

import gradindex
from gradindex.cli import main
from gradindex.errors import ArgumentError, OutOfMemoryError
from gradindex.examples import Examples
from gradindex.gradients import Engine, Products, check_routes
from gradindex.memory import batch_size_for, parse_bytes, peak_bytes
from gradindex.projection import Projection

CPU = torch.device("cpu")


@pytest.fixture
def task(tmp_path):
    return toys.make_task(tmp_path, toys.convolutional(), shape=(2, 8, 8), n_train=40)


def short_of_memory(monkeypatch, largest):
    run = Engine.run

    def limited(self, checkpoint, items, *rest, **options):
        if len(items) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has little.")
        return run(self, checkpoint, items, *rest, **options)

    monkeypatch.setattr(Engine, "run", limited)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved(task, tmp_path, monkeypatch):
    whole = gradindex.build(task, tmp_path / "whole")
    short_of_memory(monkeypatch, 6)
    parts = gradindex.build(task, tmp_path / "parts")
    np.testing.assert_allclose(parts.rows(np.arange(40)), whole.rows(np.arange(40)), atol=1e-4)
    np.testing.assert_allclose(parts.self_influence(), whole.self_influence(), rtol=1e-4)


@pytest.mark.slow
def test_exact_scores_are_halved_as_well(task, monkeypatch):
    expected = gradindex.exact_scores(task, list(task.query))
    short_of_memory(monkeypatch, 6)
    np.testing.assert_allclose(gradindex.exact_scores(task, list(task.query)), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("free", "sizes"), [(1 << 40, {40}), (1 << 16, {4, 8, 16}), (1, {1})])
def test_exact_scores_choose_a_batch_that_fits(task, monkeypatch, free, sizes):
    expected = gradindex.exact_scores(task, list(task.query), batch_size=10)
    monkeypatch.setattr("gradindex.gradients.products.available_bytes", lambda device: free)
    taken, of_batch = [], Products._of

    def spy(self, batch):
        taken.append(len(batch))
        return of_batch(self, batch)

    monkeypatch.setattr(Products, "_of", spy)
    found = gradindex.exact_scores(task, list(task.query))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert taken[:2] == [2, 8]  # the measurement
    assert max(taken[2:]) in sizes
    assert sum(taken[2:]) == 40


@pytest.mark.slow
def test_many_queries_go_in_parts_that_are_halved(task, monkeypatch):
    expected = gradindex.exact_scores(task, list(task.query))
    monkeypatch.setattr("gradindex.gradients.products._AT_ONCE", 3)
    np.testing.assert_allclose(gradindex.exact_scores(task, list(task.query)), expected, rtol=1e-3, atol=1e-5)
    short_of_memory(monkeypatch, 1)
    np.testing.assert_allclose(gradindex.exact_scores(task, list(task.query)), expected, rtol=1e-3, atol=1e-5)


def test_a_query_that_does_not_fit_alone_is_named(tmp_path):
    task = toys.make_task(tmp_path, nn.Sequential(nn.Linear(6, 3), Conditional()))
    task.query.tensors[0][2] = 1000.0
    with pytest.raises(
        OutOfMemoryError, match=r"Query 2 of 4 alone needs more memory .* of 1 \(Conditional\) requested"
    ):
        gradindex.exact_scores(task, list(task.query))


@pytest.mark.slow
def test_fitting_is_halved_as_well(task, tmp_path, monkeypatch):
    whole = gradindex.build(task, tmp_path / "whole", projection=Projection("fitted", 40))
    short_of_memory(monkeypatch, 6)
    parts = gradindex.build(task, tmp_path / "parts", projection=Projection("fitted", 40), batch_size=32)
    # Bases are unique up to signs, which products of rows do not have.
    products = [rows @ rows.T for rows in (store.rows(np.arange(40)) for store in (whole, parts))]
    np.testing.assert_allclose(products[1], products[0], rtol=1e-2, atol=1e-3 * np.abs(products[0]).max())


def test_other_errors_of_the_runtime_are_not_taken_for_it(task, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a driver failed")

    monkeypatch.setattr(Engine, "run", broken)
    with pytest.raises(RuntimeError, match="a driver failed"):
        gradindex.build(task, tmp_path / "store", batch_size=8)


class Greedy(nn.Module):
    """Asks for more memory than any machine has."""

    def forward(self, x):
        return x + torch.empty(2**50).sum()


def test_an_example_that_does_not_fit_alone_names_the_module_and_the_bytes(tmp_path):
    task = toys.make_task(tmp_path, nn.Sequential(nn.Linear(6, 3), nn.Tanh()))
    task.model[1] = nn.Sequential(nn.Tanh(), Conditional())
    message = (
        r"Training example 3 alone needs more memory than is available: the forward pass of 1\.1 \(Conditional\) "
        r"requested 4.19e\+06 GiB\."
    )
    x, _ = task.train.tensors
    x[3] = 1000.0
    with pytest.raises(OutOfMemoryError, match=message):
        gradindex.build(task, tmp_path / "store", batch_size=4)


class Conditional(Greedy):
    """Only for one of the examples."""

    def forward(self, x):
        return super().forward(x) if bool((x.abs() > 0.9999).all(1).any()) else x


def test_the_measure_counts_what_lives_at_once_and_not_what_was_there():
    weight = torch.ones(1000, 1000)

    def action():
        weight.add_(1)
        for _ in range(5):
            once = weight * 2
            del once
        kept = weight + 1
        kept.add_(1)
        return kept * 2

    assert peak_bytes(action, CPU) == 2 * weight.nbytes


@pytest.mark.parametrize(("budget", "size"), [(100, 1), (32_100, 8), (31_900, 4), (1 << 20, 256), (1 << 40, 256)])
def test_the_batch_is_the_largest_power_of_two_that_fits(budget, size):
    # 1,000 float32 numbers an example.
    examples = Examples.training(range(20), list(torch.ones(20, 1000)))
    found = batch_size_for(lambda batch: torch.stack(batch.items).sum(), examples, budget, CPU)
    assert found == size


@pytest.mark.slow
@pytest.mark.parametrize("projection", [Projection(dim=8), Projection("fitted", 16)])
def test_a_build_keeps_to_its_budget(task, tmp_path, projection):
    sizes = {}
    for memory in (1, 1 << 18, 1 << 34):
        store = gradindex.build(task, tmp_path / str(memory), memory=memory, projection=projection)
        sizes[memory] = store.manifest.batch_size
    assert sizes[1] == 1
    assert 1 < sizes[1 << 18] < sizes[1 << 34] == 256
    with Engine(task) as engine:
        check_routes(engine)
        largest, seen = 0, []

        def once(examples):
            engine.run(0, examples, lambda _, gradients: seen.append(gradients.squared_norms().sum()))

        examples = task.read(range(sizes[1 << 18]))
        largest = peak_bytes(lambda: once(examples), CPU)
    assert largest <= 1 << 18


@pytest.mark.slow
def test_the_batch_size_of_a_build_that_goes_on_is_not_chosen_again(task, tmp_path, monkeypatch):
    gradindex.build(task, tmp_path / "store", memory=1)
    monkeypatch.setattr("gradindex.building.pick_batch_size", None)
    assert gradindex.build(task, tmp_path / "store").manifest.batch_size == 1


def test_a_budget_and_a_batch_size_contradict_each_other(task, tmp_path):
    with pytest.raises(ArgumentError, match="Give batch_size, or memory"):
        gradindex.build(task, tmp_path / "store", memory=1 << 20, batch_size=4)
    with pytest.raises(ArgumentError, match="memory is 0, but must be at least 1"):
        gradindex.build(task, tmp_path / "store", memory=0)


@pytest.mark.parametrize(
    ("text", "expected"), [("4096", 4096), ("500M", 500 << 20), ("2 GiB", 2 << 30), ("1.5g", 3 << 29), ("1kb", 1024)]
)
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "many", "2X", "0", "-1G", "1.2.3G"])
def test_no_amounts_of_memory(text):
    with pytest.raises(ArgumentError, match=re.escape(f"{text!r} is not an amount of memory")):
        parse_bytes(text)


def test_the_command_line_says_what_is_no_amount(tmp_path):
    done = CliRunner().invoke(main, ["build", "mine.py:task", "--out", str(tmp_path / "x"), "--memory", "much"])
    assert done.exit_code == 1
    assert done.stderr == "Error: 'much' is not an amount of memory. Write for example 500M or 2G.\n"


@pytest.mark.slow
def test_a_build_does_not_import_torchs_compiler(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import pathlib, toys, gradindex
folder = pathlib.Path({str(tmp_path)!r})
gradindex.build(toys.make_task(folder), folder / "store")
print("torch._dynamo" in sys.modules)"""
    assert toys.python(code) == "False\n"  # which takes two seconds
