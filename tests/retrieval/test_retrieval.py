"""Queries: what is asked, how candidates are settled, and what a task must share with its store."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from torch import nn

import gradindex
from gradindex.errors import ArgumentError, MismatchError, StoreError, TaskError
from gradindex.projection import Projection
from gradindex.retrieval import scoring, searcher


@pytest.fixture
def built(tmp_path):
    task = toys.make_task(tmp_path, columns={"label": list("abcdefghijkl")}, query_columns={"label": list("wxyz")})
    gradindex.build(task, tmp_path / "store", projection=Projection(dim=8), batch_size=4, shard_rows=4)
    return task, tmp_path / "store"


def test_all_candidates_settled_by_exact_scores_are_the_exact_answer(built):
    task, folder = built
    truth = gradindex.exact_scores(task, list(task.query))
    retriever = gradindex.load(task, folder)
    for kind, sign in (("proponents", 1), ("opponents", -1)):
        hits = getattr(retriever, kind)(range(4), k=5, candidates=12)
        order = np.argsort(-sign * truth, 1)[:, :5]
        np.testing.assert_array_equal(hits.ids, order)
        np.testing.assert_allclose(hits.scores, np.take_along_axis(truth, order, 1), rtol=1e-5)
        assert (hits.kind, hits.scored) == (kind, "exact")
        assert hits.columns["label"].tolist() == [[list("abcdefghijkl")[i] for i in row] for row in order]
        assert hits.query_columns["label"].tolist() == list("wxyz")


@pytest.mark.slow
def test_candidates_limit_what_exact_scores_can_settle(built):
    task, folder = built
    retriever = gradindex.load(task, folder)
    proposed = retriever.proponents(range(4), k=4, rerank="none")
    settled = retriever.proponents(range(4), k=4, candidates=4)
    assert proposed.scored == "projected"
    np.testing.assert_array_equal(np.sort(proposed.ids), np.sort(settled.ids))
    truth = gradindex.exact_scores(task, list(task.query))
    np.testing.assert_allclose(settled.scores, np.take_along_axis(truth, settled.ids, 1), rtol=1e-5)
    assert np.all(np.diff(settled.scores) <= 0)
    assert not np.allclose(proposed.scores, settled.scores)


def test_projected_scores_are_the_rows_inner_products(built):
    task, folder = built
    store = gradindex.GradientStore(folder)
    hits = gradindex.load(task, folder).proponents([2, 5], k=12, source="train", rerank="none")
    rows = store.rows(np.arange(12))
    np.testing.assert_allclose(hits.scores, np.take_along_axis(rows[[2, 5]] @ rows.T, hits.ids, 1), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "label", "tolerance"), [("float32", "exact", 1e-5), ("float16", "float16-factor", 1e-2)]
)
def test_stored_factors_give_exact_scores_without_a_pass_over_training_examples(
    tmp_path, monkeypatch, kept, label, tolerance
):
    task = toys.make_task(tmp_path)
    gradindex.build(task, tmp_path / "store", projection=Projection(dim=8), factors=kept)
    retriever = gradindex.load(task, tmp_path / "store")
    truth = gradindex.exact_scores(task, list(task.query))
    monkeypatch.setattr(
        searcher, "through_model", lambda *_: pytest.fail("training examples were run through the model")
    )
    for kind, sign in (("proponents", 1), ("opponents", -1)):
        hits = getattr(retriever, kind)(range(4), k=12)
        assert (hits.scored, hits.note.split(" TracInCP")[0]) == (label, label)
        np.testing.assert_allclose(
            hits.scores, np.take_along_axis(truth, hits.ids, 1), rtol=tolerance, atol=tolerance * np.abs(truth).max()
        )
        assert (np.diff(sign * hits.scores) <= 0).all()
    assert retriever.proponents(0, k=3, rerank="none").scored == "projected"


@pytest.mark.slow
def test_factors_need_layers_whose_gradients_are_one_outer_product(tmp_path):
    task = toys.make_task(tmp_path, toys.convolutional(), shape=(2, 8, 8))
    with pytest.raises(TaskError, match=r"The gradient of \d is not one outer product.*Track linear layers without"):
        gradindex.build(task, tmp_path / "store", factors="float32")
    assert not (tmp_path / "store").exists()
    last = replace(task, layers="6")
    store = gradindex.build(last, tmp_path / "store", factors="float32")
    assert [x.shape for x in store.factors(np.array([3, 1]))[2, 0]] == [(2, 17), (2, 3)]
    with pytest.raises(ArgumentError, match="has no factors. Build a store with factors='float32'"):
        gradindex.build(last, tmp_path / "plain").factors(np.array([0]))


def test_factors_of_rough_gradients_are_labelled(tmp_path):
    task = toys.make_task(tmp_path)
    gradindex.build(task, tmp_path / "store", factors="float32", precision="bfloat16")
    assert gradindex.load(task, tmp_path / "store").proponents(0, k=2).scored == "bfloat16-factor"


@pytest.mark.slow
def test_queries_in_turns_give_the_same_scores(built, monkeypatch):
    task, _ = built
    whole = gradindex.exact_scores(task, list(task.query))
    monkeypatch.setattr(scoring, "_QUERY_BYTES", 1)
    np.testing.assert_allclose(gradindex.exact_scores(task, list(task.query)), whole, rtol=1e-5)


def test_positions_items_and_training_ids_are_queries(built):
    task, folder = built
    retriever = gradindex.load(task, folder)
    by_position = retriever.proponents(2, k=3)
    by_item = retriever.proponents([task.query[2]], k=3)
    np.testing.assert_array_equal(by_position.ids, by_item.ids)
    np.testing.assert_array_equal(by_position.ids, retriever.proponents(np.array([2]), k=3).ids)
    assert (by_position.queries, by_item.queries) == (("query 2",), ("item 0",))
    own = retriever.proponents(7, k=12, source="train")
    self_influence = gradindex.GradientStore(folder).self_influence().sum(1)
    assert own.scores[0, own.ids[0].tolist().index(7)] == pytest.approx(self_influence[7], rel=1e-5)
    assert own.query_columns["label"].tolist() == ["h"]


REFUSED = {
    "k of 0": ({"k": 0}, "k is 0, but must be between 1 and the number of training examples, 12"),
    "k above n": ({"k": 13}, "k is 13"),
    "position": ({"queries": 4}, "There is no query example 4; positions go from 0 to 3"),
    "negative position": ({"queries": -1}, "There is no query example -1"),
    "training id": ({"queries": 12, "source": "train"}, "There is no train example 12"),
    "nothing": ({"queries": []}, "There are no queries"),
    "source": ({"source": "test"}, "source is 'test'"),
    "rerank": ({"rerank": "some"}, "rerank is 'some'"),
    "fewer candidates than k": ({"candidates": 2}, "candidates is 2, but must be at least k, 3"),
    "candidates without re-scoring": (
        {"candidates": 5, "rerank": "none"},
        "needs rerank='exact' or 'wide', but rerank is 'none'",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_is_refused(built, case):
    options, message = REFUSED[case]
    task, folder = built
    with pytest.raises(ArgumentError, match=message):
        gradindex.load(task, folder).proponents(**({"queries": 0, "k": 3} | options))


def test_positions_need_query_data(built):
    task, folder = built
    retriever = gradindex.load(replace(task, query=None, query_columns={}), folder)
    with pytest.raises(ArgumentError, match="no query data"):
        retriever.proponents(0)
    assert retriever.proponents([task.query[0]], k=2).ids.shape == (1, 2)


def test_exact_scores_refuse_unknown_ids_and_no_queries(built):
    task, _ = built
    with pytest.raises(ArgumentError, match="There is no training id 12; ids go from 0 to 11"):
        gradindex.exact_scores(task, [task.query[0]], np.array([3, 12]))
    with pytest.raises(ArgumentError, match="There are no queries"):
        gradindex.exact_scores(task, [])


def other_checkpoints(task, folder):
    return replace(task, checkpoints=[replace(c, learning_rate=0.2) for c in task.checkpoints])


def other_weights(task, folder):
    torch.save({k: v + 1 for k, v in task.model.state_dict().items()}, folder / "other.pt")
    return replace(task, checkpoints=[gradindex.Checkpoint(folder / "other.pt", 0.3, step=0), *task.checkpoints[1:]])


def other_activation(task, folder):
    return replace(task, model=nn.Sequential(task.model[0], nn.Sigmoid(), task.model[2]))


MISMATCHES = {
    "layers": (lambda task, _: replace(task, layers="0"), "layers differ"),
    "learning rates": (other_checkpoints, "checkpoints differ"),
    "weights": (other_weights, "checkpoints differ"),
    "number of checkpoints": (lambda task, _: replace(task, checkpoints=task.checkpoints[:2]), "checkpoints differ"),
    "data length": (
        lambda task, _: replace(task, train=list(task.train)[:6], columns={}),
        r"12 stored, 6 now\) differ",
    ),
    "data": (
        lambda task, _: replace(task, train=list(task.train)[::-1]),
        r"data \(such as training example \d+\) differ",
    ),
    "activation": (other_activation, "losses of training examples"),
    "loss": (lambda task, _: replace(task, loss=lambda m, b: 2 * toys.cross_entropy(m, b)), "loss"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MISMATCHES)
def test_a_task_that_is_not_the_stores_is_refused_with_what_differs(built, case):
    task, folder = built
    change, message = MISMATCHES[case]
    with pytest.raises(MismatchError, match=message):
        gradindex.load(change(task, folder.parent), folder)


def test_a_folder_without_a_store_is_refused(built, tmp_path):
    with pytest.raises(StoreError, match="is not a gradindex store"):
        gradindex.load(built[0], tmp_path / "nowhere")
