"""Options of the whole suite, and what several files of it look at."""

import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest

TOP = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("GRADINDEX_DATA", TOP.parent / "shared" / "data"))


@pytest.fixture(autouse=True)
def environment_stays():
    """What a test, or a script that it runs, sets in the environment is gone for the next."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def quick_forms(tmp_path_factory):
    """What `scripts/bench/all.sh --quick` printed, as a completed process, and the folder of its results.

    Every script runs once in the checks: tests of one script look at what it left here.
    """
    out = tmp_path_factory.mktemp("quick")
    command = ["bash", str(TOP / "scripts" / "bench" / "all.sh"), "--quick", "--out", str(out)]
    environment = os.environ | {"GRADINDEX_DATA": str(DATA)}
    return subprocess.run(command, env=environment, capture_output=True, text=True), out


def pytest_addoption(parser):
    group = parser.getgroup("faults", "tests/faults: kills, damages, full disks, forged files, absurd commands")
    group.addoption("--faults", type=int, metavar="N", help="How many faults of each kind to try; by default a few.")
    group.addoption("--faults-from", type=int, default=0, metavar="I", help="Begin with the I-th fault of each kind.")
