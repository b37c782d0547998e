"""A store that goes on: what is added, removed, compacted or merged answers as a fresh build would."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from growing import OPTIONS, first, held, let_go, only, snapshot, word

import gradindex
from gradindex.errors import ArgumentError, MismatchError, StoreError
from gradindex.projection import Projection
from gradindex.store import GradientStore, runs


def assert_answers_as_a_fresh_build(store, task, ids, tmp_path, **options):
    """Same ids, scores to 1e-6 of the product of the norms, both signs, estimates and exact scores."""
    fresh = gradindex.build(only(task, ids), tmp_path / f"fresh-{time.monotonic_ns()}", **(OPTIONS | options))
    assert store.ids.tolist() == list(ids)
    assert store.verify() == []
    assert store.column("word").tolist() == [word(i) for i in ids]
    np.testing.assert_allclose(store.self_influence(), fresh.self_influence(), rtol=1e-6)
    now, then = gradindex.load(task, store.folder), gradindex.load(only(task, ids), fresh.folder)
    norms = np.sqrt(fresh.self_influence().sum(1).max()) * np.linalg.norm(fresh.rows(fresh.ids), axis=1).max()
    for kind in ("proponents", "opponents"):
        for rerank in ("none", "exact"):
            mine, theirs = (getattr(r, kind)(range(4), k=len(ids), rerank=rerank) for r in (now, then))
            np.testing.assert_array_equal(mine.ids, np.asarray(ids)[theirs.ids])
            np.testing.assert_allclose(mine.scores, theirs.scores, atol=1e-6 * norms)
            assert mine.columns["word"].tolist() == theirs.columns["word"].tolist()


@pytest.mark.slow
def test_added_examples_answer_as_if_they_had_always_been_there(task, tmp_path):
    store = gradindex.build(first(task, 12), tmp_path / "store", **OPTIONS)
    before = {path: path.read_bytes() for path in (store.folder / "shards").iterdir()}
    grown = gradindex.add(task, store.folder)
    assert (grown.n_train, grown.manifest.next_id, grown.manifest.generation) == (30, 30, 2)
    assert {path: path.read_bytes() for path in before} == before
    assert_answers_as_a_fresh_build(grown, task, range(30), tmp_path)
    again = snapshot(store.folder)
    gradindex.add(task, store.folder)
    assert snapshot(store.folder) == again


def test_a_store_answers_for_a_task_that_has_grown_and_says_what_it_lacks(task, tmp_path):
    store = gradindex.build(first(task, 12), tmp_path / "store", **OPTIONS)
    retriever = gradindex.load(task, store.folder)
    assert retriever.unseen == 18
    assert retriever.proponents(0, k=12).ids.max() == 11
    with pytest.raises(MismatchError, match=r"\(12 stored, 30 now\) differ.*To add training examples: gradindex add"):
        gradindex.build(task, store.folder, **OPTIONS)


@pytest.mark.slow
def test_removed_examples_are_in_no_answer_at_once(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    gone = [0, 5, 6, 7, 13, 29]
    left = [i for i in range(30) if i not in gone]
    removed = gradindex.store.remove(store.folder, np.array(gone))
    assert_answers_as_a_fresh_build(removed, task, left, tmp_path)
    assert removed.top_self_influence(24)[0].tolist() == [left[i] for i in np.argsort(-removed.self_influence().sum(1))]
    for ask in (removed.rows, removed.losses, lambda ids: removed.column("word", ids)):
        with pytest.raises(ArgumentError, match="Training example 5 was removed from"):
            ask(np.array([4, 5]))
    with pytest.raises(ArgumentError, match="k is 25, but must be between 1 and the number of training examples, 24"):
        gradindex.load(task, store.folder).proponents(0, k=25)
    assert gradindex.store.remove(store.folder, np.array([5, 8])).n_train == 23  # one of them was gone before
    with pytest.raises(ArgumentError, match="There is no training id 30"):
        gradindex.store.remove(store.folder, np.array([30]))
    with pytest.raises(ArgumentError, match="No training example would be left"):
        gradindex.store.remove(store.folder, np.arange(30))


@pytest.mark.slow
def test_compacting_frees_room_and_changes_no_answer(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    gone = [*range(4, 8), 9, 10, 11, 13, 14, 21, 29]
    left = [i for i in range(30) if i not in gone]
    gradindex.store.remove(store.folder, np.array(gone))
    rows = gradindex.GradientStore(store.folder).rows(np.array(left))
    compacted = gradindex.store.compact(store.folder)
    assert sum(entry.rows for entry in compacted.manifest.shards) == 19
    assert compacted.manifest.removed == []
    assert [entry.name[:4] for entry in compacted.manifest.shards].count("0001") == 3  # 0-3, 16-19, 24-27 stay
    np.testing.assert_array_equal(compacted.rows(np.array(left)), rows)
    assert_answers_as_a_fresh_build(compacted, task, left, tmp_path)
    again = snapshot(store.folder)
    gradindex.store.compact(store.folder)
    assert snapshot(store.folder) == again


@pytest.mark.slow
def test_ids_are_never_used_again(task, tmp_path):
    store = gradindex.build(first(task, 12), tmp_path / "store", **OPTIONS)
    gradindex.store.remove(store.folder, np.array([10, 11]))
    gradindex.store.compact(store.folder)
    grown = gradindex.add(task, store.folder)
    assert_answers_as_a_fresh_build(grown, task, [*range(10), *range(12, 30)], tmp_path)


@pytest.mark.slow
def test_small_shards_of_many_additions_are_joined(task, tmp_path):
    gradindex.build(first(task, 4), tmp_path / "store", **OPTIONS)
    for n in range(5, 13):
        gradindex.add(first(task, n), tmp_path / "store")
    assert len(gradindex.GradientStore(tmp_path / "store").manifest.shards) == 9
    compacted = gradindex.store.compact(tmp_path / "store")
    assert [entry.rows for entry in compacted.manifest.shards] == [4, 4, 4]
    assert_answers_as_a_fresh_build(compacted, first(task, 12), range(12), tmp_path)


@pytest.mark.slow
def test_stores_built_apart_are_merged(task, tmp_path):
    names = ["a", "b", "c"]
    for name, part in zip(names, (range(10), range(10, 16), range(16, 30)), strict=True):
        gradindex.build(only(task, part), tmp_path / name, **OPTIONS)
    gradindex.store.remove(tmp_path / "b", np.array([2]))
    untouched = snapshot(tmp_path / "b"), snapshot(tmp_path / "c")
    with pytest.raises(ArgumentError, match="Ids of . and . collide: .* has 0, .* Give an offset, such as 10"):
        gradindex.store.merge(tmp_path / "a", [tmp_path / "b", tmp_path / "c"])
    merged = gradindex.store.merge(tmp_path / "a", [tmp_path / "b", tmp_path / "c"], offset=10)
    assert_answers_as_a_fresh_build(merged, task, [i for i in range(30) if i != 12], tmp_path)
    assert merged.manifest.next_id == 30
    assert (snapshot(tmp_path / "b"), snapshot(tmp_path / "c")) == untouched


@pytest.mark.slow
def test_ids_that_are_apart_are_merged_as_they_are(task, tmp_path):
    gradindex.build(first(task, 12), tmp_path / "a", **OPTIONS)
    gradindex.build(task, tmp_path / "b", **OPTIONS)
    gradindex.store.remove(tmp_path / "b", np.arange(12))
    merged = gradindex.store.merge(tmp_path / "a", [tmp_path / "b"])
    assert_answers_as_a_fresh_build(merged, task, range(30), tmp_path)


@pytest.mark.slow
def test_what_cannot_be_merged_is_refused_with_what_differs(task, tmp_path):
    gradindex.build(first(task, 12), tmp_path / "a", **OPTIONS)
    others = {
        "projection": {"projection": Projection(dim=9)},
        "precision": {"precision": "float64"},
        "row type": {"row_type": "float16"},
        "factors": {"factors": "float32"},
    }
    before = snapshot(tmp_path / "a")
    for words, options in others.items():
        other = tmp_path / words.replace(" ", "")
        gradindex.build(first(task, 12), other, **(OPTIONS | options))
        with pytest.raises(MismatchError, match=f"cannot be merged into .*: {words} differ"):
            gradindex.store.merge(tmp_path / "a", [other], offset=12)
    with pytest.raises(ArgumentError, match="named twice"):
        gradindex.store.merge(tmp_path / "a", [tmp_path / "a"], offset=12)
    with pytest.raises(ArgumentError, match="offset is -1"):
        gradindex.store.merge(tmp_path / "a", [tmp_path / "projection"], offset=-1)
    assert snapshot(tmp_path / "a") == before


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, {"unit_norm": True}, {"projection": Projection("fitted", 12)}, {"factors": "float32"}, {"row_type": "bfloat16"},
], ids=str)  # fmt: skip
def test_a_checkpoint_is_added_without_computing_the_others(task, tmp_path, options):
    earlier = replace(task, checkpoints=task.checkpoints[:2])
    gradindex.build(earlier, tmp_path / "store", **(OPTIONS | options))
    gradindex.store.remove(tmp_path / "store", np.array([3, 4, 29]))
    longer = gradindex.growth.add_checkpoint(task, tmp_path / "store")
    assert (longer.n_checkpoints, longer.manifest.removed) == (3, [])
    whole = gradindex.build(task, tmp_path / "whole", **(OPTIONS | options))
    tolerance = 1e-2 if "row_type" in options else 1e-5
    np.testing.assert_allclose(longer.rows(longer.ids), whole.rows(longer.ids), rtol=tolerance, atol=1e-6)
    np.testing.assert_allclose(longer.self_influence(), whole.self_influence(longer.ids), rtol=1e-6)
    gradindex.store.remove(whole.folder, np.array([3, 4, 29]))
    hits = [gradindex.load(task, store.folder).proponents(0, k=27) for store in (longer, whole)]
    np.testing.assert_array_equal(hits[0].ids, hits[1].ids)
    np.testing.assert_allclose(hits[0].scores, hits[1].scores, rtol=1e-5)
    assert sorted(hits[0].ids[0]) == [i for i in range(30) if i not in (3, 4, 29)]


@pytest.mark.slow
def test_only_the_new_checkpoint_is_computed(task, tmp_path, monkeypatch):
    gradindex.build(replace(task, checkpoints=task.checkpoints[:2]), tmp_path / "store", **OPTIONS)
    run, passes = gradindex.gradients.Engine.run, []

    def counted(self, checkpoint, items, *args, **kwargs):
        passes.extend([self.task.checkpoints[checkpoint].step] * len(items))
        return run(self, checkpoint, items, *args, **kwargs)

    monkeypatch.setattr(gradindex.gradients.Engine, "run", counted)
    gradindex.growth.add_checkpoint(task, tmp_path / "store")
    assert set(passes) == {2}
    assert 30 <= len(passes) <= 30 + 3 * 8  # each example, and spot checks of three in each of eight shards


CHANGES = {
    "add": (lambda task, store: gradindex.add(replace(task, checkpoints=task.checkpoints[:2]), store), "checkpoints"),
    "add of other data": (
        lambda task, store: gradindex.add(replace(task, train=list(task.train)[::-1]), store),
        "data",
    ),
    "add without columns": (lambda task, store: gradindex.add(replace(task, columns={}), store), "columns"),
    "fewer": (lambda task, store: gradindex.add(first(task, 5), store), r"data length \(12 stored, 5 now\)"),
    "checkpoint": (
        lambda task, store: gradindex.growth.add_checkpoint(replace(task, checkpoints=task.checkpoints[::-1]), store),
        "checkpoints",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANGES)
def test_a_task_that_is_not_the_stores_changes_nothing(task, tmp_path, case):
    gradindex.build(first(task, 12), tmp_path / "store", **OPTIONS)
    before = snapshot(tmp_path / "store")
    change, message = CHANGES[case]
    with pytest.raises(MismatchError, match=f"{message}.*differ"):
        change(task, tmp_path / "store")
    assert snapshot(tmp_path / "store") == before


@pytest.fixture
def broken(monkeypatch):
    """What to call to have the computation of example 22 fail, or not."""
    blocks = gradindex.rows.RowMaker.blocks

    def failing(self, examples, checkpoints):
        if 22 in examples.ids:
            raise OSError("the network drive is gone")
        return blocks(self, examples, checkpoints)

    return lambda yes: monkeypatch.setattr(gradindex.rows.RowMaker, "blocks", failing if yes else blocks)


@pytest.mark.slow
def test_an_interrupted_addition_leaves_the_store_as_it_was_and_goes_on(task, tmp_path, broken, capsys):
    store = gradindex.build(first(task, 12), tmp_path / "store", **OPTIONS)
    whole = gradindex.build(first(task, 12), tmp_path / "whole", **OPTIONS)
    gradindex.add(task, whole.folder)
    hits = gradindex.load(task, store.folder).proponents(range(4), k=12)
    broken(True)
    with pytest.raises(OSError, match="network drive"):
        gradindex.add(task, store.folder)
    np.testing.assert_array_equal(gradindex.load(task, store.folder).proponents(range(4), k=12).ids, hits.ids)
    for change in (
        lambda: gradindex.store.remove(store.folder, np.array([1])),
        lambda: gradindex.store.compact(store.folder),
        lambda: gradindex.growth.add_checkpoint(task, store.folder),
    ):
        with pytest.raises(StoreError, match="has an unfinished `add`. Rerun the same command to finish it"):
            change()
    with pytest.raises(MismatchError, match=r"unfinished `add` of other data: data length \(30 then, 28 now\) differ"):
        gradindex.add(first(task, 28), store.folder)
    broken(False)
    capsys.readouterr()
    gradindex.add(task, store.folder)
    assert capsys.readouterr().err == f"{store.folder}: resuming, 8 of 18 rows are done\n"
    kept = {p.name: p.read_bytes() for p in (store.folder / "shards").iterdir()}
    assert kept == {p.name: p.read_bytes() for p in (whole.folder / "shards").iterdir()}


def test_a_change_can_be_given_up(task, tmp_path, broken):
    store = gradindex.build(first(task, 12), tmp_path / "store", **OPTIONS)
    broken(True)
    with pytest.raises(OSError, match="network drive"):
        gradindex.add(task, store.folder)
    (store.folder / "pending.json").unlink()
    assert gradindex.store.remove(store.folder, np.array([1])).n_train == 11
    assert len(list((store.folder / "shards").glob("*.h5"))) == 3  # shards of the given-up change are gone


@pytest.mark.slow
def test_parts_by_several_processes_are_one_build(task, tmp_path):
    whole = gradindex.build(task, tmp_path / "whole", **OPTIONS)
    for part in ((2, 3), (3, 3)):
        gradindex.building.build_part(task, tmp_path / "parts", part, **OPTIONS)
    with pytest.raises(StoreError, match=r"has not finished: 3 of 8 shards are missing, the first is 0001-00000"):
        gradindex.store.seal(tmp_path / "parts")
    with pytest.raises(StoreError, match=r"has not finished \(5 of 8 shards\).*gradindex seal"):
        gradindex.GradientStore(tmp_path / "parts")
    gradindex.building.build_part(task, tmp_path / "parts", (1, 3), **OPTIONS)
    store = gradindex.store.seal(tmp_path / "parts")
    for folder in (whole.folder, store.folder):
        for path in [*folder.glob("lock*"), folder / "log.jsonl"]:
            path.unlink()
    assert [p.read_bytes() for p in sorted(store.folder.rglob("*.*"))] == [
        p.read_bytes() for p in sorted(whole.folder.rglob("*.*"))
    ]
    for part in ((0, 3), (4, 3)):
        with pytest.raises(ArgumentError, match=f"part is {part[0]}/3, but must be from 1/3 to 3/3"):
            gradindex.building.build_part(task, tmp_path / "parts", part, **OPTIONS)


@pytest.mark.slow
def test_two_builders_are_kept_apart_and_a_dead_one_blocks_nobody(task, tmp_path):
    process = held(tmp_path / "store")
    with pytest.raises(StoreError, match=rf"store is being written by process {process.pid} on .*Wait until it ends"):
        gradindex.build(task, tmp_path / "store", **OPTIONS)
    let_go(process, lambda p: p.kill())
    assert gradindex.build(task, tmp_path / "store", **OPTIONS).n_train == 30


@pytest.mark.slow
def test_parts_run_side_by_side_but_not_twice_nor_beside_a_change(task, tmp_path):
    process = held(tmp_path / "store", (1, 2))
    gradindex.building.build_part(task, tmp_path / "store", (2, 2), **OPTIONS)
    for action in (
        lambda: gradindex.building.build_part(task, tmp_path / "store", (1, 2), **OPTIONS),
        lambda: gradindex.build(task, tmp_path / "store", **OPTIONS),
    ):
        with pytest.raises(StoreError, match="is being written by"):
            action()
    let_go(process, lambda p: p.stdin.close())
    gradindex.building.build_part(task, tmp_path / "store", (1, 2), **OPTIONS)
    assert gradindex.store.seal(tmp_path / "store").n_train == 30


@pytest.mark.slow
def test_a_reader_of_a_store_that_went_on_without_its_shards_is_told_to_open_it_again(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    early = gradindex.GradientStore(store.folder)
    rows = early.rows(np.array([0, 1]))  # this shard stays mapped
    gradindex.store.remove(store.folder, np.array([2, 9]))
    gradindex.store.compact(store.folder)
    np.testing.assert_array_equal(early.rows(np.array([0, 1])), rows)
    with pytest.raises(StoreError, match=r"store has changed since it was opened. Open it again"):
        early.rows(np.array([8]))


@pytest.mark.slow
def test_many_threads_read_one_store(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    expected, wrong = store.rows(np.arange(30)), []
    store = gradindex.GradientStore(store.folder)

    def read(seed):
        generator = np.random.default_rng(seed)
        for _ in range(50):
            ids = generator.integers(0, 30, 7)
            if not np.array_equal(store.rows(ids), expected[ids]):
                wrong.append(ids)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.slow
def test_a_store_of_more_shards_than_files_may_be_open_is_read(task, tmp_path):
    gradindex.build(task, tmp_path / "store", **(OPTIONS | {"batch_size": 1, "shard_rows": 1}))
    code = f"""
import resource
import numpy as np
from gradindex.store import GradientStore, shards
store = GradientStore({str(tmp_path / "store")!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
assert store.rows(np.arange(30)[::-1]).shape == (30, 24)
from gradindex.errors import StoreError
files = []
try:
    while True: files.append(open("/dev/null"))
except OSError: pass
old, store = store, GradientStore.__new__(GradientStore)
files.pop()
store.__init__({str(tmp_path / "store")!r})
files.append(open("/dev/null"))
try: store.rows(np.arange(3))
except StoreError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is at its limit of open files (12). Close some, or raise the limit with `ulimit -n`" in done.stdout


def test_runs_are_sets_of_ids():
    ids = np.array([0, 1, 2, 5, 9, 10])
    assert runs.to_runs(ids).tolist() == [[0, 3], [5, 6], [9, 11]]
    np.testing.assert_array_equal(runs.to_ids(runs.to_runs(ids)), ids)
    assert runs.count([[0, 3], [5, 6]]) == 4
    assert runs.contain([[0, 3], [5, 6]], np.array([[-1, 0], [2, 3], [5, 6]])).tolist() == [
        [False, True], [True, False], [True, False]
    ]  # fmt: skip
    assert runs.without([[0, 3], [5, 9]], [[1, 2], [4, 6], [8, 20]]).tolist() == [[0, 1], [2, 3], [6, 8]]
    assert runs.without([[0, 3], [3, 9]], []).tolist() == [[0, 9]]
    assert runs.without([[0, 3]], [[0, 9]]).tolist() == []
    assert runs.to_runs(np.array([], dtype=np.int64)).tolist() == []
    generator = np.random.default_rng(0)
    for _ in range(200):
        a, b = (np.unique(generator.integers(0, 40, generator.integers(0, 30))) for _ in range(2))
        left = runs.without(runs.to_runs(a), runs.to_runs(b))
        np.testing.assert_array_equal(runs.to_ids(left), np.setdiff1d(a, b))
        np.testing.assert_array_equal(runs.contain(runs.to_runs(a), b), np.isin(b, a))


def test_the_log_tells_how_long_it_took_and_a_torn_line_harms_nothing(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    with (store.folder / "log.jsonl").open("a") as log:
        log.write('{"job": "build", "sha')
    lines = (store.folder / "log.jsonl").read_text().splitlines()[:8]
    spent = gradindex.store.overview(store.folder).seconds
    assert spent == pytest.approx(sum(json.loads(line)["seconds"] for line in lines))
    assert isinstance(GradientStore(store.folder), GradientStore)
    assert Path(store.folder / "lock").read_text() == ""
