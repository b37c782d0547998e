"""Types of rows: what is stored is the nearest number that the type has, and too large ones are refused."""

import numpy as np
import pytest
import torch
import toys

import gradindex
from gradindex.errors import ArgumentError
from gradindex.evaluation import recall_at_k
from gradindex.projection import Projection
from gradindex.store.encoding import ROW_TYPES, decode, encode

ROWS = (np.random.default_rng(0).standard_normal((50, 24)) * np.logspace(-3, 3, 50)[:, None]).astype(np.float32)


def name(row):
    return f"row {row}"


def there_and_back(rows, row_type, checkpoints=3):
    stored = encode(rows, row_type, checkpoints, name)
    return decode(stored["rows"], stored.get("scales"), row_type)


def test_float32_is_kept_to_the_bit():
    assert there_and_back(ROWS, "float32") is ROWS


def test_bfloat16_rounds_as_torch_does():
    bits = np.random.default_rng(1).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    numbers = bits.view(np.float32)
    numbers = numbers[np.isfinite(numbers) & (np.abs(numbers) < 3e38)][None]
    expected = torch.from_numpy(numbers).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(there_and_back(numbers, "bfloat16", 1), expected)


def test_float16_rounds_to_the_nearest():
    np.testing.assert_array_equal(there_and_back(ROWS, "float16"), ROWS.astype(np.float16).astype(np.float32))


def test_int8_has_a_scale_for_each_row_and_checkpoint():
    rows = ROWS.copy()
    rows[3, 8:16] = 0
    back = there_and_back(rows, "int8")
    steps = np.abs(rows.reshape(50, 3, 8)).max(2, keepdims=True) / 127
    assert (np.abs(back - rows).reshape(50, 3, 8) <= 0.5001 * steps).all()
    assert not back[3, 8:16].any()
    np.testing.assert_allclose(there_and_back(back, "int8"), back, rtol=1e-6)  # storing it again changes nothing


@pytest.mark.parametrize(("row_type", "largest"), [("float16", 65504), ("bfloat16", 3.4e38)])
def test_a_number_too_large_is_refused_with_the_row(row_type, largest):
    rows = np.ones((4, 6), dtype=np.float32)
    rows[2, 5] = -largest if row_type == "float16" else -3.389e38
    there_and_back(rows, row_type, 1)
    rows[2, 5] *= 1.003
    with pytest.raises(ArgumentError, match=f"row 2 has a number of size .* more than {row_type} holds.*int8"):
        encode(rows, row_type, 1, name)


def test_a_build_whose_rows_do_not_fit_their_type_names_the_example(tmp_path):
    task = toys.make_task(tmp_path, loss=lambda model, batch: 1e6 * toys.cross_entropy(model, batch))
    with pytest.raises(ArgumentError, match=r"Training example \d+ has a number of size .* more than float16 holds"):
        gradindex.build(task, tmp_path / "store", row_type="float16")
    assert gradindex.build(task, tmp_path / "store2", row_type="int8").verify() == []


@pytest.mark.slow
@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_every_type_answers_nearly_as_float32_does(tmp_path, row_type):
    layers = "2" if row_type == "int4" else None  # 54 numbers, where all layers have 159
    task = toys.make_task(tmp_path, n_train=200, layers=layers)
    store = gradindex.build(task, tmp_path / "store", projection=Projection("none"), row_type=row_type)
    truth = gradindex.exact_scores(task, list(task.query))
    retriever = gradindex.load(task, store.folder)
    estimates = retriever.proponents(range(4), k=20, rerank="none")
    assert recall_at_k(truth, estimates.ids, 20).mean() >= (0.75 if row_type == "int4" else 0.9)
    exact = retriever.proponents(range(4), k=20, candidates=40)
    assert recall_at_k(truth, exact.ids, 20).mean() == 1
    mapped = store.mapped(0, 5, 9)
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int4": 0.5}
    assert (mapped.nbytes, mapped.flags.writeable) == (4 * store.dim * sizes[row_type], False)


@pytest.mark.slow
def test_row_bytes_are_those_of_the_type(tmp_path):
    task = toys.make_task(tmp_path)
    # int8 and int4 have three scales of 4 bytes as well.
    dims = {"float32": 24, "float16": 48, "bfloat16": 48, "int8": 84, "int4": 168}
    for row_type, dim in dims.items():
        store = gradindex.build(task, tmp_path / row_type, projection=Projection(row_bytes=96), row_type=row_type)
        assert store.dim == dim


def test_int4_needs_an_even_row(tmp_path):
    task = toys.make_task(tmp_path)  # three checkpoints
    with pytest.raises(ArgumentError, match="Rows have 21 numbers, but int4 keeps two in a byte. Choose an even dim."):
        gradindex.build(task, tmp_path / "store", projection=Projection(dim=7), row_type="int4")
    assert not (tmp_path / "store").exists()


def test_unknown_types_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="row_type is 'float8', but must be one of: float32, float16"):
        gradindex.build(toys.make_task(tmp_path), tmp_path / "store", row_type="float8")
    with pytest.raises(ArgumentError, match="factors is 'int8'"):
        gradindex.build(toys.make_task(tmp_path), tmp_path / "store", factors="int8")
