"""The command line: parse, call one function, show."""

from __future__ import annotations

from .ask import explain, query, self_influence
from .fill import add, add_checkpoint, build, demo
from .keep import compact, export, info, merge, remove, seal, verify
from .main import main
from .search import evaluate, index

for command in (
    demo, build, add, add_checkpoint, query, explain, self_influence, index, evaluate, info, verify, remove, compact,
    merge, seal, export,
):  # fmt: skip
    main.add_command(command)

__all__ = ["main"]
