"""What is installed: complete, light, and the same as what the checkout says."""

import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import pytest
import toys
from places import TOP

import gradindex

CONFIG = configparser.ConfigParser()
CONFIG.read(TOP / "setup.cfg")


python = partial(toys.python, cwd="/")


@pytest.fixture(scope="module")
def wheel(made_once):
    def build(out):
        # Of a copy: setuptools takes whatever an earlier build has left in the checkout's folder build/.
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=TOP, capture_output=True, text=True, check=True).stdout
        for name in listed.split("\0")[:-1]:
            (out / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOP / name, out / "checkout" / name)
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), out / "checkout"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return next(made_once("wheel", build).glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_module_the_templates_and_the_digits(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", "gradindex"], cwd=TOP, capture_output=True, text=True, check=True)
    data = {f"gradindex/data/{name}" for name in ("__init__.py", "README.md", "digits.npz")}
    assert names == set(tracked.stdout.split()) | data


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path / "site")!r}); sys.meta_path[:] = [
    finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "") + str(finder)]
import gradindex, pathlib
assert gradindex.__file__.startswith({str(tmp_path)!r}), gradindex.__file__
from gradindex import demo
digits = demo.digits()
demo.digits, demo.EPOCHS = lambda: {{name: values[:120] for name, values in digits.items()}}, 8
print(demo.run(pathlib.Path({str(tmp_path / "out")!r})))"""
    assert python(code).splitlines()[-1] == str(tmp_path / "out" / "report.html")


def test_the_public_names_are_about_a_dozen_and_documented():
    assert len(gradindex.__all__) <= 16
    for name in gradindex.__all__:
        assert getattr(gradindex, name)
        assert name == "__version__" or len(getattr(gradindex, name).__doc__) > 20
    assert dir(gradindex) == sorted(gradindex.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tracin'"):
        _ = gradindex.tracin


def test_every_error_is_ours_and_the_builtin_that_callers_expect():
    errors = importlib.import_module("gradindex.errors")
    own = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    for error in own:
        assert issubclass(error, errors.GradIndexError)
        assert error is errors.GradIndexError or len(error.__mro__) > 4


@pytest.mark.slow
def test_importing_takes_well_under_a_second_more_than_torch_and_no_optional_package(tmp_path):
    optional = ("faiss", "matplotlib", "jinja2", "safetensors", "pyarrow", "PIL", "sklearn", "scipy")
    code = f"""
import sys, time
for name in {optional}: sys.modules[name] = None
import torch
started = time.process_time()
import gradindex
assert gradindex.__file__.startswith({str(tmp_path)!r}), gradindex.__file__
for name in gradindex.__all__: getattr(gradindex, name)
print(time.process_time() - started)"""
    # A copy that is compiled first, as pip leaves it, wherever bytecode is turned off.
    shutil.copytree(TOP / "gradindex", tmp_path / "gradindex", ignore=shutil.ignore_patterns("__pycache__"))
    python("import compileall, sys; compileall.compile_dir(sys.argv[1], quiet=1)", tmp_path, PYTHONPYCACHEPREFIX="")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "PYTHONPYCACHEPREFIX": "", "PYTHONDONTWRITEBYTECODE": ""}
    # Seconds of the processor, for other processes' time is not ours; the best of four runs, the first with cold files.
    assert any(float(python(code, **environment)) < 0.5 for _ in range(4))


def test_the_lightest_import_needs_nothing():
    assert python("import gradindex, sys; print('torch' in sys.modules, 'numpy' in sys.modules)") == "False False\n"


def test_extras_name_what_errors_tell_people_to_install():
    extras = dict(CONFIG["options.extras_require"])
    assert {"cpu", "gpu", "demo", "dev", "parquet"} <= set(extras)
    text = " ".join(path.read_text() for path in (TOP / "gradindex").rglob("*.py"))
    assert {"cpu", "gpu", "demo", "parquet"} == set(re.findall(r"gradindex\[(\w+)\]", text))


def test_pyproject_holds_the_build_system_only():
    lines = (TOP / "pyproject.toml").read_text().splitlines()
    assert [line for line in lines if line.startswith("[")] == ["[build-system]"]


def test_ci_runs_the_whole_check():
    assert "bash scripts/test.sh" in (TOP / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", ["demo.sh", "test.sh"])
def test_set_up_says_that_python_is_missing(name):
    environment = os.environ | {"PYTHON": "nowhere/python3"}
    done = subprocess.run(
        ["bash", TOP / "scripts" / name], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Python is missing (nowhere/python3): install Python 3.10 to 3.13")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("wanted", "stamp", "holds"),
    [("cpu,demo", "cpu-demo-dev", True), ("cpu,dev", "cpu-dev", True), ("cpu,dev", "cpu-demo", False)],
)
def test_set_up_installs_nothing_again_that_more_extras_have_brought(wanted, stamp, holds):
    command = ["bash", "-c", f'source "{TOP}/scripts/environment.sh"; among "$@"', "bash", wanted, stamp]
    assert (subprocess.run(command, check=False).returncode == 0) == holds


def test_set_up_refuses_an_old_python_and_one_without_venv(tmp_path):
    old, bare = tmp_path / "old", tmp_path / "bare"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    bare.write_text('#!/bin/sh\ncase "$2" in *venv*) exit 1;; esac\nexit 0\n')
    scripts = tmp_path / "checkout" / "scripts"
    scripts.mkdir(parents=True)
    for name in ("demo.sh", "environment.sh"):
        (scripts / name).write_text((TOP / "scripts" / name).read_text())
    messages = {old: "is Python 3.8.1, but gradindex needs Python 3.10 to 3.13", bare: "apt-get install python3-venv"}
    for program, message in messages.items():
        program.chmod(0o755)
        environment = os.environ | {"PYTHON": str(program)}
        done = subprocess.run(
            ["bash", scripts / "demo.sh"], capture_output=True, text=True, env=environment, check=False
        )
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
