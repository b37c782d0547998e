"""Going on where a store changes while it is read: what was asked of it is asked again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreChangedError
from . import runs
from .reader import GradientStore

T = TypeVar("T")

# As often as a question is asked again, after a little longer each time: together about a second.
_TRIES, _FIRST_PAUSE_S = 12, 0.001


def asked_again(action: Callable[[], T]) -> T:
    """What ``action`` returns, which opens a store and asks of it; all of it again where the store changes meanwhile.

    A compaction takes the files away that an open store reads from; the next attempt finds the new ones. So an answer
    is of one state of the store, never of two.

    Args:
        action: asks all that belongs together, and keeps nothing of a try that failed.

    Raises:
        StoreChangedError: the store changes all the time.
    """
    for number in range(_TRIES):
        try:
            return action()
        except StoreChangedError:
            time.sleep(_FIRST_PAUSE_S * 2 ** min(number, 7))
    return action()


def followed(store: GradientStore, ids: NDArray[np.int64]) -> GradientStore:
    """The store as it is now, if the rows of some ids are still the same: those of an answer that was half given.

    Args:
        store: as it was.
        ids: (m,) that have a row there.

    Raises:
        StoreChangedError: one was removed, or is another row now.
    """
    now = GradientStore(store.folder)
    same = now.manifest.fingerprint == store.manifest.fingerprint and runs.contain(now.id_runs, ids).all()
    if not same or _origins(now, ids) != _origins(store, ids):
        raise StoreChangedError(f"{store.folder} has different rows than when this answer was started. Ask again.")
    return now


def _origins(store: GradientStore, ids: NDArray[np.int64]) -> list[str]:
    origins = store.origins
    places = np.searchsorted(np.array([first for _, first, _ in origins], dtype=np.int64), ids, side="right") - 1
    return [origins[place][0] for place in places.tolist()]
