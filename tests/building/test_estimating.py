"""What a build will take, said before: disk, memory, time; and what is left out of it."""

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from toys import make_task

import gradindex
from gradindex import progress
from gradindex.building import build_part, estimate
from gradindex.cli import main
from gradindex.errors import MismatchError, StoreError, TaskError
from gradindex.projection import Projection

OPTIONS = {"projection": Projection(dim=700), "batch_size": 16, "shard_rows": 64}


class Broken(list):
    """Examples of which some cannot be read."""

    bad = ()

    def __getitem__(self, place):
        if place in self.bad:
            raise BrokenError(f"picture {place} is broken")
        return super().__getitem__(place)


class BrokenError(gradindex.GradIndexError):
    pass


def broken(task, *bad):
    data = Broken(task.train[i] for i in range(task.n_train))
    data.bad = bad
    return replace(task, train=data)


@pytest.fixture
def task(tmp_path):
    task = make_task(tmp_path, n_train=300)
    names = [f"{'a' * (i % 50)}-ü" for i in range(300)]
    return replace(task, columns={"name": names, "even": [i % 2 == 0 for i in range(300)]})


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"row_type": "int8"}, {"factors": "float16"}, {"factors": "float32"}], ids=str)
def test_the_disk_that_is_foretold_is_the_disk_that_is_taken(task, tmp_path, options):
    said = estimate(task, tmp_path / "store", **OPTIONS, **options)
    assert not (tmp_path / "store").exists()
    store = gradindex.build(task, tmp_path / "store", **OPTIONS, **options)
    files = [path for path in (store.folder / "shards").iterdir() if path.is_file()]
    assert said.disk_left_bytes == said.disk_bytes
    assert abs(said.disk_bytes - sum(path.stat().st_size for path in files)) < 16e3 * len(files)
    assert said.dim == store.dim
    assert said.row_bytes == said.disk_bytes // 300


@pytest.mark.slow
def test_exact_factors_are_told_apart(task, tmp_path):
    half, full = (estimate(task, tmp_path / "x", **OPTIONS, factors=kind) for kind in ("float16", "float32"))
    numbers = 3 * (7 + 5 + 6 + 3)  # three checkpoints; both layers' inputs with a 1 for the bias, and outputs
    assert (half.factor_bytes, full.factor_bytes) == (2 * numbers, 4 * numbers)
    assert f"{2 * numbers} bytes of it exact factors" in str(half)


@pytest.mark.slow
def test_what_is_done_counts_as_done_and_a_part_is_a_share(task, tmp_path):
    build_part(task, tmp_path / "store", (1, 2), **OPTIONS)
    whole, part = (estimate(task, tmp_path / "store", part=part, **OPTIONS) for part in (None, (2, 2)))
    assert (whole.rows, whole.rows_done) == (300, 64 + 64 + 44)
    assert (part.rows, part.rows_done) == (128, 0)
    assert whole.disk_left_bytes == pytest.approx(whole.disk_bytes * 128 / 300, rel=0.05)
    with pytest.raises(MismatchError, match="projection differ"):
        estimate(task, tmp_path / "store", **OPTIONS | {"projection": Projection(dim=9)})
    gradindex.build(task, tmp_path / "store", **OPTIONS)
    done = estimate(task, tmp_path / "store", **OPTIONS)
    assert (done.rows_done, done.disk_left_bytes, done.seconds) == (300, 0, 0)


def test_time_is_that_of_reading_and_computing_in_turn_or_of_the_slower(task, tmp_path):
    said = replace(estimate(task, tmp_path / "x", **OPTIONS), read_s=0.6, compute_s=0.2, rows=100, rows_done=50)
    assert said.seconds == pytest.approx(40)
    assert replace(said, workers=2).seconds == pytest.approx(15)
    assert replace(said, workers=6).seconds == pytest.approx(10)
    assert "about 40 seconds, 1.25 rows/s" in str(said)
    assert "about 2 days" in str(replace(said, rows=216_050))
    fitted = estimate(task, tmp_path / "x", projection=Projection("fitted", 4), batch_size=16)
    assert fitted.fitting_rows == 600


@pytest.mark.slow
def test_a_build_that_the_disk_has_no_room_for_does_not_begin(task, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    said = estimate(task, tmp_path / "store", **OPTIONS)
    assert not said.fits
    assert "1 MB free: NOT ENOUGH" in str(said)
    with pytest.raises(StoreError, match=r"still needs about 0.00\d+ GB, but its disk has 0.001 GB free. Free some"):
        gradindex.build(task, tmp_path / "store", **OPTIONS)
    assert not (tmp_path / "store" / "pending.json").exists()
    monkeypatch.undo()
    build_part(task, tmp_path / "store", (1, 2), **OPTIONS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(StoreError, match="still needs about"):
        gradindex.build(task, tmp_path / "store", **OPTIONS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=15 * 10**5))  # for what is missing
    assert gradindex.build(task, tmp_path / "store", **OPTIONS).n_train == 300


def test_a_dry_run_says_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        f"from pathlib import Path\nfrom toys import make_task\ntask = make_task(Path({str(tmp_path)!r}))\n"
    )
    done = CliRunner().invoke(main, ["build", "mine.py:task", "--out", "store", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.output.splitlines()] == ["rows", "disk", "memory", "time", "aims"]
    assert "rows    12 of 3,072 numbers\n" in done.output
    wanted = (
        "3 checkpoints of 1,024 numbers; scores that predict retraining (geometry whitened) want 5 checkpoints or more"
    )
    assert f"aims    {wanted}, most of them early\n" in done.output
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_skipped_examples_are_never_read_and_the_ids_of_the_others_stay(task, tmp_path):
    bad = (0, 7, 64, 299)
    skipping = replace(broken(task, *bad), skip=[299, 0, 7, 64])
    store = gradindex.build(skipping, tmp_path / "store", **OPTIONS)
    whole = gradindex.build(task, tmp_path / "whole", **OPTIONS)
    assert store.ids.tolist() == [i for i in range(300) if i not in bad]
    np.testing.assert_allclose(store.rows(store.ids), whole.rows(store.ids), rtol=1e-4, atol=1e-5)
    assert store.column("name", np.array([8]))[0] == "aaaaaaaa-ü"
    hits = gradindex.load(skipping, store.folder).proponents([0], k=5)
    exact = gradindex.exact_scores(skipping, [task.query[0]])
    assert hits.ids[0].tolist() == store.ids[np.argsort(-exact[0])[:5]].tolist()
    assert gradindex.exact_scores(skipping, [task.query[0]]).shape == (1, 296)


@pytest.mark.slow
def test_a_fitted_projection_and_later_examples_skip_as_well(task, tmp_path):
    bad = (1, 5, 70)
    with pytest.raises(BrokenError, match="picture 1 is broken"):
        gradindex.build(replace(broken(task, *bad), skip=[5, 70]), tmp_path / "x", **OPTIONS)
    options = OPTIONS | {"projection": Projection("fitted", 4)}
    gradindex.build(replace(broken(task, *bad), columns={}, skip=bad), tmp_path / "whole", **options)
    first = replace(broken(task, *bad), columns={})
    first = replace(first, train=[first.train[i] if i not in bad else None for i in range(66)], skip=bad[:2])
    gradindex.build(first, tmp_path / "store", **options)
    grown = gradindex.add(replace(broken(task, *bad), columns={}, skip=bad), tmp_path / "store")
    assert grown.ids.tolist() == [i for i in range(300) if i not in bad]
    longer = replace(broken(task, 300), columns={})
    longer.train.append(task.train[0])
    nothing = gradindex.add(replace(longer, skip=[*bad, 300]), tmp_path / "store")
    assert (nothing.n_train, nothing.manifest.next_id, nothing.verify()) == (297, 301, [])


@pytest.mark.slow
def test_a_build_goes_on_only_with_the_same_examples_left_out(task, tmp_path):
    build_part(replace(task, skip=[3]), tmp_path / "store", (1, 2), **OPTIONS)
    with pytest.raises(MismatchError, match="data differ"):
        gradindex.build(replace(task, skip=[4]), tmp_path / "store", **OPTIONS)
    assert gradindex.build(replace(task, skip=[3]), tmp_path / "store", **OPTIONS).n_train == 299


@pytest.mark.parametrize(
    ("skip", "message"),
    [([300], "skip holds 300, but positions in train go from 0 to 299"), (range(300), "covers all training examples")],
)
def test_what_cannot_be_skipped_is_refused(task, skip, message):
    with pytest.raises(TaskError, match=message):
        replace(task, skip=list(skip))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_example_that_cannot_be_read_says_so_in_one_sentence_from_a_worker_too(task, tmp_path, workers):
    with pytest.raises(BrokenError) as caught:
        gradindex.build(broken(task, 130), tmp_path / "store", **OPTIONS, workers=workers)
    assert str(caught.value) == "picture 130 is broken"
    assert gradindex.build(task, tmp_path / "store", **OPTIONS).n_train == 300


def test_the_log_of_a_batch_queue_gets_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    clock = iter([0.0, 2.0, 5.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with progress.progress("gradients", 7300, "rows", done=100) as advance:
        advance(1000)
        advance(1000)
    assert capsys.readouterr().err == (
        "gradients: 1,100 of 7,300 rows, 500 rows/s, 0:00:12 left\n"
        "gradients: 2,100 of 7,300 rows, 400 rows/s, 0:00:13 left\n"
    )
