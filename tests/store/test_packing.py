"""Packed factors: what a product changes by is bounded for each row, what would break it is whole, and all is kept."""

import json

import h5py
import numpy as np
import pytest
import toys
from click.testing import CliRunner

import gradindex
from gradindex.cli import main
from gradindex.errors import ArgumentError, MismatchError, StoreError
from gradindex.projection import Projection
from gradindex.store import packing, upkeep
from gradindex.store.packing import Packing

CLASSES, FEATURES = 300, 24
GENERATOR = np.random.default_rng(0)
SHARP = (GENERATOR.dirichlet(np.full(CLASSES, 0.02), 40)).astype(np.float32)
FLAT = GENERATOR.standard_normal((40, 2049)).astype(np.float32)
WAYS = [Packing(kept, bits) for kept in (0, 16) for bits in (8, 12, 16, 24)]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("side", [SHARP, FLAT, -FLAT[:, :7].copy(), 1e30 * FLAT], ids=["sharp", "flat", "odd", "large"])
def test_a_number_is_the_nearest_that_its_bits_have(way, side):
    way = Packing(min(way.kept, side.shape[1] // 2), way.bits)
    arrays = way.packed(side)
    back = way.unpacked(arrays).astype(np.float64)
    others = side.astype(np.float64)
    if way.kept:
        places = arrays["places"].astype(int)
        np.testing.assert_array_equal(np.take_along_axis(back, places, 1), np.take_along_axis(side, places, 1))
        assert np.abs(arrays["values"]).min(1).tolist() == np.sort(np.abs(side))[:, -way.kept].tolist()
        others = np.ma.array(others, mask=False)
        np.put_along_axis(others.mask, places, True, 1)
    step = (others.max(1) - others.min(1)) / (2**way.bits - 1)
    # Half a step, and float32's rounding of the number itself and of its place among the steps.
    allowed = 0.51 * np.asarray(step)[:, None] + 3e-7 * np.abs(side).max(1, keepdims=True)
    assert (np.abs(back - side) <= allowed).all()
    specs = way.specs(side.shape[1])
    assert {name: (array.shape[1:], array.dtype) for name, array in arrays.items()} == {
        name: (shape, np.dtype(kind)) for name, (shape, kind) in specs.items()
    }
    assert way.row_bytes(side.shape[1]) == sum(array[0].nbytes for array in arrays.values())


def test_rows_of_equal_numbers_and_of_zeros_are_exact():
    side = np.stack([np.zeros(300), np.full(300, 0.1), np.r_[1.0, np.zeros(299)]]).astype(np.float32)
    for way in WAYS:
        np.testing.assert_allclose(way.unpacked(way.packed(side)), side, rtol=1e-6)
        assert (way.errors(side, way.packed(side)) < 1e-6).all()


def test_what_is_chosen_keeps_the_bound_in_the_least_room():
    features = np.abs(FLAT)
    ((x, delta),) = packing.packing_of({(0, 0): (features, SHARP), (1, 0): (features, SHARP)}, "float32").values()
    changed = x.errors(features, x.packed(features)), delta.errors(SHARP, delta.packed(SHARP))
    assert packing.fine(*changed, "float32").mean() > 0.9
    assert x.bits == 24 and delta.bits in (12, 16)
    assert x.row_bytes(2049) + delta.row_bytes(CLASSES) < 0.8 * 4 * (2049 + CLASSES)
    assert packing.packing_of({(0, 0): (features, FLAT[:, :300].copy())}, "float32") == {}  # nothing is sparse
    assert packing.packing_of({(0, 0): (features, SHARP[:, :100].copy())}, "float32") == {}  # few outputs


@pytest.fixture
def task(tmp_path):
    return toys.sharp_task(tmp_path)


@pytest.fixture
def few_bits(monkeypatch):
    """So few that some rows break the bound."""
    monkeypatch.setattr(packing, "_chosen", lambda sample, kind: (Packing(0, 24), Packing(16, 12)))


def errors(store, whole):
    """By how much, as a share of the norms, what one store has of each row differs from the other: (layers, rows)."""
    mine, theirs = (each.factors(store.ids) for each in (store, whole))
    share = lambda a, b: np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)  # noqa: E731
    return np.stack([sum(map(share, mine[key], sides)) for key, sides in theirs.items()])


def check_same_scores(store, whole, task, bound=2e-6):
    asked = range(8)
    packed = gradindex.load(task, store.folder).proponents(asked, k=len(store), candidates=len(store))
    exact = gradindex.load(task, whole.folder).proponents(asked, k=len(store), candidates=len(store))
    reference = gradindex.exact_scores(task, list(task.query), ids=store.ids, precision="float64")
    norms = np.sqrt(store.self_influence().sum(1))
    for query in range(8):
        at = np.searchsorted(store.ids, packed.ids[query])
        size = norms.max() * np.sqrt(gradindex.exact_scores(task, [task.query[query]]).__abs__().max())
        np.testing.assert_allclose(packed.scores[query], reference[query, at], atol=bound * max(size, norms.max() ** 2))
    assert (packed.ids[:, :5] == exact.ids[:, :5]).all()


def test_a_build_packs_unasked_and_answers_as_whole_factors_do(tmp_path, task):
    store, whole = toys.with_factors(tmp_path, task, "packed"), toys.with_factors(tmp_path, task, "whole", pack=False)
    assert list(store.manifest.packing) == [0] and not whole.manifest.packing
    assert (store.manifest.version, whole.manifest.version) == (2, 1)
    assert "packed" in repr(store) and "packed" not in repr(whole)
    assert errors(store, whole).max() <= 1.01e-6
    check_same_scores(store, whole, task)
    assert store.verify() == []


def test_rows_that_would_break_the_bound_are_whole(tmp_path, task, few_bits):
    store, whole = toys.with_factors(tmp_path, task, "packed"), toys.with_factors(tmp_path, task, "whole", pack=False)
    with h5py.File(next((tmp_path / "packed" / "shards").glob("*.h5"))) as file:
        of = file["factors/0/0/whole/of"][:]
        assert 0 < len(of) <= 24 and file["factors/0/0/whole/activations"].shape == (len(of), FEATURES + 1)
        np.testing.assert_array_equal(
            file["factors/0/0/whole/output_gradients"][:], whole.factors(store.ids[of])[0, 0][1]
        )
    assert errors(store, whole).max() <= 1.01e-6
    check_same_scores(store, whole, task)


def test_what_changes_a_store_keeps_what_is_packed_and_what_is_whole(tmp_path, task, few_bits):
    store = toys.with_factors(tmp_path, task, "store")
    before = {i: [side.copy() for pair in store.factors(np.array([i])).values() for side in pair] for i in store.ids}
    gradindex.store.remove(store.folder, [1, 2, 3, 30, *range(48, 58)])
    store = gradindex.store.compact(store.folder)
    assert store.manifest.packing and store.verify() == []
    for i in store.ids:
        now = [side for pair in store.factors(np.array([i])).values() for side in pair]
        assert all(np.array_equal(a, b) for a, b in zip(now, before[i], strict=True))
    other = toys.with_factors(tmp_path, task, "other", bases_from=store.folder, pack=False)
    merged = gradindex.store.merge(store.folder, other.folder, offset=100)
    assert merged.verify() == [] and len(merged) == len(store) + 60
    whole = other.factors(np.array([7]))[1, 0]
    for mine, theirs in zip(merged.factors(np.array([107]))[1, 0], whole, strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-6 * np.linalg.norm(theirs)


def test_a_damaged_block_of_what_is_whole_is_found(tmp_path, task, few_bits):
    store = toys.with_factors(tmp_path, task, "store")
    path = next((tmp_path / "store" / "shards").glob("*.h5"))
    place = json.loads(path.with_suffix(".json").read_text())["arrays"]["factors/1/0/whole/activations"]
    with path.open("r+b") as file:
        file.seek(place["offset"] + 5)
        byte = file.read(1)[0]
        file.seek(place["offset"] + 5)
        file.write(bytes([byte ^ 1]))
    (problem,) = gradindex.GradientStore(store.folder).verify()
    assert "is damaged" in problem and "ids 0 to 23" in problem


def test_an_interrupted_build_goes_on_with_its_own_packing(tmp_path, task, monkeypatch):
    whole = toys.with_factors(tmp_path, task, "once")
    calls = []
    shard = gradindex.store.Job.shard

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return shard(self, *args)

    monkeypatch.setattr(gradindex.store.Job, "shard", failing)
    with pytest.raises(KeyboardInterrupt):
        toys.with_factors(tmp_path, task, "twice")
    monkeypatch.undo()
    monkeypatch.setattr(packing, "_KEPT", (0,))  # another choice now
    resumed = toys.with_factors(tmp_path, task, "twice")
    assert resumed.manifest.packing == whole.manifest.packing
    for name in ("0001-00000", "0001-00002"):
        one, other = (tmp_path / store / "shards" / f"{name}.h5" for store in ("once", "twice"))
        assert one.read_bytes() == other.read_bytes()


def test_upgrading_packs_a_store_of_version_1_without_gradients(tmp_path, task):
    store, packed = toys.with_factors(tmp_path, task, "store", pack=False), toys.with_factors(tmp_path, task, "packed")
    gradindex.store.remove(store.folder, [5])
    result = CliRunner().invoke(main, ["compact", str(store.folder), "--upgrade"])
    assert result.exit_code == 0 and "less than before" in result.output
    store = gradindex.GradientStore(store.folder)
    assert store.manifest.version == 2 and store.manifest.packing == packed.manifest.packing
    assert store.verify() == [] and len(store) == 59
    for key, sides in store.factors(store.ids).items():
        for mine, theirs in zip(sides, packed.factors(store.ids)[key], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    generation = store.manifest.generation
    assert upkeep.compact(store.folder, upgrade=True).manifest.generation == generation  # given again


def test_a_packed_build_is_not_gone_on_with_as_a_whole_one(tmp_path, task, monkeypatch):
    toys.with_factors(tmp_path, task, "ended")
    monkeypatch.setattr(gradindex.store.Job, "finish", lambda self: None)
    with pytest.raises(StoreError):  # it has not finished
        toys.with_factors(tmp_path, task, "begun")
    monkeypatch.undo()
    for name in ("ended", "begun"):
        with pytest.raises(MismatchError, match="whose factors are packed, but pack is False. Rerun it without pack"):
            toys.with_factors(tmp_path, task, name, pack=False)
        assert toys.with_factors(tmp_path, task, name).manifest.packing


@pytest.mark.parametrize("factors", [None, "float32"])
def test_a_store_that_cannot_be_upgraded_stays_and_says_why(tmp_path, factors):
    task = toys.make_task(tmp_path, layers="2")
    store = gradindex.build(task, tmp_path / "store", projection=Projection("none"), factors=factors)
    because = "only those with 256 or more are packed" if factors else "has no factors"
    before = (store.folder / "manifest.json").read_bytes()
    with pytest.raises(ArgumentError, match=because):
        upkeep.compact(store.folder, upgrade=True)
    assert (store.folder / "manifest.json").read_bytes() == before


def test_a_layer_without_sparse_outputs_is_kept_whole_and_said_so(tmp_path, capsys):
    task = toys.make_task(tmp_path, layers="2")
    store = gradindex.build(task, tmp_path / "store", projection=Projection("none"), factors="float32", pack=True)
    assert "factors of 2 are kept whole: it has 3 outputs, and only those with 256 or more" in capsys.readouterr().err
    assert store.manifest.version == 1
    with pytest.raises(ArgumentError, match="pack is about factors"):
        gradindex.build(task, tmp_path / "other", pack=True)


def test_half_precision_is_packed_within_its_own_rounding(tmp_path, task):
    store = toys.with_factors(tmp_path, task, "half", factors="float16")
    whole = toys.with_factors(tmp_path, task, "whole", pack=False)
    assert store.manifest.packing[0][0].bits < 24
    assert errors(store, whole).max() <= 1.01e-3
    hits = gradindex.load(task, store.folder).proponents(0, k=3)
    assert hits.scored == "float16-factor"


def test_a_forged_packing_is_refused(tmp_path, task):
    store = toys.with_factors(tmp_path, task, "store")
    path = store.folder / "manifest.json"
    from gradindex.files import with_checksum

    value = {name: item for name, item in json.loads(path.read_text()).items() if name != "sha256"}
    for packing_, why in (({"0": [[0, 24], [16, 17]]}, "for 300 numbers"), ({"1": [[0, 24], [16, 16]]}, "of no layer")):
        path.write_text(with_checksum(value | {"packing": packing_})[0])
        with pytest.raises(StoreError, match=why):
            gradindex.GradientStore(store.folder)
    path.write_text(with_checksum(value | {"version": 1})[0])
    with pytest.raises(StoreError, match="needs version 2, not 1"):
        gradindex.GradientStore(store.folder)
