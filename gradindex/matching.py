"""Whether a task is the one that a store was built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import MismatchError
from .gradients import HALF, Engine
from .rows import describe, projection_of
from .store import GradientStore, RowMap

# Examples whose losses are compared.
_COMPARED = 16


def check_task(store: GradientStore, engine: Engine) -> None:
    """Compare everything that rows depend on: the map, some examples of each shard, and some losses.

    The task may have more training examples than the store has rows: they were not added yet.

    Args:
        store: a complete one.
        engine: of the task, entered, its routes checked. Its precision may be another than the rows'.

    Raises:
        MismatchError: says what differs.
    """
    task, stored = engine.task, store.manifest.map
    now = replace(describe(engine, projection_of(stored), stored.unit_norm), precision=stored.precision)
    differing = stored.differences(now, bases=False)
    if store.manifest.next_id > task.n_train:
        differing.append(f"data length ({store.manifest.next_id} stored, {task.n_train} now)")
    elif not differing:
        changed = task.differing(store.samples())
        if changed:
            differing.append(f"data (such as training example {changed[0]})")
    if differing:
        raise MismatchError(
            f"The task does not match {store.folder}: {'; '.join(differing)} differ. "
            f"Use the task that the store was built from, or build a new store.{hint_at_frozen(stored, engine)}"
        )
    ids = store.spread_ids(_COMPARED)
    rough = stored.precision in HALF
    check_losses(engine, list(zip(ids.tolist(), store.losses(ids), strict=True)), 0, store.folder, rough)


def hint_at_frozen(stored: RowMap, engine: Engine) -> str:
    """A sentence more for a store that tracks what a task without ``layers`` leaves out, as all did by default once."""
    names = [name for layer in stored.layers for name in layer.parameters]
    frozen = set(names) - set(engine.parameters)
    if engine.task.layer_patterns is not None or not frozen or not set(engine.parameters) <= set(names):
        return ""
    also = next(name for name in names if name in frozen)
    return (
        f" The store also tracks {len(frozen)} parameters that were not trained (such as {also}), as layers='*' does, "
        "formerly the default."
    )


def check_losses(
    engine: Engine, stored: Sequence[tuple[int, NDArray[np.float64]]], first: int, folder: Path, rough: bool = False
) -> None:
    """Names and shapes cannot tell a changed activation, loss or example; losses can.

    Args:
        engine: entered.
        stored: ids and their losses (C,) at all of the store's checkpoints.
        first: the number of the engine's first checkpoint among these.
        folder: the store's, for the error.
        rough: whether they were computed in half precision.

    Raises:
        MismatchError: one differs.
    """
    if not stored:
        return
    examples = engine.task.read([i for i, _ in stored])
    now = torch.stack([engine.losses(checkpoint, examples).double() for checkpoint in range(engine.n_checkpoints)], 1)
    then = np.stack([losses for _, losses in stored])[:, first : first + engine.n_checkpoints]
    rough = rough or engine.precision in HALF
    agree = np.isclose(
        then, now.cpu().numpy(), rtol=0.1 if rough else 1e-2, atol=0.05 if rough else 1e-3, equal_nan=True
    ).all(1)
    if not agree.all():
        raise MismatchError(
            f"The task does not match {folder}: the losses of training examples (such as "
            f"{stored[int(agree.argmin())][0]}; so the model's code, the loss or the example) differ. "
            "Use the task that the store was built from, or build a new store."
        )
