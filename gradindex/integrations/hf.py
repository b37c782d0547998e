"""Recording for transformers' ``Trainer`` and those made from it, such as TRL's ``SFTTrainer``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import DependencyError
from ..progress import note
from .session import Schedule, Session

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    from .hf_task import task as task
except ImportError as error:
    raise DependencyError(
        f"gradindex.integrations.hf needs transformers ({error}). Install it: pip install 'transformers[torch]'."
    ) from error


class RecorderCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # types of transformers are not read
    """Record checkpoints and learning rates while a ``Trainer`` trains.

    One more callback::

        trainer = Trainer(..., callbacks=[RecorderCallback("checkpoints")])
        trainer.train()

    It writes what :class:`gradindex.Recorder` writes, at chosen optimizer steps: a step is one of the optimizer,
    however many batches it takes, and steps that a gradient scaler skips do not count. With ``resume_from_checkpoint``
    it goes on counting where the trainer's checkpoint was saved; checkpoints from behind that step are replaced. Where
    several processes train together (DistributedDataParallel, FSDP), the first one writes.

    Give at most one of ``every``, ``at`` and ``count``.

    ``Trainer`` clips gradients to ``max_grad_norm``, 1 by default, and tells their norm before that only in its log. So
    ``weighting="effective"`` and the factors of clipping, ``min(1, max_grad_norm / (norm + 1e-6))``, need every step to
    be logged (``logging_steps=1``), or ``max_grad_norm=0``. The log comes after the step: a checkpoint that is due is
    saved when its log has come. Once a step had none, nothing more is recorded of clipping. DeepSpeed clips by itself
    and tells nothing.

    Args:
        directory: where to write checkpoints; created if missing.
        every: save so many optimizer steps apart, and at the end.
        at: save after these steps.
        count: save so many, at the ends of equal spans of the training. By default 10.
        only_trained: see :class:`gradindex.Recorder`; for adapters (PEFT).
        sharded: see :class:`gradindex.Recorder`.
        second_moments: see :class:`gradindex.Recorder`.
        overwrite: see :class:`gradindex.Recorder`.

    Raises:
        DependencyError: transformers is not installed (when this module is imported).
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
        # What an earlier run had counted: set by the trainer when it restores callbacks itself.
        self.counted: dict[str, Any] | None = None
        # Whether logs tell the factors of clipping, up to which step they did, and whether a checkpoint waits for one.
        self._logs_tell, self._told, self._waiting = False, 0, False

    def state(self) -> dict[str, Any]:
        """What the trainer keeps in its own checkpoints."""
        return {"args": self._session.arguments(), "attributes": {"counted": self._session.state()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Start to listen to the optimizer."""
        resumed = state.global_step > 0
        each = args.logging_strategy == "steps" and state.logging_steps == 1 and not getattr(args, "deepspeed", None)
        self._logs_tell, self._waiting = bool(args.max_grad_norm) and each, False
        self._session.begin(
            objects["model"],
            objects["optimizer"],
            total=state.max_steps,
            taken=state.global_step,
            state=(self.counted or self._counted(state.stateful_callbacks)) if resumed else None,
            clipping_unknown=bool(args.max_grad_norm) and not self._logs_tell,
        )
        self._told = self._session.recorder.step if self._session.recorder is not None else 0

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Save where it is due, or when the step's log has come."""
        if self._session.due():
            self._waiting = True
            if not (self._logs_tell and control.should_log):
                self._settle()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **objects: Any) -> None:
        """Take the norm of the latest step's gradients before clipping."""
        recorder, norm = self._session.recorder, (logs or {}).get("grad_norm")
        if self._logs_tell and recorder is not None and norm is not None:
            if recorder.step == self._told + 1:  # a gradient scaler skips steps, which are logged all the same
                recorder.clipped(float(norm), args.max_grad_norm, late=True)
                self._told = recorder.step
            self._settle()

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Save what waited for a log in vain."""
        self._settle()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """The same."""
        self._settle()

    def _settle(self) -> None:
        """Save what waits. Once a step had no log, nothing more is said of clipping."""
        recorder = self._session.recorder
        if recorder is None:
            return
        if self._logs_tell and recorder.step > self._told:
            recorder.lose_clipping()
            self._logs_tell = False
        if self._waiting:
            self._waiting = False
            recorder.save()

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Save the end of the training, unless the model is no longer the one that was trained last."""
        replaced = args.load_best_model_at_end and state.best_model_checkpoint is not None
        recorder = self._session.recorder
        if replaced and recorder is not None and not recorder.saved:
            note(
                f"The steps up to {recorder.step} have no checkpoint of their own in {self._session.directory}: the "
                "trainer has loaded its best model (load_best_model_at_end)."
            )
        self._session.end(save=not replaced)

    def _counted(self, stored: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What this callback had counted, in the state of a trainer's checkpoint, which appends at each save."""
        entries = (stored or {}).get(type(self).__name__) or []
        for entry in reversed(entries if isinstance(entries, list) else [entries]):
            if entry["args"]["directory"] == self._session.directory:
                counted: dict[str, Any] | None = entry["attributes"]["counted"]
                return counted
        return None
