"""Run every benchmark and experiment, each in a process of its own, and sum up: times, failures, bars that fall short.

``--quick`` takes the quick forms, one for each core at a time with one thread each: they need neither data nor peers,
share the small tasks that they train, and their bars are of stand-ins on a busy machine, so they only hint. Their
processes are forks of one that has loaded torch, for that takes longer than what some of them do (forks.py). The full
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
HELPERS = {"all", "forks", "harness", "heads", "numbers_task", "stores", "texts"}
HELPERS |= {"common", "laboratory", "last_layer"}  # of scripts/paper
HELPERS |= {"imagenet_task", "made", "pictures", "resnet"}  # of scripts/imagenet; scripts/paper has pictures.py as well
HELPERS |= {"protocols"}  # of scripts/quality
HELPERS |= {"gpu"}  # a job of its own, for a machine with a CUDA device
NEED_PEERS = {"bench/peers", "bench/search_peers", "paper/mislabelled"}
QUICK_ONLY = {"imagenet/build", "imagenet/query", "imagenet/self_influence"}  # the full form is a person's own job
QUICK_PARTS = {"bench/search": ["--sets", "mnist"]}  # which the others take the same way, on stores of other scripts
FIRST = "tasks/augmented"  # makes the features of scale, search and search_peers
# What quick forms import, loaded once for all of them. Whatever trains loads torch's compiler, with the optimizers.
LOADED = ("torch", "torch._dynamo", "faiss", "h5py", "gradindex", "gradindex.evaluation", "matplotlib.pyplot")


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
    for folder in ("bench", "paper", "quality", "imagenet"):
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
        if options.quick:
            outcomes = run_quick(chosen, folder, Path(temporary) / "tasks", options.jobs)
        else:
            python = str(peers_environment()) if NEED_PEERS & set(chosen) else sys.executable
            outcomes = run_all(chosen, folder, options.jobs, python)
        return sum_up(outcomes, folder, options.quick)


def run_all(chosen: Sequence[str], folder: Path, jobs: int | None, peers_python: str) -> list[Outcome]:
    """The full forms, each in its turn; a line as it ends."""

    def one(name: str) -> Outcome:
        return told(run(name, folder, peers_python if name in NEED_PEERS else sys.executable), folder)

    with ThreadPoolExecutor(jobs or 1) as pool:
        return list(pool.map(one, chosen))


def run(name: str, folder: Path, python: str) -> Outcome:
    """Run a script, unless the folder has its result.

    Args:
        name: folder and name.
        folder: of results.
        python: the interpreter.
    """
    done, log, bars = files_of(name, folder)
    if done.exists():
        return Outcome(name, 0, *map(float, done.read_text().split()), list(_read(bars)), kept=True)
    bars.unlink(missing_ok=True)
    command = [python, *arguments_of(name, folder, quick=False)]
    environment = os.environ | {"GRADINDEX_BARS": str(bars)}
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


def run_quick(chosen: Sequence[str], folder: Path, shared: Path, jobs: int | None) -> list[Outcome]:
    """The quick forms, some at a time; a line as each ends.

    Args:
        chosen: folders and names.
        folder: of results.
        shared: what they keep their small tasks in.
        jobs: how many at a time, by default as many as cores.

    Raises:
        subprocess.CalledProcessError: the process that they are forks of ended before they did.
    """
    scripts = []
    for name in chosen:
        _, log, bars = files_of(name, folder)
        bars.unlink(missing_ok=True)
        environment = {"GRADINDEX_BARS": str(bars), "GRADINDEX_QUICK_SHARED": str(shared)}
        arguments = arguments_of(name, folder, quick=True)
        scripts.append({"arguments": arguments, "environment": environment, "log": str(log)})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = json.dumps({"modules": LOADED, "jobs": jobs or cores, "scripts": scripts})
    command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    outcomes = {}
    with subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin:
            process.stdin.write(asked)
        for line in process.stdout:
            number, status, taken, computed = json.loads(line)
            bars = list(_read(files_of(chosen[number], folder)[2]))
            outcomes[number] = told(Outcome(chosen[number], status, taken, computed, bars), folder)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return [outcomes[number] for number in range(len(chosen))]


def told(outcome: Outcome, folder: Path) -> Outcome:
    """Print how a script ended, and the end of its log where it failed."""
    how = "was done before" if outcome.kept else "" if outcome.status == 0 else f"FAILED ({outcome.status})"
    times = f"{outcome.seconds:7.1f} s, {outcome.processor_seconds:6.1f} s of a processor"
    print(f"{times}  {outcome.name}  {how}".rstrip(), flush=True)
    if outcome.status:
        print(_tail(folder / f"{outcome.name}.log"), flush=True)
    return outcome


def files_of(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """Where it stands that a script is done, what it printed, and its bars."""
    done, log, bars = (folder / f"{name}.{ending}" for ending in ("done", "log", "bars"))
    log.parent.mkdir(parents=True, exist_ok=True)
    return done, log, bars


def arguments_of(name: str, folder: Path, quick: bool) -> list[str]:
    """A script's path and its arguments."""
    arguments = [str(TOP / "scripts" / f"{name}.py")]
    if quick:
        arguments += [
            "--quick",
            *QUICK_PARTS.get(name, []),
            *(["--json"] if name.startswith(("bench", "quality")) else []),
        ]
    if name.startswith(("bench", "paper", "quality")):
        arguments += ["--save", str(folder / f"{name}.{'json' if name.startswith('paper') else 'md'}")]
    return arguments


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
