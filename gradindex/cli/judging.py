"""Commands about quality: judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..choices import QUERY_GEOMETRIES, QueryGeometry
from ..output import to_json
from .main import JSON, say
from .options import DAMPING, DEVICE, FOLDER, ITERATIONS, PATH, TASK, part_option


@click.command()
@FOLDER
@TASK
@click.option("--out", required=True, type=PATH, metavar="FOLDER", help="Folder of the retrainings; kept and shared.")
@click.option("--retrainings", default=100, show_default=True, help="How many random subsets are trained on.")
@click.option("--share", default=0.5, show_default=True, help="Share of the training examples in each subset.")
@click.option("--seeds", default=2, show_default=True, help="Trainings of each subset; two tell the ceiling.")
@click.option("--processes", default=1, show_default=True, help="Trainings at a time, each with one thread.")
@click.option(
    "--geometry",
    "geometries",
    multiple=True,
    type=click.Choice(QUERY_GEOMETRIES),
    default=QUERY_GEOMETRIES[:1],
    show_default=True,
    help="In which the store's scores are judged; repeatable. whitened ones take `gradindex whiten` first.",
)
@DAMPING
@ITERATIONS
@part_option("Make only part I of N of the trainings, beside other processes, and print no table.")
@DEVICE
@JSON
def judge(
    folder: Path, task: str, out: Path, retrainings: int, share: float, seeds: int, processes: int,
    geometries: tuple[QueryGeometry, ...], damping: float | None, iterations: int | None,
    part: tuple[int, int] | None, device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure how well scores predict what retrained models do: the linear datamodeling score.

    Trains the task's model (Task(train_model=...)) on random subsets, and compares each query's losses with the summed
    scores of what was trained on. Safe to rerun: trainings that are done stay in --out.

    Example: gradindex judge /tmp/mnist --task my_task.py:task --out /tmp/retrained
    """
    from ..evaluation.judging.judge import halves
    from ..evaluation.judging.judge import judge as run
    from ..task import load_task

    loaded = load_task(task)
    asked: dict[str, Any] = {"retrainings": retrainings, "share": share, "seeds": seeds, "processes": processes}
    if part is not None:
        halves(loaded, folder, out, part=part, **asked)
        say(f"{out}: part {part[0]}/{part[1]} is done; once all parts are, run gradindex judge without --part")
        return
    found = run(
        loaded, folder, out, geometries=geometries, damping=damping, iterations=iterations, device=device, **asked
    )
    click.echo(to_json(found.to_dict()) if as_json else str(found))
