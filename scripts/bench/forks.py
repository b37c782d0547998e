"""Run Python scripts, a few at a time, each in a fork of this process, which has loaded what takes long to import.

On the standard input comes one JSON object: ``modules`` to load, how many ``jobs`` run at a time, and ``scripts``,
each with its ``arguments`` (its path first), further variables of its ``environment``, and a ``log`` for what it
prints. As a script ends, a line of JSON follows on the standard output: its number, exit code, seconds, and the
processor seconds of it and its children.

A script finds what it would find in a process of its own: ``__main__``, ``sys.argv``, and its folder first on the path.
But libraries have read the environment of this process as they were loaded, so it must have what they read then.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def serve() -> dict[str, Any] | None:
    """Start and await the scripts; returns in each child with its script, and with ``None`` where all have ended."""
    asked = json.load(sys.stdin)
    for name in asked["modules"]:
        importlib.import_module(name)
    gc.freeze()  # what is loaded is not collected, nor copied for that, in any child
    waiting, running = list(enumerate(asked["scripts"])), {}
    while waiting or running:
        if waiting and len(running) < asked["jobs"]:
            number, script = waiting.pop(0)
            started, child = time.perf_counter(), os.fork()
            if child == 0:
                return dict(script)
            running[child] = number, started
            continue
        child, status, usage = os.wait4(-1, 0)
        number, started = running.pop(child)
        computed = usage.ru_utime + usage.ru_stime
        ended = [number, os.waitstatus_to_exitcode(status), time.perf_counter() - started, computed]
        print(json.dumps(ended), flush=True)
    return None


def become(script: dict[str, Any]) -> None:
    """Run a script as the main program of this process, as ``python PATH ...`` does."""
    with Path(os.devnull).open() as nothing, Path(script["log"]).open("w") as log:
        for file, descriptor in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(script["environment"])
    sys.argv = list(script["arguments"])
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    mine = serve()
    if mine is not None:
        become(mine)
