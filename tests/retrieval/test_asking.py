"""What can be asked: kinds, stages and thresholds."""

from dataclasses import replace

import numpy as np
import pytest
import toys
from questions import COLUMNS, KINDS, NAMES, M, N, agree, make, ordered, save_index, way
from torch.utils.data import Subset, TensorDataset

import gradindex
from gradindex.errors import ArgumentError
from gradindex.index import CompactIndex, Shape
from gradindex.projection import Projection
from gradindex.retrieval import candidates, searcher
from gradindex.retrieval.candidates import INDEX_FOLDER
from gradindex.rows import Blocks, RowMaker


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", ["factors", "plain"])
def test_each_kind_is_the_best_of_all_exact_scores_in_its_order(request, kept, kind, truth):
    hits = request.getfixturevalue(kept).search(range(M), 8, kind=kind, candidates=N)
    agree(hits, kind, truth, k=8)
    assert (hits.kind, hits.scored, hits.ids.shape) == (kind, "exact", (M, 8))
    assert way(hits) == [("rows", N), ("stored factors" if kept == "factors" else "model", N)]


@pytest.mark.slow
def test_the_largest_sizes_keep_their_signs_and_come_from_both_ends(factors, truth):
    hits = factors.search(range(M), 30, kind="absolute", candidates=N)
    assert (hits.scores > 0).any() and (hits.scores < 0).any()
    assert np.all(np.diff(np.abs(hits.scores)) <= 0)
    few = factors.search(range(M), 5, kind="absolute", candidates=5)
    assert way(few)[-1] == ("stored factors", 10)  # candidates of both signs


def test_both_kinds_take_one_gradient_pass(factors, monkeypatch):
    up, down = factors.proponents(range(M), 5), factors.opponents(range(M), 5)
    passes, blocks = [], RowMaker.blocks
    monkeypatch.setattr(
        RowMaker, "blocks", lambda s, queries, at: passes.append(len(queries)) or blocks(s, queries, at)
    )
    for mine, theirs in zip(factors.both(range(M), 5), (up, down), strict=True):
        assert mine.kind == theirs.kind
        np.testing.assert_array_equal(mine.ids, theirs.ids)
        np.testing.assert_array_equal(mine.scores, theirs.scores)
    assert passes == [M, 1]  # the second is a check of one of them alone


def test_both_kinds_take_one_pass_over_training_examples(plain, monkeypatch):
    union, through_model = [], searcher.through_model
    monkeypatch.setattr(
        searcher, "through_model", lambda e, q, ids, b: union.append(ids) or through_model(e, q, ids, b)
    )
    up, down = plain.both([0], 5)
    assert len(union) == 1
    assert set(up.ids[0]) | set(down.ids[0]) <= set(union[0].tolist())


def test_without_an_index_all_rows_are_compared_whatever_the_rerank(factors, estimates):
    for rerank in ("none", "rows"):
        for kind in KINDS:
            hits = factors.search(range(M), 9, kind=kind, rerank=rerank)
            agree(hits, kind, estimates, k=9)
            assert (hits.scored, way(hits)) == ("projected", [("rows", N)])


@pytest.mark.parametrize("kind", KINDS)
def test_the_stages_of_a_search_with_an_index(indexed, estimates, truth, kind):
    asked, signs = indexed.prepare(range(M)), 2 if kind == "absolute" else 1
    none, rows, exact, more = (
        indexed.search(asked, 10, kind=kind, **options)
        for options in ({"rerank": "none"}, {"rerank": "rows"}, {}, {"candidates": 20})
    )
    assert way(none) == [("index", 10)]
    assert way(rows) == [("index", 40), ("rows", 40)]
    assert [name for name, _ in way(exact)] == ["index", "stored factors"]  # their full rows decide nothing
    assert 40 <= exact.stages[1].rows <= 40 * signs
    assert [name for name, _ in way(more)] == ["index", "rows", "stored factors"]
    assert more.stages[2].rows <= 20 * signs
    assert [hits.scored for hits in (none, rows, exact)] == ["index-estimated", "projected", "exact"]
    for hits, scores in ((rows, estimates), (exact, truth)):
        np.testing.assert_allclose(
            hits.scores, np.take_along_axis(scores, hits.ids, 1), rtol=1e-4, atol=1e-4 * np.abs(scores).max()
        )
    assert not np.allclose(none.scores, np.take_along_axis(estimates, none.ids, 1), rtol=1e-3)
    assert "; stages: index 40, stored factors " in exact.note
    for hits in (none, rows, exact):
        assert np.all(np.diff(KINDS[kind](hits.scores), axis=1) <= 0)


@pytest.mark.slow
def test_rows_newer_than_the_index_are_compared_and_counted(tmp_path):
    whole = make(tmp_path / "whole", factors="float32")
    first = replace(
        whole.task, train=Subset(whole.task.train, range(N - 50)), columns={n: v[: N - 50] for n, v in COLUMNS.items()}
    )
    store = gradindex.build(first, tmp_path / "store", projection=Projection(dim=24), factors="float32")
    save_index(store)
    gradindex.add(whole.task, tmp_path / "store")
    retriever = gradindex.load(whole.task, tmp_path / "store")
    assert way(retriever.proponents(0, 10, rerank="none")) == [("index", 10), ("rows", 50)]
    assert way(retriever.proponents(0, 10, rerank="rows")) == [("index", 40), ("rows", 90)]
    hits = retriever.proponents(range(M), 40)
    assert [name for name, _ in way(hits)] == ["index", "rows", "stored factors"]
    assert (hits.ids >= N - 50).any()
    rows = retriever.query_rows(range(M)) @ retriever.store.rows(np.arange(N)).T
    none = retriever.proponents(range(M), 20, rerank="none")
    new = none.ids >= N - 50
    np.testing.assert_allclose(none.scores[new], np.take_along_axis(rows, none.ids, 1)[new], rtol=1e-4)


def test_an_index_proposes_every_row_for_a_k_as_large(indexed, truth):
    hits = indexed.proponents(range(M), N)
    agree(hits, "proponents", truth, k=N)
    assert way(hits) == [("rows", N), ("stored factors", N)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rerank", ["none", "rows", "exact"])
def test_a_threshold_finds_all_that_reach_it_and_no_others(indexed, estimates, truth, kind, rerank):
    scores = truth if rerank == "exact" else estimates
    # The strength of one example exactly: "at least" includes it.
    x = float(KINDS[kind](scores[2])[ordered(kind, scores[2])[17]]) * (1 - 1e-6)
    hits = indexed.search(range(M), kind=kind, at_least=x, rerank=rerank)
    agree(hits, kind, scores, at_least=x)
    assert hits.counts[2] == 18
    assert len(set(hits.counts.tolist())) > 1
    assert way(hits) == [("stored factors" if rerank == "exact" else "rows", N)]
    capped = indexed.search(range(M), 4, kind=kind, at_least=x, rerank=rerank)
    agree(capped, kind, scores, at_least=x, k=4)


def test_a_threshold_includes_scores_that_equal_it(factors):
    hits = factors.proponents(0, 20, candidates=N)
    again = factors.proponents(0, at_least=float(hits.scores[0, 11]))
    assert again.ids[0].tolist() == hits.ids[0, :12].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["factors", "unit"])
def test_a_groups_threshold_leaves_out_what_is_just_below(request, kept):
    retriever = request.getfixturevalue(kept)
    hits = retriever.search(range(M), 30, aggregate="sum", candidates=N)
    for least in hits.scores[0] * (1 + 2e-5 * np.sign(hits.scores[0])):  # within what another order of sums may change
        found = retriever.search(range(M), aggregate="sum", at_least=float(least))
        assert (found.scores[0] >= least).all()


def store_of_equal_rows(task, folder, monkeypatch):
    """One row for all, made once: rows that are computed in batches of other sizes can differ in their last bits."""
    blocks, made = RowMaker.blocks, {}

    def repeated(self, examples, checkpoints):
        kind = self.dim, self._factors  # what is made on the way is without factors
        if kind not in made:
            made[kind] = blocks(self, examples[:1], checkpoints)
        return Blocks.below([made[kind]] * len(examples))

    monkeypatch.setattr(RowMaker, "blocks", repeated)
    return gradindex.build(task, folder, projection=Projection(dim=37), factors="float32")


@pytest.mark.slow
@pytest.mark.parametrize("rerank", ["exact", "rows"])
@pytest.mark.parametrize("proposals", [None, 43, 150])
def test_equal_rows_have_equal_scores_and_come_in_the_order_of_ids(tmp_path, rerank, proposals, monkeypatch):
    """Products of matrices round the sums of the last rows in another way."""
    n = 203
    task = toys.make_task(tmp_path, n_train=n, n_query=M)
    store = store_of_equal_rows(task, tmp_path / "store", monkeypatch)
    if proposals:
        save_index(store, proposals)
    monkeypatch.undo()
    monkeypatch.setattr("gradindex.retrieval.retriever.check_task", lambda *_: None)  # its rows are no example's
    retriever = gradindex.load(task, store.folder)
    options = [{}, {"kind": "opponents"}, {"kind": "absolute"}, {"ids": np.arange(n)}, {"at_least": -1e9}]
    for some in options:
        hits = retriever.search(range(M), 30, rerank=rerank, **some)
        for ids, scores in map(hits.of, range(M)):
            assert (scores == scores[0]).all()
            assert (np.diff(ids) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_through_the_model_doubles_candidates_until_none_is_new(plain, truth, kind, monkeypatch):
    x = float(KINDS[kind](truth[0])[ordered(kind, truth[0])[5]]) * (1 - 1e-6)
    scored, through_model = [], searcher.through_model
    monkeypatch.setattr(
        searcher, "through_model", lambda e, q, ids, b: scored.append(ids) or through_model(e, q, ids, b)
    )
    hits = plain.search(0, kind=kind, at_least=x, candidates=40)
    ids = np.concatenate(scored)
    assert len(np.unique(ids)) == len(ids)  # no example is scored twice
    assert hits.stages[-1].name == "model" and hits.stages[-1].rows == len(ids) >= min(N, 80)
    assert set(hits.of(0)[0]) <= set(ordered(kind, truth[0], at_least=x))
    everything = plain.search(0, kind=kind, at_least=-1e9 if kind != "absolute" else 0, candidates=40)
    agree(everything, kind, truth[:1])
    assert everything.stages[-1].rows == N


def test_a_threshold_that_nothing_reaches_is_given_a_whole_doubling(plain):
    hits = plain.proponents([0, 1], at_least=1e9, candidates=40)
    assert hits.ids.shape == (2, 0)
    assert way(hits) == [("rows", N), ("model", 80)]


@pytest.mark.slow
@pytest.mark.parametrize("rerank", ["rows", "exact"])
def test_equal_scores_come_in_the_order_of_ids_for_every_kind(tmp_path, rerank):
    task = toys.make_task(tmp_path, n_train=40)
    x, y = task.train.tensors
    task = replace(task, train=TensorDataset(x[:4].repeat(10, 1), y[:4].repeat(10)))
    gradindex.build(task, tmp_path / "store", shard_rows=7, batch_size=1, factors="float32")
    retriever = gradindex.load(task, tmp_path / "store")
    for kind in KINDS:
        for options in ({}, {"where": {}}, {"ids": np.arange(40)}, {"at_least": -1e9}):
            hits = retriever.search(range(4), 25, kind=kind, rerank=rerank, **options)
            for ids, scores in zip(hits.ids, hits.scores, strict=True):
                keys = np.round(KINDS[kind](scores.astype(np.float64)), 5)
                assert len(np.unique(keys)) == 3
                assert all(np.all(np.diff(ids[keys == key]) > 0) for key in np.unique(keys))
                last = ids[keys == keys.min()]
                assert (last % 4 == ids[-1] % 4).all()
                # By full rows, a product of matrices finds them, whose rounding decides among equal rows at the cut.
                if rerank == "exact":
                    assert last.tolist() == (ids[-1] % 4 + 4 * np.arange(5)).tolist()


def test_ragged_answers_have_no_padding_where_people_look(factors, tmp_path):
    x = float(np.sort(factors.exact_scores(0)[0])[-3])
    hits = factors.proponents([0, 1, 2], at_least=x)
    assert hits.ids.shape == hits.scores.shape == (3, hits.counts.max())
    short = int(hits.counts.argmin())
    assert hits.counts[short] < hits.ids.shape[1]
    assert hits.ids[short, -1] == -1 and np.isnan(hits.scores[short, -1])
    assert len(hits.records()) == hits.counts.sum()
    assert all(record["id"] >= 0 and record["label"] in NAMES for record in hits.records())
    assert "nan" not in str(hits) and " -1 " not in str(hits)
    hits.save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "id -1" not in page and "nan" not in page
    assert hits.first(3, 1).counts.tolist() == np.minimum(hits.counts, 1).tolist()


def test_fewer_rows_than_ten_are_all_answered_by_default(tmp_path):
    task = toys.make_task(tmp_path, n_train=7)
    gradindex.build(task, tmp_path / "store")
    assert gradindex.load(task, tmp_path / "store").proponents(0).ids.shape == (1, 7)


@pytest.mark.slow
def test_an_index_that_finds_too_few_leaves_the_query_to_all_rows(tmp_path, estimates):
    retriever = make(tmp_path, factors="float32")
    store = retriever.store
    made = CompactIndex.build(Shape("ivf", 6, 7), store.rows(store.ids), store.blocks)
    recall = {"k": 10, "proponents_at_least": 0.9, "opponents_at_least": 0.9, "against": "a test"}
    about = {"map": store.manifest.fingerprint, "ids": store.id_runs.tolist(), "covers": store.origins} | {
        "recall": recall
    }
    made.save(store.folder / INDEX_FOLDER, about | {"effort": {"probes": 1, "proposals": 20}})
    k = 120  # more than one list holds for most queries, and fewer than all rows
    monkey = candidates.Candidates(store)
    short = (monkey.index.search(retriever.query_rows(range(M)), k, probes=1)[1] >= 0).sum(1) < k
    assert short.any()
    effort = candidates.Effort(1, k)
    for scores, ids in (monkey.propose(retriever.query_rows(range(M)), k, effort),
                        monkey.search(retriever.query_rows(range(M)), k, effort)):  # fmt: skip
        for query in np.flatnonzero(short):
            assert ids[query].tolist() == ordered("proponents", estimates[query], k=k)
            np.testing.assert_allclose(scores[query], estimates[query][ids[query]], rtol=1e-4)


REFUSED = {
    "candidates that decide nothing": ({"at_least": 0.1, "candidates": 20}, "candidates decides nothing with at_least"),
    "fewer candidates than hits": ({"candidates": 3}, "candidates is 3, but must be at least k, 10"),
    "fewer candidates than k": ({"k": 20, "candidates": 15}, "candidates is 15, but must be at least k, 20"),
    "candidates for rows": (
        {"rerank": "rows", "candidates": 30},
        "candidates needs rerank='exact' or 'wide', but rerank is 'rows'",
    ),
    "both as a kind": ({"kind": "both"}, r"For both, call both\(\)"),
    "no such column": ({"where": {"colour": "red"}}, r"no column 'colour'. It has: label, number, rate, flipped"),
    "text for a number": ({"where": {"number": "3"}}, "column number holds integers, but where has '3'"),
    "number for a text": ({"where": {"label": 3}}, "column label holds text, but where has 3, a int"),
    "bool for a number": ({"where": {"number": True}}, "holds integers, but where has True"),
    "number for a bool": ({"where": {"flipped": 1}}, "column flipped holds true or false, but where has 1"),
    "one of several": ({"where": {"label": ["cat", 1.5]}}, "where has 1.5, a float"),
    "float for an int": ({"where": {"number": 2.0}}, "where has 2.0, a float"),
    "id": ({"ids": [3, N]}, f"There is no training id {N}"),
    "mask": ({"ids": np.ones(N, dtype=bool)}, "ids are of type bool"),
    "differs in no column": ({"differs": "colour"}, "no column 'colour'"),
    "differs in the store's alone": ({"differs": "number"}, "queries have no column 'number' to differ from"),
    "kind": ({"kind": "best"}, "kind is 'best', but must be one of: proponents, opponents, absolute"),
    "rerank": ({"rerank": "all"}, "rerank is 'all', but must be one of: exact, wide, rows, none"),
    "threshold": ({"at_least": float("nan")}, "at_least is NaN"),
    "aggregate": ({"aggregate": "max"}, "aggregate is 'max', but must be 'sum', 'mean' or None"),
    "k with a threshold": ({"k": N + 1, "at_least": 1.0}, f"k is {N + 1}"),
    "group of several values": ({"queries": [0, 1], "aggregate": "sum", "differs": "label"}, "several values in label"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_asked_is_refused(factors, case):
    options, message = REFUSED[case]
    with pytest.raises(ArgumentError, match=message):
        factors.search(**({"queries": 0} | options))
