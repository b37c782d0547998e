"""hf.task: from a trainer to a task, against the model's own loss and naive autograd."""

import warnings
from dataclasses import replace

import frameworks
import numpy as np
import pytest
import torch
from reference import check_against_autograd, gradients

import gradindex
from gradindex.errors import TaskError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """Imported where it is used: collecting tests takes no trainer."""
    global transformers, datasets, hf
    transformers = frameworks.imported("transformers")
    datasets = frameworks.imported("datasets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gradindex.integrations import hf


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot", "cast", "dull", "fine"]
TEXTS = [
    "good film",
    "bad plot",
    "fine cast",
    "dull film film",
    "good good plot",
    "bad cast",
    "fine",
    "dull bad plot",
] * 2
LABELS = [1, 0, 1, 0, 1, 0, 1, 0] * 2
SIZES = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return transformers.BertTokenizer(str(path))


def trained(model, tokenizer, data, folder, collator=None, **options):
    torch.manual_seed(0)
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 0.05}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"), report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        **(defaults | options),
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data.select(range(3)), processing_class=tokenizer,
        data_collator=collator, callbacks=[hf.RecorderCallback(folder / "recorded", every=2)],
    )  # fmt: skip
    trainer.train()
    return trainer


def rates(task):
    """Of each checkpoint, the one of all its parameters."""
    names = [name for name, _ in task.model.named_parameters()]
    found = [set(checkpoint.learning_rates(names).values()) for checkpoint in task.checkpoints]
    return [rate for (rate,) in found]


def check_a_step(trainer, task, several=1):
    """The sum of our gradients of the examples of a step, times one factor, is the gradient that the step takes.

    Ours are by naive autograd, which the engine's are compared with elsewhere.

    Args:
        several: batches of a step.
    Returns:
        that factor, the batches, and the number that the trainer tells the model to divide by.
    """
    n = trainer.args.train_batch_size * several
    ours = gradients(task, [task.train[i] for i in range(n)]).sum((0, 1)).numpy()
    model = trainer.model  # with the weights that these were of
    model.zero_grad()
    each = trainer.args.train_batch_size
    batches = [task.collate([task.train[i] for i in range(start, start + each)]) for start in range(0, n, each)]
    trainer.current_gradient_accumulation_steps = several
    shared = trainer._get_num_items_in_batch(batches, trainer.args.device)
    for batch in batches:
        trainer.training_step(model, dict(batch), shared)
    theirs = np.concatenate([parameter.grad.flatten().numpy() for parameter in model.parameters()])
    factor = float(theirs @ ours / (ours @ ours))
    assert np.abs(theirs - factor * ours).max() < 1e-5 * np.abs(theirs).max()
    return factor, batches, shared


def texts(tokenizer, **columns):
    data = datasets.Dataset.from_dict({"text": TEXTS, "source": ["here"] * 16, **columns})
    return data.map(lambda row: tokenizer(row["text"]))


@pytest.fixture
def classifier(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}
    )
    model = transformers.BertForSequenceClassification(config)
    return trained(model, tokenizer, texts(tokenizer, label=LABELS), tmp_path)


def test_a_classifier_in_one_line(classifier, tmp_path):
    task = hf.task(classifier, tmp_path / "recorded")
    assert (task.n_train, task.n_query, len(task.checkpoints)) == (16, 3, 2)
    assert task.columns["label"] == ["good", "bad"] * 8 == [("bad", "good")[label] for label in LABELS]
    assert task.show(task.train[3]) == "dull film film"
    batch = task.collate([task.train[0], task.train[3]])
    assert "source" not in batch and "text" not in batch
    with torch.no_grad():
        own = [task.model.eval()(**task.collate([task.train[i]])).loss for i in (0, 3)]
        np.testing.assert_allclose(task.loss(task.model, batch), torch.stack(own), rtol=1e-5)
    check_against_autograd(task, rates(task))
    store = gradindex.build(task, tmp_path / "store")
    hits = gradindex.load(task, store.folder).proponents([0], k=3)
    assert "good film" in str(hits)
    assert "label" in store.columns
    # A text without a label is a query about the model's own answer.
    (text,) = task.read_texts(["good film"])
    assert task.token_names(text["input_ids"])[1:3] == ["good", "film"]
    asked = gradindex.load(replace(task, query_loss="predicted"), store.folder)
    found = asked.exact_scores(text)
    answer = int(task.model(**task.collate([text])).logits.argmax(1))
    np.testing.assert_allclose(found, gradindex.exact_scores(task, [text | {"label": answer}]), rtol=1e-4, atol=1e-7)


def test_masks_of_a_masked_language_model_stay_the_same(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)
    trainer = trained(model, tokenizer, texts(tokenizer), tmp_path, collator)
    task = hf.task(trainer, tmp_path / "recorded")
    assert task.train[2]["labels"] == task.train[2]["labels"]
    gradindex.build(task, tmp_path / "store")  # which refuses losses that differ between two calls


def test_a_causal_language_model(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = trained(model, tokenizer, texts(tokenizer), tmp_path, collator)
    task = hf.task(trainer, tmp_path / "recorded", layers="transformer.h.*")
    batch = task.collate([task.train[0]])
    with torch.no_grad():
        own = task.model.eval()(**batch).loss[None] * (batch["labels"][:, 1:] != -100).sum()
        np.testing.assert_allclose(task.loss(task.model, batch), own, rtol=1e-5)
    check_against_autograd(task, rates(task), prefixes=("transformer.h.",))


QUIET = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


def causal():
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def of_last(trainer, tmp_path, **options):
    """The task of the last checkpoint alone."""
    task = hf.task(trainer, tmp_path / "recorded", layers="*", **options)
    return replace(task, checkpoints=task.checkpoints[-1:])


@pytest.mark.parametrize("several", [1, 2])
def test_a_step_on_texts_is_the_sum_of_their_gradients(tokenizer, tmp_path, capsys, several):
    """Batches of 4 texts of unlike lengths, one or two of them in a step."""
    torch.manual_seed(0)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data, options = texts(tokenizer), {"gradient_accumulation_steps": several}
    trainer = trained(causal(), tokenizer, data, tmp_path, collator, **options)
    task = of_last(trainer, tmp_path)
    assert task.loss == gradindex.losses.causal_lm("sum")
    over = f"the tokens of {4 * several} examples"
    assert f"is the sum over its tokens, for the trainer divided by {over}" in capsys.readouterr().err
    factor, batches, shared = check_a_step(trainer, task, several)
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert labels == shared
    assert factor == pytest.approx(1 / labels, rel=1e-5)
    with pytest.raises(AssertionError):  # means weigh short texts more
        check_a_step(trainer, of_last(trainer, tmp_path, reduction="mean"), several)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_the_mean_is_what_batches_of_one_text_minimise(tokenizer, tmp_path, kind):
    """A step of 2 batches: a causal model divides by the tokens of both, a masked one (BERT) by those of each."""
    torch.manual_seed(0)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2}
    if kind == "causal":
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        model, expected = causal(), gradindex.losses.causal_lm("sum")
    else:
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **QUIET))
        expected = gradindex.losses.masked_lm("mean")
    trainer = trained(model, tokenizer, texts(tokenizer), tmp_path, collator, **options)
    task = of_last(trainer, tmp_path)
    assert task.loss == expected
    check_a_step(trainer, task, 2)


def test_a_step_of_a_classifier_is_the_mean_of_the_examples_gradients(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **QUIET, num_labels=2))
    trainer = trained(model, tokenizer, texts(tokenizer, label=LABELS), tmp_path)
    task = of_last(trainer, tmp_path)
    assert check_a_step(trainer, task)[0] == pytest.approx(1 / 4, rel=1e-5)
    with pytest.raises(TaskError, match="the loss of a BertForSequenceClassification is no sum over tokens"):
        hf.task(trainer, tmp_path / "recorded", reduction="sum")


def test_a_step_of_trls_trainer_is_the_sum_of_the_texts_gradients(tokenizer, tmp_path):
    """Of completions alone; other losses of its are refused."""
    trl = frameworks.imported("trl")
    torch.manual_seed(0)
    rows = {"prompt": [text.split()[0] for text in TEXTS], "completion": [f" film {text}" for text in TEXTS]}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=0.05,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False, max_length=16,
        eos_token="[SEP]", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        causal(), arguments, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer,
        callbacks=[hf.RecorderCallback(tmp_path / "recorded", every=2)],
    )  # fmt: skip
    trainer.train()
    task = of_last(trainer, tmp_path)
    assert task.loss == gradindex.losses.causal_lm("sum")
    factor, (batch,), _ = check_a_step(trainer, task)
    labelled = int((batch["labels"] != -100).sum())
    assert 0 < labelled < int(batch["attention_mask"].sum())
    assert factor == pytest.approx(1 / labelled, rel=1e-5)
    trainer.args.loss_type = "dft"
    with pytest.raises(TaskError, match=r"loss of its own \(loss_type=dft\)"):
        hf.task(trainer, tmp_path / "recorded")


@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize("wrap", [int, torch.tensor, np.int64])
def test_items_in_a_list_have_their_labels_as_a_column(classifier, tmp_path, monkeypatch, container, wrap):
    items = [{name: row[name] for name in ("text", "input_ids")} for row in classifier.train_dataset]
    items = container(item | {"labels": wrap(label)} for item, label in zip(items, LABELS, strict=True))
    monkeypatch.setattr(classifier, "train_dataset", items)
    task = hf.task(classifier, tmp_path / "recorded")
    assert task.columns["label"] == ["good", "bad"] * 8
    monkeypatch.setattr(classifier, "train_dataset", items[:15] + container([{"input_ids": [2, 5, 3]}]))
    assert hf.task(classifier, tmp_path / "recorded").columns == {}


def test_what_cannot_be_told_is_asked_for(classifier, tmp_path, monkeypatch):
    recorded = tmp_path / "recorded"
    with pytest.raises(
        TaskError, match=r"loss of its own \(compute_loss_func\)\. Give it one example at a time, as loss="
    ):
        classifier.compute_loss_func = lambda *_: None
        hf.task(classifier, recorded)
    assert hf.task(classifier, recorded, loss=lambda model, batch: None).loss is not None
    classifier.compute_loss_func = None
    own = type("Own", (transformers.Trainer,), {"compute_loss": lambda self, model, inputs, **_: None})
    monkeypatch.setattr(classifier, "__class__", own)
    with pytest.raises(TaskError, match=r"loss of its own \(Own\.compute_loss\)"):
        hf.task(classifier, recorded)
    monkeypatch.setattr(classifier, "__class__", transformers.Trainer)
    with pytest.raises(TaskError, match="reduction is for the loss that the trainer has, but loss= is given"):
        hf.task(classifier, recorded, loss=lambda model, batch: None, reduction="sum")
    monkeypatch.setattr(classifier.args, "label_smoothing_factor", 0.1)
    with pytest.raises(TaskError, match="label_smoothing_factor"):
        hf.task(classifier, recorded)
    monkeypatch.setattr(classifier.args, "label_smoothing_factor", 0.0)
    monkeypatch.setattr(classifier, "eval_dataset", {"one": [], "two": []})
    with pytest.raises(TaskError, match=r"several eval_dataset: one, two\. Give one of them as query="):
        hf.task(classifier, recorded)
    monkeypatch.setattr(classifier, "eval_dataset", None)
    assert hf.task(classifier, recorded).query is None
    monkeypatch.setattr(classifier, "train_dataset", iter([]))
    with pytest.raises(TaskError, match="examples are needed that can be read by position"):
        hf.task(classifier, recorded)
    monkeypatch.undo()
    classifier.model = torch.nn.Linear(2, 2)
    with pytest.raises(TaskError, match="The model is a Linear, whose loss gradindex does not know"):
        hf.task(classifier, recorded)
