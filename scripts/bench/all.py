"""Run every benchmark and experiment, each in a process of its own, and sum up: times, failures, bars that fall short.

``--quick`` takes the quick forms, one for each core at a time with one thread each: they need neither data nor peers,
share the small tasks that they train, and their bars are of stand-ins on a busy machine, so they only hint. The full
forms take hours and run one at a time; their results stay in GRADINDEX_CACHE/results, under a digest of the code that
made them, so that running this again goes on with what is missing. Copy a result to docs/results/ by hand. Peers get
an environment of their own in GRADINDEX_CACHE.

The exit code says whether every script ran to its end, not whether the bars hold.

    bash scripts/bench/all.sh [--quick] [--only mnist store ...] [--out DIR] [--list]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
HELPERS = {"all", "harness", "numbers_task", "stores", "common", "laboratory", "last_layer"}
HELPERS |= {"imagenet_task", "made", "pictures", "resnet"}  # of scripts/imagenet; scripts/paper has pictures.py as well
HELPERS |= {"gpu"}  # a job of its own, for a machine with a CUDA device
NEED_PEERS = {"bench/peers", "bench/search_peers", "paper/mislabelled"}
QUICK_ONLY = {"imagenet/build", "imagenet/query", "imagenet/self_influence"}  # the full form is a person's own job
QUICK_PARTS = {"bench/search": ["--sets", "mnist", "cifar10"]}  # of which the others take the same way
FIRST = "tasks/augmented"  # makes the features of scale, search and search_peers


@dataclass(frozen=True)
class Outcome:
    """How a script ended.

    Args:
        name: folder and name.
        status: its exit code.
        seconds: it took.
        processor_seconds: that it and its children computed, which other work on the machine changes less.
        bars: it measured.
        kept: whether it ran earlier.
    """

    name: str
    status: int
    seconds: float
    processor_seconds: float
    bars: list[dict[str, Any]]
    kept: bool = False


def names(quick: bool) -> list[str]:
    """Every script with a form of this kind, in the order in which they run."""
    found = [FIRST]
    for folder in ("bench", "paper", "imagenet"):
        for path in sorted((TOP / "scripts" / folder).glob("*.py")):
            name = f"{folder}/{path.stem}"
            if path.stem not in HELPERS or name == "paper/pictures":
                found.append(name)
    return [name for name in found if quick or name not in QUICK_ONLY]


def main(argv: Sequence[str]) -> int:
    """Run them, sum up; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the quick forms, within minutes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="such as mnist or paper/news (default: all)")
    parser.add_argument("--out", type=Path, help="where results go (default: a folder that goes, or GRADINDEX_CACHE)")
    parser.add_argument("--jobs", type=int, help="how many at a time (default: 1; with --quick as many as cores)")
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    options = parser.parse_args(argv)
    chosen = names(options.quick)
    if options.only:
        unknown = [name for name in options.only if not any(name in (one, one.split("/")[1]) for one in chosen)]
        if unknown:
            parser.error(f"--only names {unknown[0]}, but the scripts are {', '.join(chosen)}.")
        chosen = [name for name in chosen if name in options.only or name.split("/")[1] in options.only]
    if options.list:
        print("\n".join(chosen))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or (Path(temporary) if options.quick else cache_folder() / "results" / digest())
        folder.mkdir(parents=True, exist_ok=True)
        python = sys.executable
        if not options.quick and NEED_PEERS & set(chosen):
            python = str(peers_environment())
        shared = Path(temporary) / "tasks" if options.quick else None
        outcomes = run_all(chosen, folder, shared, options.jobs, python)
        return sum_up(outcomes, folder, options.quick)


def run_all(
    chosen: Sequence[str], folder: Path, shared: Path | None, jobs: int | None, peers_python: str
) -> list[Outcome]:
    """Each in its turn; a line as it ends."""

    def one(name: str) -> Outcome:
        python = peers_python if name in NEED_PEERS else sys.executable
        outcome = run(name, folder, shared, python)
        how = "was done before" if outcome.kept else "" if outcome.status == 0 else f"FAILED ({outcome.status})"
        times = f"{outcome.seconds:7.1f} s, {outcome.processor_seconds:6.1f} s of a processor"
        print(f"{times}  {name}  {how}".rstrip(), flush=True)
        if outcome.status:
            print(_tail(folder / f"{name}.log"), flush=True)
        return outcome

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(jobs or (1 if shared is None else cores)) as pool:
        return list(pool.map(one, chosen))


def run(name: str, folder: Path, shared: Path | None, python: str) -> Outcome:
    """Run a script, unless the folder has its result.

    Args:
        name: folder and name.
        folder: of results.
        shared: what quick forms keep their small tasks in; ``None`` for the full form.
        python: the interpreter.
    """
    quick = shared is not None
    done, log, bars = (folder / f"{name}.{ending}" for ending in ("done", "log", "bars"))
    log.parent.mkdir(parents=True, exist_ok=True)
    if done.exists() and not quick:
        return Outcome(name, 0, *map(float, done.read_text().split()), list(_read(bars)), kept=True)
    bars.unlink(missing_ok=True)
    command = [python, str(TOP / "scripts" / f"{name}.py"), *(["--quick", *QUICK_PARTS.get(name, [])] if quick else [])]
    if name.startswith(("bench", "paper")):
        command += ["--save", str(folder / f"{name}.{'json' if name.startswith('paper') else 'md'}")]
    environment = os.environ | {"GRADINDEX_BARS": str(bars)}
    if quick:
        environment |= {"OMP_NUM_THREADS": "1", "GRADINDEX_QUICK_SHARED": str(shared)}
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        _, ended, usage = os.wait4(process.pid, 0)
        status = process.returncode = os.waitstatus_to_exitcode(ended)
    taken, computed = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    if status == 0:
        done.write_text(f"{taken:.1f} {computed:.1f}")
    return Outcome(name, status, taken, computed, list(_read(bars)))


def sum_up(outcomes: Sequence[Outcome], folder: Path, quick: bool) -> int:
    """Print bars that fall short and scripts that failed."""
    short = [(each.name, bar) for each in outcomes for bar in each.bars if not bar["holds"]]
    n_bars = sum(len(each.bars) for each in outcomes)
    hint = " (of stand-ins on a machine in use: a hint, no verdict)" if quick else ""
    print(f"\n{len(short)} of {n_bars} bars fall short{hint}{':' if short else '.'}")
    for name, bar in short:
        sign = "at most" if bar["at_most"] else "at least"
        print(f"  {name}: {bar['name']}: {bar['value']:.4g} {bar['unit']}, {sign} {bar['target']}".replace(" ,", ","))
    failed = [each.name for each in outcomes if each.status]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} scripts ran to their end" + ("." if not failed else ";"))
    if failed:
        print(f"failed: {', '.join(failed)}")
    if not quick:
        print(f"results: {folder}")
    (folder / "summary.json").write_text(json.dumps([vars(each) for each in outcomes], indent=1) + "\n")
    return 1 if failed else 0


def cache_folder() -> Path:
    """See scripts/tasks/reference.py."""
    return Path(os.environ.get("GRADINDEX_CACHE", Path.home() / ".cache" / "gradindex"))


def digest() -> str:
    """Of all code that a result depends on."""
    found = hashlib.sha256()
    paths = [*(TOP / "gradindex").rglob("*.py"), *(TOP / "scripts").rglob("*.py")]
    for path in sorted([*paths, TOP / "constraints.txt", TOP / "scripts" / "bench" / "peers.txt"]):
        found.update(str(path.relative_to(TOP)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def peers_environment() -> Path:
    """The Python of an environment with this checkout and the peers, made where it is not there.

    Raises:
        subprocess.CalledProcessError: it cannot be made.
    """
    wanted = [TOP / name for name in ("scripts/bench/peers.txt", "constraints.txt", "setup.cfg")]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in wanted) + str(TOP).encode()).hexdigest()[:12]
    folder = cache_folder() / f"peers-{key}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making {folder} for the peers of scripts/bench/peers.txt", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        install += ["-c", "constraints.txt", "-r", "scripts/bench/peers.txt", "-e", ".[cpu,dev]"]
        subprocess.run(install, cwd=TOP, check=True)
        (folder / "complete").touch()
    return python


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        yield json.loads(line)


def _tail(log: Path) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-12:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
