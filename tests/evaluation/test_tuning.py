"""An index keeps the recall that it promises, and follows its store."""

import json
import threading
from dataclasses import replace

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
from gradindex.errors import ArgumentError, RecallError
from gradindex.evaluation import efforts, trials, tuning
from gradindex.index import CompactIndex, Shape, gpu
from gradindex.index.kinds import base
from gradindex.projection import Projection
from gradindex.retrieval.candidates import Candidates, Effort
from gradindex.store import GradientStore


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


def test_small_stores_are_searched_whole(store, monkeypatch):
    _, folder = store
    monkeypatch.setattr(trials.Trials, "run", lambda *_: pytest.fail("an index was made"))
    (folder / "index").mkdir()
    (folder / "index" / "manifest.json").write_text("of another time")
    assert evaluation.index(folder, recall=0.999, k=10, n_query=100).how == "exact over all rows"
    assert not (folder / "index").exists()


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
