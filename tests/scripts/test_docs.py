"""Every command and code block of README and docs runs, and what they name exists."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from frameworks import imported
from pages import RECIPES, blocks
from places import DATA, TOP
from reference import check_scores, gradients, scores
from toys import call

PAGES = [
    *(TOP / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((TOP / "docs").rglob("*.md")),
]
BY_TASK = ("build.md", "explain.md", "queries.md", "grow.md")
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GRADINDEX_DATA": str(DATA)}

# What README calls "yours": a model, its data, and the loop's variables.
MY_TRAINING = """
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
make_model = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
data = lambda n: TensorDataset(torch.randn(n, 4), torch.randint(3, (n,)))
train_set, test_set = data(40), data(5)
"""
LOOP = """
from my_training import *
model = make_model()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
loader = DataLoader(train_set, 8, shuffle=True)
"""


def shell_lines(text):
    return [line.partition("  #")[0].strip() for line in text.splitlines() if line.strip()]


def said(command, folder, monkeypatch):
    """What a `gradindex` command of a page prints, in this process, where torch is loaded already."""
    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(command)
    assert program == "gradindex"
    result = call(*arguments)
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result.stdout


def run(command, folder):
    command = re.sub(r"(?<![\w/])scripts/", f"{TOP}/scripts/", command)
    done = subprocess.run(command, shell=True, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_readme_takes_a_new_user_from_training_to_answers(tmp_path, monkeypatch):
    (tmp_path / "my_training.py").write_text(MY_TRAINING)
    script, commands = LOOP, []
    for language, text in blocks(TOP / "README.md"):
        if text.startswith("# my_task.py"):
            (tmp_path / "my_task.py").write_text(text)
        elif language == "python":
            script += text
        elif language == "sh" and text.startswith("gradindex") and "scripts/" not in text:
            commands += shell_lines(text)
    (tmp_path / "session.py").write_text(script)
    printed = run("python session.py", tmp_path)
    assert re.findall(r"^query (\d) \(label \d\): proponents$", printed, re.MULTILINE) == ["0", "1", "2"]
    assert "positive score = training on this example lowered the loss" in printed
    assert len(commands) == 22
    assert run(commands[0], tmp_path)
    for command in commands[1:]:
        assert said(command, tmp_path, monkeypatch)


def test_the_readers_own_model_takes_at_most_20_lines():
    lines = [
        line
        for language, text in blocks(TOP / "README.md")
        if language == "python" and "my_task" in text
        for line in text.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert 8 < len(lines) <= 20


@pytest.mark.slow
def test_the_demo_command_ends_with_the_path_of_a_report(demo_run):
    lines = [line for _, text in blocks(TOP / "README.md") for line in shell_lines(text) if line.startswith("bash")]
    assert lines == ["bash scripts/demo.sh", "bash scripts/test.sh"]  # the second is what runs this test
    out, printed = demo_run
    report = out.parent / printed.splitlines()[-1]
    assert report.read_text().startswith("<!doctype html>")


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not (DATA / "mnist.tar.xz").exists(), reason=f"needs {DATA}/mnist.tar.xz (GRADINDEX_DATA)")
def test_the_commands_on_real_data_run(tmp_path, quick_forms, monkeypatch):
    commands = [line for _, text in blocks(TOP / "README.md") if "mnist" in text for line in shell_lines(text)]
    assert len(commands) == 3
    (tmp_path / "quick").mkdir()
    monkeypatch.setitem(ENVIRONMENT, "GRADINDEX_QUICK", str(tmp_path / "quick"))  # a quarter of the rows, trained anew
    for command in commands[:2]:
        assert run(command.replace("/tmp/mnist", str(tmp_path / "mnist")), tmp_path)
    assert commands[2] == "python scripts/bench/mnist.py --quick"  # as all.py runs it
    missed = [line for line in (quick_forms[1] / "bench" / "mnist.log").read_text().splitlines() if "MISSED" in line]
    # A quarter of the data finds fewer of the flipped labels than the whole.
    assert [line for line in missed if not line.startswith("flipped labels found at 10%")] == []


@pytest.mark.slow
def test_the_page_on_tasks_runs_from_top_to_bottom(tmp_path):
    (tmp_path / "my_training.py").write_text(MY_TRAINING)
    told = blocks(TOP / "docs" / "tasks.md")
    assert {language for language, _ in told} == {"python"}
    (tmp_path / "session.py").write_text("from my_training import *\n" + "".join(text for _, text in told))
    printed = run("python session.py", tmp_path)
    assert printed.count("item 0: proponents") == 3
    assert "('train 0', 'train 1', 'train 2', 'train 3')" in printed
    assert {"2024-01-31", "2024-02-02"} <= set(printed.split())


@pytest.mark.slow
def test_the_pages_by_task_run_after_readmes_first_steps(tmp_path, monkeypatch):
    (tmp_path / "my_training.py").write_text(MY_TRAINING)
    first = [text for language, text in blocks(TOP / "README.md") if language == "python"][:2]
    (tmp_path / "my_task.py").write_text(first[1])
    told = [block for name in BY_TASK for block in blocks(TOP / "docs" / name)]
    script = LOOP + first[0] + "import gradindex\nfrom my_task import task\n"
    (tmp_path / "session.py").write_text(script + "".join(text for language, text in told if language == "python"))
    printed = run("python session.py", tmp_path)
    assert printed.startswith("40 rows of")
    assert "all checkpoints" in printed
    assert {language for language, _ in told} == {"python", "sh"}
    in_readme = {line for _, text in blocks(TOP / "README.md") for line in shell_lines(text)}
    own = [line for language, text in told if language == "sh" for line in shell_lines(text) if line not in in_readme]
    assert own == ["gradindex build my_task.py:task --out other --dry-run"]  # README's are run by the test above
    assert "disk" in said(own[0], tmp_path, monkeypatch)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names of a session after README's first steps: a task, and its store in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_training.py").write_text(MY_TRAINING)
    first = [text for language, text in blocks(TOP / "README.md") if language == "python"][:2]
    (tmp_path / "my_task.py").write_text(first[1])
    session = {}
    exec(LOOP + first[0] + "train_labels = train_set.tensors[1].numpy()", session)
    said("gradindex build my_task.py:task --out store", tmp_path, monkeypatch)
    yield session
    for module in ("my_training", "my_task", "judged_task"):
        sys.modules.pop(module, None)


def test_the_page_on_whitening_runs_from_top_to_bottom(names, tmp_path, monkeypatch, capsys):
    for language, text in blocks(TOP / "docs" / "whitening.md"):
        if language == "python":
            exec(compile(text, "whitening.md", "exec"), names)
        elif language == "sh":
            for line in shell_lines(text):
                assert said(line, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert "whitened TracInCP" in printed and "no unit of loss" in printed and "all layers" in printed
    assert "relative residual" in printed


@pytest.mark.slow
def test_the_page_on_judging_runs_from_top_to_bottom(names, tmp_path, monkeypatch, capsys):
    for language, text in blocks(TOP / "docs" / "judging.md"):
        if text.startswith("# judged_task.py"):
            (tmp_path / "judged_task.py").write_text(text)
        elif language == "python":
            exec(compile(text, "judging.md", "exec"), names)
        else:
            for line in shell_lines(text):
                assert said(line, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert printed.count("ceiling: two seeds correlate") == 2
    assert (names["found"].counted, names["curve"].ks) == (5, (2, 8))
    # 30 halves and 3 classes left out twice; all, and two of each of three rankings, thrice.
    assert len(list((tmp_path / "retrained").glob("*-?.json"))) == 2 * 33 + 3 * 7


@pytest.mark.slow
def test_the_page_on_captum_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = blocks(TOP / "docs" / "recipes" / "captum.md")
    assert {language for language, _ in told} == {"python"}
    names = {}
    exec(MY_TRAINING + LOOP.replace("from my_training import *\n", ""), names)
    for _, text in told:
        exec(compile(text, "captum.md", "exec"), names)
    printed = dict(line.rsplit(" [[", 1) for line in capsys.readouterr().out.splitlines() if " [[" in line)
    assert set(printed) == {"proponents", "opponents", "with the bias", "from the store"}
    assert printed["with the bias"] == printed["from the store"]
    assert printed["proponents"] != printed["opponents"]
    task, rates = names["task"], [0.1] * 3
    check_scores(task, rates, prefixes=("2.",))
    of_queries, of_train = (
        gradients(task, [data[i] for i in range(n)], prefixes=("2.weight",))
        for data, n in ((task.query, 2), (task.train, 40))
    )
    truth, scale = scores(task, of_queries, of_train, rates)
    assert np.all(np.abs(names["scores"].numpy() - truth) < 1e-6 * scale)  # in float32, without the bias


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers
def test_the_page_on_language_models_runs_from_top_to_bottom(tmp_path, monkeypatch):
    imported("transformers").GPT2LMHeadModel  # noqa: B018  # loaded here, where it is made to load
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    printed = []
    names = {"print": printed.append}
    for language, text in blocks(TOP / "docs" / "recipes" / "language-models.md"):
        if text.startswith("# lm_"):
            (tmp_path / text.splitlines()[0][2:]).write_text(text)
        elif language == "python":
            exec(compile(text, "language-models.md", "exec"), names)
        else:
            printed += [said(line, tmp_path, monkeypatch) for line in shell_lines(text)]
    hits, by_command, explanation, _, own = printed
    assert str(hits).startswith('item 0 ("the owl chased the mouse"): proponents')
    assert hits.ids[0, 0] == 18  # the same text
    assert str(hits).splitlines()[1:4] == by_command.splitlines()[1:4]
    assert explanation.query_tokens == (("the", "owl", "chased", "the", "mouse"),)
    assert "gi-tokens" in (tmp_path / "tokens.html").read_text()
    assert len(own[0]) == 5
    check_scores(replace(names["task"], query=names["task"].train), [0.5] * 4)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("language-models.md", "# lm_task.py", "print(hits)"), ("captum.md", "from", "scores =")],
)
def test_the_first_answer_is_at_most_12_lines_after_the_training(name, first, last):
    """As those of the other recipes, which test_recipes.py counts."""
    page = "".join(text for _, text in blocks(TOP / "docs" / "recipes" / name))
    text = re.split(r"recorder\.save\(\)|return saved\[\"rate\"\]", page)[1]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert next(line for line in text.splitlines() if line.strip()).startswith(first)
    assert next(i for i, line in enumerate(lines, 1) if line.startswith(last)) <= 12


def test_other_pages_hold_no_block_that_nothing_runs():
    run_above = ("README.md", "tasks.md", "captum.md", "language-models.md", "judging.md", "whitening.md", *BY_TASK)
    run = {*run_above, *RECIPES}
    assert [page.name for page in PAGES if page.name not in run and blocks(page)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_in_a_page_exist(page):
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:gradindex|scripts|docs|tests|data)/[\w./-]*)`", text)
    missing = [x for x in links if not (page.parent / x).exists()] + [x for x in paths if not (TOP / x).exists()]
    assert missing == []


def test_every_room_has_its_place_in_the_plan():
    plan = (TOP / "docs" / "architecture.md").read_text()
    rooms = {
        path.stem for path in (TOP / "gradindex").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert [room for room in sorted(rooms - {"__init__"}) if f"`{room}`" not in plan and f"`{room}/`" not in plan] == []
