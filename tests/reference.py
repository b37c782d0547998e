"""The naive float64 reference: plain autograd, one example and one checkpoint at a time."""

from dataclasses import replace

import numpy as np
import torch
import toys

import gradindex
from gradindex.gradients import Engine, check_routes
from gradindex.projection import Projection
from gradindex.tree import map_tensors


def gradients(task, items, role="train", prefixes=("",)):
    """(n, checkpoints, parameters) gradients of the parameters whose names start with a prefix, unscaled."""
    model = task.model.double()
    states = [checkpoint.load(model) for checkpoint in task.checkpoints]
    training, rows = model.training, []
    model.eval()
    for item in items:
        per_checkpoint = []
        for state in states:
            model.load_state_dict(state)
            model.zero_grad()
            task.loss_for(role)(model, double(task.collate([item]))).sum().backward()
            chosen = [p for name, p in model.named_parameters() if name.startswith(prefixes)]
            per_checkpoint.append(
                torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).flatten() for p in chosen])
            )
        rows.append(torch.stack(per_checkpoint))
    model.train(training)
    return torch.stack(rows)


def scores(task, queries, train, rates):
    """TracInCP (n_query, n_train) and the product of the norms that its error is measured against.

    Args:
        queries: (n_query, checkpoints, parameters); ``train`` likewise.
        rates: (checkpoints,) or (checkpoints, parameters) learning rates.
    """
    eta = torch.as_tensor(rates, dtype=torch.float64)
    eta = eta[:, None] if eta.ndim == 1 else eta
    norms = [(eta * g.square()).sum((1, 2)).sqrt() for g in (queries, train)]
    return torch.einsum("qcp,ncp->qn", eta * queries, train).numpy(), torch.outer(*norms).numpy()


def double(batch):
    return map_tensors(batch, lambda x: x.double() if x.is_floating_point() else x)


def check_against_autograd(task, rates=toys.RATES, prefixes=("",)):
    """Exact scores against the reference; returns the routes that were taken."""
    train = gradients(task, task.train, prefixes=prefixes)
    queries = gradients(task, task.query, "query", prefixes)
    truth, scale = scores(task, queries, train, rates)
    found = gradindex.exact_scores(task, list(task.query), precision="float64", batch_size=5)
    assert np.all(np.abs(found - truth) <= 1e-10 * scale)
    with Engine(task, "float64") as engine:
        check_routes(engine)
        return {layer.name: layer.route for layer in engine.layers}


def check_scores(task, rates, n=8, prefixes=("",)):
    """Scores of two queries and ``n`` training examples: within 1e-6 of each, and 1e-10 of the product of the norms.

    Args:
        rates: for each checkpoint, a number or (parameters,) numbers; not read from what gradindex recorded.
    """
    few = replace(
        task, train=[task.train[i] for i in range(n)], query=[task.query[i] for i in range(2)], columns={},
        query_columns={},
    )  # fmt: skip
    of_queries, of_train = gradients(few, few.query, "query", prefixes), gradients(few, few.train, "train", prefixes)
    truth, scale = scores(few, of_queries, of_train, rates)
    found = gradindex.exact_scores(few, list(few.query), precision="float64")
    assert np.abs(truth).min() > 0
    np.testing.assert_array_less(np.abs(found - truth), 1e-10 * scale)
    np.testing.assert_allclose(found, truth, rtol=1e-6)


def check_everything(task, folder):
    """Exact scores as autograd has them; rows, self-influence and shares that agree; returns the routes."""
    routes = check_against_autograd(task)
    store = gradindex.build(task, folder / "store", projection=Projection("none"), batch_size=5)
    rows, exact = store.rows(np.arange(12)), gradindex.exact_scores(task, list(task.train)[:2], role="train")
    scale = np.abs(exact).max()
    np.testing.assert_allclose(rows[:2] @ rows.T, exact, atol=1e-4 * scale)
    np.testing.assert_allclose(store.self_influence().sum(1), np.square(rows).sum(1), rtol=1e-4)
    shares = gradindex.load(task, store.folder).explain([0, 1], range(12), source="train")
    np.testing.assert_allclose(shares.scores.sum((2, 3)), exact, atol=1e-4 * scale)
    return routes
