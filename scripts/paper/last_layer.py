"""The last, fully connected layer of a classifier: influence functions and representer points, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from gradindex import Task

REPRESENTER_DECAY = 0.003  # lambda of Yeh et al. 2018's own experiments


@dataclass(frozen=True)
class LastLayer:
    """What the layer sees and answers at one checkpoint.

    Args:
        inputs: (n, d + 1) with a 1 for the bias.
        probabilities: (n, classes).
        labels: (n,).
    """

    inputs: Tensor
    probabilities: Tensor
    labels: Tensor

    @classmethod
    def of(cls, task: Task, data: Dataset[Any]) -> LastLayer:
        """Run the model over a data set at the last checkpoint."""
        model = task.model.eval()
        model.load_state_dict(task.checkpoints[-1].load(model))
        layer = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        seen, answered, labels = [], [], []
        handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            for images, some in DataLoader(data, 250):
                answered.append(model(images).softmax(1))
                labels.append(some)
        handle.remove()
        return cls(functional.pad(torch.cat(seen), (0, 1), value=1.0), torch.cat(answered), torch.cat(labels))

    @property
    def deltas(self) -> Tensor:
        """(n, classes) gradient of cross-entropy with respect to the layer's output."""
        return self.probabilities - functional.one_hot(self.labels, self.probabilities.shape[1])

    def hessian(self) -> Tensor:
        """(classes (d + 1), classes (d + 1)) of the mean loss, 1/n sum (diag(p) - p p^T) x [x, 1] [x, 1]^T."""
        n, classes, size = len(self.inputs), self.probabilities.shape[1], self.inputs.shape[1]
        whole = torch.empty(classes, size, classes, size)
        for a in range(classes):
            for b in range(a + 1):
                weights = self.probabilities[:, a] * (float(a == b) - self.probabilities[:, b])
                block = (self.inputs * weights[:, None]).T @ self.inputs / n
                whole[a, :, b], whole[b, :, a] = block, block.T
        return whole.reshape(classes * size, classes * size)

    def whitened(self, hessian: Tensor, damping: float) -> Tensor:
        """(classes (d + 1), n) L^-1 g with H + damping (mean eigenvalue of H) = L L^T.

        So g'^T (H + ...)^-1 g, the influence function of Koh and Liang 2017 (arXiv:1703.04730), is a product of
        two columns; it is signed as TracIn is: positive = more weight for one lowers the other's loss.
        """
        damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
        gradients = (self.deltas[:, :, None] * self.inputs[:, None]).flatten(1)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(damped), gradients.T, upper=False)

    def representer_values(self) -> NDArray[np.float64]:
        """(n,) alpha_iy |x_i|^2, the part of an example in the network's own answer for its label.

        The layer is trained again on its inputs, with weight decay and to a stationary point, as the representer
        theorem needs: then its weights are sum_i alpha_i x_i^T with alpha_i = -delta_i / (2 lambda n).
        Source: Yeh et al. 2018 (arXiv:1811.09720), equations 3 and 4.
        """
        n, classes = self.probabilities.shape
        weights = torch.zeros(classes, self.inputs.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(self.inputs @ weights.T, self.labels)
            loss = loss + REPRESENTER_DECAY * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            own = (self.inputs @ weights.T).softmax(1)[torch.arange(n), self.labels]
            values = (1 - own).double() / (2 * REPRESENTER_DECAY * n) * self.inputs.double().square().sum(1)
        return np.asarray(values.numpy(), dtype=np.float64)
