"""Indexes of several shapes made and tuned, those first that may be fastest, and those not at all that cannot win."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..choices import IndexKind, QueryGeometry
from ..index import Blocks, CompactIndex, Shape, devices, fitted_directions
from ..progress import note, progress
from ..retrieval.candidates import Candidates
from ..retrieval.whitening import Whitening
from ..store import GradientStore
from .efforts import SIGNS, Choice, choices, counts, narrowing
from .floors import Floors, ScoringTime
from .truth import Truth

# Tuned for a little more than is asked for, where there is a choice: what just reaches it with some queries fails with
# others half of the time.
_MARGIN = 0.25
# An index with more numbers that is slower than this many times the fastest ends the search: still more cost more.
_HOPELESS = 1.5
# The most time that goes to kinds that were tried and are not the fastest, as a share of the fastest one's own.
_OTHER_KINDS = 1 / 3
# The first of another kind is made where that takes no more than so many times what making the fastest took.
_FIRST_OF_KIND = 1
# Other numbers of copies are tried only where the fastest takes so many times what exact scores take alone.
_WORTH_COPIES = 1.5


@dataclass(frozen=True)
class Maker:
    """Makes indexes of a store.

    Args:
        store: a complete one.
        sample: rows that indexes are fitted to.
        seed: of what is random.
        device: where indexes are made and searched.
        geometry: of the queries that they are for.
        whitening: of these queries, if it is a whitened one.
    """

    store: GradientStore
    sample: NDArray[np.float32]
    seed: int
    device: str | None
    geometry: QueryGeometry = "tracin"
    whitening: Whitening | None = None

    def build(self, shape: Shape) -> CompactIndex:
        """An index of all rows, with progress."""
        passes = shape.method.passes
        with progress(str(shape), passes * self.store.n_train, "rows") as advance:

            def blocks() -> Blocks:
                for ids, rows in self.store.blocks():
                    yield ids, rows
                    advance(len(ids))

            directions = self.directions(shape.dim)
            return CompactIndex.build(shape, self.sample, blocks, self.seed, devices(self.device), directions)

    def searched(self, index: CompactIndex) -> Candidates:
        """The search with an index."""
        damping = None if self.whitening is None else self.whitening.damping
        return Candidates(self.store, index, device=self.device, geometry=self.geometry, damping=damping)

    def directions(self, dim: int) -> NDArray[np.float32]:
        """(n, dim) the directions that so many numbers of an index are of, the leading ones first."""
        return (
            fitted_directions(self.sample, dim, self.seed) if self.whitening is None else self.whitening.directions(dim)
        )


class Trials:
    """Makes indexes and tunes them, those first that may be fastest; no more than two are in memory at once.

    Args:
        maker: makes them.
        truth: of queries to tune with.
        recall: to reach.
        until: when to begin no further one, by ``time.monotonic``.

    Attributes:
        choices: what reached the recall.
        tried: whether any was made.
        best: the most recall of any, estimated where none was made.
        widest: the numbers of a row that the estimate is of.
        fastest: of the choices.
        built: its index.
    """

    def __init__(self, maker: Maker, truth: Truth, recall: float, until: float) -> None:
        self._maker, self._store, self._truth, self._recall = maker, maker.store, truth, recall
        self._until = until
        self.choices: list[Choice] = []
        self.best, self.widest, self.tried = 0.0, 0, False
        self.fastest: Choice | None = None
        self.built: CompactIndex | None = None
        self._spent: dict[IndexKind, float] = {}
        self._ended: set[IndexKind] = set()

    def run(self, shapes: Sequence[Shape], other_copies: bool = True) -> None:
        """Try what may be faster than what there is; at least one, whatever the time.

        Args:
            shapes: in the order in which they are tried.
            other_copies: whether the fastest is tried with other numbers of copies.
        """
        dims = sorted({shape.dim for shape in shapes})
        floors = Floors(self._store, self._maker.sample, self._truth, dims, self._maker.directions(dims[-1]))
        scoring = ScoringTime(self._store, self._truth, self._maker.seed)
        counted, narrows = counts(self._store.n_train, self._truth.k), narrowing(self._store, self._truth)
        for shape in shapes:
            if shape.kind in self._ended or self._enough(shape):
                continue
            needed = floors.proposals(shape.dim, self._recall, counted)
            if needed is None:
                reached = min(floors.recall(shape.dim, kind, counted[-1]) for kind in SIGNS)
                if not self.tried and reached >= self.best:
                    self.best, self.widest = reached, shape.dim
                self._say(shape, f"left out, for all rows compared by so few numbers reach about {reached:.3f}")
                continue
            few = [self._truth.k if narrows else count for count in needed.values()]
            least = float(np.mean([scoring.of(count) for count in few]))
            if self.fastest is not None and least >= self.fastest.milliseconds:
                self._say(shape, f"left out, for exact scores of its proposals take {least:.2g} ms alone")
                continue
            self._try(shape)
        if other_copies:
            self._try_copies(scoring)

    def _enough(self, shape: Shape) -> bool:
        """Whether the time is over, for all or for a kind that is not the fastest."""
        if time.monotonic() > self._until and self._spent:
            return True
        if self.fastest is None or shape.kind == self.fastest.shape.kind:
            return False
        if shape.kind not in self._spent:
            return _making(shape) > _FIRST_OF_KIND * _making(self.fastest.shape)
        own = self._spent[self.fastest.shape.kind]
        return sum(self._spent.values()) - own > _OTHER_KINDS * own

    def _try_copies(self, scoring: ScoringTime) -> None:
        """Other numbers of copies for what is fastest, where there is something to gain."""
        if self.fastest is None:
            return
        shape = self.fastest.shape
        alone = np.mean([scoring.of(effort.exact or effort.proposals) for effort in self.fastest.efforts.values()])
        for copies in shape.method.copies_tried:
            worth = self.fastest.milliseconds > _WORTH_COPIES * alone
            if copies != shape.copies and worth and time.monotonic() < self._until:
                self._try(replace(shape, copies=copies))

    def _try(self, shape: Shape) -> None:
        started = time.monotonic()
        if not self.tried:
            self.tried, self.best = True, 0.0
        built = self._maker.build(shape)
        search = self._maker.searched(built)
        wanted = self._recall + _MARGIN * (1 - self._recall)
        found, reached = choices(self._store, search, shape, self._truth, wanted)
        if not found and reached >= self._recall:
            found, _ = choices(self._store, search, shape, self._truth, self._recall)
        self.best = max(self.best, reached)
        self.choices += found
        taken = time.monotonic() - started
        self._spent[shape.kind] = self._spent.get(shape.kind, 0) + taken
        if not found:
            self._say(shape, f"reaches {reached:.4f} ({taken:.0f} s)")
        elif self.fastest is None or found[0].milliseconds < self.fastest.milliseconds:
            self.fastest, self.built = found[0], built
        elif found[0].milliseconds > _HOPELESS * self.fastest.milliseconds:
            self._ended.add(shape.kind)
        if found:
            self._say(shape, f"{found[0].milliseconds:.2f} ms a query ({taken:.0f} s)")

    def _say(self, shape: Shape, what: str) -> None:
        note(f"{shape}: {what}")


def _making(shape: Shape) -> int:
    """About what it takes to make an index, of its rows."""
    return shape.method.passes * shape.dim
