"""Answers of Captum beside ours on the same 50,000 CIFAR-10 rows: the last layer with its bias, three checkpoints.

The model is that layer on the network's features, so that the network's forward pass, the same for all, is not timed.
TracInCPFast computes every score; TracInCPFastRandProj proposes by its Annoy index alone, as it is meant to be used.
Needs the libraries of peers.txt, best in an environment of their own (see peers.py); the quick form leaves out what is
not installed, and takes 1,000 coloured digits.

    peers/bin/python scripts/bench/search_peers.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Bench
from numpy.typing import NDArray
from stores import store_of, task_of
from torch import nn
from torch.utils.data import TensorDataset

import gradindex
from gradindex import evaluation
from gradindex.evaluation import recall_at_k
from gradindex.retrieval.asking import Queries

K, DIM = 100, 1024
PEERS = ("captum", "annoy")


def main() -> None:
    """Measure and print."""
    bench = Bench("Answers against Captum: CIFAR-10, last layer", __doc__, packages=PEERS)
    present = bench.installed(PEERS)
    n, n_query = (1000, 10) if bench.quick else (50_000, 50)
    task = task_of("augmented", n)
    store = store_of("augmented", n)
    queries = range(n_query)
    retriever = gradindex.load(task, store.folder)
    truth = retriever.exact_scores(queries)

    def ours(positions: range, kind: str) -> NDArray[np.int64]:
        return retriever.search(positions, K, kind=kind).ids

    evaluation.index(store.folder, recall=0.995, k=K, retriever=gradindex.load(task, store.folder, use_index=False))
    print(retriever.search_note)
    measure(bench, "gradindex, with the queries' gradients", ours, truth, queries)
    if present != list(PEERS):  # Captum's projected form needs Annoy
        bench.finish()
        return
    peers = captum(task)
    for name, made in peers.items():
        measure(bench, name, made, truth, queries)
    name, fast = next(iter(peers.items()))
    bare = without_bias(store, retriever.prepare(queries))
    for kind, signed in (("proponents", bare), ("opponents", -bare)):
        recall = float(recall_at_k(signed, fast(queries, kind), K).mean())
        bench.figure(f"{name}: recall@{K} against scores without the bias, {kind}", recall, "share")
    bench.finish()


Answer = Callable[[range, str], NDArray[np.int64]]


def measure(bench: Bench, name: str, answer: Answer, truth: NDArray[Any], queries: range) -> None:
    """Recall of both kinds and milliseconds a query, all at once and one at a time."""
    for kind, signed in (("proponents", truth), ("opponents", -truth)):
        started = time.perf_counter()
        ids = answer(queries, kind)
        taken = time.perf_counter() - started
        bench.figure(f"{name}: recall@{K}, {kind}", float(recall_at_k(signed, ids, K).mean()), "share")
        bench.figure(f"{name}: {len(queries)} at once, {kind}", 1000 * taken / len(queries), "ms a query")
    seconds = []
    for position in queries[:5]:
        started = time.perf_counter()
        answer(range(position, position + 1), "proponents")
        seconds.append(time.perf_counter() - started)
    bench.figure(f"{name}: one at a time", 1000 * float(np.median(seconds)), "ms a query")


def without_bias(store: gradindex.GradientStore, queries: Queries) -> NDArray[np.float32]:
    """(n_query, n_train) TracInCP of the layer's weights alone."""
    assert queries.factors is not None
    total = np.zeros((len(queries), store.n_train), dtype=np.float32)
    for key, (x, delta) in store.factors(store.ids).items():
        asked_x, asked_delta = queries.factors[key]
        total += (asked_x[:, :-1] @ x[:, :-1].T) * (asked_delta @ delta.T)  # the last input is the bias's
    return total


def captum(task: gradindex.Task) -> dict[str, Answer]:
    """Captum's two forms, made ready; making the second's index is not timed here."""
    from captum.influence import TracInCPFast, TracInCPFastRandProj
    from captum.influence._core.tracincp_fast_rand_proj import AnnoyNearestNeighbors

    features = torch.stack([task.train[i][0] for i in range(task.n_train)])
    labels = torch.tensor([int(task.train[i][1]) for i in range(task.n_train)])
    asked = torch.stack([task.query[i][0] for i in range(100)])  # type: ignore[index]  # the task has queries
    asked_labels = torch.tensor([int(task.query[i][1]) for i in range(100)])  # type: ignore[index]

    def load(model: nn.Module, path: str) -> float:
        (checkpoint,) = [each for each in task.checkpoints if str(each.path) == path]
        model.load_state_dict(checkpoint.load(model))
        return float(checkpoint.learning_rates(["layer.weight"])["layer.weight"])

    common = {
        "model": task.model, "final_fc_layer": "layer", "train_dataset": TensorDataset(features, labels),
        "checkpoints": [str(each.path) for each in task.checkpoints], "checkpoints_load_func": load,
        "loss_fn": nn.CrossEntropyLoss(reduction="sum"), "batch_size": 1000,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = TracInCPFast(**common)
        started = time.perf_counter()
        projected = TracInCPFastRandProj(
            **common, nearest_neighbors=AnnoyNearestNeighbors(num_trees=10), projection_dim=DIM, seed=0
        )
        print(f"TracInCPFastRandProj is ready after {time.perf_counter() - started:.0f} s", flush=True)

    def answer(method: Any) -> Answer:
        def run(queries: range, kind: str) -> NDArray[np.int64]:
            some = slice(queries.start, queries.stop)
            inputs = (asked[some], asked_labels[some])
            found = method.influence(inputs, k=K, proponents=kind == "proponents")
            return np.asarray(found.indices)

        return run

    return {"Captum TracInCPFast": answer(exact), f"Captum TracInCPFastRandProj, {DIM}, Annoy": answer(projected)}


if __name__ == "__main__":
    main()
