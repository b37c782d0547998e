"""The command line: exact output, exit codes, and one line for every error."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet
import pytest
from places import TESTS
from toys import call, shell

import gradindex
from gradindex.cli import main
from gradindex.errors import UserCodeError

TASK_FILE = """
import os, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
import toys, torch
from torch.utils.data import TensorDataset

FOLDER = Path(__file__).parent
def read_query(path):
    numbers = [[float(x) for x in line.split()] for line in path.read_text().splitlines()]
    return [(torch.tensor(row, dtype=torch.float64), torch.tensor(1)) for row in numbers]
task = toys.make_task(FOLDER, name="toy", read_query=read_query, show=lambda item: item[0].numpy()[None],
    columns={{"name": [f"n{{i}}" for i in range(12)]}}, query_columns={{"kind": list("abcd")}})
number = 3
def broken(): raise FileNotFoundError("no data here")
def scalar(): return replace(task, loss=lambda model, batch: toys.cross_entropy(model, batch).mean())
def first_layer(): return replace(task, layers="0")
def wrong_layer(): return replace(task, layers="head")
def grown(): return toys.make_task(FOLDER, name="toy", n_train=15, columns={{"name": [f"n{{i}}" for i in range(15)]}})
def fewer(): return replace(task, checkpoints=task.checkpoints[:2])
def part_of(ids): return replace(grown(), train=torch.utils.data.Subset(grown().train, ids),
    columns={{"name": [f"n{{i}}" for i in ids]}})
def low(): return part_of(range(9))
def high(): return part_of(range(9, 15))
def shorter(): return replace(task, train=list(task.train)[:6], columns={{}})
def empty(): return replace(task, train=[], columns={{}})
def no_eta(): return replace(task, checkpoints=[replace(c, learning_rate=None) for c in task.checkpoints])
def missing(): return replace(task, checkpoints=[replace(task.checkpoints[0], path=FOLDER / "w_9.pt")])
def nan():
    x, y = task.train.tensors
    x = x.clone(); x[7] = float("nan")
    return replace(task, train=TensorDataset(x, y))
def truncated():
    (FOLDER / "cut.pt").write_bytes((FOLDER / "w_0.pt").read_bytes()[:700])
    return replace(task, checkpoints=[replace(task.checkpoints[0], path=FOLDER / "cut.pt")])
def misfit():
    torch.save({{"0.weight": torch.zeros(5, 7), "extra": torch.zeros(1)}}, FOLDER / "other.pt")
    return replace(task, checkpoints=[replace(task.checkpoints[0], path=FOLDER / "other.pt")])
class Stops:
    def __len__(self): return 12
    reads = 0
    def __getitem__(self, i):
        if os.environ.get("STOP") and os.path.exists("store/pending.json"): Stops.reads += 1
        if Stops.reads == 4: raise KeyboardInterrupt  # within the first shard
        return task.train[i]
def stops(): return replace(task, train=Stops())
"""
SLOW = """
import time
class Slow(Stops):
    def __getitem__(self, i):
        if os.path.exists("store/pending.json"):
            open("asleep", "w").close()
            time.sleep(600)  # until the signal comes
        return task.train[i]
def slow(): return replace(task, train=Slow())
"""
FAILS = """
class Fails(Stops):
    def __getitem__(self, i): return 1 / 0
def fails(): return replace(task, train=Fails())
"""
INTERRUPTED = "Interrupted. Finished work is kept: rerun the same command to resume.\n"
NOTE = (
    "exact TracInCP scores; positive score = training on this example lowered the loss on the query (proponent); "
    "negative = raised it (opponent); stages: rows 12, model 12"
)


@pytest.fixture
def work(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(TASK_FILE.format(tests=str(TESTS)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def built(work):
    assert call("build", "mine.py:task", "--out", "store").exit_code == 0
    return work


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_build_says_what_it_made_and_goes_on_where_it_was(work):
    first = call("build", "mine.py:task", "--out", "store", "--dim", "8")
    assert (first.stdout, first.stderr) == ("store: 12 rows of 24 numbers, from 3 checkpoints\n", "")
    before = snapshot(work / "store")
    again = call("build", "mine.py:task", "--out", "store", "--dim", "8")
    assert again.stdout == first.stdout
    assert snapshot(work / "store") == before
    whole = call("build", "mine.py:task", "--out", "whole", "--projection", "none", "--precision", "float64")
    assert whole.stdout == "whole: 12 rows of 159 numbers, from 3 checkpoints\n"
    assert json.loads(call("info", "whole", "--json").stdout)["map"]["precision"] == "float64"


@pytest.mark.slow
def test_query_prints_the_tables_of_the_python_answer(built):
    task = gradindex.load_task("mine.py:task")
    retriever = gradindex.load(task, "store")
    up, down = retriever.proponents([1, 3], k=2), retriever.opponents([1, 3], k=2)
    result = call("query", "store", "--task", "mine.py:task", "-q", 1, "--position", 3, "-k", 2, "--kind", "proponents")
    assert (result.stdout, result.stderr) == (f"{up}\n", "")
    both = call("query", "store", "--task", "mine.py:task", "-q", 1, "-q", 3, "-k", 2).stdout
    blocks = both.rstrip("\n").split("\n\n")
    first = [f"   {r + 1}  {up.ids[0, r]:>2}  {up.scores[0, r]:>6.5g}  n{up.ids[0, r]}" for r in range(2)]
    assert [block.splitlines()[0] for block in blocks[:4]] == [
        "query 1 (kind b): proponents", "query 1 (kind b): opponents",
        "query 3 (kind d): proponents", "query 3 (kind d): opponents",
    ]  # fmt: skip
    assert [line.split() for line in blocks[0].splitlines()[2:]] == [line.split() for line in first]
    assert blocks[4] == NOTE
    only = call("query", "store", "--task", "mine.py:task", "-q", 1, "-q", 3, "-k", 2, "--kind", "opponents").stdout
    assert only == f"{down}\n"


def test_query_for_programs(built):
    up = gradindex.load(gradindex.load_task("mine.py:task"), "store").proponents(4, k=3, source="train")
    options = ["query", "store", "--task", "mine.py:task", "--train-id", 4, "-k", 3, "--kind", "proponents"]
    stages = {"proponents": [{"name": "rows", "rows": 12}, {"name": "model", "rows": 12}]}
    printed = json.loads(call(*options, "--json").stdout)
    assert printed == {"note": NOTE, "scored": "exact", "stages": stages, "records": up.records()}
    assert printed == up.to_dict()
    result = call(*options, "--csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(row["query"], int(row["id"]), float(row["score"]), row["name"]) for row in rows] == [
        ("train 4", record["id"], record["score"], record["name"]) for record in up.records()
    ]
    assert result.stderr == f"{NOTE}\n"


@pytest.mark.slow
def test_query_from_a_file_without_exact_scores_and_as_a_page(built):
    item = gradindex.load_task("mine.py:task").train[2]
    (built / "questions.txt").write_text(" ".join(str(float(x)) for x in item[0]) + "\n")
    options = ["query", "store", "--task", "mine.py:task", "--file", "questions.txt", "-k", 2, "--html", "page.html"]
    result = call(*options, "--rerank", "none")
    assert result.stdout.startswith("item 0: proponents\nrank")
    assert result.stdout.splitlines()[-1].startswith("projected TracInCP scores; positive score = ")
    assert result.stderr == "page.html\n"
    assert (built / "page.html").read_text().count("data:image/png") == 5


def test_self_influence_needs_no_task(built):
    store = gradindex.GradientStore("store")
    scores = store.self_influence().sum(1)
    order = (-scores).argsort()[:3]
    (built / "mine.py").unlink()
    result = call("self-influence", "store", "-k", 3)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["rank", "id", "self_influence", "name"]
    assert lines[1:4] == [[str(r + 1), str(i), f"{scores[i]:.5g}", f"n{i}"] for r, i in enumerate(order)]
    assert " ".join(lines[4]).startswith(
        "exact TracInCP of an example with itself, never negative; high for mislabelled"
    )
    records = json.loads(call("self-influence", "store", "-k", 3, "--json").stdout)["records"]
    assert [record["id"] for record in records] == order.tolist()


@pytest.mark.slow
def test_query_takes_what_python_does(built):
    retriever = gradindex.load(gradindex.load_task("mine.py:task"), "store")
    (built / "ids.txt").write_text("3\n1\n7\n11\n")
    np.save("ids.npy", np.array([3, 1, 7, 11]))
    four = {"ids": [1, 3, 7, 11]}
    cases = [
        (["--kind", "absolute", "-k", 4], retriever.search(0, 4, kind="absolute")),
        (["--kind", "proponents", "--at-least", 0], retriever.proponents(0, at_least=0)),
        (["--kind", "opponents", "--at-least", 0, "-k", 2], retriever.opponents(0, 2, at_least=0)),
        (["--kind", "proponents", "--rerank", "rows"], retriever.proponents(0, rerank="rows")),
        (["--kind", "opponents", "--ids", "ids.txt"], retriever.opponents(0, **four)),
        (["--kind", "opponents", "--ids", "ids.npy"], retriever.opponents(0, **four)),
        (
            ["--kind", "proponents", "--where", "name=n2", "--where", "name=n5"],
            retriever.proponents(0, where={"name": ["n2", "n5"]}),
        ),
        (["-q", 2, "--aggregate", "mean", "--kind", "proponents"], retriever.proponents([0, 2], aggregate="mean")),
    ]
    for arguments, hits in cases:
        shown = json.loads(call("query", "store", "--task", "mine.py:task", "-q", 0, *arguments, "--json").stdout)
        assert shown["records"] == hits.records() and len(hits.records()) > 1, arguments
        assert shown["stages"] == {hits.kind: [{"name": s.name, "rows": s.rows} for s in hits.stages]}
        assert (shown["scored"], shown["note"]) == (hits.scored, hits.note)
    assert [record["query"] for record in shown["records"]] == ["mean of 2 queries"] * 10


@pytest.mark.slow
def test_query_without_hits_says_so_in_every_form(built):
    options = ["query", "store", "--task", "mine.py:task", "-q", 0, "--where", "name=n99"]
    text = call(*options, "--html", "page.html").stdout
    assert text.count("(no training example qualifies)") == 2
    assert (built / "page.html").read_text().count("no training example qualifies") == 2
    assert json.loads(call(*options, "--json").stdout)["records"] == []
    assert call(*options, "--csv").stdout.splitlines() == ["query,kind,rank,id,score,name"]


@pytest.mark.slow
def test_explain_shows_checkpoints_and_layers(built):
    split = gradindex.load(gradindex.load_task("mine.py:task"), "store").explain([0], [5, 7])
    options = ["explain", "store", "--task", "mine.py:task", "--position", 0, "--id", 5, "--id", 7]
    result = call(*options, "--html", "page.html")
    assert (result.stdout, result.stderr) == (f"{split}\n", "page.html\n")
    assert (built / "page.html").read_text().count("data:image/png") == 2
    assert json.loads(call(*options, "--json").stdout) == {
        "note": split.note, "scored": "exact", "records": split.records(),
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(call(*options, "--csv").stdout)))
    assert [(row["layer"], float(row["score"])) for row in rows] == [(r["layer"], r["score"]) for r in split.records()]


def test_self_influence_of_all_or_of_some(built):
    store = gradindex.GradientStore("store")
    scores = store.self_influence().sum(1)
    rows = list(csv.DictReader(io.StringIO(call("self-influence", "store", "-k", "all", "--csv").stdout)))
    assert [int(row["id"]) for row in rows] == (-scores).argsort().tolist()
    assert [float(row["self_influence"]) for row in rows] == sorted(scores.tolist(), reverse=True)
    assert [row["name"] for row in rows] == [f"n{row['id']}" for row in rows]
    some = ["self-influence", "store", "-k", "all", "--where", "name=n4", "--where", "name=n9"]
    found = json.loads(call(*some, "--json").stdout)["records"]
    assert [(r["rank"], r["id"]) for r in found] == [
        (n + 1, i) for n, i in enumerate(sorted([4, 9], key=lambda i: -scores[i]))
    ]
    assert "(no training example qualifies)" in call("self-influence", "store", "--where", "name=x").stdout


def test_info_says_what_a_store_holds(built):
    text = re.sub(r"[\d.]+ KiB", "SIZE", call("info", "store").stdout)
    assert re.sub(r"\d+ s$", "SECONDS s", text, flags=re.MULTILINE) == (
        "toy: 12 rows of 3,072 numbers (complete)\n"
        "projection tensorsketch, 1024 a checkpoint, seed 0; gradients in float32\n"
        "rows in float32; SIZE in 1 shards, made in SECONDS s\n"
        "columns: name; search: exact over all rows\n"
        "tracked: 4 parameters of 53 numbers (what was trained)\n"
        "health: all files are there; `gradindex verify` reads them\n"
        "\n"
        "checkpoint  step  eta   weighting\n"
        "         0     0  0.3   given\n"
        "         1     1  0.1   given\n"
        "         2     2  0.02  given\n"
        "\n"
        "layer  d_out  d_in  route\n"
        "0          5     7  linear\n"
        "2          3     6  linear\n"
    )


def test_verify_names_the_damage(built):
    assert call("verify", "store").stdout == "store: 12 rows in 1 shards are undamaged\n"
    shard = built / "store" / "shards" / "0001-00000.h5"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    result = call("verify", "store")
    assert result.exit_code == 1
    assert result.stderr == "Error: store/shards/0001-00000.h5 is damaged in 1 of 10 blocks (ids 0 to 11)\n"


BAD_TASKS = {
    "nowhere.py:task": "Task file nowhere.py does not exist",
    "mine.py:tusk": "mine.py has no 'tusk'. Close names: task",
    "mine.py:number": "mine.py:number is a int, but must be a gradindex.Task or a callable",
    "mine.py": "'mine.py' does not name a task. Write path/to/file.py:name",
    "mine.py:broken": "Calling mine.py:broken failed: FileNotFoundError: no data here",
    "no_such_module:task": "Importing no_such_module failed: ModuleNotFoundError",
    "mine.py:missing": "w_9.pt does not exist",
    "mine.py:truncated": "cut.pt cannot be read as a checkpoint; it may be truncated or damaged",
    "mine.py:misfit": "other.pt does not fit the model: 0.bias is missing; 2.weight is missing; 2.bias is missing (and",
    "mine.py:no_eta": "w_0.pt has no recorded learning rate, so its weight eta is unknown. Give learning_rate=",
    "mine.py:scalar": "The loss has shape (), but must be per example",
    "mine.py:nan": "Training example 7 has a NaN or infinite loss at checkpoint 0",
    "mine.py:wrong_layer": "The layer pattern 'head' matches nothing in the model. Close names:",
    "mine.py:empty": "train is empty. Give at least one example.",
}


@pytest.mark.parametrize("task", BAD_TASKS)
def test_a_task_that_cannot_be_built_gets_one_line_and_exit_code_1(work, task):
    result = call("build", task, "--out", "store")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert BAD_TASKS[task] in result.stderr
    assert result.stderr.count("\n") == 1


BAD_BUILDS = {
    "another task": (["build", "mine.py:first_layer", "--out", "store"], "a build of another task: layers differ"),
    "another projection": (["build", "mine.py:task", "--out", "store", "--seed", "1"], "projection differ"),
    "other data": (["build", "mine.py:shorter", "--out", "store"], "data length (12 stored, 6 now); columns differ"),
    "something else": (["build", "mine.py:task", "--out", "."], ". is not empty and holds no gradindex store"),
    "a file": (["build", "mine.py:task", "--out", "mine.py"], "mine.py is not empty and holds no gradindex store"),
    "dim": (["build", "mine.py:task", "--out", "new", "--dim", "0"], "dim is 0, but must be at least 1"),
    "batch": (["build", "mine.py:task", "--out", "new", "--batch-size", "0"], "batch_size is 0"),
    "k of 0": (["query", "store", "--task", "mine.py:task", "-q", "0", "-k", "0"], "k is 0, but must be between 1 and"),
    "k of 13": (["query", "store", "--task", "mine.py:task", "-q", "0", "-k", "13"], "number of training examples, 12"),
    "k of all": (["self-influence", "store", "-k", "13"], "k is 13"),
    "position": (["query", "store", "--task", "mine.py:task", "-q", "4"], "There is no query example 4"),
    "no file": (["query", "store", "--task", "mine.py:task", "--file", "gone.txt"], "gone.txt does not exist"),
    "bad file": (["query", "store", "--task", "mine.py:task", "--file", "mine.py"], "Reading queries from mine.py"),
    "wrong task": (["query", "store", "--task", "mine.py:first_layer", "-q", "0"], "not match store: layers differ"),
    "no store": (["query", "gone", "--task", "mine.py:task", "-q", "0"], "gone is not a gradindex store"),
    "no column": (["query", "store", "--task", "mine.py:task", "-q", "0", "--where", "x=1"], "no column 'x'"),
    "no value": (["self-influence", "store", "--where", "age=1"], "no column 'age'. It has: name"),
    "no ids": (["query", "store", "--task", "mine.py:task", "-q", "0", "--ids", "mine.py"], "mine.py holds no ids"),
    "empty ids": (["query", "store", "--task", "mine.py:task", "-q", "0", "--ids", "e.npy"], "e.npy holds no ids"),
    "gone ids": (["query", "store", "--task", "mine.py:task", "-q", "0", "--ids", "i.npy"], "i.npy does not exist"),
    "explain": (["explain", "store", "--task", "mine.py:task", "-q", "0", "--id", "12"], "no training id 12"),
    "info of nothing": (["info", "gone"], "gone is not a gradindex store"),
    "verify of nothing": (["verify", "."], ". is not a gradindex store"),
    "part": (["build", "mine.py:task", "--out", "new", "--part", "3/2"], "part is 3/2, but must be from 1/2 to 2/2"),
    "no id": (["remove", "store", "--id", "12"], "There is no training id 12"),
    "all ids": (["remove", "store", *[x for i in range(12) for x in ("--id", str(i))]], "example would be left"),
    "remove of nothing": (["remove", "gone", "--id", "1"], "gone is not a gradindex store"),
    "compact of nothing": (["compact", "gone"], "gone is not a gradindex store"),
    "merge of nothing": (["merge", "store", "gone"], "gone is not a gradindex store"),
    "merge of itself": (["merge", "store", "store"], "A store is named twice"),
    "seal of nothing": (["seal", "gone"], "gone is not a gradindex store"),
    "export of nothing": (["export", "gone", "out"], "gone is not a gradindex store"),
    "add to nothing": (["add", "gone", "--task", "mine.py:task"], "gone is not a gradindex store"),
    "add of fewer": (["add", "store", "--task", "mine.py:low"], "data length (12 stored, 9 now)"),
    "repair of nothing": (["build", "mine.py:task", "--out", "gone", "--repair"], "gone is not a gradindex store"),
    "row bytes": (["build", "mine.py:task", "--out", "new", "--row-bytes", "5"], "row_bytes is 5, but must"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_BUILDS)
def test_what_cannot_be_done_harms_nothing_that_is_stored(built, case):
    before = snapshot(built / "store")
    arguments, message = BAD_BUILDS[case]
    (built / "e.npy").touch()
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert snapshot(built / "store") == before


USAGE = [
    ["query", "store", "--task", "mine.py:task"],
    ["query", "store", "--task", "mine.py:task", "-q", "0", "--train-id", "1"],
    ["query", "store", "-q", "0"],
    ["query", "store", "--task", "mine.py:task", "-q", "zero"],
    ["query", "store", "--task", "mine.py:task", "-q", "0", "--json", "--csv"],
    ["build", "mine.py:task"],
    ["build", "mine.py:task", "--out", "new", "--projection", "gauss"],
    ["rebuild"],
    ["query", "store", "--task", "mine.py:task", "-q", "0", "--where", "name"],
    ["query", "store", "--task", "mine.py:task", "-q", "0", "--at-least", "much"],
    ["explain", "store", "--task", "mine.py:task", "-q", "0"],
    ["self-influence", "store", "-k", "some"],
    ["build", "mine.py:task", "--out", "new", "--part", "3"],
    ["build", "mine.py:task", "--out", "new", "--part", "1/2", "--repair"],
    ["build", "mine.py:task", "--out", "store", "--dim", "8", "--repair"],
    ["remove", "store"],
    ["remove", "store", "--id", "1", "--ids-from", "-"],
    ["merge", "store"],
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_wrong_usage_has_exit_code_2(built, arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")


@pytest.mark.slow
def test_an_unfinished_build_says_how_to_go_on(work, monkeypatch):
    monkeypatch.setenv("STOP", "1")
    stopped = call("build", "mine.py:stops", "--out", "store", "--batch-size", "2")
    assert (stopped.exit_code, stopped.stdout, stopped.stderr) == (130, "", INTERRUPTED)
    monkeypatch.delenv("STOP")
    assert "unfinished, 0 shards done" in call("info", "store").stdout
    asked = call("query", "store", "--task", "mine.py:stops", "-q", "0")
    assert asked.exit_code == 1
    assert "has not finished (0 of 1 shards). Rerun the same `gradindex build` to resume" in asked.stderr
    assert call("build", "mine.py:stops", "--out", "store").exit_code == 0
    assert call("query", "store", "--task", "mine.py:stops", "-q", "0", "-k", "1").exit_code == 0


def test_parts_are_built_side_by_side_and_sealed(work):
    for part in ("2/2", "1/2"):
        result = call("build", "mine.py:task", "--out", "store", "--part", part, "--shard-rows", 4, "--batch-size", 2)
        assert result.stdout == f"store: part {part} is done; once all parts are, run: gradindex seal store\n"
    assert "unfinished, 3 shards done" in call("info", "store").stdout
    assert "12 of 12 rows are done" in call("info", "store").stdout
    assert call("seal", "store").stdout == "store: 12 rows of 3,072 numbers, from 3 checkpoints\n"
    assert call("verify", "store").exit_code == 0


@pytest.mark.slow
def test_a_store_grows_shrinks_and_is_compacted(work):
    call("build", "mine.py:low", "--out", "store", "--dim", 8)
    assert call("add", "store", "--task", "mine.py:grown").stdout == "store: 6 rows added, 15 in all\n"
    assert call("add", "store", "--task", "mine.py:grown").stdout == "store: 0 rows added, 15 in all\n"
    assert call("remove", "store", "--id", 3, "--id", 14).stdout == "store: 13 rows left\n"
    assert call("remove", "store", "--ids-from", "-", input="4 5\n6\n").stdout == "store: 10 rows left\n"
    assert "5 removed rows still take space; `gradindex compact` frees it" in call("info", "store").stdout
    assert re.fullmatch(r"store: 10 rows in [\d.]+ KiB, [\d.]+ KiB less than before\n", call("compact", "store").stdout)
    hits = json.loads(call("query", "store", "--task", "mine.py:grown", "-q", 0, "-k", 10, "--json").stdout)
    assert {hit["id"] for hit in hits["records"]} == {0, 1, 2, 7, 8, 9, 10, 11, 12, 13}
    assert all(hit["name"] == f"n{hit['id']}" for hit in hits["records"])


def test_a_task_that_has_grown_is_asked_with_a_word(work):
    call("build", "mine.py:low", "--out", "store", "--dim", 8)
    result = call("query", "store", "--task", "mine.py:grown", "-q", 0, "-k", 9)
    assert result.stderr == (
        "store lacks 6 of the task's training examples, so answers leave them out. "
        "To add them: gradindex add store --task mine.py:grown\n"
    )


@pytest.mark.slow
def test_checkpoints_are_added_and_stores_merged(work):
    call("build", "mine.py:fewer", "--out", "store")
    assert call("add-checkpoint", "store", "--task", "mine.py:task").stdout == "store: 1 checkpoints added, 3 in all\n"
    for name in ("low", "high"):
        call("build", f"mine.py:{name}", "--out", name)
    assert call("merge", "low", "high", "--offset", 9).stdout == "low: 15 rows, ids up to 14\n"
    assert call("query", "low", "--task", "mine.py:grown", "-q", 0, "-k", 15).exit_code == 0


def test_damage_is_repaired_alone(built):
    shard = built / "store" / "shards" / "0001-00000.h5"
    before = snapshot(built / "store")
    assert (
        call("build", "mine.py:task", "--out", "store", "--repair").stdout == "store is undamaged: nothing to repair\n"
    )
    content = bytearray(shard.read_bytes())
    content[40_000] ^= 1
    shard.write_bytes(content)
    result = call("build", "mine.py:task", "--out", "store", "--repair")
    assert result.stdout.endswith("shards/0001-00000.h5 is damaged in 1 of 10 blocks (ids 2 to 3): recomputed\n")
    (made,) = (built / "store" / "shards").glob("*.h5")
    assert made.read_bytes() == before[shard]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("out", ["rows.parquet", "folder"])
def test_rows_and_scores_are_exported(built, out, rows):
    call("remove", "store", "--id", 5)
    said = "11 rows of 3,072 numbers" if rows else "11 examples"
    assert call("export", "store", out, *([] if rows else ["--no-rows"])).stdout == f"{out}: {said}\n"
    store = gradindex.GradientStore("store")
    if out == "folder":
        found = {path.stem: np.load(path) for path in (built / out).rglob("*.npy")}
        expected = {"ids": store.ids, "name": store.column("name"), "losses": store.losses()}
        expected |= {"self_influence": store.self_influence()} | ({"rows": store.rows(store.ids)} if rows else {})
    else:
        table = pyarrow.parquet.read_table(out).to_pydict()
        found = {name: np.array(values) for name, values in table.items()}
        frame = store.to_pandas()
        expected = {"id": store.ids} | {name: frame[name].to_numpy() for name in frame}
        expected |= {"row": store.rows(store.ids)} if rows else {}
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    again = call("export", "store", out)
    assert (again.exit_code, again.stderr) == (1, f"Error: {out} exists. Choose another name.\n")
    assert [path.name for path in built.iterdir() if "tmp-" in path.name] == []


def test_parquet_without_its_package_is_explained(built, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = call("export", "store", "rows.parquet")
    assert "needs the package pyarrow. Install it: pip install 'gradindex[parquet]'" in result.stderr
    assert not (built / "rows.parquet").exists()


@pytest.mark.slow
def test_traceback_shows_where_an_error_came_from(work):
    done = shell("--traceback", "build", "mine.py:broken", "--out", "store")
    assert done.returncode == 1
    assert 'mine.py", line' in done.stderr
    assert "FileNotFoundError: no data here" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [["info"], ["verify"], ["self-influence", "-k", "1"]])
def test_looking_at_a_store_runs_no_code_of_the_task_and_no_torch(built, command):
    (built / "mine.py").write_text("raise SystemExit('the task was imported')")
    code = (
        "import sys; from gradindex.cli import main\n"
        f"main([{command[0]!r}, 'store', *{command[1:]!r}], standalone_mode=False)\n"
        "assert not {'torch', 'mine'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=built, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["build", "--help"]])
def test_help_answers_at_once(arguments):
    def seconds():
        """Of the processor, for other processes' time is not ours."""
        before = os.times()
        assert shell(*arguments).returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert any(seconds() < 0.5 for _ in range(3))


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_an_example_in_its_help(command):
    assert f"Example: gradindex {command} " in " ".join(call(command, "--help").stdout.split())


@pytest.mark.slow
def test_progress_is_shown_on_a_terminal_alone(built):
    assert call("build", "mine.py:task", "--out", "other").stderr == ""
    script = shutil.which("script")
    if script is None:
        pytest.skip("needs the program `script` for a terminal")
    command = f"{sys.executable} -m gradindex.cli build mine.py:task --out third --batch-size 2"
    done = subprocess.run([script, "-qec", command, "/dev/null"], capture_output=True, text=True, check=False)
    assert "gradients" in done.stdout
    assert "rows/s" in done.stdout


@pytest.mark.slow
def test_the_signal_of_control_c_ends_a_build_cleanly(work):
    with (work / "mine.py").open("a") as file:
        file.write(SLOW)
    command = [sys.executable, "-m", "gradindex.cli", "build", "mine.py:slow", "--out", "store", "--batch-size", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 300  # on a busy machine
            # Python passes over a signal that meets it in a finalizer or a weak reference's callback, of which imports
            # have many: so wait until it sleeps.
            while not (work / "asleep").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=300)
        finally:
            process.kill()  # if it goes on: nothing of it may reach another test
    assert (process.returncode, errors) == (130, INTERRUPTED)
    assert [path.name for path in (work / "store").rglob("*tmp*")] == []


def test_an_error_of_the_users_own_code_is_one_line_and_debug_shows_where_it_came_from(work):
    with (work / "mine.py").open("a") as file:
        file.write(FAILS)
    with pytest.raises(UserCodeError, match="Reading training example 0 failed: ZeroDivisionError") as caught:
        call("--debug", "build", "mine.py:fails", "--out", "store")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
