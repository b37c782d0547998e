"""Commands that compute gradients: demo, build, add, add-checkpoint."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..choices import PROJECTION_KINDS
from ..options import BuildOptions, ComputeOptions
from .main import say
from .options import FOLDER, PATH, options_of, part_option


@click.command()
@click.option("--out", type=PATH, default="gradindex-demo", show_default=True, help="Folder for everything it writes.")
def demo(out: Path) -> None:
    """Try everything on real handwritten digits: train, build, query, report.

    Takes less than a minute on a CPU and needs the extra "demo". The last line printed is the path of the report.

    Example: gradindex demo --out /tmp/gradindex-demo
    """
    from ..demo import run

    say(str(run(out)))


@click.command()
@click.argument("task")
@click.option("--out", required=True, type=PATH, metavar="DIR", help="Folder of the store.")
@click.option("--projection", type=click.Choice(PROJECTION_KINDS), default="tensorsketch", show_default=True)
@click.option("--dim", type=int, help="Largest row size per checkpoint, in numbers; by default 1024.")
@click.option("--row-dim", type=int, help="Instead of --dim: largest size of a whole row, in numbers.")
@click.option("--row-bytes", type=int, help="Instead of --dim: largest size of a whole row, in bytes.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random projection.")
@options_of(BuildOptions)
@part_option("Build part I of N; parts can run in parallel. Finish with `gradindex seal DIR`.")
@click.option("--dry-run", is_flag=True, help="Time a few batches, estimate disk, memory and time, and stop.")
@click.option("--repair", is_flag=True, help="Recompute damaged shards of a finished store, and nothing else.")
def build(
    task: str, out: Path, projection: Any, dim: int | None, row_dim: int | None, row_bytes: int | None, seed: int,
    part: tuple[int, int] | None, dry_run: bool, repair: bool, **options: Any,
) -> None:  # fmt: skip
    """Build the store of TASK (path/to/file.py:name or package.module:name).

    Safe to rerun: it resumes where it stopped.

    Example: gradindex build scripts/tasks/mnist.py:task --out /tmp/mnist
    """
    from .. import building, growth
    from ..projection import DEFAULT_DIM, Projection
    from ..task import load_task

    if sum(size is not None for size in (dim, row_dim, row_bytes)) > 1:
        raise click.UsageError("Give one of --dim, --row-dim and --row-bytes.")
    if repair:
        context = click.get_current_context()
        by_hand = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        computing = {each.name for each in fields(ComputeOptions)}
        idle = [name for name in by_hand if name not in {"task", "out", "repair", *computing}]
        if idle:
            raise click.UsageError(f"--repair reads all settings from the store. Drop --{idle[0].replace('_', '-')}.")
        said = growth.repair(load_task(task), out, **{name: options[name] for name in computing})
        say("\n".join(said) if said else f"{out} is undamaged: nothing to repair")
        return
    options["projection"] = Projection(projection, DEFAULT_DIM if dim is None else dim, seed, row_dim, row_bytes)
    if dry_run:
        click.echo(building.estimate(load_task(task), out, part=part, **options))
        return
    if part is not None:
        building.build_part(load_task(task), out, part, **options)
        say(f"{out}: part {part[0]}/{part[1]} is done; once all parts are, run: gradindex seal {out}")
        return
    store = building.build(load_task(task), out, **options)
    say(f"{out}: {store.n_train:,} rows of {store.dim:,} numbers, from {store.n_checkpoints} checkpoints")


_TASK = click.option("--task", required=True, help="The grown task, written as for build.")


@click.command()
@FOLDER
@_TASK
@options_of(ComputeOptions)
def add(folder: Path, task: str, **options: Any) -> None:
    """Add the task's new training examples to the store; only their rows are computed.

    The task's data must start with the examples that the store already has, followed by the new ones. Safe to rerun:
    it resumes where it stopped. Until it is done, the store gives its old answers.

    Example: gradindex add /tmp/mnist --task my_task.py:grown
    """
    from ..growth import add as run
    from ..store import GradientStore
    from ..task import load_task

    before = GradientStore(folder).n_train
    store = run(load_task(task), folder, **options)
    say(f"{folder}: {store.n_train - before:,} rows added, {store.n_train:,} in all")


@click.command("add-checkpoint")
@FOLDER
@_TASK
@options_of(ComputeOptions)
def add_checkpoint(folder: Path, task: str, **options: Any) -> None:
    """Add the task's new checkpoints to the store; only their gradients are computed.

    Safe to rerun: it resumes where it stopped. Until it is done, the store gives its old answers.

    Example: gradindex add-checkpoint /tmp/mnist --task my_task.py:longer
    """
    from ..growth import add_checkpoint as run
    from ..store import GradientStore
    from ..task import load_task

    before = GradientStore(folder).n_checkpoints
    store = run(load_task(task), folder, **options)
    say(f"{folder}: {store.n_checkpoints - before} checkpoints added, {store.n_checkpoints} in all")
