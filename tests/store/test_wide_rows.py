"""Wide rows in a store: what the page says of them, and that whatever changes a store keeps them."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import reference
import toys
from places import GOLDEN
from test_format import golden_gradients, key, sketch, value

import gradindex
from gradindex import building, growth
from gradindex.errors import ArgumentError, MismatchError, StoreError
from gradindex.projection import Projection
from gradindex.store import documents

WIDE = 64
OPTIONS = {"projection": Projection(dim=8, seed=3), "batch_size": 4, "shard_rows": 4, "wide": WIDE}


@pytest.fixture
def task(tmp_path):
    return toys.make_task(tmp_path)


def first(task, n):
    return replace(task, train=toys.TensorDataset(*task.train[:n]))


def wide_of(store):
    """Codes, scales and norms of all rows."""
    return store.wide(store.ids)


def same(one, other, rtol=0):
    for mine, theirs in zip(wide_of(one), wide_of(other), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol)


def turned(block, stream):
    """Every frequency turned by an angle of its own; the first and the last one keep or change their sign."""
    count = len(block) // 2 + 1
    angles = np.array([value(stream, n) / 2**64 * 2 * np.pi for n in range(count)])
    angles[[0, -1]] = np.where(angles[[0, -1]] < np.pi, 0, np.pi)
    return np.fft.irfft(np.fft.rfft(block) * np.exp(1j * angles), len(block))


def check_coded(block, packed, scale, norm):
    """A block, and what is stored of it."""
    numbers = np.concatenate([packed & 15, packed >> 4]).astype(int) - 8
    step = 2.6 / 7 * np.linalg.norm(block) / len(block) ** 0.5
    assert np.abs(numbers - np.clip(np.rint(block / step), -7, 7)).sum() <= 1  # a number near the edge
    np.testing.assert_allclose(scale, block @ block / (numbers @ block), rtol=2e-3)
    np.testing.assert_allclose(norm, np.linalg.norm(block), rtol=1e-3, atol=1e-6)


def test_the_golden_store_with_wide_rows_is_read():
    store, gradients = gradindex.GradientStore(GOLDEN / "wide"), golden_gradients().reshape(10, 2, 2, 4)
    assert store.verify() == [] and store.manifest.wide == 16
    assert store.ids.tolist() == [0, 1, 2, *range(4, 10)]
    coded = store.wide(store.ids)
    for row, example in enumerate(store.ids):
        for c in range(2):
            block = turned(sketch(gradients[example, c], 16, key(0, c, "0", "wide")), key(0, c, "turns"))
            if block.any():
                check_coded(block, np.split(coded.codes[row], 2)[c], coded.scales[row, c], coded.norms[row, c])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensorsketch", "fitted"])
def test_wide_rows_are_what_the_page_says(task, tmp_path, kind):
    """docs/format.md is enough to write a reader, with h5py and NumPy alone."""
    store = gradindex.build(task, tmp_path / "store", **OPTIONS | {"projection": Projection(kind, 8, seed=3)})
    gradients, bases = reference.gradients(task, task.train).numpy(), store.bases()
    for number, entry in enumerate(store.manifest.shards):
        with h5py.File(tmp_path / "store" / "shards" / f"{entry.name}.h5") as file:
            codes, scales, norms = (file[name][:] for name in ("wide", "wide_scales", "wide_norms"))
        for row in range(4):
            for c, rate in enumerate(toys.RATES):
                flat, block = gradients[4 * number + row, c] * rate**0.5, np.zeros(WIDE)
                for layer, (name, begin, rows, columns) in enumerate((("0", 0, 5, 6), ("2", 35, 3, 5))):
                    weight = flat[begin : begin + rows * columns].reshape(rows, columns)
                    gradient = np.column_stack([weight, flat[begin + rows * columns : begin + rows * (columns + 1)]])
                    if bases is not None:
                        left, right = (side.astype(float) for side in bases[c, layer])
                        gradient = gradient - left @ (left.T @ gradient @ right) @ right.T
                    block += sketch(gradient, WIDE, key(3, c, name, "wide"))
                block = turned(block, key(3, c, "turns"))
                check_coded(block, np.split(codes[row], 3)[c], scales[row, c], norms[row, c])


@pytest.mark.slow
def test_what_changes_a_store_keeps_its_wide_rows(task, tmp_path):
    whole = gradindex.build(task, tmp_path / "whole", **OPTIONS)
    store = gradindex.build(first(task, 8), tmp_path / "store", **OPTIONS)
    grown = gradindex.add(task, store.folder)
    same(grown, whole)
    shorter = gradindex.store.remove(grown.folder, [0, 5, 6, 9])
    np.testing.assert_array_equal(wide_of(shorter).codes, whole.wide(shorter.ids).codes)
    compacted = gradindex.store.compact(grown.folder)
    assert compacted.verify() == [] and compacted.manifest.wide == WIDE
    np.testing.assert_array_equal(wide_of(compacted).scales, whole.wide(compacted.ids).scales)
    assert wide_of(compacted)[0].shape == (8, 3 * WIDE // 2) and len(compacted.wide(np.array([], int)).norms) == 0


@pytest.mark.slow
def test_stores_with_wide_rows_are_merged_and_one_without_them_is_refused(task, tmp_path):
    store, other = (gradindex.build(task, tmp_path / name, **OPTIONS) for name in ("store", "other"))
    plain = gradindex.build(task, tmp_path / "plain", **OPTIONS | {"wide": None})
    with pytest.raises(MismatchError, match="wide rows differ"):
        gradindex.store.merge(store.folder, plain.folder, offset=12)
    merged = gradindex.store.merge(store.folder, other.folder, offset=12)
    np.testing.assert_array_equal(merged.wide(np.arange(12, 24)).codes, wide_of(other).codes)
    with pytest.raises(ArgumentError, match="has no wide rows. Build a store with wide=16384"):
        plain.wide(plain.ids)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"unit_norm": True}, {"projection": Projection("fitted", 8)}])
def test_a_checkpoint_is_added_to_wide_rows(task, tmp_path, options):
    options = OPTIONS | options
    whole = gradindex.build(task, tmp_path / "whole", **options)
    store = gradindex.build(replace(task, checkpoints=task.checkpoints[:2]), tmp_path / "store", **options)
    longer = growth.add_checkpoint(task, store.folder)
    np.testing.assert_array_equal(wide_of(longer).codes, wide_of(whole).codes)
    same(longer, whole, rtol=1e-5)


def test_a_damaged_shard_gets_its_wide_rows_back(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    before = wide_of(store)
    path = store.folder / "shards" / f"{store.manifest.shards[1].name}.h5"
    content = bytearray(path.read_bytes())
    place = gradindex.GradientStore(store.folder)._shards.seal(1)["arrays"]["wide"]["offset"]
    content[place + 5] ^= 16
    path.write_bytes(content)
    damaged = gradindex.GradientStore(store.folder)
    with pytest.raises(StoreError, match="is damaged"):
        damaged.wide(np.array([5]))
    assert len(growth.repair(task, store.folder)) == 1
    np.testing.assert_array_equal(wide_of(gradindex.GradientStore(store.folder)).codes, before.codes)


def test_an_interrupted_build_goes_on_with_the_same_wide_rows_alone(task, tmp_path):
    whole = gradindex.build(task, tmp_path / "whole", **OPTIONS)
    building.build_part(task, tmp_path / "store", (1, 2), **OPTIONS)
    with pytest.raises(MismatchError, match="wide rows differ"):
        gradindex.build(task, tmp_path / "store", **OPTIONS | {"wide": 128})
    same(gradindex.build(task, tmp_path / "store", **OPTIONS), whole)


@pytest.mark.slow
def test_a_reader_that_does_not_know_wide_rows_refuses_a_store_that_has_them(task, tmp_path, monkeypatch):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    plain = gradindex.build(task, tmp_path / "plain", **OPTIONS | {"wide": None})
    assert store.manifest.needs == ["wide"] and store.manifest.to_json()["wide"] == WIDE
    assert plain.manifest.needs == [] and "wide" not in plain.manifest.to_json()
    assert "wide rows of 64 a checkpoint" in repr(store)
    assert "wide rows of 64 numbers a checkpoint" in toys.call("info", store.folder).stdout
    monkeypatch.setattr(documents, "FEATURES", ("dates",))
    with pytest.raises(StoreError, match="uses wide, which this gradindex does not know"):
        gradindex.GradientStore(store.folder)
    gradindex.GradientStore(plain.folder)


def test_an_odd_number_of_wide_numbers_is_damage(task, tmp_path):
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    with pytest.raises(StoreError, match="wide is 63, but must be even"):
        documents.write_manifest(store.folder, replace(store.manifest, wide=63))


def test_a_disk_too_small_for_wide_rows_is_told_what_fits(task, tmp_path, monkeypatch):
    estimated = building.estimate(task, tmp_path / "store", **OPTIONS)
    assert estimated.wide_bytes == 3 * (WIDE // 2 + 8) and "120 bytes of it wide rows" in str(estimated)
    room = estimated.disk_bytes - 12 * 3 * WIDE // 4
    monkeypatch.setattr(building, "free_bytes", lambda folder: room)
    monkeypatch.setattr("gradindex.store.layout.free_bytes", lambda folder: room)
    with pytest.raises(StoreError, match="still needs about .* or store less: wide=32 fits"):
        gradindex.build(task, tmp_path / "store", **OPTIONS)
    monkeypatch.setattr(building, "free_bytes", lambda folder: 1000)
    monkeypatch.setattr("gradindex.store.layout.free_bytes", lambda folder: 1000)
    with pytest.raises(StoreError, match="or store less: leave wide out"):
        gradindex.build(task, tmp_path / "store", **OPTIONS)
