"""Second moments: against a naive float64 reference, kept true by every change of the store."""

import numpy as np
import pytest
import toys
from torch.utils.data import Subset

import gradindex
from gradindex.errors import ArgumentError, StoreError
from gradindex.growth import add, add_checkpoint
from gradindex.projection import Projection
from gradindex.store import GradientStore, compact, merge, moments_of, remove, second_moments


@pytest.fixture
def task(tmp_path):
    return toys.make_task(_made(tmp_path / "run"), toys.mlp(), n_train=60)


@pytest.fixture
def store(task, tmp_path):
    return gradindex.build(task, tmp_path / "store", projection=Projection(dim=16), shard_rows=20, batch_size=10)


def _made(folder):
    folder.mkdir()
    return folder


def reference(store):
    """Sums over rows in float64, one row at a time."""
    blocks = store.rows(store.ids).astype(np.float64).reshape(store.n_train, store.n_checkpoints, -1)
    lengths = np.linalg.norm(blocks, axis=2)
    outer = np.einsum("rci,rcj->rcij", blocks, blocks)
    weights = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return (outer * weights[:, :, None, None]).sum(0), outer.sum(0), blocks.sum(0)


def check(store):
    found = moments_of(store)
    assert found.count == store.n_train
    for mine, true in zip((found.weighted, found.plain, found.sums), reference(store), strict=True):
        np.testing.assert_allclose(mine, true, rtol=2e-5, atol=2e-6 * np.abs(true).max())


def test_sums_are_those_of_a_naive_reference(store):
    second_moments(store.folder)
    check(store)


def test_int8_rows_count_as_they_are_stored(task, tmp_path):
    store = gradindex.build(task, tmp_path / "int8", projection=Projection(dim=16), row_type="int8")
    second_moments(store.folder)
    check(store)


def test_a_store_without_moments_says_how_they_are_made(store):
    with pytest.raises(StoreError, match="no second moments of its rows.*gradindex whiten"):
        moments_of(store)


def test_parts_are_joined(store):
    for part in (1, 2):
        second_moments(store.folder, (part, 2))
    with pytest.raises(StoreError, match="no second moments"):
        moments_of(store)
    reads = []
    blocks = GradientStore.blocks
    GradientStore.blocks = lambda self, *args, **options: reads.append(args) or blocks(self, *args, **options)
    try:
        second_moments(store.folder)
    finally:
        GradientStore.blocks = blocks
    assert not reads  # all rows were in the parts
    check(store)
    assert [path.name for path in sorted((store.folder / "moments").iterdir())] == ["all-000001.h5", "all-000001.json"]


def test_a_part_that_cannot_be_is_refused(store):
    with pytest.raises(ArgumentError, match="part is 3/2"):
        second_moments(store.folder, (3, 2))


def test_changes_keep_them_true_and_read_only_what_changed(task, tmp_path, monkeypatch):
    few = toys.make_task(_made(tmp_path / "few"), toys.mlp(), n_train=60)
    some = gradindex.build(
        _first(few, 40), tmp_path / "grows", projection=Projection(dim=16), shard_rows=16, batch_size=8
    )
    second_moments(some.folder)
    read = []
    blocks = GradientStore.blocks

    def counted(self, *args, **options):
        for ids, rows in blocks(self, *args, **options):
            read.append(len(ids))
            yield ids, rows

    monkeypatch.setattr(GradientStore, "blocks", counted)
    grown = add(few, some.folder)
    assert sum(read) == 20
    check(grown)
    read.clear()
    left = remove(some.folder, [3, 4, 50])
    assert sum(read) == 3
    check(left)
    read.clear()
    small = compact(some.folder)
    assert sum(read) == 0
    check(small)


def _first(task, count):
    from dataclasses import replace

    return replace(task, train=Subset(task.train, range(count)))


def test_merging_adds_the_rows_of_the_others(task, tmp_path):
    one, other = (
        gradindex.build(_first(task, count), tmp_path / str(count), projection=Projection(dim=16)) for count in (40, 20)
    )
    second_moments(one.folder)
    check(merge(one.folder, [other.folder], offset=40))


def test_a_removal_that_was_not_followed_is_made_up_for(store, monkeypatch):
    second_moments(store.folder)
    monkeypatch.setattr("gradindex.store.upkeep.follow_moments", lambda folder: None)  # as where it is killed
    check(remove(store.folder, [0, 59]))


def test_rows_that_are_gone_make_moments_of_no_use(store, monkeypatch):
    second_moments(store.folder)
    monkeypatch.setattr("gradindex.store.upkeep.follow_moments", lambda folder: None)
    remove(store.folder, [0, 30])
    compacted = compact(store.folder)
    with pytest.raises(StoreError, match="moments of other rows.*gradindex whiten"):
        moments_of(compacted)
    second_moments(store.folder)
    check(compacted)


def test_more_checkpoints_are_added_beside(tmp_path):
    from dataclasses import replace

    task = toys.make_task(_made(tmp_path / "run"), toys.mlp(), n_train=30)
    store = gradindex.build(
        replace(task, checkpoints=task.checkpoints[:2]), tmp_path / "store", projection=Projection(dim=16)
    )
    second_moments(store.folder)
    remove(store.folder, [7])
    check(add_checkpoint(task, store.folder))


def test_a_damaged_file_is_made_anew_and_named_by_verify(store):
    second_moments(store.folder)
    (path,) = (store.folder / "moments").glob("*.h5")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert any("moments" in problem and "gradindex whiten" in problem for problem in store.verify())
    with pytest.raises(StoreError, match="gradindex whiten"):
        moments_of(store)
    second_moments(store.folder)
    check(store)
    assert store.verify() == []


def test_a_pass_that_was_ended_goes_on(store, monkeypatch):
    from gradindex.store import summing

    monkeypatch.setattr(summing, "_TOGETHER", 1)
    monkeypatch.setattr(summing, "_SAVED_EVERY", -1)
    blocks, handed = GradientStore.blocks, []

    def ended(self, *args, **options):
        for ids, rows in blocks(self, *args, **options):
            if len(handed) == 2:
                raise KeyboardInterrupt
            handed.append(len(ids))
            yield ids, rows

    monkeypatch.setattr(GradientStore, "blocks", ended)
    with pytest.raises(KeyboardInterrupt):
        second_moments(store.folder)
    handed.clear()
    second_moments(store.folder)  # of three shards one is left
    assert handed == [20]
    monkeypatch.setattr(GradientStore, "blocks", blocks)
    check(store)
