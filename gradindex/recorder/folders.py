"""Checkpoints that processes write together: a folder of torch.distributed.checkpoint with the record beside it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, CheckpointError
from ..files import flush, temporary_for
from .records import RECORD_FILE
from .weights import from_all, writes_here


def check_sharding() -> None:
    """Refuse a torch that cannot write such folders.

    Raises:
        ArgumentError: it cannot.
    """
    if not torch.distributed.is_available():
        raise ArgumentError(
            "sharded=True needs torch.distributed, which this build of torch lacks. Leave it out: the first process "
            "then writes whole weights."
        )


def save_together(path: Path, content: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write a folder that is whole or not there; all processes that train together call this.

    It is written under a hidden name, which no search for checkpoints looks at, and renamed by the first process when
    the others are done.

    Args:
        path: of the folder, which is not there, on a disk that all processes share.
        content: tensors by name under keys, those of this process.
        record: what the first process writes beside them.

    Raises:
        CheckpointError: a process cannot write, in all of them.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # takes time to import
    from torch.distributed.checkpoint.state_dict_saver import save

    temporary = from_all(temporary_for(path.with_name(f".{path.name}")))[0]
    problem = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is a single process, and of what newer versions do otherwise
            save(dict(content), checkpoint_id=str(temporary))
        if writes_here():
            (temporary / RECORD_FILE).write_text(json.dumps(record))
            flush(temporary / RECORD_FILE)
            flush(temporary)
            temporary.rename(path)
            flush(path.parent)
    except (Exception, CheckpointException) as error:  # the second is no Exception, and tells of any process
        problem = " ".join(str(error).split())[:160] or type(error).__name__
    problems = [each for each in from_all(problem) if each is not None]
    if problems:
        if writes_here():
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{path} cannot be written: {problems[0]}. Check that all processes can write to the same folder, and its "
            "disk."
        )


def written_in(directory: Path) -> list[Path]:
    """Folders of earlier checkpoints."""
    return [path.parent for path in directory.glob(f"step_*/{RECORD_FILE}")]


def remove(path: Path) -> None:
    """Delete a checkpoint so that it is never taken for whole: it gets a hidden name first."""
    if path.is_dir():
        hidden = temporary_for(path.with_name(f".{path.name}"))
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        path.unlink()


def remove_unfinished(directory: Path) -> None:
    """Delete what a training that was cut short left under hidden names."""
    for path in directory.glob(".step_*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
