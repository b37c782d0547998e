"""The largest entries of packed factors: what is estimated by them, and answers that are narrowed by them."""

import numpy as np
import pytest
import toys

import gradindex
from gradindex import evaluation
from gradindex.errors import StoreError
from gradindex.evaluation import efforts
from gradindex.retrieval import leading as leading_of
from gradindex.retrieval.candidates import Candidates, Effort
from gradindex.retrieval.leading import leading, leads, narrowed
from gradindex.retrieval.scoring import of_candidates
from gradindex.store import GradientStore, container


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leading")
    task = toys.sharp_task(folder, n_train=400)
    return task, toys.with_factors(folder, task, "store", shard_rows=96)


def by_hand(store, factors, query, i):
    """sum_c (delta_c . delta'_c) ||x_c|| ||x'_c||, with the largest entries of delta_c alone."""
    kept, total = store.manifest.packing[0][1].kept, 0.0
    for (c, _), (x, delta) in store.factors(np.array([i])).items():
        row = delta[0].astype(float)
        row[np.argsort(np.abs(row))[:-kept]] = 0
        theirs = factors[c, 0]
        size = np.linalg.norm(x[0]) * np.linalg.norm(delta[0]) / np.linalg.norm(row)
        total += row @ theirs[1][query].astype(float) * size * np.linalg.norm(theirs[0][query])
    return total


@pytest.mark.parametrize("at_once", [7, 1024])
def test_estimates_are_what_the_largest_entries_say(stored, monkeypatch, at_once):
    monkeypatch.setattr(leading_of, "_AT_ONCE", at_once)
    _, store = stored
    factors = store.factors(np.array([3, 250, 399]))
    lists = [np.array([0, 5, 100, 101, 399]), np.array([250, 5, 96, 3]), np.array([], dtype=np.int64)]
    found = leading(store, factors, lists)
    for query, ids in enumerate(lists):
        expected = [by_hand(store, factors, query, i) for i in ids]
        np.testing.assert_allclose(found[query], expected, rtol=1e-4, atol=1e-6 * max(np.abs(expected), default=1))


def test_the_best_by_estimates_hold_the_best_by_exact_scores(stored):
    _, store = stored
    some = np.arange(0, 400, 20)
    factors = store.factors(some)
    everyone = np.tile(store.ids, (len(some), 1))
    exact = of_candidates(store, factors, list(everyone))
    for sign in (1, -1):
        best = narrowed(store, factors, sign, everyone, 40)
        assert best.shape == (20, 40)
        pairs = zip(exact, best, strict=True)
        recalls = [np.isin(np.argsort(-sign * scores)[:10], mine).mean() for scores, mine in pairs]
        assert np.mean(recalls) > 0.95
        few = np.full((len(some), 5), -1)
        few[:, 1] = 7
        assert (narrowed(store, factors, sign, few, 3) == [7, -1, -1]).all()


def test_only_stores_that_have_what_it_takes_are_narrowed(stored, tmp_path):
    task, store = stored
    assert leads(store)
    assert not leads(toys.with_factors(tmp_path, task, "whole", pack=False))
    assert not leads(toys.with_factors(tmp_path, task, "projected", self_influence="projected"))
    assert not leads(toys.with_factors(tmp_path, task, "cosines", unit_norm=True))
    assert not leads(gradindex.build(toys.make_task(tmp_path), tmp_path / "toy"))


def test_damage_of_what_is_estimated_by_is_found(stored, tmp_path):
    task, _ = stored
    store = toys.with_factors(tmp_path, task, "store")
    path = sorted((store.folder / "shards").glob("*.h5"))[1]
    place = store.shard(path.stem).seal["arrays"]["factors/0/0/output_gradients/values"]
    content = bytearray(path.read_bytes())
    content[place["offset"] + 3] ^= 1
    path.write_bytes(content)
    store = GradientStore(store.folder)
    first = store.manifest.shards[1].first
    with pytest.raises(StoreError, match="is damaged"):
        leading(store, store.factors(np.array([0])), [np.array([first])])


@pytest.mark.slow
def test_answers_narrowed_by_largest_entries_are_exact_scores_of_the_best(stored, monkeypatch):
    task, store = stored
    timed = lambda store, search, truth, effort, k, sign=1: 1.0 if effort else 99.0  # noqa: E731  # on any machine
    monkeypatch.setattr(efforts, "milliseconds", timed)
    evaluation.index(store.folder, k=10, n_query=100, kind="flat", dim=32, recall=0.9)
    monkeypatch.setattr(Candidates, "effort", lambda self, k, sign="proponents": Effort(1, 200, 40))
    retriever = gradindex.load(task, store.folder)
    every = gradindex.load(task, store.folder, use_index=False)
    for kind in ("proponents", "opponents", "absolute"):
        hits, exact = (each.search(range(8), k=10, kind=kind, candidates=None) for each in (retriever, every))
        assert [(stage.name, stage.rows) for stage in hits.stages][:2] == [("index", 200), ("largest entries", 200)]
        assert hits.stages[-1].rows <= 40 * (2 if kind == "absolute" else 1)
        assert np.mean([np.isin(a, b).mean() for a, b in zip(hits.ids, exact.ids, strict=True)]) > 0.9
        scores = gradindex.exact_scores(task, list(task.query))
        for ids, found, right in zip(hits.ids, hits.scores, scores, strict=True):
            np.testing.assert_allclose(found, right[ids], rtol=1e-4, atol=1e-5 * np.abs(right).max())
    hits = retriever.proponents(range(3), k=10, candidates=100)  # as asked for
    assert [stage.rows for stage in hits.stages][-1] == 100
    monkeypatch.setattr(Candidates, "effort", lambda self, k, sign="proponents": Effort(1, 400, 40))  # all rows
    for ids, right in zip(retriever.proponents(range(8), k=10).ids, scores, strict=True):
        assert set(ids) == set(np.argsort(-right)[:10])
    monkeypatch.setattr(Candidates, "effort", lambda self, k, sign="proponents": Effort(1, 200, 40))
    verified = []
    warmed = gradindex.load(task, store.folder, warm=True)
    assert warmed.warm(wait=True).ready
    monkeypatch.setattr(container, "_digest", verified.append)
    assert warmed.proponents(range(8), k=10).stages == retriever.proponents(range(8), k=10).stages
    assert verified == []  # what estimates take was warm as well
