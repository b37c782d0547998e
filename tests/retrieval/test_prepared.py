"""Queries that are prepared once: several questions, several threads, groups, bounded memory."""

import copy
import threading
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from questions import KINDS, NAMES, M, N, agree, make

import gradindex
from gradindex.errors import ArgumentError
from gradindex.gradients import Engine
from gradindex.projection import Projection
from gradindex.retrieval import candidates, scoring
from gradindex.rows import RowMaker
from gradindex.store import GradientStore


def test_prepared_queries_need_no_gradient_again(factors, monkeypatch):
    asked = factors.prepare([3, 1])
    expected = [factors.search([3, 1], 4, kind=kind) for kind in KINDS]
    split = factors.explain([3, 1], [0, 9])
    monkeypatch.setattr(Engine, "__enter__", lambda self: pytest.fail("the model was used"))
    for kind, hits in zip(KINDS, expected, strict=True):
        mine = factors.search(asked, 4, kind=kind)
        np.testing.assert_array_equal(mine.ids, hits.ids)
        assert mine.queries == ("query 3", "query 1")
        assert mine.query_columns["label"].tolist() == ["cat", "emu"]
    np.testing.assert_array_equal(factors.explain(asked, [0, 9]).scores, split.scores)
    np.testing.assert_array_equal(factors.query_rows(asked), asked.rows)


def test_whole_gradients_of_prepared_queries_are_kept(plain, monkeypatch):
    asked = plain.prepare([0, 1])
    first = plain.proponents(asked, 5)
    monkeypatch.setattr(gradindex.retrieval.asking, "Products", lambda *_: pytest.fail("computed again"))
    np.testing.assert_array_equal(plain.proponents(asked, 5).scores, first.scores)


def test_prepared_queries_serve_another_retriever_of_the_same_store(plain):
    task = replace(plain.task, model=copy.deepcopy(plain.task.model))
    other, asked = gradindex.load(task, plain.store.folder), plain.prepare([0, 1])
    first = plain.proponents(asked, 5)
    with plain._engine:  # what it computes must not go through the first one's model
        hits = run_beside(lambda: other.proponents(asked, 5))
    np.testing.assert_array_equal(hits.ids, first.ids)
    np.testing.assert_allclose(hits.scores, first.scores, rtol=1e-5)


def test_queries_prepared_for_other_rows_are_refused(factors, plain, tmp_path):
    other = make(tmp_path, projection=Projection(dim=12))
    with pytest.raises(ArgumentError, match="prepared for different rows than those of .*Prepare them again"):
        factors.search(other.prepare(0), 3)
    with pytest.raises(ArgumentError, match="prepared for different rows"):
        factors.search(plain.prepare(0), 3)  # the same rows, but without factors
    with pytest.raises(ArgumentError, match=r"source and aggregate belong to prepare\(\)"):
        factors.search(factors.prepare(0), 3, aggregate="mean")


@pytest.mark.slow
def test_threads_that_share_a_retriever_get_the_serial_answers(indexed, plain):
    for retriever in (indexed, plain):
        questions = [(q, kind) for q in range(M) for kind in KINDS] * 2
        serial = [retriever.search(q, 7, kind=kind) for q, kind in questions]
        found = [None] * len(questions)

        def work(part, retriever=retriever, questions=questions, found=found):
            for place in range(part, len(questions), 4):
                q, kind = questions[place]
                found[place] = retriever.search(q, 7, kind=kind)

        threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for mine, theirs in zip(found, serial, strict=True):
            np.testing.assert_array_equal(mine.ids, theirs.ids)
            np.testing.assert_array_equal(mine.scores, theirs.scores)


def run_beside(action, seconds=60):
    """What an action returns in another thread, or ``None`` where it does not end in time."""
    found = []
    thread = threading.Thread(target=lambda: found.append(action()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


@pytest.mark.slow
def test_a_search_goes_on_while_another_thread_computes_gradients(indexed, plain):
    for retriever, free in ((indexed, {}), (plain, {"rerank": "rows"})):
        asked = retriever.prepare([0, 1])
        expected = retriever.proponents(asked, 4, **free)
        with retriever._engine:
            hits = run_beside(lambda r=retriever, a=asked, o=free: r.proponents(a, 4, **o))
            assert hits is not None, "the search waited for the engine"
            np.testing.assert_array_equal(hits.ids, expected.ids)
            waits = run_beside(lambda r=retriever: r.prepare(2), seconds=1)
            assert waits is None  # gradients do wait: one pass at a time


def test_gradients_in_threads_leave_the_random_state_alone(plain):
    before = torch.get_rng_state()
    threads = [threading.Thread(target=lambda q=q: plain.proponents(q, 3)) for q in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("kept", ["factors", "plain", "indexed", "unit"])
def test_a_group_is_one_question_with_the_sum_of_each_querys_scores(request, kept, aggregate, monkeypatch):
    retriever = request.getfixturevalue(kept)
    fold = getattr(np, aggregate)
    each = fold(retriever.exact_scores(range(M)).astype(np.float64), axis=0)[None]
    monkeypatch.setattr(gradindex.gradients.products, "_AT_ONCE", 4)  # in several turns
    for kind in KINDS:
        hits = retriever.search(range(M), 8, kind=kind, aggregate=aggregate, candidates=N)
        agree(hits, kind, each, k=8)
    assert hits.queries == (f"{aggregate} of 6 queries",)
    assert (hits.query_columns, hits.show_query) == ({}, None)
    rows = fold(retriever.query_rows(range(M)) @ retriever.store.rows(np.arange(N)).T, axis=0)[None]
    agree(retriever.search(range(M), 8, aggregate=aggregate, rerank="rows", candidates=None, where={"label": NAMES}),
          "proponents", rows, k=8)  # fmt: skip
    np.testing.assert_allclose(
        retriever.exact_scores(retriever.prepare(range(M), aggregate=aggregate)), each, atol=1e-4 * np.abs(each).max()
    )
    same = retriever.proponents([0, 3], 3, aggregate=aggregate, differs="label")
    assert (same.columns["label"] != "cat").all()


def test_a_group_of_many_queries_reads_some_at_a_time(factors, monkeypatch):
    sizes, blocks = [], RowMaker.blocks
    monkeypatch.setattr(RowMaker, "blocks", lambda s, queries, at: sizes.append(len(queries)) or blocks(s, queries, at))
    asked = factors.prepare(np.arange(N), source="train", aggregate="mean")
    assert asked.names == ("mean of 300 queries",)
    batches = [size for size in sizes if size > 1]  # beside checks of an example alone
    assert max(batches) == 32 and sum(batches) == N
    assert asked.rows.shape == (1, factors.store.dim)
    assert {matrix.shape for matrix in asked.factors.values()} == {(1, 5, 7), (1, 3, 6)}


def test_k_up_to_n_gathers_a_bounded_part_at_a_time(indexed, truth, monkeypatch):
    asked = indexed.prepare(range(2))
    gathered, factors = [], GradientStore.factors_in_place
    monkeypatch.setattr(GradientStore, "factors_in_place", lambda s, ids: gathered.append(len(ids)) or factors(s, ids))
    monkeypatch.setattr(scoring, "_PAIRS", 40)
    monkeypatch.setattr(candidates, "_GATHERED_BYTES", 40 * 4 * indexed.store.dim)
    agree(indexed.proponents(asked, N), "proponents", truth[:2], k=N)
    assert max(gathered) == 40
    gathered.clear()
    rows, fetch = [], GradientStore.rows
    monkeypatch.setattr(GradientStore, "rows", lambda s, ids: rows.append(len(ids)) or fetch(s, ids))
    indexed.proponents(asked, 60, candidates=70)
    indexed.proponents(asked, 60, rerank="rows")
    assert max(rows) <= 40


def test_a_prepared_search_makes_no_array_of_the_whole_store(indexed, monkeypatch):
    asked = indexed.prepare(0)
    indexed.proponents(asked, 10)
    monkeypatch.setattr(GradientStore, "ids", property(lambda _: pytest.fail("all ids were listed")))
    monkeypatch.setattr(GradientStore, "blocks", lambda *_: pytest.fail("all rows were read"))
    monkeypatch.setattr(GradientStore, "rows", lambda *_: pytest.fail("rows were gathered"))
    columns, column = [], GradientStore.column
    monkeypatch.setattr(GradientStore, "column", lambda s, n, ids=None: columns.append(len(ids)) or column(s, n, ids))
    assert [asdict(stage)["name"] for stage in indexed.proponents(asked, 10).stages] == ["index", "stored factors"]
    assert columns == [10] * 4
