"""Whatever ends a build - a kill, a full disk, a damaged file - what was finished stays, and no wrong answer leaves."""

import os
import random
from dataclasses import replace

import faulty
import numpy as np
import pytest
import toys
from torch.utils.data import Subset, TensorDataset

import gradindex
from gradindex import files
from gradindex.errors import MismatchError, StoreError
from gradindex.projection import Projection
from gradindex.store import GradientStore, container, upkeep


@pytest.fixture
def built(tmp_path):
    task = toys.make_task(tmp_path, n_train=40, columns={"word": [f"w{i}" for i in range(40)], "n": np.arange(40)})
    options = {"projection": Projection("fitted", dim=24), "batch_size": 10, "factors": "float32"}
    gradindex.build(task, tmp_path / "store", shard_rows=20, **options)
    gradindex.store.remove(tmp_path / "store", np.array([7, 31]))
    return task, tmp_path / "store"


def damage(content, generator, cut):
    if cut:
        return content[: generator.randrange(len(content))]
    changed = bytearray(content)
    changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return bytes(changed)


@pytest.mark.slow
def test_verify_finds_every_damage_of_a_shard(built, faults):
    _, folder = built
    paths = sorted((folder / "shards").iterdir())
    for number in faults("damages of a shard, verified", 60):
        generator = random.Random(f"verify {number}")
        path = generator.choice(paths)
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(damage(content, generator, generator.random() < 0.2))
        problems = GradientStore(folder).verify()
        assert len(problems) == 1
        assert str(path.with_suffix("")) in problems[0]
        path.unlink()
        path.write_bytes(content)


def contents(folder):
    """Shards in the order of ids."""
    entries = GradientStore(folder).manifest.shards
    return [(folder / "shards" / f"{entry.name}.h5").read_bytes() for entry in entries]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


@pytest.mark.slow
def test_damaged_shards_are_repaired_alone(built):
    task, folder = built
    before = contents(folder)
    assert gradindex.growth.repair(task, folder) == []
    flip(folder / "shards" / "0001-00001.h5")
    untouched = (folder / "shards" / "0001-00000.h5").stat().st_mtime_ns
    (said,) = gradindex.growth.repair(task, folder)
    assert "0001-00001.h5 is damaged" in said
    assert said.endswith(": recomputed")
    assert contents(folder) == before
    assert (folder / "shards" / "0001-00000.h5").stat().st_mtime_ns == untouched
    for suffix in (".h5", ".json"):
        name = GradientStore(folder).manifest.shards[0].name
        (folder / "shards" / f"{name}{suffix}").unlink()
        gradindex.growth.repair(task, folder)
        assert contents(folder) == before
    bases = {path.name: path.read_bytes() for path in folder.glob("bases-*")}
    for path in folder.glob("bases-*"):
        path.write_bytes(path.read_bytes()[:-3])
    assert "They were refitted" in gradindex.growth.repair(task, folder)[0]
    assert {path.name: path.read_bytes() for path in folder.glob("bases-*")} == bases
    assert len(list((folder / "shards").iterdir())) == 4


def test_bases_are_fitted_again_as_they_were_before_the_store_grew(tmp_path):
    task = toys.make_task(tmp_path, n_train=40)
    first = replace(task, train=Subset(task.train, range(25)))
    gradindex.build(first, tmp_path / "store", projection=Projection("fitted", dim=24), batch_size=10)
    gradindex.add(task, tmp_path / "store")
    (path,) = (tmp_path / "store").glob("bases-*.h5")
    path.unlink()
    assert "They were refitted" in gradindex.growth.repair(task, tmp_path / "store")[0]


def test_a_repair_with_other_data_is_refused(built, tmp_path):
    task, folder = built
    x, y = task.train.tensors
    other = x.clone()
    other[20:] *= -1
    flip(folder / "shards" / "0001-00001.h5")
    before = faulty.lasting(folder)
    changed = replace(task, train=TensorDataset(other, y))
    with pytest.raises(MismatchError, match=r"of 0001-00001 \(ids 20 to 39\) are not those that"):
        gradindex.growth.repair(changed, folder)
    (folder / "shards" / "0001-00001.json").unlink()
    with pytest.raises(MismatchError, match=r"of 0001-00001 \(ids 20 to 39\) are not those that"):
        gradindex.growth.repair(changed, folder)
    before.pop("shards/0001-00001.json")
    assert faulty.lasting(folder) == before


@pytest.mark.slow
def test_a_repair_of_a_compacted_shard_that_is_killed_can_be_given_again(built, monkeypatch):
    task, folder = built
    store = gradindex.store.compact(folder)
    rows = store.rows(store.ids)
    flip(sorted((folder / "shards").glob("*.h5"))[0])
    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            gradindex.growth.repair(task, folder)
    assert "recomputed" in gradindex.growth.repair(task, folder)[0]
    store = gradindex.GradientStore(folder)
    assert store.verify() == []
    np.testing.assert_allclose(store.rows(store.ids), rows, rtol=1e-5, atol=1e-6)


def test_ids_that_went_with_their_seal_cannot_be_repaired(built):
    task, folder = built
    gradindex.store.compact(folder)
    sorted((folder / "shards").glob("*.json"))[0].write_text("{}")
    with pytest.raises(StoreError, match="its ids were lost with its seal"):
        gradindex.growth.repair(task, folder)


def test_a_half_copied_store_is_refused(built, tmp_path):
    _, folder = built
    other = tmp_path / "copy"
    (other / "shards").mkdir(parents=True)
    (other / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    (other / "shards" / "0001-00000.h5").write_bytes((folder / "shards" / "0001-00000.h5").read_bytes()[:9000])
    (other / "shards" / "0001-00000.json").write_bytes((folder / "shards" / "0001-00000.json").read_bytes())
    store = GradientStore(other)
    with pytest.raises(StoreError, match=r"0001-00000\.h5 has 9000 bytes instead of \d+.*gradindex verify"):
        store.rows(np.array([0]))
    with pytest.raises(StoreError, match=r"0001-00001\.json is missing.*gradindex build --repair"):
        store.rows(np.array([25]))
    assert len(store.verify()) == 3  # two shards and the bases


def test_a_foreign_hdf5_file_is_no_shard(built):
    import h5py

    _, folder = built
    with h5py.File(folder / "shards" / "0001-00000.h5", "w") as file:
        file["rows"] = np.zeros((20, 24))
    with pytest.raises(StoreError, match=r"0001-00000\.h5 has \d+ bytes instead of"):
        GradientStore(folder).rows(np.array([0]))


def test_a_vanished_folder_is_named(built, tmp_path):
    _, folder = built
    store = GradientStore(folder)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"store/shards/0001-00000\.json is missing"):
        store.rows(np.array([0]))


def test_a_clock_set_back_changes_nothing(built):
    task, folder = built
    for path in folder.rglob("*"):
        os.utime(path, (2e9, 2e9))  # from the future
    before = faulty.lasting(folder)
    options = {"projection": Projection("fitted", dim=24), "batch_size": 10, "factors": "float32", "shard_rows": 20}
    gradindex.build(task, folder, **options)
    assert faulty.lasting(folder) == before
    assert gradindex.store.remove(folder, np.array([1])).n_train == 37


def test_names_with_spaces_and_other_letters_work(built, tmp_path):
    task, folder = built
    strange = tmp_path / "mein Speicher, 日本 [x]*"
    folder.rename(strange)
    (strange / "shards" / "0001-00000.h5.tmp-host-1-00aa11bb").write_bytes(b"left by a killed process")
    assert gradindex.store.compact(strange).verify() == []
    assert gradindex.load(task, strange).proponents(0, k=3).ids.shape == (1, 3)
    assert [path for path in strange.rglob("*") if "tmp" in path.name] == []


REFUSALS = {
    "read-only": (30, "Read-only file system"),
    "no permission": (13, "Permission denied"),
    "quota": (122, "Disk quota exceeded"),
    "too many files": (24, "Too many open files"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_system_refuses_is_said_with_the_path(tmp_path, monkeypatch, case):
    number, words = REFUSALS[case]
    task = toys.make_task(tmp_path)

    def refuse(path, *args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "flush", refuse)
    with pytest.raises(StoreError, match=f"pending.json cannot be written: {words}. Finished work is kept"):
        gradindex.build(task, tmp_path / "store")


def test_a_file_system_without_locks_is_explained_and_can_be_used(tmp_path, monkeypatch):
    task = toys.make_task(tmp_path)

    def no_locks(*args):
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with pytest.raises(StoreError, match=r"file system without locks \(No locks available\).*set GRADINDEX_LOCKS=off"):
        gradindex.build(task, tmp_path / "store")
    monkeypatch.setenv("GRADINDEX_LOCKS", "off")
    assert gradindex.build(task, tmp_path / "store").verify() == []


def test_a_row_at_random_costs_only_its_own_blocks(built, monkeypatch):
    _, folder = built
    store, seen = GradientStore(folder), []
    monkeypatch.setattr(container, "_digest", lambda block: seen.append(len(block)) or b"")
    with pytest.raises(StoreError):
        store.rows(np.array([3]))
    assert len(seen) == 1


def test_blocks_are_verified_once(built, monkeypatch):
    _, folder = built
    store, digest, seen = GradientStore(folder), container._digest, []
    monkeypatch.setattr(container, "_digest", lambda block: seen.append(1) or digest(block))
    store.rows(np.arange(5))
    first = len(seen)
    store.rows(np.arange(5))
    assert first == len(seen) >= 1
