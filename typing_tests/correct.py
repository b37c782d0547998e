"""What people write, which mypy must accept: types of results are stated, so that none of them is Any unnoticed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset
from typing_extensions import assert_type

import gradindex
from gradindex import BuildOptions, GradientStore, Hits, Question, Recorder, Retriever, Task, evaluation, growth, losses
from gradindex.building import build_part, estimate
from gradindex.errors import ArgumentError, GradIndexError
from gradindex.projection import Projection
from gradindex.retrieval.asking import Queries
from gradindex.retrieval.explanation import Explanation
from gradindex.retrieval.hits import Both
from gradindex.retrieval.tokens import TokenExplanation


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """(n,) losses of the examples of a batch."""
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def training(model: nn.Module) -> None:
    """Three lines in a training loop."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = Recorder(model, optimizer, "checkpoints", second_moments=True)
    recorder.clipped(nn.utils.clip_grad_norm_(model.parameters(), 1.0), 1.0)
    recorder.save()


def described(model: nn.Module, train: TensorDataset) -> Task:
    """A task from a folder of checkpoints."""
    checkpoints = gradindex.find_checkpoints("checkpoints")
    print(Task(model, losses.causal_lm("sum"), train, checkpoints, query_loss="predicted"))
    return Task(model=model, loss=loss, train=train, checkpoints=checkpoints)


def built(task: Task) -> GradientStore:
    """A store, with options by name."""
    build_part(task, "store", (1, 2), precision="bfloat16")
    print(estimate(task, Path("store"), projection=Projection("kronecker", 512), workers=2))
    store = gradindex.build(task, "store", precision="float32", row_type="float16", factors="float16", workers=2)
    assert_type(store, GradientStore)
    assert_type(gradindex.build(task, "store", options=BuildOptions(row_type="int8", unit_norm=True)), GradientStore)
    assert_type(gradindex.add(task, "store", workers=1), GradientStore)
    growth.add_checkpoint(task, "store")
    return store


def opened(task: Task) -> Retriever:
    """A store, ready for queries."""
    retriever = gradindex.load(task, Path("store"), use_index=False)
    assert_type(retriever, Retriever)
    return retriever


def asked(retriever: Retriever) -> Hits:
    """Questions of every kind."""
    hits = retriever.proponents(0, k=5)
    assert_type(hits, Hits)
    assert_type(retriever.opponents([0, 1], 3, rerank="rows"), Hits)
    assert_type(retriever.both(range(3), where={"label": "cat"}), Both)
    assert_type(retriever.search([0], kind="absolute", at_least=0.5, source="train", aggregate="mean"), Hits)
    queries = retriever.prepare([0, 1], aggregate="mean")
    assert_type(queries, Queries)
    question = Question(kind="opponents", k=5, rerank="rows")
    assert_type(Question.from_dict(question.to_dict()), Question)
    assert_type(retriever.answer(queries, question), Hits)
    assert_type(retriever.explain(0, hits.ids[0]), Explanation)
    assert_type(retriever.explain_tokens(0, hits.ids[0]), TokenExplanation)
    return hits


def answered(hits: Hits) -> NDArray[np.int64]:
    """Hits as a program reads them."""
    hits.save_html("page.html")
    return hits.ids


def judged(store: GradientStore, task: Task) -> None:
    """An index, and what goes wrong."""
    try:
        evaluation.index(store.folder, recall=0.9)
    except ArgumentError as error:
        print(error)
    except GradIndexError:
        raise
    gradindex.exact_scores(task, [0, 1])


def retrained(task: Task, train_model: Callable[[NDArray[np.int64], int], nn.Module]) -> evaluation.LDS:
    """Scores judged by retraining."""
    task = replace(task, train_model=train_model)
    assert_type(evaluation.judge(task, "store", "out", processes=2), evaluation.Judgement)
    truth = evaluation.retrain(task, "out", evaluation.random_subsets(100, 10, share=0.9), seeds=[0, 1])
    assert_type(truth, evaluation.GroundTruth)
    evaluation.retrain(task, "out", evaluation.all_but(task.train_ids, [[0, 1], [2]]), part=(1, 2))
    curve = evaluation.removal_curve(task, "out", {"mine": [3, 4, 5]}, [0], ks=[1, 3])
    assert_type(curve.change("mine", 3).low, float)
    return evaluation.lds(np.ones((1, 100)), truth.subsets, truth.mean_losses)
