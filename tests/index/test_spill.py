"""Lists of directions and their opposites, with each row in several: whose lists, what is found, and found once."""

import json

import faiss
import numpy as np
import pytest
import toys

from gradindex.errors import ArgumentError
from gradindex.index import CompactIndex, LeftOut, Rows, Shape
from gradindex.index.kinds import spill

N, DIM = 3000, 64
IDS = np.arange(N, dtype=np.int64) * 3


def of_many_classes(n, seed):
    """Rows with a large part in one of many directions and smaller ones, of the other sign, in some others."""
    generator = np.random.default_rng(seed)
    rows = 0.01 * generator.standard_normal((n, DIM))
    for row in rows:
        own, *others = generator.choice(DIM, 4, replace=False)
        row[own] -= 1
        row[others] += generator.dirichlet((1, 1, 1))
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, DIM)))[0]
    return (rows * generator.lognormal(0, 0.3, (n, 1)) @ turn).astype(np.float32)


ROWS, QUERIES = of_many_classes(N, 1), of_many_classes(40, 2)


def blocks():
    return iter([(IDS[s : s + 700], ROWS[s : s + 700]) for s in range(0, N, 700)])


def built(copies, lists=2 * DIM):
    return CompactIndex.build(Shape("spill", DIM, lists, copies), ROWS, blocks)


@pytest.fixture(scope="module")
def index():
    return built(3)


def test_rows_go_where_matching_pursuit_puts_them():
    generator = np.random.default_rng(3)
    lines = generator.standard_normal((20, DIM)).astype(np.float32)
    lines /= np.linalg.norm(lines, axis=1, keepdims=True)
    lists, parts = spill.assigned(ROWS[:200], lines, 4, lines @ lines.T)
    for row, mine, sizes in zip(ROWS[:200].astype(np.float64), lists, parts, strict=True):
        taken = []
        for found, size in zip(mine, sizes, strict=True):
            products = lines.astype(np.float64) @ row
            products[taken] = 0
            best = int(np.abs(products).argmax())
            assert found == best + 20 * (products[best] < 0)
            assert size == pytest.approx(abs(products[best]), rel=1e-4, abs=1e-6)
            row = row - products[best] * lines[best]
            taken.append(best)


def test_a_row_of_zeros_stands_in_several_lists_as_well():
    lists, parts = spill.assigned(
        np.zeros((2, DIM), np.float32), np.eye(8, DIM, dtype=np.float32), 3, np.eye(8, dtype=np.float32)
    )
    assert [len(set(mine)) for mine in lists.tolist()] == [3, 3] and not parts.any()


def test_lines_are_learnt_whatever_the_signs():
    generator = np.random.default_rng(4)
    which, signs = generator.integers(0, 12, 2000), generator.choice((-1, 1), 2000)
    rows = 0.05 * generator.standard_normal((2000, DIM)).astype(np.float32)
    rows[np.arange(2000), which] += signs
    lines = spill.learnt(Rows(rows, lambda: iter([(np.arange(2000), rows)]), 0, ()), 36)
    np.testing.assert_allclose(np.linalg.norm(lines, axis=1), 1, rtol=1e-5)
    assert (np.abs(lines[:, :12]).max(0) > 0.9).all()


def test_opponents_need_rows_in_several_lists(index):
    once = built(1)
    for sign, gain in ((1, 0), (-1, 0.2)):
        true = IDS[np.argsort(-sign * QUERIES @ ROWS.T, axis=1)[:, :50]]
        several, alone = (toys.share(each.search(sign * QUERIES, 400, probes=8)[1], true) for each in (index, once))
        assert several > 0.9
        assert several >= alone + gain


def test_each_row_is_found_once_with_the_score_of_its_code(index):
    scores, ids = index.search(QUERIES, 500, probes=2 * DIM)
    assert all(len(set(found)) == 500 for found in ids.tolist()) and (ids >= 0).all()
    assert (np.diff(scores) <= 0).all()
    own = np.take_along_axis(QUERIES @ ROWS.T, ids // 3, 1)
    assert np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(scores, own, strict=True)]) > 0.7
    few, names = index.search(QUERIES[:1], N, probes=2)
    assert 0 < (names[0] >= 0).sum() < N
    assert (few[0][names[0] < 0] == -np.inf).all()
    gone = LeftOut(np.unique(ids[:, :20]))
    assert not np.isin(index.search(QUERIES, 100, probes=8, removed=gone)[1], gone.ids).any()


def test_plain_faiss_reads_it_and_meets_each_row_as_often_as_it_has_copies(index, tmp_path):
    index.save(tmp_path, {})
    told = json.loads((tmp_path / "manifest.json").read_text())
    assert told["shape"] == {"kind": "spill", "dim": DIM, "lists": 2 * DIM, "copies": 3} and told["rows"] == N
    plain = faiss.read_index(str(tmp_path / told["file"]["name"]))
    assert plain.ntotal == 3 * N
    faiss.extract_index_ivf(plain).nprobe = 2 * DIM
    names = plain.search(QUERIES[:5], 3 * N)[1]
    for found in names:
        np.testing.assert_array_equal(np.unique(found, return_counts=True)[1], np.full(N, 3))
    loaded = CompactIndex.load(tmp_path)
    for one, other in zip(loaded.search(QUERIES, 50, probes=8), index.search(QUERIES, 50, probes=8), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (("spill", 60, 8, 3), "dim is 60, but must be a multiple of 8"),
        (("spill", 64, 4, 3), "copies is 3, but must be from 1 to the directions, 2"),
        (("spill", 64, 2 * N + 2, 3), "lists is 6002, but must be from 2 to twice the number of rows .* 3000"),
        (("flat", 64, 0, 2), "copies is 2, but only spill has several copies of a row"),
    ],
)
def test_impossible_shapes_are_refused(shape, message):
    with pytest.raises(ArgumentError, match=message):
        CompactIndex.build(Shape(*shape), ROWS, blocks)


def test_memory_is_counted_with_the_copies():
    one, three = (Shape("spill", 64, 128, copies).bytes_for(1000) for copies in (1, 3))
    assert three - one == 2 * (2 * 1000 * (64 // 8 + 8) + 16 * 1000)


def test_many_directions_are_found_by_codes_first_and_nearly_as_well(monkeypatch):
    plain = built(3)
    monkeypatch.setattr(spill, "_CODED_FROM", 1)
    coded = built(3)
    queries = of_many_classes(50, seed=9)
    found = [index.search(queries, 20, probes=4)[1] for index in (plain, coded)]
    assert np.mean([np.isin(a, b).mean() for a, b in zip(*found, strict=True)]) > 0.97


@pytest.mark.parametrize(
    ("n_rows", "directions"), [(100, 40), (10_000, 400), (390_625, 2500), (1_281_167, 2500), (25_000_000, 10_000)]
)
def test_the_number_of_directions_grows_with_the_rows(n_rows, directions):
    assert spill.Spill.lists_for(n_rows) == 2 * directions
