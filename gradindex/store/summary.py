"""A store in a few words, and what it holds besides rows as flat columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..output import shown_as

if TYPE_CHECKING:
    from .reader import GradientStore


def described(store: GradientStore) -> dict[str, str]:
    """What a person wants to know at a glance, by name; nothing is read but the manifest."""
    stored, n_checkpoints = store.manifest.map, store.n_checkpoints
    packed = ", packed" if store.manifest.packing else ""
    factors = f", exact factors in {store.manifest.factors}{packed}" if store.has_factors else ""
    factors += "" if store.manifest.wide is None else f", wide rows of {store.manifest.wide:,} a checkpoint"
    found = {
        "task": store.manifest.task,
        "rows": f"{len(store):,} rows of {store.dim:,} numbers in {store.manifest.row_type}{factors}",
        "checkpoints": f"{n_checkpoints} checkpoint{'s' * (n_checkpoints != 1)}",
        "projection": f"projection {stored.projection.kind}",
    }
    if store.columns:
        found["columns"] = f"columns {', '.join(store.columns[:5])}{', ...' if len(store.columns) > 5 else ''}"
    return found


def flat(store: GradientStore, ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Columns, self-influence and losses of ids (n,): arrays (n,) by the names that tables have for them."""
    found = {shown_as(name): store.column(name, ids) for name in store.columns}
    influence, losses = store.self_influence(ids), store.losses(ids)
    found["self_influence"] = influence.sum(1)
    for name, values in (("self_influence", influence), ("loss", losses)):
        found |= {f"{name}_{checkpoint}": values[:, checkpoint] for checkpoint in range(values.shape[1])}
    return found


def flat_names(store: GradientStore) -> dict[str, str]:
    """The names of :func:`flat`, and NumPy's type of each, ``"U"`` for text."""
    found = {shown_as(name): kind for name, kind in store.manifest.columns.items()}
    found["self_influence"] = "f8"
    for name in ("self_influence", "loss"):
        found |= {f"{name}_{checkpoint}": "f8" for checkpoint in range(store.n_checkpoints)}
    return found
