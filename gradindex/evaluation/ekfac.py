"""Influence by EK-FAC from a store's factors: the curvature that others use, to compare scores with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..choices import Source
from ..errors import ArgumentError, StoreError
from ..progress import progress
from ..retrieval.asking import Queries
from ..retrieval.curvature import EigenBases, StoredGradients
from ..retrieval.retriever import Retriever
from ..store import asked_again

# Queries whose directions are in memory together.
_TOGETHER = 64


def ekfac_scores(
    retriever: Retriever, queries: int | Sequence[Any] | Queries, *, damping: float = 0.1, source: Source = "query"
) -> NDArray[np.float64]:
    """Influence of all training examples of a store on each query, by EK-FAC at every checkpoint, added up.

        score(z, q) = sum_c sum_l <g_cl(z), (E_cl + lambda_cl I)^-1 g_cl(q)>

    with the gradient g_cl of layer l at checkpoint c, its second moment E_cl over the training examples in
    Kronecker-factored eigenbases with corrected eigenvalues (:class:`gradindex.retrieval.curvature.EigenBases`), and
    lambda_cl = damping times the mean of these eigenvalues. Learning rates cancel out. Everything comes from stored
    factors; there is no index, and no file is written.

    The gradients are those of the training labels (the empirical Fisher matrix), and not of labels that the model
    draws, as in the second source.

    Source: George et al. 2018 (arXiv:1806.03884); Grosse et al. 2023 (arXiv:2308.03296), section 3.1.

    Args:
        retriever: of a store that has factors, loaded with ``geometry="tracin"``.
        queries: as in :meth:`Retriever.search`.
        damping: positive.
        source: as in :meth:`Retriever.search`.

    Returns:
        (n_query, n_train) in the order of the store's ids, signed; positive = proponent.

    Raises:
        ArgumentError: ``damping`` is not positive, the geometry is another one, or the queries are a group.
        StoreError: the store has no factors.
    """
    if not damping > 0:
        raise ArgumentError(f"damping is {damping}, but must be a positive number, such as 0.1.")
    if retriever.geometry != "tracin":
        raise ArgumentError(f"The retriever asks by geometry={retriever.geometry!r}. Load it with geometry='tracin'.")
    if not retriever.store.has_factors:
        raise StoreError(
            f"{retriever.store.folder} has no factors, and EK-FAC is made of them. Build a store with "
            "factors='float32'."
        )
    asked = queries if isinstance(queries, Queries) else retriever.prepare(queries, source)
    if asked.vectors.formed or asked.factors is None:
        raise ArgumentError(
            "These queries are a group, or of another store. Prepare them one by one, without aggregate."
        )
    return asked_again(lambda: _scores(retriever, asked, damping))


def _scores(retriever: Retriever, queries: Queries, damping: float) -> NDArray[np.float64]:
    store, count = retriever.store, len(queries)
    assert queries.factors is not None
    scores = np.zeros((count, store.n_train))
    with progress("EK-FAC scores", store.n_checkpoints * count, "queries at a checkpoint") as advance:
        for checkpoint in range(store.n_checkpoints):
            gradients = StoredGradients(store, checkpoint)
            bases = EigenBases(gradients, np.full(store.n_train, 1 / store.n_train))
            solved = bases.inverse([damping * float(values.mean()) for values in bases.values])
            for start in range(0, count, _TOGETHER):
                which = slice(start, min(start + _TOGETHER, count))
                directions = solved(gradients.of_queries(queries.factors, which))
                for places, _, products in gradients.products(directions):
                    scores[which, places] += products
                advance(which.stop - start)
    return scores
