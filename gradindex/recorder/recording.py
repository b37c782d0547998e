"""Saves checkpoints, with the step sizes that TracIn needs, from a user's own training loop."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, CheckpointError, GradIndexError
from ..files import replacing
from .counting import StepCounter, Steps
from .folders import check_sharding, remove, remove_unfinished, save_together, written_in
from .optimizers import held_by, listened_to, rate_of
from .records import MODEL_KEY, MOMENTS_KEY, RECORD_KEY
from .weights import from_all, is_flat, shards_of, weights_of, whole, without_wrappers, writes_here

# As torch.nn.utils.clip_grad_norm_ divides.
_CLIPPING_EPSILON = 1e-6


class Recorder:
    """Record checkpoints and learning rates while a model trains.

    Three lines in a training loop::

        recorder = Recorder(model, optimizer, "checkpoints")
        for epoch in range(10):
            ...                      # the loop as it was: optimizer.step(), scheduler.step()
            recorder.save()

    Each call of ``save`` writes ``step_<n>.pt`` with the model's ``state_dict`` and, for each
    parameter that the optimizer holds, its learning rate at its latest step, the sum of its rates
    and the number of its steps since the previous ``save``, and its group's other settings (momentum, weight decay,
    betas). The rates are read when the optimizer
    steps, so any scheduler (or none) is followed; steps that a gradient scaler skips do not count,
    and neither do steps of parameters without a gradient (frozen or unused). Where gradients are accumulated over
    several batches, a step is the optimizer's.

    Processes that train together (DistributedDataParallel, ``fully_shard``, FullyShardedDataParallel with
    ``use_orig_params=True``) each make a Recorder and all call ``save``; the first one writes whole weights, or with
    ``sharded=True`` each writes its own.

    For ``torch.optim.SGD`` a checkpoint also holds what ``weighting="effective"`` weighs by: the sum over the steps of
    the learning rate times the share of gradients in the step. That is 1 without momentum, grows to 1 / (1 - mu) with
    it, and is smaller where gradients were clipped, see :meth:`clipped`.

    Source: Pruthi et al. 2020 (arXiv:2002.08484), section 3.3: eta_i is the step size
    between checkpoints i-1 and i.

    Args:
        model: the model in training, also inside DistributedDataParallel or ``torch.compile``: names
            are saved without the prefixes that these add.
        optimizer: its optimizer, also wrapped (as accelerate does), or a list of several: a step is
            counted when one of them steps that has stepped since the latest step was counted, so that
            two that step in turn count as one. Every parameter must belong to ``model``.
        directory: where to write checkpoints; created if missing.
        second_moments: also save Adam's bias-corrected second moments.
        first_step: the number of steps already taken, when a training run is resumed.
        overwrite: delete an earlier training's checkpoints (``step_*``) in ``directory`` (those after ``first_step``)
            instead of refusing to mix two trainings.
        only_trained: save the parameters that the optimizer holds and the buffers, and leave out the rest, such as the
            base of an adapter (LoRA), which then comes from the task's model: ``find_checkpoints(base="model")``.
        sharded: each process writes the weights that it holds, by ``torch.distributed.checkpoint``, into a folder
            ``step_<n>`` with the record beside them (``gradindex.json``), so that no process ever holds the whole
            model. ``directory`` must lie on a disk that all of them share. A folder appears when it is whole.
        clipping_unknown: gradients are clipped where :meth:`clipped` cannot be called, so record nothing for
            ``weighting="effective"``.

    Raises:
        ArgumentError: the folder holds another training's checkpoints, or the optimizer
            holds parameters that are not the model's, has no learning rate, or is none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        directory: str | os.PathLike[str],
        *,
        second_moments: bool = False,
        first_step: int = 0,
        overwrite: bool = False,
        only_trained: bool = False,
        sharded: bool = False,
        clipping_unknown: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model is a {type(model).__name__}, but must be the torch.nn.Module in training.")
        self._model = model
        self._optimizers = listened_to(optimizer, {id(parameter) for parameter in model.parameters()})
        self._check_that_all_are_the_models(ArgumentError)
        for one in self._optimizers:
            for group in one.param_groups:
                rate_of(one, group)
        if second_moments and is_flat(model):
            raise ArgumentError(
                "second_moments cannot be recorded of FullyShardedDataParallel, which flattens the optimizer's state. "
                "Shard the model with fully_shard (FSDP2), or leave them out."
            )
        self._directory = Path(directory)
        self._second_moments, self._only_trained, self._sharded = second_moments, only_trained, sharded
        if sharded:
            check_sharding()
        # What was ever trained stays in a checkpoint of what is trained, also when the optimizer lets go of it.
        self._trained: dict[int, Tensor] = {}
        if writes_here():
            self._clear_directory(first_step, overwrite)
        self._counter = StepCounter(self._optimizers, first_step)
        self._counter.clipping_unknown = clipping_unknown

    def _clear_directory(self, first_step: int, overwrite: bool) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        written = [*self._directory.glob("step_*.pt"), *written_in(self._directory)]
        earlier = [path for path in written if first_step == 0 or _step_of(path) > first_step]
        if earlier and not overwrite:
            raise ArgumentError(
                f"{self._directory} already holds {len(earlier)} checkpoints of another training. "
                "If this run resumes that training, pass first_step=; otherwise choose another folder, or pass "
                "overwrite=True to delete them."
            )
        for path in earlier:
            remove(path)
        remove_unfinished(self._directory)

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        return self._counter.step

    @property
    def saved(self) -> bool:
        """Whether no step was taken since the last ``save``."""
        return not self._counter.any_taken

    def clipped(self, norm: float | Tensor, max_norm: float, *, late: bool = False) -> None:
        """Tell that the gradients of the coming step were clipped, after ``clip_grad_norm_`` and before the step.

        An optimizer sees gradients after clipping, so nothing else tells the factor by which they shrank::

            recorder.clipped(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), 1.0)

        A checkpoint holds the mean of these factors, and ``weighting="effective"`` weighs by them. In a loop that
        clips and never calls this, effective weights are those of gradients that were not clipped.

        Args:
            norm: the norm before clipping, which ``clip_grad_norm_`` of torch, accelerate or Lightning's Fabric
                returns.
            max_norm: what it was clipped to.
            late: they were those of the latest step, which was taken already; before the next step and ``save``.

        Raises:
            ArgumentError: ``max_norm`` is not a positive number.
        """
        if not max_norm > 0:
            raise ArgumentError(f"max_norm is {max_norm}, but must be a positive number, as for clip_grad_norm_.")
        size = float(norm)
        # Infinite gradients are clipped to nothing, or are those of a step that a scaler skips.
        factor = min(1.0, max_norm / (size + _CLIPPING_EPSILON)) if math.isfinite(size) else 0.0
        if late:
            self._counter.was_clipped(factor)
        else:
            self._counter.clipped(factor)

    def lose_clipping(self) -> None:
        """Tell that gradients were clipped by a factor that is not known: from here on nothing is said of clipping."""
        self._counter.clipping_unknown = True

    def save(self, loss: float | None = None) -> Path:
        """Write a checkpoint of the current weights and return its path.

        Args:
            loss: the training loss, such as its mean over the epoch, which
                ``gradindex.checkpoint.by_loss_drop`` chooses checkpoints by.

        Raises:
            ArgumentError: the loss is not finite.
            CheckpointError: no optimizer step was taken since the last ``save``, second moments
                were asked for and the optimizer has none, or it holds parameters by now that are
                not the model's.
        """
        if loss is not None and not math.isfinite(loss):
            raise ArgumentError(
                f"loss is {loss} at step {self.step}, but must be finite. Omit it, or check why training diverged."
            )
        self._check_that_all_are_the_models(CheckpointError)
        if self.saved:
            raise CheckpointError(
                f"No optimizer step was taken before Recorder.save() at step {self.step}, so there is no "
                "learning rate to record. Call save() after optimizer.step(); an optimizer that was made later needs "
                "a Recorder of its own, with first_step=."
            )
        record: dict[str, Any] = {"version": 1, "step": self.step, "groups": self._groups()}
        if loss is not None:
            record["loss"] = float(loss)
        if self._only_trained:
            record["only_trained"] = True
        for one in self._optimizers:
            self._trained |= {id(parameter): parameter for parameter in held_by(one)}
        self._trained |= {id(parameter): parameter for parameter in self._counter.stepped()}
        trained = self._trained if self._only_trained else None
        path = self._directory / f"step_{self.step:08d}{'' if self._sharded else '.pt'}"
        if self._sharded:
            content = {MODEL_KEY: shards_of(self._model, trained)}
            if self._second_moments:
                content[MOMENTS_KEY] = self._read_second_moments()
            save_together(path, content, record)
        else:
            if self._second_moments:
                record[MOMENTS_KEY] = self._read_second_moments()
            state = weights_of(self._model, trained)
            if writes_here():
                with replacing(path) as temporary:
                    torch.save({MODEL_KEY: state, RECORD_KEY: record}, temporary)
        self._counter.clear()
        return path

    def _names(self) -> dict[int, str]:
        """Names by the ids of parameters, as they are now: layers may have been added."""
        strip = without_wrappers(self._model)
        return {id(parameter): strip(name) for name, parameter in self._model.named_parameters()}

    def _check_that_all_are_the_models(self, error: type[GradIndexError]) -> None:
        own = {id(parameter) for parameter in self._model.parameters()}
        foreign = sum(id(parameter) not in own for one in self._optimizers for parameter in held_by(one))
        if foreign:
            raise error(
                f"The optimizer holds {foreign} parameters that are not the model's. "
                "Give Recorder the same model that the optimizer was made from (one module that holds all of them, or "
                "a Recorder for each model); an optimizer of copies in another precision cannot be recorded."
            )

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters with the same steps in the same group of an optimizer, together."""
        groups = self._counter.groups(self._names())
        elsewhere: dict[str, Steps] = {}
        if is_flat(self._model):  # only a process that holds some of a parameter knows whether it had a gradient
            for theirs in from_all(groups):
                elsewhere |= {name: steps for _, members in theirs for name, steps, here in members if here}
        found = []
        for settings, members in groups:
            alike: dict[Steps, list[str]] = {}
            for name, steps, _ in members:
                alike.setdefault(elsewhere.get(name, steps), []).append(name)
            found += [self._group(settings, steps, names) for steps, names in alike.items()]
        return found

    def _group(self, settings: Mapping[str, Any], steps: Steps, names: list[str]) -> dict[str, Any]:
        group = {
            "parameters": names,
            "learning_rate": steps.rate,
            "learning_rate_sum": steps.total,
            "steps": steps.taken,
        }
        group |= {name: settings[name] for name in ("optimizer", "settings") if name in settings}
        if self._counter.clipping_told and steps.taken and not self._counter.clipping_unknown:
            group["clipping_factor"] = steps.factors / steps.taken
        if settings.get("effective") and not self._counter.clipping_unknown:
            group["effective_sum"] = steps.effective
        return group

    def _read_second_moments(self) -> dict[str, Tensor]:
        """Adam's v / (1 - beta2^t) by parameter name, of parameters that took steps; where shards are saved, theirs."""
        names, moments, stepped = self._names(), dict[str, Tensor](), self._counter.stepped()
        for one in self._optimizers:
            for group in one.param_groups:
                for parameter in group["params"]:
                    state = one.state.get(parameter, {})
                    if not state and parameter not in stepped:
                        continue
                    # Where the count of steps is kept, by Adam, fused Adam, and Adam without a schedule.
                    taken = state.get("step", group.get("step", group.get("k")))
                    if "exp_avg_sq" not in state or taken is None or len(group.get("betas", ())) != 2:
                        raise CheckpointError(
                            f"{type(one).__name__} keeps no second moments (exp_avg_sq) for "
                            f"{names[id(parameter)]}. Use an optimizer of the Adam family, or second_moments=False."
                        )
                    correction = 1.0 - float(group["betas"][1]) ** float(taken)
                    v = state["exp_avg_sq"].detach()
                    moments[names[id(parameter)]] = v / correction if self._sharded else (whole(v) / correction).cpu()
        return moments

    def state_dict(self) -> dict[str, Any]:
        """What was counted since the last ``save``, for a training that is resumed; JSON can hold it."""
        return self._counter.state_dict(self._names())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where :meth:`state_dict` was taken; make the Recorder with ``first_step=state["step"]``."""
        self._counter.load_state_dict(state, self._names())

    def close(self) -> None:
        """Stop listening to the optimizer."""
        self._counter.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdigit() else 0
