"""A small store to tune indexes of, and times that do not depend on the machine."""

import shutil
from dataclasses import replace

import pytest
import toys
from torch.utils.data import Subset

import gradindex
from gradindex.evaluation import efforts, floors, tuning
from gradindex.projection import Projection


@pytest.fixture
def quick(monkeypatch):
    """Times that do not depend on the machine: as many milliseconds as rows are compared; no store is too small."""
    monkeypatch.setattr(tuning, "_SMALL", 0)
    monkeypatch.setattr(
        efforts, "milliseconds", lambda s, search, truth, effort, *_: 1e6 if effort is None else effort.proposals
    )
    monkeypatch.setattr(floors.ScoringTime, "of", lambda self, count: 0.0)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A store of 600 rows, and its task, which has 900 training examples."""
    folder = tmp_path_factory.mktemp("tuning")
    task = toys.make_task(folder, n_train=900, n_query=40)
    gradindex.build(
        replace(task, train=Subset(task.train, range(600))), folder / "store", projection=Projection("none"),
        factors="float32", batch_size=50, shard_rows=100,
    )  # fmt: skip
    return task, folder / "store"


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "store")
    return made[0], tmp_path / "store"
