"""What must never happen to a store: others' files deleted, rows of two tasks mixed, ids that mean two examples."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from growing import OPTIONS, first, held, let_go, only, snapshot, word
from torch import nn
from torch.utils.data import TensorDataset

import gradindex
from gradindex.errors import ArgumentError, MismatchError, StoreError, TaskError
from gradindex.projection import Projection
from gradindex.store import GradientStore, Job, runs, sealing
from gradindex.store import job as files_of
from gradindex.store.documents import write_manifest
from gradindex.store.encoding import decode, encode


@pytest.mark.parametrize("name", ["train-0001.tar", "0001.h5", "0001-00000.h5.bak"])
def test_a_folder_of_shards_that_are_others_is_left_alone(task, tmp_path, name):
    (tmp_path / "data" / "shards").mkdir(parents=True)
    (tmp_path / "data" / "shards" / name).write_text("mine")
    with pytest.raises(StoreError, match="is not empty and holds no gradindex store"):
        gradindex.build(task, tmp_path / "data", **OPTIONS)
    assert (tmp_path / "data" / "shards" / name).read_text() == "mine"


def test_others_files_among_shards_are_not_swept(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    (store.folder / "shards" / "notes.txt").write_text("mine")
    gradindex.store.remove(store.folder, [1])
    gradindex.store.compact(store.folder)
    assert (store.folder / "shards" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["pending.json", "manifest.json"])
def test_shards_that_nothing_tells_of_are_not_taken_for_done(task, tmp_path, lost):
    if lost == "pending.json":
        gradindex.building.build_part(task, tmp_path / "store", (1, 2), **OPTIONS)
    else:
        gradindex.build(task, tmp_path / "store", **OPTIONS)
    (tmp_path / "store" / lost).unlink()
    before = snapshot(tmp_path / "store")
    with pytest.raises(StoreError, match="holds shards, but neither manifest.json nor pending.json"):
        gradindex.build(task, tmp_path / "store", **OPTIONS)
    assert snapshot(tmp_path / "store") == before


def with_other_activation(task):
    return replace(task, model=nn.Sequential(task.model[0], nn.Sigmoid(), task.model[2]))


@pytest.mark.slow
def test_a_build_does_not_go_on_with_other_code_or_other_columns(task, tmp_path):
    gradindex.building.build_part(task, tmp_path / "store", (1, 2), **OPTIONS)
    before = snapshot(tmp_path / "store")
    with pytest.raises(MismatchError, match="losses of training examples .* differ"):
        gradindex.build(with_other_activation(task), tmp_path / "store", **OPTIONS)
    with pytest.raises(MismatchError, match="data differ"):
        gradindex.build(replace(task, columns={"word": ["x"] * 30}), tmp_path / "store", **OPTIONS)
    assert snapshot(tmp_path / "store") == before
    gradindex.build(task, tmp_path / "store", **OPTIONS)
    with pytest.raises(MismatchError, match="losses of training examples"):
        gradindex.build(with_other_activation(task), tmp_path / "store", **OPTIONS)


def test_added_columns_must_agree_with_those_that_are_there(task, tmp_path):
    gradindex.build(first(task, 12), tmp_path / "store", **OPTIONS)
    changed = replace(task, columns={"word": ["other", *task.columns["word"][1:]]})
    with pytest.raises(MismatchError, match=r"columns differ \(word\)"):
        gradindex.add(changed, tmp_path / "store")


def test_data_that_changed_are_found_by_their_losses_where_no_sample_is_left(tmp_path):
    whole = toys.make_task(tmp_path, n_train=40)
    store = gradindex.build(whole, tmp_path / "store", **(OPTIONS | {"shard_rows": 40}))
    gradindex.store.remove(store.folder, [i for i, _ in store.samples()])
    assert GradientStore(store.folder).samples() == []
    x, y = whole.train.tensors
    with pytest.raises(MismatchError, match="losses of training examples"):
        gradindex.load(replace(whole, train=TensorDataset(x.flip(0), y.flip(0))), store.folder)


NO_IDS = {
    "a mask": np.array([False] * 29 + [True]),
    "floats": np.array([5.0]),
    "text": ["5"],
    "too large": [1 << 70],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NO_IDS)
def test_what_are_no_ids_is_refused(task, tmp_path, case):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    before = snapshot(store.folder)
    for action in (
        lambda ids: gradindex.store.remove(store.folder, ids),
        store.rows,
        store.losses,
        store.self_influence,
        lambda ids: store.column("word", ids),
        lambda ids: gradindex.exact_scores(task, [task.query[0]], ids),
    ):
        with pytest.raises(ArgumentError, match="must be integers"):
            action(NO_IDS[case])
    assert snapshot(store.folder) == before


def test_lists_of_ids_are_ids(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    np.testing.assert_array_equal(store.rows([3, 3, 1]), store.rows(np.array([3, 3, 1])))
    assert store.rows([]).shape == (0, 24)
    assert store.column("word", [[1, 2], [3, 4]]).shape == (2, 2)
    with pytest.raises(ArgumentError, match=r"ids have shape \(1, 2\), but must be a list"):
        store.rows([[1, 2]])
    with pytest.raises(ArgumentError, match="There is no training id -1"):
        store.rows([-1])


@pytest.mark.slow
@pytest.mark.parametrize("place", [(0, 0, -1), (0, 3, 2), (0, -1, 2), (0, 0, 5), (8, 0, 1), (-1, 0, 1)], ids=str)
def test_views_outside_a_shard_are_refused(task, tmp_path, place):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    assert store.mapped(0).shape == (4, 24)
    with pytest.raises(ArgumentError, match=r"There is no shard|are not among those of rows, 0 to 4"):
        store.mapped(*place)


@pytest.mark.slow
def test_ids_that_were_used_once_are_not_merged_in(task, tmp_path):
    for name in "ab":
        gradindex.build(first(task, 12), tmp_path / name, **OPTIONS)
    gradindex.store.remove(tmp_path / "a", range(8, 12))
    gradindex.store.compact(tmp_path / "a")
    gradindex.store.remove(tmp_path / "b", range(8))
    with pytest.raises(ArgumentError, match="b has 8, and a has or had ids up to 11"):
        gradindex.store.merge(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_a_merge_that_is_given_again_copies_nothing_twice(task, tmp_path):
    gradindex.build(first(task, 12), tmp_path / "a", **OPTIONS)
    gradindex.build(only(task, range(12, 30)), tmp_path / "b", **OPTIONS)
    gradindex.store.merge(tmp_path / "a", tmp_path / "b", offset=12)
    before = snapshot(tmp_path / "a")
    assert gradindex.store.merge(tmp_path / "a", tmp_path / "b", offset=12).n_train == 30
    assert snapshot(tmp_path / "a") == before


@pytest.mark.slow
def test_an_open_retriever_follows_its_store(task, tmp_path):
    gradindex.build(first(task, 12), tmp_path / "store", **OPTIONS)
    retriever = gradindex.load(task, tmp_path / "store")
    gradindex.store.remove(tmp_path / "store", [3, 4])
    assert sorted(retriever.proponents(0, k=10).ids[0]) == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    gradindex.add(task, tmp_path / "store")
    assert retriever.proponents(0, k=28).ids.max() == 29
    assert retriever.unseen == 0
    gradindex.build(replace(task, layers="0"), tmp_path / "other", **OPTIONS)
    (tmp_path / "store").rename(tmp_path / "gone")
    (tmp_path / "other").rename(tmp_path / "store")
    with pytest.raises(StoreError, match="has different rows than when it was opened. Load it again"):
        retriever.proponents(0, k=3)


def test_numbers_too_small_for_a_scale_are_zero():
    for size in (190 * 1.4e-45, 1e-40, 1.2e-38):
        rows = np.full((1, 4), size, np.float32)
        stored = encode(rows, "int8", 1, str)
        assert (decode(stored["rows"], stored["scales"], "int8") >= 0).all()


@pytest.mark.slow
def test_parts_of_another_number_are_kept_out(task, tmp_path):
    process = held(tmp_path / "store", (1, 2))
    with pytest.raises(StoreError, match="is being written by"):
        gradindex.building.build_part(task, tmp_path / "store", (1, 4), **OPTIONS)
    let_go(process, lambda p: p.stdin.close())
    gradindex.building.build_part(task, tmp_path / "store", (1, 4), **OPTIONS)


@pytest.mark.slow
def test_the_lock_names_no_process_that_is_dead(task, tmp_path):
    dead = held(tmp_path / "store")
    let_go(dead, lambda p: p.kill())
    process = held(tmp_path / "store", (1, 2))
    with pytest.raises(StoreError, match="is being written by another process"):
        gradindex.build(task, tmp_path / "store", **OPTIONS)
    let_go(process, lambda p: p.stdin.close())


@pytest.mark.slow
def test_compacting_drops_a_shard_that_is_removed_as_a_whole(task, tmp_path):
    gradindex.build(task, tmp_path / "store", **OPTIONS)
    gradindex.store.remove(tmp_path / "store", range(4, 8))
    store = gradindex.store.compact(tmp_path / "store")
    assert [entry.first for entry in store.manifest.shards] == [0, 8, 12, 16, 20, 24, 28]
    assert store.manifest.removed == []
    assert store.n_train == 26


@pytest.mark.slow
def test_a_damaged_shard_stops_a_compaction_and_can_be_repaired_then(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    gradindex.store.remove(store.folder, [1, 5])
    (store.folder / "shards" / "0001-00001.h5").write_bytes(b"damage")
    with pytest.raises(StoreError, match="gradindex build --repair"):
        gradindex.store.compact(store.folder)
    assert len(gradindex.growth.repair(task, store.folder)) == 1
    assert gradindex.store.compact(store.folder).n_train == 28
    with pytest.raises(StoreError, match="gradindex build --repair"):
        store = gradindex.GradientStore(store.folder)
        (store.folder / "shards" / f"{store.manifest.shards[0].name}.h5").unlink()
        extra = gradindex.Checkpoint(task.checkpoints[0].path, 0.1, step=9)
        gradindex.growth.add_checkpoint(replace(task, checkpoints=[*task.checkpoints, extra]), store.folder)


def test_seal_writes_nothing_into_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="is not a gradindex store"):
        gradindex.store.seal(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_store_without_its_shards_is_repaired(task, tmp_path):
    import shutil

    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    rows = store.rows(store.ids)
    shutil.rmtree(store.folder / "shards")
    assert len(gradindex.growth.repair(task, store.folder)) == 8
    store = gradindex.GradientStore(store.folder)
    np.testing.assert_array_equal(store.rows(store.ids), rows)


OFFSETS = {"too large": ((1 << 63) - 4, ArgumentError, "must stay below 2"), "a fraction": (20.0, TypeError, "float")}


@pytest.mark.slow
@pytest.mark.parametrize("case", OFFSETS)
def test_an_offset_that_cannot_be_leaves_no_plan(task, tmp_path, case):
    offset, error, message = OFFSETS[case]
    for name in "ab":
        gradindex.build(first(task, 12), tmp_path / name, **OPTIONS)
    with pytest.raises(error, match=message):
        gradindex.store.merge(tmp_path / "a", [tmp_path / "b"], offset=offset)
    with pytest.raises(ArgumentError, match="There is no store to merge"):
        gradindex.store.merge(tmp_path / "a", [])
    assert gradindex.store.merge(tmp_path / "a", tmp_path / "b", offset=np.int64(12)).n_train == 24


@pytest.mark.slow
def test_fitted_stores_are_merged_when_one_takes_the_bases_of_the_other(task, tmp_path):
    options = OPTIONS | {"projection": Projection("fitted", 12)}
    gradindex.build(first(task, 12), tmp_path / "a", **options)
    gradindex.build(only(task, range(12, 30)), tmp_path / "b", **options)
    with pytest.raises(MismatchError, match="gradindex build --bases-from .*a"):
        gradindex.store.merge(tmp_path / "a", tmp_path / "b", offset=12)
    gradindex.build(only(task, range(12, 30)), tmp_path / "c", **options, bases_from=tmp_path / "a")
    merged = gradindex.store.merge(tmp_path / "a", tmp_path / "c", offset=12)
    grown = gradindex.add(task, gradindex.build(first(task, 12), tmp_path / "d", **options).folder)
    np.testing.assert_allclose(merged.rows(merged.ids), grown.rows(grown.ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(MismatchError, match="has no bases for"):
        gradindex.build(task, tmp_path / "e", **OPTIONS, bases_from=tmp_path / "a")


@pytest.mark.slow
def test_what_a_later_version_adds_is_kept_by_changes(task, tmp_path):
    store = gradindex.build(first(task, 12), tmp_path / "store", **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        specs, append = sealing.row_specs, sealing.ShardWriter.append

        def with_extra(self, rows, *others):
            self.raw.put("later/extra", self._place, np.zeros(len(rows)))
            append(self, rows, *others)

        patch.setattr(sealing, "row_specs", lambda after, n: {**specs(after, n), "later/extra": ((n,), "<i4")})
        patch.setattr(sealing.ShardWriter, "append", with_extra)
        gradindex.add(task, store.folder)
    manifest = GradientStore(store.folder).manifest
    later = replace(manifest, unknown={"later": [1, 2]}, generation=manifest.generation + 1)
    write_manifest(store.folder, later)
    gradindex.store.remove(store.folder, range(13, 17))
    compacted = gradindex.store.compact(store.folder)
    assert compacted.manifest.unknown["later"] == [1, 2]
    kept = [compacted._shards[number].arrays for number in range(len(compacted.manifest.shards))]
    assert sum("later/extra" in arrays for arrays in kept) >= 3


def test_a_log_that_cannot_be_written_stops_nothing(task, tmp_path, monkeypatch):
    def refused(path, *args):
        assert path.name == "log.jsonl"
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files_of, "own_file", refused)
    assert gradindex.build(task, tmp_path / "store", **OPTIONS).verify() == []
    assert not (tmp_path / "store" / "log.jsonl").exists()


def test_scattered_removals_stay_quick(tmp_path):
    listed = np.sort(np.random.default_rng(0).choice(1_281_167, 100_000, replace=False))
    removed = runs.to_runs(listed)
    left = runs.without([[0, 1_281_167]], removed)
    assert runs.count(left) == 1_181_167
    assert not runs.contain(removed, left[:, 0]).any()


COLUMNS = {
    "two axes": (np.zeros((30, 2), dtype=np.uint8), "must hold numbers, booleans, strings or dates, one for each"),
    "no Unicode": (["\udcff"] * 30, "holds text that is not Unicode"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_could_not_be_stored_are_refused_at_once(task, case):
    values, message = COLUMNS[case]
    with pytest.raises(TaskError, match=message):
        replace(task, columns={"c": values})
    for name in ("", "a/b", "."):
        with pytest.raises(TaskError, match="must not be empty or contain a slash"):
            replace(task, columns={name: [0] * 30})


@pytest.mark.slow
def test_a_list_of_whole_numbers_and_fractions_is_one_column_in_every_shard(tmp_path):
    values = [*range(9000), 0.5]
    task = toys.make_task(tmp_path, n_train=len(values), columns={"n": values})
    store = gradindex.build(task, tmp_path / "store", projection=Projection(dim=2), batch_size=512)
    assert store.column("n").tolist() == values
    assert store.manifest.columns == {"n": "<f8"}


@pytest.mark.slow
def test_blocks_without_a_row_are_exported_as_nothing(task, tmp_path):
    import pyarrow.parquet

    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    store = gradindex.store.remove(store.folder, range(4, 8))
    gradindex.store.export(store, tmp_path / "rows.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    assert table["id"].to_pylist() == store.ids.tolist()
    assert table["word"].to_pylist() == [word(i) for i in store.ids]
    assert table["row"].type.list_size == 24


@pytest.mark.slow
def test_a_plan_that_is_damaged_says_what_to_do(task, tmp_path):
    store = gradindex.build(first(task, 12), tmp_path / "store", **OPTIONS)
    (store.folder / "pending.json").write_text(json.dumps({"format": "gradindex-store"}))
    with pytest.raises(StoreError, match=r"pending.json is damaged .*Delete it to abandon the change that it plans"):
        gradindex.add(task, store.folder)
    (store.folder / "pending.json").unlink()
    assert gradindex.add(task, store.folder).n_train == 30
    assert Job.pending(store.folder) is None
    assert torch.get_num_threads() >= 1
