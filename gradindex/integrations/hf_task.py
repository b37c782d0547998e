"""A task from what transformers' ``Trainer`` trained with."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.data.data_collator import DataCollatorForTokenClassification

from .. import losses
from ..checkpoint import find_checkpoints
from ..choices import Weighting
from ..errors import TaskError
from ..losses import PerExampleLoss
from ..losses.tokens import Reduction
from ..progress import note
from ..task import Loss, Task

# How the names of transformers' classes end, and the loss that such a model is trained with.
_LOSSES: dict[str, Callable[..., PerExampleLoss]] = {
    "ForSequenceClassification": losses.sequence_classification,
    "ForImageClassification": losses.sequence_classification,
    "ForAudioClassification": losses.sequence_classification,
    "ForTokenClassification": losses.token_classification,
    "ForMaskedLM": losses.masked_lm,
    "ForMultipleChoice": losses.multiple_choice,
    "ForCausalLM": losses.causal_lm,
    "LMHeadModel": losses.causal_lm,
}
# Of these, the ones that are sums over tokens.
_BY_TOKEN = (losses.token_classification, losses.masked_lm, losses.causal_lm)
# Trainers whose compute_loss is the loss above, and the loss_type that they have then.
_TRAINERS = {"Trainer": None, "SFTTrainer": "nll", "DPOTrainer": "sigmoid"}
# Of an example, what a person reads.
_TEXTS = ("text", "sentence", "content", "prompt", "question")


def task(
    trainer: Any,
    folder: str | os.PathLike[str],
    *,
    query: Any = None,
    loss: Loss | None = None,
    reduction: Reduction | None = None,
    layers: str | Sequence[str] | None = "trainable",
    learning_rate: Any = None,
    weighting: Weighting = "learning_rate",
    **options: Any,
) -> Task:
    """The task of a ``Trainer`` (or ``SFTTrainer``, ``DPOTrainer``) and the checkpoints that it or a callback wrote.

    Model, data, collator and the columns that the trainer drops are the trainer's. The loss is that which the model's
    class trains with, an example at a time; examples of a masked language model get masks that stay the same. Examples
    show as their text, and a column of labels is stored as ``label``. Texts are queries by way of the tokenizer.

    Where the loss is a sum over tokens, as of a language model, the trainer divides it by the labelled tokens of a
    whole batch, N. With t the tokens of an example and l(t) their losses, it minimises::

        L = 1/N * sum over examples of s_i,        s_i = sum over t of l(t)

    so the loss of an example is the sum s_i here (``reduction="sum"``): the gradient of a step is the sum of the
    examples' gradients times 1/N, which is the same for all of them. The mean s_i / T_i over an example's own T_i
    tokens would weigh short texts more than training did. It is what was minimised only where each batch held one
    example, and the default then. Of classifiers, an example's loss is its cross entropy, and N is the batch size.

    Args:
        trainer: after training, or made as for training.
        folder: of the run, or of :class:`~gradindex.integrations.hf.RecorderCallback`.
        query: the examples to ask about, by default the trainer's evaluation data.
        loss: where the trainer has a loss of its own; see :mod:`gradindex.losses`.
        reduction: of the losses of an example's tokens: ``"sum"``, ``"mean"``, or by default what the trainer
            minimised. A line on standard error says which.
        layers: ``"trainable"`` for the parameters that were trained, or as for :class:`~gradindex.Task`.
        learning_rate: see :func:`~gradindex.find_checkpoints`; by default what was logged or recorded.
        weighting: see :func:`~gradindex.find_checkpoints`.
        **options: further arguments of :class:`~gradindex.Task`, such as ``name`` or ``show``.

    Raises:
        TaskError: the loss or the data of the trainer cannot be told one example at a time; says what to give.
        CheckpointError: the folder has no checkpoints that can be used.
    """
    model = trainer.model
    if loss is not None and reduction is not None:
        raise TaskError("reduction is for the loss that the trainer has, but loss= is given. Leave one of them out.")
    kind, found = _loss(trainer, model, reduction) if loss is None else ("", loss)
    train, asked = trainer.train_dataset, trainer.eval_dataset if query is None else query
    if train is None or not hasattr(train, "__len__") or not hasattr(train, "__getitem__"):
        raise TaskError(
            f"The trainer's train_dataset is a {type(train).__name__}, but examples are needed that can be read by "
            "position. Give the trainer a data set with a length (streamed ones have none)."
        )
    if isinstance(asked, Mapping) and not hasattr(asked, "features"):
        raise TaskError(f"The trainer has several eval_dataset: {', '.join(asked)}. Give one of them as query=.")
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    tokenizer = getattr(trainer, "processing_class", None)
    if getattr(trainer.data_collator, "mlm", False):  # its masks are drawn anew for each batch
        probability, seed = trainer.data_collator.mlm_probability, trainer.args.seed
        train = losses.Masked(train, tokenizer, probability, seed)
        asked = None if asked is None else losses.Masked(asked, tokenizer, probability, seed)
        collate = trainer._get_collator_with_removed_columns(DataCollatorForTokenClassification(tokenizer))
    options.setdefault("show", partial(_shown, tokenizer))
    options.setdefault("tokenizer", tokenizer if hasattr(tokenizer, "convert_ids_to_tokens") else None)
    options.setdefault("columns", _labels(model, train))
    options.setdefault("query_columns", {} if asked is None else _labels(model, asked))
    options.setdefault("name", type(trainer).__name__ if not kind else f"{type(trainer).__name__} {kind}")
    return Task(
        model=model,
        loss=found,
        train=train,
        query=asked,
        collate=collate,
        checkpoints=find_checkpoints(
            folder,
            learning_rate=learning_rate,
            weighting=weighting,
            base="model" if hasattr(model, "peft_config") else None,
        ),
        layers=None if layers == "trainable" else layers,
        **options,
    )


def _loss(trainer: Any, model: Any, reduction: Reduction | None) -> tuple[str, Loss]:
    """The model's class, and what it is trained with."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    name = type(inner).__name__
    own = _own_loss(trainer)
    if own:
        raise TaskError(
            f"The trainer has a loss of its own ({' and '.join(own)}). Give it one example at a time, as loss=; "
            "gradindex.losses has the usual ones."
        )
    made: Loss | None = None
    if type(trainer).__name__ == "DPOTrainer":
        made = losses.dpo(reference=trainer.ref_model, beta=trainer.beta)
    elif "CLIP" in name or "Siglip" in name:
        losses.contrastive()
    else:
        make = next((make for ending, make in _LOSSES.items() if name.endswith(ending)), None)
        if make in _BY_TOKEN:
            return name, make(_reduction(trainer, inner) if reduction is None else reduction)
        made = None if make is None else make()
    if made is None:
        raise TaskError(
            f"The model is a {name}, whose loss gradindex does not know. Give it one example at a time, as loss=: "
            "loss(model, batch) -> (batch,)."
        )
    if reduction is not None:
        raise TaskError(f"reduction is {reduction!r}, but the loss of a {name} is no sum over tokens. Leave it out.")
    return name, made


def _own_loss(trainer: Any) -> list[str]:
    """What tells that a trainer does not minimise the loss that its model computes."""
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    known = owner.__name__ in _TRAINERS and owner.__module__.partition(".")[0] in ("transformers", "trl")
    usual, kind = _TRAINERS.get(owner.__name__), getattr(trainer.args, "loss_type", None)
    return [
        what
        for what, there in (
            ("compute_loss_func", getattr(trainer, "compute_loss_func", None) is not None),
            ("label_smoothing_factor", bool(getattr(trainer.args, "label_smoothing_factor", 0))),
            (f"{owner.__name__}.compute_loss", not known),
            (f"loss_type={kind}", known and usual is not None and kind not in (None, usual, [usual])),
        )
        if there
    ]


def _reduction(trainer: Any, model: Any) -> Reduction:
    """How the losses of an example's tokens make up its part of what the trainer minimised."""
    together = trainer.args.train_batch_size
    # A divisor of all batches of a step is only for models that pass it on; others divide by the tokens of each batch.
    passed_on = "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names
    if getattr(trainer, "model_accepts_loss_kwargs", False) and passed_on:
        together *= trainer.args.gradient_accumulation_steps * trainer.args.world_size
    found: Reduction = "sum" if together > 1 else "mean"
    over = f"the tokens of {together} examples" if together > 1 else "the tokens of each example"
    note(f"The loss of an example is the {found} over its tokens, for the trainer divided by {over} (reduction=).")
    return found


def _shown(tokenizer: Any, item: Any) -> Any:
    """The text of an example, where it has one."""
    if not isinstance(item, Mapping):
        return None
    for name in _TEXTS:
        if isinstance(item.get(name), str):
            return item[name]
    if tokenizer is not None and "input_ids" in item and hasattr(tokenizer, "decode"):
        return str(tokenizer.decode(item["input_ids"], skip_special_tokens=True))
    return None


def _labels(model: Any, data: Any) -> dict[str, Any]:
    """A column of the examples' labels, by their names where the model has some, if each has one label.

    Of a data set with columns, or a sequence of mappings.
    """
    name = next((name for name in ("label", "labels") if name in _names(data)), None)
    if name is None:
        return {}
    in_columns = hasattr(data, "column_names")
    values = [_plain(value) for value in (data[name] if in_columns else (item.get(name) for item in data))]
    if not all(isinstance(value, (int, str)) for value in values):
        return {}
    known = getattr(model.config, "id2label", None) or {}
    if all(str(text).startswith("LABEL_") for text in known.values()):
        known = {}
    return {"label": [str(known.get(value, value)) if known else value for value in values]}


def _names(data: Any) -> set[str]:
    """The columns, or the keys of each item of a list; others are not read to find out."""
    if isinstance(data, Sequence) and len(data) and all(isinstance(item, Mapping) for item in data):
        return set(data[0])
    return set(getattr(data, "column_names", None) or ())


def _plain(value: Any) -> Any:
    """A number out of a tensor or an array that holds one."""
    return value.item() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and value.ndim == 0 else value
