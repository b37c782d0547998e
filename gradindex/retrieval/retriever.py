"""Ask: which training examples are behind a prediction, and where their influence comes from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..choices import Aggregate, AnswerKind, Precision, QueryGeometry, Source
from ..deprecation import deprecated, in_order
from ..errors import ArgumentError, StoreError
from ..forking import one_thread_in_children
from ..gradients import HALF, Engine, Geometry, check_routes
from ..index import require
from ..matching import check_task
from ..output import as_html
from ..rows import RowMaker, projection_of
from ..store import GradientStore, asked_again, described, runs
from ..task import Task
from ..tree import preserved_random_state
from .answering import hits_of
from .asking import Queries, find
from .candidates import Candidates
from .comparing import Asked
from .explanation import Explanation
from .filters import allow
from .hits import Both, Hits
from .question import Question, QuestionKeywords, SearchKeywords
from .rehearsing import rehearsal
from .scoring import Scores, joined
from .searcher import LocalSearcher
from .stages import Search
from .tokens import TokenExplanation, explain_tokens
from .warming import Warming, Warmth
from .whitening import Whitening, searched_as

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _how(store: GradientStore, candidates: Candidates) -> str:
    """How a store is searched, for people."""
    wide = store.manifest.wide
    beside = "" if wide is None else f"; wide rows of {wide:,} numbers a checkpoint settle the order of candidates"
    return f"{candidates.how}{beside}"


class Retriever:
    """An open store and its task, ready for queries. Create one with :func:`load`.

    Threads can share one. The model is locked only while gradients are computed: those of queries and, without stored
    factors, those of training examples. Everything else runs concurrently.

    Args:
        task: the task that the store was built from.
        store: a complete store.
        device: where to compute and search; by default gradients on the model's device and search on the CPU.
        use_index: whether to use the index, if there is one.
        one_at_a_time: whether to hold the weights of one checkpoint at a time; by default if not all fit into memory.
        geometry: by which inner product queries are compared with rows, see :func:`load`.
        damping: of a whitened geometry, see :func:`load`.
        iterations: of exact whitening, see :func:`load`.

    Raises:
        ArgumentError: ``damping`` or ``iterations`` is out of range, or decides nothing.
        MismatchError: the task does not match the store; says what differs.
        StoreError: the store is damaged, or lacks what a whitened geometry is made of.
    """

    def __init__(
        self,
        task: Task,
        store: GradientStore,
        device: str | None = None,
        use_index: bool = True,
        one_at_a_time: bool | None = None,
        geometry: QueryGeometry = "tracin",
        damping: float | None = None,
        iterations: int | None = None,
    ) -> None:
        task, store = in_order(task, store, Task, "Retriever(task, store)")
        self._asked = Asked(geometry, damping, iterations)
        require()
        one_thread_in_children("torch", torch.set_num_threads)
        self.task = task
        stored = store.manifest.map
        self._projection = projection_of(stored)
        # Queries and exact scores take full precision, even where rows were made in half precision.
        precision: Precision = "float32" if stored.precision in HALF else stored.precision
        alone = store.manifest.batch_size == 1
        self._engine = Engine(task, precision, device, alone=alone, one_at_a_time=one_at_a_time)
        self.geometry = geometry
        self._comparison = self._asked.of(self._engine, store, self._computing)
        with self._computing() as engine:
            check_routes(engine, task.train_ids[task.train_ids < store.manifest.next_id])
            check_task(store, engine)
        self._bases = store.bases()
        self._search_options: dict[str, Any] = {
            "use_index": use_index, "device": device, "geometry": searched_as(geometry),
            "damping": None if self.whitening is None else self.whitening.damping,
        }  # fmt: skip
        self._opened = store, Candidates(store, **self._search_options)
        self._warming: Warming | None = None
        self._made: tuple[tuple[bool, int | None], RowMaker] | None = None

    @property
    def inner_product(self) -> Geometry:
        """By what gradients are compared."""
        return self._comparison.geometry

    @property
    def measure(self) -> str:
        """What scores are called, such as ``"TracInCP scores"``."""
        return self.inner_product.measure

    @property
    def whitening(self) -> Whitening | None:
        """What turns queries' rows; ``None`` where they are compared as they are."""
        return self._comparison.whitening

    def __repr__(self) -> str:
        return f"<Retriever of {self.task!r} on {self._opened[0]!r}>"

    def _repr_html_(self) -> str:
        store, candidates = self._opened
        return as_html({"model": repr(self.task)[1:-1]} | described(store) | {"search": _how(store, candidates)})

    def _computing(self) -> AbstractContextManager[Engine]:
        return _computing(self._engine)

    def warm(self, wait: bool = False) -> Warmth:
        """Get ready for queries in the background, so that the first costs what the others do.

        A thread verifies and reads what queries read, in the order of the files: the index, stored factors, rows and
        columns, as far as they fit the free memory. Queries go on meanwhile, and profit from what is done. A question
        is asked here, and another one there at the end, for libraries set up much at their first use. Where the store
        changes, the next query begins it anew.

        Args:
            wait: until it has ended, with progress.

        Returns:
            How far it is.

        Raises:
            StoreError: a file is damaged. Without ``wait``, the next query raises it.
        """
        opened = self._now()
        if self._warming is None or (self._warming.warmth.over and not self._warming.warmth.ready):
            self._warming = Warming(*opened, *self._rehearsal(opened[0]))
        return self._warming.waited() if wait else self._warming.warmth

    @property
    def warmth(self) -> Warmth | None:
        """How far :meth:`warm` has come; ``None`` where it was not asked for."""
        return None if self._warming is None else self._warming.warmth

    def _rehearsal(self, store: GradientStore) -> tuple[Callable[[GradientStore, Candidates], None] | None, str]:
        def prepared() -> Queries:
            return self.prepare([0]) if self.task.n_query else self.prepare(store.spread_ids(1).tolist(), "train")

        return rehearsal(self.task, store, self.inner_product, prepared, partial(_computing, self._engine))

    @property
    def store(self) -> GradientStore:
        """The current store: with rows that were added since, without rows that were removed.

        Raises:
            StoreError: it now has different rows, or it is gone.
        """
        return asked_again(self._now)[0]

    def _now(self) -> tuple[GradientStore, Candidates]:
        """The store as it is now, and its search; what asks both is asked again (:func:`asked_again`) as a whole."""
        store, candidates = self._opened
        if self._warming is not None:
            self._warming.check()
        if not candidates.current:
            now = GradientStore(store.folder)
            if now.manifest.fingerprint != store.manifest.fingerprint:
                raise StoreError(f"{store.folder} has different rows than when it was opened. Load it again.")
            self._opened = store, candidates = now, Candidates(now, **self._search_options)
            if self.geometry != "tracin":
                self._comparison, self._made = self._asked.of(self._engine, now, self._computing), None
            if self._warming is not None:
                self._warming = self._warming.again(store, candidates)
        return store, candidates

    @property
    def unseen(self) -> int:
        """How many of the task's training examples the store lacks, so that answers leave them out."""
        return self.task.n_train - self.store.manifest.next_id

    @property
    def search_note(self) -> str:
        """How rows are searched: with which index and recall, or by scanning all of them."""
        return _how(*asked_again(self._now))

    def prepare(
        self, queries: int | Sequence[Any], source: Source = "query", aggregate: Aggregate | None = None
    ) -> Queries:
        """Compute the gradients of queries once, to ask several questions about them.

        Args:
            queries: positions in ``task.query`` (or ids, with ``source="train"``), or items of your own. Integers
                are positions, in a list, range, tuple, array, tensor or Series (its labels are ignored); so is a
                mask with a boolean for each example. A single item needs no list if it looks like an example of the
                task, as a tuple ``(x, y)`` does.
            source: where positions are looked up; the query loss is explained either way.
            aggregate: ``"sum"`` or ``"mean"`` combines all queries into one: which training examples help or hurt
                them together. Its scores are the sum or mean of those of each query (of the cosines, if the store's
                rows have unit norm). Only one row and one gradient are in memory, however many queries there are.

        Returns:
            What every method below takes in place of positions or items. Without stored factors, it keeps the
            queries' whole gradients after their first use, if they take less than 2 GiB.

        Raises:
            ArgumentError: a position or an option is out of range.
            NonFiniteGradientError: names the query.
        """
        examples = find(self.task, queries, source)

        def prepared() -> Queries:
            store, fingerprint = self._now()[0], self._fingerprint
            with self._computing() as engine:
                maker = self._maker(engine, store)
                made = self._comparison.prepared(examples, maker, store, aggregate, fingerprint(store))
            return self._comparison.finished(made, aggregate)

        return asked_again(prepared)

    def _fingerprint(self, store: GradientStore) -> str:
        """What prepared queries are known by: the rows that they compare with, and how."""
        return f"{store.manifest.fingerprint}{self._comparison.stamp}"

    def _maker(self, engine: Engine, store: GradientStore) -> RowMaker:
        """Makes queries' rows; kept, for wide rows are made with transforms of bases."""
        wanted = self._comparison.wanted(store)
        if self._made is None or self._made[0] != wanted:
            factors, wide = wanted
            maker = RowMaker(engine, self._projection, self._bases, "exact", self.inner_product, factors, wide=wide)
            self._made = wanted, maker
        return self._made[1]

    def ask(
        self, queries: int | Sequence[Any], source: Source = "query", aggregate: Aggregate | None = None
    ) -> Queries:
        """The former name of :meth:`prepare`."""
        deprecated("Retriever.ask", "Retriever.prepare")
        return self.prepare(queries, source, aggregate)

    def _prepared(
        self, store: GradientStore, queries: int | Sequence[Any] | Queries, source: Source, aggregate: Aggregate | None
    ) -> Queries:
        if not isinstance(queries, Queries):
            return self.prepare(queries, source, aggregate)
        if source != "query" or aggregate is not None:
            raise ArgumentError(
                "source and aggregate belong to prepare(), but these queries are already prepared. Drop them."
            )
        if queries.vectors.fingerprint != self._fingerprint(store) or not self._comparison.fits(queries, store):
            raise ArgumentError(
                f"These queries were prepared for different rows than those of {store.folder}, or another geometry. "
                "Prepare them again."
            )
        return queries

    def proponents(
        self, queries: int | Sequence[Any] | Queries, k: int | None = None, **options: Unpack[QuestionKeywords]
    ) -> Hits:
        """The training examples with the highest scores; options as in :meth:`search`."""
        return self.answer(queries, Question(kind="proponents", k=k, **options))

    def opponents(
        self, queries: int | Sequence[Any] | Queries, k: int | None = None, **options: Unpack[QuestionKeywords]
    ) -> Hits:
        """The training examples with the lowest scores; options as in :meth:`search`."""
        return self.answer(queries, Question(kind="opponents", k=k, **options))

    def both(
        self, queries: int | Sequence[Any] | Queries, k: int | None = None, **options: Unpack[QuestionKeywords]
    ) -> Both:
        """Proponents and opponents from one gradient pass; options as in :meth:`search`."""
        return Both(*self._answers(queries, Question(k=k, **options), ("proponents", "opponents")))

    def search(
        self, queries: int | Sequence[Any] | Queries, k: int | None = None, **options: Unpack[SearchKeywords]
    ) -> Hits:
        """The best training examples for each query.

        In some stages, which the answer counts: the index, if there is one, proposes candidates (for opponents with the
        negated query, for the largest magnitudes with both); their full rows are scored; the largest entries of packed
        factors, or wide rows, tell which of them may be among the best; exact TracInCP re-ranks these. A stage that
        decides nothing is skipped: rows, if the index proposes no more candidates than exact scores re-rank.

        Args:
            queries: positions in ``task.query`` (or ids, with ``source="train"``), items, or what :meth:`prepare` made.
            k: most hits per query, from 1 to n_train; by default 10 (or all, if there are fewer).
            **options: fields of :class:`~gradindex.Question`, such as ``kind="absolute"`` or
                ``where={"label": "cat"}``.

        Returns:
            Hits with ids and scores of shape (n_query, w), with w at most k; see there for queries with fewer.

        Raises:
            ArgumentError: an option is out of range or of the wrong type; there is no such id or column.
        """
        return self.answer(queries, Question(k=k, **options))

    def answer(self, queries: int | Sequence[Any] | Queries, question: Question) -> Hits:
        """The same for a :class:`~gradindex.Question` object, such as one read from JSON (:meth:`Question.from_dict`).

        Args:
            queries: as in :meth:`search`.
            question: what to ask about them.
        """
        (hits,) = self._answers(queries, question, (question.kind,))
        return hits

    def _answers(
        self, queries: int | Sequence[Any] | Queries, question: Question, kinds: Sequence[AnswerKind]
    ) -> list[Hits]:
        question = self._comparison.question(question)
        question.most(self.store.n_train)  # refused before the gradients are computed
        question.check_wide(self.store.manifest.wide is not None)
        prepared = self._prepared(self.store, queries, question.source, question.aggregate)

        def answers() -> list[Hits]:
            store, candidates = self._now()
            question.most(store.n_train)
            columns = prepared.examples.columns
            allowed = allow(store, question, columns, len(prepared)) if question.filtered else None
            searcher = LocalSearcher(store, candidates, self._computing, prepared, allowed, self.inner_product)
            search = Search(searcher, prepared.vectors, question, kinds)
            return [
                hits_of(self.task, store, prepared, kind, answer, self._comparison.measure(prepared, answer.last))
                for kind, answer in zip(kinds, search.answers(), strict=True)
            ]

        return asked_again(answers)

    def explain(
        self,
        queries: int | Sequence[Any] | Queries,
        ids: Any,
        *,
        source: Source = "query",
        aggregate: Aggregate | None = None,
    ) -> Explanation:
        """Exact scores of some training examples by checkpoint and layer, which add up to the score.

            TracInCP(z, z') = sum_c sum_l eta_c <grad_l l(w_c; z), grad_l l(w_c; z')>

        From stored factors if the store has them, else through the model.

        Args:
            queries: as in :meth:`search`.
            ids: (n_ids,) training ids.
            source: as in :meth:`search`.
            aggregate: as in :meth:`prepare`.

        Returns:
            Scores (n_query, n_ids, C, L) float64 with the names of checkpoints and layers.

        Raises:
            ArgumentError: there is no such id or position.
        """
        store, chosen = self.store, self._chosen(ids)
        asked = self._prepared(store, queries, source, aggregate)

        def explained() -> tuple[NDArray[np.float64], tuple[str, ...], str]:
            store = self._now()[0]
            store.check_ids(chosen)
            return self._comparison.explained(store, asked, chosen)

        scores, layers, scored = asked_again(explained)
        checkpoints = tuple(
            f"{number} {Path(checkpoint.path).name}" for number, checkpoint in enumerate(self.task.checkpoints)
        )
        measure = self._comparison.measure(asked, "exact")
        return Explanation(scores, asked.names, chosen, checkpoints, layers, scored, measure)

    def explain_tokens(
        self, queries: int | Sequence[Any] | Queries, ids: Any, *, source: Source = "query"
    ) -> TokenExplanation:
        """The same by token, of losses that are sums over tokens, as those of language models are.

            score = sum_t sum_c eta_c <grad l_t(w_c; q), grad l(w_c; z)>
                  = sum_t sum_c eta_c <grad l(w_c; q), grad l_t(w_c; z)>

        by tokens t of the query, and of the training example. Each takes one pass through the model for each pair and
        checkpoint, and no gradient of a single token.

        Args:
            queries: as in :meth:`search`.
            ids: (n_ids,) training ids.
            source: as in :meth:`search`.

        Raises:
            ArgumentError: there is no such id or position, or the queries are a group.
            TaskError: neither loss is a sum over tokens; see :class:`gradindex.losses.TokenLoss`.
        """
        self._comparison.check_tokens()
        chosen = self._chosen(ids)
        asked = self._prepared(self.store, queries, source, None)
        with self._computing() as engine:
            return asked_again(lambda: explain_tokens(self._now()[0], asked, chosen, engine, self.inner_product))

    def _chosen(self, ids: Any) -> NDArray[np.int64]:
        """Ids that have a row, as an array."""
        chosen = np.atleast_1d(runs.as_ids(ids))
        if chosen.ndim != 1 or not len(chosen):
            raise ArgumentError(f"ids have shape {chosen.shape}, but must be a list of at least one training id.")
        asked_again(lambda: self._now()[0].check_ids(chosen))
        return chosen

    def split(self, queries: int | Sequence[Any] | Queries, ids: Any, **options: Any) -> Explanation:
        """The former name of :meth:`explain`."""
        deprecated("Retriever.split", "Retriever.explain")
        return self.explain(queries, ids, **options)

    def query_rows(self, queries: int | Sequence[Any] | Queries, source: Source = "query") -> NDArray[np.float32]:
        """(n_query, dim) float32 rows of queries, as :meth:`search` takes them."""
        return self._prepared(self.store, queries, source, None).rows

    def exact_scores(self, queries: int | Sequence[Any] | Queries, source: Source = "query") -> NDArray[Any]:
        """(n_query, n_train) exact scores of all rows' training examples, in the order of the store's ids.

        TracInCP, or cosines where the store's rows have unit norm.
        """
        asked = self._prepared(self.store, queries, source, None)
        dtype = np.float64 if self._engine.dtype == torch.float64 else np.float32

        def scores() -> NDArray[Any]:
            store = self._now()[0]
            return joined(self._comparison.pieces(store, asked), len(asked), store.n_train, dtype)

        return asked_again(scores)

    def exact_pieces(self, queries: Queries) -> Scores:
        """As :meth:`exact_scores`, piece by piece: queries (a slice), ids (m,) and their scores.

        From the store's factors where these are exact, else through the model, which is locked until the last piece.

        Raises:
            StoreChangedError: meanwhile rows were removed, or became other ones, so that the pieces to come would not
                fit those that came; that shards were compacted does not matter.
        """
        yield from self._comparison.pieces(self.store, queries)


@contextmanager
def _computing(engine: Engine) -> Iterator[Engine]:
    """The engine, for this thread alone."""
    # The random state is saved once the lock is held: saved before, another thread's would be restored later.
    with engine, preserved_random_state():
        yield engine


def load(
    task: Task,
    folder: str | os.PathLike[str],
    *,
    device: str | None = None,
    use_index: bool = True,
    one_at_a_time: bool | None = None,
    warm: bool = False,
    geometry: QueryGeometry = "tracin",
    damping: float | None = None,
    iterations: int | None = None,
) -> Retriever:
    """Open a store for queries.

    Args:
        task: the task that it was built from.
        folder: what :func:`build` filled.
        device: where to compute and to search, such as ``"cuda"``; by default where the model is, and the CPU searches.
        use_index: whether an index is used, where there is one; else all rows are compared.
        one_at_a_time: whether to hold the weights of one checkpoint at a time; by default if not all fit into memory.
        warm: whether to get ready for queries in the background, see :meth:`Retriever.warm`.
        geometry: by which inner product queries are compared. ``"tracin"``: as the store's rows were made,
            scores say by how much a step on an example lowers a loss. ``"whitened"``: the query's row is turned by the
            inverse second moment of all rows at each checkpoint, which predicts better what a model does that is
            trained without an example; the scores are inner products of rows and have no unit. It takes the second
            moments that ``gradindex whiten`` makes. ``"whitened-exact"``: the same with whole gradients, from stored
            factors; whitened rows propose candidates, whose exact scores settle the order.
        damping: of whitened geometries, what is added to the second moment, as a share of its trace; by default 3e-4.
        iterations: of ``"whitened-exact"``, steps of conjugate gradients for each query; by default 5. Each is a pass
            over all stored factors that up to 64 queries share.

    Raises:
        ArgumentError: ``damping`` or ``iterations`` is out of range, or decides nothing.
        StoreError: missing, damaged or not complete; or it lacks what the geometry is made of.
        MismatchError: the task is not the store's; says what differs.
    """
    task, folder = in_order(task, folder, Task, "load(task, folder)")
    retriever = asked_again(
        lambda: Retriever(task, GradientStore(folder), device, use_index, one_at_a_time, geometry, damping, iterations)
    )
    if warm:
        asked_again(retriever.warm)
    return retriever
