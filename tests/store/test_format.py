"""docs/format.md is enough to write a reader and the random map: this file uses h5py, json and hashlib alone."""

import hashlib
import json
import runpy
import shutil
from functools import partial

import h5py
import numpy as np
import pytest
import reference
import toys
from places import GOLDEN

import gradindex
from gradindex.errors import StoreError
from gradindex.projection import Projection

MASK = (1 << 64) - 1


def key(*texts):
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, texts)).encode()).digest()[:8], "little")


def value(stream, n):
    x = (stream + (n + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def sketch(gradient, dim, stream):
    """gradient: (rows, columns)."""
    hashes = {side: key(stream, side) for side in ("activations", "output_gradients")}
    place = lambda side, n: ((value(hashes[side], n) >> 32) * dim) >> 32  # noqa: E731  # reads like the page
    sign = lambda side, n: -1 if value(hashes[side], n) & 1 else 1  # noqa: E731
    block = np.zeros(dim)
    for (i, j), entry in np.ndenumerate(gradient):
        where = (place("activations", j) + place("output_gradients", i)) % dim
        block[where] += sign("activations", j) * sign("output_gradients", i) * entry
    return block


def digest_of(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checked(path):
    value = json.loads(path.read_text())
    assert value["sha256"] == digest_of({name: item for name, item in value.items() if name != "sha256"})
    return value


def test_rows_are_what_the_page_says(tmp_path):
    task = toys.make_task(tmp_path, columns={"word": [f"é{i}" for i in range(12)]})
    options = {"projection": Projection(dim=7, seed=5), "batch_size": 4, "shard_rows": 4, "factors": "float32"}
    gradindex.build(task, tmp_path / "store", **options)
    gradients = reference.gradients(task, task.train).numpy()  # (12, 3, parameters)

    manifest = checked(tmp_path / "store" / "manifest.json")
    assert manifest["fingerprint"] == digest_of({"map": manifest["map"], "version": 1})
    assert (manifest["format"], manifest["version"], manifest["needs"]) == ("gradindex-store", 1, [])
    assert (manifest["generation"], manifest["next_id"], manifest["removed"]) == (1, 12, [])
    assert [(shard["first"], shard["last"]) for shard in manifest["shards"]] == [(0, 3), (4, 7), (8, 11)]
    for number, shard in enumerate(manifest["shards"]):
        assert shard["name"] == f"0001-{number:05d}"
        path = tmp_path / "store" / "shards" / f"{shard['name']}.h5"
        seal, content = checked(path.with_suffix(".json")), path.read_bytes()
        assert (seal["sha256"], seal["bytes"], seal["map"]) == (shard["seal"], len(content), manifest["fingerprint"])
        assert seal["ids"] == [[shard["first"], shard["last"] + 1]]
        assert shard["data"] == digest_of({"ids": seal["ids"], "samples": seal["samples"]})
        assert [i for i, _ in seal["samples"]] == list(range(shard["first"], shard["last"] + 1))
        pieces = [content[i : i + seal["block_bytes"]] for i in range(0, len(content), seal["block_bytes"])]
        assert seal["blocks"] == "".join(hashlib.sha256(piece).hexdigest()[:32] for piece in pieces)
        with h5py.File(path) as file:
            assert (file.attrs["map"], file["rows"].attrs["row_type"]) == (manifest["fingerprint"], "float32")
            for name, place in seal["arrays"].items():
                count = int(np.prod(place["shape"]))
                raw = np.frombuffer(content, place["dtype"], count, place["offset"]).reshape(place["shape"])
                np.testing.assert_array_equal(raw, file[name][:])
            ids = file["ids"][:]
            assert ids.tolist() == list(range(shard["first"], shard["first"] + 4))
            assert [word.decode() for word in file["columns/word"]] == [f"é{i}" for i in ids]
            for row, example in enumerate(ids):
                expected = []
                for c, rate in enumerate(toys.RATES):
                    flat, block = gradients[example, c] * rate**0.5, np.zeros(7)
                    # PyTorch lists weight (5, 6), bias (5,), weight (3, 5), bias (3,); the bias is the last column.
                    for number_of, (layer, begin, rows, columns) in enumerate((("0", 0, 5, 6), ("2", 35, 3, 5))):
                        weight = flat[begin : begin + rows * columns].reshape(rows, columns)
                        bias = flat[begin + rows * columns : begin + rows * (columns + 1)]
                        gradient = np.column_stack([weight, bias])
                        block += sketch(gradient, 7, key(5, c, layer))
                        sides = [file[f"factors/{c}/{number_of}/{s}"][row] for s in ("output_gradients", "activations")]
                        np.testing.assert_allclose(np.outer(*sides), gradient, rtol=1e-4, atol=1e-5)
                    expected.append(block)
                np.testing.assert_allclose(file["rows"][row], np.concatenate(expected), rtol=1e-4, atol=1e-5)
                norms = np.array(toys.RATES) * np.square(gradients[example]).sum(1)
                np.testing.assert_allclose(file["self_influence"][row], norms, rtol=1e-4)


def golden_gradients():
    """(10, 2, 8) gradients of scripts/golden_store.py's task times sqrt(eta), by hand: 2 (y' - y) [x, 1]^T."""
    x = np.column_stack([np.arange(30).reshape(10, 3) % 7 - 3, np.ones(10)])
    y = np.arange(20).reshape(10, 2) % 5 - 2
    rows = []
    for number, rate in enumerate((0.5, 0.25)):
        weight = np.column_stack([(np.arange(6).reshape(2, 3) + number) / 8, [1, -1]])
        delta = 2 * (x @ weight.T - y) * rate**0.5
        rows.append(delta[:, :, None] * x[:, None])
    return np.stack(rows, 1).reshape(10, 2, 8)


@pytest.mark.parametrize(
    ("row_type", "tolerance"),
    [("float32", 1e-6), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 1 / 127), ("int4", 1 / 13.9)],
)
def test_stores_of_every_version_are_read(row_type, tolerance):
    store, expected = gradindex.GradientStore(GOLDEN / row_type), golden_gradients()
    assert store.verify() == []
    assert store.ids.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert store.column("word").tolist() == ["a", "é", "日本", "e", "f", "g", "h", "i", "j"]
    assert store.column("odd").tolist() == [False, True, False, False, True, False, True, False, True]
    largest = np.abs(expected[store.ids]).max(2, keepdims=True)
    rows = store.rows(store.ids).reshape(9, 2, 8)
    assert (np.abs(rows - expected[store.ids]) <= tolerance * largest).all()
    np.testing.assert_allclose(store.self_influence(), np.square(expected[store.ids]).sum(2), rtol=1e-6)
    for (checkpoint, _), (x, delta) in store.factors(store.ids).items():
        formed = (delta[:, :, None].astype(float) * x[:, None]).reshape(9, 8)
        np.testing.assert_allclose(formed, expected[store.ids, checkpoint], rtol=2e-3, atol=1e-6)


def many_factors():
    """Both sides, (10, 2, 17) and (10, 2, 256), of the golden store's classifier: x and delta."""
    x = (np.arange(160).reshape(10, 16) * 5 % 11) / 4
    x[4] /= 4
    x, sides = np.column_stack([x, np.ones(10)]), ([], [])
    for number, rate in enumerate((0.5, 0.25)):
        weight = ((np.arange(4096) ** 2).reshape(256, 16) * (7 + number) % 101 - 50) / 16
        logits = x[:, :-1] @ weight.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        sides[0].append(rate**0.5 * x)
        sides[1].append(p / p.sum(1, keepdims=True) - np.eye(256)[:10])
    return np.stack(sides[0], 1), np.stack(sides[1], 1)


def unpacked(file, place, kept, bits):
    """A side of packed factors, as the page says."""
    codes = file[f"{place}/codes"][:].astype(int) + (128 if bits < 16 else 32768)
    if bits == 24:
        codes = codes * 256 + file[f"{place}/low"][:]
    elif bits == 12:
        low = file[f"{place}/low"][:].astype(int)
        codes = codes * 16 + np.stack([low & 15, low >> 4], 2).reshape(len(low), -1)[:, : codes.shape[1]]
    lowest, step = file[f"{place}/scales"][:].astype(float).T[:, :, None]
    numbers = lowest + step * codes
    if kept:
        np.put_along_axis(numbers, file[f"{place}/places"][:].astype(int), file[f"{place}/values"][:].astype(float), 1)
    return numbers


def test_packed_factors_are_what_the_page_says():
    manifest, expected = checked(GOLDEN / "packed" / "manifest.json"), many_factors()
    assert manifest["version"] == 2
    packing, whole = manifest["packing"]["0"], 0
    for shard in ("0001-00000", "0001-00001"):
        with h5py.File(GOLDEN / "packed" / "shards" / f"{shard}.h5") as file:
            ids = file["ids"][:]
            for c in range(2):
                errors = []
                for side, how, mine in zip(("activations", "output_gradients"), packing, expected, strict=True):
                    numbers = unpacked(file, f"factors/{c}/0/{side}", *how)
                    if f"factors/{c}/0/whole/of" in file:
                        of = file[f"factors/{c}/0/whole/of"][:]
                        numbers[of] = file[f"factors/{c}/0/whole/{side}"][:]
                        whole += len(of)
                    right = mine[ids, c]
                    errors.append(np.linalg.norm(numbers - right, axis=1) / np.linalg.norm(right, axis=1))
                assert (sum(errors) < 1.5e-6).all()  # and the model's own rounding
    assert whole


def test_a_store_of_packed_factors_is_read():
    store, expected = gradindex.GradientStore(GOLDEN / "packed"), many_factors()
    assert store.verify() == [] and store.ids.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    for (checkpoint, _), sides in store.factors(store.ids).items():
        for mine, right in zip(sides, expected, strict=True):
            np.testing.assert_allclose(mine, right[store.ids, checkpoint], atol=2e-6 * np.abs(right).max())


@pytest.mark.slow
def test_the_golden_stores_are_what_would_be_written_now(tmp_path):
    """But for what depends on versions of torch and HDF5: checksums of checkpoint files and places in a file."""
    code = runpy.run_path(str(GOLDEN.parents[1] / "scripts" / "golden_store.py"))
    code["main"](tmp_path)
    for row_type in ("float32", "float16", "bfloat16", "int8", "int4", "packed"):
        now, then = (json.loads((folder / row_type / "manifest.json").read_text()) for folder in (tmp_path, GOLDEN))
        for side in [now] if now["version"] == 1 else [now, then]:  # information, which old stores do not have
            assert side.pop("tracked")["left_out"] == []
            assert [source["kind"] for source in side.pop("sources")] == ["weights"] * 2
        for side in (now, then):
            for checkpoint in side["map"]["checkpoints"]:
                del checkpoint["sha256"]
            for shard in side["shards"]:
                del shard["seal"]
            for name in ("sha256", "fingerprint", "threads"):
                del side[name]
        assert now == then
        for shard in ("0001-00000", "0001-00001"):
            files = [h5py.File(folder / row_type / "shards" / f"{shard}.h5") for folder in (tmp_path, GOLDEN)]
            names = ["ids", "rows", "self_influence", *(["columns/word"] if "columns" in files[0] else [])]
            for name in names:
                now, then = (file[name][:] for file in files)
                same = np.array_equal if name == "columns/word" else partial(np.allclose, rtol=1e-5, atol=1e-6)
                assert same(now, then)
            for file in files:
                file.close()


def test_a_feature_that_a_reader_does_not_know_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "float32", tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text()) | {"needs": ["rows in parquet"]}
    del manifest["sha256"]
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}))
    with pytest.raises(StoreError, match="uses rows in parquet, which this gradindex does not know. Upgrade it"):
        gradindex.GradientStore(tmp_path / "store")
