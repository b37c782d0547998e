"""An index keeps the recall that it promises, and follows its store."""

import json
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
import toys
from click.testing import CliRunner
from torch.utils.data import Subset

import gradindex
from gradindex import evaluation
from gradindex.cli import main
from gradindex.errors import ArgumentError, OutOfMemoryError, RecallError
from gradindex.evaluation import efforts, floors, trials, tuning
from gradindex.evaluation import truth as truth_of
from gradindex.index import CompactIndex, Shape, gpu
from gradindex.index.kinds import base
from gradindex.projection import Projection
from gradindex.retrieval.candidates import Candidates, Effort
from gradindex.store import GradientStore


@pytest.fixture
def quick(monkeypatch):
    """Times that do not depend on the machine: as many milliseconds as rows are compared; no store is too small."""
    monkeypatch.setattr(tuning, "_SMALL", 0)
    monkeypatch.setattr(
        efforts, "milliseconds", lambda s, search, truth, effort, *_: 1e6 if effort is None else effort.proposals
    )
    monkeypatch.setattr(floors.ScoringTime, "of", lambda self, count: 0.0)


@pytest.fixture(scope="module")
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


@pytest.mark.slow
def test_the_promise_is_kept_on_queries_that_the_tuner_did_not_see(store, quick):
    task, folder = store
    found = evaluation.index(folder, recall=0.97, k=10, n_query=200)
    about = found.index.about
    assert about["recall"]["against"] == "against exact scores, training examples as queries"
    assert min(about["recall"]["proponents_at_least"], about["recall"]["opponents_at_least"]) >= 0.97
    retriever = gradindex.load(task, folder)
    ids = retriever.store.ids
    truth = retriever.exact_scores(range(40))
    for kind, sign in (("proponents", 1), ("opponents", -1)):
        hits = getattr(retriever, kind)(range(40), k=10)
        best = ids[np.argsort(-sign * truth, 1)[:, :10]]
        assert toys.share(hits.ids, best) >= 0.95
        own = np.take_along_axis(truth, np.searchsorted(ids, hits.ids), 1)
        np.testing.assert_allclose(hits.scores, own, rtol=1e-4, atol=1e-4 * np.abs(truth).max())
        assert hits.scored == "exact"
    assert "recall@10 at least 0.9" in retriever.search_note


@pytest.mark.slow
def test_an_index_follows_its_store(store, quick):
    task, folder = store
    evaluation.index(folder, recall=0.97, k=10, n_query=200)
    retriever = gradindex.load(task, folder)
    best = retriever.proponents(0, k=10).ids[0]
    gradindex.store.remove(folder, best[:3])
    gradindex.store.compact(folder)
    assert not np.isin(best[:3], retriever.proponents(0, k=10).ids).any()
    gradindex.add(task, folder)
    assert "300 newer rows are scanned in full" in retriever.search_note
    everything = Candidates(GradientStore(folder), use_index=False)
    rows = retriever.query_rows(range(40))
    _, ids = everything.search(rows, 10)
    mine = Candidates(GradientStore(folder)).search(rows, 10)
    new = [np.isin(i, np.arange(600, 900)) for i in ids]
    assert sum(map(np.sum, new)) > 50  # of the true top-10 of all queries, many are new
    assert all(np.isin(i[n], m).all() for i, n, m in zip(ids, new, mine[1], strict=True))
    assert toys.share(mine[1], ids) > 0.95


@pytest.mark.slow
def test_an_index_of_other_rows_is_not_used_and_says_so(store, quick):
    task, folder = store
    evaluation.index(folder, recall=0.97, k=10, n_query=100)
    extra = gradindex.Checkpoint(task.checkpoints[0].path, 0.05, step=9)
    longer = replace(task, checkpoints=[*task.checkpoints, extra])
    gradindex.growth.add_checkpoint(replace(longer, train=Subset(task.train, range(600))), folder)
    retriever = gradindex.load(longer, folder)
    assert "the index is stale (built from other rows), `gradindex index` rebuilds it" in retriever.search_note
    assert retriever.proponents(0, k=600).ids.shape == (1, 600)
    evaluation.index(folder, recall=0.97, k=10, n_query=100)
    assert "recall@10" in gradindex.load(longer, folder).search_note


def test_a_promise_that_cannot_be_kept_is_an_error_and_leaves_what_was_there(store, quick, monkeypatch):
    _, folder = store
    evaluation.index(folder, recall=0.9, k=10, n_query=100)
    before = {path: path.read_bytes() for path in (folder / "index").iterdir()}
    monkeypatch.setattr(base, "DIMS", (1,))
    monkeypatch.setattr(efforts, "_PROPOSALS", (1,))
    with pytest.raises(
        RecallError,
        match=r"No index of .* can reach recall 0.999 of the true top-10 .*: all rows compared by 1 numbers each reach "
        r"about 0\.\d+",
    ):
        evaluation.index(folder, recall=0.999, k=10, n_query=100)
    assert {path: path.read_bytes() for path in (folder / "index").iterdir()} == before


def test_no_index_is_made_where_comparing_all_rows_is_as_fast(store, monkeypatch):
    _, folder = store
    monkeypatch.setattr(tuning, "_SMALL", 0)
    monkeypatch.setattr(efforts, "milliseconds", lambda *_: 1.0)
    (folder / "index").mkdir()
    (folder / "index" / "manifest.json").write_text("of another time, and damaged")
    assert evaluation.index(folder, recall=0.9, k=10, n_query=100).how == "exact over all rows"
    assert not (folder / "index").exists()


def test_truth_counts_equal_scores_and_not_the_query_itself(store):
    _, folder = store
    opened = GradientStore(folder)
    truth = truth_of.held_out(opened, 30, 10)
    ids = opened.ids
    chosen = truth.own.tolist()
    np.testing.assert_array_equal(opened.rows(truth.own), truth.rows)
    rows = opened.rows(ids).astype(np.float64)
    for sign in (1, -1):
        scores = sign * rows[chosen] @ rows.T
        scores[np.arange(30), chosen] = -np.inf
        for query in range(30):
            best = truth.best[sign][query]
            assert set(best[best >= 0]) == set(np.argsort(-scores[query])[:10])
    assert truth.recalls(1, np.where(truth.best[1] >= 0, truth.best[1], 0), 99).min() == 1
    assert truth.recalls(1, np.full((30, 5), -1), 99).max() == 0
    first = np.concatenate([truth.own[:, None], truth.best[1]], 1)  # the query itself takes no place
    assert truth.recalls(1, first, first.shape[1] - 1).min() == 1


def test_queries_whose_top_is_not_clear_are_left_out():
    rows = np.eye(30, 40, dtype=np.float32)
    scores = np.random.default_rng(0).standard_normal((30, 50)).astype(np.float32)
    scores[:5] = 1  # all equal
    scores[5, :4] = 9  # four equal at the top, of which any three are the top-3
    truth = truth_of.truth_from(rows, [(slice(0, 30), np.arange(50), scores)], np.full(30, -1), 3, "", 0)
    assert len(truth.rows) == 25
    (place,) = np.flatnonzero(truth.rows[:, 5])
    assert set(truth.best[1][place]) - {-1} == {0, 1, 2, 3}
    assert sorted(truth.rows.argmax(1)) == list(range(5, 30))
    assert truth.rows.argmax(1).tolist() != list(range(5, 30))  # in no order, so that halves are not alike
    scores[:] = 1
    with pytest.raises(
        ArgumentError, match="Only 0 of 30 queries have a top-3 without ties, but at least 20 are needed"
    ):
        truth_of.truth_from(rows, [(slice(0, 30), np.arange(50), scores)], np.full(30, -1), 3, "", 0)


def test_the_lower_bound_holds_as_often_as_it_says_and_is_never_certain():
    generator, missed = np.random.default_rng(0), 0
    for _ in range(2000):
        values = 1 - generator.integers(0, 3, 40) * (generator.random(40) < 0.3) / 10
        missed += truth_of.lower_bound(values, 10) > 1 - 0.3 / 10
    assert missed / 2000 < 0.06
    assert 0.95 < truth_of.lower_bound(np.ones(20), 10) < 0.995
    assert 0.999 < truth_of.lower_bound(np.ones(250), 100) < 1
    assert truth_of.lower_bound(np.ones(20), 10, tries=5) < truth_of.lower_bound(np.ones(20), 10)
    # Student's t with 10 degrees of freedom has 1.8125 at 95%.
    values = np.array([0.9, 1.0] * 5)
    with_one = np.append(values, 0.8)
    expected = with_one.mean() - 1.8125 * with_one.std(ddof=1) / 11**0.5
    assert truth_of.lower_bound(values, 10) == pytest.approx(expected, abs=2e-4)


def test_the_worse_of_both_kinds_counts():
    assert tuning.Measured(1, 1, 0.7, 0.9).at_least == tuning.Measured(1, 1, 0.9, 0.7).at_least == 0.7


def test_what_is_measured_are_queries_that_were_not_tuned_with_and_it_decides(store, quick, monkeypatch):
    _, folder = store
    tuned, measured = [], []
    fewest, measure = efforts.fewest_proposals, tuning.measure

    def watched(search, truth, *rest):
        tuned.append(truth.own.tolist())
        return fewest(search, truth, *rest)

    def poor(search, truth, *rest, **options):
        measured.append(truth.own.tolist())
        return replace(measure(search, truth, *rest, **options), opponents_at_least=0.5)

    monkeypatch.setattr(efforts, "fewest_proposals", watched)
    monkeypatch.setattr(tuning, "measure", poor)
    with pytest.raises(RecallError, match=r"the best reaches at least 0\.5000"):
        evaluation.index(folder, recall=0.9, k=10, n_query=100)
    assert not set(tuned[0]) & set(measured[0])
    assert (len(tuned[0]), len(measured[0])) == (50, 50)


def test_a_larger_k_than_tuned_for_takes_more_proposals(store, quick):
    _, folder = store
    search = evaluation.index(folder, recall=0.9, k=10, n_query=100)
    assert search.effort(25).proposals == 3 * search.effort(10).proposals


@pytest.mark.slow
def test_what_is_measured_later_is_what_queries_do_then(store, quick):
    task, folder = store
    evaluation.index(folder, recall=0.95, k=10, n_query=100)
    gradindex.store.remove(folder, np.arange(0, 600, 2))
    gradindex.add(task, folder)
    _, found = evaluation.evaluate(folder, k=10, n_query=100)
    (by_index,) = [measured for name, measured in found.items() if name.startswith("index")]
    assert min(by_index.proponents, by_index.opponents) > 0.95


def test_an_open_retriever_sees_a_new_index(store, quick):
    task, folder = store
    retriever = gradindex.load(task, folder)
    assert retriever.search_note == "exact over all rows"
    evaluation.index(folder, recall=0.9, k=10, n_query=100)
    assert retriever.search_note.startswith("index flat of")
    assert gradindex.load(task, folder, use_index=False).search_note == "exact over all rows"


def test_threads_share_a_retriever(store):
    task, folder = store
    retriever = gradindex.load(task, folder)
    expected, wrong = retriever.proponents(range(20), k=5), []
    weights = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}

    def ask():
        for _ in range(3):
            hits = retriever.proponents(range(20), k=5)
            wrong.extend([] if np.array_equal(hits.ids, expected.ids) else [hits])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for name, tensor in task.model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


def test_real_queries_are_measured_against_exact_scores(store, quick):
    task, folder = store
    retriever = gradindex.load(task, folder)
    found = evaluation.index(folder, recall=0.9, k=10, n_query=40, retriever=retriever)
    assert found.index.about["recall"]["against"] == "against exact scores, the task's queries"
    with pytest.raises(ArgumentError, match="The task has no query data"):
        evaluation.index(folder, k=10, retriever=gradindex.load(replace(task, query=None), folder))


@pytest.mark.slow
def test_cosines_are_measured_against_cosines(made, tmp_path, quick):
    task, _ = made
    gradindex.build(task, tmp_path / "store", projection=Projection("none"), unit_norm=True, batch_size=50)
    retriever = gradindex.load(task, tmp_path / "store")
    exact = retriever.exact_scores(range(5))
    assert np.abs(exact).max() <= 1 + 1e-4
    hits = retriever.proponents(range(5), k=900)
    np.testing.assert_allclose(np.take_along_axis(exact, hits.ids, 1), hits.scores, atol=1e-4)
    found = evaluation.index(tmp_path / "store", recall=0.9, k=10, n_query=40, retriever=retriever)
    assert found.index.about["recall"]["proponents"] > 0.9


def test_impossible_promises_are_refused(store, quick):
    _, folder = store
    for options, message in (
        ({"recall": 1.0}, "recall is 1.0, but must be between 0 and 1"),
        ({"k": 0}, "k is 0"),
        ({"k": 601}, "k is 601"),
        ({"k": 600}, "k is 600, but must be from 1 to 599, because each training example is a query"),
        ({"device": "foo"}, "device is 'foo', but must be a device that PyTorch knows"),
        ({"n_query": 19, "k": 10}, "Only 19 of 19 queries have a top-10 without ties, but at least 20 are needed"),
    ):
        with pytest.raises(ArgumentError, match=message):
            evaluation.index(folder, **options)


@pytest.mark.slow
def test_the_command_line_makes_and_measures_an_index(store, quick):
    _, folder = store
    call = lambda *a: CliRunner().invoke(main, [str(x) for x in a])  # noqa: E731  # as short as a command
    result = call("index", folder, "--recall", 0.9, "-k", 10, "--queries", 100)
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1)
    assert result.stdout.startswith(f"{folder}: index flat of ")
    assert "index flat of" in call("info", folder).stdout
    measured = json.loads(call("evaluate", folder, "-k", 10, "--queries", 100, "--json").stdout)
    assert measured["against"] == "against exact scores, training examples as queries"
    names = [record["proposed by"] for record in measured["records"]]
    assert names[0].startswith("index, ")
    assert names[1:] == ["best 10 of all rows", "best 100 of all rows"]
    assert all(record["recall@10 proponents"] > 0.85 for record in measured["records"])
    (next((folder / "index").glob("*.faiss"))).write_bytes(b"")
    assert "search: damaged index: " in call("info", folder).stdout
    assert "rebuild the index: gradindex index" in call("verify", folder).stderr
    assert call("evaluate", folder, "--queries", 19).exit_code == 2
    broken = call("evaluate", folder)
    assert (broken.exit_code, "Rebuild the index: gradindex index" in broken.stderr) == (1, True)
    assert call("index", folder, "--drop").stdout == f"{folder}: exact over all rows\n"
    assert call("evaluate", folder).exit_code == 0


@pytest.mark.slow
def test_a_store_of_few_rows_is_measured_with_as_many_as_there_are(tmp_path):
    task = toys.make_task(tmp_path, n_train=60)
    gradindex.build(task, tmp_path / "store", projection=Projection(dim=15), factors="float32")
    call = lambda *a: CliRunner().invoke(main, [str(x) for x in a])  # noqa: E731  # as short as a command
    result = call("evaluate", tmp_path / "store")
    assert result.exit_code == 0 and "recall@59" in result.stdout
    result = call("index", tmp_path / "store", "--kind", "pq", "--recall", 0.2, "-k", 10)
    assert result.exit_code == 0, result.output  # an even number of its 15 numbers
    assert all(line.startswith("pq of ") for line in result.stderr.splitlines())  # FAISS warns of nothing


def test_truth_comes_in_pieces_of_queries_and_of_rows():
    generator = np.random.default_rng(0)
    rows, scores = np.eye(30, 40, dtype=np.float32), generator.standard_normal((30, 50)).astype(np.float32)
    pieces = [
        (slice(q, q + 15), np.arange(i, i + 5), scores[q : q + 15, i : i + 5]) for q in (0, 15) for i in range(0, 50, 5)
    ]
    truth = truth_of.truth_from(rows, pieces, np.full(30, 7), 3, "", 0)
    scores[:, 7] = np.nan
    for row, best in zip(truth.rows, truth.best[-1], strict=True):
        assert set(best) - {-1} == set(np.argsort(scores[row.argmax()])[:3])


@pytest.mark.slow
def test_more_lists_are_looked_into_where_that_answers_faster(store, monkeypatch):
    """Each proposal costs ten lists here: the fewest proposals win, not the fewest lists."""
    _, folder = store
    found = {}
    for cost, weight in (("proposals", 10), ("lists", 1e-3)):
        monkeypatch.setattr(
            efforts, "milliseconds",
            lambda s, c, t, e, k, sign=1, w=weight: 1e6 if e is None else w * e.proposals + e.probes,
        )  # fmt: skip
        found[cost] = evaluation.index(folder, recall=0.8, k=10, n_query=200, kind="ivf", dim=16).effort(10)
    assert found["proposals"].probes >= found["lists"].probes
    assert found["proposals"].proposals <= found["lists"].proposals
    assert found["proposals"] != found["lists"]


@pytest.mark.slow
def test_kind_and_numbers_can_be_chosen(store, quick):
    _, folder = store
    shape = evaluation.index(folder, recall=0.9, k=10, n_query=100, kind="ivf", dim=24).index.about["shape"]
    assert (shape["kind"], shape["dim"]) == ("ivf", 24)
    for options, message in (
        ({"kind": "hnsw"}, "kind is 'hnsw', but must be one of: flat, ivf, pq"),
        ({"dim": 0}, r"dim is 0, but must be from 1 to the numbers in a row, \d+"),
    ):
        with pytest.raises(ArgumentError, match=message):
            evaluation.index(folder, recall=0.9, k=10, n_query=100, **options)


def test_an_index_that_the_memory_cannot_hold_is_not_begun(store, quick, monkeypatch):
    _, folder = store
    n = 600
    monkeypatch.setattr(tuning, "available_bytes", lambda device: n * 2 * (32 + 8) // 2 + 1000)
    with pytest.raises(
        OutOfMemoryError, match=r"600 rows with 48 numbers .* GiB to build, .* fewer numbers: --dim (24|32)\."
    ):
        evaluation.index(folder, recall=0.9, k=10, n_query=100, dim=48)
    built = []
    build = CompactIndex.build.__func__
    monkeypatch.setattr(
        CompactIndex,
        "build",
        classmethod(lambda cls, shape, *rest: built.append(shape.dim) or build(cls, shape, *rest)),
    )
    evaluation.index(folder, recall=0.5, k=10, n_query=100)
    assert max(built) <= 32
    assert len(set(built)) == 2


def test_without_a_device_the_cpu_searches_and_says_so_once(store, quick, capsys):
    if faiss.get_num_gpus():
        pytest.skip("there is a CUDA device")
    gpu._say.cache_clear()
    _, folder = store
    opened = GradientStore(folder)
    queries = opened.rows(opened.ids[:5])
    expected = Candidates(opened).search(queries, 7)
    for _ in range(2):
        found = Candidates(opened, device="cuda").search(queries, 7)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    assert capsys.readouterr().err.count("FAISS sees no CUDA device, so rows are searched on the CPU") == 1


@pytest.mark.parametrize(
    ("n", "dim", "kind", "expected"),
    [
        (20_000, 3360, None, {"flat", "pq"}),
        (250_000, 3000, None, {"ivf", "pq", "spill"}),
        (1_281_167, 3000, None, {"ivf", "spill"}),
        (20_000, 200, None, {"flat"}),
        (20_000, 200, "pq", {"pq"}),
    ],
)
def test_what_is_tried_fits_the_number_of_rows(n, dim, kind, expected):
    tried = tuning._shapes(SimpleNamespace(n_train=n, dim=dim), kind, None)
    assert {shape.kind for shape in tried} == expected
    assert all(shape.dim >= 256 for shape in tried if shape.kind == "pq" and kind is None)
    assert all(shape.lists > 0 for shape in tried if shape.kind == "ivf")


def test_small_stores_are_searched_whole(store, monkeypatch):
    _, folder = store
    monkeypatch.setattr(trials.Trials, "run", lambda *_: pytest.fail("an index was made"))
    (folder / "index").mkdir()
    (folder / "index" / "manifest.json").write_text("of another time")
    assert evaluation.index(folder, recall=0.999, k=10, n_query=100).how == "exact over all rows"
    assert not (folder / "index").exists()


def test_what_reached_most_is_tried_last():
    def choice(milliseconds, at_least):
        return efforts.Choice(Shape("flat", 8), dict.fromkeys(efforts.SIGNS, Effort(1, 10)), milliseconds, at_least)

    choices = [choice(m, a) for m, a in ((5, 0.99), (1, 0.95), (9, 0.999), (2, 0.94), (3, 0.96), (8, 0.97), (4, 0.95))]
    assert [each.milliseconds for each in tuning._tries(choices)] == [1, 2, 3, 4, 5, 9]
    assert [each.milliseconds for each in tuning._tries(choices[:3])] == [1, 5, 9]


def test_what_cannot_reach_the_recall_is_not_made_and_what_it_would_reach_is_told(store, quick, monkeypatch, capsys):
    _, folder = store
    monkeypatch.setattr(CompactIndex, "build", lambda *_: pytest.fail("an index was made"))
    with pytest.raises(RecallError, match=r"all rows compared by 1 numbers each reach about (0\.\d+)\."):
        evaluation.index(folder, recall=0.999, k=10, n_query=100, kind="ivf", dim=1)
    assert "ivf of 1 numbers, 128 lists: left out, for all rows compared by so few numbers" in capsys.readouterr().err


def test_each_kind_of_answer_has_an_effort_of_its_own(store, quick):
    task, folder = store
    found = evaluation.index(folder, recall=0.9, k=10, n_query=100, kind="flat", dim=16)
    made = found.index
    del made.about["sha256"]
    own = {"proponents": {"probes": 1, "proposals": 30}, "opponents": {"probes": 1, "proposals": 60}}
    made.save(folder / "index", {"efforts": own, "effort": own["opponents"]})
    retriever = gradindex.load(task, folder)
    compared = {kind: retriever.search([0], 10, kind=kind).stages[0].rows for kind in ("proponents", "opponents")}
    assert compared == {"proponents": 30, "opponents": 60}
    both = retriever.search([0], 10, kind="absolute")
    assert both.stages[0].rows == 60
    del made.about["efforts"]  # as earlier versions did
    made.save(folder / "index", {})
    assert Candidates(GradientStore(folder)).effort(10) == Effort(1, 60)


def test_what_is_tuned_is_told_for_both_kinds(store, quick):
    _, folder = store
    about = evaluation.index(folder, recall=0.9, k=10, n_query=100).index.about
    assert about["efforts"].keys() == {"proponents", "opponents"}
    for name in ("probes", "proposals"):
        assert about["effort"][name] == max(effort[name] for effort in about["efforts"].values())


def test_lists_that_hold_enough_are_not_followed_by_a_look_at_all_rows(store, monkeypatch):
    _, folder = store
    opened = GradientStore(folder)
    rows = opened.rows(opened.ids)
    index = CompactIndex.build(Shape("ivf", 16, 16), rows, opened.blocks)
    search = Candidates(opened, index)
    monkeypatch.setattr(Candidates, "_all_rows", lambda *_: pytest.fail("all rows were compared"))
    _, ids = search.propose(rows[:5], 590, Effort(2, 590), least=5)
    assert (ids >= 0).sum(1).min() >= 5 and (ids < 0).any()
    scores, ids, _ = search.compared(rows[:5], 590, Effort(2, 589), least=5)
    assert (scores[ids < 0] == -np.inf).all() and (ids < 0).any()
    monkeypatch.undo()
    assert (search.propose(rows[:5], 590, Effort(2, 590))[1] >= 0).all()


def test_a_budget_ends_the_search_for_an_index(store, quick, monkeypatch, capsys):
    _, folder = store
    clock = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: clock[0])
    built, build = [], trials.build

    def slow(store, shape, *rest):
        clock[0] += 50
        built.append(shape)
        return build(store, shape, *rest)

    monkeypatch.setattr(trials, "build", slow)
    evaluation.index(folder, recall=0.5, k=10, n_query=100, budget=40)
    assert len(built) == 1
    held_out = tuning.held_out
    monkeypatch.setattr(tuning, "held_out", lambda *args: clock.__setitem__(0, clock[0] + 90) or held_out(*args))
    with pytest.raises(ArgumentError, match="budget is 60 s, but to find the true top-k .* took 90 s, .* 270 at least"):
        evaluation.index(folder, recall=0.5, k=10, n_query=100, budget=60)
    for options, message in (({"budget": -1}, "budget is -1"), ({"copies": 0}, "copies is 0")):
        with pytest.raises(ArgumentError, match=message):
            evaluation.index(folder, recall=0.5, k=10, **options)


def test_a_kind_that_lost_gets_no_more_than_a_third_of_the_fastest_ones_time():
    tried = object.__new__(trials.Trials)
    tried._until = np.inf
    tried.fastest = efforts.Choice(Shape("ivf", 16, 8), {}, 1.0, 1.0)
    for spent, enough in (({"ivf": 9.0, "pq": 2.9}, False), ({"ivf": 9.0, "pq": 3.1}, True), ({"ivf": 1.0}, False)):
        tried._spent = spent
        assert tried._enough(Shape("pq", 16)) is enough
        assert not tried._enough(Shape("ivf", 32, 8))


@pytest.mark.slow
def test_rows_in_several_lists_are_tuned_and_answer(store, quick):
    task, folder = store
    found = evaluation.index(folder, recall=0.9, k=10, n_query=200, kind="spill", dim=40, copies=2)
    assert found.index.shape == Shape("spill", 40, found.index.shape.lists, 2)
    retriever = gradindex.load(task, folder)
    assert "spill of 40 numbers" in retriever.search_note and "2 copies of a row" in retriever.search_note
    exact = gradindex.load(task, folder, use_index=False)
    for kind in ("proponents", "opponents"):
        mine, all_rows = (getattr(each, kind)(range(20), k=10).ids for each in (retriever, exact))
        assert toys.share(mine, all_rows) > 0.85
    tried = {shape["copies"] for shape in (choice["shape"] for choice in found.index.about["curve"])}
    assert tried == {2}


def test_floors_say_what_all_rows_compared_by_so_few_numbers_reach(store):
    _, folder = store
    opened = GradientStore(folder)
    rows = opened.rows(opened.ids)
    truth = truth_of.held_out(opened, 200, 10)
    found = floors.Floors(opened, rows, truth, [4, 16], 0)
    for dim in (4, 16):
        directions = floors.fitted_directions(rows, 16)[:, :dim]
        for kind, sign in efforts.SIGNS.items():
            scores = sign * (truth.rows @ directions) @ (rows @ directions).T
            best = opened.ids[np.argsort(-scores, axis=1)[:, :41]]
            reached = truth.recalls(sign, best, 40)
            assert found.recall(dim, kind, 40) == pytest.approx(reached.mean(), abs=0.06)
    needed = found.proposals(16, 0.9, [10, 20, 40, 400])
    assert needed and all(10 <= count <= 400 for count in needed.values())
    assert found.proposals(4, 1.5, [400]) is None


def test_floors_look_at_the_whole_of_a_store_that_is_in_the_order_of_its_classes(store, monkeypatch):
    """The sample is in the order of the ids: its first part alone would be of some classes alone."""
    _, folder = store
    opened = GradientStore(folder)
    rows = opened.rows(opened.ids)
    order = np.argsort(rows @ floors.fitted_directions(rows, 1)[:, 0])  # by what tells most of them apart
    truth = truth_of.held_out(opened, 200, 10)
    monkeypatch.setattr(floors, "_ROWS", 150)
    found, alone = floors.Floors(opened, rows[order], truth, [16], 0), floors.Floors(opened, rows, truth, [16], 0)
    for kind in efforts.SIGNS:
        assert found.recall(16, kind, 20) == pytest.approx(alone.recall(16, kind, 20), abs=0.05)


def test_the_last_step_looks_into_all_lists():
    assert Shape("spill", 16, 44, 2).method.probes == [1, 2, 4, 8, 16, 32, 44]
    assert Shape("ivf", 16, 32).method.probes == [1, 2, 4, 8, 16, 32]
    assert Shape("flat", 16).method.probes == [1]
