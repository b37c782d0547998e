"""Whatever ends a build - a kill, a full disk, a damaged file - what was finished stays, and no wrong answer leaves."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toys
from torch.utils.data import Subset, TensorDataset

import gradindex
from gradindex import files
from gradindex.errors import IndexFileError, MismatchError, StoreError
from gradindex.index import CompactIndex, Shape
from gradindex.projection import Projection
from gradindex.retrieval.candidates import Candidates
from gradindex.store import GradientStore, container, upkeep

# Forks a builder for each line that it reads: a child costs milliseconds where a new process costs seconds.
NURSERY = """
import json, os, resource, sys, traceback
sys.path.insert(0, sys.argv[1])
import faiss, h5py, torch
torch.set_num_threads(1)
import gradindex, gradindex.building, toys
from pathlib import Path
from gradindex.errors import MismatchError, StoreError
from gradindex.projection import Projection
task = toys.make_task(Path(sys.argv[2]), n_train=60, columns={"word": [f"w{i}" for i in range(60)]})
print("ready", flush=True)
for line in sys.stdin:
    folder, limit = json.loads(line)
    reads, writes = os.pipe()  # a pipe has no limit on its size
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            gradindex.build(task, folder, projection=Projection(dim=8), batch_size=1, shard_rows=1, factors="float32")
            code = 0
        except StoreError as error:
            os.write(writes, str(error).encode())
            code = 1
        except BaseException:
            os.write(writes, traceback.format_exc().encode())
        finally:
            os._exit(code)
    print(pid, flush=True)
    os.close(writes)
    message = os.fdopen(reads).read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), message]), flush=True)
"""


class Nursery:
    """Builders that can be killed or given little room."""

    def __init__(self, folder):
        self.errors = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(Path(__file__).parent), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def build(self, store, kill_after=None, limit=None):
        """The exit code of one builder."""
        self.process.stdin.write(json.dumps([str(store), limit]) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it was quicker
                os.kill(pid, signal.SIGKILL)
        code, message = json.loads(self.process.stdout.readline())
        self.errors += [message] if code > 0 else []
        return code

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def nursery(tmp_path):
    nursery = Nursery(tmp_path)
    yield nursery
    nursery.close()


def sealed(folder):
    """Shards that have a seal, with their bytes."""
    return {
        path.name: (path.read_bytes(), path.with_suffix(".h5").read_bytes())
        for path in (folder / "shards").glob("*.json")
        if "tmp" not in path.name
    }


def lasting(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "log.jsonl"
    }


def test_a_build_that_is_killed_fifty_times_ends_as_if_nothing_had_happened(nursery, tmp_path):
    started = time.perf_counter()
    assert nursery.build(tmp_path / "whole") == 0
    taken = time.perf_counter() - started
    generator, killed, before = random.Random(0), 0, {}
    for _ in range(400):
        code = nursery.build(tmp_path / "store", kill_after=generator.uniform(0.02, 0.02 + taken / 12))
        now = sealed(tmp_path / "store") if (tmp_path / "store" / "shards").exists() else {}
        assert {name: now[name] for name in before} == before  # a sealed shard is never made again or changed
        before = now
        killed += code == -signal.SIGKILL
        if killed == 50 or (tmp_path / "store" / "manifest.json").exists():
            if killed >= 50:
                break
            (tmp_path / "store" / "manifest.json").unlink(missing_ok=True)  # done too soon: begin another one
            for path in (tmp_path / "store").rglob("*.*"):
                path.unlink()
            before = {}
    assert killed == 50
    assert nursery.build(tmp_path / "store") == 0
    assert lasting(tmp_path / "store") == lasting(tmp_path / "whole")
    store = gradindex.GradientStore(tmp_path / "store")
    assert store.ids.tolist() == list(range(60))
    assert store.verify() == []


def test_a_limit_on_file_sizes_is_a_clean_error_and_the_build_goes_on_without_it(nursery, tmp_path):
    assert nursery.build(tmp_path / "whole") == 0
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*.h5"))
    generator = random.Random(1)
    for number in range(20):
        folder = tmp_path / f"store-{number}"
        assert nursery.build(folder, limit=generator.randrange(1, largest)) == 1
        assert not (folder / "manifest.json").exists()
        assert [path for path in folder.rglob("*") if "tmp" in path.name] == []
        if number % 5 == 0:
            assert nursery.build(folder) == 0
            assert lasting(folder) == lasting(tmp_path / "whole")
    assert len(nursery.errors) == 20
    assert all(
        error.endswith("cannot be written: File too large. What was finished is kept.") for error in nursery.errors
    )


@pytest.fixture
def built(tmp_path):
    task = toys.make_task(tmp_path, n_train=40, columns={"word": [f"w{i}" for i in range(40)], "n": np.arange(40)})
    options = {"projection": Projection("fitted", dim=24), "batch_size": 10, "factors": "float32"}
    gradindex.build(task, tmp_path / "store", shard_rows=20, **options)
    gradindex.store.remove(tmp_path / "store", np.array([7, 31]))
    return task, tmp_path / "store"


@pytest.fixture
def indexed(built):
    """The same with an index."""
    task, folder = built
    store = GradientStore(folder)
    made = CompactIndex.build(Shape("ivf", 6, 4), store.rows(store.ids), store.blocks)
    about = {"map": store.manifest["fingerprint"], "ids": store.id_runs.tolist(), "covers": store.origins}
    recall = {"k": 5, "proponents_at_least": 1, "opponents_at_least": 1, "against": ""}
    made.save(folder / "index", about | {"effort": {"probes": 2, "proposals": 9}, "recall": recall})
    return task, folder


def everything(folder):
    """All that a store can answer, as bytes."""
    store = GradientStore(folder)
    ids = store.ids
    values = [ids, store.rows(ids), store.self_influence(), store.losses(), store.column("word"), store.column("n")]
    values += [side for sides in store.factors(ids).values() for side in sides]
    values += [side for sides in store.bases().values() for side in sides]
    values += [rows for _, rows in store.blocks()]
    values += Candidates(store).search(store.rows(ids[:4]), 5)
    return [value.tobytes() for value in values] + [json.dumps(store.manifest["map"])]


def damage(content, generator, cut):
    if cut:
        return content[: generator.randrange(len(content))]
    changed = bytearray(content)
    changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize(("cut", "times"), [(False, 1000), (True, 200)], ids=["one bit", "cut short"])
def test_no_damage_leads_to_a_wrong_answer(indexed, cut, times):
    """Of shards, seals, bases, manifest and index."""
    _, folder = indexed
    expected, generator, found = everything(folder), random.Random(2), 0
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".h5", ".json", ".faiss"))
    assert len(paths) == 9
    for _ in range(times):
        path = generator.choice(paths)
        content = path.read_bytes()
        path.unlink()  # a new file: the old one may still be mapped
        path.write_bytes(damage(content, generator, cut))
        try:
            assert everything(folder) == expected
        except (StoreError, IndexFileError):
            found += 1
        path.unlink()
        path.write_bytes(content)
    assert found > 0.8 * times
    assert everything(folder) == expected


def test_verify_finds_every_damage_of_a_shard(built):
    _, folder = built
    generator = random.Random(3)
    paths = sorted((folder / "shards").iterdir())
    for _ in range(200):
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
    entries = GradientStore(folder).manifest["shards"]
    return [(folder / "shards" / f"{entry['name']}.h5").read_bytes() for entry in entries]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def test_damaged_shards_are_repaired_alone(built):
    task, folder = built
    before = contents(folder)
    assert gradindex.growth.repair(task, folder) == []
    flip(folder / "shards" / "0001-00001.h5")
    untouched = (folder / "shards" / "0001-00000.h5").stat().st_mtime_ns
    (said,) = gradindex.growth.repair(task, folder)
    assert "0001-00001.h5 is damaged" in said
    assert said.endswith(": computed again")
    assert contents(folder) == before
    assert (folder / "shards" / "0001-00000.h5").stat().st_mtime_ns == untouched
    for suffix in (".h5", ".json"):
        name = GradientStore(folder).manifest["shards"][0]["name"]
        (folder / "shards" / f"{name}{suffix}").unlink()
        gradindex.growth.repair(task, folder)
        assert contents(folder) == before
    bases = {path.name: path.read_bytes() for path in folder.glob("bases-*")}
    for path in folder.glob("bases-*"):
        path.write_bytes(path.read_bytes()[:-3])
    assert "They were fitted again" in gradindex.growth.repair(task, folder)[0]
    assert {path.name: path.read_bytes() for path in folder.glob("bases-*")} == bases
    assert len(list((folder / "shards").iterdir())) == 4


def test_bases_are_fitted_again_as_they_were_before_the_store_grew(tmp_path):
    task = toys.make_task(tmp_path, n_train=40)
    first = replace(task, train=Subset(task.train, range(25)))
    gradindex.build(first, tmp_path / "store", projection=Projection("fitted", dim=24), batch_size=10)
    gradindex.add(task, tmp_path / "store")
    (path,) = (tmp_path / "store").glob("bases-*.h5")
    path.unlink()
    assert "They were fitted again" in gradindex.growth.repair(task, tmp_path / "store")[0]


def test_a_repair_with_other_data_is_refused(built, tmp_path):
    task, folder = built
    x, y = task.train.tensors
    other = x.clone()
    other[20:] *= -1
    flip(folder / "shards" / "0001-00001.h5")
    before = lasting(folder)
    changed = replace(task, train=TensorDataset(other, y))
    with pytest.raises(MismatchError, match=r"of 0001-00001 \(ids 20 to 39\) are not those that"):
        gradindex.growth.repair(changed, folder)
    (folder / "shards" / "0001-00001.json").unlink()
    with pytest.raises(MismatchError, match=r"of 0001-00001 \(ids 20 to 39\) are not those that"):
        gradindex.growth.repair(changed, folder)
    before.pop("shards/0001-00001.json")
    assert lasting(folder) == before


def test_a_repair_of_a_compacted_shard_that_is_killed_can_be_given_again(built, monkeypatch):
    task, folder = built
    store = gradindex.store.compact(folder)
    rows = store.rows(store.ids)
    flip(sorted((folder / "shards").glob("*.h5"))[0])
    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            gradindex.growth.repair(task, folder)
    assert "computed again" in gradindex.growth.repair(task, folder)[0]
    store = gradindex.GradientStore(folder)
    assert store.verify() == []
    np.testing.assert_allclose(store.rows(store.ids), rows, rtol=1e-5, atol=1e-6)


def test_ids_that_went_with_their_seal_cannot_be_repaired(built):
    task, folder = built
    gradindex.store.compact(folder)
    sorted((folder / "shards").glob("*.json"))[0].write_text("{}")
    with pytest.raises(StoreError, match="its ids went with its seal"):
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
    before = lasting(folder)
    options = {"projection": Projection("fitted", dim=24), "batch_size": 10, "factors": "float32", "shard_rows": 20}
    gradindex.build(task, folder, **options)
    assert lasting(folder) == before
    assert gradindex.store.remove(folder, np.array([1])).n_train == 37


def test_names_with_spaces_and_other_letters_work(built, tmp_path):
    task, folder = built
    strange = tmp_path / "mein Speicher, 日本 [x]*"
    folder.rename(strange)
    (strange / "shards" / "0001-00000.h5.tmp-host-1-00aa11bb").write_bytes(b"left by a killed process")
    assert gradindex.store.compact(strange).verify() == []
    assert gradindex.load(strange, task).proponents(0, k=3).ids.shape == (1, 3)
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
    with pytest.raises(StoreError, match=f"pending.json cannot be written: {words}. What was finished is kept"):
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
