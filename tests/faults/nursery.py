"""Runs commands on stores in children that are killed, or whose disk is full: one JSON line in, one out.

A child is forked, which costs milliseconds where a new process costs seconds. Run as a script by ``faulty.Nursery``.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import faiss  # noqa: F401  # before the first fork
import faulty
import numpy as np
import torch
import toys
from torch.utils.data import Subset

import gradindex
from gradindex import building, evaluation, growth  # noqa: F401
from gradindex.errors import GradIndexError
from gradindex.projection import Projection
from gradindex.retrieval import retriever  # noqa: F401
from gradindex.store import GradientStore

# What the audit hook counts: whatever changes a folder, and every opening of a file in it.
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.scandir", "os.listdir"}
CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_REMOUNT = 0x20000, 0x4000, 1 << 18, 32
LIBC = ctypes.CDLL(None, use_errno=True)
OPTIONS = {"batch_size": 5, "shard_rows": 10, "factors": "float32"}


class Commands:
    """What is done to a store, by name; each is given again as it was after whatever ended it."""

    def __init__(self, folder):
        columns = {"word": [f"w{i}" for i in range(30)], "n": np.arange(30)}
        self.whole = toys.make_task(folder, n_train=30, columns=columns, rates=(0.3, 0.1))
        self.first = self._of(20, 1)

    def _of(self, count, checkpoints):
        columns = {name: values[:count] for name, values in self.whole.columns.items()}
        train = Subset(self.whole.train, range(count))
        return replace(self.whole, train=train, columns=columns, checkpoints=self.whole.checkpoints[:checkpoints])

    def build(self, folder):
        gradindex.build(self.first, folder, projection=Projection("fitted", dim=16), **OPTIONS)

    def add(self, folder):
        gradindex.add(self._of(30, 1), folder)

    def add_checkpoint(self, folder):
        growth.add_checkpoint(self._of(20, 2), folder)

    def remove(self, folder):
        gradindex.store.remove(folder, np.array([3, 12]))

    def compact(self, folder):
        gradindex.store.compact(folder)

    def merge(self, folder):
        gradindex.store.merge(folder, folder.parent / "other", offset=100)

    def index(self, folder):
        faulty.make_index(folder)

    def repair(self, folder):
        growth.repair(self.first, folder)

    def export(self, folder):
        out = folder.parent / "rows"
        if not out.exists():
            gradindex.store.export(GradientStore(folder), out)


def limited_disk(folder, size):
    """A file system of its own for this process, mounted on a folder."""
    options = f"size={size}".encode()
    if LIBC.unshare(CLONE_NEWNS) or LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "no mount namespace")
    if LIBC.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, options):
        raise OSError(ctypes.get_errno(), "no tmpfs")


def larger_disk(folder):
    if LIBC.mount(b"tmpfs", str(folder).encode(), b"tmpfs", MS_REMOUNT, b"size=64m"):
        raise OSError(ctypes.get_errno(), "no remount")


def watch(folder, kill):
    """Count file events in a folder, and kill this process at one of them; the count is the attribute ``count``."""
    watch.count = 0
    prefix = str(folder)

    def hook(event, args):
        if event in EVENTS and args and isinstance(args[0], (str, bytes, Path)) and str(args[0]).startswith(prefix):
            watch.count += 1
            if watch.count == kill:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(commands, asked):
    """Exit code and message."""
    folder = Path(asked["folder"])
    run = getattr(commands, asked["command"])
    try:
        signal.alarm(asked.get("seconds", 120))
        if "disk" in asked:
            return 0, full_disk(run, folder, asked)
        if "limit" in asked:
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["limit"], resource.RLIM_INFINITY))
        watch(folder.parent, asked.get("kill"))
        run(folder)
        return 0, str(watch.count)
    except GradIndexError as error:
        return 1, str(error)
    except BaseException:
        return 3, traceback.format_exc()


def full_disk(run, folder, asked):
    """Begin on a disk that is too small, then go on with a large one: what is wrong, or nothing."""
    template = Path(asked["template"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    limited_disk(folder.parent, asked["disk"])
    try:
        shutil.copytree(template, folder.parent, dirs_exist_ok=True)
    except shutil.Error:
        return "no room"
    said = ""
    try:
        run(folder)
    except GradIndexError as error:
        said = str(error)
        if not ("No space left on device" in said or "still needs about" in said) or "\n" in said:
            return f"said {said}"
    if faulty.fingerprint(folder) not in asked["allowed"]:
        return f"other answers after {said}"
    if [path for path in folder.rglob("*") if ".tmp-" in path.name]:
        return "temporary files are left"
    larger_disk(folder.parent)
    run(folder)
    return "" if faulty.fingerprint(folder) == asked["allowed"][-1] else "other answers at the end"


def main():
    torch.set_num_threads(1)
    commands = Commands(Path(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        reads, writes = os.pipe()  # a pipe has no limit on its size
        pid = os.fork()
        if pid == 0:
            code, message = child(commands, asked)
            os.write(writes, message.encode()[:60_000])
            os._exit(code)
        os.close(writes)
        with os.fdopen(reads) as pipe:
            message = pipe.read()
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), message]), flush=True)


if __name__ == "__main__":
    main()
