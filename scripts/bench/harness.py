"""What every benchmark shares: options, bars, the last line of JSON, and a result that docs can quote."""

from __future__ import annotations

import argparse
import atexit
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP / "scripts" / "tasks"))
MODULES = {"traker": "trak"}  # packages that are imported by another name


def _keep_apart(quick: bool) -> None:
    """Give the quick form a cache of its own, which goes with the process; the full form has no part in it.

    Several quick forms may share one, which whoever runs them names in GRADINDEX_QUICK_SHARED.
    """
    os.environ.pop("GRADINDEX_QUICK", None)
    if quick:
        folder = os.environ.get("GRADINDEX_QUICK_SHARED")
        if folder is None:
            folder = tempfile.mkdtemp(prefix="gradindex-quick-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["GRADINDEX_QUICK"] = folder


class Bench:
    """Collects figures and bars, prints them as they come, and writes them down at the end.

    Args:
        title: the heading of the result.
        description: for ``--help``.
        packages: whose versions matter too.
        files: further options, each the path of a file, and their help.
        parts: further options, each choosing some of these names, by default all.
    """

    save_help = "also write the result as Markdown, for docs/results/"

    def __init__(
        self,
        title: str,
        description: str | None,
        packages: Sequence[str] = (),
        files: Mapping[str, str] | None = None,
        parts: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="less of everything, within a minute")
        parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
        parser.add_argument(
            "--data", type=Path, help="folder of the archives (default: GRADINDEX_DATA or ../shared/data)"
        )
        parser.add_argument("--save", type=Path, help=self.save_help)
        self._files = files or {}
        for name, meaning in self._files.items():
            parser.add_argument(f"--{name}", type=Path, help=meaning)
        self._parts = parts or {}
        for name, names in self._parts.items():
            parser.add_argument(f"--{name}", nargs="+", choices=list(names), default=list(names))
        self.options = parser.parse_args()
        save = self.options.save
        if self.options.quick and save and save.resolve().is_relative_to(TOP / "docs"):
            parser.error(
                f"--save is {save}, but --quick measures stand-ins, which are not for docs. Save it elsewhere."
            )
        _keep_apart(self.options.quick)
        if self.options.data:
            os.environ["GRADINDEX_DATA"] = str(self.options.data)
        self.title = title
        self.load = os.getloadavg()[0]  # before this process adds to it
        self.packages = packages
        self.figures: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}

    @property
    def quick(self) -> bool:
        """Whether less of everything was asked for."""
        return bool(self.options.quick)

    @property
    def processes(self) -> Any:
        """The context of multiprocessing by which further processes start: anew, with modules of their own.

        Those of a quick form are forks where OpenMP has one thread, for they take longer to load torch than to work; of
        several threads, a fork would wait for those that it does not have.
        """
        forked = self.quick and os.environ.get("OMP_NUM_THREADS") == "1" and sys.platform == "linux"
        return multiprocessing.get_context("fork" if forked else "spawn")

    def in_a_process(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a module returns in a process of its own."""
        with ProcessPoolExecutor(1, self.processes) as pool:
            return pool.submit(action, *arguments).result()

    def figure(self, name: str, value: float, unit: str) -> None:
        """A figure without a target."""
        self.figures.append({"name": name, "value": float(value), "unit": unit})
        print(f"{name}: {value:.4g} {unit}", flush=True)

    def bar(self, name: str, value: float, unit: str, target: float, at_most: bool = False) -> None:
        """A figure with a target, which is a floor unless ``at_most``."""
        holds = value <= target if at_most else value >= target
        self.bars.append({"name": name, "value": float(value), "unit": unit, "target": target, "holds": bool(holds)})
        if "GRADINDEX_BARS" in os.environ:  # a file that all.py reads, also after a crash
            with Path(os.environ["GRADINDEX_BARS"]).open("a") as file:
                file.write(json.dumps({**self.bars[-1], "at_most": at_most}) + "\n")
        sign = "at most" if at_most else "at least"
        print(f"{name}: {value:.4g} {unit} ({sign} {target}) {'holds' if holds else 'MISSED'}", flush=True)

    def installed(self, peers: Sequence[str]) -> list[str]:
        """Those of these packages that are there; the quick form says what it leaves out.

        Raises:
            SystemExit: one is missing, and this is not the quick form.
        """
        missing = [name for name in peers if importlib.util.find_spec(MODULES.get(name, name)) is None]
        if missing and not self.quick:
            raise SystemExit(
                f"{', '.join(missing)} is not installed. Run this with an environment that has "
                "scripts/bench/peers.txt (scripts/bench/all.sh makes one)."
            )
        if missing:
            print(f"quick: left out, for it is not installed: {', '.join(missing)}", file=sys.stderr, flush=True)
        return [name for name in peers if name not in missing]

    def row(self, table: str, values: Mapping[str, Any]) -> None:
        """A row of a table; all rows of a table have the same columns."""
        self.tables.setdefault(table, []).append(dict(values))
        print(table, *(f"{name} {_short(value)}" for name, value in values.items()), sep="; ", flush=True)

    def write(self) -> None:
        """Save what there is so far, where that was asked for."""
        if self.options.save:
            self.options.save.write_text(self.saved())

    def finish(self) -> None:
        """Write what was asked for."""
        self.write()
        if self.options.json:
            print(
                json.dumps(
                    {"bars": self.bars, "figures": self.figures, "tables": self.tables, "machine": self._machine()}
                )
            )

    def _machine(self) -> dict[str, str]:
        about = {**machine(self.packages), "load of others at the start": f"{self.load:.1f}"}
        stand_ins = getattr(sys.modules.get("reference"), "STAND_INS", [])
        return {**about, "stand-ins": "; ".join(stand_ins)} if stand_ins else about

    @property
    def command(self) -> str:
        """What makes the figures again; --save says where the result goes, not how it came about."""
        command = ["python", Path(sys.argv[0]).resolve().relative_to(TOP).as_posix()] + ["--quick"] * self.quick
        for name in self._files:
            if vars(self.options)[name] is not None:
                command += [f"--{name}", str(vars(self.options)[name])]
        for name, names in self._parts.items():
            if vars(self.options)[name] != list(names):
                command += [f"--{name}", *vars(self.options)[name]]
        if "OMP_NUM_THREADS" in os.environ:
            command.insert(0, f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
        return shlex.join(command)

    def saved(self) -> str:
        """What --save writes."""
        lines = [f"# {self.title}", "", *(f"- {name}: {value}" for name, value in self._machine().items())]
        lines += [f"- command: `{self.command}`"]
        if self.bars:
            lines += ["", "| bar | value | target | holds |", "| --- | --- | --- | --- |"]
        for bar in self.bars:
            holds = "yes" if bar["holds"] else "**no**"
            lines.append(f"| {bar['name']} | {bar['value']:.4g} {bar['unit']} | {bar['target']} | {holds} |")
        if self.figures:
            lines += ["", "| figure | value |", "| --- | --- |"]
            lines += [f"| {item['name']} | {item['value']:.4g} {item['unit']} |" for item in self.figures]
        for title, rows in self.tables.items():
            names = list(rows[0])
            lines += ["", f"## {title}", "", f"| {' | '.join(names)} |", f"| {' | '.join(['---'] * len(names))} |"]
            lines += [f"| {' | '.join(_short(row[name]) for name in names)} |" for row in rows]
        return "\n".join(lines) + "\n"


class Anonymous:
    """The most anonymous memory that this process takes meanwhile; mapped files are not counted."""

    def __enter__(self) -> Anonymous:
        self.peak_gb, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.peak_gb = max(self.peak_gb, int(line.split()[1]) * 1024 / 1e9)


def timed(action: Callable[[], Any], times: int) -> float:
    """Median milliseconds."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(packages: Sequence[str] = ()) -> dict[str, str]:
    """What the figures depend on."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = f"{names[0]}, {len(names)} cores" if names else processor
    names = ("gradindex", "torch", "faiss-cpu", "faiss-gpu", "numpy", "h5py", *packages)
    versions = [f"{name} {version}" for name in names if (version := _version(name))]
    torch = sys.modules.get("torch")  # a benchmark that does without it loads it not for this
    gpu = {"GPU": torch.cuda.get_device_name()} if torch is not None and torch.cuda.is_available() else {}
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": processor,
        **gpu,
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
