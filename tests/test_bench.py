"""What every benchmark prints and writes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

TOP = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(TOP / "scripts" / "bench")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
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
