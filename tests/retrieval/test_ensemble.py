"""Stores of several runs asked as one: sums of scores."""

from dataclasses import replace

import numpy as np
import pytest
import toys
from torch.utils.data import Subset

import gradindex
from gradindex.errors import ArgumentError, MismatchError
from gradindex.projection import Projection
from gradindex.retrieval.ensemble import Ensemble
from gradindex.store import remove, second_moments


@pytest.fixture
def two(tmp_path):
    """Two tasks with the same data and other weights."""
    tasks = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        tasks.append(toys.make_task(tmp_path / name, toys.mlp(), n_train=50))
    return [tasks[0], replace(tasks[1], train=tasks[0].train, query=tasks[0].query, columns=tasks[0].columns)]


def opened(tasks, folder, geometry="tracin", **options):
    retrievers = []
    for number, task in enumerate(tasks):
        store = gradindex.build(task, folder / f"store-{number}", projection=Projection(dim=16), **options)
        if geometry != "tracin":
            second_moments(store.folder)
        retrievers.append(gradindex.load(task, store.folder, geometry=geometry))
    return retrievers


@pytest.mark.parametrize(
    ("geometry", "layers", "factors", "scored"),
    [("tracin", "2", "float32", "exact"), ("tracin", None, None, "projected"), ("whitened", None, None, "projected")],
)
def test_scores_are_sums_and_the_best_of_all_are_found(two, tmp_path, geometry, layers, factors, scored):
    tasks = [replace(task, layers=layers) for task in two]
    retrievers = opened(tasks, tmp_path, geometry, factors=factors)
    ensemble = Ensemble(retrievers)
    if scored == "exact":
        true = sum(each.exact_scores(range(4)) for each in retrievers)
    else:
        true = sum(each.query_rows(range(4)) @ each.store.rows(each.store.ids).T for each in retrievers)
    np.testing.assert_allclose(ensemble.exact_scores(range(4)), true, rtol=1e-4, atol=1e-4)
    for kind, keys in (("proponents", true), ("opponents", -true), ("absolute", np.abs(true))):
        hits = ensemble.search(range(4), 5, kind=kind)
        assert hits.ids.tolist() == np.argsort(-keys, 1, kind="stable")[:, :5].tolist()
        assert hits.scored == scored and "sums of 2 stores' " in hits.note
    some = ensemble.search([1], 3, ids=[2, 7, 30, 41])
    assert some.ids[0].tolist() == sorted([2, 7, 30, 41], key=lambda i: -true[1, i])[:3]
    strong = ensemble.search(ensemble.prepare([0]), at_least=float(np.sort(true[0])[-4]) - 1e-3)
    assert len(strong.of(0)[0]) == 4


def test_what_does_not_add_up_is_refused(two, tmp_path):
    retrievers = opened(two, tmp_path)
    with pytest.raises(ArgumentError, match="no stores"):
        Ensemble([])
    with pytest.raises(ArgumentError, match="decide nothing"):
        Ensemble(retrievers).search([0], 3, candidates=5)
    second_moments(retrievers[1].store.folder)
    whitened = gradindex.load(two[1], retrievers[1].store.folder, geometry="whitened")
    with pytest.raises(MismatchError, match="geometry"):
        Ensemble([retrievers[0], whitened])
    fewer = replace(two[1], query=Subset(two[1].query, range(2)))
    with pytest.raises(MismatchError, match="numbers of examples"):
        Ensemble([retrievers[0], gradindex.load(fewer, retrievers[1].store.folder)])
    together = Ensemble(retrievers)
    remove(retrievers[1].store.folder, [3])
    with pytest.raises(MismatchError, match="other ids"):
        together.search([0], 3)
