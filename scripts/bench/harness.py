"""What every benchmark shares: options, bars, the last line of JSON, and a result that docs can quote."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP / "scripts" / "tasks"))


class Bench:
    """Collects figures and bars, prints them as they come, and writes them down at the end.

    Args:
        title: the heading of the result.
        description: for ``--help``.
        packages: whose versions matter too.
    """

    def __init__(self, title: str, description: str | None, packages: Sequence[str] = ()) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="less of everything, within a minute")
        parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
        parser.add_argument(
            "--data", type=Path, help="folder of the archives (default: GRADINDEX_DATA or ../shared/data)"
        )
        parser.add_argument("--save", type=Path, help="also write the result as Markdown, for docs/results/")
        self.options = parser.parse_args()
        if self.options.data:
            os.environ["GRADINDEX_DATA"] = str(self.options.data)
        self.title = title
        self.load = os.getloadavg()[0]  # before this process adds to it
        self.packages = packages
        self.figures: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []

    @property
    def quick(self) -> bool:
        """Whether less of everything was asked for."""
        return bool(self.options.quick)

    def figure(self, name: str, value: float, unit: str) -> None:
        """A figure without a target."""
        self.figures.append({"name": name, "value": float(value), "unit": unit})
        print(f"{name}: {value:.4g} {unit}", flush=True)

    def bar(self, name: str, value: float, unit: str, target: float, at_most: bool = False) -> None:
        """A figure with a target, which is a floor unless ``at_most``."""
        holds = value <= target if at_most else value >= target
        self.bars.append({"name": name, "value": float(value), "unit": unit, "target": target, "holds": bool(holds)})
        sign = "at most" if at_most else "at least"
        print(f"{name}: {value:.4g} {unit} ({sign} {target}) {'holds' if holds else 'MISSED'}", flush=True)

    def finish(self) -> None:
        """Write what was asked for."""
        if self.options.save:
            self.options.save.write_text(self._markdown())
        if self.options.json:
            print(json.dumps({"bars": self.bars, "figures": self.figures, "machine": self._machine()}))

    def _machine(self) -> dict[str, str]:
        return {**machine(self.packages), "load of others at the start": f"{self.load:.1f}"}

    def _markdown(self) -> str:
        lines = [f"# {self.title}", "", *(f"- {name}: {value}" for name, value in self._machine().items())]
        # --save says where the result goes, not how it came about.
        command = ["python", Path(sys.argv[0]).resolve().relative_to(TOP).as_posix()] + ["--quick"] * self.quick
        if "OMP_NUM_THREADS" in os.environ:
            command.insert(0, f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
        lines += [f"- command: `{shlex.join(command)}`"]
        if self.bars:
            lines += ["", "| bar | value | target | holds |", "| --- | --- | --- | --- |"]
        for bar in self.bars:
            holds = "yes" if bar["holds"] else "**no**"
            lines.append(f"| {bar['name']} | {bar['value']:.4g} {bar['unit']} | {bar['target']} | {holds} |")
        if self.figures:
            lines += ["", "| figure | value |", "| --- | --- |"]
            lines += [f"| {item['name']} | {item['value']:.4g} {item['unit']} |" for item in self.figures]
        return "\n".join(lines) + "\n"


def machine(packages: Sequence[str] = ()) -> dict[str, str]:
    """What the figures depend on."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = f"{names[0]}, {len(names)} cores" if names else processor
    names = ("gradindex", "torch", "faiss-cpu", "numpy", "h5py", *packages)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": processor,
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
    }
