"""Recording for Lightning's ``Trainer``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DependencyError
from .session import Schedule, Session

try:
    from lightning.pytorch import Callback, LightningModule
except ImportError:
    try:  # the same by its older name
        from pytorch_lightning import Callback, LightningModule
    except ImportError as error:
        raise DependencyError(
            f"gradindex.integrations.lightning needs lightning ({error}). Install it: pip install lightning."
        ) from error


class RecorderCallback(Callback):  # type: ignore[misc]  # types of Lightning are not read
    """Record checkpoints, learning rates and the training loss while a Lightning ``Trainer`` trains.

    One more callback::

        trainer = Trainer(..., callbacks=[RecorderCallback("checkpoints")])
        trainer.fit(module, loader)

    It writes what :class:`gradindex.Recorder` writes, at chosen optimizer steps: a step is one of the optimizer,
    however many batches it takes, and steps that a gradient scaler skips do not count. The loss is the mean of what
    ``training_step`` returned since the previous checkpoint. With ``ckpt_path`` it goes on counting where that
    checkpoint was saved; checkpoints from behind that step are replaced. Where several processes train together, the
    first one writes.

    Give at most one of ``every``, ``at`` and ``count``. Names are those of the LightningModule; a task takes it as
    its model, or a part of it.

    Clipping by norm (``gradient_clip_val``) is recorded for ``weighting="effective"``. Clipping by value, in
    ``configure_gradient_clipping``, under manual optimization or of shards is not observed, and nothing is recorded for
    that weighting.

    Args:
        directory: where to write checkpoints; created if missing.
        every: save so many optimizer steps apart, and at the end.
        at: save after these steps.
        count: save so many, at the ends of equal spans of the training. By default 10.
        only_trained: see :class:`gradindex.Recorder`; for adapters.
        sharded: see :class:`gradindex.Recorder`.
        second_moments: see :class:`gradindex.Recorder`.
        overwrite: see :class:`gradindex.Recorder`.

    Raises:
        DependencyError: lightning is not installed (when this module is imported).
        ArgumentError: a schedule that cannot be, or as for :class:`gradindex.Recorder` when training begins.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int | None = None,
        at: Iterable[int] | None = None,
        count: int | None = None,
        only_trained: bool = False,
        sharded: bool = False,
        second_moments: bool = False,
        overwrite: bool = False,
    ) -> None:
        self._session = Session(
            directory,
            Schedule(every, at, count),
            only_trained=only_trained,
            sharded=sharded,
            second_moments=second_moments,
            overwrite=overwrite,
        )
        self._counted: Mapping[str, Any] | None = None
        self._max_norm: float | None = None
        self._loss, self._batches = 0.0, 0

    @property
    def state_key(self) -> str:
        """Callbacks for several folders are told apart."""
        return f"RecorderCallback({self._session.directory!r})"

    def state_dict(self) -> dict[str, Any]:
        """What the trainer keeps in its own checkpoints."""
        return {"counted": self._session.state(), "loss": self._loss, "batches": self._batches}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Called by the trainer when it resumes."""
        self._counted = state_dict["counted"]
        self._loss, self._batches = state_dict["loss"], state_dict["batches"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to listen to the optimizers."""
        resumed = trainer.global_step > 0
        if not resumed:
            self._loss, self._batches = 0.0, 0
        self._max_norm, unknown = _clipping(trainer, pl_module)
        self._session.begin(
            pl_module,
            trainer.optimizers,
            total=trainer.estimated_stepping_batches,
            taken=trainer.global_step,
            state=self._counted if resumed else None,
            clipping_unknown=unknown,
        )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Measure gradients that are about to be clipped, unscaled already."""
        if self._max_norm is not None and self._session.recorder is not None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._session.recorder.clipped(_norm(gradients), self._max_norm)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where it is due."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning divides by the number of batches that a step takes.
            self._loss += float(loss) * trainer.accumulate_grad_batches
            self._batches += 1
        if self._session.due() and self._session.recorder is not None:
            self._session.recorder.save(self._mean_loss())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the end of the training."""
        self._session.end(self._mean_loss())

    def _mean_loss(self) -> float | None:
        """Of the batches since the previous checkpoint; nothing where there is none, or one diverged."""
        mean = self._loss / self._batches if self._batches else math.nan
        self._loss, self._batches = 0.0, 0
        return mean if math.isfinite(mean) else None


def _norm(gradients: Sequence[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32).cpu() for gradient in gradients]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _clipping(trainer: Any, module: Any) -> tuple[float | None, bool]:
    """The norm that gradients are clipped to, and whether they may be clipped in a way that is not observed."""
    own = type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
    if own or not module.automatic_optimization:
        return None, True
    if not trainer.gradient_clip_val:
        return None, False
    kind = trainer.gradient_clip_algorithm
    by_norm = kind is None or str(getattr(kind, "value", kind)) == "norm"
    sharded = any(hasattr(p, "full_tensor") for p in module.parameters()) or "FSDP" in type(trainer.strategy).__name__
    if not by_norm or sharded:
        return None, True
    return float(trainer.gradient_clip_val), False
