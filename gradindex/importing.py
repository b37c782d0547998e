"""Python objects by name, from a file or a module, as people type them on the command line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import TaskError, user_code

# By the name of its module, which no import finds, a file that a task was loaded from.
_task_files: dict[str, Path] = {}


def import_by_name(name: str, what: str) -> Any:
    """Import ``path/to/file.py:name`` or ``package.module:name``; ``what`` it should be, for the error.

    Raises:
        TaskError: there is no such file, module or name, or importing it failed.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise TaskError(f"{name!r} does not name {what}. Write path/to/file.py:name or package.module:name.")
    module = import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    try:
        return getattr(module, attribute)
    except AttributeError:
        close = difflib.get_close_matches(attribute, [n for n in vars(module) if not n.startswith("_")], n=3)
        hint = f" Close names: {', '.join(close)}." if close else ""
        raise TaskError(f"{source} has no {attribute!r}.{hint}") from None


def task_files() -> Mapping[str, Path]:
    """The files that were imported by their paths, by the names of their modules: another process needs both."""
    return dict(_task_files)


def import_file(path: Path, name: str | None = None) -> Any:
    """Import a file as a module.

    Args:
        path: the file.
        name: of the module, if it may be there already; by default one is chosen, and the file runs again.

    Raises:
        TaskError: there is no such file, or it failed.
    """
    if name is not None and name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise TaskError(f"Task file {path} does not exist. Check the path.")
    whole = path.resolve()
    if str(whole.parent) not in sys.path:
        sys.path.insert(0, str(whole.parent))  # as `python path/to/file.py` would, so that it can import its neighbours
    name = name or _module_name(whole)
    spec = importlib.util.spec_from_file_location(name, whole)
    if spec is None or spec.loader is None:
        raise TaskError(f"Task file {path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], _task_files[name] = module, whole  # dataclasses and pickle look their module up by name
    with user_code(f"Importing {path}"):
        spec.loader.exec_module(module)
    return module


def _module_name(path: Path) -> str:
    """The file's own, unless another module has it: what that one defined must still be found by its name."""
    name, number = path.stem, 1
    while name in sys.modules and _task_files.get(name) != path:
        number += 1
        name = f"{path.stem}_{number}"
    return name


def _import_module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with user_code(f"Importing {name}"):
        return importlib.import_module(name)
