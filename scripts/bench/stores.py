"""The stores that search is measured on, built once and kept outside the checkout (GRADINDEX_CACHE/stores)."""

from __future__ import annotations

from typing import Any

from harness import TOP  # noqa: F401  # puts scripts/tasks on the path
from reference import cache_folder

import gradindex
from gradindex.projection import Projection

# Int8 rows of 9 x 9 numbers a checkpoint: ten classes have nine directions of output gradients.
TEN_CLASSES = {"projection": Projection("fitted", 81), "row_type": "int8", "factors": "float32"}


def task_of(name: str, n_train: int | None = None) -> gradindex.Task:
    """``"mnist"``, ``"augmented"`` (its first ``n_train`` rows; 50,000 are CIFAR-10 itself) or ``"pseudo_classes"``."""
    import augmented
    import mnist

    if name == "mnist":
        return mnist.task()
    return (
        augmented.pseudo_classes() if name == "pseudo_classes" else augmented.ten_classes(n_train or augmented.N_TRAIN)
    )


def store_of(name: str, n_train: int | None = None, **changed: Any) -> gradindex.GradientStore:
    """The store of a task; built, or gone on with, where it is not complete.

    Args:
        name: see :func:`task_of`.
        n_train: how many rows of ``"augmented"``.
        **changed: options of ``build`` that differ, which get a store of their own.
    """
    task = task_of(name, n_train)
    options: dict[str, Any] = {"shard_rows": 65_536, **TEN_CLASSES}
    if name == "mnist":
        options |= {"projection": Projection("fitted", 669), "row_type": "float32"}
    elif name == "pseudo_classes":
        options |= {"projection": Projection("fitted", 1000)}
    label = "-".join(
        [name, *([str(n_train)] if n_train else []), *(f"{key}={value}" for key, value in changed.items())]
    )
    return gradindex.build(task, cache_folder() / "stores" / label, **(options | changed))
