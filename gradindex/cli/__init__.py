"""The command line: parse, call one function, show."""

from __future__ import annotations

from .builds import add, add_checkpoint, build, demo
from .indexes import evaluate, index, whiten
from .judging import judge
from .main import main
from .queries import explain, query, self_influence
from .stores import compact, export, info, merge, remove, seal, verify

for command in (
    demo, build, add, add_checkpoint, query, explain, self_influence, whiten, index, evaluate, judge, info, verify,
    remove, compact, merge, seal, export,
):  # fmt: skip
    main.add_command(command)

__all__ = ["main"]
