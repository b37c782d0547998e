"""The naive float64 reference: plain autograd, one example and one checkpoint at a time."""

import torch

from gradindex.tree import map_tensors


def gradients(task, items, role="train", prefixes=("",)):
    """(n, checkpoints, parameters) gradients of the parameters whose names start with a prefix, unscaled."""
    model = task.model.double()
    training, rows = model.training, []
    model.eval()
    for item in items:
        per_checkpoint = []
        for checkpoint in task.checkpoints:
            model.load_state_dict(checkpoint.load(model))
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
