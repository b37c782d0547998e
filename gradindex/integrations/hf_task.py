"""A task from what transformers' ``Trainer`` trained with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers.data.data_collator import DataCollatorForTokenClassification

from .. import losses
from ..checkpoint import find_checkpoints
from ..choices import Weighting
from ..errors import TaskError
from ..losses import PerExampleLoss
from ..task import Loss, Task

# How the names of transformers' classes end, and the loss that such a model is trained with.
_LOSSES: dict[str, Callable[[], PerExampleLoss]] = {
    "ForSequenceClassification": losses.sequence_classification,
    "ForImageClassification": losses.sequence_classification,
    "ForAudioClassification": losses.sequence_classification,
    "ForTokenClassification": losses.token_classification,
    "ForMaskedLM": losses.masked_lm,
    "ForMultipleChoice": losses.multiple_choice,
    "ForCausalLM": losses.causal_lm,
    "LMHeadModel": losses.causal_lm,
}
# Of an example, what a person reads.
_TEXTS = ("text", "sentence", "content", "prompt", "question")


def task(
    trainer: Any,
    folder: str | os.PathLike[str],
    *,
    query: Any = None,
    loss: Loss | None = None,
    layers: str | Sequence[str] | None = "trainable",
    learning_rate: Any = None,
    weighting: Weighting = "learning_rate",
    **options: Any,
) -> Task:
    """The task of a ``Trainer`` (or ``SFTTrainer``, ``DPOTrainer``) and the checkpoints that it or a callback wrote.

    Model, data, collator and the columns that the trainer drops are the trainer's. The loss is that which the model's
    class trains with, an example at a time; examples of a masked language model get masks that stay the same. Examples
    show as their text, and a column of labels is stored as ``label``. Texts are queries by way of the tokenizer.

    Args:
        trainer: after training, or made as for training.
        folder: of the run, or of :class:`~gradindex.integrations.hf.RecorderCallback`.
        query: the examples to ask about, by default the trainer's evaluation data.
        loss: where the trainer has a loss of its own; see :mod:`gradindex.losses`.
        layers: ``"trainable"`` for the parameters that were trained, or as for :class:`~gradindex.Task`.
        learning_rate: see :func:`~gradindex.find_checkpoints`; by default what was logged or recorded.
        weighting: see :func:`~gradindex.find_checkpoints`.
        **options: further arguments of :class:`~gradindex.Task`, such as ``name`` or ``show``.

    Raises:
        TaskError: the loss or the data of the trainer cannot be told one example at a time; says what to give.
        CheckpointError: the folder has no checkpoints that can be used.
    """
    model = trainer.model
    kind, found = _loss(trainer, model) if loss is None else ("", loss)
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


def _loss(trainer: Any, model: Any) -> tuple[str, Loss]:
    """The model's class, and what it is trained with."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    name = type(inner).__name__
    own = [
        what
        for what, there in (
            ("compute_loss_func", getattr(trainer, "compute_loss_func", None) is not None),
            ("label_smoothing_factor", bool(getattr(trainer.args, "label_smoothing_factor", 0))),
        )
        if there
    ]
    if own:
        raise TaskError(
            f"The trainer has a loss of its own ({' and '.join(own)}). Give it one example at a time, as loss=; "
            "gradindex.losses has the usual ones."
        )
    if type(trainer).__name__ == "DPOTrainer":
        return name, losses.dpo(reference=trainer.ref_model, beta=trainer.beta)
    if "CLIP" in name or "Siglip" in name:
        losses.contrastive()
    for ending, make in _LOSSES.items():
        if name.endswith(ending):
            return name, make()
    raise TaskError(
        f"The model is a {name}, whose loss gradindex does not know. Give it one example at a time, as loss=: "
        "loss(model, batch) -> (batch,)."
    )


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
    """A column of the examples' labels, by their names where the model has some, if each has one label."""
    names = set(getattr(data, "column_names", None) or ())
    for name in ("label", "labels"):
        if name in names:
            values = list(data[name])
            if not all(isinstance(value, (int, str)) for value in values):
                return {}
            known = getattr(model.config, "id2label", None) or {}
            if all(str(text).startswith("LABEL_") for text in known.values()):
                known = {}
            return {"label": [str(known.get(value, value)) if known else value for value in values]}
    return {}
