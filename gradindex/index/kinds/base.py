"""What every kind of index offers, and the registry of kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...choices import INDEX_KINDS
from ...errors import ArgumentError
from ...registry import Registry
from ..exact import Blocks
from ..library import load_faiss
from .lists import every_nth

# How many numbers of a row the tuner tries.
DIMS = (16, 32, 64, 128, 256, 512, 1024)
# With fewer rows than this, lists cost more recall than they save time.
LISTS_FROM = 100_000
ID_BYTES = 8


@dataclass(frozen=True)
class Rows:
    """What an index is made of.

    Args:
        sample: (m, dim) rows that directions and codes are fitted to.
        source: hands out all ids and rows, piece by piece, as they are stored.
        seed: of what is random.
        gpus: devices that cluster and assign.
        directions: (n, dim), along which stored rows have the numbers of an index; by default they have them already.
    """

    sample: NDArray[np.float32]
    source: Callable[[], Blocks]
    seed: int
    gpus: Sequence[int]
    directions: NDArray[np.float32] | None = None

    def blocks(self) -> Blocks:
        """All ids and rows (m, dim), piece by piece."""
        for ids, block in self.source():
            if len(ids):
                yield ids, self._turned(block)

    def every_nth(self, least: int) -> NDArray[np.float32]:
        """Every 2^i-th row: ``least`` to 2 x ``least`` of them, or all where there are fewer."""
        return self._turned(every_nth(self.source, least))

    def _turned(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return rows if self.directions is None else np.ascontiguousarray(rows @ self.directions)


class IndexMethod(ABC):
    """A kind of index; an object of it knows one shape.

        @INDEXES.register("floats")
        class Floats(IndexMethod):
            def make(self, rows):
                faiss = load_faiss()
                codes = faiss.IndexIDMap2(faiss.IndexFlatIP(self.dim))
                for ids, block in rows.blocks():
                    codes.add_with_ids(block, ids)
                return codes

    Rows come with the numbers that they have in the index; :class:`Shape` fits the directions that make them.

    Args:
        dim: numbers of a row in the index.
        lists: how many, for kinds that have lists.
        copies: in how many lists a row stands, for kinds where it may be several.

    Attributes:
        passes: how often rows stream while one is made.
        copies_tried: how many copies of a row the tuner tries, the likeliest first; one for most kinds.
        turned: whether directions are turned at random, so that each number holds as much as the others.
        mapped: whether the CPU searches a saved one where it lies on disk; worth it where a search reads a part of it.

    Raises:
        ArgumentError: there is no such index.
    """

    passes: ClassVar[int] = 1
    copies_tried: ClassVar[Sequence[int]] = (1,)
    turned: ClassVar[bool] = False
    mapped: ClassVar[bool] = False

    def __init__(self, dim: int, lists: int = 0, copies: int = 1) -> None:
        if copies != 1 and tuple(self.copies_tried) == (1,):
            raise ArgumentError(f"copies is {copies}, but only spill has several copies of a row. Choose kind='spill'.")
        self.dim, self.lists, self.copies = dim, lists, copies

    @abstractmethod
    def make(self, rows: Rows) -> Any:
        """A FAISS index with inner product and ids, such as ``IndexIDMap2``; ``rows.blocks`` may be read several times.

        Raises:
            ArgumentError: the shape does not fit the rows.
        """

    def directions(self, fitted: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
        """(n, dim) orthonormal directions whose numbers are coded, of those that were fitted, see ``turned``."""
        if not self.turned:
            return fitted
        turn = np.random.default_rng(seed).standard_normal((self.dim, self.dim)).astype(np.float32)
        return np.ascontiguousarray(fitted @ np.linalg.qr(turn)[0])

    def options(self, index: Any, n_query: int, probes: int, selector: Any) -> Any | None:
        """FAISS's parameters for a search on the CPU.

        Args:
            index: the whole, an ``IndexPreTransform``.
            n_query: how many queries are asked together.
            probes: lists to look into.
            selector: of the rows that may be found, or ``None``: all.

        Returns:
            ``None`` where the codes know no way to leave rows out: more are found then, and those dropped.
        """
        return load_faiss().SearchParameters(sel=selector)

    def after_mapping(self, index: Any) -> None:  # noqa: B027  # most kinds have nothing to do
        """Called with the whole index once it is mapped, see ``mapped``."""

    def for_gpu(self, codes: Any) -> tuple[Any, NDArray[np.int64] | None] | None:
        """What GPUs get a copy of.

        Args:
            codes: what :meth:`make` returned.

        Returns:
            A FAISS index that GPUs know, and its ids by place, or ``None`` for lists, which have ids of their own.
            ``None`` for both where only the CPU can search. By default the rows, decoded from an ``IndexIDMap2``.
        """
        faiss = load_faiss()
        inner = faiss.downcast_index(codes.index)
        decoded = faiss.IndexFlatIP(inner.d)
        decoded.add(inner.reconstruct_n(0, inner.ntotal))
        return decoded, faiss.vector_to_array(codes.id_map).astype(np.int64)

    @property
    def code_bytes(self) -> int:
        """What a row takes besides its id: by default a byte a number."""
        return self.dim

    def bytes_for(self, n_rows: int) -> int:
        """Memory that making an index of so many rows takes at most: codes and ids, whose arrays grow by doubling."""
        return 2 * n_rows * (self.code_bytes + ID_BYTES)

    @property
    def details(self) -> str:
        """What people are told besides kind and numbers, such as ``", 64 lists"``."""
        return ""

    @property
    def probes(self) -> list[int]:
        """How many lists the tuner looks into, ascending; the last is all of them."""
        lists = max(self.lists, 1)
        powers = [2**i for i in range(lists.bit_length())]
        # Of many lists each step costs much; in between, a half more.
        between = [3 * power // 2 for power in powers[1:] if 3 * power // 2 < lists] if lists >= _MANY_LISTS else []
        return sorted({*powers, *between, lists})

    @classmethod
    def tried_unasked(cls, n_rows: int, dim: int | None) -> bool:
        """Whether the tuner tries it for a store of so many rows where no kind is asked for; ``dim`` as asked for."""
        return False

    @classmethod
    def dims(cls, row_dim: int, asked: bool) -> list[int]:
        """How many numbers the tuner tries, ascending, for rows of ``row_dim``, where the kind is asked for or not."""
        return [dim for dim in DIMS if dim < row_dim] or [row_dim]

    @classmethod
    def lists_for(cls, n_rows: int) -> int:
        """How many lists the tuner makes; 0 for kinds without."""
        return 0


# From so many lists on, the tuner takes smaller steps.
_MANY_LISTS = 512

INDEXES: Registry[type[IndexMethod]] = Registry("kind", INDEX_KINDS)


def norms_of(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(m, 1) to divide by: a zero row keeps its zeros."""
    norms: NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norms > 0, norms, np.float32(1))
