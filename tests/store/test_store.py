"""The store: builds that are interrupted go on, damage is found, and rows come back as they went in."""

import errno
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from torch.utils.data import TensorDataset

import gradindex
from gradindex import building, files
from gradindex.errors import ArgumentError, MismatchError, NonFiniteGradientError, StoreError, UserCodeError
from gradindex.gradients import Engine, check_routes
from gradindex.projection import Projection

OPTIONS = {"projection": Projection(dim=8), "batch_size": 2, "shard_rows": 4}
COLUMNS = {
    "word": [f"é{i}" for i in range(12)],
    "count": np.arange(12, dtype=np.int16),
    "rate": torch.linspace(0, 1, 12),
    "odd": [bool(i % 2) for i in range(12)],
}


@pytest.fixture
def task(tmp_path):
    return toys.make_task(tmp_path, columns=COLUMNS)


@pytest.fixture
def built(task, tmp_path):
    return gradindex.build(task, tmp_path / "store", **OPTIONS)


class Counted:
    """Counts reads, and fails at one example while ``bad`` is set."""

    def __init__(self, data, bad=None):
        self.data, self.bad, self.reads = data, bad, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.reads.append(i)
        if i == self.bad:
            raise OSError("the network drive is gone")
        return self.data[i]


def shards(folder):
    return [path.read_bytes() for path in sorted((folder / "shards").glob("*.h5"))]


def everything(folder):
    """All files by name, but for the log of how long things took."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "log.jsonl"
    }


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_an_interrupted_build_goes_on_and_ends_as_if_nothing_had_happened(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gradindex.Task, "check_reads_repeat", lambda self: None)
    monkeypatch.setattr(gradindex.Task, "data_fingerprint", lambda self: "always the same")
    whole = gradindex.build(task, tmp_path / "whole", **OPTIONS)
    data = Counted(task.train)

    def checked(engine):
        check_routes(engine)
        data.bad, data.reads = 9, []  # the check has read it: the drive goes later

    monkeypatch.setattr("gradindex.filling.check_routes", checked)
    with pytest.raises(UserCodeError, match="Reading training example 9 failed: OSError: the network drive is gone"):
        gradindex.build(replace(task, train=data), tmp_path / "store", **OPTIONS)
    with pytest.raises(StoreError, match=r"has not finished \(2 of 3 shards\)"):
        gradindex.GradientStore(tmp_path / "store")
    monkeypatch.setattr("gradindex.filling.check_routes", check_routes)
    with Engine(replace(task, train=data)) as engine:
        data.bad, data.reads = None, []
        check_routes(engine)
    checking = len(data.reads)
    data.reads = []
    store = gradindex.build(replace(task, train=data), tmp_path / "store", **OPTIONS)
    assert capsys.readouterr().err == f"{tmp_path / 'store'}: resuming, 8 of 12 rows are done\n"
    # After the check one of each shard that is there, for its loss; then the missing shard alone, with spot checks.
    after = data.reads[checking:]
    assert after[:4] == [0, 4, 8, 9]
    assert set(after[4:]) == {*after[4:], 10, 11} <= {8, 9, 10, 11} and len(after) == 6 + 3
    assert everything(store.folder) == everything(whole.folder)
    assert store.verify() == []


@pytest.mark.slow
def test_a_planned_shard_that_is_not_whole_is_computed_again(task, built, tmp_path):
    gradindex.building.build_part(task, tmp_path / "parts", (1, 1), **OPTIONS)
    folder = tmp_path / "parts" / "shards"
    (folder / "0001-00000.json").unlink()
    (folder / "0001-00001.h5").write_bytes(b"half a shard")
    again = gradindex.build(task, tmp_path / "parts", **OPTIONS)
    assert again.verify() == []
    assert shards(again.folder) == shards(built.folder)


@pytest.mark.slow
def test_a_shard_that_is_damaged_before_the_build_ends_is_computed_again(task, built, tmp_path):
    gradindex.building.build_part(task, tmp_path / "parts", (1, 1), **OPTIONS)
    flip(tmp_path / "parts" / "shards" / "0001-00001.h5")  # the whole file is one block
    again = gradindex.build(task, tmp_path / "parts", **OPTIONS)
    assert again.verify() == []
    assert shards(again.folder) == shards(built.folder)


def test_a_finished_build_is_not_touched_by_another_run(built, task):
    before = snapshot(built.folder)
    gradindex.build(task, built.folder, projection=Projection(dim=8))  # other sizes of batches and shards
    assert snapshot(built.folder) == before


def other_model(task, folder):
    (folder / "other").mkdir()
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    return toys.make_task(folder / "other", model, columns=COLUMNS, train=task.train)


OTHERS = {
    "model": (other_model, {}, "model; "),
    "layers": (lambda task, _: replace(task, layers=["0", "2.bias"]), {}, "layers differ"),
    "checkpoints": (lambda task, _: replace(task, checkpoints=task.checkpoints[1:]), {}, "checkpoints differ"),
    "rates": (lambda t, _: replace(t, checkpoints=[replace(c, learning_rate=1.0) for c in t.checkpoints]), {}, "check"),
    "dim": (lambda task, _: task, {"projection": Projection(dim=9)}, "projection differ"),
    "seed": (lambda task, _: task, {"projection": Projection(dim=8, seed=1)}, "projection differ"),
    "precision": (lambda task, _: task, {"precision": "float64"}, "precision differ"),
    "length": (lambda t, _: replace(t, train=list(t.train)[:5], columns={}), {}, r"data length \(12 stored, 5 now\)"),
    "data": (lambda task, _: replace(task, train=list(task.train)[::-1]), {}, r"data \(such as training example \d+"),
    "columns": (lambda task, _: replace(task, columns={}), {}, "columns differ"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_another_tasks_build_is_refused_with_what_differs_and_left_alone(built, task, tmp_path, case):
    change, options, message = OTHERS[case]
    before = snapshot(built.folder)
    with pytest.raises(MismatchError, match=f"(holds a build of another task:|The task does not match) .*{message}"):
        gradindex.build(change(task, tmp_path), built.folder, **(OPTIONS | options))
    assert snapshot(built.folder) == before


def test_a_folder_with_something_else_is_refused_and_left_alone(task, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("a cat")
    for place in (tmp_path / "photos", tmp_path / "photos" / "cat.png"):
        with pytest.raises(StoreError, match="is not empty and holds no gradindex store. Choose another folder"):
            gradindex.build(task, place, **OPTIONS)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path):
    other = path.with_name("0001-00002.h5")
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


DAMAGES = {
    "one bit": (flip, [r"0001-00001\.h5 is damaged in 1 of 1 blocks \(ids 4 to 7\)"]),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), [r"00001\.h5 has \d+ bytes instead of \d+ \(ids 4"]),
    "gone": (lambda path: path.unlink(), [r"00001\.h5 is missing \(ids 4 to 7\)"]),
    "swapped": (swap, [r"00001\.h5 is damaged", r"00002\.h5 is damaged"]),
    "no seal": (lambda path: path.with_suffix(".json").unlink(), [r"00001\.json is missing \(ids 4 to 7\)"]),
    "damaged seal": (
        lambda path: path.with_suffix(".json").write_text(
            path.with_suffix(".json").read_text().replace("rows", "r0ws")
        ),
        [r"00001\.json is damaged \(its contents do not match its checksum\) \(ids 4 to 7\)"],
    ),
    "another seal": (
        lambda path: path.with_suffix(".json").write_bytes(path.with_name("0001-00000.json").read_bytes()),
        [r"00001\.json is not the file that the manifest names \(ids 4 to 7\)"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGES)
def test_verify_finds_and_names_damage(built, case):
    harm, messages = DAMAGES[case]
    harm(built.folder / "shards" / "0001-00001.h5")
    problems = built.verify()
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert re.search(message, problem)


def test_reading_a_missing_shard_says_what_to_do(built):
    (built.folder / "shards" / "0001-00001.h5").unlink()
    assert built.rows(np.array([0, 11])).shape == (2, 24)
    with pytest.raises(StoreError, match=r"00001\.h5 is missing. Run `gradindex verify .*build --repair"):
        built.rows(np.array([5]))


MANIFESTS = {
    "not JSON": (lambda text: text[:-20], "is damaged"),
    "another format": (lambda text: text.replace("gradindex-store", "photos"), r"is damaged \(another format\)"),
    "a newer version": (
        lambda text: text.replace('"version": 1', '"version": 7'),
        "format version 7, but this gradindex",
    ),
    "another learning rate": (lambda text: text.replace("0.02", "0.03"), "do not match its checksum"),
    "a trial version": (
        lambda text: text.replace('"version": 1', '"version": 0'),
        "format version 0, of a pre-release",
    ),
    "no shards": (lambda text: text.replace('"shards"', '"shard"'), "is damaged"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MANIFESTS)
def test_a_damaged_manifest_is_refused(built, case):
    change, message = MANIFESTS[case]
    path = built.folder / "manifest.json"
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(StoreError, match=message):
        gradindex.GradientStore(built.folder)


def test_values_come_back_as_they_were_in_any_order(built):
    ids = np.array([[11, 0], [5, 5], [4, 7]])
    assert built.columns == list(COLUMNS)
    assert built.column("word").tolist() == COLUMNS["word"]
    assert built.column("word", ids).tolist() == [["é11", "é0"], ["é5", "é5"], ["é4", "é7"]]
    assert built.column("count", ids).dtype == np.int16
    assert built.column("count", ids).tolist() == ids.tolist()
    assert built.column("odd").tolist() == COLUMNS["odd"]
    np.testing.assert_array_equal(built.column("rate"), COLUMNS["rate"].numpy())
    rows = np.concatenate([block for _, block in built.blocks()])
    np.testing.assert_array_equal(built.rows(ids.ravel()), rows[ids.ravel()])
    np.testing.assert_array_equal(built.losses(ids.ravel()), built.losses()[ids.ravel()])
    assert built.rows(np.array([], dtype=np.int64)).shape == (0, 24)


def test_losses_are_the_training_losses_at_each_checkpoint(built, task):
    for number, checkpoint in enumerate(task.checkpoints):
        task.model.load_state_dict(checkpoint.load(task.model))
        x, y = task.train.tensors
        with torch.no_grad():
            expected = toys.cross_entropy(task.model.float(), (x.float(), y))
        np.testing.assert_allclose(built.losses()[:, number], expected, rtol=1e-5)


def test_unknown_ids_and_columns_are_refused(built):
    for wrong in (-1, 12):
        with pytest.raises(ArgumentError, match=f"There is no training id {wrong}; ids go from 0 to 11"):
            built.rows(np.array([3, wrong]))
    with pytest.raises(ArgumentError, match="no column 'colour'. It has: word, count, rate, odd"):
        built.column("colour")


def test_a_non_finite_gradient_leaves_finished_shards(task, tmp_path):
    x, y = (tensor.clone() for tensor in task.train.tensors)
    x[8] = float("nan")  # none of those that are looked at before
    bad = replace(task, train=TensorDataset(x, y))
    for finished_before in (2, 2):  # the second run meets the same example, and harms nothing
        with pytest.raises(NonFiniteGradientError, match="Training example 8 .* checkpoint 0"):
            gradindex.build(bad, tmp_path / "store", **OPTIONS)
        assert len(shards(tmp_path / "store")) == finished_before


def test_a_full_disk_leaves_finished_shards_and_no_rubbish(task, tmp_path, monkeypatch):
    fsync, calls = files.os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) > 8:  # the plan and its folder; two shards, each with its seal and its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        StoreError, match=r"00002\.h5 cannot be written: No space left on device. Finished work is kept"
    ):
        gradindex.build(task, tmp_path / "store", **OPTIONS)
    monkeypatch.undo()
    assert len(shards(tmp_path / "store")) == 2
    assert [path for path in (tmp_path / "store").rglob("*") if "tmp" in path.name] == []
    assert gradindex.build(task, tmp_path / "store", **OPTIONS).verify() == []


@pytest.mark.slow
def test_workers_read_the_same_examples(task, built, tmp_path):
    other = gradindex.build(task, tmp_path / "other", **OPTIONS, workers=2)
    np.testing.assert_array_equal(other.rows(np.arange(12)), built.rows(np.arange(12)))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"shard_rows": 0}, {"workers": -1}])
def test_impossible_sizes_are_refused(task, tmp_path, options):
    with pytest.raises(ArgumentError, match="must be at least|must be from 0 to"):
        gradindex.build(task, tmp_path / "store", **options)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "shards"), [(30, [10, 10, 10]), (100, [25, 25, 25, 25])])
def test_a_large_store_has_a_limited_number_of_files(n, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "_SHARD_ROWS", 10)
    monkeypatch.setattr(building, "_SHARDS", 4)
    store = gradindex.build(toys.make_task(tmp_path, n_train=n), tmp_path / "store", batch_size=5)
    assert [entry.rows for entry in store.manifest.shards] == shards


def test_self_influence_ranks_by_sum_then_by_id(tmp_path, monkeypatch):
    task = toys.make_task(tmp_path, n_train=40)
    x, y = task.train.tensors
    task = replace(task, train=TensorDataset(x[:8].repeat(5, 1), y[:8].repeat(5)))  # five of each sum
    store = gradindex.build(task, tmp_path / "store", shard_rows=7, batch_size=40)
    sums = store.self_influence().sum(1)
    order = np.lexsort((np.arange(40), -sums))
    for k in (1, 3, 7, 20, 40):
        ids, top = store.top_self_influence(k)
        np.testing.assert_array_equal(ids, order[:k])
        np.testing.assert_array_equal(top, sums[order[:k]])
    only = np.array([1, 2, 3, 18, 31, 39])
    expected = [i for i in order if i in only]
    assert store.top_self_influence(4, only)[0].tolist() == expected[:4]
    assert store.top_self_influence(30, only)[0].tolist() == expected
    assert store.top_self_influence(5, only[:0])[0].tolist() == []
