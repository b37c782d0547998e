"""A store and queries with columns, and what brute force answers."""

import numpy as np
import toys

import gradindex
from gradindex.index import CompactIndex, Shape
from gradindex.projection import Projection
from gradindex.retrieval.candidates import INDEX_FOLDER

N, M = 300, 6

NAMES = ["cat", "dog", "emu"]

COLUMNS = {
    "label": [NAMES[i % 3] for i in range(N)],
    "number": np.arange(N, dtype=np.int32) % 7,
    "rate": (np.arange(N) % 4 / 10).astype(np.float32),
    "flipped": np.arange(N) % 5 == 0,
}

QUERY_COLUMNS = {"label": ["cat", "emu", "cow", "cat", "dog", "emu"], "extra": list(range(M))}

KINDS = {"proponents": lambda s: s, "opponents": lambda s: -s, "absolute": np.abs}


def make(folder, *, index=False, **options):
    (folder / "task").mkdir(exist_ok=True, parents=True)
    task = toys.make_task(folder / "task", n_train=N, n_query=M, columns=COLUMNS, query_columns=QUERY_COLUMNS)
    options = {"projection": Projection(dim=24), "batch_size": 32, "shard_rows": 70} | options
    store = gradindex.build(task, folder / "store", **options)
    if index:
        save_index(store)
    return gradindex.load(task, folder / "store")


def save_index(store, proposals=40, dim=6):
    made = CompactIndex.build(Shape("flat", dim), store.rows(store.ids), store.blocks)
    recall = {"k": 10, "proponents_at_least": 0.9, "opponents_at_least": 0.9, "against": "a test"}
    about = {"map": store.manifest.fingerprint, "ids": store.id_runs.tolist(), "covers": store.origins} | {
        "recall": recall
    }
    made.save(store.folder / INDEX_FOLDER, about | {"effort": {"probes": 1, "proposals": proposals}})


def ordered(kind, scores, allowed=None, k=None, at_least=None):
    """Ids of one query by brute force: strength descending, then id ascending."""
    keys = KINDS[kind](scores)
    ids = [i for i in np.lexsort((np.arange(len(keys)), -keys)) if allowed is None or allowed[i]]
    return [i for i in ids if at_least is None or keys[i] >= at_least][:k]


def agree(hits, kind, scores, rtol=1e-4, **wanted):
    for query in range(len(hits.queries)):
        ids, mine = hits.of(query)
        allowed = wanted.get("allowed")
        rest = wanted | {"allowed": allowed[query] if allowed is not None and np.ndim(allowed) == 2 else allowed}
        assert ids.tolist() == ordered(kind, scores[query], **rest)
        np.testing.assert_allclose(mine, scores[query][ids], rtol=rtol, atol=rtol * np.abs(scores).max())


def way(hits):
    return [(stage.name, stage.rows) for stage in hits.stages]
