"""What can be asked: kinds, stages, thresholds, filters and groups, of queries that were prepared once."""

import copy
import threading
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import toys
from torch.utils.data import Subset, TensorDataset

import gradindex
from gradindex.errors import ArgumentError
from gradindex.examples import RowBatch
from gradindex.gradients import Engine
from gradindex.index import CompactIndex, Shape
from gradindex.projection import Projection
from gradindex.retrieval import candidates, scoring, searcher
from gradindex.retrieval.candidates import INDEX_FOLDER
from gradindex.retrieval.hits import NOTHING
from gradindex.rows import RowMaker
from gradindex.store import GradientStore

N, M = 300, 6
NAMES = ["cat", "dog", "emu"]
COLUMNS = {
    "label": [NAMES[i % 3] for i in range(N)],
    "number": np.arange(N, dtype=np.int32) % 7,
    "rate": (np.arange(N) % 4 / 10).astype(np.float32),
    "flipped": np.arange(N) % 5 == 0,
}
QUERY_COLUMNS = {"label": ["cat", "emu", "cow", "cat", "dog", "emu"], "extra": list(range(M))}
KINDS = {"proponents": lambda s: s, "opponents": lambda s: -s, "absolute": np.abs}


def make(folder, *, index=False, **options):
    (folder / "task").mkdir(exist_ok=True, parents=True)
    task = toys.make_task(folder / "task", n_train=N, n_query=M, columns=COLUMNS, query_columns=QUERY_COLUMNS)
    options = {"projection": Projection(dim=24), "batch_size": 32, "shard_rows": 70} | options
    store = gradindex.build(task, folder / "store", **options)
    if index:
        save_index(store)
    return gradindex.load(task, folder / "store")


def save_index(store, proposals=40, dim=6):
    made = CompactIndex.build(Shape("flat", dim), store.rows(store.ids), store.blocks)
    recall = {"k": 10, "proponents_at_least": 0.9, "opponents_at_least": 0.9, "against": "a test"}
    about = {"map": store.manifest.fingerprint, "ids": store.id_runs.tolist(), "covers": store.origins} | {
        "recall": recall
    }
    made.save(store.folder / INDEX_FOLDER, about | {"effort": {"probes": 1, "proposals": proposals}})


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    return make(tmp_path_factory.mktemp("factors"), factors="float32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def unit(tmp_path_factory):
    return make(tmp_path_factory.mktemp("unit"), unit_norm=True, factors="float32")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    return make(tmp_path_factory.mktemp("indexed"), factors="float32", index=True)


@pytest.fixture(scope="module")
def truth(factors):
    return factors.exact_scores(range(M)).astype(np.float64)


@pytest.fixture(scope="module")
def estimates(factors):
    return factors.query_rows(range(M)) @ factors.store.rows(np.arange(N)).T


def ordered(kind, scores, allowed=None, k=None, at_least=None):
    """Ids of one query by brute force: strength descending, then id ascending."""
    keys = KINDS[kind](scores)
    ids = [i for i in np.lexsort((np.arange(len(keys)), -keys)) if allowed is None or allowed[i]]
    return [i for i in ids if at_least is None or keys[i] >= at_least][:k]


def agree(hits, kind, scores, rtol=1e-4, **wanted):
    for query in range(len(hits.queries)):
        ids, mine = hits.of(query)
        allowed = wanted.get("allowed")
        rest = wanted | {"allowed": allowed[query] if allowed is not None and np.ndim(allowed) == 2 else allowed}
        assert ids.tolist() == ordered(kind, scores[query], **rest)
        np.testing.assert_allclose(mine, scores[query][ids], rtol=rtol, atol=rtol * np.abs(scores).max())


def way(hits):
    return [(stage.name, stage.rows) for stage in hits.stages]


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
    passes, rows = [], RowMaker.rows
    monkeypatch.setattr(RowMaker, "rows", lambda s, queries: passes.append(len(queries)) or rows(s, queries))
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
    rows, made = RowMaker.rows, {}

    def repeated(self, examples):
        kind = self.dim, self._factors  # what is made on the way is without factors
        if kind not in made:
            made[kind] = rows(self, examples[:1])
        return RowBatch.joined([made[kind]] * len(examples))

    monkeypatch.setattr(RowMaker, "rows", repeated)
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


LABEL = np.array(COLUMNS["label"])
FILTERS = {
    "one value": ({"where": {"label": "cat"}}, LABEL == "cat"),
    "several values": ({"where": {"label": ["cat", "emu"]}}, LABEL != "dog"),
    "several columns": ({"where": {"label": "dog", "number": 3, "flipped": False}},
                        (LABEL == "dog") & (COLUMNS["number"] == 3) & ~COLUMNS["flipped"]),
    "true": ({"where": {"flipped": True}}, COLUMNS["flipped"]),
    "NumPy values": ({"where": {"number": np.arange(3), "flipped": np.True_}},
                     (COLUMNS["number"] < 3) & COLUMNS["flipped"]),
    "a float that float32 rounds": ({"where": {"rate": 0.1}}, np.arange(N) % 4 == 1),
    "a number that no example can have": ({"where": {"number": [2**40, 5]}}, COLUMNS["number"] == 5),
    "ids": ({"ids": [250, 3, 77, 3]}, np.isin(np.arange(N), [3, 77, 250])),
    "ids and a value": ({"ids": range(100), "where": {"label": "cat"}}, (LABEL == "cat") & (np.arange(N) < 100)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FILTERS)
def test_filters_leave_the_best_of_what_they_allow(indexed, estimates, truth, case, kind):
    options, allowed = FILTERS[case]
    hits = indexed.search(range(M), 6, kind=kind, rerank="rows", **options)
    agree(hits, kind, estimates, allowed=allowed, k=6)
    assert way(hits) == [("rows", allowed.sum())]  # no index
    exact = indexed.search(range(M), 6, kind=kind, candidates=N, **options)
    agree(exact, kind, truth, allowed=allowed, k=6)
    every = indexed.search(range(M), kind=kind, at_least=0.0, **options)
    agree(every, kind, truth, allowed=allowed, at_least=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_examples_that_differ_from_the_query(indexed, estimates, truth, kind):
    allowed = LABEL[None] != np.array(QUERY_COLUMNS["label"])[:, None]
    for options, scores in (({"rerank": "rows"}, estimates), ({"candidates": N}, truth)):
        agree(indexed.search(range(M), 6, kind=kind, differs="label", **options), kind, scores, allowed=allowed, k=6)
    hits = indexed.search(range(M), kind=kind, differs="label", where={"number": 2}, at_least=0.0)
    agree(hits, kind, truth, allowed=allowed & (COLUMNS["number"] == 2), at_least=0.0)
    own = indexed.proponents([4, 9], 5, source="train", differs="label")
    assert (own.columns["label"] != LABEL[[4, 9]][:, None]).all()


def test_a_filter_through_the_model_settles_the_allowed_alone(plain, truth):
    allowed = LABEL == "cat"
    hits = plain.proponents(range(M), 5, where={"label": "cat"}, candidates=N)
    agree(hits, "proponents", truth, allowed=allowed, k=5)
    assert way(hits) == [("rows", allowed.sum()), ("model", allowed.sum())]
    hits = plain.proponents(range(M), where={"label": "cat"}, at_least=-1e9)
    agree(hits, "proponents", truth, allowed=allowed)


@pytest.mark.parametrize("few", [0.0, 1.0])
def test_gathered_and_streamed_rows_give_the_same_answer(indexed, few, estimates, monkeypatch):
    monkeypatch.setattr(candidates, "_FEW", few)
    monkeypatch.setattr(candidates, "_SCORES", 70)
    hits = indexed.opponents(range(M), 9, where={"number": [1, 2]}, rerank="rows")
    agree(hits, "opponents", estimates, allowed=np.isin(COLUMNS["number"], [1, 2]), k=9)


@pytest.mark.parametrize("kept", ["factors", "plain"])
@pytest.mark.parametrize("options", [{}, {"rerank": "rows"}, {"at_least": 0.0}], ids=str)
def test_a_filter_that_matches_nothing_says_so(request, kept, options, tmp_path):
    hits = request.getfixturevalue(kept).search([0, 1], where={"label": "yak"}, **options)
    assert hits.ids.shape == (2, 0)
    assert (hits.records(), hits.counts.tolist()) == ([], [0, 0])
    assert str(hits).count(f"({NOTHING})") == 2
    hits.save_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count(NOTHING) == 2


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
        "candidates needs rerank='exact', but rerank is 'rows'",
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
    "rerank": ({"rerank": "all"}, "rerank is 'all', but must be one of: exact, rows, none"),
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


def test_items_have_no_columns_to_differ_from(factors):
    with pytest.raises(ArgumentError, match="items passed directly have no columns"):
        factors.search([factors.task.query[0]], differs="label")


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
    sizes, rows = [], RowMaker.rows
    monkeypatch.setattr(RowMaker, "rows", lambda s, queries: sizes.append(len(queries)) or rows(s, queries))
    asked = factors.prepare(np.arange(N), source="train", aggregate="mean")
    assert asked.names == ("mean of 300 queries",)
    batches = [size for size in sizes if size > 1]  # beside checks of an example alone
    assert max(batches) == 32 and sum(batches) == N
    assert asked.rows.shape == (1, factors.store.dim)
    assert {matrix.shape for matrix in asked.factors.values()} == {(5, 7), (3, 6)}


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
