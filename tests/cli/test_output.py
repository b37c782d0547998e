"""What a person or another program gets: names of columns, escapes, CSV, strict JSON, files, streams that are full."""

import csv
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import toys
from places import TESTS
from toys import call, shell

import gradindex
from gradindex.errors import StoreError, TaskError
from gradindex.output import csv_cell, printable, shown_as, table, table_lines, to_json
from gradindex.report import heat_map, write_page
from gradindex.retrieval.explanation import Explanation
from gradindex.retrieval.hits import Hits, LookedUp, text_lines

CLEAR = "\x1b[2J\x1b]0;mine\x07"
OURS = ("id", "score", "rank", "query", "kind", "self_influence", "columns.id", "columns.columns.id", "shown", "ID")
TASK_FILE = """
import sys
import tracemalloc
from pathlib import Path
sys.path.insert(0, {tests!r})
import toys
def task():
    columns = {{name: [f"{{name}} of {{i}}" for i in range(12)] for name in {ours!r}}}
    columns |= {{"text": {texts!r}, "value": {values}}}
    return toys.make_task(Path(__file__).parent, name={name!r}, columns=columns)
"""
TEXTS = ["=1+1", "+1+1", "-2+3", "@SUM(A1)", "\tx", "\rx", "-0.5", "1e9", CLEAR, "\u202eabc", 'a,b\n"c"', "-"]
VALUES = "[float('nan'), float('inf'), -float('inf')] + [-0.5] * 9"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store whose columns are called as an answer's own keys, with texts that harm where they are shown."""
    folder = tmp_path_factory.mktemp("made")
    text = TASK_FILE.format(tests=str(TESTS), ours=OURS, texts=TEXTS, values=VALUES, name=CLEAR)
    (folder / "mine.py").write_text(text)
    assert call("build", f"{folder}/mine.py:task", "--out", folder / "store").exit_code == 0
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A folder of one's own beside that store."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ASK = ["query", "store", "--task", "mine.py:task", "-q", 0, "-k", 12, "--kind", "proponents"]


@pytest.mark.slow
def test_a_column_called_as_an_answers_own_key_is_shown_beside_it(work):
    hits = gradindex.load(gradindex.load_task("mine.py:task"), "store").proponents(0, k=12)
    order = hits.ids[0].tolist()
    assert {name: hits.columns[name][0, 0] for name in OURS} == {name: f"{name} of {order[0]}" for name in OURS}
    influence = gradindex.GradientStore("store").self_influence().sum(1)
    asked = {"records": hits.records(), "json": json.loads(call(*ASK, "--json").stdout)["records"]}
    asked["csv"] = list(csv.DictReader(io.StringIO(call(*ASK, "--csv").stdout)))
    most = ["self-influence", "store", "-k", "all"]
    asked["self-influence"] = json.loads(call(*most, "--json").stdout)["records"]
    asked["self-influence csv"] = list(csv.DictReader(io.StringIO(call(*most, "--csv").stdout)))
    for form, records in asked.items():
        by_influence = form.startswith("self")
        ids = (-influence).argsort().tolist() if by_influence else order
        numbers = influence[ids] if by_influence else hits.scores[0]
        for rank, (record, i, number) in enumerate(zip(records, ids, numbers, strict=True), 1):
            assert (int(record["rank"]), int(record["id"])) == (rank, i)
            assert float(record["self_influence" if by_influence else "score"]) == number
            for name in OURS:
                assert record["ID" if name == "ID" else f"columns.{name}"] == f"{name} of {i}", (form, name)
    for command in (ASK, most):
        lines = call(*command).stdout.splitlines()
        heading, first = next((line, after) for line, after in itertools.pairwise(lines) if "rank" in line)
        assert "columns.id" in heading.split() and heading.split().count("id") == 1
        assert first.split()[:2] == ["1", str(order[0] if command is ASK else int(influence.argmax()))]


def test_a_filter_takes_the_columns_real_name(work):
    some = call(*ASK, "--where", "id=id of 3", "--where", "id=id of 5", "--json")
    assert {record["id"] for record in json.loads(some.stdout)["records"]} == {3, 5}
    assert "no column 'columns.score'" in call(*ASK, "--where", "columns.score=1").stderr


def test_two_columns_never_get_one_name():
    assert len(set(map(shown_as, OURS))) == len(OURS)


def test_exported_columns_stand_apart_from_what_is_exported_of_rows(work):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert call("export", "store", "rows.parquet").exit_code == 0
    assert call("export", "store", "rows").exit_code == 0
    found = parquet.read_table("rows.parquet").to_pydict()
    assert found["id"] == list(range(12)) == np.load("rows/ids.npy").tolist()
    for name in OURS:
        assert found[shown_as(name)] == [f"{name} of {i}" for i in range(12)]
        assert np.load(f"rows/columns/{name}.npy").tolist() == found[shown_as(name)]
    influence = gradindex.GradientStore("store").self_influence()
    assert np.array_equal(np.array(found["self_influence"]), influence.sum(1))
    assert np.array_equal(np.array(found["self_influence_0"]), influence[:, 0])


def test_pages_show_such_columns_under_their_other_name(work):
    assert call(*ASK, "--html", "page.html").exit_code == 0
    page = (work / "page.html").read_text()
    assert page.count("<div>columns.id id of ") == 12 and "<div>id id of" not in page


@pytest.mark.parametrize("command", [ASK, ["self-influence", "store"], ["info", "store"], ["verify", CLEAR]])
def test_no_escape_sequence_reaches_a_terminal(work, command):
    result = call(*command)
    shown = result.stdout + result.stderr
    assert not [c for c in shown if c != "\n" and not c.isprintable()]
    assert (r"\x1b[2J" in shown) == (command[0] != "self-influence") or r"\x1b[2J" in shown


def test_what_is_printable_stays_as_it_is():
    for text in ("Grüße 你好 नमस्ते 👩‍🔬 שלום a\u3000b", "C:\\x1b", ""):
        assert printable(text) == text
    assert printable("a\x9b1\u2066b\u2028c\ud800\0\r\n\t") == r"a\x9b1\u2066b\u2028c\ud800\x00\r\n\t"


def test_a_label_cannot_add_a_line_to_a_table():
    assert table([{"a\nb": "x\n99", "n": 1}]).count("\n") == 1


def test_csv_defuses_formulas_and_leaves_numbers(work):
    def texts(*options):
        rows = csv.DictReader(io.StringIO(call("self-influence", "store", "-k", "all", *options).stdout, newline=""))
        return {int(row["id"]): row["text"] for row in rows}

    safe = ["'=1+1", "'+1+1", "'-2+3", "'@SUM(A1)", "'\tx", "'\rx", "-0.5", "1e9", CLEAR, "\u202eabc", 'a,b\n"c"', "'-"]
    assert [texts("--csv")[i] for i in range(12)] == safe
    assert [texts("--raw-csv")[i] for i in range(12)] == TEXTS
    assert csv_cell(-0.5) == -0.5 and csv_cell("-inf") == "-inf" and csv_cell("=cmd|' /C calc'!A0")[0] == "'"
    assert csv_cell("-１") == "'-１"  # a number for Python alone


def strict(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict(work):
    for command in (ASK, ["self-influence", "store", "-k", "all"]):
        values = {r["id"]: r["value"] for r in strict(call(*command, "--json").stdout)["records"]}
        assert [values[i] for i in range(5)] == [None, None, None, -0.5, -0.5]
    assert strict(call("info", "store", "--json").stdout)["n_train"] == 12
    nested = to_json({"a": [float("nan"), {"b": -float("inf")}], "c": (1.5,)})
    assert strict(nested) == {"a": [None, {"b": None}], "c": [1.5]}


def test_a_table_of_very_many_records_is_the_same_as_of_few(monkeypatch):
    records = [{"rank": n, "score": -(1.1**n), "name": "x" * (n % 17)} for n in range(100)]
    whole, made = table(records), []
    monkeypatch.setattr("gradindex.output._KEPT", 10)

    def again():
        made.append(1)
        return iter(records)

    assert "\n".join(table_lines(again)) == whole
    assert made == [1, 1]


def test_columns_of_very_many_hits_are_looked_up_and_the_same(work, monkeypatch):
    retriever = gradindex.load(gradindex.load_task("mine.py:task"), "store")
    few = retriever.both([0, 1], at_least=0)
    monkeypatch.setattr("gradindex.retrieval.answering._KEPT_COLUMNS", 3)
    monkeypatch.setattr("gradindex.retrieval.hits.AT_ONCE", 2)
    for hits, later in zip(few, retriever.both([0, 1], at_least=0), strict=True):
        assert isinstance(later.columns, LookedUp) and not isinstance(hits.columns, LookedUp)
        assert to_json(later.records()) == to_json(hits.records()) and len(hits.records()) > 5
        assert str(later) == str(hits)
        assert to_json(later.first(1, 3).records()) == to_json(hits.first(1, 3).records())
        assert np.array_equal(later.columns["id"], hits.columns["id"])
        columns = pickle.loads(pickle.dumps(later.columns))
        assert columns["text"].tolist() == hits.columns["text"].tolist()


def page(path):
    write_page(Path(path), "T", "lead", [])


@pytest.mark.slow
def test_a_page_replaces_a_page_and_nothing_else(work):
    page("a.html")
    page("a.html")
    (work / "b.html").write_text("mine")
    (work / "c.html").symlink_to("a.html")
    (work / "d.html").symlink_to("nowhere.html")
    (work / "e.html").mkdir()
    os.mkfifo("f.html")
    before = sorted(work.iterdir())
    for name in "bcdef":
        for write in (
            lambda path: page(path),
            lambda path: Hits(np.array([[1]]), np.array([[1.0]]), "proponents", "exact", ("q",)).save_html(path),
            lambda path: Explanation(np.zeros((1, 1, 1, 1)), ("q",), np.array([1]), ("c",), ("l",)).save_html(path),
        ):
            with pytest.raises(StoreError, match=r"[Cc]hoose another name"):
                write(f"{name}.html")
        result = call(*ASK, "--html", f"{name}.html")
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert sorted(work.iterdir()) == before
    assert (work / "b.html").read_text() == "mine"
    assert not (work / "nowhere.html").exists()


def test_a_file_that_came_while_a_page_was_made_stays(work, monkeypatch):
    make = Path.write_text

    def late(path, *arguments, **options):
        if ".tmp-" in path.name:
            make(work / "late.html", "mine")
        return make(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", late)
    with pytest.raises(StoreError, match="was not written by gradindex"):
        page("late.html")
    assert (work / "late.html").read_text() == "mine"
    assert [path.name for path in work.iterdir() if ".tmp-" in path.name] == []


@pytest.mark.parametrize("out", ["link", "pipe", "folder", "file.parquet", "link.parquet"])
def test_an_export_replaces_nothing(work, out):
    path = work / out
    if "link" in out:
        path.symlink_to("nowhere")
    elif out == "pipe":
        os.mkfifo(path)
    elif out == "folder":
        path.mkdir()
    else:
        path.write_text("mine")
    before = path.lstat()
    result = call("export", "store", out)
    assert (result.exit_code, result.stderr) == (1, f"Error: {out} exists. Choose another name.\n")
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert not (work / "nowhere").exists()


@pytest.mark.slow
def test_devices_are_never_replaced(work):
    """As root a rename would do it, so this is tried where no other process sees it."""
    script = f"""
import os, shutil, stat, subprocess, sys
sys.path.insert(0, {str(TESTS)!r})
if subprocess.run("mount -t tmpfs none /mnt && cp -a /dev/null /mnt/null && cp -a /dev/zero /mnt/rows.parquet",
                  shell=True, stderr=subprocess.DEVNULL).returncode:
    sys.exit(77)
from toys import call
ASK = {ASK}
for out in ("/mnt/null", "/mnt/rows.parquet", "/dev/null", "/dev/stdout"):
    for command in ([*ASK, "--html", out], ["export", "store", out], ["demo", "--out", out]):
        result = call(*command)
        assert (result.exit_code, result.stdout, result.stderr.count("\\n")) == (1, "", 1), (command, result.output)
for device in ("/mnt/null", "/mnt/rows.parquet", "/dev/null"):
    assert stat.S_ISCHR(os.lstat(device).st_mode)
assert os.listdir("/mnt") == ["rows.parquet", "null"] or os.listdir("/mnt") == ["null", "rows.parquet"]
"""
    command = ["unshare", "-m", sys.executable, "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except FileNotFoundError:
        pytest.skip("needs the program `unshare`")
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip(f"needs a mount namespace of its own: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


def test_names_with_dollars_and_of_no_unicode_fit_in_pages(work):
    assert heat_map(np.eye(2), ["0 a$\\frac$.pt", "1 \ud800"], ["$x$", "y_1^$"]).startswith("data:image/png")
    hits = Hits(np.array([[1]]), np.array([[1.0]]), "proponents", "exact", ("q",), show_train=lambda i: "\ud800 <b>")
    hits.save_html("page.html")
    assert "\\ud800 &lt;b&gt;" in (work / "page.html").read_text()


@pytest.mark.slow
def test_a_full_disk_behind_the_output_is_one_line(work):
    with Path("/dev/full").open("w") as full:
        for command in (["self-influence", "store"], ["info", "store"], ["--help"]):
            line = [sys.executable, "-m", "gradindex.cli", *command]
            done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert "No space left on device" in done.stderr


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(work):
    for form in ([], ["--csv"], ["--json"]):
        line = [sys.executable, "-m", "gradindex.cli", "self-influence", "store", *form]
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writing)
        assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_harm_nothing(work, closed):
    script = f'"$@" -m gradindex.cli self-influence store -k 1 {closed}'
    done = subprocess.run(["sh", "-c", script, "sh", sys.executable], capture_output=True, text=True, check=False)
    if ">&-" in closed.replace("2>&-", ""):
        assert done.returncode == 1
        assert done.stderr in (
            "",
            "Error: Standard output is closed, so there is nowhere to print the answer. Open it.\n",
        )
    else:
        assert done.returncode == 0 and done.stdout.startswith("rank")
    assert call("verify", "store").exit_code == 0


@pytest.mark.slow
def test_an_output_of_another_encoding_escapes_what_it_lacks_and_refuses_csv(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"é{i}" for i in range(12)]
    gradindex.build(toys.make_task(tmp_path, columns={"word": words}), "store")
    most = ["self-influence", "store", "-k", "1"]
    bare = {"LANG": "C", "COLUMNS": "0", "NO_COLOR": "1"}
    for form, text in (([], "é"), (["--csv"], "é"), (["--json"], "\\u00e9")):
        shown = shell(*most, *form, env={**os.environ, **bare, "PYTHONIOENCODING": "ascii"}, encoding="utf-8")
        assert shown.returncode == 0 and text in shown.stdout, shown.stderr
    environment = {**os.environ, **bare, "PYTHONIOENCODING": "cp1251"}
    assert r"\xe9" in shell(*most, env=environment).stdout
    refused = shell(*most, "--csv", env=environment)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "cp1251 cannot represent '\\xe9'. Set PYTHONIOENCODING=utf-8" in refused.stderr


def test_a_page_goes_to_a_name_that_no_file_can_have_with_one_line(work):
    for name in ("x" * 300, "no folder/page.html", "mine.py/page.html"):
        result = call(*ASK, "--html", name)
        assert (result.exit_code, result.stderr.count("\n"), result.stdout) == (1, 1, "")


def test_the_demo_leaves_what_it_did_not_write(tmp_path):
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "gradindex-demo.json").write_text("{}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    for name, make in {
        "task.py": lambda path: path.write_text("mine"),
        "report.html": lambda path: path.write_text("mine"),
        "store": lambda path: path.symlink_to(elsewhere),
        "checkpoints": lambda path: path.symlink_to(elsewhere),
    }.items():
        make(demo / name)
        before = sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))
        result = call("demo", "--out", demo)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
        (demo / name).unlink()


@pytest.mark.slow
def test_children_forked_after_a_query_answer_too(tmp_path):
    """OpenMP's threads do not live on in a child, which would wait for them for ever."""
    script = f"""
import multiprocessing, pathlib, sys
sys.path.insert(0, {str(TESTS)!r})
import torch
torch.set_num_threads(2)
import faiss, toys, gradindex, gradindex.filling
from gradindex.projection import Projection
from torch import nn
faiss.omp_set_num_threads(2)
folder = pathlib.Path({str(tmp_path)!r})
model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 3))
task = toys.make_task(folder, model, shape=(400,), n_train=64, rates=(0.3,))
gradindex.build(task, folder / "store", projection=Projection("gaussian", 16))
retriever = gradindex.load(task, folder / "store")
def ask():
    return [*retriever.both(range(3), k=5), retriever.proponents([0], at_least=0, rerank="rows")]
before = ask()
def child():
    for then, now in zip(before, ask()):
        assert (then.ids == now.ids).all()
    try:
        with gradindex.filling.threads(2):
            pass
    except gradindex.errors.ArgumentError as error:
        assert "spawn" in str(error) and "2 threads" in str(error)
    else:
        assert False
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
hangs = process.exitcode is None
if hangs:
    process.kill()
    process.join()
sys.exit("the child hangs" if hangs else process.exitcode)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["OMP_WAIT_POLICY"] = "passive"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_large_answers_take_no_memory_for_each_hit(monkeypatch):
    """As Python objects all at once, 20,000 hits are about 10 MB, and as a table's cells 7."""
    monkeypatch.setattr("gradindex.output._KEPT", 500)
    monkeypatch.setattr("gradindex.retrieval.hits.AT_ONCE", 500)
    n = 20_000
    ids = np.arange(n)[None]
    columns = LookedUp(["name"], lambda _, some: np.char.add("example ", some.astype(str)), ids)
    hits = Hits(ids, np.linspace(1, 0, n)[None], "proponents", "exact", ("query 0",), columns)
    for read in (hits.each_record, lambda: text_lines([hits])):
        tracemalloc.start()
        count = sum(1 for _ in read())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count >= n
        assert peak < 2 << 20


@pytest.mark.parametrize("name", ["a\0b", "a\0", "\ud800", "x\udfff"])
def test_a_column_whose_name_no_file_can_hold_is_refused(tmp_path, name):
    with pytest.raises(TaskError, match="must be Unicode without NUL. Rename it"):
        toys.make_task(tmp_path, columns={name: range(12)})


def test_a_link_to_itself_is_no_store(work):
    (work / "loop").symlink_to("loop")
    for command in (
        ["merge", "store", "loop"],
        ["merge", "loop", "store"],
        ["info", "loop"],
        ["export", "loop", "out"],
    ):
        result = call(*command)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert "loop is not a gradindex store" in result.stderr
