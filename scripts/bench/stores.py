"""The stores that search is measured on, built once and kept outside the checkout (GRADINDEX_CACHE/stores)."""

from __future__ import annotations

import fcntl
from dataclasses import replace
from typing import Any

from harness import TOP  # noqa: F401  # puts scripts/tasks on the path
from reference import cache_folder, quick
from torch.utils.data import Subset

import gradindex
from gradindex.projection import Projection

# Int8 rows of 9 x 9 numbers a checkpoint: ten classes have nine directions of output gradients.
TEN_CLASSES = {"projection": Projection("fitted", 81), "row_type": "int8", "factors": "float32"}


def task_of(name: str, n_train: int | None = None) -> gradindex.Task:
    """``"mnist"``, ``"augmented"``, ``"pseudo_classes"``, ``"imagenet_shape"`` or ``"all_layers"`` (of CIFAR-10).

    Args:
        name: see above.
        n_train: how many rows of ``"augmented"``, ``"pseudo_classes"`` or ``"imagenet_shape"``, by default all (250,000
            of ``"pseudo_classes"``); 50,000 of ``"augmented"`` are CIFAR-10 itself.
    """
    import augmented
    import cifar10
    import imagenet_shape
    import mnist

    if name == "mnist":
        task = mnist.task()
        return part_of(task, range(2000)) if quick() else task
    if name == "imagenet_shape":
        task = imagenet_shape.task()
        return task if n_train is None else part_of(task, range(n_train))
    if name == "pseudo_classes":
        return augmented.pseudo_classes(n_train)
    if name == "all_layers":
        task = cifar10.all_layers()
        task = replace(task, checkpoints=[task.checkpoints[epoch - 1] for epoch in augmented.AFTER_EPOCHS])
        return part_of(task, range(0, task.n_train, 5)) if quick() else task
    return augmented.ten_classes(n_train)


def part_of(task: gradindex.Task, chosen: range) -> gradindex.Task:
    """A task with some of its training examples alone."""
    columns = {name: values[chosen] for name, values in task.columns.items()}
    return replace(task, train=Subset(task.train, chosen), columns=columns)


def store_of(name: str, n_train: int | None = None, **changed: Any) -> gradindex.GradientStore:
    """The store of a task; built, or its build resumed, if it is not complete. Processes take turns.

    Args:
        name: see :func:`task_of`.
        n_train: how many rows, see :func:`task_of`.
        **changed: options of ``build`` that differ, which get a store of their own.
    """
    task = task_of(name, n_train)
    options: dict[str, Any] = {"shard_rows": 262_144, **TEN_CLASSES}
    if name == "mnist":
        # Fitting takes most of the time of so small a store.
        projection = Projection(dim=134) if quick() else Projection("fitted", 669)
        options |= {"projection": projection, "row_type": "float32"}
    elif name == "pseudo_classes":
        options |= {"projection": Projection("fitted", 100 if quick() else 1000)}
    elif name == "imagenet_shape":
        # A build of an hour loses no more than this when it is cut off; a query takes time for each file.
        options |= {"projection": Projection("fitted", 100 if quick() else 1000), "row_type": "int4"}
        options |= {"shard_rows": 131_072}
    elif name == "all_layers":
        options |= {
            "projection": Projection(dim=256) if quick() else Projection("fitted", 1024),
            "factors": None,
            "precision": "bfloat16",
        }
        options |= {"self_influence": "projected", "shard_rows": 8192}
    words = [f"{value.kind}-{value.dim}" if isinstance(value, Projection) else str(value) for value in changed.values()]
    label = "-".join([name, *([str(n_train)] if n_train else []), *words])
    folder = cache_folder() / "stores" / label
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:  # quick forms share stores: whoever comes second waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        return gradindex.build(task, folder, **(options | changed))
