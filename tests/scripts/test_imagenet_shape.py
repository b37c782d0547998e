"""The task of ImageNet's shape: its examples follow from their positions, and its gradients are like a classifier's."""

import importlib
import sys

import numpy as np
import pytest
import torch
from places import TOP

import gradindex
from gradindex.projection import Projection


@pytest.fixture
def shape(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADINDEX_QUICK", str(tmp_path))
    monkeypatch.syspath_prepend(str(TOP / "scripts" / "tasks"))
    for name in ("imagenet_shape", "reference"):  # the tests have a module "reference" of their own
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("imagenet_shape")
    for name in ("imagenet_shape", "reference"):
        sys.modules.pop(name, None)


def test_examples_follow_from_their_positions(shape):
    one, other = (shape.Drawn(1000, 0, 0.05) for _ in range(2))
    backwards = {position: other[position] for position in reversed(range(900, 1000))}
    for position in range(900, 1000):
        for mine, theirs in zip(one[position], backwards[position], strict=True):
            assert torch.equal(mine, theirs)
    features = torch.stack([one[position][0] for position in range(1000)])
    assert features.shape == (1000, 3, shape.sizes().features) and (features > 0).all()
    assert features.quantile(0.99) > 4 * features.median()  # heavy-tailed
    assert not torch.equal(features[:, 0], features[:, 1])
    assert one.wrong.sum() == 50 and (one.labels != one.classes).sum() == 50
    assert not torch.equal(shape.Drawn(1000, 1, 0)[0][0], one[0][0])
    assert len(np.unique(one.classes)) == shape.sizes().classes


@pytest.mark.slow
def test_the_layer_learns_and_its_gradients_have_few_large_parts(shape, tmp_path):
    task = shape.task()
    head, examples = shape.Head(), shape.Drawn(400, 1, 0)
    for checkpoint in task.checkpoints:
        head.load_state_dict(checkpoint.load(head))
    assert shape.accuracy(head, examples) > 3 / shape.sizes().classes
    store = gradindex.build(task, tmp_path / "store", projection=Projection("fitted", 48), factors="float32")
    assert (len(store), store.n_checkpoints) == (shape.sizes().train, 3)
    deltas = np.abs(store.factors(store.ids[:500])[2, 0][1])
    assert ((deltas > 0.1 * deltas.max(1, keepdims=True)).sum(1) < shape.sizes().classes / 3).mean() > 0.5
