"""docs/format.md is enough to write a reader and the random map: this file uses h5py, json and hashlib alone."""

import hashlib
import json

import h5py
import numpy as np
import reference
import toys

import gradindex
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


def test_rows_are_what_the_page_says(tmp_path):
    task = toys.make_task(tmp_path, columns={"word": [f"é{i}" for i in range(12)]})
    gradindex.build(task, tmp_path / "store", projection=Projection(dim=7, seed=5), batch_size=4, shard_rows=4)
    gradients = reference.gradients(task, task.train).numpy()  # (12, 3, parameters)

    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    described = json.dumps({"data": manifest["data"], "map": manifest["map"]}, sort_keys=True)
    assert manifest["fingerprint"] == hashlib.sha256(described.encode()).hexdigest()
    assert (manifest["format"], manifest["version"], manifest["sealed"]) == ("gradindex-store", 0, True)
    assert [shard["start"] for shard in manifest["shards"]] == [0, 4, 8]
    for number, shard in enumerate(manifest["shards"]):
        path = tmp_path / "store" / "shards" / f"{number:05d}.h5"
        content = path.read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
        with h5py.File(path) as file:
            assert file.attrs["fingerprint"] == manifest["fingerprint"]
            ids = file["ids"][:]
            assert ids.tolist() == list(range(shard["start"], shard["start"] + 4))
            assert [word.decode() for word in file["columns/word"]] == [f"é{i}" for i in ids]
            for row, example in enumerate(ids):
                expected = []
                for c, rate in enumerate(toys.RATES):
                    flat, block = gradients[example, c] * rate**0.5, np.zeros(7)
                    # PyTorch lists weight (5, 6), bias (5,), weight (3, 5), bias (3,); the bias is the last column.
                    for layer, begin, rows, columns in (("0", 0, 5, 6), ("2", 35, 3, 5)):
                        weight = flat[begin : begin + rows * columns].reshape(rows, columns)
                        bias = flat[begin + rows * columns : begin + rows * (columns + 1)]
                        block += sketch(np.column_stack([weight, bias]), 7, key(5, c, layer))
                    expected.append(block)
                np.testing.assert_allclose(file["rows"][row], np.concatenate(expected), rtol=1e-4, atol=1e-5)
                norms = np.array(toys.RATES) * np.square(gradients[example]).sum(1)
                np.testing.assert_allclose(file["self_influence"][row], norms, rtol=1e-4)
