"""A compact index: what it finds, what it leaves out, and that its file is never trusted unread."""

import faiss
import numpy as np
import pytest
import toys

from gradindex.errors import ArgumentError, IndexFileError
from gradindex.evaluation import tuning
from gradindex.index import CompactIndex, LeftOut, SearchIndex, Shape, checked, compact, gpu, shapes
from gradindex.index.kinds import lists


def clustered(n, dim, seed):
    """Rows around 20 directions, with heavy-tailed norms, as gradients have."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((20, dim))
    rows = centres[generator.integers(0, 20, n)] + 0.3 * generator.standard_normal((n, dim))
    return (rows * np.exp(generator.standard_normal((n, 1)))).astype(np.float32)


ROWS, QUERIES = clustered(4000, 40, 1), clustered(50, 40, 2)
IDS = np.arange(4000, dtype=np.int64) * 7


def blocks():
    return iter([(IDS[s : s + 900], ROWS[s : s + 900]) for s in range(0, 4000, 900)])


def top(scores, k):
    return IDS[np.argsort(-scores, axis=1)[:, :k]]


@pytest.mark.parametrize("shape", [Shape("flat", 40), Shape("ivf", 40, 32)], ids=str)
def test_an_index_of_all_directions_finds_the_largest_inner_products(shape):
    index = CompactIndex.build(shape, ROWS, blocks)
    for sign in (1, -1):
        scores, found = index.search(sign * QUERIES, 200, probes=32)
        assert toys.share(found, top(sign * QUERIES @ ROWS.T, 100)) > 0.995
        own = np.take_along_axis(sign * QUERIES @ ROWS.T, found // 7, 1)
        np.testing.assert_allclose(scores, own, atol=0.02 * np.abs(own).max())
        assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("shape", [Shape("flat", 40), Shape("ivf", 40, 32)], ids=str)
def test_rows_heavier_than_any_of_the_sample_are_not_cut_short(shape):
    light = ROWS[np.argsort(np.linalg.norm(ROWS, axis=1))[:3900]]
    index = CompactIndex.build(shape, light, blocks)
    scores, found = index.search(QUERIES, 300, probes=32)
    own = np.take_along_axis(QUERIES @ ROWS.T, found // 7, 1)
    np.testing.assert_allclose(scores, own, atol=0.02 * np.abs(own).max())
    assert toys.share(found, top(QUERIES @ ROWS.T, 100)) > 0.995


@pytest.mark.parametrize("shape", [Shape("flat", 40), Shape("ivf", 40, 32)], ids=str)
def test_an_enormous_row_leaves_the_others_their_bytes(shape):
    rows = ROWS.copy()
    rows[77] *= 1e5 / np.linalg.norm(rows[77])
    index = CompactIndex.build(shape, ROWS, lambda: iter([(IDS, rows)]))
    true = top(QUERIES @ rows.T, 100)
    found = index.search(QUERIES, 300, probes=32)[1]
    assert toys.share(found, true) > 0.95
    cosines = QUERIES @ rows[77] / np.linalg.norm(QUERIES, axis=1) / 1e5
    assert (cosines > 0.2).sum() >= 4
    for query in np.flatnonzero(cosines > 0.2):
        assert 7 * 77 in found[query, :10]


def test_lists_are_probed_by_direction_and_norm():
    index = CompactIndex.build(Shape("ivf", 40, 32), ROWS, blocks)
    true = top(QUERIES @ ROWS.T, 100)
    shares = [toys.share(index.search(QUERIES, 1000, probes=probes)[1], true) for probes in (1, 2, 4, 8, 32)]
    assert shares == sorted(shares)
    assert shares[2] > 0.8  # an eighth of the lists
    plain = faiss.index_factory(40, "IVF32,SQ8", faiss.METRIC_INNER_PRODUCT)
    plain.train(ROWS)
    plain.add_with_ids(ROWS, IDS)
    plain.nprobe = 4
    assert shares[2] > toys.share(plain.search(QUERIES, 1000)[1], true)


def test_directions_hold_most_of_unit_normed_rows_whatever_the_heavy_ones_do():
    rows = clustered(2000, 40, 3)
    rows[:5] = 0
    rows[5:10, 0] += 1e4  # a few enormous rows of one direction
    directions = tuning.CompactIndex.build(Shape("flat", 20), rows, lambda: iter([(IDS[:2000], rows)]))
    assert directions.about["rows"] == 2000
    found = shapes.fitted_directions(rows, 20)
    np.testing.assert_allclose(found.T @ found, np.eye(20), atol=1e-4)
    units = rows[10:] / np.linalg.norm(rows[10:], axis=1, keepdims=True)
    best = np.linalg.eigvalsh(units.T @ units)[::-1][:20].sum()
    assert np.square(units @ found).sum() > 0.98 * best


def test_removed_ids_are_left_out_and_too_few_are_padded_openly():
    index = CompactIndex.build(Shape("ivf", 40, 32), ROWS, blocks)
    best = index.search(QUERIES, 50, probes=4)[1]
    scores, found = index.search(QUERIES, 50, probes=4, removed=LeftOut(np.unique(best[:, :10])))
    assert not np.isin(found, best[:, :10]).any()
    scores, found = index.search(QUERIES[:1], 4000, probes=1)
    padding = found[0] < 0
    assert 0 < padding.sum() < 4000
    assert (scores[0][padding] == -np.inf).all()
    assert not padding[: 4000 - padding.sum()].any()


@pytest.mark.slow
def test_two_bits_a_number_find_what_is_spread_over_many_directions():
    generator = np.random.default_rng(5)
    n, dim = 4000, 256
    rows = np.zeros((n, dim), dtype=np.float32)  # a few numbers of many, other ones in each, as of a thousand classes
    for row in rows:
        row[generator.choice(dim, 6, replace=False)] = generator.normal(size=6) * generator.lognormal(sigma=0.5)
    queries = rows[:40] + 0.1 * generator.normal(size=(40, dim)).astype(np.float32)

    def best(scores):
        return np.argsort(-scores, axis=1)[:, :20]

    true = best(queries @ rows.T)

    shapes = (Shape("pq", dim), Shape("flat", dim // 4))
    bits, same_bytes = (CompactIndex.build(shape, rows, lambda: iter([(np.arange(n), rows)])) for shape in shapes)
    reached = [toys.share(index.search(queries, 200)[1], true) for index in (bits, same_bytes)]
    assert reached[0] > 0.95 > reached[1] + 0.05
    assert toys.share(bits.search(-queries, 200)[1], best(-queries @ rows.T)) > 0.8


def test_codes_of_two_bits_leave_out_what_was_removed():
    index = CompactIndex.build(Shape("pq", 40), ROWS, blocks)
    scores, best = index.search(QUERIES, 50)
    assert (np.diff(scores) <= 0).all()
    found = index.search(QUERIES, 30, removed=LeftOut(np.unique(best[:, :10])))[1]
    assert found.shape == (len(QUERIES), 30) and (found >= 0).all()
    assert not np.isin(found, best[:, :10]).any()
    left = [[i for i in row if not np.isin(i, best[:, :10])][:20] for row in best.tolist()]
    assert all(np.isin(mine[:10], row).all() for mine, row in zip(left, found, strict=True))
    everything, gone = index.search(QUERIES[:1], len(IDS), removed=LeftOut(IDS[:100]))[1][0], IDS[:100]
    assert (everything[: len(IDS) - 100] >= 0).all() and (everything[len(IDS) - 100 :] == -1).all()
    assert not np.isin(everything, gone).any()


SHAPES = {
    "dim": (Shape("flat", 41), "dim is 41"),
    "lists": (Shape("ivf", 8, 5000), "lists is 5000"),
}


def test_two_bits_a_number_need_an_even_number():
    with pytest.raises(ArgumentError, match="dim is 31, but must be even for pq"):
        Shape("pq", 31)


@pytest.mark.parametrize("case", SHAPES)
def test_impossible_shapes_are_refused(case):
    shape, message = SHAPES[case]
    with pytest.raises(ArgumentError, match=message):
        CompactIndex.build(shape, ROWS, blocks)


def save(folder, shape):
    index = CompactIndex.build(shape, ROWS, blocks)
    index.save(folder, {"map": "m", "ids": [[0, 5]]})
    return folder, index


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "index", Shape("ivf", 16, 32))


@pytest.mark.parametrize("shape", [Shape("flat", 16), Shape("ivf", 16, 32), Shape("pq", 16)], ids=str)
def test_a_saved_index_answers_as_before_and_is_read_by_plain_faiss(shape, tmp_path):
    folder, index = save(tmp_path / "index", shape)
    loaded = CompactIndex.load(folder)
    for mine, theirs in zip(index.search(QUERIES, 30, probes=4), loaded.search(QUERIES, 30, probes=4), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    plain = faiss.read_index(str(next(folder.glob("*.faiss"))))
    if shape.kind == "ivf":
        faiss.extract_index_ivf(plain).nprobe = 4
    assert toys.share(plain.search(QUERIES, 30)[1], index.search(QUERIES, 30, probes=4)[1]) > 0.99


def change(path, old, new):
    path.write_text(path.read_text().replace(old, new))


DAMAGES = {
    "one bit": (
        lambda p: p.write_bytes(p.read_bytes()[:-9] + b"x" + p.read_bytes()[-8:]),
        "its size or checksum has changed",
    ),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-4]), "its size or checksum has changed"),
    "gone": (lambda p: p.unlink(), r"\.faiss is missing"),
    "manifest damaged": (lambda p: change(p.with_name("manifest.json"), '"dim": 16', '"dim": 17'), "do not match"),
    "manifest cut": (lambda p: p.with_name("manifest.json").write_text("{"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_before_faiss_reads_the_file(saved, monkeypatch, case):
    folder, _ = saved
    harm, message = DAMAGES[case]
    harm(next(folder.glob("*.faiss")))
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("was read"))
    with pytest.raises(IndexFileError, match=f"{message}.*Rebuild the index: gradindex index"):
        CompactIndex.load(folder)


def test_an_index_of_a_newer_version_is_refused(saved):
    folder, index = saved
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradindex.index.compact.VERSION", 9)
        index.save(folder, {})
    with pytest.raises(IndexFileError, match="has version 9, but this gradindex reads up to 1"):
        checked(folder)


@pytest.mark.parametrize("then", ["taken away", "replaced"])
@pytest.mark.parametrize("when", ["before it is checked", "before it is read"])
def test_an_index_that_goes_while_it_is_opened_is_looked_for_again(saved, monkeypatch, then, when):
    folder, _ = saved
    other = CompactIndex.build(Shape("flat", 8), ROWS, blocks)
    module, name = (compact, "checked") if when == "before it is checked" else (faiss, "read_index")
    original = getattr(module, name)

    def late(*args):
        monkeypatch.setattr(module, name, original)
        CompactIndex.remove(folder)
        if then == "replaced":
            other.save(folder, {})
        return original(*args)

    monkeypatch.setattr(module, name, late)
    found = CompactIndex.load(folder)
    assert found is None if then == "taken away" else found.about["shape"]["kind"] == "flat"


def test_what_faiss_cannot_read_is_told(saved, monkeypatch):
    folder, _ = saved

    def fail(*_):
        raise RuntimeError("not today")

    monkeypatch.setattr(faiss, "read_index", fail)
    with pytest.raises(IndexFileError, match=r"cannot be read by FAISS \(not today\).*--drop"):
        CompactIndex.load(folder)


def test_few_rows_make_short_codes_and_lists_in_silence(capfd):
    for shape in (Shape("pq", 8), Shape("ivf", 8, 16)):
        CompactIndex.build(shape, ROWS[:60], lambda: iter([(IDS[:60], ROWS[:60])]))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_new_index_takes_the_place_of_the_old_while_readers_go_on(saved):
    folder, _ = saved
    reader = CompactIndex.load(folder)
    before = reader.search(QUERIES, 30, probes=4)
    CompactIndex.build(Shape("flat", 8), ROWS, blocks).save(folder, {})
    np.testing.assert_array_equal(reader.search(QUERIES, 30, probes=4)[1], before[1])
    assert CompactIndex.load(folder).about["shape"]["kind"] == "flat"
    assert len(list(folder.iterdir())) == 2


def by_decoded_rows(index, k):
    """Scores and ids of the best rows of all, by what their codes stand for."""
    turn = faiss.downcast_VectorTransform(index._index.chain.at(0))
    turned = QUERIES @ faiss.vector_to_array(turn.A).reshape(turn.d_out, turn.d_in).T
    decoded, ids = index._method.for_gpu(faiss.downcast_index(index._index.index))
    scores = turned @ decoded.reconstruct_n(0, decoded.ntotal).T
    order = np.argsort(-scores, axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), ids[order]


def test_rows_decoded_for_a_gpu_are_those_that_the_cpu_compares():
    """The CPU rounds what it looks up for two numbers to a byte, so its order differs at the end."""
    index = CompactIndex.build(Shape("pq", 40), ROWS, blocks)
    found, decoded = index.search(QUERIES, 200), by_decoded_rows(index, 200)
    assert toys.share(found[1][:, :150], decoded[1][:, :100]) > 0.99
    truth = top(QUERIES @ ROWS.T, 100)
    assert toys.share(decoded[1], truth) >= toys.share(found[1], truth) - 0.001


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [Shape("flat", 40), Shape("ivf", 40, 32), Shape("pq", 40)], ids=str)
def test_the_gpu_answers_as_the_cpu_does(shape, tmp_path):
    gpus = gpu.devices("cuda")
    if not gpus:
        pytest.skip("FAISS sees no CUDA device (faiss-gpu is not installed)")
    index = CompactIndex.build(shape, ROWS, blocks)
    index.save(tmp_path, {})
    scores, ids = CompactIndex.load(tmp_path, gpus).search(QUERIES, 200, probes=32)
    expected = index.search(QUERIES, 200, probes=32)
    if shape.kind == "pq":  # the CPU rounds what it looks up to a byte; the GPU has the rows that the codes stand for
        expected = by_decoded_rows(index, 200)
    assert toys.share(ids, expected[1]) > 0.99
    np.testing.assert_allclose(scores, expected[0], rtol=0.01, atol=0.01)
    removed = np.unique(expected[1][:, :3])
    assert not np.isin(
        CompactIndex.load(tmp_path, gpus).search(QUERIES, 20, probes=32, removed=LeftOut(removed))[1], removed
    ).any()
    on_gpu = CompactIndex.build(shape, ROWS, blocks, 0, gpus)
    truth = top(QUERIES @ ROWS.T, 100)
    held = toys.share(on_gpu.search(QUERIES, 200, probes=32)[1], truth)
    assert held > (0.99 if shape.kind != "pq" else toys.share(by_decoded_rows(on_gpu, 200)[1], truth) - 0.001)
    all_rows = SearchIndex(40, 4000, blocks, gpus).search(QUERIES, 50)
    np.testing.assert_array_equal(all_rows[1], SearchIndex(40, 4000, blocks).search(QUERIES, 50)[1])


def test_devices_that_do_not_exist_are_refused(monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    assert gpu.devices("cuda") == (0, 1)
    assert gpu.devices("cuda:1") == (1,)
    assert gpu.devices("cpu") == gpu.devices(None) == ()
    for device in ("cuda:2", "cuda:x"):
        with pytest.raises(ArgumentError, match=f"device is '{device}', but FAISS sees 2 CUDA devices"):
            gpu.devices(device)


@pytest.mark.parametrize("least", [10, 100, 999, 6000, 20_000])
@pytest.mark.parametrize("piece", [7, 100, 3000])
def test_lists_are_fitted_to_every_so_manyth_row(least, piece):
    rows = np.arange(10_007, dtype=np.float32)[:, None]
    found = lists.every_nth(lambda: iter([(None, rows[s : s + piece]) for s in range(0, len(rows), piece)]), least)[
        :, 0
    ]
    step = int(found[1] - found[0])
    np.testing.assert_array_equal(found, np.arange(0, len(rows), step))
    assert least <= len(found) < 2 * least or step == 1
