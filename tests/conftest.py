"""Options of the whole suite, and what several files of it look at."""

import fcntl
import os
import pickle
import subprocess
from collections import Counter
from unittest import mock

import pytest
from places import DATA, TOP


@pytest.fixture(autouse=True)
def environment_stays():
    """What a test, or a script that it runs, sets in the environment is gone for the next."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """``made_once(name, make)``: a folder that ``make`` fills, once for all processes that share the tests."""

    def made(name, make):
        shared = tmp_path_factory.getbasetemp()
        shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
        folder, done = shared / name, shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def quick_forms(made_once):
    """What `scripts/bench/all.sh --quick` printed, as a completed process, and the folder of its results.

    Every script runs once in the checks: tests of one script look at what it left here.
    """

    def run(folder):
        command = ["bash", str(TOP / "scripts" / "bench" / "all.sh"), "--quick", "--out", str(folder / "results")]
        environment = os.environ | {"GRADINDEX_DATA": str(DATA)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        (folder / "process.pickle").write_bytes(pickle.dumps(done))

    folder = made_once("quick", run)
    return pickle.loads((folder / "process.pickle").read_bytes()), folder / "results"


@pytest.fixture(scope="session")
def demo_run(made_once):
    """The folder that `bash scripts/demo.sh` filled, and what it printed."""

    def run(folder):
        done = subprocess.run(["bash", str(TOP / "scripts" / "demo.sh")], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "printed").write_text(done.stdout)

    folder = made_once("demo", run)
    return folder / "gradindex-demo", (folder / "printed").read_text()


# What takes long to make: a test that needs one of these is slow.
SLOW_FIXTURES = {"quick_forms", "demo_run", "nursery"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The scripts' quick forms last: they take as many processes as there are cores."""
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")
    items.sort(key=lambda item: "quick_forms" in item.fixturenames)


def pytest_addoption(parser):
    group = parser.getgroup("faults", "tests/faults: kills, damages, full disks, forged files, absurd commands")
    group.addoption("--faults", type=int, metavar="N", help="How many faults of each kind to try; by default a few.")
    group.addoption("--faults-from", type=int, default=0, metavar="I", help="Begin with the I-th fault of each kind.")


def pytest_configure(config):
    config.faults_tried = Counter()


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes that share the tests
        session.config.workeroutput["faults"] = dict(session.config.faults_tried)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.faults_tried.update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter, config):
    if config.faults_tried:
        terminalreporter.write_sep("-", "faults tried")
        for kind, count in sorted(config.faults_tried.items()):
            terminalreporter.write_line(f"{count:8,} {kind}")
