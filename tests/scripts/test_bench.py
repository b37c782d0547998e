"""What every benchmark prints and writes, what their quick forms stand on, and the command that runs them all."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import TOP
from toys import python


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(TOP / "scripts" / "bench")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("GRADINDEX_QUICK", "of another process")  # put back afterwards
    import harness

    def bench(*options):
        monkeypatch.setattr(sys, "argv", [str(TOP / "scripts" / "bench" / "mnist.py"), *map(str, options)])
        made = harness.Bench("A title", "what it is")
        made.bar("speed", np.float32(2.5), "x", 2)
        made.bar("memory", 1.4, "x", 1.3, at_most=True)
        made.figure("time", 12.345678, "s")
        made.finish()
        return made

    return bench


def test_the_last_line_is_one_json_object_with_every_bar(run, capsys):
    run("--json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["speed: 2.5 x (at least 2) holds", "memory: 1.4 x (at most 1.3) MISSED", "time: 12.35 s"]
    assert json.loads(lines[-1])["bars"] == [
        {"name": "speed", "value": 2.5, "unit": "x", "target": 2, "holds": True},
        {"name": "memory", "value": 1.4, "unit": "x", "target": 1.3, "holds": False},
    ]


def test_a_saved_result_names_machine_versions_and_command(run, tmp_path):
    assert run("--save", tmp_path / "result.md", "--quick").quick
    text = (tmp_path / "result.md").read_text()
    assert text.startswith("# A title\n")
    for part in (
        "- processor: ",
        "- load of others at the start: ",
        "- versions: Python 3.",
        "- command: `python scripts/bench/mnist.py --quick`",
    ):
        assert part in text
    assert "| memory | 1.4 x | 1.3 | **no** |" in text
    assert "| time | 12.35 s |" in text


def test_a_saved_result_says_so_where_threads_were_limited(run, tmp_path, monkeypatch):
    made = run()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made.options.save = tmp_path / "result.md"
    made.finish()
    assert "- command: `OMP_NUM_THREADS=1 python scripts/bench/mnist.py`\n" in (tmp_path / "result.md").read_text()


def test_committed_results_are_those_of_benchmarks_that_exist():
    for page in (TOP / "docs" / "results").glob("*.md"):
        (command,) = [line for line in page.read_text().splitlines() if line.startswith("- command: ")]
        (script,) = [word.strip("`") for word in command.split() if word.strip("`").endswith(".py")]
        assert (TOP / script).is_file()
        assert page.stem == Path(script).stem or page.stem.startswith(f"{Path(script).stem}_")  # a part of it


def test_bars_are_written_down_as_they_come(run, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADINDEX_BARS", str(tmp_path / "bars"))
    run()
    lines = [json.loads(line) for line in (tmp_path / "bars").read_text().splitlines()]
    assert [(bar["name"], bar["holds"], bar["at_most"]) for bar in lines] == [
        ("speed", True, False),
        ("memory", False, True),
    ]


def test_the_quick_form_keeps_what_it_makes_apart(run):
    run("--quick")
    folder = Path(os.environ["GRADINDEX_QUICK"])
    assert folder.is_dir()
    assert folder.name.startswith("gradindex-quick-")
    run()
    assert "GRADINDEX_QUICK" not in os.environ


def test_the_quick_form_writes_no_result_into_docs(run, capsys):
    with pytest.raises(SystemExit):
        run("--quick", "--save", TOP / "docs" / "results" / "mnist.md")
    assert "--quick measures stand-ins, which are not for docs" in " ".join(capsys.readouterr().err.split())


def test_missing_peers_are_left_out_of_the_quick_form_alone(run, capsys):
    assert run("--quick").installed(["json", "no_such_peer"]) == ["json"]
    assert "left out, for it is not installed: no_such_peer" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^no_such_peer is not installed\. Run this with an environment"):
        run().installed(["json", "no_such_peer"])


STAND_INS = """
import json, os, sys
sys.path[:0] = [{tasks!r}, {paper!r}]
import cifar10, housing, mnist, news, numpy as np, reference
found = {{name: module.data() for name, module in (("mnist", mnist), ("cifar10", cifar10))}}
districts = housing.read(reference.data_file("california_housing.csv"))
texts = news.read(reference.data_file("ag_news_7600.csv"))
print(json.dumps([
    {{name: [list(data["images"].shape), int(data["flipped"].sum()), len(np.unique(data["images"], axis=0))]
      for name, data in found.items()}},
    [list(districts.features.shape), bool(districts.features.isfinite().all())],
    [len(texts.texts), np.unique(texts.labels).tolist()],
    reference.STAND_INS,
]))
del os.environ["GRADINDEX_QUICK"]
try:
    mnist.data()
except FileNotFoundError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_data_the_quick_forms_have_stand_ins_and_the_full_forms_have_none(tmp_path):
    code = STAND_INS.format(tasks=str(TOP / "scripts" / "tasks"), paper=str(TOP / "scripts" / "paper"))
    nothing, quick = tmp_path / "nothing", tmp_path / "quick"
    quick.mkdir()
    environment = {"GRADINDEX_DATA": nothing, "GRADINDEX_CACHE": tmp_path / "cache", "GRADINDEX_QUICK": quick}
    printed, refused = python(code, **{name: str(path) for name, path in environment.items()}).splitlines()
    pictures, districts, texts, said = json.loads(printed)
    assert pictures["mnist"][0] == [5000, 28, 28]
    assert pictures["mnist"][1] == 500
    assert pictures["mnist"][2] > 4500  # of 1,400 digits, moved
    assert pictures["cifar10"] == [[1000, 32, 32, 3], 100, 1000]
    assert districts[0][0] == 4000
    assert districts[1]
    assert texts == [1600, [0, 1, 2, 3]]
    assert [part.split(" ")[0] for part in said] == ["digits", "digits", "made-up", "made-up"]
    assert not (tmp_path / "cache").exists()
    assert "mnist.tar.xz does not exist. Set GRADINDEX_DATA" in refused


SCRIPT = """
import json, os, sys
from pathlib import Path
with open(os.environ["GRADINDEX_BARS"], "a") as file:
    bar = {{"name": "speed", "value": {value}, "unit": "x", "target": 2, "holds": {value} >= 2, "at_most": False}}
    file.write(json.dumps(bar) + chr(10))
with Path({runs!r}).open("a") as file:
    file.write({name!r} + " " + " ".join(sys.argv[1:2]) + chr(10))
print("on its way")
sys.exit({status})
"""


@pytest.fixture
def everything(tmp_path, monkeypatch):
    """all.py over a few scripts that are made for it."""
    monkeypatch.syspath_prepend(TOP / "scripts" / "bench")
    monkeypatch.delitem(sys.modules, "all", raising=False)
    module = importlib.import_module("all")
    for folder in (
        "gradindex",
        "scripts/tasks",
        "scripts/bench",
        "scripts/paper",
        "scripts/quality",
        "scripts/imagenet",
    ):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "scripts" / "bench" / "peers.txt").touch()
    monkeypatch.setattr(module, "TOP", tmp_path)
    monkeypatch.setattr(module, "LOADED", ("json",))
    monkeypatch.setenv("GRADINDEX_CACHE", str(tmp_path / "cache"))

    def add(name, value=3, status=0):
        text = SCRIPT.format(value=value, status=status, name=name, runs=str(tmp_path / "runs"))
        (tmp_path / "scripts" / f"{name}.py").write_text(text)

    add("tasks/augmented")
    add("bench/good")
    add("paper/short", value=1.5)
    yield module, add, lambda: (tmp_path / "runs").read_text().split("\n")[:-1]
    sys.modules.pop("all", None)


def test_all_goes_on_after_a_crash_and_prints_what_falls_short(everything, capsys):
    module, add, runs = everything
    add("bench/crashes", value=1, status=3)
    assert module.main(["--quick", "--jobs", "1"]) == 1
    assert len(runs()) == 4
    printed = capsys.readouterr().out
    assert "bench/crashes  FAILED (3)\n    on its way\n" in printed
    assert "2 of 4 bars fall short (of stand-ins on a machine in use: a hint, no verdict):" in printed
    assert "  bench/crashes: speed: 1 x, at least 2\n" in printed  # measured before it crashed
    assert "  paper/short: speed: 1.5 x, at least 2\n" in printed
    assert printed.endswith("3 of 4 scripts ran to their end;\nfailed: bench/crashes\n")


def test_all_goes_on_with_what_is_missing_until_the_code_changes(everything, capsys):
    module, add, runs = everything
    assert module.main([]) == 0
    assert module.main([]) == 0
    assert sorted(runs()) == ["bench/good --save", "paper/short --save", "tasks/augmented "]
    printed = capsys.readouterr().out
    assert printed.count("was done before") == 3
    assert printed.count("1 of 3 bars fall short:\n  paper/short: speed: 1.5 x, at least 2") == 2
    add("paper/short", value=2)
    assert module.main([]) == 0
    assert len(runs()) == 6
    assert capsys.readouterr().out.count("0 of 3 bars fall short.") == 1


LOOKS_AROUND = """
import atexit, os, sys
atexit.register(print, "at the end")
print(__name__, sys.argv, sys.path[0], os.getcwd(), sys.stdin.read(), sys.modules["__main__"].__file__)
sys.exit("in words")
"""


def test_a_quick_form_finds_and_leaves_what_a_process_of_its_own_would(everything, tmp_path):
    module, _, _ = everything
    looks, dies = (tmp_path / "scripts" / name for name in ("bench/good.py", "paper/short.py"))
    looks.write_text(LOOKS_AROUND)
    dies.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert module.main(["--quick", "--out", str(tmp_path)]) == 1
    command = [sys.executable, *module.arguments_of("bench/good", tmp_path, quick=True)]
    alone = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (tmp_path / "bench" / "good.log").read_bytes() == alone.stdout
    statuses = {entry["name"]: entry["status"] for entry in json.loads((tmp_path / "summary.json").read_text())}
    assert statuses == {"tasks/augmented": 0, "bench/good": alone.returncode, "paper/short": -9}


def test_all_refuses_a_name_that_no_script_has(everything, capsys):
    module, _, _ = everything
    with pytest.raises(SystemExit):
        module.main(["--only", "goood"])
    assert "--only names goood, but the scripts are tasks/augmented, bench/good, paper/short" in capsys.readouterr().err


@pytest.mark.slow
def test_every_quick_form_runs_to_its_end(quick_forms):
    done, folder = quick_forms
    assert done.returncode == 0, done.stdout + done.stderr
    scripts = {path.relative_to(TOP / "scripts").with_suffix("").as_posix() for path in (TOP / "scripts").rglob("*.py")}
    ran = {entry["name"] for entry in json.loads((folder / "summary.json").read_text())}
    main = {name for name in scripts if '__name__ == "__main__"' in (TOP / "scripts" / f"{name}.py").read_text()}
    assert main - ran == {"bench/all", "bench/forks", "bench/gpu", "golden_store", "processors"}
    assert "bars fall short (of stand-ins" in done.stdout
