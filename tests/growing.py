"""A store that grows: its task at several sizes, and another process that holds it."""

import subprocess
import sys
from dataclasses import replace

from torch.utils.data import Subset

from gradindex.projection import Projection

OPTIONS = {"projection": Projection(dim=8), "batch_size": 4, "shard_rows": 4}


def word(i):
    return "é" * (i % 5) + str(i)


def first(task, n):
    """The task as it was when it had n training examples."""
    return replace(task, train=Subset(task.train, range(n)), columns={"word": [word(i) for i in range(n)]})


def only(task, ids):
    """The task with some training examples alone, whose positions are others."""
    ids = list(map(int, ids))
    return replace(task, train=Subset(task.train, ids), columns={"word": [word(i) for i in ids]})


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HOLD = """
import sys
from pathlib import Path
from gradindex.store import claimed
with claimed(Path(sys.argv[1]), eval(sys.argv[2]), new=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def held(folder, part=None):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), repr(part)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def let_go(process, how):
    how(process)
    process.wait()
    process.stdin.close()
    process.stdout.close()
