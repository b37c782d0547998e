"""A store touches only its own files, whoever else's lie beside them, and knows its own rows again."""

import json
import shutil
import threading
from dataclasses import replace

import faulty
import numpy as np
import pytest
import toys
from click.testing import CliRunner
from torch.utils.data import Subset, TensorDataset

import gradindex
from gradindex.cli import main
from gradindex.errors import StoreChangedError, StoreError
from gradindex.evaluation.tuning import drop
from gradindex.examples import RowBatch
from gradindex.projection import Projection
from gradindex.retrieval.candidates import Candidates
from gradindex.store import GradientStore, Job, PlannedShard, claimed, overview, upkeep

OPTIONS = {"projection": Projection(dim=16), "batch_size": 10, "shard_rows": 20}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    columns = {"word": [f"w{i}" for i in range(60)]}
    return toys.make_task(tmp_path_factory.mktemp("task"), n_train=60, columns=columns, rates=(0.3, 0.1))


def first(task, count):
    columns = {name: values[:count] for name, values in task.columns.items()}
    return replace(task, train=Subset(task.train, range(count)), columns=columns)


def of_other_data(task):
    x, y = task.train.tensors
    return replace(task, train=TensorDataset(x.flip(0) * 2, y.flip(0)))


@pytest.fixture
def folder(task, tmp_path):
    """A store of 40 examples in two shards."""
    gradindex.build(first(task, 40), tmp_path / "store", **OPTIONS)
    return tmp_path / "store"


@pytest.fixture
def copy_of(folder, tmp_path):
    def copied(name):
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name

    return copied


FOREIGN = [
    "bases-notes.txt", "lock", "index/manifest.json", "index/notes.txt", "manifest.json.tmp-mine", "log.jsonl",
    "pending.json.tmp-host-me", "shards/photo.png", "shards/0001-00000.h5.tmp-mine", "lock-of-mine", "notes.txt",
    "lock-1-of-2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_anothers_file_is_refused_and_left_as_it_is(task, tmp_path, name):
    place = tmp_path / "mine"
    (place / name).parent.mkdir(parents=True)
    (place / name).write_text("what a person wrote\n")
    before = faulty.lasting(tmp_path)
    with pytest.raises(StoreError, match=r"is not empty and holds no gradindex store. Choose another folder"):
        gradindex.build(task, place, **OPTIONS)
    assert faulty.lasting(tmp_path) == before
    assert (place / name).read_text() == "what a person wrote\n"
    assert [path.name for path in place.iterdir()] == [name.split("/")[0]]


def test_anothers_files_in_a_store_outlive_every_change(task, folder):
    theirs = [name for name in FOREIGN if not name.startswith("lock-1") and name not in ("lock", "log.jsonl")]
    faulty.make_index(folder)
    theirs.remove("index/manifest.json")
    for name in theirs:
        (folder / name).write_text(f"mine: {name}")
    gradindex.store.remove(folder, [3])
    gradindex.store.compact(folder)
    gradindex.add(task, folder)
    faulty.make_index(folder)
    drop(folder)
    assert {name: (folder / name).read_text() for name in theirs} == {name: f"mine: {name}" for name in theirs}
    assert GradientStore(folder).verify() == []


def test_a_lock_that_is_anothers_file_is_not_written_to(folder):
    (folder / "lock").write_text("the combination is 1234")
    with pytest.raises(StoreError, match=r"lock is no lock of a store, but another file"):
        gradindex.store.remove(folder, [3])
    assert (folder / "lock").read_text() == "the combination is 1234"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lock", "log.jsonl", "lock-plan"])
def test_a_link_in_place_of_a_file_that_is_written_to_reaches_nobody(task, folder, tmp_path, name):
    theirs = tmp_path / "theirs"
    theirs.write_text("")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(theirs)
    if name == "log.jsonl":  # on which nothing depends
        gradindex.add(task, folder)
    else:
        with pytest.raises(
            StoreError, match=rf"{name}.* cannot be written: it is a link|cannot be written: it is a link"
        ):
            gradindex.add(task, folder)
    assert theirs.read_text() == ""
    assert GradientStore(folder).verify() == []


@pytest.mark.parametrize("name", ["shards", "index"])
def test_a_link_in_place_of_a_folder_reaches_nobody(task, folder, tmp_path, name):
    faulty.make_index(folder)
    theirs = tmp_path / "theirs"
    (folder / name).rename(theirs)
    (theirs / "0009-00000.h5").write_text("mine")
    (folder / name).symlink_to(theirs)
    before = faulty.lasting(theirs)
    for change in (
        lambda: gradindex.store.remove(folder, [3]),
        lambda: gradindex.add(task, folder),
        lambda: drop(folder),
    ):
        with pytest.raises(StoreError, match=rf"{name} is a link, but a store only changes files in its own folder"):
            change()
    assert faulty.lasting(theirs) == before
    assert GradientStore(folder).verify() == []  # it can be read


def test_shards_of_a_newer_manifest_survive_an_older_one(task, folder, copy_of):
    manifest = (folder / "manifest.json").read_bytes()
    older = copy_of("older")
    gradindex.store.remove(folder, [3, 25])
    gradindex.store.compact(folder)
    newest, newer = (folder / "manifest.json").read_bytes(), faulty.fingerprint(folder)
    shutil.copytree(older / "shards", folder / "shards", dirs_exist_ok=True)
    (folder / "manifest.json").write_bytes(manifest)
    assert any("belong to no rows" in line for line in overview(folder).health)
    gradindex.add(task, folder)  # numbers its shards anew
    gradindex.store.remove(folder, [5])
    gradindex.store.compact(folder)
    assert GradientStore(folder).verify() == []
    (folder / "manifest.json").write_bytes(newest)
    assert faulty.fingerprint(folder) == newer


def ones(count):
    return RowBatch(np.ones((count, 32), np.float32), np.ones((count, 2)), np.ones((count, 2)), {})


def test_shards_of_a_change_that_was_given_up_are_not_taken_for_anothers(task, folder):
    """Of the same ids and the same map, but other data."""
    with upkeep.changing(folder, "add") as store:
        after = replace(upkeep.kept(store), next_id=60)
        plan = [PlannedShard([[40, 60]])]
        job = Job.begin(folder, "add", after, "other", plan, store.manifest.shards)
        with job.shard(job.plan[0], {"word": np.array(["x"] * 20)}, []) as writer:
            writer.append(ones(20))
    (folder / "pending.json").unlink()
    store = gradindex.add(task, folder)
    assert not (store.rows(np.arange(40, 60)) == 1).all()
    assert store.verify() == []
    assert len(list((folder / "shards").glob("*.h5"))) == 3
    assert not (folder / "unfinished.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 19, 21])
def test_a_shard_that_got_fewer_or_more_rows_than_ids_is_never_sealed(folder, rows):
    with upkeep.changing(folder, "add") as store:
        after = replace(upkeep.kept(store), next_id=60)
        job = Job.begin(folder, "add", after, "other", [PlannedShard([[40, 60]])], store.manifest.shards)
        with (
            pytest.raises(StoreError, match=rf"has got {rows}"),
            job.shard(job.plan[0], {"word": np.array(["x"] * 20)}, []) as writer,
        ):
            writer.append(ones(rows))
        with pytest.raises(StoreError, match="1 of 1 shards are missing"):
            job.finish()
    assert len(list((folder / "shards").iterdir())) == 4


def test_an_array_that_is_left_out_is_never_sealed(folder):
    with upkeep.changing(folder, "add") as store:
        after = replace(upkeep.kept(store), next_id=60)
        job = Job.begin(folder, "add", after, "other", [PlannedShard([[40, 60]])], store.manifest.shards)
        with (
            pytest.raises(StoreError, match="has got 0 of 20 losses"),
            job.shard(job.plan[0], {"word": np.array(["x"] * 20)}, []) as writer,
        ):
            writer.raw.put("rows", 0, np.ones((20, 32), np.float32))
            writer.raw.put("self_influence", 0, np.ones((20, 2)))


def used(folder):
    """Whether the index is used, how many rows it lacks, and how many of its rows are gone."""
    found = Candidates(GradientStore(folder))
    assert found.stale == ("stale" in found.how and "gradindex index" in found.how)
    return not found.stale, found.newer, 0 if found.index is None else len(found._gone.ids)


def test_an_index_follows_what_becomes_of_its_rows(task, folder, tmp_path):
    faulty.make_index(folder)
    assert used(folder) == (True, 0, 0)
    gradindex.store.remove(folder, [3, 4, 25])
    assert used(folder) == (True, 0, 3)
    gradindex.store.compact(folder)
    assert used(folder) == (True, 0, 3)
    gradindex.add(task, folder)
    assert used(folder) == (True, 20, 3)
    gradindex.store.remove(folder, [50])
    gradindex.store.compact(folder)
    gradindex.store.compact(folder)
    assert used(folder) == (True, 19, 3)
    gradindex.build(first(task, 20), tmp_path / "other", **OPTIONS)
    gradindex.store.merge(folder, tmp_path / "other", offset=100)
    assert used(folder) == (True, 39, 3)
    path = sorted((folder / "shards").glob("*.h5"))[-1]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StoreError):
        GradientStore(folder).rows(GradientStore(folder).ids)


def test_an_index_knows_repaired_rows_again(task, folder):
    faulty.make_index(folder)
    path = sorted((folder / "shards").glob("*.h5"))[0]
    path.write_bytes(path.read_bytes()[:-9])
    assert "recomputed" in gradindex.growth.repair(first(task, 40), folder)[0]
    assert used(folder) == (True, 0, 0)


@pytest.mark.slow
def test_an_index_of_other_data_is_stale(task, folder, copy_of, tmp_path):
    # Built anew in the same folder.
    faulty.make_index(folder)
    gradindex.build(first(of_other_data(task), 40), tmp_path / "other", **OPTIONS)
    shutil.copytree(folder / "index", tmp_path / "other" / "index")
    assert used(tmp_path / "other") == (False, 0, 0)
    # Put back to an older state, then gone another way; compacted, so that both are in one shard.
    older = copy_of("older")
    gradindex.add(task, folder)
    faulty.make_index(folder)
    shutil.rmtree(older / "index")
    shutil.copytree(folder / "index", older / "index")
    assert used(older) == (True, 0, 20)
    x, y = task.train.tensors
    changed = x.clone()
    changed[40:] *= 3
    gradindex.add(replace(task, train=TensorDataset(changed, y)), older)
    assert used(older) == (False, 0, 0)
    gradindex.store.remove(older, [3, 25, 41])
    gradindex.store.compact(older)
    assert used(older) == (False, 0, 0)
    found = Candidates(GradientStore(older))
    store = found._store
    rows = store.rows(store.ids)
    best = np.argsort(-(rows[:3] @ rows.T), axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(found.search(rows[:3], 5)[1], store.ids[best])


def test_an_index_that_names_no_shards_is_stale(folder):
    faulty.make_index(folder)
    path = folder / "index" / "manifest.json"
    about = json.loads(path.read_text())
    del about["covers"]
    path.write_text(json.dumps(faulty.with_checksum(about)))
    assert used(folder) == (False, 0, 0)


def test_a_plan_goes_when_its_change_has_ended(task, folder, monkeypatch):
    """Also where the process was killed just after the manifest took its place."""
    monkeypatch.setattr(gradindex.store.job, "clean", lambda _: None)
    gradindex.store.remove(folder, [3])
    gradindex.store.compact(folder)
    monkeypatch.undo()
    assert (folder / "pending.json").exists()
    assert len(list((folder / "shards").glob("*.h5"))) == 3
    gradindex.store.seal(folder)
    assert not (folder / "pending.json").exists()
    assert len(list((folder / "shards").glob("*.h5"))) == 2
    assert GradientStore(folder).verify() == []


def test_a_build_takes_its_plan_away_when_it_is_given_again(task, tmp_path, monkeypatch):
    monkeypatch.setattr(gradindex.store.job, "clean", lambda _: None)
    gradindex.build(task, tmp_path / "store", **OPTIONS)
    monkeypatch.undo()
    assert (tmp_path / "store" / "pending.json").exists()
    gradindex.build(task, tmp_path / "store", **OPTIONS)
    assert not (tmp_path / "store" / "pending.json").exists()


@pytest.mark.slow
def test_queries_meet_changes_and_answer_of_one_state(task, folder, faults):
    """While another removes and compacts: every answer holds the rows of one of the states, and none is an error."""
    gradindex.add(task, folder)
    states, done = [frozenset(range(60))], threading.Event()

    def changes():
        try:
            for number in range(6, 46, 2):
                states.append(states[-1] - {number, number + 1})
                gradindex.store.remove(folder, [number, number + 1])
                gradindex.store.compact(folder)
        finally:
            done.set()

    asked = gradindex.load(task, folder)
    queries = asked.prepare([0, 1])
    thread = threading.Thread(target=changes)
    thread.start()
    numbers, answers = faults("queries during changes", 1_000_000), []
    for number in numbers:
        if number % 3 == 0:
            found = asked.search(queries, at_least=-1e9, rerank="rows").ids[0]
        elif number % 3 == 1:
            found = GradientStore(folder).ids[: asked.exact_scores(queries).shape[1]] if done.is_set() else None
        else:
            asked.explain(queries, [0, 59])
            found = None
        answers += [] if found is None else [frozenset(found.tolist())]
        if done.is_set():
            break
    thread.join()
    assert set(answers) <= set(states)
    assert len(states) == 21
    assert frozenset(asked.search(queries, at_least=-1e9, rerank="rows").ids[0].tolist()) == states[-1]


def test_pieces_of_exact_scores_go_on_over_a_compaction_and_stop_at_a_removal(task, tmp_path, monkeypatch):
    from gradindex.retrieval import scoring

    gradindex.build(task, tmp_path / "store", factors="float32", **OPTIONS)
    retriever = gradindex.load(task, tmp_path / "store")
    queries = retriever.prepare([0])
    expected = retriever.exact_scores(queries)[0]
    monkeypatch.setattr(scoring, "_factors_at_once", lambda *_: 7)
    monkeypatch.setattr(gradindex.store.shards, "_MOST_OPEN", 1)

    def begun():
        retriever = gradindex.load(task, tmp_path / "store")
        pieces = retriever.exact_pieces(queries)
        return pieces, [next(pieces)]

    pieces, found = begun()
    gradindex.store.remove(tmp_path / "store", [2])  # of what came already
    gradindex.store.compact(tmp_path / "store")
    found += list(pieces)
    np.testing.assert_array_equal(np.concatenate([ids for _, ids, _ in found]), np.arange(60))
    np.testing.assert_allclose(np.concatenate([scores[0] for _, _, scores in found]), expected, rtol=1e-6)
    pieces, found = begun()
    gradindex.store.remove(tmp_path / "store", [55])
    gradindex.store.compact(tmp_path / "store")
    with pytest.raises(StoreChangedError, match="has different rows than when this answer was started. Ask again"):
        list(pieces)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["self-influence", "export", "verify", "info"])
def test_a_command_goes_on_over_a_compaction(folder, tmp_path, monkeypatch, command):
    gradindex.store.remove(folder, [0, 30])
    most, before = GradientStore(folder).top_self_influence(20), GradientStore(folder)
    column, read_seal, done = GradientStore.column, gradindex.store.shards.read_seal, []

    def compacted(original):
        def changed(*args, **options):
            if not done:
                done.append(True)  # before the compaction, which asks as well
                gradindex.store.compact(folder)
            return original(*args, **options)

        return changed

    monkeypatch.setattr(gradindex.store.shards, "_MOST_OPEN", 1)
    if command in ("self-influence", "export"):
        monkeypatch.setattr(GradientStore, "column", compacted(column))
    else:
        monkeypatch.setattr(gradindex.store.shards, "read_seal", compacted(read_seal))
    out = (
        ["--json"] if command in ("self-influence", "info") else [str(tmp_path / "out")] if command == "export" else []
    )
    result = CliRunner().invoke(main, [command, str(folder), *out], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    if command == "self-influence":
        found = json.loads(result.stdout)["records"]
        assert [each["id"] for each in found] == most[0].tolist()
        assert [each["word"] for each in found] == [f"w{i}" for i in most[0]]
    if command == "export":
        np.testing.assert_array_equal(np.load(tmp_path / "out" / "ids.npy"), before.ids)
    assert done or command == "info"


def test_a_part_locks_no_file_of_anothers(task, tmp_path):
    with claimed(tmp_path / "store", (1, 2), new=True):
        (tmp_path / "store" / "lock-old-of-mine").write_text("mine")
    with claimed(tmp_path / "store", (2, 2)):
        assert (tmp_path / "store" / "lock-old-of-mine").read_text() == "mine"
