"""Data sets of texts whose examples are fixed: masks that never change, and documents out of packed sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import TaskError
from .base import IGNORED


class Masked(Dataset[dict[str, Any]]):
    """Texts with masked tokens, for :func:`masked_lm`: the same ones at every read.

    As in BERT, of the chosen tokens 80% become the mask, 10% a random token and 10% stay. What is chosen follows from
    the seed and the text's position alone, on every machine. Items get ``labels``, -100 where a token was not chosen.

    Source: Devlin et al. 2019 (arXiv:1810.04805), section 3.1.

    Args:
        data: texts, mappings with ``input_ids`` and perhaps ``special_tokens_mask``; a map-style data set.
        tokenizer: of transformers; what is used of it is its ``mask_token_id``, ``all_special_ids`` and length.
        probability: of a token to be chosen. At least one token is.
        seed: of the masks.

    Raises:
        TaskError: the tokenizer has no mask, or the probability is out of range.
    """

    def __init__(self, data: Any, tokenizer: Any, probability: float = 0.15, seed: int = 0) -> None:
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise TaskError(f"The tokenizer ({type(tokenizer).__name__}) has no mask token, so nothing can be masked.")
        if not 0 < probability <= 1:
            raise TaskError(f"probability is {probability!r}, but must be above 0 and at most 1.")
        self._data, self._probability, self._seed = data, probability, seed
        self._mask, self._size = int(tokenizer.mask_token_id), len(tokenizer)
        self._special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, position: int) -> dict[str, Any]:
        position = range(len(self))[position]
        item = dict(self._data[position])
        ids = _array(item["input_ids"]).astype(np.int64)
        special = item.pop("special_tokens_mask", None)
        free = ~(np.isin(ids, self._special) if special is None else _array(special).astype(bool))
        if not free.any():
            raise TaskError(f"Text {position} has no token that could be masked. Leave it out, with Task(skip=...).")
        # Raw draws, which NumPy never changes, as numbers from 0 to 1: to be chosen, how, and which random token.
        raw = np.random.Philox(key=[self._seed, position]).random_raw(3 * len(ids))
        draws = ((raw >> np.uint64(11)) * 2.0**-53).reshape(3, len(ids))
        chosen = free & (draws[0] < self._probability)
        if not chosen.any():
            chosen[np.where(free, draws[0], 2.0).argmin()] = True
        labels = np.where(chosen, ids, IGNORED)
        ids = np.where(chosen & (draws[1] < 0.8), self._mask, ids)
        ids = np.where(chosen & (draws[1] >= 0.9), (draws[2] * self._size).astype(np.int64), ids)
        as_tensors = isinstance(item["input_ids"], Tensor)
        new = {"input_ids": ids, "labels": labels}
        return item | {key: torch.from_numpy(value) if as_tensors else value.tolist() for key, value in new.items()}


class Documents(Dataset[dict[str, Any]]):
    """The documents of packed sequences, each an example with an id of its own.

    A sequence that holds several documents has one loss, which cannot be traced to one of them. Here each document is
    an item, cut out of all fields that are as long as ``input_ids``. Padding (``attention_mask`` of 0) is left out, and
    ``position_ids`` are too, for they start at 0 again.

    The gradient is that of training if the model could not see across documents, as with packing by ``position_ids``.
    Where it could (texts that were only put one after another), a document alone had less before it than in training.
    What was cut at the end of a sequence stays cut.

    Args:
        data: packed sequences, mappings with ``input_ids``; a map-style data set. It is read once to find the
            documents.
        eos_token_id: ends a document, for sequences without ``position_ids`` or ``seq_lengths``.

    Attributes:
        sequences: (n,) int64, the sequence that each document is from.
        starts: (n,) int64, the position in it of the document's first token.
        stops: (n,) int64, the position after its last one.

    Raises:
        TaskError: a sequence does not say where its documents end.
    """

    def __init__(self, data: Any, eos_token_id: int | None = None) -> None:
        self._data = data
        found = [
            (sequence, start, stop)
            for sequence in range(len(data))
            for start, stop in _documents(data[sequence], sequence, eos_token_id)
        ]
        self.sequences, self.starts, self.stops = np.array(found, dtype=np.int64).reshape(-1, 3).T

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, position: int) -> dict[str, Any]:
        sequence, start, stop = (int(of[position]) for of in (self.sequences, self.starts, self.stops))
        item = self._data[sequence]
        length = len(item["input_ids"])
        return {
            key: value[start:stop]
            for key, value in item.items()
            if key not in ("position_ids", "seq_lengths")
            and isinstance(value, (Sequence, Tensor, np.ndarray))
            and len(value) == length
        }


def _documents(item: Mapping[str, Any], sequence: int, eos_token_id: int | None) -> Iterator[tuple[int, int]]:
    """Where the documents of a sequence start and stop."""
    ids = _array(item["input_ids"])
    if "seq_lengths" in item:
        stops = np.cumsum(_array(item["seq_lengths"]))
    elif "position_ids" in item:
        stops = _before_restarts(_array(item["position_ids"]))
    elif eos_token_id is not None:
        stops = np.flatnonzero(ids == eos_token_id) + 1
    else:
        raise TaskError(
            f"Sequence {sequence} has neither position_ids nor seq_lengths, so nothing says where a document ends. "
            "Give Documents(eos_token_id=...)."
        )
    real = _array(item.get("attention_mask", np.ones(len(ids)))) != 0
    starts = np.concatenate([[0], stops])
    for start, stop in zip(starts, [*stops, len(ids)], strict=True):
        inside = np.flatnonzero(real[start:stop]) + start
        if len(inside):
            yield int(inside[0]), int(inside[-1]) + 1


def _before_restarts(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.flatnonzero(np.diff(positions) != 1) + 1


def _array(values: Any) -> NDArray[Any]:
    return values.numpy() if isinstance(values, Tensor) else np.asarray(values)
