"""Few of many checkpoints: evenly spread, or from where the loss fell most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ..errors import ArgumentError
from .file import Checkpoint


def evenly(checkpoints: Sequence[Checkpoint], count: int) -> list[Checkpoint]:
    """The checkpoint nearest to the middle of each of ``count`` equal spans, in the order of training.

    TracInCP stands for a sum over all steps, and the middle of a span stands for it best (the midpoint rule):
    on MNIST, 5 of 20 agree with the sum over all steps to a mean Pearson of 0.936, the ends of the spans to
    0.917 (docs/paper.md). Each keeps its own weight; ``"integrated"`` covers the steps since the checkpoint
    saved before it, also where that one is not chosen.

    Args:
        checkpoints: in the order of training, saved at equal distances.
        count: from 1 to their number.

    Raises:
        ArgumentError: ``count`` is out of range.
    """
    _check_count(checkpoints, count)
    n = len(checkpoints)
    # Checkpoint j of n stands at the end of step j, so the middle (k - 1/2) n / count is rounded to a whole j.
    return [checkpoints[((2 * number - 1) * n + count) // (2 * count) - 1] for number in range(1, count + 1)]


def by_loss_drop(
    checkpoints: Sequence[Checkpoint], count: int, losses: Sequence[float] | None = None
) -> list[Checkpoint]:
    """Those before which the training loss fell most, in the order of training.

    The drop of a checkpoint is the loss at the one before it minus its own; the first has none before it
    and is chosen only when all are.

    Source: Pruthi et al. 2020 (arXiv:2002.08484): checkpoints from where the loss falls.

    Args:
        checkpoints: in the order of training.
        count: from 1 to their number.
        losses: the training loss of each; by default what ``Recorder.save(loss)`` recorded.

    Raises:
        ArgumentError: ``count`` is out of range, or there is not one finite loss for each checkpoint.
        CheckpointError: no loss was recorded.
    """
    _check_count(checkpoints, count)
    values = [item.loss() for item in checkpoints] if losses is None else [float(loss) for loss in losses]
    if len(values) != len(checkpoints) or not all(map(math.isfinite, values)):
        finite = sum(map(math.isfinite, values))
        raise ArgumentError(
            f"losses has {finite} finite values, but there are {len(checkpoints)} checkpoints. Give one for each."
        )
    drops = [-math.inf] + [before - after for before, after in pairwise(values)]
    chosen = sorted(range(len(values)), key=lambda number: -drops[number])[:count]
    return [checkpoints[number] for number in sorted(chosen)]


def _check_count(checkpoints: Sequence[Checkpoint], count: int) -> None:
    if not 1 <= count <= len(checkpoints):
        raise ArgumentError(
            f"count is {count}, but must be from 1 to {len(checkpoints)}, the number of checkpoints. Choose another."
        )
