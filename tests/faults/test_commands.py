"""Command lines with absurd values: one line of error, the store as it was, no hang, no memory without end."""

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from places import TESTS

from gradindex.cli import main

TASK_FILE = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import toys
FOLDER = Path(__file__).parent
columns = {{"label": [i % 3 for i in range(12)], "name": [f"n{{i}}" for i in range(12)]}}
task = toys.make_task(FOLDER, name="toy", columns=columns, read_query=lambda path: [path.read_text()])
def callable_that_fails(): return {{}}["x"]
number = 3
"""
# What one command may take: seconds, and bytes of memory beyond what there is.
SECONDS, BYTES = 60, 4 << 30

# click opens a file that is named although another option is refused.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NUMBERS = [
    "0",
    "-1",
    "1",
    "3",
    "13",
    "-0",
    "2147483648",
    str(2**63 - 1),
    str(2**63),
    str(-(2**63) - 1),
    str(2**64),
    "9" * 400,
    "9" * 5000,
    "1e400",
    "1e9",
    "nan",
    "inf",
    "-inf",
    "0.5",
    "-0.5",
    "1.5",
    "",
    " ",
    "x",
    "٣",
    "１２",
    "1_000",
    "0x10",
    "1,000",
    "½",
    "--",
    "\x1b[2J",
    "1\n2",
    "\ud800",
    "true",
    "None",
]
SIZES = [
    "0",
    "-1G",
    "1",
    "1e400G",
    "9" * 400 + "T",
    "1.2.3M",
    "٣G",
    "1KB",
    "nan",
    "infG",
    ".",
    "1 PB",
    "G",
    "0.0001",
    "4G",
]
PARTS = [
    "0/1",
    "1/0",
    "2/1",
    "1/1",
    "1/-1",
    "1/" + "9" * 30,
    "9" * 30 + "/" + "9" * 30,
    "9" * 5000 + "/1",
    "a/b",
    "/",
    "1",
    "1/2/3",
    "٣/٤",
    "999999999/1000000000",
]
DEVICES = [
    "gpu",
    "cuda:99",
    "meta",
    "mps",
    "cpu:5",
    "",
    "cuda:-1",
    "CPU",
    "cpu",
    "xla",
    "cuda:x",
    "privateuseone",
    "cpu:99999999999",
]
PATHS = [
    "",
    ".",
    "/",
    "..",
    "x" * 256,
    "x/" * 3000,
    "mine.py",
    "folder",
    "pipe",
    "a\nb",
    "a\x1b[2Jb",
    "\udcff\udcfe",
    "gone",
    "gone/gone",
    "link",
    "loop",
    "~",
    "*",
    "store/manifest.json",
    "-",
    " ",
    "é",
]
# A pipe is read until somebody writes, as everywhere. Devices are tried in a namespace of their own, elsewhere.
READ = [path for path in PATHS if path != "pipe"]
TASKS = ["mine.py:task"] * 12 + [
    "mine.py",
    "mine.py:",
    ":task",
    ":",
    "",
    "mine.py:gone",
    "mine.py:number",
    "mine.py:callable_that_fails",
    "gone.py:task",
    "folder:task",
    "folder.py:task",
    "os:path",
    "json:loads",
    "..:task",
    "\x1b:x",
    "x" * 300 + ".py:task",
    "a b:c",
    ".x:y",
    "mine.py:task:task",
    "pipe.py:x",
]
WHERE = [
    "label=1",
    "label=x",
    "label=9e99",
    "label=" + "9" * 400,
    "label",
    "=",
    "=1",
    "label=",
    "gone=1",
    "name=\x1b[2J",
    "name=n1",
    "label=nan",
    "\ud800=1",
    "label=" + "9" * 5000,
]
LABELS = ["label", "name", "gone", "", "\x1b[2J"]

OPTIONS = {
    "build": [
        ("--dim", NUMBERS),
        ("--row-dim", NUMBERS),
        ("--row-bytes", NUMBERS),
        ("--seed", NUMBERS),
        ("--workers", NUMBERS),
        ("--batch-size", NUMBERS),
        ("--memory", SIZES),
        ("--shard-rows", NUMBERS),
        ("--part", PARTS),
        ("--device", DEVICES),
        ("--projection", ["none", "gaussian", "fitted", "kronecker", "x", ""]),
        ("--row-type", ["int8", "float16", "x"]),
        ("--precision", ["float16", "bfloat16", "x"]),
        ("--factors", ["float32", "x"]),
        ("--bases-from", PATHS),
        ("--unit-norm", None),
        ("--repair", None),
        ("--self-influence", ["projected", "x"]),
    ],
    "query": [
        ("-q", NUMBERS),
        ("--train-id", NUMBERS),
        ("--file", READ),
        ("-k", NUMBERS),
        ("--at-least", NUMBERS),
        ("--candidates", NUMBERS),
        ("--where", WHERE),
        ("--differs", LABELS),
        ("--ids", READ),
        ("--device", DEVICES),
        ("--html", PATHS),
        ("--aggregate", ["sum", "x"]),
        ("--rerank", ["rows", "none", "x"]),
        ("--csv", None),
        ("--json", None),
        ("--raw-csv", None),
        ("--kind", ["absolute", "opponents", "x"]),
    ],
    "explain": [
        ("-q", NUMBERS),
        ("--id", NUMBERS),
        ("--html", PATHS),
        ("--device", DEVICES),
        ("--json", None),
        ("--csv", None),
    ],
    "self-influence": [("-k", [*NUMBERS, "all"]), ("--where", WHERE), ("--json", None), ("--csv", None)],
    "index": [
        ("--recall", NUMBERS),
        ("-k", NUMBERS),
        ("--queries", [*NUMBERS, "20"]),
        ("--dim", NUMBERS),
        ("--device", DEVICES),
        ("--kind", ["flat", "ivf", "pq", "spill", "x"]),
        ("--copies", NUMBERS),
        ("--budget", NUMBERS),
    ],
    "evaluate": [("-k", NUMBERS), ("--queries", [*NUMBERS, "20"]), ("--json", None), ("--device", DEVICES)],
    "info": [("--json", None)],
    "verify": [],
    "remove": [("--id", [text for text in NUMBERS if text not in ("0", "1", "3", "-0", "٣")]), ("--ids-from", READ)],
    "compact": [],
    "merge": [("--offset", NUMBERS)],
    "seal": [],
    "export": [],
    "add": [("--workers", NUMBERS), ("--device", DEVICES)],
    "add-checkpoint": [("--workers", NUMBERS), ("--device", DEVICES)],
}
NEED_TASK = {"query", "explain", "add", "add-checkpoint"}
MAY_TAKE_TASK = {"index", "evaluate"}


def command_line(number):
    """The same for the same number: a command with one to four absurd options, most of it otherwise in order."""
    chance = random.Random(number)
    name = chance.choice([*["build", "query"] * 4, *["explain", "self-influence", "index", "evaluate"] * 2, *OPTIONS])
    folder = "store" if chance.random() < 0.85 else chance.choice(PATHS)
    line = [name]
    if name == "build":
        out = "new" if chance.random() < 0.8 else chance.choice([*PATHS, "store"])
        line += [chance.choice(TASKS), "--out", out]
        if chance.random() < 0.3:
            line += ["--dry-run"]
    else:
        line += [folder]
    if name in NEED_TASK or (name in MAY_TAKE_TASK and chance.random() < 0.2):
        line += ["--task", chance.choice(TASKS)]
    if name in ("query", "explain") and chance.random() < 0.8:
        line += ["-q", "0"]
    if name == "explain" and chance.random() < 0.8:
        line += ["--id", "5"]
    if name in ("export", "merge"):
        line += [chance.choice([*PATHS, "new"])]
    options = OPTIONS[name]
    for option, values in chance.sample(options, min(len(options), chance.choice([1, 1, 1, 2, 3, 4]))):
        line += [option] if values is None else [option, chance.choice(values)]
    return line


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    (folder / "mine.py").write_text(TASK_FILE.format(tests=str(TESTS)))
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("gone")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    with contained(folder):
        assert CliRunner().invoke(main, ["build", "mine.py:task", "--out", "store"]).exit_code == 0
    return folder


@contextmanager
def contained(folder):
    """Within the folder; with an end to time and memory, and no file of another place at risk."""
    before, limit = Path.cwd(), resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, _late)
    os.chdir(folder)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, limit[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGALRM, old)
        os.chdir(before)


class TooLate(BaseException):
    """No command may turn this into a line."""


def _late(*_):
    raise TooLate(f"took over {SECONDS} s")


def state_of(folder):
    """What must not change: every file but those that a command may make, by content."""
    names = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("lock", "mine.py")]
    names = [path for path in names if "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def problem_of(result, error):
    """What is wrong with how a command ended, or nothing."""
    if error is not None and not isinstance(error, SystemExit):
        return f"raised {type(error).__name__}: {error}"
    code, output, errors = result
    if code not in (0, 1, 2, 130):
        return f"exit code {code}"
    if "Traceback" in output + errors:
        return "a traceback"
    unseen = [c for c in output.replace("\r\n", "\n") + errors if c not in "\n\t" and ord(c) < 32]
    if unseen:
        return f"control characters {unseen[:3]}"
    told = [line for line in errors.splitlines() if line.startswith("Error: ")]
    if code == 1 and (len(told) != 1 or errors.splitlines()[-1] != told[0]):
        return "not one line of error"
    if code == 2 and (len(told) != 1 or not errors.startswith("Usage: ")):
        return "not one line below the usage"
    return None


def in_process(line, folder):
    children = len(list(Path("/proc/self/task").iterdir()))
    with contained(folder):
        outcome = CliRunner().invoke(main, line)
    assert len(list(Path("/proc/self/task").iterdir())) < children + 64
    return (outcome.exit_code, outcome.stdout, outcome.stderr), outcome.exception


def as_process(line, folder):
    """The command as a person gives it, killed with all its children when it takes too long."""
    command = [sys.executable, "-m", "gradindex.cli", *line]
    with contained(folder):
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        output, errors = (stream.decode("utf-8", "replace") for stream in process.communicate())
    return (process.returncode, output, errors), None


def tried(number, work, run, line=None):
    line = line or command_line(number)
    before = state_of(work / "store")
    result, error = run(line, work)
    problem = problem_of(result, error)
    if problem is None and state_of(work / "store") != before:
        problem = "the store has changed"
    if problem is None and [path.name for path in work.rglob("*.tmp-*")]:
        problem = "temporary files are left"
    subprocess.run(["rm", "-rf", "new"], cwd=work, check=True)
    return None if problem is None else f"{number}: {problem}\n{line!r}"[:2000] + f"\n{result}"[:2000]


@pytest.mark.slow
def test_absurd_values_are_one_line_and_harm_nothing(faults, work):
    problems = [tried(number, work, in_process) for number in faults("absurd command lines", 60)]
    assert [problem for problem in problems if problem] == []


@pytest.mark.slow
def test_absurd_values_given_to_a_process_of_its_own(faults, work):
    def lines():
        for number in faults("absurd command lines, in processes of their own", 4):
            line = command_line(10_000 + number)
            if not any("\0" in part or "\ud800" in part or len(part) > 100_000 for part in line):
                yield number, line

    problems = [tried(number, work, as_process, line) for number, line in lines()]
    assert [problem for problem in problems if problem] == []
