"""Run the numeric tests under other instruction sets and numbers of threads: one machine stands in for several.

Each setting is one kind of processor: PyTorch's own kernels, oneDNN, MKL, both OpenBLAS (NumPy's and FAISS's), NumPy's
own loops and FAISS are all held to what it has. Before the tests, a process under the same switches says what they did;
a switch that should have worked and did not is an error, and one that this machine or build does not heed is named.

Two settings run at a time.

    bash scripts/test_processors.sh [--list] [arguments for pytest]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
# Where numbers are compared with a reference, and where order or equality is promised.
TESTS = (
    "architectures", "asking::test_equal_rows_have_equal_scores_and_come_in_the_order_of_ids",
    "asking::test_equal_scores_come_in_the_order_of_ids_for_every_kind",
    "asking::test_each_kind_is_the_best_of_all_exact_scores_in_its_order", "encoding", "engine", "exactness", "format",
    "index", "layers", "losses", "others_models", "precision", "preconditioner", "products", "projection", "scoring",
    "traps", "uses",
)  # fmt: skip
# What takes long and sees no other numbers than its neighbours.
LONG = "language_models or LSTM or GRU or attention or never_too_large"


@dataclass(frozen=True)
class Setting:
    """A kind of processor.

    Args:
        name: of the kind.
        needs: flag of /proc/cpuinfo without which it cannot be tried.
        threads: OpenMP's and the libraries' number of threads.
        switches: by library, the variables, and how what the library then says must look.
    """

    name: str
    needs: str
    threads: int
    switches: Mapping[str, tuple[Mapping[str, str], str]]

    @property
    def environment(self) -> dict[str, str]:
        """All its variables."""
        found = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        for variables, _ in self.switches.values():
            found |= variables
        return found


def _openblas(core: str) -> dict[str, tuple[Mapping[str, str], str]]:
    return {f"OpenBLAS of {owner}": ({"OPENBLAS_CORETYPE": core}, core) for owner in ("NumPy", "FAISS")}


SETTINGS = (
    Setting("no AVX", "sse4_2", 1, {
        "PyTorch": ({"ATEN_CPU_CAPABILITY": "default"}, "DEFAULT"),
        "FAISS": ({"FAISS_SIMD_LEVEL": "NONE", "FAISS_OPT_LEVEL": "generic"}, "NONE"),
        "oneDNN": ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, r"SSE4\.1"),
        "MKL": ({"MKL_CBWR": "COMPATIBLE"}, "COMPATIBLE"),
        "NumPy": ({"NPY_DISABLE_CPU_FEATURES": "{NUMPY_FEATURES}"}, "^(?!.*X86_V3)(?!.*AVX512)"),
        **_openblas("Nehalem"),
    }),
    Setting("AVX", "avx2", 2, {
        "PyTorch": ({"ATEN_CPU_CAPABILITY": "avx2"}, "AVX2"),
        "FAISS": ({"FAISS_SIMD_LEVEL": "NONE", "FAISS_OPT_LEVEL": "generic"}, "NONE"),
        "oneDNN": ({"ONEDNN_MAX_CPU_ISA": "AVX"}, "AVX$"),
        "MKL": ({"MKL_CBWR": "AVX"}, "AVX$"),
        **_openblas("Sandybridge"),
    }),
    Setting("AVX2", "avx2", 1, {
        "PyTorch": ({"ATEN_CPU_CAPABILITY": "avx2"}, "AVX2"),
        "FAISS": ({"FAISS_SIMD_LEVEL": "AVX2", "FAISS_OPT_LEVEL": "avx2"}, "AVX2"),
        "oneDNN": ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "AVX2$"),
        "MKL": ({"MKL_CBWR": "AVX2"}, "AVX2$"),
        **_openblas("Haswell"),
    }),
    Setting("AVX-512", "avx512bw", 2, {
        "PyTorch": ({"ATEN_CPU_CAPABILITY": "avx512"}, "AVX512"),
        "FAISS": ({"FAISS_SIMD_LEVEL": "AVX512", "FAISS_OPT_LEVEL": "avx512"}, "AVX512"),
        "oneDNN": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "AVX-512"),
        "MKL": ({"MKL_CBWR": "AVX512"}, "AVX512$"),
        **_openblas("SkylakeX"),
    }),
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Try every setting; 1 where a test or a switch failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what each setting does, and run no tests")
    options, handed_on = parser.parse_known_args(argv)
    started, flags = time.perf_counter(), _flags()
    print(f"as it is: {_listed(said({}))}", flush=True)

    def one(setting: Setting) -> bool:
        if setting.needs not in flags:
            print(f"\n{setting.name}: left out, for this processor has no {setting.needs}", flush=True)
            return True
        lines, holds = tried(setting, None if options.list else handed_on)
        print("\n" + "\n".join(lines), flush=True)
        return holds

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        verdicts = list(pool.map(one, SETTINGS))
    failed = [setting.name for setting, holds in zip(SETTINGS, verdicts, strict=True) if not holds]
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{time.perf_counter() - started:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} s of a processor"
    print(f"\n{took}; {'FAILED: ' + ', '.join(failed) if failed else 'all settings hold'}", flush=True)
    return 1 if failed else 0


def tried(setting: Setting, handed_on: Sequence[str] | None) -> tuple[list[str], bool]:
    """What is to be said of a setting, and whether it holds: its switches, and its tests unless ``None`` is given."""
    numpy_features = _numpy_features()
    environment = {name: value.format(NUMPY_FEATURES=numpy_features) for name, value in setting.environment.items()}
    found = said(environment)
    lines = [f"{setting.name}, threads {setting.threads}", f"  now: {_listed(found)}"]
    wrong = unheeded(setting, found)
    lines += [f"  {library}: {what}" for library, what in wrong.items()]
    if any(what.startswith("ERROR") for what in wrong.values()):
        return lines, False
    if handed_on is None:
        return lines, True
    tests = [_place(name) for name in TESTS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        f"not ({LONG})",
        *tests,
        *handed_on,
    ]
    done = subprocess.run(
        command, cwd=TOP, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    output = done.stdout.splitlines()
    return [*lines, *(f"  {line}" for line in (output if done.returncode else output[-1:]))], done.returncode == 0


def _place(name: str) -> str:
    """Where the tests of a file, or one of them, lie: ``tests/FOLDER/test_FILE.py[::TEST]``."""
    file, separator, test = name.partition("::")
    (path,) = (TOP / "tests").rglob(f"test_{file}.py")
    return f"{path.relative_to(TOP)}{separator}{test}"


def unheeded(setting: Setting, found: Mapping[str, str | None]) -> dict[str, str]:
    """By library, why its switch did nothing."""
    reasons = {}
    for library, (variables, pattern) in setting.switches.items():
        names, now = ", ".join(variables), found[library]
        if now is None:
            reasons[library] = f"not in this build, so {names} has no effect"
        elif not re.search(pattern, now):
            if library == "MKL":  # on other makers' processors than Intel's it has COMPATIBLE and nothing else
                reasons[library] = f"{names} has no effect on this processor"
            else:
                reasons[library] = f"ERROR: {names} has no effect: {now}"
    return reasons


def said(environment: Mapping[str, str]) -> dict[str, str | None]:
    """What each library says that it uses, in a process with these variables."""
    loud = {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "probe"], env=os.environ | loud | environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    for library, pattern in (("oneDNN", r"cpu,isa:(.*)"), ("MKL", r"CNR:(\S+)")):
        match = re.search(pattern, done.stdout)
        found[library] = match[1].strip() if match else None
    return found


def probe() -> dict[str, str | None]:
    """What this process uses; oneDNN and MKL say it themselves as they are called."""
    import faiss
    import numpy as np
    import torch
    from numpy._core._multiarray_umath import __cpu_features__ as features

    torch.ones(64, 64) @ torch.ones(64, 64)
    torch.nn.functional.conv2d(torch.ones(2, 4, 16, 16), torch.ones(8, 4, 3, 3))
    if hasattr(faiss, "SIMDConfig"):
        level = faiss.SIMDConfig.get_level_name()
    else:  # one module for each level
        modules = [name.rpartition("swigfaiss")[2].strip("_") for name in sys.modules if "faiss.swigfaiss" in name]
        level = (modules[0] or "none").upper()
    libraries = Path(np.__file__).parents[1]
    return {
        "PyTorch": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "FAISS": level,
        "NumPy": " ".join(name for name in ("X86_V2", "X86_V3", "X86_V4", "AVX512_SKX") if features.get(name)),
        "OpenBLAS of NumPy": _core(libraries / "numpy.libs"),
        "OpenBLAS of FAISS": _core(libraries / "faiss_cpu.libs"),
    }


def _core(folder: Path) -> str | None:
    """The kernels that an OpenBLAS of this folder chose."""
    for path in folder.glob("*openblas*"):
        library = ctypes.CDLL(str(path))
        for name in ("scipy_openblas_get_corename64_", "openblas_get_corename64_", "openblas_get_corename"):
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype = ctypes.c_char_p
                return str(function().decode())
    return None


def _numpy_features() -> str:
    """What NumPy can be told to do without, here."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return " ".join(name for name in __cpu_dispatch__ if __cpu_features__[name])


def _flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.exists():
        return set()
    (first, *_) = [line for line in info.read_text().splitlines() if line.startswith("flags")]
    return set(first.split())


def _listed(found: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {value or '(none)'}" for name, value in found.items())


if __name__ == "__main__":
    if sys.argv[1:] == ["probe"]:
        print(json.dumps(probe()))
    else:
        sys.exit(main(sys.argv[1:]))
