"""Whether a task is the one that a store was built from."""

from __future__ import annotations

import numpy as np

from .errors import MismatchError
from .gradients import HALF, Engine
from .projection import Projection
from .rows import describe
from .store import GradientStore, differences


def check_task(store: GradientStore, engine: Engine) -> None:
    """Compare everything that rows depend on: the map, some examples of each shard, and two losses.

    The task may have more training examples than the store has rows: they were not added yet.

    Args:
        store: a complete one.
        engine: of the task, entered, its routes checked. Its precision may be another than the rows'.

    Raises:
        MismatchError: says what differs.
    """
    task, stored = engine.task, store.manifest["map"]
    now = describe(engine, Projection(**stored["projection"]), stored["unit_norm"])
    differing = differences(store.manifest, {"map": now | {"precision": stored["precision"]}})
    if store.manifest["next_id"] > task.n_train:
        differing.append(f"data length ({store.manifest['next_id']} stored, {task.n_train} now)")
    elif not differing and task.differing(store.samples()):
        differing.append(f"data (training example {task.differing(store.samples())[0]}, for one)")
    elif not differing and not _losses_agree(store, engine):
        differing.append("the losses of training examples (so the model's code or the loss)")
    if differing:
        raise MismatchError(
            f"The task does not match {store.folder}: {'; '.join(differing)} differ. "
            "Use the task that the store was built from, or build a new store."
        )


def _losses_agree(store: GradientStore, engine: Engine) -> bool:
    """Names and shapes cannot tell a changed activation or loss; two losses can."""
    rough = store.manifest["map"]["precision"] in HALF
    ids = store.first_and_last()
    if not len(ids):  # every shard is damaged, and to be computed again
        return True
    items = [engine.task.train[int(i)] for i in ids]
    now = np.stack([engine.losses(c, items) for c in range(engine.n_checkpoints)], 1)
    return bool(np.allclose(store.losses(ids), now, rtol=0.1 if rough else 1e-2, atol=0.05 if rough else 1e-3))
